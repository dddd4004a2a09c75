"""Which correction of layer statistics to use, measured rather than assumed.

Restoring each output channel's mean and deviation is worth more than any choice of bits, for
convolutional networks; a transformer with heavy-tailed channels and few images is better left
alone. `auto` fits on most of the images and keeps what brings the outputs on the others closest
to the float network's, which may be nothing. The corrections themselves: `engine.statistics`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from proxyq.engine import Edit, Edits, Engine
from proxyq.engine.loss import loss_of
from proxyq.engine.statistics import correct_statistics, correct_weights, float_moments
from proxyq.errors import UsageError
from proxyq.progress import Progress, silent

Correction = Literal["auto", "none", "weights", "statistics"]
CORRECTIONS = ("auto", "none", "weights", "statistics")


def correct(
    engine: Engine,
    edits: Edits,
    inputs: Any,
    correction: Correction = "auto",
    *,
    progress: Progress = silent,
) -> tuple[dict[int, Edit], str, Mapping[str, Any]]:
    """Apply a correction; returns the edits, what was used, and what was measured for it.

    `auto` fits on three quarters of the images and compares `none`, `weights` and
    `statistics` on the last quarter, by their `Loss` against the float network; the winner is
    fitted again on all of them.

    **Raises** `UsageError` for an unknown correction, or when images are needed and missing.
    """
    if correction not in CORRECTIONS:
        raise UsageError(
            f"`correction` must be one of {', '.join(CORRECTIONS)}, got {correction!r}."
        )
    if correction == "none":
        return dict(edits), "none", {}
    if correction == "weights":
        return correct_weights(engine, edits), "weights", {}
    images = 0 if inputs is None else len(jax.tree.leaves(inputs)[0])
    least = 8 if correction == "auto" else 1
    if images < least:
        raise UsageError(
            f"correction={correction!r} needs calibration images, at least {least}, got {images}: "
            "give more, or choose correction='weights' or 'none'."
        )
    moments, logits = float_moments(engine, inputs, progress=progress)
    if correction == "statistics":
        fitted = correct_statistics(engine, edits, inputs, moments, progress=progress)
        return fitted, "statistics", {}
    held = held_back(images)
    fit, check = (jax.tree.map(lambda x, rows=rows: x[rows], inputs) for rows in (~held, held))
    candidates = {
        "none": dict(edits),
        "weights": correct_weights(engine, edits),
        "statistics": correct_statistics(
            engine, edits, fit, [m.take(~held) for m in moments], progress=progress
        ),
    }
    found = {
        name: loss_of(logits[held], engine.logits(check, candidate))
        for name, candidate in candidates.items()
    }
    best = min(found, key=found.__getitem__)
    chosen = candidates[best]
    if best == "statistics":
        chosen = correct_statistics(engine, edits, inputs, moments, progress=progress)
    return (
        chosen,
        best,
        {
            "held_back_kl": {name: loss.kl for name, loss in found.items()},
            "held_back_rescaled": {name: loss.rescaled for name, loss in found.items()},
            "held_back_images": int(held.sum()),
        },
    )


def held_back(images: int) -> np.ndarray:
    """Which quarter of the images is not fitted on: `[images]`, true or false.

    By a fixed shuffle: data sets often alternate classes, and every fourth image misses some.
    """
    return np.random.default_rng(0).permutation(images) % 4 == 3
