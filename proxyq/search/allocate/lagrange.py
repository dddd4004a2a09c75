"""A lower bound from Lagrangian relaxation (Everett 1963; Fisher 1981, Management Science 27).

    L(lambda) = sum_g min_k ( regret[g, k] + lambda . usage[:, g, k] ) - lambda . room

is at most the least regret within the limits, for every lambda >= 0; for the best lambda it
equals the bound of the linear relaxation. With one limit L is concave and piecewise linear
in one number, and its maximum is found by bisection on the sign of the slope.
"""

import numpy as np

from proxyq.search.allocate.reduce import Reduced


def lagrangian(reduced: Reduced, multipliers: np.ndarray) -> float:
    """L(lambda) for `multipliers` `[limits]` >= 0, a valid bound on the regret up to rounding."""
    total, slack = priced(reduced, multipliers), 0.0
    for multiplier, room in zip(multipliers, reduced.room, strict=True):
        slack += float(multiplier) * room
    return float(total.min(axis=1).sum()) - slack


def priced(reduced: Reduced, multipliers: np.ndarray) -> np.ndarray:
    """regret + lambda . usage, float64 `[variables, bits]`."""
    # Infinite multipliers or regrets of closed choices must not make 0 * inf.
    cost = reduced.regret.copy()
    for multiplier, usage in zip(multipliers, reduced.usage, strict=True):
        if multiplier > 0:
            cost += float(multiplier) * usage
    return cost


def best_multiplier(reduced: Reduced, limit: int) -> float:
    """The lambda >= 0 of one limit that maximises L with the other limits left out."""
    usage, room = reduced.usage[limit], reduced.room[limit]
    regret = reduced.regret

    def spent(multiplier: float) -> int:
        # Of equally priced choices the one that uses least: the slope from the right.
        with np.errstate(over="ignore"):
            cost = regret + multiplier * usage
        least = cost.min(axis=1, keepdims=True)
        tied = np.where(cost <= least, usage, np.iinfo(np.int64).max)
        return int(tied.min(axis=1).sum())

    if spent(0.0) <= room:
        return 0.0
    finite = np.isfinite(regret)
    # Above max regret / 1 every variable takes its least usage (usages are integers).
    low, high = 0.0, float(regret[finite].max()) * 1.001
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (low, middle) if spent(middle) <= room else (middle, high)
    return high


def bound(reduced: Reduced) -> float:
    """The best single-limit Lagrangian bound on the regret; 0 when no limit binds."""
    best = 0.0
    for limit in range(len(reduced.room)):
        multipliers = np.zeros(len(reduced.room))
        multipliers[limit] = best_multiplier(reduced, limit)
        best = max(best, lagrangian(reduced, multipliers))
    return best
