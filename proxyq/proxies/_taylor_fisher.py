"""Squared first-order change of each image's loss: the Fisher matrix in one direction.

`cost_l(b) = 1/2 mean over images of (g_s' dW)^2 = 1/2 dW' F dW` with `dW = Q_b(W_l) - W_l`
and `F = E[g_s g_s']`: the whole Fisher block of a layer, not its diagonal alone, along the
direction that counts. By default F is the true Fisher information, which equals the
Gauss-Newton matrix, from one random combination of classes for each image
(`labels="probes"`, see `fisher`).
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import register


@register(
    needs=("first-order",),
    shape="layers bits",
    passes="1 forward + 1 backward + 1 per bit-width",
    reference="Fisher information along the rounding error",
    defaults={"labels": "probes"},
    random=True,
)
def taylor_fisher(taps: Taps, *, key: Any) -> np.ndarray:
    """Mean squared change of the images' losses, to first order in the rounding error."""
    del key
    # 1/2 mean_s (g_s' dW)^2
    return np.stack([0.5 * np.mean(tap.first_order**2, axis=1) for tap in taps])
