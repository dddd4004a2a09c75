"""ZiCo: coefficient of variation of gradients (Li et al., ICLR 2023, arXiv:2301.11300).

`score_l = ln sum over weights of E|g_s| / sqrt(Var |g_s|)`, over the images `s`. A weight
whose gradients agree across images trains fast. The paper takes expectations over
mini-batches; here every image is a batch of its own. Weights whose gradient never varies
(dead ones) are left out, and a layer of nothing else scores as a single unit ratio.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import register


@register(
    needs=("gradient-squares", "gradient-magnitudes"),
    shape="layers",
    passes="1 forward + 1 backward (per image)",
    reference="ZiCo: Li et al. 2023, arXiv:2301.11300",
)
def zico(taps: Taps, *, key: Any) -> np.ndarray:
    """Log of the summed ratio of mean to deviation of the images' gradients."""
    del key

    def score(tap: Any) -> float:
        mean = tap.gradient_magnitudes
        variance = tap.gradient_squares - mean**2
        # rounding may leave a tiny variance where there is none
        alive = variance > 1e-12 * tap.gradient_squares
        # ln sum E|g| / sqrt(Var|g|)
        return float(np.log(max(np.sum(mean[alive] / np.sqrt(variance[alive])), 1.0)))

    return taps.map(score)
