"""A good answer in milliseconds: marginal gains, then exchanges (no solver needed).

1. Descend: from the cheapest choice of every variable, take the move with the least cost per
   unit of violation removed, until every limit holds. Climb: from the least usage, take the
   move with the largest saving per share of the room it takes. The better of both is kept.
   With one limit and convex costs this is the classical greedy rule for the multiple-choice
   knapsack (Sinha and Zoltners 1979).
2. Exchange: while one move, or two moves of two variables together, lower the cost within all
   limits, do the best of them.

With several limits step 1 may end outside; a feasibility program (HiGHS) then decides whether
there is an answer at all. The bound is Lagrangian, so the gap is honest but seldom zero.
"""

import time

import numpy as np

from proxyq.search.allocate import lagrange
from proxyq.search.allocate.assignment import Assignment, finish
from proxyq.search.allocate.feasible import feasible_point, require_reachable
from proxyq.search.allocate.problem import Problem
from proxyq.search.allocate.reduce import Reduced, canonical, reduce

# Pairs looked at per exchange step: this many savings times this many costs.
PAIR_SAVINGS, PAIR_COSTS = 512, 2048


def greedy(problem: Problem, *, time_limit: float = 60.0, gap_limit: float = 0.0) -> Assignment:
    """A feasible answer whenever there is one; see the module.

    **Raises** `InfeasibleError` when there is none.
    """
    started = time.perf_counter()
    reduced = reduce(problem)
    require_reachable(problem, reduced)
    picked = greedy_point(problem, reduced, time_limit=time_limit)
    return finish(
        problem,
        reduced.expand(canonical(reduced, picked)),
        bound=reduced.base + lagrange.bound(reduced),
        solver="greedy",
        started=started,
        gap_limit=gap_limit,
    )


def greedy_point(problem: Problem, reduced: Reduced, *, time_limit: float) -> np.ndarray:
    """The columns `[variables]` of the greedy answer; raises `InfeasibleError` if none."""
    deadline = time.perf_counter() + time_limit
    starts = [point for point in (_descend(reduced), _climb(reduced)) if point is not None]
    if not starts:
        starts = [feasible_point(problem, reduced, time_limit=time_limit)]
    ends = [_exchange(reduced, point, deadline) for point in starts]
    return min(ends, key=reduced.excess)


def repair(problem: Problem, reduced: Reduced, picked: np.ndarray) -> np.ndarray:
    """An answer near `picked` that keeps every limit: descend from there, or start anew."""
    point = _descend(reduced, picked)
    return greedy_point(problem, reduced, time_limit=60.0) if point is None else point


def _weights(reduced: Reduced) -> np.ndarray:
    """What one unit of each limit is worth: 1 / room, so that limits compare, `[limits]`."""
    return 1.0 / np.maximum(np.array(reduced.room, np.float64), 1.0)


def _descend(reduced: Reduced, start: np.ndarray | None = None) -> np.ndarray | None:
    """From the cheapest choices (or `start`) down into all limits; None where stuck."""
    picked = reduced.regret.argmin(axis=1) if start is None else np.array(start)
    room, weights = np.array(reduced.room, np.int64), _weights(reduced)
    every = np.arange(reduced.variables)
    used = reduced.used(picked)
    while (used > room).any():
        now = reduced.usage[:, every, picked]
        after = used[:, None, None] + reduced.usage - now[:, :, None]
        over = np.tensordot(weights, np.maximum(after - room[:, None, None], 0), axes=1)
        violation = float(weights @ np.maximum(used - room, 0))
        removed = violation - over
        extra = reduced.regret - reduced.regret[every, picked][:, None]
        open_ = reduced.open & (removed > 1e-12 * violation)
        if not open_.any():
            return None
        # Moves that even save cost come first, by how much they save.
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(open_, extra / removed, np.inf)
        g, k = np.unravel_index(int(rate.argmin()), rate.shape)
        used = after[:, g, k]
        picked[g] = k
    return picked


def _climb(reduced: Reduced) -> np.ndarray | None:
    """From the least usage up by the best saving per share of room; None where that is outside."""
    weights = _weights(reduced)
    room = np.array(reduced.room, np.int64)
    every = np.arange(reduced.variables)
    share = np.tensordot(weights, reduced.usage, axes=1)
    picked = np.where(reduced.open, share, np.inf).argmin(axis=1)
    used = reduced.used(picked)
    if (used > room).any():
        return None
    while True:
        now = reduced.usage[:, every, picked]
        after = used[:, None, None] + reduced.usage - now[:, :, None]
        saving = reduced.regret[every, picked][:, None] - reduced.regret
        open_ = reduced.open & (saving > 0) & (after <= room[:, None, None]).all(axis=0)
        if not open_.any():
            return picked
        price = share - share[every, picked][:, None]
        # A saving that costs no room is free: take it first.
        with np.errstate(over="ignore", invalid="ignore"):
            rate = np.where(open_, saving / np.maximum(price, 1e-300), -np.inf)
        g, k = np.unravel_index(int(rate.argmax()), rate.shape)
        used = after[:, g, k]
        picked[g] = k


def _exchange(reduced: Reduced, start: np.ndarray, deadline: float) -> np.ndarray:
    """Best single moves and pairs of moves within the limits until none lowers the cost."""
    picked = start.copy()
    room = np.array(reduced.room, np.int64)
    every = np.arange(reduced.variables)
    floor = 1e-12 * max(float(reduced.regret[reduced.open].max()), 0.0)
    for _ in range(4 * reduced.regret.size):
        if time.perf_counter() > deadline:
            break
        used = reduced.used(picked)
        extra = np.where(
            reduced.kept, reduced.regret - reduced.regret[every, picked][:, None], np.inf
        )
        extra[every, picked] = np.inf
        change = reduced.usage - reduced.usage[:, every, picked][:, :, None]
        fits = (used[:, None, None] + change <= room[:, None, None]).all(axis=0)
        single = np.where(fits, extra, np.inf)
        g, k = np.unravel_index(int(single.argmin()), single.shape)
        if single[g, k] < -floor:
            picked[g] = k
            continue
        pair = _best_pair(extra, change, used, room)
        if pair is None or pair[0] >= -floor:
            break
        for g, k in pair[1]:
            picked[g] = k
    return picked


def _best_pair(extra: np.ndarray, change: np.ndarray, used: np.ndarray, room: np.ndarray):
    """The cheapest pair of moves (one that saves, one that pays) within the limits."""
    flat = extra.ravel()
    order = np.argsort(flat, kind="stable")
    savings = order[flat[order] < 0][:PAIR_SAVINGS]
    costs = order[(flat[order] >= 0) & np.isfinite(flat[order])]
    if not len(savings) or not len(costs):
        return None
    costs = costs[flat[costs] < -flat[savings[0]]][:PAIR_COSTS]
    if not len(costs):
        return None
    columns = extra.shape[1]
    total = flat[savings][:, None] + flat[costs][None]
    ok = (savings // columns)[:, None] != (costs // columns)[None]
    for m in range(len(room)):
        moves = change[m].ravel()
        ok &= used[m] + moves[savings][:, None] + moves[costs][None] <= room[m]
    total = np.where(ok, total, np.inf)
    a, b = np.unravel_index(int(total.argmin()), total.shape)
    pair = [divmod(int(savings[a]), columns), divmod(int(costs[b]), columns)]
    return float(total[a, b]), pair
