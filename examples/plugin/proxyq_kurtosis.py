"""Kurtosis of a layer's weights (the measure of Shkolnik et al. 2020, arXiv:2002.07686).

`score_l = E[(w - mean)^4] / E[(w - mean)^2]^2`: 1.8 for evenly spread weights, 3 for normal
ones, more where a few are far out. A uniform grid spends its codes on the range, so the heavier
the tails, the coarser the step for all others.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies import make_proxy


def _kurtosis(taps: Taps, *, key: Any, excess: bool = False) -> np.ndarray:
    """How heavy the tails of the weights are."""
    del key

    def score(tap: Any) -> float:
        w = np.asarray(tap.columns, np.float64)
        moved = w - w.mean()
        # E[(w - mean)^4] / E[(w - mean)^2]^2
        found = np.mean(moved**4) / np.mean(moved**2) ** 2
        return max(found - 3.0, 0.0) if excess else found

    return taps.map(score)


kurtosis = make_proxy(
    _kurtosis,
    name="kurtosis",
    needs=("weight",),
    passes="none",
    reference="Shkolnik et al. 2020, arXiv:2002.07686",
    cost="times-relative-dw2",
)
