"""The embedded network: a small residual network for handwritten digits, with its images.

Optical Recognition of Handwritten Digits, 8 × 8 grey values from 0 to 16 (E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0; `digits_files/ATTRIBUTION.json`).
The 1,797 images are cut by seed into 997 for training, which are not shipped, 256 for
calibration, 144 for validation and 400 for test, every cut balanced over the classes. The
network saw none of the last three in training. `scripts/train_digits.py` makes all files.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import nnx

from proxyq.errors import ProxyqError, UsageError, near
from proxyq.model.flax_import import from_nnx
from proxyq.model.model import Model, Preprocessing

Split = Literal["calibration", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
STAGES = ((16, 1, 2), (24, 2, 1), (32, 2, 1))  # width, stride of the first block, blocks
FOLDER = "digits_files"


class Block(nnx.Module):
    """Two 3 × 3 convolutions and a shortcut; a strided 1 × 1 convolution where shapes change."""

    def __init__(self, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs):
        def conv(size: int, channels: int, step: int) -> nnx.Conv:
            return nnx.Conv(
                channels,
                width,
                (size, size),
                strides=step,
                padding=size // 2,
                use_bias=False,
                kernel_init=nnx.initializers.he_normal(),
                rngs=rngs,
            )

        self.conv1 = conv(3, inputs, stride)
        self.bn1 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2 = conv(3, width, 1)
        self.bn2 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.shortcut = conv(1, inputs, stride) if stride > 1 or inputs != width else None
        self.bn3 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs) if self.shortcut else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images of `inputs` channels to images of `width`, NHWC."""
        out = nnx.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None and self.bn3 is not None:
            x = self.bn3(self.shortcut(x))
        return nnx.relu(out + x)


class DigitsNet(nnx.Module):
    """Stem, four residual blocks of 16, 16, 24 and 32 channels, mean, linear: 12 layers."""

    def __init__(self, *, rngs: nnx.Rngs):
        width = STAGES[0][0]
        self.stem = nnx.Conv(1, width, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        blocks = []
        for channels, stride, count in STAGES:
            for index in range(count):
                step = stride if index == 0 else 1
                blocks.append(Block(width, channels, step, rngs=rngs))
                width = channels
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images (batch, 8, 8, 1) to logits (batch, 10)."""
        x = nnx.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def load_digits() -> Model:
    """The embedded digits network: NHWC inputs (8, 8, 1), 35,600 weights in 12 layers.

    Top-1 in float32 is 99.00 % on the 400 test images, which `load_data("digits:test")`
    holds. Plain rounding of every kernel, one scale per output channel, leaves 98.75 % at
    4 bits, 98.00 % at 3 and 12.25 %, hardly more than chance, at 2. The weights come with
    the package; nothing is downloaded.
    """
    from safetensors.numpy import load

    record = _record()
    weights = load(_file("digits.safetensors"))
    definition, state = nnx.split(nnx.eval_shape(lambda: DigitsNet(rngs=nnx.Rngs(0))))
    flat = {
        path: variable.replace(weights[".".join(map(str, path))])
        for path, variable in nnx.to_flat_state(state)
    }
    module = nnx.merge(definition, nnx.from_flat_state(flat))
    return from_nnx(
        module,
        (8, 8, 1),
        name="digits",
        preprocessing=Preprocessing(mean=(record["mean"],), std=(record["std"],)),
    ).replace(identity={"source": "proxyq", "name": "digits"})


def digits_images(split: str = "calibration") -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 8, 8, 1) uint8 and labels (N,) int64 of one split.

    Grey values are those of the source times 255/16, rounded, so that white is 255.

    **Raises** `UsageError` for a split that there is not.
    """
    if split not in SPLITS:
        raise UsageError(f"the digits have no split {split!r}: {near(split, SPLITS)}")
    arrays = _arrays()
    return arrays[f"{split}_images"], arrays[f"{split}_labels"].astype(np.int64)


def _file(name: str) -> bytes:
    try:
        return files("proxyq.model").joinpath(FOLDER, name).read_bytes()
    except OSError as error:
        raise ProxyqError(
            f"the packaged file {FOLDER}/{name} is missing: install proxyq again."
        ) from error


@cache
def _record() -> dict[str, Any]:
    return json.loads(_file("digits.json"))


@cache
def _arrays() -> dict[str, np.ndarray]:
    import io

    with np.load(io.BytesIO(_file("digits.npz")), allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    for array in arrays.values():
        array.flags.writeable = False  # one copy serves all callers
    return arrays
