"""First-order change of the loss: the gradient times the rounding error.

`cost_l(b) = |g' (Q_b(W_l) - W_l)|` with `g` the gradient of the mean loss; `form="signed"`
keeps the sign, so that rounding which seems to help counts for it.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.errors import UsageError
from proxyq.proxies.proxy import register


@register(
    needs=("first-order",),
    shape="layers bits",
    passes="1 forward + 1 backward + 1 per bit-width",
    reference="Taylor expansion",
)
def first_order(taps: Taps, *, key: Any, form: str = "absolute") -> np.ndarray:
    """Gradient of the mean loss times the rounding error of the weights."""
    del key
    if form not in ("absolute", "signed"):
        raise UsageError(f"`form` of first-order must be 'absolute' or 'signed', got {form!r}.")
    # g' dW, the mean over images of g_s' dW
    change = np.stack([tap.first_order.mean(axis=1) for tap in taps])
    return np.abs(change) if form == "absolute" else change
