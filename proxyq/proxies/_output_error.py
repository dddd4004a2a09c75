"""Relative output error: how far rounding a layer's weights moves its own output.

`cost_l(b) = mean |f(X, Q_b(W_l)) - f(X, W_l)|^2 / var f(X, W_l)`, with X the layer's input in
the float network and the variance over all images, positions and channels. One forward pass
and one more for each bit-width; no labels, no gradients.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import register


@register(
    needs=("output-error",),
    shape="layers bits",
    passes="1 forward + 1 per bit-width",
    reference="baseline",
)
def output_error(taps: Taps, *, key: Any) -> np.ndarray:
    """Mean squared change of each layer's own output, relative to its variance."""
    del key
    return np.stack([tap.output_error for tap in taps])
