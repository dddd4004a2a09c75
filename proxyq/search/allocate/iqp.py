"""The exact answer where layers are coupled: an integer quadratic program.

Published for bit allocation as CLADO (Deng et al. 2023, arXiv:2307.05657), with a general solver
and a limit of time. Here a plan is found by local search in milliseconds (`exchange`) and proven
by branch and bound on a convex relaxation made for this problem (`branch`). Where ours differs:
any candidates, limits and groups; answers are checked in exact integers; every bound is valid,
also where time ends the proof; and an indefinite matrix can be solved as it is.
"""

import time
from dataclasses import replace

import numpy as np

from proxyq.errors import UsageError
from proxyq.psd import nearest_psd
from proxyq.search.allocate.assignment import Assignment, finish
from proxyq.search.allocate.branch import branch_and_bound, separable_bound
from proxyq.search.allocate.exchange import local_search
from proxyq.search.allocate.feasible import require_reachable
from proxyq.search.allocate.greedy import greedy_point
from proxyq.search.allocate.highs import power_of_two
from proxyq.search.allocate.ilp import ilp
from proxyq.search.allocate.problem import Problem, exact_integer
from proxyq.search.allocate.quadratic import quadratic
from proxyq.search.allocate.threads import one_thread

# Negative eigenvalues of this share in the magnitude of all are what rounding leaves behind.
ROUNDED = 1e-6
# Local search may take this share of the time.
SEARCH = 0.3


def iqp(
    problem: Problem,
    *,
    time_limit: float = 60.0,
    gap_limit: float = 0.0,
    indefinite: str = "project",
    starts: int = 60,
    seed: int = 0,
    nodes: int | None = None,
) -> Assignment:
    """The best assignment within all limits; without couplings, that of `ilp`.

    - `time_limit`: seconds; when they end the proof, the status is feasible.
    - `gap_limit`: stop once the answer is proven within this relative gap.
    - `indefinite`: what becomes of couplings that are not positive semidefinite. `"project"`
      replaces them by the nearest that are: `Assignment.problem` holds them, and a note says how
      much went. `"exact"` solves them as they are.
    - `starts`, `seed`: of the local search.
    - `nodes`: of the tree at most; unlike a limit of time, it gives the same answer everywhere.

    **Raises** `InfeasibleError` when no assignment keeps all limits.
    """
    started = time.perf_counter()
    if indefinite not in ("project", "exact"):
        raise UsageError(f"`indefinite` must be 'project' or 'exact', got {indefinite!r}.")
    for name, number, least in (("starts", starts, 1), ("seed", seed, 0), ("nodes", nodes, 0)):
        if number is not None and exact_integer(number, f"`{name}`") < least:
            raise UsageError(f"`{name}` must be at least {least}, got {number}.")
    if problem.coupling is None:
        return ilp(problem, time_limit=time_limit, gap_limit=gap_limit)
    notes: tuple[str, ...] = ()
    with one_thread():
        if indefinite == "project":
            problem, notes = definite(problem)
        program = quadratic(problem)
        require_reachable(problem, program.reduced)
        known = program.choices(greedy_point(problem, program.reduced, time_limit=time_limit))
        # Left out: choices that alone cost more than the known plan, which may drown the rest.
        bound, if_taken = separable_bound(program)
        value = program.value(known)
        keep = if_taken <= value + 1e-9 * (value - bound)
        keep[known] = True
        scale = power_of_two(program.size(known), 1.0)
        known = np.cumsum(keep)[known] - 1
        program = program.only(keep, scale)
        known = local_search(
            program, known, starts=starts, seed=seed, deadline=started + SEARCH * time_limit
        )
        proof = branch_and_bound(
            program, known, gap_limit=gap_limit, deadline=started + time_limit, nodes=nodes
        )
    return finish(
        problem,
        program.expand(proof.taken),
        bound=max(bound, proof.bound / scale),
        solver="iqp",
        started=started,
        gap_limit=gap_limit,
        proven=proof.complete,
        notes=notes,
    )


def definite(problem: Problem) -> tuple[Problem, tuple[str, ...]]:
    """`problem` with positive semidefinite couplings, and a note if that changed it.

    As x_a^2 = x_a, the costs may count as a diagonal or not; whichever way less is removed.
    """
    matrix = problem.coupling
    assert matrix is not None
    tried = []
    for table in (np.zeros(problem.cost.shape), np.where(problem.allowed, problem.cost, 0.0)):
        whole = matrix + np.diag(table.ravel())
        nearest, share = nearest_psd(whole)
        if share < ROUNDED:
            return problem, ()
        removed = float(np.linalg.norm(whole - nearest) / np.linalg.norm(whole))
        tried.append((share, removed, nearest - np.diag(table.ravel())))
    share, removed, coupling = min(tried, key=lambda one: one[0])
    return replace(problem, coupling=coupling), (
        "the couplings are indefinite and were replaced by the nearest positive semidefinite "
        f"ones, which removes {share:.1%} of the eigenvalues' magnitude ({removed:.1%} of the "
        "norm); objective and bound are those of the new couplings.",
    )
