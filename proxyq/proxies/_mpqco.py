"""MPQCO: relative change of the target's logit (Chen et al., ICCV 2021, arXiv:2110.06554).

`cost_l(b) = 1/(2 N) sum_s ((dz_y/dW)' dW / z_y)^2`, with `z_y` the logit of image `s` at its
target and `dW = Q_b(W_l) - W_l`: the form in which CLADO's code compares with it. The paper
writes the loss's Hessian as an outer product of logit gradients. Not invariant to a constant
added to all logits, and large where a target's logit is near zero.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import register


@register(
    needs=("first-order",),
    shape="layers bits",
    passes="1 forward + 1 backward + 1 per bit-width",
    reference="MPQCO: Chen et al. 2021, arXiv:2110.06554",
    fixed={"loss": "log-logit"},
)
def mpqco(taps: Taps, *, key: Any) -> np.ndarray:
    """Squared relative change of the target's logit, to first order."""
    del key
    # 1/(2 N) sum_s (d ln|z_y| / dW . dW)^2
    return np.stack([0.5 * np.mean(tap.first_order**2, axis=1) for tap in taps])
