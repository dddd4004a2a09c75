"""Divergence to second order: Gauss-Newton, by directional derivatives of the logits.

    u_a = J d_a,     d_a = the change that choice a makes
    cost(x) = x' G x,     G_ab = 1/2 mean u_a' (diag p - p p') u_b

What HAWQ's traces average over all directions is taken along the steps that rounding makes, for
all pairs of layers: each choice is one tangent that is pushed through what follows its layer.
No labels (the curvature is that of KL to the float network, and of the cross-entropy in
expectation over the network's own labels), and positive semidefinite. It is local: good for the
small steps of three bits and more, wrong at two, where the measured `logit-coupling` is not.
With a correction, `d_a` is the step of the corrected layer.

The Gauss-Newton matrix: Schraudolph 2002 (Neural Computation 14).
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.engine.alternatives import spread
from proxyq.proxies.proxy import Result, register


@register(
    needs=("tangents",),
    shape="layers bits",
    passes="1 forward a layer and bit-width (a tangent of what follows the layer)",
    reference="Gauss-Newton: Schraudolph 2002, Neural Computation 14",
    cost_class="curvature",
    activations=True,
)
def gauss_newton(taps: Taps, *, key: Any) -> Result:
    """Divergence to second order when layers are rounded, alone and together."""
    del key
    assert taps.curvature is not None
    values, activations = spread(np.diag(taps.curvature), len(taps), len(taps.bits))
    return Result(values, activations, coupling=taps.curvature)
