"""`Data`: images with or without labels, in memory or decoded when they are needed."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from proxyq.errors import ProxyqError, UsageError
from proxyq.files import digest_arrays

MOST_CLASSES = 1 << 24


@dataclass(frozen=True, eq=False)
class LazyImages:
    """A sequence of images that are decoded one by one, when asked for.

    - `items`: what stands for each image: a path, an index.
    - `decode`: item to array (height, width, 1 or 3) uint8; sizes may differ.
    - `fingerprint`: item to bytes that change when the image does.
    """

    items: tuple[Any, ...]
    decode: Callable[[Any], np.ndarray]
    fingerprint: Callable[[Any], bytes]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.decode(self.items[index])

    def select(self, indices: Iterable[int]) -> "LazyImages":
        """Some of the images, in the order of `indices`."""
        return replace(self, items=tuple(self.items[int(index)] for index in indices))


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """Images for calibration or evaluation.

    - `images`: array (N, height, width, channels) uint8, or float32 on the scale where white
      is 1; or `LazyImages`.
    - `labels`: class of each image, (N,) int64, or `None`: calibration needs none.
    - `class_names`: in the order of the labels, where the source tells.

    **Raises** `UsageError` when the arrays do not belong together, are empty or hold what
    no image holds.
    """

    name: str
    images: np.ndarray | LazyImages
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.images, LazyImages):
            object.__setattr__(self, "images", _checked_images(self.images, self.name))
        if len(self.images) == 0:
            raise UsageError(f"the data {self.name!r} holds no images.")
        if self.labels is not None:
            labels = _checked_labels(self.labels, self.name)
            if len(labels) != len(self.images):
                raise UsageError(
                    f"the data {self.name!r} has {len(self.images)} images but {len(labels)} "
                    "labels: give one label for each image."
                )
            object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        classes = "no labels" if self.classes is None else f"{self.classes} classes"
        if isinstance(self.images, LazyImages):
            return f"Data({self.name!r}, {len(self)} images, {classes})"
        height, width, channels = self.images.shape[1:]
        return f"Data({self.name!r}, {len(self)} images {height}×{width}×{channels}, {classes})"

    @property
    def classes(self) -> int | None:
        """The number of classes: of the names, or else the highest label plus one."""
        if self.class_names is not None:
            return len(self.class_names)
        return None if self.labels is None else int(self.labels.max()) + 1

    def subset(self, indices: slice | Iterable[int] | np.ndarray) -> "Data":
        """The images at `indices` (a slice, positions or a mask), in that order."""
        if isinstance(indices, slice):
            where = np.arange(len(self))[indices]
        else:
            where = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
            if where.dtype == bool:
                if where.shape != (len(self),):
                    raise UsageError(
                        f"the mask has shape {where.shape}, but {self.name!r} holds "
                        f"{len(self)} images."
                    )
                where = np.flatnonzero(where)
            if where.size and (where.min() < -len(self) or where.max() >= len(self)):
                raise UsageError(
                    f"the data {self.name!r} has no image {int(where.max())}: it holds {len(self)}."
                )
        where = where.astype(np.int64)
        images = self.images
        return replace(
            self,
            images=images.select(where) if isinstance(images, LazyImages) else images[where],
            labels=None if self.labels is None else self.labels[where],
        )

    def take(self, n: int) -> "Data":
        """The first `n` images; all of them where there are fewer."""
        if n < 1:
            raise UsageError(f"the number of images must be at least 1, got {n}.")
        return self if n >= len(self) else self.subset(slice(n))

    def split(self, n: int, *, seed: int | None = None) -> "tuple[Data, Data]":
        """`n` images and all the others, apart from each other, both balanced over the classes.

        **Raises** `UsageError` where one of the two would be empty.
        """
        if not 0 < n < len(self):
            raise UsageError(
                f"`n` must be between 1 and {len(self) - 1} to split the {len(self)} images of "
                f"{self.name!r}, got {n}."
            )
        order = _order(self, seed)
        return self.subset(order[:n]), self.subset(order[n:])

    def digest(self) -> str:
        """SHA-256 of the images and labels, independent of the name."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        labels = {} if self.labels is None else {"labels": self.labels}
        if not isinstance(self.images, LazyImages):
            return digest_arrays({"images": self.images, **labels})
        hasher = hashlib.sha256(digest_arrays(labels).encode())
        for item in self.images.items:
            hasher.update(hashlib.sha256(self.images.fingerprint(item)).digest())
        return hasher.hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """For provenance: name, number of images and digest."""
        return {"name": self.name, "images": len(self), "digest": self.digest()}


