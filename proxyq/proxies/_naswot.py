"""NASWOT: how differently images switch a layer's units (Mellor et al., ICML 2021,
arXiv:2006.04647).

Each image sets every unit of a layer's feature on (positive) or off. With `K_st` the number of
units on which images `s` and `t` agree, out of `U`, and `N` images,

    score_l = det(K / U)^(1/N)

the geometric mean of the eigenvalues, between 0 and 1: the greater, the better the codes tell
images apart. The paper adds up the `K` of all layers and takes `ln |det K|` for the network;
here each layer has its own, and the root keeps it comparable and positive. A small multiple of
the identity is added, since images with equal codes make K singular.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import register

_RIDGE = 1e-6


@register(
    needs=("codes",),
    shape="layers",
    passes="1 forward",
    reference="NASWOT: Mellor et al. 2021, arXiv:2006.04647",
)
def naswot(taps: Taps, *, key: Any) -> np.ndarray:
    """How differently images switch the layer's units, by the determinant of their agreement."""
    del key

    def score(tap: Any) -> float:
        # every image agrees with itself on all units, so the diagonal is their number
        kernel = tap.codes / np.diag(tap.codes).max()
        kernel = kernel + _RIDGE * np.eye(len(kernel))
        if not np.isfinite(kernel).all():
            return np.nan
        # det(K)^(1/N) = exp(ln |det K| / N)
        return float(np.exp(np.linalg.slogdet(kernel)[1] / len(kernel)))

    return taps.map(score)
