"""CLADO: the loss of every pair of choices, measured (Deng et al., arXiv:2307.05657).

    e_a = L(a) - L(0)            e_ab = L(a, b) - L(0)
    cost(x) = x' G x,            G_aa = e_a,    2 G_ab = e_ab - e_a - e_b

with L the mean loss on the same images for all four terms, summed in float64. To second order
2 G_ab = dw_a' H dw_b. (The authors write 1/2 x' G x with all entries twice these.) Choices of
one layer exclude each other, and their entry is zero, except that a layer's weight and its input
are rounded together and have one.

Finite steps of two bits saturate the loss, which makes G indefinite; its negative eigenvalues
are set to zero, as published, and the share that goes is in the notes. Differences: the loss is
by default KL to the float network, which needs no labels (`pair_loss="cross-entropy"` is the
published one); `eigh` in place of `eig`; batch norm is folded; a later layer's run starts from
the state that the earlier one left, for a third of the passes.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.engine.alternatives import spread
from proxyq.engine.pairs import PairLosses
from proxyq.proxies.proxy import Result, register
from proxyq.psd import nearest_psd


@register(
    needs=("pairs",),
    shape="layers bits",
    passes="1 forward a pair of layers and of bit-widths (what follows the later one)",
    reference="CLADO: Deng et al. 2023, arXiv:2307.05657",
    activations=True,
)
def clado(taps: Taps, *, key: Any, psd: bool = True) -> Result:
    """Rise of the loss when this layer is rounded, alone and with every other one."""
    del key
    assert taps.pairs is not None
    measured = coupling_of(taps.pairs)
    matrix, notes = measured, {}
    if psd and np.isfinite(measured).all():  # else it is refused, naming the layers
        matrix, removed = nearest_psd(measured)
        notes["removed_mass"] = removed
    values, activations = spread(np.diag(measured), len(taps), len(taps.bits))
    return Result(values, activations, notes, coupling=matrix)


def coupling_of(losses: PairLosses) -> np.ndarray:
    """G from mean losses; choices that exclude each other have no coupling."""
    unchanged, singles, pairs, known = losses
    # G_ab = (L(a, b) + L(0) - L(a) - L(b)) / 2
    both = (pairs + unchanged - singles[:, None] - singles[None]) / 2
    matrix = np.where(known, both, 0.0)
    np.fill_diagonal(matrix, singles - unchanged)
    return matrix
