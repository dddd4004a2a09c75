"""Entropy of a layer's weights: how many bits their histogram holds.

`score_l = -sum_k p_k log2 p_k` over equal bins between the smallest and the largest weight.
Weights spread evenly over their range need their codes; concentrated ones waste them.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.errors import UsageError
from proxyq.proxies.proxy import register


@register(needs=("weight",), shape="layers", passes="none", reference="Shannon entropy")
def weight_entropy(taps: Taps, *, key: Any, bins: int = 256) -> np.ndarray:
    """Entropy of the histogram of the weights, in bits."""
    del key
    if bins < 2:
        raise UsageError(f"`bins` of weight-entropy must be at least 2, got {bins}.")
    return taps.map(lambda tap: histogram_entropy(np.asarray(tap.columns), bins))


def histogram_entropy(values: np.ndarray, bins: int) -> float:
    """Entropy in bits of the values' histogram over equal bins; 0 where all are equal."""
    x = np.asarray(values, np.float64).ravel()
    if not np.isfinite(x).all():
        return np.nan
    if x.min() == x.max():
        return 0.0
    counts, _ = np.histogram(x, bins)
    p = counts[counts > 0] / len(x)
    # -sum p log2 p
    return float(-np.sum(p * np.log2(p)))
