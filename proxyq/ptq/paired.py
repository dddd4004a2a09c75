"""Two networks on the same images: is one more accurate, and by how much?

Both see every image, so all evidence is in the images that one of them alone gets right. Counts
of a pair of networks, of `images` in all:

    first right, second right: both      first right, second wrong: only_first
    first wrong, second right: only_second                  both wrong: neither

The test is McNemar's (1947, Psychometrika 12), exact: where neither network is better, each
discordant image falls to either side like a fair coin. The interval is method 10 of Newcombe
(1998, Statistics in Medicine 17, 2635), which joins the Wilson intervals of the two accuracies by
their correlation. Several tests at once are adjusted by Holm (1979, Scandinavian Journal of
Statistics 6). Test and interval are two methods: near 5 % one may see what the other does not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from proxyq.errors import UsageError

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two networks compared on the same images.

    - `only_first`, `only_second`: images that this one alone gets right.
    - `difference`: top-1 of the second less that of the first, in points of percent, and
      `interval`, its 95 % confidence interval.
    - `p_value`: of McNemar's exact test, two-sided; `p_holm` adjusted for all comparisons of the
      same family.
    """

    only_first: int
    only_second: int
    difference: float
    interval: tuple[float, float]
    p_value: float
    p_holm: float


def compared(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Paired, ...]:
    """A family of comparisons, whose p-values are adjusted together.

    - `pairs`: of each comparison which images the first and the second network get right,
      bool `[images]` each.

    **Raises** `UsageError` where two networks did not see equally many images, or none.
    """
    counts = [_counts(first, second) for first, second in pairs]
    p_values = [mcnemar(only_first, only_second) for _, only_first, only_second, _ in counts]
    found = []
    for cells, p_value, p_holm in zip(counts, p_values, holm(p_values), strict=True):
        _, only_first, only_second, _ = cells
        low, high = newcombe(*cells)
        found.append(
            Paired(
                only_first=only_first,
                only_second=only_second,
                difference=100.0 * (only_second - only_first) / sum(cells),
                interval=(100.0 * low, 100.0 * high),
                p_value=p_value,
                p_holm=p_holm,
            )
        )
    return tuple(found)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test, from the discordant counts."""
    discordant = only_first + only_second
    if discordant == 0:  # the networks agree on every image
        return 1.0
    from scipy.stats import binomtest  # half a second to import

    # p = min(1, 2 P(X <= min(only_first, only_second))),  X ~ Binomial(discordant, 1/2)
    return float(binomtest(only_first, discordant, 0.5).pvalue)


def newcombe(
    both: int, only_first: int, only_second: int, neither: int, *, level: float = LEVEL
) -> tuple[float, float]:
    """Confidence interval of the second's accuracy less the first's, as shares of all images.

    Newcombe's method 10, where `first` and `second` have changed places.
    """
    images = both + only_first + only_second + neither
    right, other = both + only_second, both + only_first
    p, q = right / images, other / images
    p_low, p_high = _wilson(right, images, level)
    q_low, q_high = _wilson(other, images, level)
    # phi = max(ad - bc - n/2, 0) / sqrt(margins), without n/2 where ad < bc; 0 with an empty margin
    excess = both * neither - only_first * only_second
    margins = right * (images - right) * other * (images - other)
    above = excess if excess < 0 else max(excess - images / 2, 0.0)
    phi = above / math.sqrt(margins) if margins else 0.0
    # lower = d - sqrt((p - p_low)^2 - 2 phi (p - p_low) (q_high - q) + (q_high - q)^2)
    low = (only_second - only_first) / images - _joined(p - p_low, q_high - q, phi)
    # upper = d + sqrt((p_high - p)^2 - 2 phi (p_high - p) (q - q_low) + (q - q_low)^2)
    high = (only_second - only_first) / images + _joined(p_high - p, q - q_low, phi)
    return low, high


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that all together err with the probability that each had alone."""
    order = np.argsort(p_values, kind="stable")
    # adjusted_(i) = max over j <= i of min(1, (m - j + 1) p_(j))
    steps = np.minimum(1.0, np.arange(len(order), 0, -1) * np.asarray(p_values, float)[order])
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted.tolist()


def _counts(first: np.ndarray, second: np.ndarray) -> tuple[int, int, int, int]:
    """Images that both get right, only the first, only the second, and neither."""
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise UsageError(
            "`pairs` must hold two results on the same images, one for each image, got shapes "
            f"{first.shape} and {second.shape}: measure both networks on one set of images."
        )
    both, only_first, only_second = (
        int(cell.sum()) for cell in (first & second, first & ~second, ~first & second)
    )
    return both, only_first, only_second, len(first) - both - only_first - only_second


def _wilson(right: int, images: int, level: float) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(right, images).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def _joined(one: float, other: float, phi: float) -> float:
    # Rounding alone could take the sum below 0.
    return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))
