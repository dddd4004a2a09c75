"""Network orthogonality (OMPQ: Ma et al., AAAI 2023, arXiv:2109.07865).

Each layer is a function; where two layers' features span the same directions over the
images, one of them is redundant. With centred Gram matrices `K_i = X_i X_i'`

    ORM(i, j) = <K_i, K_j>_F / (|K_i|_F |K_j|_F)            (linear CKA, biased HSIC)
    gamma_i   = sum over j != i of ORM(i, j)
    theta_i   = exp(-beta gamma_i)
    c_i       = mean of theta_j over j >= i                 (suffix mean)

The authors' program then maximises `sum_i c_i b_i`. Ours differs from it in four ways: each
Gram matrix is normalised once instead of for every pair, `exp` is taken relative to the
smallest gamma (a factor common to all layers, without which a beta of 100 underflows to
zeros), and the network runs with running batch-norm statistics unless
`batch_norm="batch"`. Beta is 1 here: gammas of a real network lie several units apart, so that
with the published 10 to 100 all layers but one have theta 0 and the plan is left to ties (the
recipe `ompq` keeps the published value).
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import register

_BLOCK = 1 << 20  # numbers


@register(
    needs=("gram",),
    shape="layers",
    passes="1 forward",
    reference="OMPQ: Ma et al. 2023, arXiv:2109.07865",
)
def orthogonality(
    taps: Taps, *, key: Any, beta: float = 1.0, suffix_mean: bool = True
) -> np.ndarray:
    """Layers whose features are most orthogonal to all others (OMPQ)."""
    del key
    # Layers that hand on one tensor (a block's last convolution and its downsample) count once.
    owners = list(dict.fromkeys(tap.same_feature_as for tap in taps))
    grams = {tap.name: tap.gram for tap in taps}
    orm = orthogonality_matrix([grams[name] for name in owners])
    c = dict(zip(owners, importance(orm, beta=beta, suffix_mean=suffix_mean), strict=True))
    return taps.map(lambda tap: c[tap.same_feature_as])


def orthogonality_matrix(grams: list[np.ndarray]) -> np.ndarray:
    """ORM of all pairs, `[layers, layers]`, from Gram matrices `[images, images]`.

    Entries lie in [0, 1] with a diagonal of 1; a layer whose feature is constant over the
    images has ORM 0 with every other.
    """
    rows = [np.asarray(gram, np.float64).ravel() for gram in grams]
    norms = np.array([[np.linalg.norm(row)] for row in rows])
    # A dead layer's Gram matrix is zero up to rounding: 0/0 counts as orthogonal.
    alive = norms[:, 0] > 1e-12 * max(norms.max(), np.finfo(np.float64).tiny)
    orm, columns = np.zeros((len(rows), len(rows))), max(1, _BLOCK // len(rows))
    for start in range(0, len(rows[0]), columns):  # a copy of all would be as large again
        part = np.stack([row[start : start + columns] for row in rows])
        unit = np.where(alive[:, None], part / np.where(norms > 0, norms, 1), 0)
        # ORM = G G' with G [layers, images^2] of unit rows
        orm += unit @ unit.T
    orm = np.clip(orm, 0.0, 1.0)
    np.fill_diagonal(orm, 1.0)
    return orm


def importance(orm: np.ndarray, *, beta: float = 1.0, suffix_mean: bool = True) -> np.ndarray:
    """`c_i` of the module's formulas, up to one common positive factor: `[layers]`."""
    # gamma_i = sum over j != i of ORM(i, j)
    gamma = orm.sum(axis=1) - np.diag(orm)
    # theta_i = exp(-beta gamma_i), relative to the most orthogonal layer
    theta = np.exp(-beta * (gamma - gamma.min()))
    if not suffix_mean:
        return theta
    # c_i = (1 / (L - i + 1)) sum_{j = i..L} theta_j
    return np.cumsum(theta[::-1])[::-1] / np.arange(len(theta), 0, -1)
