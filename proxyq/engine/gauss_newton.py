"""Divergence of choices to second order, from directional derivatives of the logits.

    u_a = J d_a          the logits' derivative along choice a, by forward mode
    KL(p || p_S)  ~  1/2 mean over images of u' (diag p - p p') u,      u = sum of u_a, a in S

`diag p - p p'` is the Hessian of KL by the logits, and leaving out the logits' own second
derivatives is the Gauss-Newton approximation. A choice changes what its layer puts out, by
`f(Q(x), W') + offset - f(x, W)`, and everything after it is linear in that: one tangent a layer
and choice, all of a layer pushed through what follows it together. No pair of choices is run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.checkpoint import Checkpoint
from proxyq.engine.alternatives import alternatives_each
from proxyq.engine.backward import Tape, record
from proxyq.engine.divergence import log_softmax, two_classes
from proxyq.engine.engine import Edits, Engine
from proxyq.engine.gram import Gram
from proxyq.engine.memory import bytes_per_image
from proxyq.engine.objectives import Targets, cross_entropy
from proxyq.engine.segments import NO_EDIT
from proxyq.progress import Progress, silent


def gauss_newton(
    engine: Engine,
    inputs: Any,
    alternatives: Mapping[str, Sequence[Edits]],
    *,
    temperature: float = 1.0,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> np.ndarray:
    """`[choices, choices]`, positive semidefinite: half the curvature of KL between choices.

    With one-hot `x`, `x' G x` is the divergence from the float network to second order, at
    `temperature` of both softmaxes.

    - `engine`: one whose batches are small enough to be kept whole (`tape=True`).
    - `alternatives`: for each layer, edits of its sites (all layers the same number); choice
      `layer * number + column`.
    - `checkpoint`: keeps the sums so far, under the name `tangents`.

    **Raises** `UsageError` when a layer is missing or has another number of alternatives.
    """
    names = engine.network.names
    columns = alternatives_each(engine.network, alternatives)
    checkpoint = checkpoint or Checkpoint()
    kept = checkpoint.load("tangents") or {}
    gram = Gram(len(names) * columns)
    gram.restore(kept)
    finished, step = int(kept.get("steps", 0)), 0
    images = len(jax.tree.leaves(inputs)[0])
    steps = -(-images // engine.batch_size) * len(names)
    for chunk, (batch, count) in enumerate(engine.chunks(inputs)):
        if step + len(names) <= finished:
            step += len(names)
            continue
        start = chunk * engine.batch_size
        tape = record(engine, batch, count, cross_entropy, Targets(how="predicted"), start)
        curved = _Curved(np.asarray(tape.logits)[:count], temperature)
        for row, name in enumerate(names):
            step += 1
            if step <= finished:
                continue
            for column, moved in enumerate(_tangents(tape, alternatives[name])):
                gram.put(row * columns + column, curved(moved[:count]))
            if row == len(names) - 1:
                gram.close()
            progress("tangents", step, steps)
            if checkpoint.due():
                checkpoint.save("tangents", {"steps": np.array(step), **gram.arrays()})
    return 0.5 * gram.total / images


def _tangents(tape: Tape, alternatives: Sequence[Edits]) -> np.ndarray:
    """`[alternatives, batch, …]`: the logits' derivative along each of one layer's edits."""
    found, size = [], _at_once(tape.engine, len(alternatives))
    for start in range(0, len(alternatives), size):
        some = alternatives[start : start + size]
        along = {
            site: jnp.stack(
                [
                    tape.engine.site_output(tape.states[site], site, edits.get(site, NO_EDIT))
                    - tape.outs[site]
                    for edits in some
                ]
            )
            for site in some[0]
        }
        moved = tape.tangents(along, "outputs", keep=False).logits
        if moved is None:  # the logits do not depend on the layer
            moved = np.zeros((len(some), *np.shape(tape.logits)))
        found.append(np.asarray(moved))
    return np.concatenate(found)


def _at_once(engine: Engine, alternatives: int) -> int:
    """How many alternatives of a layer are pushed together: all of them, or as many as fit into
    what a tape has for its derivatives, of which it has none here."""
    if engine.memory is None:
        return alternatives
    graph = engine.network.graph
    outs = sum(
        graph.main[site.position].outvars[0].aval.size
        * graph.main[site.position].outvars[0].aval.dtype.itemsize
        for site in engine.network.sites
    )
    images, parts = engine.batch_size, engine.placement.images
    # The tape's outputs and states stay; a direction takes as much as a batch that runs.
    room = parts * engine.memory - 2 * outs
    return int(np.clip(room // (2 * images * bytes_per_image(graph)), 1, alternatives))


class _Curved:
    """Tangents `u` of a batch's logits as vectors with `|v|^2 = u' (diag p - p p') u`, averaged
    over an image's predictions."""

    def __init__(self, logits: np.ndarray, temperature: float):
        self.p = np.exp(log_softmax(two_classes(logits), temperature))
        predictions = self.p[..., 0].size // len(self.p)
        self.scale = np.sqrt(self.p) / (temperature * np.sqrt(predictions))

    def __call__(self, moved: np.ndarray) -> np.ndarray:
        u = two_classes(np.asarray(moved, np.float64))
        # v = sqrt(p) (u - p'u), so that |v|^2 = sum p u^2 - (p'u)^2
        return self.scale * (u - np.sum(self.p * u, axis=-1, keepdims=True))
