"""HAWQ-V2 and V3: average Hessian trace times squared rounding error (Dong et al., NeurIPS 2020,
arXiv:1911.03852; Yao et al., ICML 2021, arXiv:2011.10680).

    cost_l(b) = (tr H_l / n_l) |Q_b(W_l) - W_l|^2

with `H_l` the block of the mean loss's Hessian that belongs to layer `l` and `n_l` its size;
the same with the tensor that a layer reads in place of its weight, for activation bits (then
trace and error are means over images). Traces by Hutchinson's estimator. A slightly negative
estimate counts as zero: its cost would pay for errors.

`curvature="gauss-newton"`, the default, leaves out the second derivatives of the network
itself. In one layer's weight a piecewise linear network (ReLU, max pooling) has none, so
there both are the same; elsewhere it is the part that is never negative. Its probes sit on
the outputs of every image apart (`probes="output"`), so that one backward pass serves all
layers and little noise is left. `curvature="hessian"` is the paper's, with a probe in each
layer's weight. EMQ compares with the plain trace times bits:
`average=false` and the cost `linear-bits`.
"""

from typing import Any

import jax
import numpy as np

from proxyq.engine import Taps
from proxyq.engine.curvature import hutchinson, input_sizes
from proxyq.engine.objectives import cross_entropy
from proxyq.engine.ranges import input_errors
from proxyq.proxies.proxy import Result, register


@register(
    needs=("engine",),
    shape="layers",
    passes="1 forward + 1 backward (per image) a probe",
    reference="HAWQ-V2: Dong et al. 2020, arXiv:1911.03852",
    cost="times-dw2",
    cost_class="curvature",
    random=True,
    activations=True,
)
def hessian_trace(
    taps: Taps,
    *,
    key: Any,
    curvature: str = "gauss-newton",
    probes: str = "auto",
    tolerance: float = 0.1,
    least: int = 4,
    most: int = 32,
    average: bool = True,
) -> Result:
    """Average trace of the layer's Hessian block, to be multiplied by the rounding error."""
    settings = {"tolerance": tolerance, "least": least, "most": most}

    def trace(of: str, key: Any) -> Any:
        return hutchinson(
            taps.tape_engine,
            taps.inputs,
            cross_entropy,
            taps.targets,
            key=key,
            of=of,
            curvature=curvature,
            probes=probes,
            checkpoint=taps.checkpoint,
            progress=taps.progress,
            **settings,
        )

    found = trace("weights", jax.random.fold_in(key, 0))
    sizes = np.array([tap.weight.size for tap in taps]) if average else 1.0
    # tr H / n
    values = np.maximum(found.trace, 0.0) / sizes
    notes = {
        "trace": found.trace.tolist(),
        # one probe alone has none
        "standard_error": [e if np.isfinite(e) else None for e in found.error.tolist()],
        "probes": found.probes.tolist(),
    }
    if not taps.activation_bits:
        return Result(values, notes=notes)
    read = trace("inputs", jax.random.fold_in(key, 1))
    rounded = input_errors(taps.engine, taps.inputs, taps.activation_bits)
    errors = np.stack([rounded[tap.name]["error"] for tap in taps])
    # (tr H_a / n_a) |dA|^2, where |dA|^2 = n_a times the mean squared error of a value
    scale = 1.0 if average else input_sizes(taps.tape_engine)[:, None]
    return Result(values, np.maximum(read.trace, 0.0)[:, None] * errors * scale, notes)
