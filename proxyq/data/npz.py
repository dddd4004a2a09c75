"""Images and labels in a NumPy archive."""

import math
import re
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from proxyq.data.data import Data
from proxyq.errors import ProxyqError, UsageError, near, reason
from proxyq.files import read_bytes

# How the arrays of a split are usually called; the first that fits is taken.
WORDS = {
    "calibration": ("calib", "train"),
    "validation": ("val", "test", "eval"),
    "test": ("test", "eval", "val"),
}
MOST_RATIO, LEAST_BYTES = 250, 1 << 27
"""An array that unpacks to more than so many times its bytes in the file, and to more than so many
bytes in all, is no set of images but made to fill memory."""
_LABELS = re.compile(r"y(_|$)|.*(label|target)", re.IGNORECASE)
Header = tuple[tuple[int, ...], np.dtype]


def load_npz(
    path: Path, keys: tuple[str, ...], *, split: str, layout: str | None, name: str
) -> Data:
    """The arrays `keys` (images, and perhaps labels) of an archive; only they are read.

    Without keys the arrays with the shape of images and of labels are taken; where there are
    several, the one whose name tells of `split`. Where nothing has the shape of labels there
    are none, unless an array is called so.

    **Raises** `ProxyqError` when the file is damaged, `UsageError` when the arrays cannot be
    told or do not fit.
    """
    if not path.is_file():
        read_bytes(path, "data file")  # the common sentence for what cannot be read
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {
                entry.filename.removesuffix(".npy"): entry
                for entry in archive.infolist()
                if entry.filename.endswith(".npy")
            }
            headers, starts = {}, {}
            for key, entry in entries.items():
                headers[key], starts[key] = _header(archive.open(entry))
        if not headers:
            raise UsageError(f"the file {str(path)!r} holds no arrays.")
        image_key, label_key = _chosen(headers, keys, split, str(path))
        for key in filter(None, (image_key, label_key)):
            _check_bytes(key, entries[key], headers[key], starts[key], path)
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays[image_key]
            labels = arrays[label_key] if label_key else None
    except ProxyqError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each raise their own kinds
        raise ProxyqError(
            f"the data file {str(path)!r} is not an intact .npz archive of plain arrays "
            f"({type(error).__name__}: {reason(error)}): make it again with `numpy.savez`."
        ) from error
    label = f"{name}:{image_key}" + (f",{label_key}" if label_key else "")
    return Data(name=label, images=channels_last(images, layout, label), labels=labels)


def _header(file: IO[bytes]) -> tuple[Header, int]:
    """Shape and type of an array from its first bytes, and how many bytes these are."""
    with file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        return (shape, dtype), file.tell()


def _check_bytes(key: str, entry: zipfile.ZipInfo, header: Header, start: int, path: Path) -> None:
    """Refuse, before anything is unpacked, what is not there and what is there to fill memory."""
    shape, dtype = header
    if dtype.hasobject:
        raise ValueError(f"the array {key!r} holds Python objects, which are not unpickled")
    promised = start + math.prod(shape) * dtype.itemsize
    if promised != entry.file_size or entry.compress_size > path.stat().st_size:
        raise ProxyqError(
            f"the array {key!r} of {str(path)!r} is damaged: its shape {shape} takes "
            f"{promised:,} bytes, and there are {entry.file_size:,}; make the file again with "
            "`numpy.savez`."
        )
    if promised > max(LEAST_BYTES, MOST_RATIO * entry.compress_size):
        raise ProxyqError(
            f"the array {key!r} of {str(path)!r} unpacks to {promised:,} bytes from "
            f"{entry.compress_size:,}, which no images do: store them without compression, with "
            "`numpy.savez`, where this is meant."
        )


def _chosen(
    headers: dict[str, Header], keys: tuple[str, ...], split: str, path: str
) -> tuple[str, str | None]:
    for key in keys:
        if key not in headers:
            raise UsageError(f"{path!r} holds no array {key!r}: {near(key, list(headers))}")
    if keys:
        return keys[0], keys[1] if len(keys) > 1 else None
    listing = ", ".join(f"{key} {shape}" for key, (shape, _) in headers.items())
    remedy = f"name them, as in `{path}:IMAGES,LABELS` (there are {listing})."

    numbers = {key: head for key, head in headers.items() if head[1].kind in "buif"}
    images = [key for key, (shape, _) in numbers.items() if len(shape) in (3, 4)]
    image = _pick(images, split)
    if image is None:
        found = "several arrays may be" if images else "no array has the shape of"
        raise UsageError(f"{found} the images of {path!r}: {remedy}")
    count = numbers[image][0][0]
    vectors = {
        key: shape[0]
        for key, (shape, dtype) in numbers.items()
        if (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)) and dtype.kind in "ui"
    }
    labels = [key for key, length in vectors.items() if length == count]
    label = _pick(labels, split)
    if label is None and labels:
        raise UsageError(f"several arrays may be the labels of {path!r}: {remedy}")
    # Labels of other images in the file are no mistake; those that fit no images are.
    lengths = {numbers[key][0][0] for key in images}
    for key, length in vectors.items():
        if not labels and length not in lengths and _LABELS.match(key):
            raise UsageError(
                f"{path!r} has {count} images in {image!r} but {length} labels in {key!r}: store "
                f"one label for each image, or name the images alone, as in `{path}:{image}`."
            )
    return image, label


def _pick(names: list[str], split: str) -> str | None:
    """The only name, or the only one that tells of the split."""
    if len(names) == 1:
        return names[0]
    for word in WORDS[split]:
        told = [name for name in names if word in name.lower()]
        if told:
            return told[0] if len(told) == 1 else None
    return None


def channels_last(images: np.ndarray, layout: str | None, name: str) -> np.ndarray:
    """Images of either layout as (N, height, width, channels).

    The channels are the axis of size 1, 3 or 4. **Raises** `UsageError` where both or
    none could be it and `layout` does not say.
    """
    if images.ndim == 3:
        return images[..., None]
    if images.ndim != 4:
        raise UsageError(
            f"the images of {name!r} must have 3 or 4 axes, the first for the images, got shape "
            f"{images.shape}."
        )
    first, last = (images.shape[axis] in (1, 3, 4) for axis in (1, 3))
    if layout is None:
        if first == last:
            which = "both the second and the last" if first else "neither the second nor the last"
            raise UsageError(
                f"the layout of the images {name!r} of shape {images.shape} is not clear: {which} "
                "axis may be the channels (1, 3 or 4); store them as (N, height, width, "
                "channels) and give `layout='NHWC'` in Python."
            )
        layout = "NCHW" if first else "NHWC"
    return np.moveaxis(images, 1, -1) if layout == "NCHW" else images
