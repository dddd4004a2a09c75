"""Apply bits to a network: which site gets which rounded weight, offset and input grid."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from proxyq.engine import Edit, Edits, Engine
from proxyq.engine.rounded import rounded_weight
from proxyq.errors import UsageError, near
from proxyq.model.model import Model
from proxyq.quantize import Grid, Rounding, check_bits


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
    edits = {
        index: Edit(weight=rounded_weight(engine, index, bits[site.layer], rounding))
        for index, site in enumerate(engine.network.sites)
        if site.layer in bits
    }
    return edits


def with_input_grids(edits: Edits, grids: Mapping[int, Grid]) -> dict[int, Edit]:
    """The edits, with inputs rounded too."""
    indices = sorted({*edits, *grids})
    return {i: edits.get(i, Edit())._replace(input_grid=grids.get(i)) for i in indices}
