"""How well predicted costs order plans whose accuracy was measured.

A cost should fall as accuracy rises, so what is reported is the correlation of minus the cost
with the accuracy. Ties have the average of their ranks. Intervals are percentiles over plans
drawn again with replacement (the bootstrap of Efron 1979, Annals of Statistics 7).

Ranking random plans is not finding the best one: beside correlations stands the `regret`, how
much accuracy is lost by taking, of all plans within a size, the one with the least cost.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from proxyq.errors import ProxyqError

RESAMPLES = 1000
SHARES = (0.2, 0.5)
LEVEL = 0.95
VARIES = 1e-28
"""Of a sum of squares, the least share that is not rounding."""


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """A coefficient and its bootstrap interval, `None` where a side does not vary."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What a cost says of a table.

    - `correlations`: `spearman`, `kendall` (tau-b), `pearson`; `spearman@20` and `@50` among the
      plans that the cost likes best, `spearman@20 true` and `@50 true` among the truly best;
      `spearman given size`, the partial rank correlation.
    - `mean_regret`, `max_regret`: accuracy lost by the plan with the least cost within a size,
      over the sizes of all plans of the table, against the best plan within that size.
    """

    correlations: Mapping[str, Correlation]
    mean_regret: float
    max_regret: float


def ranking(
    cost: np.ndarray,
    accuracy: np.ndarray,
    size: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Ranking:
    """How well `cost [plans]` orders plans of measured `accuracy`, and of a `size`.

    **Raises** `ProxyqError` when there are fewer than three plans, or a number is not finite.
    """
    score, accuracy, size = (np.asarray(v, np.float64) for v in (-cost, accuracy, size))
    if len(score) < 3:
        raise ProxyqError(f"a ranking takes at least 3 plans, got {len(score)}.")
    for name, values in (("costs", score), ("accuracy", accuracy)):
        if not np.isfinite(values).all():
            raise ProxyqError(
                f"the {name} of plan {np.argmin(np.isfinite(values)) + 1} is not finite."
            )
    counts = _resampled(len(score), resamples, seed)
    found = {
        "spearman": _with_interval(_spearman, score, accuracy, counts),
        "kendall": _with_interval(_kendall, score, accuracy, counts),
        "pearson": _with_interval(_pearson, score, accuracy, counts),
    }
    for share in SHARES:
        # At least three: with two there is no rank correlation to speak of.
        most = max(3, round(share * len(score)))
        for label, by in (("", score), (" true", accuracy)):
            rows = np.sort(np.argsort(-by, kind="stable")[:most])
            own = _resampled(most, resamples, seed)
            name = f"spearman@{round(100 * share)}{label}"
            found[name] = _with_interval(_spearman, score[rows], accuracy[rows], own)
    sized = _given(size)
    found["spearman given size"] = _with_interval(sized, score, accuracy, counts)
    regret = regrets(cost, accuracy, size)
    return Ranking(
        correlations=found, mean_regret=float(regret.mean()), max_regret=float(regret.max())
    )


def regrets(cost: np.ndarray, accuracy: np.ndarray, size: np.ndarray) -> np.ndarray:
    """For every plan's size: the best accuracy within it, less that of the least cost within it.

    Of equal costs the larger plan is taken, then the first.
    """
    order = np.argsort(size, kind="stable")
    cost, accuracy, size = cost[order], accuracy[order], size[order]
    # All plans of one size are within it.
    last = np.searchsorted(size, size, side="right")
    found = np.empty(len(size))
    for row, end in enumerate(last):
        least = np.flatnonzero(cost[:end] == cost[:end].min())
        largest = least[size[least] == size[least].max()]
        found[row] = accuracy[:end].max() - accuracy[largest[0]]
    return found


# -- coefficients, for many resamples at once ------------------------------------------
#
# A resample is how often it has each plan: counts `[resamples, plans]`. So ranks and
# correlations of all resamples are matrix products with what is true of the plans.

Coefficient = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""`(x, y, counts) -> [resamples]`, NaN where a side does not vary."""


def _resampled(plans: int, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, plans])
    drawn = rng.integers(0, plans, (resamples, plans))
    counts = np.zeros((resamples, plans))
    np.add.at(counts, (np.arange(resamples)[:, None], drawn), 1.0)
    return counts


def _with_interval(
    coefficient: Coefficient, x: np.ndarray, y: np.ndarray, counts: np.ndarray
) -> Correlation:
    (value,) = coefficient(x, y, np.ones((1, len(x))))
    if not np.isfinite(value):
        return Correlation(value=None, low=None, high=None)
    each = coefficient(x, y, counts)
    tail = 100 * (1 - LEVEL) / 2
    each = each[np.isfinite(each)]
    if not len(each):
        return Correlation(value=float(value), low=None, high=None)
    low, high = np.percentile(each, (tail, 100 - tail))
    return Correlation(value=float(value), low=float(low), high=float(high))


def _ranks(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`[resamples, plans]`: the average rank of each plan's value."""
    below = (x[:, None] < x[None]).astype(np.float64)
    equal = (x[:, None] == x[None]).astype(np.float64)
    # rank = how many are less + (how many are equal + 1) / 2
    return counts @ below + (counts @ equal + 1) / 2


def _correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson's coefficient with weights; `x` and `y` are `[resamples or 1, plans]`."""
    total = counts.sum(axis=1, keepdims=True)
    first, second = x, y
    x = x - (counts * x).sum(axis=1, keepdims=True) / total
    y = y - (counts * y).sum(axis=1, keepdims=True) / total
    xx, yy, xy = ((counts * a * b).sum(axis=1) for a, b in ((x, x), (y, y), (x, y)))
    # What is left of equal values, once their mean is taken away, is rounding.
    least_x, least_y = (VARIES * (counts * a**2).sum(axis=1) for a in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((xx > least_x) & (yy > least_y), xy / np.sqrt(xx * yy), np.nan)


def _pearson(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    # Costs may be as far apart as 1e150; what is 1 at most can be squared and summed.
    scaled = (v / max(np.abs(v).max(), 1e-300) for v in (x, y))
    x, y = (v[None] for v in scaled)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.full(len(counts), np.nan)
    return _correlation(x, y, counts)


def _spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return _correlation(_ranks(x, counts), _ranks(y, counts), counts)


def _kendall(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """tau-b = (concordant - discordant) / sqrt(pairs untied in x * pairs untied in y)."""
    sx, sy = (np.sign(v[:, None] - v[None]) for v in (x, y))

    def pairs(matrix: np.ndarray) -> np.ndarray:
        return ((counts @ matrix) * counts).sum(axis=1)

    untied = np.sqrt(pairs(np.abs(sx)) * pairs(np.abs(sy)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(untied > 0, pairs(sx * sy) / untied, np.nan)


def _given(size: np.ndarray) -> Coefficient:
    """Partial rank correlation, with what size explains of both taken out."""

    def partial(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
        xy, xz, yz = _spearman(x, y, counts), _spearman(x, size, counts), _spearman(y, size, counts)
        if np.ptp(size) == 0:
            return xy
        left = (1 - xz**2) * (1 - yz**2)
        # Where size explains all of one side, nothing is left to correlate.
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(left > 1e-12, (xy - xz * yz) / np.sqrt(left), np.nan)

    return partial
