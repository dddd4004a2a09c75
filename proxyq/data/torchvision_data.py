"""The data sets of torchvision, by name."""

import contextlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np

from proxyq.data.data import Data, LazyImages, known_labels
from proxyq.data.folder import image_array, image_files
from proxyq.errors import MissingExtra, ProxyqError, UsageError, first_line, near

# What data sets call their parts; each takes its own of these words.
PARTS = {
    "calibration": ("train", "trainval"),
    "validation": ("val", "valid", "test"),
    "test": ("test", "val", "valid"),
}


def load_torchvision(dataset: str, root: Path, *, split: str, name: str) -> Data:
    """The data set `torchvision.datasets.DATASET` in `root`.

    `split` chooses the part: `calibration` the training images, else those for validation
    or test. What is missing in `root` is downloaded, where torchvision can.

    **Raises** `MissingExtra` without torchvision, `UsageError` for an unknown name,
    `ProxyqError` when the images are neither there nor to be had.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise MissingExtra("torchvision", "torch", "Reading a torchvision data set")
    from proxyq.model.torch_import import import_torchvision

    sets = import_torchvision().datasets
    kinds = {
        key: value
        for key, value in vars(sets).items()
        if isinstance(value, type) and hasattr(value, "__getitem__") and key[0].isupper()
    }
    if dataset not in kinds:
        raise UsageError(f"torchvision has no data set {dataset!r}: {near(dataset, list(kinds))}")
    with contextlib.redirect_stdout(sys.stderr):  # some data sets report on standard output
        source = _open(kinds[dataset], dataset, root, split)
    if len(source) == 0:
        raise ProxyqError(f"the torchvision data set {dataset!r} in {str(root)!r} is empty.")
    if not _is_example(source[0]):
        raise UsageError(
            f"the torchvision data set {dataset!r} is not one image and one class each: choose "
            "a data set for classification."
        )
    names = getattr(source, "classes", None)
    return Data(
        name=name,
        images=_images(source),
        labels=known_labels(_labels(source)),
        class_names=tuple(map(str, names)) if names else None,
    )


def _open(kind: Any, dataset: str, root: Path, split: str) -> Any:
    accepted = inspect.signature(kind.__init__).parameters
    fixed: dict[str, Any] = {"root": str(root)} if "root" in accepted else {}
    if "train" in accepted:
        choices = [{"train": split == "calibration"}]
    elif "split" in accepted:
        choices = [{"split": part} for part in PARTS[split]]
    else:
        choices = [{}]
    for choice in choices:
        try:
            return kind(**fixed, **choice)
        except ValueError as error:  # another word for its parts, or another reason
            if choice is choices[-1]:
                raise ProxyqError(_sentence(dataset, root, error)) from error
        except Exception as missing:
            if "download" not in accepted:
                raise ProxyqError(_sentence(dataset, root, missing)) from missing
            try:
                return kind(**fixed, **choice, download=True)
            except Exception as error:  # no network, a full disk, a server's refusal
                raise ProxyqError(
                    f"the torchvision data set {dataset!r} is not in {str(root)!r} and cannot be "
                    f"downloaded ({first_line(error)}): put its files there, or go online."
                ) from error
    raise AssertionError("choices are never empty")


def _sentence(dataset: str, root: Path, error: Exception) -> str:
    return (
        f"cannot open the torchvision data set {dataset!r} in {str(root)!r} ({first_line(error)}): "
        "check the folder, or load it in Python and give its arrays."
    )


def _is_example(example: Any) -> bool:
    return (
        isinstance(example, tuple)
        and len(example) == 2
        and hasattr(example[0], "mode")
        and np.ndim(example[1]) == 0
        and np.issubdtype(np.asarray(example[1]).dtype, np.integer)
    )


def _labels(source: Any) -> np.ndarray:
    """Labels from where data sets keep them; as a last resort every example is decoded."""
    for attribute in ("targets", "labels", "_labels"):
        values = getattr(source, attribute, None)
        if values is not None and len(values) == len(source):
            labels = np.asarray(values)
            if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
                return labels
    for attribute in ("samples", "_samples", "imgs"):
        pairs = getattr(source, attribute, None)
        if isinstance(pairs, list) and len(pairs) == len(source):
            labels = np.asarray([pair[1] for pair in pairs])
            if np.issubdtype(labels.dtype, np.integer):
                return labels
    return np.asarray([int(source[index][1]) for index in range(len(source))])


def _images(source: Any) -> np.ndarray | LazyImages:
    """The bytes that small data sets keep in memory, or images decoded when needed."""
    held = getattr(source, "data", None)
    images = np.asarray(held) if held is not None and len(held) == len(source) else None
    if images is not None and images.dtype == np.uint8 and images.ndim in (3, 4):
        # The example says which axis is which: SVHN keeps channels first, CIFAR last.
        width, height = source[0][0].size
        if images.shape[1:3] == (height, width):
            return images
        if images.ndim == 4 and images.shape[2:] == (height, width):
            return np.moveaxis(images, 1, -1)
    for attribute in ("samples", "imgs"):
        pairs = getattr(source, attribute, None)
        if isinstance(pairs, list) and len(pairs) == len(source) and Path(pairs[0][0]).is_file():
            return image_files([Path(pair[0]) for pair in pairs])

    def decode(index: int) -> np.ndarray:
        return image_array(source[index][0])

    return LazyImages(tuple(range(len(source))), decode, lambda index: decode(index).tobytes())
