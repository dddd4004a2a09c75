"""Quantization entropy, after the QE-score (Sun et al., NeurIPS 2022).

The entropy of a Gaussian output is `1/2 ln(2 pi e var)`, so what rounding the weights to `b`
bits takes from it is

    cost_l(b) = 1/2 ln(var f(X, W_l) / var f(X, Q_b(W_l)))

in nats for each output value; it may be negative where rounding noise adds variance. The
paper scores whole networks with fresh Gaussian weights and stage weights of its own; here
weights and images are the real ones and every layer has its own score, so that bits can be
chosen for it. (Written from summaries of the paper and of code that uses it.)
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import register


@register(
    needs=("output-variance",),
    shape="layers bits",
    passes="1 forward + 1 per bit-width",
    reference="QE-score: Sun et al. 2022 (NeurIPS)",
)
def quantization_entropy(taps: Taps, *, key: Any) -> np.ndarray:
    """Entropy of the layer's output that rounding its weights takes away."""
    del key
    variance = np.maximum(np.stack([tap.output_variance for tap in taps]), 1e-30)
    # 1/2 ln(var / var_b)
    return 0.5 * np.log(variance[:, :1] / variance[:, 1:])
