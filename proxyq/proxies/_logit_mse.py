"""Measured change of the logits when one layer is rounded and all others are not.

`cost_l(b) = mean (z_b - z)^2` over images and classes. No labels.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import Result, register


@register(
    needs=("logit-mse",),
    shape="layers bits",
    passes="1 forward a layer and bit-width (what follows the layer)",
    reference="measured",
    activations=True,
)
def logit_mse(taps: Taps, *, key: Any) -> Result:
    """Mean squared change of the logits when this layer alone is rounded."""
    del key
    values = np.stack([tap.logit_mse for tap in taps])
    return Result(values, np.stack([tap.activation_logit_mse for tap in taps]))