def _checked_images(images: Any, name: str) -> np.ndarray:
    """(N, H, W, C) as uint8 or float32; (N, H, W) becomes one channel."""
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise UsageError(
            f"the images of {name!r} must have shape (N, height, width, channels) with 1, 3 or 4 "
            f"channels, got {images.shape}."
        )
    if 0 in images.shape[1:]:
        raise UsageError(f"the images of {name!r} are empty: their shape is {images.shape}.")
    if images.dtype == np.uint8 or not images.size:
        return images
    if images.dtype == bool:
        return images.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(images.dtype, np.integer):
        low, high = int(images.min()), int(images.max())
        if low < 0 or high > 255:
            raise UsageError(
                f"the images of {name!r} hold integers from {low} to {high}: store uint8 from 0 "
                "to 255, or floats on the scale where white is 1."
            )
        return images.astype(np.uint8)
    if np.issubdtype(images.dtype, np.floating):
        if not np.isfinite(images).all():
            raise ProxyqError(f"the images of {name!r} hold NaN or infinite values.")
        with np.errstate(over="ignore"):
            narrow = images.astype(np.float32, copy=False)
        if not np.isfinite(narrow).all():
            raise ProxyqError(f"the images of {name!r} hold values too large for float32.")
        return narrow
    raise UsageError(f"the images of {name!r} must be uint8 or float, got {images.dtype}.")


def _checked_labels(labels: Any, name: str) -> np.ndarray:
    """(N,) int64; one column (N, 1) is flattened."""
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"the labels of {name!r} must be one integer for each image, got {labels.dtype} of "
            f"shape {labels.shape}."
        )
    if labels.size and labels.min() < 0:
        raise UsageError(
            f"the labels of {name!r} must count from 0, got {int(labels.min())}: leave out "
            "images without a class."
        )
    if labels.size and labels.max() >= MOST_CLASSES:
        raise UsageError(
            f"the labels of {name!r} must be below {MOST_CLASSES:,}, got {int(labels.max())}: "
            "give the number of each image's class."
        )
    return labels.astype(np.int64)


def known_labels(labels: np.ndarray) -> np.ndarray | None:
    """`None` for labels that are −1 throughout, the custom of collections for "not told"."""
    return None if labels.size and (labels < 0).all() else labels


def check_labels(data: Data, classes: int) -> None:
    """Refuse data without labels, or with labels that a network of `classes` outputs has not."""
    if data.labels is None:
        raise UsageError(
            f"the data {data.name!r} has no labels: accuracy needs one for each image."
        )
    highest = int(data.labels.max())
    if highest >= classes:
        raise UsageError(
            f"the data {data.name!r} has labels up to {highest}, but the network tells only "
            f"{classes} classes apart: give the data it was trained for."
        )


def balanced_order(labels: np.ndarray, seed: int | None = None) -> np.ndarray:
    """An order of all images in which every leading part is balanced over the classes.

    Classes take turns, each giving its images in their order, or in one drawn by `seed`. A
    class that has run out is passed over. Images whose classes alternate already keep
    their order.

    - `labels`: (N,) integers. Returns (N,) positions.
    """
    base = np.arange(len(labels))
    if seed is not None:
        base = np.random.default_rng(seed).permutation(base)
    _, first, inverse, counts = np.unique(
        labels[base], return_index=True, return_inverse=True, return_counts=True
    )
    turn = np.empty(len(labels), np.int64)  # how many of its class come before an image
    turn[np.argsort(inverse, kind="stable")] = np.concatenate([np.arange(c) for c in counts])
    return base[np.lexsort((first[inverse], turn))]


def _order(data: Data, seed: int | None) -> np.ndarray:
    if data.labels is not None:
        return balanced_order(data.labels, seed)
    if seed is None:
        return np.arange(len(data))
    return np.random.default_rng(seed).permutation(len(data))


def sample(data: Data, n: int, seed: int | None = None) -> Data:
    """`n` images, balanced over the classes where there are labels; all where there are fewer.

    Without a seed the first images of each class, the classes in turn (where they
    alternate already, as in the leading slice of a shuffled set made so: the first `n`);
    without labels the first `n`. With a seed a random draw, the same for the same seed.
    """
    if n < 1:
        raise UsageError(f"the number of images must be at least 1, got {n}.")
    return data.subset(_order(data, seed)[:n])
