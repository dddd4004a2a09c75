"""Measure the network with one layer changed, and with two changed at once.

For choices a of one layer and b of a later one, what follows the later layer is all that a pair
has to run: the state that choice a leaves before it serves all of its choices b. That is a third
of the forward passes that pairs cost one by one. Losses are summed in float64, all on the same
images, since a pair's own term is the small difference of four of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from proxyq.checkpoint import Checkpoint
from proxyq.engine.alternatives import alternatives_each
from proxyq.engine.engine import Edits, Engine
from proxyq.engine.segments import NO_EDIT, Edit
from proxyq.model.model import logits_of
from proxyq.progress import Progress, silent

PairLoss = Callable[[np.ndarray, int], Callable[[np.ndarray], np.ndarray]]
"""`(the float network's logits, number of the first image) -> (changed logits -> [images])`.

What belongs to a batch is computed once, however many networks are compared on it.
"""


RowWork = Callable[[Sequence[int]], Iterator[tuple[int, tuple[float, Any]]]]
"""Rows of the table of pairs by their numbers -> `(place in the list, pair_row)`, in any order."""


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
    loss: PairLoss,
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
    sweep = _Sweep(engine, alternatives, inside)
    columns, choices = sweep.columns, sweep.choices
    checkpoint = checkpoint or Checkpoint()
    kept = checkpoint.load("pairs") or {}
    singles = kept.get("singles", np.zeros(choices))
    pairs = kept.get("pairs", np.zeros((choices, choices)))
    unchanged = kept.get("unchanged", np.zeros(()))
    finished = int(kept.get("rows", 0))
    images, rows = len(jax.tree.leaves(inputs)[0]), 0
    work = _row_work(engine, list(sweep.starting), columns)
    chunks = -(-images // engine.batch_size)
    done, total = 0, chunks * columns * sum(work.values())

    for chunk, (batch, count) in enumerate(engine.chunks(inputs)):
        reference, measure = _measure(engine, batch, count, loss, chunk)
        # Whole batches are counted with their first row, so that a resumed run counts them once.
        if rows >= finished:
            unchanged = unchanged + np.sum(measure(reference), dtype=np.float64)
        clean = engine.start(batch)
        for site in range(len(engine.network.sites)):
            row = sweep.starting.get(site)
            for column in range(0 if row is None else columns):
                assert row is not None
                rows, done = rows + 1, done + work[site]
                if rows <= finished:
                    continue
                a = row * columns + column
                single, own = sweep.row(clean, site, column, _summed(measure, count))
                singles[a] += single
                pairs[a] += own
                progress("pairs", done, total)
                if checkpoint.due():
                    sums = {"singles": singles, "pairs": pairs, "unchanged": unchanged}
                    checkpoint.save("pairs", {**sums, "rows": np.array(rows)})
            clean, _ = engine.step(clean, site, NO_EDIT)
    return sweep.losses(float(unchanged), singles, pairs, images)


def pair_row(
    engine: Engine,
    inputs: Any,
    alternatives: Mapping[str, Sequence[Edits]],
    loss: PairLoss,
    choice: int,
    *,
    inside: Sequence[tuple[int, int]] = (),
) -> tuple[float, np.ndarray]:
    """The sums of losses with one choice: alone, and with each of later layers, `[choices]`.

    `choice` counts as `PairLosses` does: `layer * number + column`. The same numbers as in
    `pair_sweep`, for about one forward pass more.
    """
    sweep = _Sweep(engine, alternatives, inside)
    row, column = divmod(choice, sweep.columns)
    first = next(site for site, own in sweep.starting.items() if own == row)
    single, pairs = 0.0, np.zeros(sweep.choices)
    for chunk, (batch, count) in enumerate(engine.chunks(inputs)):
        _, measure = _measure(engine, batch, count, loss, chunk)
        clean = engine.start(batch)
        for site in range(first):
            clean, _ = engine.step(clean, site, NO_EDIT)
        alone, own = sweep.row(clean, first, column, _summed(measure, count))
        single, pairs = single + alone, pairs + own
    return single, pairs


def pairs_by_row(
    engine: Engine,
    inputs: Any,
    alternatives: Mapping[str, Sequence[Edits]],
    loss: PairLoss,
    work: RowWork,
    *,
    inside: Sequence[tuple[int, int]] = (),
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> PairLosses:
    """`pair_sweep`, with each row of the table measured by others: `work` gives `pair_row`s.

    - `checkpoint`: keeps the rows that have come, under the name `rows`.
    """
    sweep = _Sweep(engine, alternatives, inside)
    choices, images = sweep.choices, len(jax.tree.leaves(inputs)[0])
    checkpoint = checkpoint or Checkpoint()
    kept = checkpoint.load("rows") or {}
    singles = kept.get("singles", np.full(choices, np.nan))
    pairs = kept.get("pairs", np.zeros((choices, choices)))
    come = kept.get("come", np.zeros(choices, bool))
    left = np.flatnonzero(~come).tolist()
    for number, (single, own) in work(left):
        a = left[number]
        singles[a], pairs[a], come[a] = single, own, True
        progress("rows of pairs", int(come.sum()), choices)
        if checkpoint.due():
            checkpoint.save("rows", {"singles": singles, "pairs": pairs, "come": come})
    unchanged = 0.0
    for chunk, (batch, count) in enumerate(engine.chunks(inputs)):
        reference, measure = _measure(engine, batch, count, loss, chunk)
        unchanged += float(np.sum(measure(reference), dtype=np.float64))
    return sweep.losses(unchanged, singles, pairs, images)


def _measure(engine: Engine, batch: Any, count: int, loss: PairLoss, chunk: int) -> tuple[Any, Any]:
    """The float network's logits on a batch, and what measures others against them."""
    reference = np.asarray(logits_of(engine.run(batch)))[:count]
    return reference, loss(reference, chunk * engine.batch_size)


