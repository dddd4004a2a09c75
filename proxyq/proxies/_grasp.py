"""GraSP: gradient signal preservation (Wang et al., ICLR 2020, arXiv:2002.07376).

How the squared gradient norm, `g' g`, would fall if a weight were removed: to first order
`-W (H g)`, elementwise; with `H` the Hessian of all layers together and `g` the gradient of
the mean loss. Removing weights of high score keeps the gradient, so a layer's importance is
the magnitude of its sum: how much its weights matter for the gradient's flow, either way.
The paper draws fresh weights, divides the logits by a temperature of 200, and ranks single
weights by sign; here weights are the trained ones, at temperature 1, and layers are ranked.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.engine.curvature import hessian_products
from proxyq.engine.objectives import cross_entropy
from proxyq.proxies.proxy import register


@register(
    needs=("gradient", "engine"),
    shape="layers",
    passes="1 forward + 1 backward + 1 Hessian product",
    reference="GraSP: Wang et al. 2020, arXiv:2002.07376",
    cost="times-relative-dw2",
    cost_class="backward",
)
def grasp(taps: Taps, *, key: Any) -> np.ndarray:
    """How much the flow of gradients hangs on a layer's weights, |sum of W (H g)|."""
    del key
    engine = taps.tape_engine
    first = [engine.network.sites[tap.site] for tap in taps]
    gradients = {
        row: np.asarray(site.from_columns(tap.gradient, tap.weight.shape))
        for row, (site, tap) in enumerate(zip(first, taps, strict=True))
    }
    products = hessian_products(
        engine, taps.inputs, cross_entropy, taps.targets, gradients, joint=True
    )
    # |sum W (H g)|
    weights = (np.asarray(tap.weight, np.float64) for tap in taps)
    return np.array([abs(np.sum(weight * products[row])) for row, weight in enumerate(weights)])
