"""Apply bits to a network: which site gets which rounded weight, offset and input grid."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine import Edit, Edits, Engine
from proxyq.errors import UsageError, near
from proxyq.model.model import Model
from proxyq.quantize import Grid, Range, Rounding, check_bits, fit_grid, quantize_columns


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedModel:
    """A model with rounded weights (and, if asked, rounded inputs of its layers).

    - `bits`: weight bits by layer; layers that are not named stay in floating point.
    - `edits`: what replaces each site's weight and input; they fit the model at every batch
      size.
    - `correction`: which correction of layer statistics is inside, and `notes` about it.
    """

    model: Model
    bits: Mapping[str, int]
    edits: Edits
    correction: str = "none"
    notes: Mapping[str, Any] = field(default_factory=dict)

    def logits(self, inputs: Any, *, memory: int | None = None) -> np.ndarray:
        """The network's first output on a set of inputs, `[images, …]`."""
        engine = Engine.build(self.model, len(jax.tree.leaves(inputs)[0]), memory=memory)
        return engine.logits(inputs, self.edits)


def round_weights(
    engine: Engine, bits: Mapping[str, int], rounding: Rounding | None = None
) -> dict[int, Edit]:
    """Edits that round each named layer's weights: one grid an output channel.

    **Raises** `UsageError` for an unknown layer or an impossible bit-width.
    """
    names = engine.network.names
    for name, width in bits.items():
        if name not in names:
            raise UsageError(f"the model has no layer {name!r}: {near(name, list(names))}")
        check_bits(width, f"bits of layer {name}")
    edits = {}
    for index, site in enumerate(engine.network.sites):
        if site.layer in bits:
            columns = quantize_columns(engine.columns(index), bits[site.layer], rounding)
            shape = engine.weight(index).shape
            edits[index] = Edit(weight=site.from_columns(columns, shape))
    return edits


_SAMPLES = 1 << 16


def input_grids(
    engine: Engine, bits: Mapping[str, int], inputs: Any, *, method: Range = "mse"
) -> dict[int, Grid]:
    """A grid for each named layer's input: asymmetric, one for the tensor.

    Ranges come from the float network's tensors on `inputs`, thinned to at most 65,536 values
    a batch at a fixed stride.
    """
    network = engine.network
    samples: dict[int, list[np.ndarray]] = {}
    for batch, _ in engine.chunks(inputs):  # padding repeats an image, which harms no range
        state = engine.start(batch)
        for index, site in enumerate(network.sites):
            data = network.graph.main[site.position].invars[1 - site.operand]
            if site.layer in bits:
                x = np.asarray(state[data] if data in state else engine.frontier[data])
                # The extremes are kept whatever the stride, so that absmax stays exact.
                thin = x.ravel()[:: _stride(x.size)]
                samples.setdefault(index, []).append(np.append(thin, [x.min(), x.max()]))
            state, _ = engine.step(state, index)
    return {
        index: _input_grid(np.concatenate(parts), bits[network.sites[index].layer], method=method)
        for index, parts in samples.items()
    }


def _stride(size: int) -> int:
    """A step that shares no factor with any axis, so that all channels are seen."""
    step = max(1, size // _SAMPLES)
    while math.gcd(step, size) > 1:
        step += 1
    return step


@partial(jax.jit, static_argnames="method")
def _fit(x: Any, bits: Any, method: Range) -> Grid:
    return fit_grid(x, bits, symmetric=False, method=method)


def _input_grid(x: np.ndarray, bits: int, *, method: Range) -> Grid:
    grid = _fit(jnp.asarray(x, jnp.float32), bits, method)
    return Grid(*(jnp.reshape(field, ()) for field in grid))


def with_input_grids(edits: Edits, grids: Mapping[int, Grid]) -> dict[int, Edit]:
    """The edits, with inputs rounded too."""
    indices = sorted({*edits, *grids})
    return {i: edits.get(i, Edit())._replace(input_grid=grids.get(i)) for i in indices}
