"""Measured divergence from the float network when one layer is rounded and all others are not.

`cost_l(b) = KL(p || p_b)` of the float network's class probabilities and those with layer `l`
rounded, both at a temperature, averaged over the images. No labels. ZeroQ's sensitivity (Cai et
al., CVPR 2020, arXiv:2001.00281) on real images. With `correction` the rounded layer gets its
output's statistics back before anything is measured, as it will in the plan.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import Result, register


@register(
    needs=("kl",),
    shape="layers bits",
    passes="1 forward a layer and bit-width (what follows the layer)",
    reference="ZeroQ: Cai et al. 2020, arXiv:2001.00281",
    activations=True,
)
def kl_delta(taps: Taps, *, key: Any) -> Result:
    """Divergence from the float network when this layer alone is rounded."""
    del key
    return Result(np.stack([tap.kl for tap in taps]), np.stack([tap.activation_kl for tap in taps]))
