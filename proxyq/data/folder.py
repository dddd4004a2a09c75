"""Image files in a folder: one sub-folder for each class, or all in one without labels."""

from pathlib import Path

import numpy as np
from PIL import Image

from proxyq.data.data import Data, LazyImages, balanced_order
from proxyq.errors import ProxyqError, UsageError
from proxyq.files import read_bytes

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
SPLIT_FOLDERS = {
    "calibration": ("calibration", "train", "training"),
    "validation": ("validation", "val", "valid", "test"),
    "test": ("test", "validation", "val", "valid"),
}


def load_folder(path: Path, *, split: str, name: str) -> Data:
    """The images below `path`, decoded when needed, the classes in turn.

    Sub-folders in the order of their names are the classes 0, 1, …; images at any depth
    belong to them. A folder without sub-folders gives images without labels, in order of
    name. A folder that holds nothing but `train`, `val`, `test` and the like: `split` says
    which to take.

    **Raises** `UsageError` when there is no such folder, or no image in it.
    """
    if not path.is_dir():
        raise UsageError(f"there is no folder {str(path)!r} to read images from.")
    folders = _folders(path)
    known = {word for words in SPLIT_FOLDERS.values() for word in words}
    if folders and all(folder.name.lower() in known for folder in folders):
        inside = {folder.name.lower(): folder for folder in folders}
        for word in SPLIT_FOLDERS[split]:
            if word in inside:
                return load_folder(inside[word], split=split, name=f"{name}/{inside[word].name}")
        raise UsageError(
            f"the folder {str(path)!r} holds {', '.join(sorted(inside))}, none of them for "
            f"{split}: name one, as in `dir:{folders[0]}`."
        )
    here = [entry for entry in path.iterdir() if _is_image(entry)]
    groups = [sorted(filter(_is_image, folder.rglob("*"))) for folder in folders]
    if here and any(groups):
        raise UsageError(
            f"the folder {str(path)!r} holds images both directly and in sub-folders: keep either "
            "one sub-folder for each class, or all images in one folder."
        )
    files = sorted(here) if here else [file for group in groups for file in group]
    if not files:
        raise UsageError(
            f"the folder {str(path)!r} holds no images ({', '.join(sorted(SUFFIXES))})."
        )
    if here:
        return Data(name=name, images=image_files(files))
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    order = balanced_order(labels)
    return Data(
        name=name,
        images=image_files([files[index] for index in order]),
        labels=labels[order],
        class_names=tuple(folder.name for folder in folders),
    )


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.name[0] != "."


def image_files(files: list[Path]) -> LazyImages:
    """Image files as images; the content of a file is its fingerprint."""
    return LazyImages(tuple(files), read_image, lambda file: read_bytes(file, "image"))


def read_image(file: Path) -> np.ndarray:
    """The image in a file as (H, W, 3) uint8, or (H, W, 1) where it is grey.

    **Raises** `ProxyqError` naming the file when it cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            return image_array(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ProxyqError(
            f"cannot read the image {str(file)!r} ({str(error).rstrip('.')}): it may be cut "
            "short; replace or remove it."
        ) from error


def image_array(image: Image.Image) -> np.ndarray:
    """A Pillow image as (H, W, 1 or 3) uint8; transparency is dropped."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it
        return (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)[..., None]
    if image.mode in ("1", "L", "LA"):
        return np.asarray(image.convert("L"))[..., None]
    if image.mode == "P":  # a transparent palette converts without a warning only by RGBA
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))
