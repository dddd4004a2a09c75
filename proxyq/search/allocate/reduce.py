"""A problem in the form in which solvers work: merged, shifted, in small exact integers.

- Layers that decide together become one variable: costs and usages add up, candidates
  intersect.
- Costs become regrets: cost above the variable's cheapest choice. Usages are counted above
  the variable's least, budgets shrink by the sum of the least, and both are divided by the
  greatest common divisor of a limit's usages (the budget rounded down: exact).
- A choice is dropped when another one of the same variable costs no more and uses no more of
  anything; of two alike the one at the lower column stays. At least one optimum survives,
  and ties inside a variable go to the lower usage.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from proxyq.search.allocate.problem import Problem


@dataclass(frozen=True, kw_only=True, eq=False)
class Reduced:
    """`minimise base + sum regret[g, k_g]` subject to `sum usage[m, g, k_g] <= room[m]`.

    - `members`: layers per variable; `open`: bool `[variables, bits]`, candidates;
      `kept`: the same without dominated choices.
    - `regret`: float64 `[variables, bits]`, infinite where not open, least 0.
    - `usage`: int64 `[limits, variables, bits]`, least 0, and 0 where not open.
    - `room`: one int per limit; a negative one cannot be met.
    """

    members: tuple[tuple[int, ...], ...]
    open: np.ndarray
    kept: np.ndarray
    regret: np.ndarray
    base: float
    usage: np.ndarray
    room: tuple[int, ...]

    @property
    def variables(self) -> int:
        """How many decisions there are."""
        return len(self.members)

    def expand(self, picked: Sequence[int] | np.ndarray) -> tuple[int, ...]:
        """Column per variable to column per layer."""
        choice = [0] * sum(len(members) for members in self.members)
        for members, k in zip(self.members, picked, strict=True):
            for layer in members:
                choice[layer] = int(k)
        return tuple(choice)

    def contract(self, choice: Sequence[int]) -> np.ndarray:
        """Column per layer to column per variable, `[variables]`."""
        return np.array([choice[members[0]] for members in self.members])

    def used(self, picked: np.ndarray) -> np.ndarray:
        """Usage of every limit at these columns, int64 `[limits]`."""
        return self.usage[:, np.arange(self.variables), picked].sum(axis=1)

    def fits(self, picked: np.ndarray) -> bool:
        """Whether these columns keep every limit."""
        return bool((self.used(picked) <= np.array(self.room, np.int64)).all())

    def excess(self, picked: np.ndarray) -> float:
        """Regret at these columns."""
        return math.fsum(self.regret[np.arange(self.variables), picked].tolist())


def merged(problem: Problem, table: np.ndarray) -> np.ndarray:
    """A `[layers, bits]` table summed over the layers that decide together."""
    return np.stack([table[list(members)].sum(axis=0) for members in problem.decisions])


def candidates(problem: Problem, allowed: np.ndarray | None = None) -> np.ndarray:
    """Columns open to each variable, bool `[variables, bits]`."""
    table = problem.allowed if allowed is None else allowed
    return np.stack([table[list(members)].all(axis=0) for members in problem.decisions])


def _undominated(open_: np.ndarray, regret: np.ndarray, usage: np.ndarray) -> np.ndarray:
    """`open_` without choices that another choice of the variable is at least as good as."""
    kept = open_.copy()
    columns = open_.shape[1]
    for k in range(columns):
        for other in range(columns):
            if other == k:
                continue
            better = kept[:, k] & kept[:, other] & (regret[:, other] <= regret[:, k])
            better &= (usage[:, :, other] <= usage[:, :, k]).all(axis=0)
            same = (regret[:, other] == regret[:, k]) & (usage[:, :, other] == usage[:, :, k]).all(
                axis=0
            )
            kept[:, k] &= ~(better & (~same | (other < k)))
    return kept


def reduce(problem: Problem) -> Reduced:
    """`problem` merged, shifted and divided; see the module."""
    members = problem.decisions
    open_ = candidates(problem)
    usages, rooms = [], []
    for limit in problem.limits:
        usage = merged(problem, limit.usage)
        least = np.where(open_, usage, np.iinfo(np.int64).max).min(axis=1)
        usage = np.where(open_, usage - least[:, None], 0)
        room = limit.budget - limit.fixed - sum(int(u) for u in least)
        divisor = max(int(np.gcd.reduce(usage, axis=None)), 1)
        usages.append(usage // divisor)
        rooms.append(room // divisor)
    usage = np.stack(usages) if usages else np.zeros((0, *open_.shape), np.int64)
    regret, base, kept = _regrets(open_, merged(problem, problem.cost), usage)
    return Reduced(
        members=members,
        open=open_,
        kept=kept,
        regret=regret,
        base=base,
        usage=usage,
        room=tuple(rooms),
    )


def with_costs(reduced: Reduced, cost: np.ndarray) -> Reduced:
    """The same variables and limits at other costs, float64 `[variables, bits]`."""
    regret, base, kept = _regrets(reduced.open, cost, reduced.usage)
    return replace(reduced, regret=regret, base=base, kept=kept)


def _regrets(open_: np.ndarray, cost: np.ndarray, usage: np.ndarray):
    """`regret`, `base` and `kept` of `Reduced`."""
    cost = np.where(open_, cost, np.inf)
    cheapest = cost.min(axis=1)
    with np.errstate(invalid="ignore"):
        regret = np.where(open_, cost - cheapest[:, None], np.inf)
    return regret, math.fsum(cheapest.tolist()), _undominated(open_, regret, usage)


def canonical(reduced: Reduced, picked: np.ndarray) -> np.ndarray:
    """The same answer with variables that are alike in everything sorted.

    Solvers are free to permute such variables; earlier ones get the higher column.
    """
    alike: dict[bytes, list[int]] = {}
    for g in range(reduced.variables):
        key = reduced.regret[g].tobytes() + reduced.usage[:, g].tobytes()
        alike.setdefault(key, []).append(g)
    picked = np.array(picked)
    for variables in alike.values():
        picked[variables] = np.sort(picked[variables])[::-1]
    return picked
