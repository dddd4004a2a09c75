"""A problem with couplings in the form in which solvers work.

    minimise  sum_a unary[a] x_a + sum_{a != b} pair[a, b] x_a x_b,   one x_a = 1 per variable

Layers that decide together become one variable: G becomes S G S', where the 0/1 matrix S adds up
their rows, which keeps it positive semidefinite. As x_a^2 = x_a, the diagonal belongs to the
unary costs; and as two choices of one variable are never taken together, their entries matter
to no plan (`within` holds them for those who care about definiteness). Dominated choices stay:
what is dear by itself may be cheap beside others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from proxyq.search.allocate.problem import Problem
from proxyq.search.allocate.reduce import Reduced, merged, reduce, with_costs


@dataclass(frozen=True, kw_only=True, eq=False)
class Quadratic:
    """Costs of choices and of pairs of choices; every array has an entry per open choice.

    - `reduced`: the variables, limits and open choices; its regrets are those of `unary` alone.
    - `variable`, `column`: int `[choices]`, in order; `first`: where each variable's choices
      start, `[variables]`.
    - `unary`: float64 `[choices]`; `pair`: float64 `[choices, choices]`, symmetric, 0 within a
      variable; `within`: the entries of S G S' there, 0 elsewhere.
    - `usage`: int64 `[limits, choices]`, `room`: int64 `[limits]`; limits that no choice can
      exceed are left out.
    """

    reduced: Reduced
    variable: np.ndarray
    column: np.ndarray
    first: np.ndarray
    unary: np.ndarray
    pair: np.ndarray
    within: np.ndarray
    usage: np.ndarray
    room: np.ndarray

    def value(self, taken: np.ndarray) -> float:
        """The objective where variable g takes the choice `taken[g]`, correctly rounded."""
        pairs = self.pair[np.ix_(taken, taken)]
        return math.fsum([*self.unary[taken].tolist(), *pairs.ravel().tolist()])

    def size(self, taken: np.ndarray) -> float:
        """The sum of the magnitudes of the terms of `value`: what rounding errors go by."""
        pairs = self.pair[np.ix_(taken, taken)]
        return float(np.abs(self.unary[taken]).sum() + np.abs(pairs).sum())

    def fits(self, taken: np.ndarray) -> bool:
        """Whether these choices keep every limit."""
        return bool((self.usage[:, taken].sum(axis=1) <= self.room).all())

    def largest(self, x: np.ndarray) -> np.ndarray:
        """The choice of each variable at which `x` `[choices]` is largest, `[variables]`."""
        return np.lexsort((-x, self.variable))[self.first]

    def choices(self, picked: np.ndarray | Sequence[int]) -> np.ndarray:
        """Column per variable to choice per variable, `[variables]`."""
        number = np.zeros(self.reduced.open.shape, np.int64)
        number[self.variable, self.column] = np.arange(len(self.variable))
        return number[np.arange(len(self.first)), np.asarray(picked)]

    def expand(self, taken: np.ndarray) -> tuple[int, ...]:
        """Choice per variable to column per layer."""
        return self.reduced.expand(self.column[taken])

    def only(self, open_: np.ndarray, scale: float = 1.0) -> "Quadratic":
        """The same with these choices alone (bool `[choices]`), and costs times `scale`."""
        kept = np.flatnonzero(open_)
        variable = self.variable[kept]
        return replace(
            self,
            variable=variable,
            column=self.column[kept],
            first=np.searchsorted(variable, np.arange(len(self.first))),
            unary=self.unary[kept] * scale,
            pair=self.pair[np.ix_(kept, kept)] * scale,
            within=self.within[np.ix_(kept, kept)] * scale,
            usage=self.usage[:, kept],
        )

    def separable(self, cost: np.ndarray) -> Reduced:
        """The problem without pairs, at other costs `[choices]`."""
        table = np.full(self.reduced.open.shape, np.inf)
        table[self.variable, self.column] = cost
        return with_costs(self.reduced, table)


def quadratic(problem: Problem) -> Quadratic:
    """`problem`, which has couplings, as a `Quadratic`."""
    reduced = reduce(problem)
    variable, column = np.nonzero(reduced.open)
    rows = variable * len(problem.bits) + column
    matrix = _merged_coupling(problem)[np.ix_(rows, rows)]
    same = variable[:, None] == variable
    unary = merged(problem, problem.cost)[variable, column] + matrix.diagonal()
    table = np.full(reduced.open.shape, np.inf)
    table[variable, column] = unary
    room = np.array(reduced.room, np.int64)
    binding = reduced.usage.max(axis=2).sum(axis=1) > room
    return Quadratic(
        reduced=with_costs(reduced, table),
        variable=variable,
        column=column,
        first=np.searchsorted(variable, np.arange(reduced.variables)),
        unary=unary,
        pair=np.where(same, 0.0, matrix),
        within=np.where(same, matrix, 0.0),
        usage=reduced.usage[binding][:, variable, column],
        room=room[binding],
    )


def _merged_coupling(problem: Problem) -> np.ndarray:
    """S G S', float64 `[variables * bits, variables * bits]`."""
    assert problem.coupling is not None
    layers, columns = len(problem.layers), len(problem.bits)
    blocks = problem.coupling.reshape(layers, columns, layers, columns)
    members = problem.decisions
    if len(members) < layers:
        blocks = np.stack([blocks[list(own)].sum(axis=0) for own in members])
        blocks = np.stack([blocks[:, :, list(own)].sum(axis=2) for own in members], axis=2)
    return blocks.reshape(len(members) * columns, -1)
