"""Lower bounds where layers are coupled: the convex relaxation, and what it rules out.

One-hot x have x_a^2 = x_a, so a diagonal may move from the quadratic to the linear part:

    f(x) = linear'x + x'Qx,   Q = G - Diag(delta),   linear = cost + delta,

is the objective at every plan, and convex between plans where Q is positive semidefinite along
their differences (quadratic convex reformulation: Billionnet, Elloumi and Plateau 2009, Discrete
Applied Mathematics 157; `convexify` finds a delta). The relaxation drops "x is 0 or 1". Its
solution is only a hint: for any point z with gradient g, and any prices y >= 0 of the limits,

    f(x) >= f(z) + g'(x - z) + y'(usage x - room)   for every plan x within the limits,

and the least of that over one-hot x is one minimum per variable. So the bound holds however
accurate the solution is. Another choice put in the place of a minimum bounds the plans that
take this choice: where that reaches the cost of a known plan, no better one takes it.
"""

from dataclasses import dataclass

import numpy as np

from proxyq.search.allocate import interior
from proxyq.search.allocate.quadratic import Quadratic

# The solution may stop where the bound cannot reach the cutoff any more, and is within this
# share of what it misses.
MISSED = 0.02


@dataclass(frozen=True, kw_only=True, eq=False)
class Bound:
    """What is known of the plans whose choices are all among some open ones.

    - `value`: none of them costs less; infinity where none is within the limits.
    - `x`: float64 `[choices]`, the relaxed plan.
    - `if_taken`: float64 `[choices]`: none of them that takes this choice costs less.
    """

    value: float
    x: np.ndarray
    if_taken: np.ndarray


class Convex:
    """A `Quadratic` whose diagonal `delta` `[choices]` is moved to the linear part."""

    def __init__(self, program: Quadratic, delta: np.ndarray) -> None:
        self.program, self.delta = program, delta
        # The diagonal of `within` is part of `unary` already.
        self.linear = program.unary - program.within.diagonal() + delta
        self.within = program.within - np.diag(delta)
        self.matrix = program.pair + self.within

    def bound(self, open_: np.ndarray, hint: np.ndarray, cutoff: float) -> Bound:
        """Bound the plans among `open_` (bool `[choices]`, at least one of each variable).

        `hint`: float64 `[choices]`, larger for choices that are rather taken. Solved no further
        than to see whether the bound reaches `cutoff`.
        """
        return View(self, open_, hint).bound(cutoff)

    def rounding_costs(self, x: np.ndarray) -> np.ndarray:
        """How much drawing each variable's choice with the chances x costs, `[variables]`.

        The mean of f over such draws is f(x) plus the sum of these, which are not negative.
        """
        # sum_k Q_kk x_k - x_g' Q_gg x_g
        spread = x * (self.within.diagonal() - self.within @ x)
        return np.add.reduceat(spread, self.program.first)


class View:
    """The plans among open choices as z >= 0, with one choice per variable for a reference.

    x = reference + E z, where column i of E adds the choice `free[i]` and takes `base[i]` away,
    the reference of its variable. In z the relaxation is `program`, plus `constant`.
    """

    def __init__(self, convex: Convex, open_: np.ndarray, hint: np.ndarray) -> None:
        whole, q = convex.program, convex.matrix
        self.reference = whole.largest(np.where(open_, hint, -np.inf))
        others = open_.copy()
        others[self.reference] = False
        self.free = np.flatnonzero(others)
        self.base = self.reference[whole.variable[self.free]]
        # Variables with free choices: where each starts among these, and its number.
        opens = np.diff(whole.variable[self.free], prepend=-1) > 0
        self.first, self.group = np.flatnonzero(opens), np.cumsum(opens) - 1

        taken = np.ix_(self.reference, self.reference)
        self.constant = float(whole.unary[self.reference].sum() + whole.pair[taken].sum())
        slope = convex.linear + 2 * q[self.reference].sum(axis=0)
        rows = q[self.free] - q[self.base]
        self.usage = whole.usage[:, self.free] - whole.usage[:, self.base]
        self.room = whole.room - whole.usage[:, self.reference].sum(axis=1)
        one_hot = (self.group == np.arange(len(self.first))[:, None]).astype(np.float64)
        scale = np.maximum(np.abs(self.usage).max(axis=1, initial=0), 1)
        self.program = interior.Program(
            rows[:, self.free] - rows[:, self.base],
            slope[self.free] - slope[self.base],
            np.concatenate([one_hot, self.usage / scale[:, None]]),
            np.concatenate([np.ones(len(one_hot)), self.room / scale]),
        )
        self.start = 1 / (1 + one_hot.sum(axis=1))[self.group]
        self.size = len(whole.unary)

    def relaxed(self, z: np.ndarray) -> np.ndarray:
        """x, float64 `[choices]`."""
        x = np.zeros(self.size)
        x[self.reference] = 1
        x[self.free] = z
        np.subtract.at(x, self.base, z)
        return x

    def bound(self, cutoff: float) -> Bound:
        """See `Convex.bound`."""
        best, x = -np.inf, self.relaxed(np.zeros(len(self.free)))
        above, under = np.zeros(len(self.free)), np.zeros(len(self.first))
        if not self.reachable():
            best = np.inf
        elif not len(self.free):
            best = self.constant
        else:
            goal = cutoff - self.constant
            with np.errstate(all="ignore"):
                for step in interior.steps(self.program, self.start):
                    reached, slopes, low = self._minorant(step)
                    if reached > best:
                        best, above, under = reached, slopes, low
                        x = self.relaxed(step.z)
                    value = float((self.program.c + step.gradient) @ step.z) / 2
                    left = value - best
                    near = left <= MISSED * (goal - value) or left <= 1e-12 * abs(value)
                    if best >= goal or (near and step.violation < 1e-6):
                        break
            best += self.constant
        if_taken = np.full(len(x), np.inf)
        if_taken[self.reference] = best
        if_taken[self.base] = best - under[self.group]
        if_taken[self.free] = best + above - under[self.group]
        return Bound(value=best, x=x, if_taken=if_taken)

    def reachable(self) -> bool:
        """Whether the open choices keep every limit by itself."""
        if not len(self.free):
            return bool((self.room >= 0).all())
        least = np.minimum(np.minimum.reduceat(self.usage, self.first, axis=1), 0)
        return bool((least.sum(axis=1) <= self.room).all())

    def _minorant(self, step: interior.Step):
        """The bound in z, and of the linear minorant: each slope, each variable's least, <= 0."""
        prices = step.y[len(self.first) :]
        slopes = step.gradient + prices @ self.program.a[len(self.first) :]
        low = np.minimum(np.minimum.reduceat(slopes, self.first), 0.0)
        # f(z) - gradient'z = (c - gradient)'z / 2, as gradient = c + 2 P z
        value = (self.program.c - step.gradient) @ step.z / 2
        value += low.sum() - prices @ self.program.b[len(self.first) :]
        return float(value), slopes, low
