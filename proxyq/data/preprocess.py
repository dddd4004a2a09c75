"""From raw images to the batches that a network takes."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from proxyq.data.data import Data, LazyImages
from proxyq.errors import UsageError
from proxyq.model.model import Model, Preprocessing

Layout = Literal["NCHW", "NHWC"]


class Batch(NamedTuple):
    """Inputs of one batch, always of full size; `mask` says which are real.

    - `inputs`: float32, (batch, height, width, channels) or channels first.
    - `labels`: (batch,) int64 or `None`.
    - `mask`: (batch,) bool, false for the copies that fill up the last batch.
    """

    inputs: np.ndarray
    labels: np.ndarray | None
    mask: np.ndarray

    @property
    def size(self) -> int:
        """How many of the images are real."""
        return int(self.mask.sum())


def batches(
    data: Data,
    preprocessing: Preprocessing,
    layout: Layout | None,
    batch_size: int,
    *,
    channels: int | None = None,
) -> Iterator[Batch]:
    """The data in its order, cut into batches that are all of `batch_size`.

    The last batch is filled up with copies of its first image, so that a compiled function
    meets one shape only. `channels` is what the network takes: grey images are repeated
    where it takes three.

    **Raises** `UsageError` when the images do not fit the preprocessing.
    """
    if batch_size < 1:
        raise UsageError(f"`batch_size` must be at least 1, got {batch_size}.")
    _check_layout(layout)
    _check_range(data, preprocessing)
    return _batches(data, preprocessing, layout, batch_size, channels)


def _batches(
    data: Data,
    preprocessing: Preprocessing,
    layout: Layout | None,
    batch_size: int,
    channels: int | None,
) -> Iterator[Batch]:
    for start in range(0, len(data), batch_size):
        count = min(batch_size, len(data) - start)
        inputs = _convert(data, range(start, start + count), preprocessing, layout, channels)
        labels = None if data.labels is None else data.labels[start : start + count]
        mask = np.arange(batch_size) < count
        if count < batch_size:
            missing = batch_size - count
            inputs = np.concatenate([inputs, np.repeat(inputs[:1], missing, axis=0)])
            if labels is not None:
                labels = np.concatenate([labels, np.repeat(labels[:1], missing)])
        yield Batch(inputs, labels, mask)


def prepare(
    data: Data,
    preprocessing: Preprocessing,
    layout: Layout | None,
    *,
    channels: int | None = None,
) -> np.ndarray:
    """All images as one float32 array, for a calibration set that fits in memory.

    **Raises** `UsageError` when the images do not fit the preprocessing.
    """
    _check_layout(layout)
    _check_range(data, preprocessing)
    return _convert(data, range(len(data)), preprocessing, layout, channels)


def model_batches(model: Model, data: Data, batch_size: int) -> Iterator[Batch]:
    """`batches` in the form that `model` takes, after `check_fits`."""
    check_fits(data, model)
    shape = image_shape(model)
    return batches(data, model.preprocessing, model.image_layout, batch_size, channels=shape[2])


def model_inputs(model: Model, data: Data) -> np.ndarray:
    """`prepare` in the form that `model` takes, after `check_fits`."""
    check_fits(data, model)
    shape = image_shape(model)
    return prepare(data, model.preprocessing, model.image_layout, channels=shape[2])


def image_shape(model: Model) -> tuple[int, int, int]:
    """(height, width, channels) of the images that `model` takes.

    **Raises** `UsageError` when its input is no image.
    """
    if model.image_layout is None or len(model.input_shape) != 3:
        raise UsageError(
            f"the network {model.name!r} takes inputs of shape {model.input_shape}, which are no "
            "images: give it arrays of inputs in Python."
        )
    if model.image_layout == "NHWC":
        height, width, channels = model.input_shape
    else:
        channels, height, width = model.input_shape
    return height, width, channels


def check_fits(data: Data, model: Model) -> None:
    """Refuse images whose size or channels, after preprocessing, are not those of `model`.

    Of images that are decoded on demand only the first is looked at.
    """
    height, width, channels = image_shape(model)
    how = model.preprocessing
    first = data.images[0]
    given = _channels_after(first.shape[2], channels)
    if given != channels:
        raise UsageError(
            f"the images of {data.name!r} have {given} channels but the network {model.name!r} "
            f"takes {channels}."
        )
    _check_range(data, how)
    _statistics(how, channels)
    size = _size_after(first.shape[:2], how)
    if size != (height, width):
        raw = "" if size == first.shape[:2] else f" (from {_by(first.shape[:2])})"
        raise UsageError(
            f"the images of {data.name!r} are {_by(size)}{raw} but the network {model.name!r} "
            f"takes {_by((height, width))}: give `--size {min(height, width)}`, or in Python a "
            "`Preprocessing` with `resize` and `size`."
        )


def _by(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))


def _check_layout(layout: Layout | None) -> None:
    if layout not in ("NHWC", "NCHW"):
        raise UsageError(f"`layout` must be 'NHWC' or 'NCHW' for images, got {layout!r}.")


def _check_range(data: Data, how: Preprocessing) -> None:
    """Float images that are normalised already would be normalised twice: refuse them."""
    images = data.images
    if isinstance(images, LazyImages) or images.dtype == np.uint8:
        return
    low, high = float(images.min()), float(images.max())
    if low >= 0 and high > 16:
        raise UsageError(
            f"the float images of {data.name!r} range from {low:.3g} to {high:.3g}, which looks "
            "like 0 to 255: store uint8, or divide by 255 (white is 1)."
        )
    if all(m == 0 for m in how.mean) and all(s == 1 for s in how.std):
        return
    if low < -1e-3 or high > 1 + 1e-3:
        raise UsageError(
            f"the float images of {data.name!r} range from {low:.3g} to {high:.3g}, but must lie "
            "between 0 and 1, where white is 1: store uint8, or give `--mean 0 --std 1` when "
            "they are normalised already."
        )


_AT_ONCE = 32


def _convert(
    data: Data,
    where: range,
    how: Preprocessing,
    layout: Layout | None,
    channels: int | None,
) -> np.ndarray:
    """`where` of the images as float32 in `layout`: resize, crop, scale, normalise."""
    if isinstance(data.images, LazyImages):
        parts = [_fit(data.images[index][None], how, channels, data.name) for index in where]
        sizes = {part.shape[1:3] for part in parts}
        if len(sizes) > 1:
            one, other = sorted(sizes)[:2]
            raise UsageError(
                f"the images of {data.name!r} differ in size ({_by(one)}, {_by(other)}): give "
                "`--size`, to which they are scaled and cropped."
            )
        depths = {part.shape[3] for part in parts}
        if len(depths) > 1:  # nobody said how many channels; colour keeps everything
            parts = [_with_channels(part, max(depths), data.name) for part in parts]
        raw = np.concatenate(parts)
    else:
        raw = _fit(data.images[where.start : where.stop], how, channels, data.name)
    mean, std = _statistics(how, raw.shape[-1])
    order = (0, 3, 1, 2) if layout == "NCHW" else (0, 1, 2, 3)
    out = np.empty([raw.shape[axis] for axis in order], np.float32)
    for start in range(0, len(raw), _AT_ONCE):  # some at a time: no second copy of all of them
        part = raw[start : start + _AT_ONCE]
        part = part / np.float32(255) if part.dtype == np.uint8 else part.astype(np.float32)
        part -= mean
        part /= std
        out[start : start + _AT_ONCE] = part.transpose(order)
    return out


def _statistics(how: Preprocessing, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of shape (1,) or (channels,)."""
    for name, values in (("mean", how.mean), ("std", how.std)):
        if len(values) not in (1, channels):
            raise UsageError(
                f"`{name}` has {len(values)} values, but the images have {channels} "
                f"channel{'s' if channels > 1 else ''}: give one value, or one for each channel."
            )
    return np.asarray(how.mean, np.float32), np.asarray(how.std, np.float32)


