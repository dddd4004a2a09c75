"""SNIP: connection sensitivity (Lee et al., ICLR 2019, arXiv:1810.02340).

The derivative of the loss by a mask on each weight is `g W`, with `g = dL/dW` of the mean
loss; a layer's importance is the sum of its magnitudes. Folding batch norm changes nothing,
since scale and gradient cancel. SNIP itself draws fresh weights; here they are the trained
ones. With the cost `linear-bits` this is the `bsnip` of EMQ's comparison.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import register


@register(
    needs=("weight", "gradient"),
    shape="layers",
    passes="1 forward + 1 backward",
    reference="SNIP: Lee et al. 2019, arXiv:1810.02340",
    cost="times-relative-dw2",
)
def snip(taps: Taps, *, key: Any) -> np.ndarray:
    """Sum over weights of |gradient times weight|."""
    del key
    # sum |g W|
    return taps.map(lambda tap: np.abs(tap.gradient * np.asarray(tap.columns, np.float64)).sum())
