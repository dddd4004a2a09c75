"""Images and labels in a NumPy archive."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from proxyq.data.archive import Header, read_arrays
from proxyq.data.data import Data
from proxyq.errors import UsageError, near

# How the arrays of a split are usually called; the first that fits is taken.
WORDS = {
    "calibration": ("calib", "train"),
    "validation": ("val", "test", "eval"),
    "test": ("test", "eval", "val"),
}
_LABELS = re.compile(r"y(_|$)|.*(label|target)", re.IGNORECASE)


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
    chosen: list[str] = []

    def choose(headers: Mapping[str, Header]) -> list[str]:
        chosen.extend(_chosen(headers, keys, split, str(path)))
        return chosen

    arrays = read_arrays(path, choose)
    images, *labels = (arrays[key] for key in chosen)
    label = f"{name}:{','.join(chosen)}"
    images = channels_last(images, layout, label)
    return Data(name=label, images=images, labels=labels[0] if labels else None)


def _chosen(
    headers: Mapping[str, Header], keys: tuple[str, ...], split: str, path: str
) -> list[str]:
    """The images' name, and the labels' where there are any."""
    for key in keys:
        if key not in headers:
            raise UsageError(f"{path!r} holds no array {key!r}: {near(key, list(headers))}")
    if keys:
        return list(keys[:2])
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
    return [image] if label is None else [image, label]


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
