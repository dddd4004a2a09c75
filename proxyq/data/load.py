"""`load_data`: what a user types after `--data` becomes `Data`."""

import re
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from proxyq.data.data import Data, sample
from proxyq.errors import UsageError, near
from proxyq.model.digits import SPLITS, digits_images

Split = Literal["calibration", "validation", "test"]
KINDS = ("digits", "FILE.npz", "dir:PATH", "torchvision:NAME@ROOT", "hf:ID", "random")
RANDOM_IMAGES = 256


def load_data(
    spec: str,
    *,
    split: Split = "calibration",
    samples: int | None = None,
    seed: int | None = None,
    layout: Literal["NCHW", "NHWC"] | None = None,
    shape: tuple[int, int, int] | None = None,
) -> Data:
    """The images that `spec` names.

    - `digits`, `digits:test`: the images of the embedded network (calibration, validation,
      test).
    - `FILE.npz`, `FILE.npz:IMAGES,LABELS`: arrays of a NumPy archive; labels may be absent.
    - `dir:PATH`: image files, one sub-folder for each class, or all in one folder.
    - `torchvision:CIFAR10@ROOT`: a torchvision data set, its files in ROOT.
    - `hf:ID`, `hf:ID@PART`: a data set of the Hugging Face hub.
    - `random`: uniform noise of `shape` (height, width, channels) drawn by `seed`.

    `split` tells which part serves where a source has several: images to calibrate on, or
    images that the network has not seen. `samples` keeps that many, as `sample` draws them.
    `layout` is that of the arrays of an archive, where their shape does not tell.

    **Raises** `UsageError` or `ProxyqError`, one sentence each.
    """
    if not isinstance(spec, str):
        raise UsageError(
            f"`spec` must be text such as 'digits' or 'FILE.npz', got {type(spec).__name__}: "
            "arrays go into `Data(name=..., images=..., labels=...)`."
        )
    if split not in get_args(Split):
        raise UsageError(f"unknown split {split!r}: {near(split, get_args(Split))}")
    if layout not in (None, "NCHW", "NHWC"):
        raise UsageError(f"`layout` must be 'NCHW', 'NHWC' or None, got {layout!r}.")
    if samples is not None and samples < 1:
        raise UsageError(f"`samples` must be at least 1, got {samples}.")
    if spec == "random":
        return random_images(shape, samples or RANDOM_IMAGES, seed or 0)
    data = _load(spec, split, layout)
    return data if samples is None else sample(data, samples, seed)


def _load(spec: str, split: Split, layout: str | None) -> Data:
    archive = re.fullmatch(r"(.+\.npz)(?::(.*))?", spec, flags=re.DOTALL)
    kind, colon, rest = spec.partition(":")
    if kind == "digits":
        if colon and not rest:
            raise UsageError(f"`digits:` must name a split: {', '.join(SPLITS)}.")
        images, labels = digits_images(rest or split)
        names = tuple(map(str, range(10)))
        return Data(name=f"digits:{rest or split}", images=images, labels=labels, class_names=names)
    if kind == "dir" and colon:
        path = Path(_required(rest, spec, "dir:PATH")).expanduser()
        return _load_folder(path, split)
    if kind == "torchvision" and colon:
        from proxyq.data.torchvision_data import load_torchvision

        name, at, root = rest.partition("@")
        if not (name and at and root):
            raise UsageError(
                f"the data {spec!r} must have the form `torchvision:NAME@ROOT`, where ROOT is the "
                "folder of the files."
            )
        return load_torchvision(
            name, Path(root).expanduser(), split=split, name=f"torchvision:{name}"
        )
    if kind == "hf" and colon:
        from proxyq.data.hub import load_hub

        name, _, part = _required(rest, spec, "hf:ID").partition("@")
        return load_hub(name, part or None, split=split, name=f"hf:{rest}")
    if archive:
        from proxyq.data.npz import load_npz

        path = Path(archive[1]).expanduser()
        keys = tuple(key.strip() for key in archive[2].split(",")) if archive[2] else ()
        if len(keys) > 2 or not all(keys) or archive[2] == "":
            raise UsageError(
                f"the data {spec!r} must name one array of images and at most one of labels: "
                "`FILE.npz:IMAGES,LABELS`."
            )
        return load_npz(path, keys, split=split, layout=layout, name=path.name)
    raise UsageError(_unknown(spec, kind))


def _load_folder(path: Path, split: Split) -> Data:
    from proxyq.data.folder import load_folder

    return load_folder(path, split=split, name=f"dir:{path.resolve().name}")


def _required(rest: str, spec: str, form: str) -> str:
    if not rest:
        raise UsageError(f"the data {spec!r} must have the form `{form}`.")
    return rest


def _unknown(spec: str, kind: str) -> str:
    path = Path(spec).expanduser()
    if path.is_dir():
        return f"unknown data {spec!r}: a folder of images is `dir:{spec}`."
    if path.is_file():
        return (
            f"unknown data {spec!r}: of files proxyq reads .npz archives; a folder is `dir:PATH`."
        )
    heads = {re.split(r"[:.]", form)[0]: form for form in KINDS if form != "FILE.npz"}
    hint = near(kind, list(heads))
    if hint.startswith("known"):
        hint = "known are " + ", ".join(KINDS) + "."
    return f"unknown data {spec!r}: {hint}"


def random_images(shape: tuple[int, int, int] | None, n: int, seed: int) -> Data:
    """`n` images of uniform noise without labels; `shape` is (height, width, channels)."""
    if shape is None or len(shape) != 3 or any(size < 1 for size in shape):
        raise UsageError(
            f"the data 'random' needs the `shape` (height, width, channels) of an image, got "
            f"{shape}: give `--input-shape`."
        )
    images = np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)
    return Data(name="random", images=images)
