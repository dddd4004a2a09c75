"""Relative error of the rounded weights: the inverse of the signal-to-noise ratio.

`cost_l(b) = |Q_b(W_l) - W_l|^2 / |W_l|^2 = 10^(-SQNR/10)` with SQNR in decibels. Unlike the
plain squared error it does not depend on the weights' scale.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import register


@register(needs=("weight",), shape="layers bits", passes="none", reference="baseline")
def sqnr(taps: Taps, *, key: Any) -> np.ndarray:
    """Squared error of the rounded weights relative to their energy (1 / SQNR)."""
    del key

    def relative(tap: Any, bits: int) -> Any:
        # |Q_b(W) - W|^2 / |W|^2; a layer of zeros loses nothing
        noise = jnp.sum((tap.quantized(bits) - tap.columns) ** 2)
        return noise / jnp.maximum(jnp.sum(tap.columns**2), jnp.finfo(noise.dtype).tiny)

    return taps.table(relative)
