"""`PlanEdits`: the networks of many plans of one model, whose layers are rounded once each."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from proxyq.engine import Edit, Edits, Engine
from proxyq.engine.ranges import (
    ActivationGrids,
    activation_grids,
    fit_input_grid,
    input_samples,
)
from proxyq.engine.rounded import rounded_layer
from proxyq.engine.statistics import Moments, correct_statistics, correct_weights, float_moments
from proxyq.ptq.quantized import with_grids
from proxyq.quantize import Grid, Rounding

Choice = tuple[int | None, int | None]
"""Weight and activation bits of a layer; `None` is float."""


class PlanEdits:
    """Call it with a plan: a `Choice` for each layer, and `none`, `weights` or `statistics`.

    - `engine`: of the model, for the number of `inputs`: the unlabelled images that statistics
      and ranges of activations are taken from.
    - `attention_bits`: of all products of two activations, whatever the plan; `None` is float.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: Any,
        rounding: Rounding | None = None,
        attention_bits: int | None = None,
    ):
        self.engine, self.inputs, self.rounding = engine, inputs, rounding or Rounding()
        self.attention_bits = attention_bits
        self._rounded: dict[tuple[str, int], dict[int, Edit]] = {}
        self._samples: dict[int, np.ndarray] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, in order."""
        return self.engine.network.names

    @cached_property
    def float_run(self) -> tuple[list[Moments], np.ndarray]:
        """The float network's statistics on the inputs, and its logits."""
        return float_moments(self.engine, self.inputs)

    @cached_property
    def _attention(self) -> Mapping[int, tuple[Grid, Grid]]:
        """The grids of the products of two activations."""
        if self.attention_bits is None:
            return {}
        names = (product.name for product in self.engine.network.attention)
        products = dict.fromkeys(names, self.attention_bits)
        return activation_grids(self.engine, {}, products, self.inputs).attention

    def __call__(self, plan: Sequence[Choice], correction: str = "none") -> Edits:
        """The network of a plan, rounded and corrected."""
        edits: dict[int, Edit] = {}
        grids: dict[int, Grid] = {}
        for name, (bits, activation_bits) in zip(self.names, plan, strict=True):
            if bits is not None:
                if (name, bits) not in self._rounded:
                    found = rounded_layer(self.engine, name, bits, self.rounding)
                    self._rounded[name, bits] = found
                edits |= self._rounded[name, bits]
            if activation_bits is not None:
                if not self._samples:
                    self._samples = input_samples(self.engine, self.inputs, self.names)
                for site in self.engine.network.products_of(name):
                    grids[site] = fit_input_grid(self._samples[site], activation_bits)
        if grids or self._attention:
            both = ActivationGrids(grids, self._attention)
            edits = with_grids(self.engine.network, edits, both)
        if correction == "weights":
            return correct_weights(self.engine, edits)
        if correction == "statistics":
            return correct_statistics(self.engine, edits, self.inputs, self.float_run[0])
        return edits
