"""Fisher information of the weights, as a cost of rounding them.

With `g_s` the gradient of one image's loss, the diagonal of the Fisher matrix is
`F = E[g_s^2]`. Its second-order estimate of the divergence to the float network is

    form="diagonal"   cost_l(b) = 1/2 sum_i F_i (Q_b(W) - W)_i^2
    form="trace"      cost_l(b) = 1/2 (tr F / n) |Q_b(W) - W|^2

with `n` weights. By default F is the true Fisher information, which needs no labels and equals
the Gauss-Newton matrix, from one random combination of classes for each image
(`labels="probes"`); `labels="sampled"` draws a class from the network's distribution instead,
which for a confident network is mostly nothing and rarely large. With `labels="data"` it is
the empirical one (the difference: Kunstner et al., NeurIPS 2019, arXiv:1905.12558).
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.errors import UsageError
from proxyq.proxies.proxy import register


@register(
    needs=("weight", "gradient-squares"),
    shape="layers bits",
    passes="1 forward + 1 backward (per image)",
    reference="Fisher information; Kunstner et al. 2019, arXiv:1905.12558",
    defaults={"labels": "probes"},
    random=True,
)
def fisher(taps: Taps, *, key: Any, form: str = "diagonal") -> np.ndarray:
    """Fisher information times squared rounding error, weight by weight or layer by layer."""
    del key
    if form not in ("diagonal", "trace"):
        raise UsageError(f"`form` of fisher must be 'diagonal' or 'trace', got {form!r}.")

    def cost(tap: Any, bits: int) -> float:
        squares = np.asarray(tap.quantized(bits) - tap.columns, np.float64) ** 2
        if form == "trace":
            # 1/2 (tr F / n) |dW|^2
            return 0.5 * tap.gradient_squares.mean() * squares.sum()
        # 1/2 sum F dW^2
        return 0.5 * np.sum(tap.gradient_squares * squares)

    return taps.table(cost)
