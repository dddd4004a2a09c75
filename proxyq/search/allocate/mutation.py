"""EMQ's way from a score to a plan: mutants of a plan that is given, the best within the budget.

EMQ (Dong et al., ICCV 2023, arXiv:2307.10554; its script of constrained sizes) takes a plan of
OMPQ, gives one to three layers other bits, the higher the likelier, tens of thousands of times,
keeps what is within the budget, and takes the mutant that its proxy likes best. Here the plan
itself competes too, so the answer is never worse than the start, and bits are in the order of the
problem's columns. No proof: the bound is Lagrangian, and tells what an exact solver could gain.

Where ours differs: theirs also drops mutants that leave 0.5 or 2 MiB of the budget unused.
"""

import time
from collections.abc import Sequence

import numpy as np

from proxyq.errors import UsageError
from proxyq.search.allocate import lagrange
from proxyq.search.allocate.assignment import Assignment, finish
from proxyq.search.allocate.feasible import require_reachable
from proxyq.search.allocate.greedy import greedy_point, repair
from proxyq.search.allocate.problem import Problem
from proxyq.search.allocate.reduce import Reduced, reduce

MUTANTS = 50_000
MOST_CHANGES = 3
CHUNK = 4096


def mutation(
    problem: Problem,
    *,
    start: Sequence[int] | None = None,
    mutants: int = MUTANTS,
    changes: int = MOST_CHANGES,
    chances: Sequence[float] | None = None,
    seed: int = 0,
    time_limit: float = 60.0,
    gap_limit: float = 0.0,
) -> Assignment:
    """The best of `mutants` of a plan within all limits.

    - `start`: columns of the plan, one for each layer; without one, that of `greedy`. One that
      exceeds a limit is repaired first.
    - `changes`: how many variables differ at most; `chances`: of each bit-width to be drawn, for
      EMQ 0.1, 0.3 and 0.6 of 2, 3 and 4 bits; alike without them.

    **Raises** `UsageError` for numbers that make no sense, `InfeasibleError` without an answer.
    """
    started = time.perf_counter()
    columns = len(problem.bits)
    for name, number in (("mutants", mutants), ("changes", changes)):
        if number < 1:
            raise UsageError(f"`{name}` must be at least 1, got {number}.")
    chance = np.ones(columns) if chances is None else np.asarray(chances, np.float64)
    if chance.shape != (columns,) or not (np.isfinite(chance) & (chance >= 0)).all():
        raise UsageError(
            f"`chances` must be {columns} numbers of at least 0, one for each of the bits "
            f"{', '.join(map(str, problem.bits))}, got {list(chances or ())}."
        )
    reduced = reduce(problem)
    require_reachable(problem, reduced)
    if start is None:
        best = greedy_point(problem, reduced, time_limit=time_limit)
    else:
        best = _started(problem, reduced, start)
    rng = np.random.default_rng(seed)
    first, cost = best, reduced.excess(best)
    every, room = np.arange(reduced.variables), np.array(reduced.room, np.int64)
    # What cannot be drawn anywhere leaves a variable as it is.
    weight = np.where(reduced.open, chance, 0.0)
    may = np.flatnonzero(weight.sum(axis=1) > 0)
    left = mutants if len(may) else 0
    while left > 0 and time.perf_counter() - started < time_limit:
        number = min(left, CHUNK)
        left -= number
        # The first few of all variables in a random order, for each mutant.
        most = min(changes, len(may))
        order = may[rng.random((number, len(may))).argsort(axis=1)[:, :most]]
        changed = np.arange(most) < rng.integers(1, most + 1, (number, 1))
        rows, places = np.nonzero(changed)[0], order[changed]
        drawn = np.repeat(first[None], number, axis=0)
        # A column for each by inverting the cumulated chances.
        share = np.cumsum(weight[places], axis=1)
        point = rng.random(len(rows)) * share[:, -1]
        drawn[rows, places] = (share <= point[:, None]).sum(axis=1)
        used = reduced.usage[:, every, drawn].sum(axis=2)
        total = np.where(
            (used <= room[:, None]).all(axis=0), reduced.regret[every, drawn].sum(axis=1), np.inf
        )
        place = int(total.argmin())
        if total[place] < cost:
            best, cost = drawn[place], float(total[place])
    return finish(
        problem,
        reduced.expand(best),
        bound=reduced.base + lagrange.bound(reduced),
        solver="mutation",
        started=started,
        gap_limit=gap_limit,
    )


def _started(problem: Problem, reduced: Reduced, start: Sequence[int]) -> np.ndarray:
    """The start in columns of variables, within the limits."""
    if len(start) != len(problem.layers) or not all(0 <= k < len(problem.bits) for k in start):
        raise UsageError(
            f"`start` must be a column from 0 to {len(problem.bits) - 1} for each of "
            f"{len(problem.layers)} layers, got {list(start)}."
        )
    picked = reduced.contract(start)
    open_ = reduced.open[np.arange(reduced.variables), picked]
    # A variable whose column is pinned away takes the cheapest that is open.
    picked = np.where(open_, picked, reduced.regret.argmin(axis=1))
    return picked if reduced.fits(picked) else repair(problem, reduced, picked)
