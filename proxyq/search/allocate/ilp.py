"""The exact answer by integer linear programming (HiGHS), any number of limits.

Published for bit allocation by HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680, section 3.4) with
two bit-widths and one limit, and by LIMPQ; here any candidates, limits and groups. Where ours
differs: every answer is checked in exact integers (no budget is exceeded by a solver's
tolerance), a proof that is cut short keeps the best answer found and says how far it may be
off, and ties inside a layer go to the lower usage. How HiGHS is kept exact: `highs`.
"""

import time

from proxyq.search.allocate import lagrange
from proxyq.search.allocate.assignment import Assignment, finish
from proxyq.search.allocate.feasible import require_reachable
from proxyq.search.allocate.greedy import greedy_point
from proxyq.search.allocate.highs import integer_program
from proxyq.search.allocate.problem import Problem
from proxyq.search.allocate.reduce import canonical, reduce


def ilp(problem: Problem, *, time_limit: float = 60.0, gap_limit: float = 0.0) -> Assignment:
    """The best assignment within all limits.

    - `time_limit`: seconds; when they end the proof, the status is feasible.
    - `gap_limit`: stop once the answer is proven within this relative gap.

    **Raises** `InfeasibleError` when no assignment keeps all limits.
    """
    started = time.perf_counter()
    reduced = reduce(problem)
    require_reachable(problem, reduced)
    known = greedy_point(problem, reduced, time_limit=time_limit)
    bound = lagrange.bound(reduced)
    at_stake = reduced.excess(known)
    notes: list[str] = []
    proven = at_stake <= 0
    if not proven:
        # HiGHS measures the gap on regrets, we on whole costs, which may be the smaller ones.
        share = min(1.0, abs(reduced.base + at_stake) / at_stake)
        left = max(0.0, time_limit - (time.perf_counter() - started))
        found = integer_program(reduced, time_limit=left, rel_gap=gap_limit * share, known=known)
        bound = max(bound, found.bound)
        if found.picked is None:
            notes.append("the solver found no answer of its own; this is the greedy one.")
        else:
            proven = found.proven and gap_limit == 0
            if reduced.excess(found.picked) <= at_stake:
                known = found.picked
    return finish(
        problem,
        reduced.expand(canonical(reduced, known)),
        bound=reduced.base + bound,
        solver="ilp",
        started=started,
        gap_limit=gap_limit,
        proven=proven,
        notes=notes,
    )
