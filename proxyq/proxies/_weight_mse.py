"""Squared error of the rounded weights: the oldest measure, and the weakest.

`cost_l(b) = |Q_b(W_l) - W_l|^2`, or its mean over the weights. It ranks layers by the scale
of their weights, which batch-norm folding sets: know it as a baseline.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from proxyq.engine import Taps
from proxyq.errors import UsageError
from proxyq.proxies.proxy import register


@register(needs=("weight",), shape="layers bits", passes="none", reference="baseline")
def weight_mse(taps: Taps, *, key: Any, reduce: str = "sum") -> np.ndarray:
    """Squared error of the rounded weights, summed or averaged over each layer."""
    del key
    if reduce not in ("sum", "mean"):
        raise UsageError(f"`reduce` of weight-mse must be 'sum' or 'mean', got {reduce!r}.")
    average = jnp.sum if reduce == "sum" else jnp.mean
    # |Q_b(W) - W|^2
    return taps.table(lambda tap, bits: average((tap.quantized(bits) - tap.columns) ** 2))
