"""Coupling of layers, by what they do to the answers and not to how sure the network is of them.

    k_a = min over s of KL(p || softmax(s z_a))     with choice a alone, s for each image
    d_a = its change of the centred logits, without its part along the logits themselves
    rho_ab = <d_a, d_b> / (|d_a| |d_b|)
    cost(x) = x' G x,     G_ab = rho_ab sqrt(k_a k_b)

As `logit-coupling`, without the scale of the logits. Rounding to the least squared error shrinks
what a layer puts out, all layers in the same direction, so that the shrinkage of the logits adds
up over layers and may be most of what KL sees and most of what couples them. It changes no answer:
of plans at two to three bits, uncorrected, this divergence ranks accuracy where KL does not.

Ours.
"""

from typing import Any

from proxyq.engine import Taps
from proxyq.engine.alternatives import join, spread
from proxyq.proxies._logit_coupling import coupling_of
from proxyq.proxies.proxy import Result, register


@register(
    needs=("rescaled-kl", "rescaled-coupling"),
    shape="layers bits",
    passes="1 forward a layer and bit-width (what follows the layer)",
    reference="ours",
    activations=True,
)
def rescaled_coupling(taps: Taps, *, key: Any) -> Result:
    """Divergence up to the scale of the logits, alone, and how alike two layers move them."""
    del key
    assert taps.rescaled_correlation is not None
    k = join([tap.rescaled_kl for tap in taps], [tap.activation_rescaled_kl for tap in taps])
    values, activations = spread(k, len(taps), len(taps.bits))
    return Result(values, activations, coupling=coupling_of(k, taps.rescaled_correlation))
