"""How well a formula orders measured plans: its fitness, from ranks that are whole numbers.

The score of a plan is the sum over layers of the formula's number at the layer's bits. A formula
that does not depend on bits is multiplied by them first, as EMQ weights its layers:

    score = sum_l f(l, b_l)        or        sum_l b_l f(l)

Its fitness on a table is the rank correlation (Spearman) of score and accuracy, of a cost, whose
numbers fall with bits, of minus the score; over tables the mean. What orders the plans of a table
the wrong way round gets less than nothing.

Ranks are kept doubled and centred, 2 r - (n + 1): whole numbers, also for ties, whose sums are
exact in any order. So is then all that selection looks at.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from proxyq.proxies.formula import Node, Statistics, canonical, rooted, totals

DIGITS = 40
"""Binary digits of the largest score that count: what agrees to them is a tie, for what is below
is rounding."""
SHARES = (0.2, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """Measured plans of one network, and what formulas may know of it.

    - `choices`: `[plans, layers]`, places among `statistics.bits`; `accuracy`: `[plans]`.
    - `again`: the same statistics from other entries of large layers, where there are any.
    """

    name: str
    statistics: Statistics
    choices: np.ndarray
    accuracy: np.ndarray
    again: Statistics | None = None

    def rows(self, rows: np.ndarray) -> "Fold":
        """Some of the plans."""
        return replace(self, choices=self.choices[rows], accuracy=self.accuracy[rows])


def with_bits(node: Node) -> Node:
    """The formula in canonical form, multiplied by the bits where it does not depend on them."""
    node = rooted(node)
    return canonical(node if node.depends_on_bits else Node("mul", (Node("bits"), node)))


def scores(values: np.ndarray, choices: np.ndarray) -> np.ndarray | None:
    """`[plans]` from a formula's numbers; `None` where they are not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = totals(values, choices, "sum")
    return found if np.isfinite(found).all() else None


def ranks(values: np.ndarray) -> np.ndarray:
    """`[plans]` of whole numbers, 2 r - (n + 1) for ranks r; ties have the average of theirs."""
    largest = float(np.abs(values).max())
    _, exponent = math.frexp(largest)
    # Shifts by powers of two are exact, also of numbers too small to be shifted at once.
    whole = np.round(np.ldexp(np.ldexp(values, -exponent), DIGITS))
    _, place, counts = np.unique(whole, return_inverse=True, return_counts=True)
    # Of c equal values that end at place m the average rank is m - (c - 1) / 2.
    doubled = 2 * np.cumsum(counts) - counts + 1
    return (doubled[place.ravel()] - (len(values) + 1)).astype(np.int64)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's coefficient of centred ranks; 0 where a side does not vary."""
    both, own, its = int(one @ other), int(one @ one), int(other @ other)
    return both / math.sqrt(own * its) if own and its else 0.0


def spearman(predicted: np.ndarray, accuracy: np.ndarray) -> float:
    """The rank correlation over all plans, of `ranks`."""
    return correlation(predicted, accuracy)


def top_k(predicted: np.ndarray, accuracy: np.ndarray) -> float:
    """EMQ's: mean rank correlation among the 20, 50 and 100 % of plans with the best scores.

    At least three plans; of plans with equal scores the first in the table.
    """
    order = np.argsort(-predicted, kind="stable")
    found = []
    for share in SHARES:
        rows = order[: max(3, round(share * len(order)))]
        found.append(correlation(ranks(predicted[rows]), ranks(accuracy[rows])))
    return math.fsum(found) / len(found)


OBJECTIVES: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "spearman": spearman,
    "top-k": top_k,
}
