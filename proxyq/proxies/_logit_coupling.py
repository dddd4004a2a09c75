"""Coupling of layers, from what each of them alone does to the logits.

    k_a = KL(p || p_a)         with choice a alone        d_a = its change of the centred logits
    rho_ab = <d_a, d_b> / (|d_a| |d_b|)
    cost(x) = x' G x,          G_ab = rho_ab sqrt(k_a k_b)

To second order, KL is half a squared norm of the logits' change, and the changes of several
layers add up: so two choices cost what each costs, plus twice the cosine between them times the
geometric mean. The cosine needs no pair of layers to be run, G is positive semidefinite by
construction (a Gram matrix of vectors of length sqrt(k_a), entries within a layer kept), and
measured losses that saturate at two bits do not make it negative, as they do CLADO's
differences. No labels, no gradients: the runs are those of `kl-delta`.

Ours; beside CLADO (Deng et al., arXiv:2307.05657), whose matrix it stands in for.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.engine.alternatives import join, spread
from proxyq.proxies.proxy import Result, register


@register(
    needs=("kl", "coupling"),
    shape="layers bits",
    passes="1 forward a layer and bit-width (what follows the layer)",
    reference="ours",
    activations=True,
)
def logit_coupling(taps: Taps, *, key: Any) -> Result:
    """Divergence when this layer alone is rounded, and how alike two layers move the logits."""
    del key
    assert taps.correlation is not None
    k = join([tap.kl for tap in taps], [tap.activation_kl for tap in taps])
    values, activations = spread(k, len(taps), len(taps.bits))
    return Result(values, activations, coupling=coupling_of(k, taps.correlation))


def coupling_of(k: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    """`G_ab = rho_ab sqrt(k_a k_b)`, `[choices, choices]`."""
    root = np.sqrt(np.maximum(k, 0.0))  # rounding may leave a KL of -1e-17
    return correlation * root[:, None] * root[None]
