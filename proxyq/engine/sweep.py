"""Measure the network with one layer changed at a time.

For `L` layers and `B` alternatives each, `L B` runs of what follows the changed layer: the
clean state at the cut before a layer serves all its alternatives, then moves on by one
segment. A single clean state is held, whatever the depth.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from proxyq.engine.engine import Edits, Engine
from proxyq.engine.segments import NO_EDIT
from proxyq.errors import UsageError
from proxyq.model.model import logits_of
from proxyq.progress import Progress, silent

Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]


def single_layer_sweep(
    engine: Engine,
    inputs: Any,
    alternatives: Mapping[str, Sequence[Edits]],
    measure: Measure,
    *,
    stacked: bool = False,
    progress: Progress = silent,
) -> np.ndarray:
    """The mean of `measure` with one layer changed, for every alternative: `[layers, B]`.

    **Arguments:**

    - `alternatives`: for each layer, edits of its sites (all layers the same number).
    - `measure(reference, logits)`: a number for each image, `[images]`, from the float
      network's logits and the changed network's.
    - `stacked`: run a layer's alternatives together along a new axis, for accelerators; on
      CPU it gains nothing, and sums run in another order.

    **Raises** `UsageError` when a layer is missing or has another number of alternatives.
    """
    network = engine.network
    numbers = {len(alternatives.get(name, ())) for name in network.names}
    if len(numbers) != 1 or set(alternatives) - set(network.names):
        raise UsageError(
            "`alternatives` must hold every layer of the network, each with the same number of "
            "edits."
        )
    # A layer used several times is changed at all its places: its run starts at the first.
    starting = {network.sites_of(name)[0]: row for row, name in enumerate(network.names)}
    totals = np.zeros((len(network.names), numbers.pop()))
    images = len(jax.tree.leaves(inputs)[0])
    batches = -(-images // engine.batch_size)
    for done, (batch, count) in enumerate(engine.chunks(inputs)):
        reference = np.asarray(logits_of(engine.run(batch)))[:count]
        state = engine.start(batch)
        for site in range(len(network.sites)):
            row = starting.get(site)
            if row is not None:
                edits = alternatives[network.names[row]]
                for column, logits in enumerate(_runs(engine, state, site, edits, stacked)):
                    totals[row, column] += np.sum(measure(reference, logits[:count]))
            state, _ = engine.step(state, site, NO_EDIT)
            progress("sweep", done * len(network.sites) + site + 1, batches * len(network.sites))
    return totals / images


def _runs(
    engine: Engine, state: Any, site: int, edits: Sequence[Edits], stacked: bool
) -> list[np.ndarray]:
    alone = all(set(edit) <= {site} for edit in edits)
    if stacked and alone and len(edits) > 1:
        own = [edit.get(site, NO_EDIT) for edit in edits]
        return list(np.asarray(logits_of(engine.resume_stacked(state, site, own))))
    return [np.asarray(logits_of(engine.resume(state, site, edit))) for edit in edits]
