"""Relative output error that is left when the layer's channel statistics are restored.

`cost_l(b) = sum_c E |a_c (f_c(X, Q_b(W_l)) - m'_c) + m_c - f_c(X, W_l)|^2 / sum_c var f_c(X, W_l)`,
with X the layer's input in the float network, m_c and m'_c the channel's mean before and after
rounding, and a_c the ratio of its deviations. With r_c the correlation of a channel's outputs
before and after, that is `sum_c 2 var_c (1 - r_c) / sum_c var f_c`.

`output-error` counts what a correction of layer statistics takes away: rounding shrinks a
channel, and moves its mean. This one counts the rest, at the same cost: one forward pass and one
more for each bit-width; no labels, no gradients. For networks that will be corrected.

Ours.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import register


@register(
    needs=("restored-error",),
    shape="layers bits",
    passes="1 forward + 1 per bit-width",
    reference="ours",
)
def restored_error(taps: Taps, *, key: Any) -> np.ndarray:
    """Change of each layer's own output, its channels' statistics restored, over its variance."""
    del key
    return np.stack([tap.restored_error for tap in taps])
