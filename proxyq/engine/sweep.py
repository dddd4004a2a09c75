"""Measure the network with one layer changed at a time.

For `L` layers and `B` alternatives each, `L B` runs of what follows the changed layer: the
clean state at the cut before a layer serves all its alternatives, then moves on by one
segment. A single clean state is held, whatever the depth. "Clean" is the float network, or one
that follows a plan.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from proxyq.checkpoint import Checkpoint
from proxyq.engine.alternatives import alternatives_each
from proxyq.engine.engine import Edits, Engine
from proxyq.engine.gram import Gram
from proxyq.engine.segments import NO_EDIT
from proxyq.model.model import logits_of
from proxyq.progress import Progress, silent

Measure = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""`(the float network's logits, the changed one's, number of the first image) -> [images, …]`."""


def single_layer_sweep(
    engine: Engine,
    inputs: Any,
    alternatives: Mapping[str, Sequence[Edits]],
    measure: Measure,
    *,
    base: Edits | None = None,
    grams: Sequence[Gram] = (),
    stacked: bool = False,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> np.ndarray:
    """The mean of `measure` with one layer changed, for every alternative: `[layers, B, …]`.

    **Arguments:**

    - `alternatives`: for each layer, edits of its sites (all layers the same number).
    - `measure(reference, logits, start)`: a number (or several) for each image, from the
      float network's logits and the changed network's; `start` numbers the first image.
    - `base`: edits of all the other layers; without, they are float. The reference stays the
      float network.
    - `grams`: take up the inner products of all changes of the logits.
    - `stacked`: run a layer's alternatives together along a new axis, for accelerators; on
      CPU it gains nothing, and sums run in another order. Where the engine splits alternatives
      among devices, so many run together.
    - `checkpoint`: keeps the sums so far, under the name `sweep`.

    **Raises** `UsageError` when a layer is missing or has another number of alternatives.
    """
    network = engine.network
    base = base or {}
    # A layer used several times is changed at all its places: its run starts at the first.
    starting = {network.sites_of(name)[0]: row for row, name in enumerate(network.names)}
    columns = alternatives_each(network, alternatives)
    checkpoint = checkpoint or Checkpoint()
    kept = checkpoint.load("sweep") or {}
    totals = kept.get("totals")
    finished = int(kept.get("steps", 0))
    for gram in grams:
        gram.restore(kept)
    images, sites = len(jax.tree.leaves(inputs)[0]), len(network.sites)
    steps = -(-images // engine.batch_size) * sites
    for done, (batch, count) in enumerate(engine.chunks(inputs)):
        if (done + 1) * sites <= finished:
            continue
        start = done * engine.batch_size
        reference = np.asarray(logits_of(engine.run(batch)))[:count]
        state = engine.start(batch)
        for site in range(sites):
            row, step = starting.get(site), done * sites + site + 1
            if row is not None and step > finished:
                own = alternatives[network.names[row]]
                edits = [{**base, **edit} for edit in own] if base else own
                changed = engine.logits_each(state, site, edits, stacked=stacked)
                for column, logits in enumerate(changed):
                    measured = measure(reference, logits[:count], start)
                    if totals is None:
                        totals = np.zeros((len(network.names), columns, *measured.shape[1:]))
                    totals[row, column] += np.sum(measured, axis=0, dtype=np.float64)
                    for gram in grams:
                        gram.add(row * columns + column, reference, logits[:count])
            if site == sites - 1:
                for gram in grams:
                    gram.close()
            state, _ = engine.step(state, site, base.get(site, NO_EDIT))
            progress("sweep", step, steps)
            if totals is not None and checkpoint.due():
                done_so_far = {"totals": totals, "steps": np.array(step)}
                for gram in grams:
                    done_so_far |= gram.arrays()
                checkpoint.save("sweep", done_so_far)
    assert totals is not None
    return totals / images
