"""Jacobian covariance (Mellor et al., 2020, arXiv:2006.04647v1), layer by layer.

With `J_s` the derivative of the summed logits by what a layer reads on image `s`, and `v_i`
the eigenvalues of the images' correlation matrix of the `J_s`,

    score_l = exp(-mean_i (ln(v_i + k) + 1 / (v_i + k))),   k = 1e-5

It is greatest, 1/e, when images act on the network independently. The paper takes the
logarithm, summed, for the input of the network, which gives one number; here each layer's own
input gives one a layer, and an importance must not be negative. The first 64 images are
related, on at most 16,384 values each.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import register

_K = 1e-5


@register(
    needs=("input-gradients",),
    shape="layers",
    passes="1 forward + 1 backward",
    reference="Mellor et al. 2020, arXiv:2006.04647v1",
    fixed={"loss": "logit-sum", "labels": "predicted"},
)
def jacobian_covariance(taps: Taps, *, key: Any) -> np.ndarray:
    """How independently images act on the network, seen from each layer's input."""
    del key
    return taps.map(lambda tap: independence(tap.input_gradients))


def independence(jacobians: np.ndarray) -> float:
    """The score from `jacobians [images, values]`; a constant one correlates with nothing."""
    x = np.asarray(jacobians, np.float64)
    x = x - x.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    x = x / np.where(norm > 0, norm, 1.0)
    correlation = x @ x.T
    np.fill_diagonal(correlation, 1.0)
    v = np.maximum(np.linalg.eigvalsh(correlation), 0.0)
    # exp(-mean (ln(v + k) + 1 / (v + k)))
    return float(np.exp(-np.mean(np.log(v + _K) + 1.0 / (v + _K))))
