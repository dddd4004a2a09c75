"""LIMPQ: learned step sizes as importance (Tang et al., ECCV 2022, arXiv:2203.08368).

A short training with labels learns the step size of every layer and bit-width, for weights and
for what layers read (`proxyq.engine.step_sizes`). The step sizes themselves are the costs,

    cost_l(b_w, b_a) = alpha s_w[l, b_w] + s_a[l, b_a]

larger where a layer is more sensitive at that bit-width. The published `alpha` is 2, and so it
is here. It is the one proxy that trains: minutes, resumable. With `ends=false`, as published,
the first and the last layer stay in floating point and cost nothing, so pin them.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.engine.memory import tape_bytes_per_image, too_little
from proxyq.engine.step_sizes import train_step_sizes
from proxyq.proxies.proxy import Result, register


@register(
    needs=("engine",),
    shape="layers bits",
    passes="a forward and backward pass for each bit-width and one more, each epoch",
    reference="LIMPQ: Tang et al. 2022, arXiv:2203.08368",
    cost_class="training",
    random=True,
    activations=True,
    fixed={"labels": "data"},
    lookups=False,  # step sizes of weights and inputs are trained together
    groups=False,  # a layer has one step size
)
def limpq(
    taps: Taps,
    *,
    key: Any,
    alpha: float = 2.0,
    epochs: int = 1,
    batch_size: int = 64,
    learning_rate: float = 0.01,
    ends: bool = True,
) -> Result:
    """Step sizes learned for all bit-widths together (trains for minutes)."""
    _check_room(taps, batch_size)
    found = train_step_sizes(
        taps.engine.network.model,
        taps.inputs,
        taps.labels,
        taps.bits,
        activation_bits=taps.activation_bits or None,
        key=key,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        ends=ends,
        checkpoint=taps.checkpoint,
        progress=taps.progress,
    )
    rows = [taps.layers.index(layer) for layer in found.layers]

    def whole(table: np.ndarray) -> np.ndarray:
        """All layers' rows; one that stayed in floating point costs nothing."""
        spread = np.zeros((len(taps), table.shape[1]))
        spread[rows] = table
        return spread

    notes = {
        "step_sizes_of_inputs": whole(found.activations).tolist(),
        "loss": found.losses.tolist(),
    }
    # alpha s_w + s_a
    beside = whole(found.activations) if taps.activation_bits else None
    return Result(alpha * whole(found.weights), beside, notes)


def _check_room(taps: Taps, batch_size: int) -> None:
    """Refuse batches that `memory` has no room for: their size is part of the method."""
    if taps.memory is None:
        return
    least = batch_size * tape_bytes_per_image(taps.engine.network)
    if least > taps.memory:
        what = f"a step of training (limpq) with {batch_size} images"
        raise too_little(what, least, taps.memory, ", or a smaller batch_size")
