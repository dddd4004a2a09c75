"""Gradient norm: `|dL/dW|` of each layer (Abdelfattah et al., ICLR 2021, arXiv:2101.08134)."""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import register


@register(
    needs=("gradient",),
    shape="layers",
    passes="1 forward + 1 backward",
    reference="Abdelfattah et al. 2021, arXiv:2101.08134",
    cost="times-dw2",
)
def grad_norm(taps: Taps, *, key: Any) -> np.ndarray:
    """Euclidean norm of the gradient of the mean loss."""
    del key
    # |g|_2
    return taps.map(lambda tap: np.linalg.norm(tap.gradient))
