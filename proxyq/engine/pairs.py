"""Measure the network with one layer changed, and with two changed at once.

For choices a of one layer and b of a later one, what follows the later layer is all that a pair
has to run: the state that choice a leaves before it serves all of its choices b. That is a third
of the forward passes that pairs cost one by one. Losses are summed in float64, all on the same
images, since a pair's own term is the small difference of four of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from proxyq.checkpoint import Checkpoint
from proxyq.engine.alternatives import columns_of
from proxyq.engine.engine import Edits, Engine
from proxyq.engine.segments import NO_EDIT, Edit
from proxyq.model.model import logits_of
from proxyq.progress import Progress, silent

Loss = Callable[[np.ndarray, int], Callable[[np.ndarray], np.ndarray]]
"""`(the float network's logits, number of the first image) -> (changed logits -> [images])`.

What belongs to a batch is computed once, however many networks are compared on it.
"""


class PairLosses(NamedTuple):
    """Mean losses: `float` of the network unchanged, `singles` `[choices]`, and `pairs`
    `[choices, choices]`, symmetric, zero where two choices exclude each other, which `known`
    tells.
    """

    float: float
    singles: np.ndarray
    pairs: np.ndarray
    known: np.ndarray


def pair_sweep(
    engine: Engine,
    inputs: Any,
    alternatives: Mapping[str, Sequence[Edits]],
    loss: Loss,
    *,
    inside: Sequence[tuple[int, int]] = (),
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> PairLosses:
    """Losses with every choice, and with every pair of choices of two layers.

    **Arguments:**

    - `alternatives`: for each layer, edits of its sites (all layers the same number); choice
      `layer * number + column`.
    - `loss(reference, start)(logits)`: a number for each image.
    - `inside`: pairs of columns that one layer may take together, its weight's first and its
      input's second, measured too.
    - `checkpoint`: keeps the sums so far, under the name `pairs`.

    `progress` counts work, not pairs: a pair of two early layers runs most of the network.

    **Raises** `UsageError` when a layer is missing or has another number of alternatives.
    """
    network = engine.network
    columns = columns_of(network, alternatives)
    choices = columns * len(network.names)
    starting = {network.sites_of(name)[0]: row for row, name in enumerate(network.names)}
    checkpoint = checkpoint or Checkpoint()
    kept = checkpoint.load("pairs") or {}
    singles = kept.get("singles", np.zeros(choices))
    pairs = kept.get("pairs", np.zeros((choices, choices)))
    unchanged = kept.get("unchanged", np.zeros(()))
    finished = int(kept.get("rows", 0))
    images, rows = len(jax.tree.leaves(inputs)[0]), 0
    work = _row_work(engine, list(starting), columns)
    chunks = -(-images // engine.batch_size)
    done, total = 0, chunks * columns * sum(work.values())

    for chunk, (batch, count) in enumerate(engine.chunks(inputs)):
        start = chunk * engine.batch_size
        reference = np.asarray(logits_of(engine.run(batch)))[:count]

        measure = loss(reference, start)

        def summed(logits: Any, count: int = count, measure: Any = measure) -> Any:
            return np.sum(measure(logits[:count]), dtype=np.float64)

        def alone(state: Any, site: int, edits: Edits, summed: Any = summed) -> Any:
            return summed(np.asarray(logits_of(engine.resume(state, site, edits))))

        # Whole batches are counted with their first row, so that a resumed run counts them once.
        if rows >= finished:
            unchanged = unchanged + np.sum(measure(reference), dtype=np.float64)
        clean = engine.start(batch)
        for site in range(len(network.sites)):
            row = starting.get(site)
            own = () if row is None else alternatives[network.names[row]]
            for column, edits in enumerate(own):
                assert row is not None
                rows, done = rows + 1, done + work[site]
                if rows <= finished:
                    continue
                a, state = row * columns + column, clean
                singles[a] += alone(clean, site, edits)
                for other in (two for one, two in inside if one == column):
                    both = _together(edits, own[other])
                    pairs[a, row * columns + other] += alone(clean, site, both)
                for later in range(site, len(network.sites)):
                    if later > site and later in starting:
                        b = starting[later] * columns
                        ahead = {at: edit for at, edit in edits.items() if at >= later}
                        others = alternatives[network.names[starting[later]]]
                        joined = [{**ahead, **other} for other in others]
                        for k, logits in enumerate(engine.logits_each(state, later, joined)):
                            pairs[a, b + k] += summed(logits)
                    state, _ = engine.step(state, later, edits.get(later, NO_EDIT))
                progress("pairs", done, total)
                if checkpoint.due():
                    sums = {"singles": singles, "pairs": pairs, "unchanged": unchanged}
                    checkpoint.save("pairs", {**sums, "rows": np.array(rows)})
            clean, _ = engine.step(clean, site, NO_EDIT)
    # Every pair was measured in one of its two places.
    layer = np.arange(choices) // columns
    known = layer[:, None] != layer[None]
    for one, two in inside:
        rows_of = np.arange(len(network.names)) * columns
        known[rows_of + one, rows_of + two] = known[rows_of + two, rows_of + one] = True
    both = (pairs + pairs.T) / images
    return PairLosses(float(unchanged / images), singles / images, both, known)


def _together(weights: Edits, inputs: Edits) -> dict[int, Edit]:
    """A layer's rounded weight, corrected as it is alone, and its rounded input."""
    joined = dict(weights)
    for site, edit in inputs.items():
        joined[site] = joined.get(site, NO_EDIT)._replace(input_grid=edit.input_grid)
    return joined


# One element that is read or written takes the time of so many multiply-accumulates, about.
_MACS_PER_ELEMENT = 20


def _row_work(engine: Engine, starts: list[int], columns: int) -> dict[int, int]:
    """How much there is to run for one choice of the layer that starts at a site.

    In thousands of multiply-accumulates for one image, for telling how long it will take.
    """
    network = engine.network
    shares = {name: len(network.sites_of(name)) for name in network.names}
    macs = {layer.name: layer.macs // shares[layer.name] for layer in network.layers}
    cost = []
    for site, segment in zip(network.sites, engine.segments[1:], strict=True):
        elements = sum(var.aval.size for var in (*segment.reads, *segment.writes))
        cost.append(macs[site.layer] + _MACS_PER_ELEMENT * elements // engine.batch_size)
    suffix = [sum(cost[site:]) // 1000 + 1 for site in range(len(cost))]
    return {
        site: 2 * suffix[site] + columns * sum(suffix[later] for later in starts if later > site)
        for site in starts
    }
