"""Entropy of what a layer hands on: how many bits its histogram holds.

`score_l = -sum_k p_k log2 p_k` over equal bins between the smallest and the largest value of
the layer's feature, from a sample of values at a fixed stride over all images.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.errors import UsageError
from proxyq.proxies._weight_entropy import histogram_entropy
from proxyq.proxies.proxy import register


@register(needs=("sample",), shape="layers", passes="1 forward", reference="Shannon entropy")
def activation_entropy(taps: Taps, *, key: Any, bins: int = 256) -> np.ndarray:
    """Entropy of the histogram of the layer's feature, in bits."""
    del key
    if bins < 2:
        raise UsageError(f"`bins` of activation-entropy must be at least 2, got {bins}.")
    return taps.map(lambda tap: histogram_entropy(tap.sample, bins))