def _channels_after(given: int, channels: int | None) -> int:
    return channels if given == 1 and channels in (3, 4) else given


def _with_channels(images: np.ndarray, channels: int | None, name: str) -> np.ndarray:
    """Grey images repeated to `channels`; any other difference is refused."""
    given = images.shape[-1]
    if channels is None or given == channels:
        return images
    if given == 1 and channels in (3, 4):
        return np.repeat(images, channels, axis=-1)
    raise UsageError(
        f"the images of {name!r} have {given} channels but the network takes {channels}."
    )


def _scaled(size: tuple[int, ...], how: Preprocessing) -> tuple[int, int]:
    """(height, width) after the shorter side has become `how.resize`."""
    height, width = size
    short = min(height, width)
    if how.resize is None or how.resize == short:
        return height, width
    # The longer side is cut to whole pixels, as torchvision does.
    return (
        how.resize if height == short else int(how.resize * height / short),
        how.resize if width == short else int(how.resize * width / short),
    )


def _size_after(size: tuple[int, ...], how: Preprocessing) -> tuple[int, int]:
    """(height, width) after resizing and cropping; too small to crop: as resized."""
    scaled = _scaled(size, how)
    if how.size is None or scaled[0] < how.size[0] or scaled[1] < how.size[1]:
        return scaled
    return how.size


def _fit(images: np.ndarray, how: Preprocessing, channels: int | None, name: str) -> np.ndarray:
    """Images (N, H, W, C) of one size resized and cropped; the type stays."""
    images = _with_channels(images, channels, name)
    size = _scaled(images.shape[1:3], how)
    if size != images.shape[1:3]:
        images = np.stack([resize(image, size) for image in images])
    if how.size is None or how.size == size:
        return images
    if size[0] < how.size[0] or size[1] < how.size[1]:
        raise UsageError(
            f"the images of {name!r} are {_by(size)}, too small to cut out {_by(how.size)}: give "
            f"`--size {min(how.size)}`, which scales them too."
        )
    top, left = (round((have - want) / 2) for have, want in zip(size, how.size, strict=True))
    return images[:, top : top + how.size[0], left : left + how.size[1]]


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """One image (H, W, C) scaled to `size` (height, width), bilinear with antialiasing.

    Bytes are scaled to bytes, as image libraries do and published accuracies assume.
    """
    shape = (size[1], size[0])
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BILINEAR))
    planes = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(image[..., channel])).resize(
                shape, Image.Resampling.BILINEAR
            )
        )
        for channel in range(image.shape[2])
    ]
    return np.stack(planes, axis=-1)
