"""Proof where layers are coupled: branch and bound on the convex relaxation.

A node is a set of open choices. Its relaxation bounds it, closes the choices that no better plan
can take (see `relax`), and shows where to split: at the variable whose choice, drawn by chance
from the relaxed plan, would cost most, between the columns that the relaxed plan lies between.
The node of the least bound is next. Relaxed plans, rounded and led through the local search, are
where better plans come from. After some nodes the relaxation is made tighter for what is left.
"""

import heapq
import itertools
import time
from dataclasses import dataclass

import numpy as np

from proxyq.search.allocate import lagrange
from proxyq.search.allocate.convexify import convexify, safe_delta
from proxyq.search.allocate.exchange import Search
from proxyq.search.allocate.quadratic import Quadratic
from proxyq.search.allocate.relax import Convex
from proxyq.search.allocate.symmetry import alike, arranged, in_order

# Costs this much apart, as a share of the known plan's, are one cost: rounding.
SAME = 1e-10
# The relaxation is made tight for what is left at this node, which easy problems do not reach,
# and again each time there are so many times as many; from the first one where the matrix is
# indefinite. How far delta may fall then: see `convexify`.
TIGHTEN, AGAIN = 20, 3
FLOOR, FLOOR_LOOSE = 0.01, 100.0
# Every node is rounded to a plan up to this number, then every tenth.
ROUND = 30


@dataclass(frozen=True, kw_only=True, eq=False)
class Proof:
    """`taken` `[variables]`: the best plan known; `bound`: none costs less; `nodes` looked at.

    `complete`: nothing is left to look at, so that `taken` is the best up to rounding, or up to
    the gap that was allowed.
    """

    taken: np.ndarray
    bound: float
    complete: bool
    nodes: int


def separable_bound(program: Quadratic) -> tuple[float, np.ndarray]:
    """A bound without any relaxation, in no time: `(value, if_taken)` as in `relax.Bound`.

    Each choice pays what the others cost beside it at least, one from each variable:

        f(x) >= sum_a h_a x_a,   h_a = unary_a + sum_g min_{b of g} pair[a, b]
    """
    h = program.unary + np.minimum.reduceat(program.pair, program.first, axis=1).sum(axis=1)
    least = np.minimum.reduceat(h, program.first)
    alone = least.sum() + h - least[program.variable]
    reduced = program.separable(h)
    return max(float(least.sum()), reduced.base + lagrange.bound(reduced)), alone


def branch_and_bound(
    program: Quadratic,
    known: np.ndarray,
    *,
    gap_limit: float,
    deadline: float,
    nodes: int | None = None,
) -> Proof:
    """The best choices, from `known`, which fit; `deadline` is a time of `time.perf_counter()`."""
    tree = _Tree(program, known, gap_limit, deadline)
    while tree.heap and time.perf_counter() < deadline and tree.nodes != nodes:
        tree.next()
    # What was left out costs at least the cutoff of its time, and the cutoff only falls.
    bound = tree.value if gap_limit == 0 else tree.cutoff
    if tree.heap:
        bound = min(bound, tree.heap[0][0])
    taken = arranged(tree.taken, tree.alike)
    return Proof(taken=taken, bound=bound, complete=not tree.heap, nodes=tree.nodes)


class _Tree:
    """Nodes `(bound, number, open choices, hint)`, the best plan, and the relaxation in use."""

    def __init__(
        self, program: Quadratic, known: np.ndarray, gap_limit: float, deadline: float
    ) -> None:
        self.program, self.deadline, self.gap_limit = program, deadline, gap_limit
        self.search = Search(program, deadline)
        # Where all terms are zero, what else there is tells what counts as zero.
        largest = float(max(np.abs(program.unary).max(), np.abs(program.pair).max()))
        self.rounding = SAME * program.size(known) + 1e-16 * largest
        self.taken, self.value = known, program.value(known)
        self.plain = self.convex = Convex(program, safe_delta(program))
        # The first relaxation of an indefinite matrix is a poor one.
        self.loose = bool(self.plain.delta.min() < -1e-9 * np.abs(self.plain.matrix).max())
        self.due = 1 if self.loose else TIGHTEN
        self.numbers = itertools.count()
        self.nodes = 0
        self.heap: list[tuple[float, int, np.ndarray, np.ndarray]] = []
        hint = np.zeros(len(program.unary))
        hint[known] = 1
        self.alike = alike(program)
        self.push(separable_bound(program)[0], np.ones(len(hint), bool), hint)

    @property
    def cutoff(self) -> float:
        """Plans that cost as much are no better than the known one."""
        return self.value - max(self.rounding, self.gap_limit * abs(self.value))

    def push(self, bound: float, open_: np.ndarray, hint: np.ndarray) -> None:
        """Keep a node for later, unless it holds nothing better."""
        if bound < self.cutoff:
            heapq.heappush(self.heap, (bound, next(self.numbers), open_, hint))

    def next(self) -> None:
        """Bound, close, round and split the node of the least bound."""
        bound, _, open_, hint = heapq.heappop(self.heap)
        if bound >= self.cutoff:
            self.heap.clear()
            return
        self.nodes += 1
        if self.nodes == self.due:
            self.tighten(open_, hint)
        found = self.convex.bound(open_, hint, self.cutoff)
        if found.value >= self.cutoff:
            return
        bound, x = max(bound, found.value), np.maximum(found.x, 0.0)
        self.round(x)
        open_ = in_order(open_ & (found.if_taken < self.cutoff), self.alike)
        counts = np.add.reduceat(open_, self.program.first, dtype=np.int64)
        if counts.min() == 0:
            return
        if counts.max() == 1:
            self.offer(np.flatnonzero(open_))
            return
        for side in self.split(open_, counts, x):
            self.push(bound, side, x)

    def offer(self, taken: np.ndarray) -> None:
        """Keep a plan that is better than the known one."""
        if self.program.fits(taken):
            value = self.program.value(taken)
            if value < self.value:
                self.taken, self.value = taken, value

    def round(self, x: np.ndarray) -> None:
        """Look for a better plan near the relaxed one."""
        taken = self.program.largest(x)
        self.offer(taken)
        if self.nodes <= ROUND or self.nodes % 10 == 0:
            inside = self.search.into_limits(taken)
            if inside is not None:
                self.offer(self.search.descend(inside))

    def split(self, open_: np.ndarray, counts: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
        """The open choices in two halves that differ in one variable."""
        x = np.where(open_, x, 0.0)
        costs = np.where(counts > 1, self.convex.rounding_costs(x), -np.inf)
        own = np.flatnonzero(open_ & (self.program.variable == costs.argmax()))
        # Where the share of the relaxed plan below comes nearest to a half.
        below = np.cumsum(x[own])[:-1] / max(float(x[own].sum()), 1e-300)
        middle = int(np.abs(below - 0.5).argmin()) + 1
        halves = []
        for left_out in (own[middle:], own[:middle]):
            half = open_.copy()
            half[left_out] = False
            halves.append(half)
        return halves

    def tighten(self, open_: np.ndarray, hint: np.ndarray) -> None:
        """Find a tight relaxation for all that is left, and keep it if it is better."""
        self.due *= AGAIN
        left = np.logical_or.reduce([open_, *(node[2] for node in self.heap)])
        below = FLOOR_LOOSE if self.loose else FLOOR
        tight = convexify(self.plain, left, hint, self.cutoff, self.deadline, below=below)
        bounds = [one.bound(left, hint, self.cutoff).value for one in (self.convex, tight)]
        if bounds[1] > bounds[0]:
            self.convex = tight
