"""Data sets of the Hugging Face hub, through the package `datasets`."""

from typing import Any

import numpy as np

from proxyq.data.data import Data, LazyImages, known_labels
from proxyq.data.folder import image_array
from proxyq.errors import MissingExtra, ProxyqError, UsageError, first_line, near

PARTS = {
    "calibration": ("train", "training"),
    "validation": ("validation", "valid", "val", "test"),
    "test": ("test", "validation", "valid", "val"),
}
# Where a data set has several columns of classes (CIFAR-100), the finest comes first.
LABELS = ("label", "labels", "fine_label", "target", "class")


def load_hub(dataset: str, part: str | None, *, split: str, name: str) -> Data:
    """The images and classes of a hub data set; `part` names its split, else `split` tells.

    **Raises** `MissingExtra` without `datasets`, `UsageError` for an unknown part or columns
    that are not images and classes, `ProxyqError` when it cannot be had.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise MissingExtra("datasets", "hf", "Reading a data set from the hub") from error
    try:
        parts = list(datasets.get_dataset_split_names(dataset))
        chosen = part or next((word for word in PARTS[split] if word in parts), None)
        if chosen is None or chosen not in parts:
            wanted = chosen or split
            raise UsageError(
                f"the hub data set {dataset!r} has no part {wanted!r}: {near(wanted, parts)} "
                f"Name one as in `hf:{dataset}@{parts[0]}`."
            )
        table = datasets.load_dataset(dataset, split=chosen)
    except UsageError:
        raise
    except Exception as error:  # the client's own kinds, and those of three HTTP libraries
        raise ProxyqError(
            f"cannot load the hub data set {dataset!r} ({first_line(error)}): check its name and "
            "the network."
        ) from error
    return from_table(table, name=name)


def from_table(table: Any, *, name: str) -> Data:
    """A `datasets.Dataset` with a column of images and, perhaps, one of classes."""
    features = table.features
    kinds = {key: type(feature).__name__ for key, feature in features.items()}
    images = [key for key, kind in kinds.items() if kind == "Image"]
    if len(images) != 1:
        found = "no column" if not images else f"several columns ({', '.join(images)})"
        raise UsageError(
            f"the data {name!r} has {found} of images among {', '.join(kinds)}: load it in "
            "Python and give its arrays."
        )
    classes = [key for key, kind in kinds.items() if kind == "ClassLabel"]
    integers = [
        key
        for key, feature in features.items()
        if key in LABELS and str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
    ]
    column = next((key for key in LABELS if key in classes), None)
    if column is None and len(classes) > 1:
        raise UsageError(
            f"the data {name!r} has several columns of classes ({', '.join(classes)}): load it in "
            "Python and give its arrays."
        )
    column = column or (classes or integers or [None])[0]
    names = getattr(features[column], "names", None) if column else None
    image_column = images[0]

    def decode(index: int) -> np.ndarray:
        return image_array(table[index][image_column])

    # The client numbers every state of a table; decoding all images for a digest is dear.
    state = str(getattr(table, "_fingerprint", ""))
    return Data(
        name=name,
        images=LazyImages(
            tuple(range(len(table))),
            decode,
            (lambda index: f"{state}/{index}".encode())
            if state
            else (lambda index: decode(index).tobytes()),
        ),
        labels=known_labels(np.asarray(list(table[column]))) if column else None,
        class_names=tuple(names) if names else None,
    )
