"""Measured rise of the loss when one layer is rounded and all others are not.

`cost_l(b) = L(W with Q_b(W_l)) - L(W)`, the mean cross-entropy to the targets. Where the
labels are fitted already (calibration images from the training set) the loss is flat and
noisy; `kl-delta` needs no labels and ranks better.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import Result, register


@register(
    needs=("loss-change",),
    shape="layers bits",
    passes="1 forward a layer and bit-width (what follows the layer)",
    reference="measured",
    activations=True,
)
def loss_delta(taps: Taps, *, key: Any) -> Result:
    """Rise of the cross-entropy when this layer alone is rounded."""
    del key
    values = np.stack([tap.loss_change for tap in taps])
    return Result(values, np.stack([tap.activation_loss_change for tap in taps]))
