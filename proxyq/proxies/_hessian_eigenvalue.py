"""HAWQ-V1: top Hessian eigenvalue of each layer (Dong et al., ICCV 2019, arXiv:1905.03696).

`importance_l = |lambda_l|`, the eigenvalue of largest magnitude of the layer's block, by power
iteration; with the cost `times-dw2`, `Omega_l(b) = lambda_l |Q_b(W_l) - W_l|^2`. With
`per_weight=true` it is divided by the number of weights: the paper's `S_l`, by which it orders
layers and then chooses bits by hand. Away from a minimum the eigenvalue may be negative; its
magnitude is taken.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.engine.curvature import top_eigenvalues
from proxyq.engine.objectives import cross_entropy
from proxyq.proxies.proxy import Result, register


@register(
    needs=("engine",),
    shape="layers",
    passes="3 forward a layer and iteration (what follows the layer)",
    reference="HAWQ: Dong et al. 2019, arXiv:1905.03696",
    cost="times-dw2",
    cost_class="curvature",
    random=True,
)
def hessian_eigenvalue(
    taps: Taps,
    *,
    key: Any,
    tolerance: float = 0.01,
    least: int = 3,
    most: int = 20,
    per_weight: bool = False,
) -> Result:
    """Top eigenvalue of the layer's Hessian block, to be multiplied by the rounding error."""
    found = top_eigenvalues(
        taps.tape_engine,
        taps.inputs,
        cross_entropy,
        taps.targets,
        key=key,
        tolerance=tolerance,
        least=least,
        most=most,
        checkpoint=taps.checkpoint,
        progress=taps.progress,
    )
    # |lambda|, or S = |lambda| / n
    values = np.abs(found.value)
    if per_weight:
        values = values / np.array([tap.weight.size for tap in taps])
    notes = {"eigenvalue": found.value.tolist(), "iterations": found.iterations.tolist()}
    return Result(values, notes=notes)
