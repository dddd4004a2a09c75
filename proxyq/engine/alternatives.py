"""The choices of every layer as edits: its weight at each bit-width, its input at each."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from proxyq.engine.engine import Edits, Engine
from proxyq.engine.ranges import fit_input_grid, input_samples
from proxyq.engine.rounded import rounded_layer
from proxyq.engine.segments import Edit
from proxyq.engine.statistics import (
    Moments,
    correct_weights,
    corrected_alternatives,
    float_moments,
)
from proxyq.errors import UsageError
from proxyq.model.network import Network
from proxyq.progress import Progress, silent
from proxyq.quantize import Rounding

CORRECTED = ("none", "weights", "statistics")
"""What may be restored of a layer that is measured alone."""


def choices(
    engine: Engine,
    inputs: Any,
    bits: Sequence[int],
    activation_bits: Sequence[int] = (),
    *,
    rounding: Rounding | None = None,
    correction: str = "none",
    base: Edits | None = None,
    moments: list[Moments] | None = None,
    progress: Progress = silent,
) -> dict[str, list[dict[int, Edit]]]:
    """For each layer `bits` edits of its weight, then `activation_bits` edits of its input.

    - `correction`: what is restored of the changed layer's statistics (`CORRECTED`); for
      `statistics` on the `inputs`, and on the layers before it as in `base`. `moments` are the
      float network's on them, where they are known.
    """
    if correction not in CORRECTED:
        raise UsageError(f"`correction` must be one of {', '.join(CORRECTED)}, got {correction!r}.")
    network = engine.network
    found = {
        name: [rounded_layer(engine, name, b, rounding) for b in bits] for name in network.names
    }
    samples = input_samples(engine, inputs, network.names) if activation_bits else {}
    for name in network.names:
        for width in activation_bits:
            # Of what looks up rows nothing is changed.
            grids = {i: fit_input_grid(samples[i], width) for i in network.products_of(name)}
            found[name].append({i: Edit(input_grid=grid) for i, grid in grids.items()})
    if correction == "weights":
        return {name: [correct_weights(engine, one) for one in own] for name, own in found.items()}
    if correction == "statistics":
        moments = moments or float_moments(engine, inputs, progress=progress)[0]
        return corrected_alternatives(engine, found, inputs, moments, base=base, progress=progress)
    return found


def alternatives_each(network: Network, alternatives: Mapping[str, Sequence[Edits]]) -> int:
    """How many alternatives every layer has.

    **Raises** `UsageError` when a layer is missing or has another number of them.
    """
    numbers = {len(alternatives.get(name, ())) for name in network.names}
    if len(numbers) != 1 or set(alternatives) - set(network.names):
        raise UsageError(
            "`alternatives` must hold every layer of the network, each with the same number of "
            "edits."
        )
    return numbers.pop()


def beside_each_other(bits: int, activation_bits: int) -> list[tuple[int, int]]:
    """Pairs of a layer's own choices that go together: a weight and an input."""
    return [(k, bits + a) for k in range(bits) for a in range(activation_bits)]


def spread(choices: np.ndarray, layers: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """`[choices, …]` as `[layers, bits, …]` and `[layers, activation_bits, …]`."""
    table = choices.reshape(layers, -1, *choices.shape[1:])
    return table[:, :bits], table[:, bits:]


def join(bits: Sequence[np.ndarray], activation_bits: Sequence[np.ndarray]) -> np.ndarray:
    """The other way round: numbers of every layer's choices, `[choices]`."""
    return np.concatenate([np.stack(bits), np.stack(activation_bits)], axis=1).ravel()
