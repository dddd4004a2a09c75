"""Rounding error of what a layer reads.

`cost_l(b) = mean (Q_b(x) - x)^2 / var x` over a sample of the values that the layer reads in
the float network, on an asymmetric grid for the tensor; with `relative=False` without the
division. As a cost of weight bits it treats the layer's input as if it had the same bits; with
candidate activation bits it gives their own costs as well.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import Result, register


@register(
    needs=("input-error",),
    shape="layers bits",
    passes="1 forward",
    reference="baseline",
    activations=True,
    lookups=False,  # indices are not rounded, which says nothing of the table
    groups=False,  # nor are weights
)
def activation_mse(taps: Taps, *, key: Any, relative: bool = True) -> Result:
    """Mean squared error of rounding what the layer reads."""
    del key

    def table(widths: tuple[int, ...]) -> np.ndarray:
        rows = []
        for tap in taps:
            found = tap.input_error
            scale = max(found["variance"], np.finfo(np.float64).tiny) if relative else 1.0
            rows.append([found[bits] / scale for bits in widths])
        return np.array(rows).reshape(len(taps), len(widths))

    return Result(table(taps.bits), table(taps.activation_bits))
