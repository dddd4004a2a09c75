"""The exact answer for one limit by dynamic programming: the multiple-choice knapsack.

States after the first g variables are pairs (usage, regret); a state is dropped when another
one uses no more and costs no more (Dudzinski and Walukiewicz 1987, European Journal of
Operational Research 28), and also when its regret plus a Lagrangian bound on what remains
exceeds a known answer. Usages are exact integers, divided by their greatest common divisor.
AutoRound's scheme search walks the same lists, capped by a beam; ours has no cap and is exact,
and refuses instead when the lists grow beyond `max_states`.
"""

import time

import numpy as np

from proxyq.errors import ProxyqError, UsageError
from proxyq.search.allocate import lagrange
from proxyq.search.allocate.assignment import ROUNDING, Assignment, finish
from proxyq.search.allocate.feasible import require_reachable
from proxyq.search.allocate.greedy import greedy_point
from proxyq.search.allocate.problem import Problem
from proxyq.search.allocate.reduce import Reduced, canonical, reduce

MAX_STATES = 20_000_000


def dp(
    problem: Problem,
    *,
    time_limit: float = 60.0,
    gap_limit: float = 0.0,
    max_states: int = MAX_STATES,
) -> Assignment:
    """The best assignment within one limit (or none).

    - `time_limit`: seconds; when they end the search, the greedy answer is returned.
    - `max_states`: states kept in all (5 bytes each).

    **Raises** `UsageError` for several limits, `InfeasibleError` when there is no answer,
    `ProxyqError` when `max_states` is exceeded.
    """
    started = time.perf_counter()
    if len(problem.limits) > 1:
        names = ", ".join(
            parts[0].name + (f" in {len(parts)} parts" if len(parts) > 1 else "")
            for parts in problem.budgets
        )
        raise UsageError(
            f"the solver 'dp' takes one limit, got {len(problem.limits)} ({names}); use 'ilp'."
        )
    reduced = reduce(problem)
    require_reachable(problem, reduced)
    known = greedy_point(problem, reduced, time_limit=time_limit)
    bound = lagrange.bound(reduced)
    picked = known if reduced.excess(known) <= 0 else None
    if picked is None:
        picked = _search(reduced, known, started + time_limit, max_states)
    proven = picked is not None
    if picked is None or reduced.excess(known) < reduced.excess(picked):
        picked = known
    picked = canonical(reduced, picked)
    if proven:
        bound = max(bound, reduced.excess(picked))
    return finish(
        problem,
        reduced.expand(picked),
        bound=reduced.base + bound,
        solver="dp",
        started=started,
        gap_limit=gap_limit,
        proven=proven,
        notes=() if proven else ("the time limit ended the search; this is the greedy answer.",),
    )


def _search(
    reduced: Reduced, known: np.ndarray, deadline: float, max_states: int
) -> np.ndarray | None:
    """Columns `[variables]` of the least regret; None when the deadline passed."""
    if not reduced.room:  # no limit at all: the cheapest choices
        return reduced.regret.argmin(axis=1)
    room, usages = reduced.room[0], reduced.usage[0]
    multiplier = lagrange.best_multiplier(reduced, 0)
    priced = lagrange.priced(reduced, np.array([multiplier])).min(axis=1)
    # rest[g]: sum over variables g.. of min_k (regret + lambda usage)
    rest = np.concatenate([np.cumsum(priced[::-1])[::-1], [0.0]])
    ceiling = reduced.excess(known) * (1 + ROUNDING)
    usage, regret = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    states = 0
    for g in range(reduced.variables):
        if time.perf_counter() > deadline:
            return None
        columns = np.flatnonzero(reduced.kept[g])
        usage_next = (usage[None] + usages[g, columns][:, None]).ravel()
        regret_next = (regret[None] + reduced.regret[g, columns][:, None]).ravel()
        # remaining regret >= rest - lambda * (room - usage)
        least = regret_next + np.maximum(
            rest[g + 1] - multiplier * (room - usage_next).astype(np.float64), 0.0
        )
        alive = np.flatnonzero((usage_next <= room) & (least <= ceiling))
        # By usage, then regret; then keep what is cheaper than everything that uses less.
        alive = alive[np.lexsort((regret_next[alive], usage_next[alive]))]
        costs = regret_next[alive]
        front = np.ones(len(alive), bool)
        front[1:] = costs[1:] < np.minimum.accumulate(costs)[:-1]
        alive = alive[front]
        if not len(alive):
            return known  # nothing beats it
        trail.append(((alive % len(usage)).astype(np.int32), columns[alive // len(usage)]))
        usage, regret = usage_next[alive], regret_next[alive]
        states += len(alive)
        if states > max_states:
            raise ProxyqError(
                f"the solver 'dp' grew beyond {max_states} states at variable {g + 1} of "
                f"{reduced.variables}; use 'ilp', or raise `max_states`."
            )
    state = int(regret.argmin())
    picked = np.zeros(reduced.variables, np.int64)
    for g in reversed(range(reduced.variables)):
        parents, columns = trail[g]
        picked[g] = columns[state]
        state = int(parents[state])
    return picked
