"""`Model`: one pure function and a flat dictionary of named arrays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np

from proxyq.errors import ProxyqError, UsageError
from proxyq.files import digest_arrays

Params = Mapping[str, Any]
Apply = Callable[[Params, Any], Any]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How raw images become network inputs: `(resize(image) / 255 - mean) / std`.

    `resize` scales the shorter side to that many pixels, `size` (height, width) is the
    centre crop taken afterwards; either may be `None`. `mean` and `std` are per channel,
    on the scale where white is 1.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    resize: int | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if any(not s > 0 for s in self.std):
            raise UsageError(f"`std` must be positive in every channel, got {self.std}.")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """An array that its author keeps as one, taken apart along `axis` into the arrays `parts`."""

    parts: tuple[str, ...]
    axis: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A trained network as a pure function: `apply(params, inputs) -> outputs`.

    Every leaf of `inputs` and of the outputs has the batch as its first axis. `apply` can
    be traced at any batch size. The names in `params` are those the user knows:
    `layer1.0.conv1.weight` for torch, the pytree path joined with dots for Flax.

    - `inputs`: pytree of `jax.ShapeDtypeStruct`, shapes of ONE example, no batch axis.
    - `frozen`: names of `params` that are state rather than weights (batch-norm
      statistics, index tables); they are never quantized.
    - `image_layout`: how an image input lies in memory, `None` when the input is no image.
    - `batch_statistics_apply`: `apply` with batch norm taking the statistics of the batch
      (training mode) and all else as in evaluation; `None` where the source offers none.
    - `embeddings`: whether tables whose rows the data look up (`torch.nn.Embedding`, `nn.Embed`)
      are layers too.
    - `stacks`: arrays of the source that are several here, by their name there: a loop over
      layers (`nn.scan`) keeps the weights of all its steps in one, which is no parameter of one
      layer. A part may be such an array itself, of a loop inside; it comes later.
    - `identity`: where the model came from, as text for provenance.
    - `source`: the object that it came from, for exporters: a torch or nnx module, or the pair of
      a linen module and its variables. It is no part of digests, and its numbers may be older
      than `params`.
    """

    name: str
    apply: Apply
    params: Params
    inputs: Any
    frozen: frozenset[str] = frozenset()
    image_layout: Literal["NCHW", "NHWC"] | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    batch_statistics_apply: Apply | None = None
    embeddings: bool = False
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    source: Any = field(default=None, repr=False)

    def __call__(self, inputs: Any) -> Any:
        """The network's outputs on a batch."""
        return self.apply(self.params, inputs)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the first input, without the batch axis."""
        return tuple(jax.tree.leaves(self.inputs)[0].shape)

    def example(self, batch_size: int) -> Any:
        """`inputs` as `jax.ShapeDtypeStruct`s with a leading batch axis."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype), self.inputs
        )

    def digest(self) -> str:
        """SHA-256 of all parameters by name."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return digest_arrays(self.params)

    def record(self) -> dict[str, Any]:
        """What results tell of it: name, digest, where it came from, whether embeddings count."""
        embeddings = {"embeddings": True} if self.embeddings else {}
        return {"name": self.name, "digest": self.digest(), **self.identity, **embeddings}

    def check_finite(self) -> None:
        """Refuse weights that are not finite, naming the array."""
        for name, value in self.params.items():
            array = np.asarray(value)
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise ProxyqError(
                    f"the model's array {name!r} holds NaN or infinite values: load intact weights."
                )

    def replace(self, **changes: Any) -> "Model":
        """A copy with some fields changed."""
        return replace(self, **changes)


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A model's inputs as the positional and keyword arguments of its module's call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def logits_of(outputs: Any) -> Any:
    """The first array of a model's outputs: the logits of a classifier."""
    return jax.tree.leaves(outputs)[0]