def _summed(measure: Any, count: int) -> Callable[[np.ndarray], Any]:
    return lambda logits: np.sum(measure(logits[:count]), dtype=np.float64)


class _Sweep:
    """What there is to measure, and a row of it on one batch."""

    def __init__(
        self,
        engine: Engine,
        alternatives: Mapping[str, Sequence[Edits]],
        inside: Sequence[tuple[int, int]],
    ):
        network = engine.network
        self.engine, self.alternatives, self.inside = engine, alternatives, inside
        self.columns = alternatives_each(network, alternatives)
        self.choices = self.columns * len(network.names)
        self.starting = {network.sites_of(name)[0]: row for row, name in enumerate(network.names)}

    def row(
        self, clean: Any, site: int, column: int, summed: Callable[[np.ndarray], Any]
    ) -> tuple[Any, np.ndarray]:
        """Losses with one choice of the layer that starts at `site`, from the state before it."""
        engine, names = self.engine, self.engine.network.names
        row = self.starting[site]
        own, found = self.alternatives[names[row]], np.zeros(self.choices)
        edits, state = own[column], clean

        def alone(edits: Edits) -> Any:
            return summed(np.asarray(logits_of(engine.resume(clean, site, edits))))

        single = alone(edits)
        for other in (two for one, two in self.inside if one == column):
            found[row * self.columns + other] = alone(_together(edits, own[other]))
        for later in range(site, len(engine.network.sites)):
            if later > site and later in self.starting:
                b = self.starting[later] * self.columns
                ahead = {at: edit for at, edit in edits.items() if at >= later}
                others = self.alternatives[names[self.starting[later]]]
                joined = [{**ahead, **other} for other in others]
                for k, logits in enumerate(engine.logits_each(state, later, joined)):
                    found[b + k] = summed(logits)
            state, _ = engine.step(state, later, edits.get(later, NO_EDIT))
        return single, found

    def losses(
        self, unchanged: float, singles: np.ndarray, pairs: np.ndarray, images: int
    ) -> PairLosses:
        """Means; every pair was measured in one of its two places."""
        layer = np.arange(self.choices) // self.columns
        known = layer[:, None] != layer[None]
        rows_of = np.arange(len(self.starting)) * self.columns
        for one, two in self.inside:
            known[rows_of + one, rows_of + two] = known[rows_of + two, rows_of + one] = True
        return PairLosses(unchanged / images, singles / images, (pairs + pairs.T) / images, known)


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
