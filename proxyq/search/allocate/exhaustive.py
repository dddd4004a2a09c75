"""Every assignment, one by one: the reference that the other solvers are tested against.

It shares nothing with them but the problem: no merging of costs, no pruning, no scaling. Ties
go to the lower usage of the first limit, then of the next, then to the earlier columns.
"""

import itertools
import math
import time

from proxyq.errors import UsageError
from proxyq.search.allocate.assignment import Assignment, finish, total_cost, used
from proxyq.search.allocate.feasible import require_reachable
from proxyq.search.allocate.problem import InfeasibleError, Problem
from proxyq.search.allocate.reduce import reduce

MAX_ASSIGNMENTS = 200_000


def exhaustive(
    problem: Problem,
    *,
    time_limit: float = 60.0,
    gap_limit: float = 0.0,
    max_assignments: int = MAX_ASSIGNMENTS,
) -> Assignment:
    """The best assignment of a tiny problem; `time_limit` and `gap_limit` are not needed.

    **Raises** `UsageError` beyond `max_assignments`, `InfeasibleError` when there is none.
    """
    del time_limit, gap_limit
    started = time.perf_counter()
    units = problem.decisions
    open_ = [
        [k for k in range(len(problem.bits)) if all(problem.allowed[i, k] for i in members)]
        for members in units
    ]
    count = math.prod(map(len, open_))
    if count > max_assignments:
        other = "ilp" if problem.coupling is None else "iqp"
        raise UsageError(
            f"the solver 'exhaustive' tries at most {max_assignments} assignments, and this "
            f"problem has {count}; use {other!r}."
        )
    best: tuple | None = None
    choice = [0] * len(problem.layers)
    for columns in itertools.product(*open_):
        for members, k in zip(units, columns, strict=True):
            for i in members:
                choice[i] = k
        usage = [used(limit, choice) for limit in problem.limits]
        if any(u > limit.budget for u, limit in zip(usage, problem.limits, strict=True)):
            continue
        key = (total_cost(problem, choice), usage, tuple(choice))
        if best is None or key < best:
            best = key
    if best is None:
        require_reachable(problem, reduce(problem))
        raise InfeasibleError("no assignment keeps all the limits together; loosen one of them.")
    return finish(
        problem, best[2], bound=best[0], solver="exhaustive", started=started, proven=True
    )
