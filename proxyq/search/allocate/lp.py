"""The linear relaxation: a lower bound, fractional bit-widths, and the papers' roundings.

    minimise  sum_gk r_gk x_gk    subject to   sum_k x_gk = 1,  sum_gk u_mgk x_gk <= room_m,  x >= 0

With costs linear in the bits (OMPQ, Ma et al. 2023, arXiv:2109.07865; CSMPQ, arXiv:2212.10220)
this is exactly their program over continuous bit-widths b_g = sum_k x_gk bits_k; they solve it
by SLSQP, which may stop short of a vertex, we by the simplex method. Roundings:

- `closest-below`: of all ways to round the fractional layers down or up, the one whose usage
  comes closest to the fractional one from below (OMPQ's exhaustive search for ResNet-18);
- `nearest`: the nearest candidate (OMPQ for other networks), which may exceed the budget;
- `down`: the next lower candidate.

Where ours differs: a rounded plan that exceeds a budget is repaired, and a note says so. The
bound is evaluated by us at HiGHS's multipliers (Lagrangian), so it is valid whatever HiGHS's
tolerances did.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from proxyq.errors import ProxyqError, UsageError, near
from proxyq.search.allocate import lagrange
from proxyq.search.allocate.assignment import Assignment, finish, used
from proxyq.search.allocate.feasible import feasible_point, require_reachable
from proxyq.search.allocate.greedy import repair
from proxyq.search.allocate.highs import STAKE, power_of_two, rows
from proxyq.search.allocate.problem import Problem
from proxyq.search.allocate.quiet import quiet_highs
from proxyq.search.allocate.reduce import Reduced, reduce

ROUNDINGS = ("closest-below", "nearest", "down")
WHOLE = 1e-7  # a fractional bit-width this close to a candidate is that candidate


@dataclass(frozen=True, kw_only=True, eq=False)
class Relaxation:
    """`bound` on the regret, `share` `[variables, bits]`, `bits` `[variables]` expected."""

    bound: float
    share: np.ndarray
    bits: np.ndarray


def lp(
    problem: Problem,
    *,
    time_limit: float = 60.0,
    gap_limit: float = 0.0,
    rounding: str = "closest-below",
) -> Assignment:
    """The rounded relaxation, within all limits; `expected_bits` holds the fractional answer.

    **Raises** `InfeasibleError` when no assignment keeps all limits.
    """
    started = time.perf_counter()
    if rounding not in ROUNDINGS:
        raise UsageError(f"unknown rounding {rounding!r}: {near(rounding, ROUNDINGS)}")
    reduced = reduce(problem)
    _require_one_axis(problem, reduced)
    require_reachable(problem, reduced)
    if len(problem.limits) > 1:
        feasible_point(problem, reduced, time_limit=time_limit)
    relaxed = relax(problem, reduced, time_limit=time_limit)
    picked = round_(problem, reduced, relaxed, rounding)
    notes = []
    if not reduced.fits(picked):
        rough = reduced.expand(picked)
        picked = repair(problem, reduced, picked)
        notes.append(_told(problem, rounding, rough, reduced.expand(picked)))
    expected = np.zeros(len(problem.layers))
    for members, bits in zip(reduced.members, relaxed.bits, strict=True):
        expected[list(members)] = bits
    return finish(
        problem,
        reduced.expand(picked),
        bound=reduced.base + relaxed.bound,
        solver="lp",
        started=started,
        gap_limit=gap_limit,
        notes=notes,
        expected_bits=expected.tolist(),
    )


def _require_one_axis(problem: Problem, reduced: Reduced) -> None:
    """Refuse what has no order to round in: one weight bit-width beside several activations'."""
    for members, open_ in zip(reduced.members, reduced.open, strict=True):
        widths = [problem.bits[k] for k in np.flatnonzero(open_)]
        if len(set(widths)) < len(widths):
            what = "weight and activation bits"
            if problem.group_sizes is not None:
                what = "bits and group sizes"
            raise UsageError(
                f"the solver 'lp' rounds one bit-width a layer, but {what} of "
                f"{problem.layers[members[0]]!r} are chosen apart; use 'ilp'."
            )


def relax(problem: Problem, reduced: Reduced, *, time_limit: float = 60.0) -> Relaxation:
    """Solve the relaxation; raises `ProxyqError` when HiGHS could not."""
    from scipy.optimize import linprog

    variable, column = np.nonzero(reduced.open)
    regret = reduced.regret[variable, column]
    one_hot, limit_rows, rooms, scales = rows(reduced, variable, column)
    scale = power_of_two(float(regret.max()), STAKE)
    with quiet_highs():
        result = linprog(
            regret * scale,
            A_ub=np.stack(limit_rows) if limit_rows else None,
            b_ub=np.array(rooms) if limit_rows else None,
            A_eq=one_hot,
            b_eq=np.ones(reduced.variables),
            bounds=(0, None),
            method="highs-ds",
            options={"time_limit": time_limit},
        )
    if result.x is None:
        raise ProxyqError(f"the linear relaxation could not be solved ({result.message}).")
    share = np.zeros(reduced.open.shape)
    share[variable, column] = np.clip(result.x, 0.0, 1.0)
    share /= share.sum(axis=1, keepdims=True)
    # lambda = -(d objective / d room), undone for both scalings.
    multipliers = np.zeros(len(reduced.room))
    if limit_rows:
        bound_by = scales > 0
        multipliers[bound_by] = np.maximum(-result.ineqlin.marginals, 0.0)
        multipliers *= scales / scale
    bits = share @ np.array(problem.bits, np.float64)
    return Relaxation(
        bound=max(0.0, lagrange.lagrangian(reduced, multipliers)), share=share, bits=bits
    )


def round_(problem: Problem, reduced: Reduced, relaxed: Relaxation, how: str) -> np.ndarray:
    """Columns `[variables]` rounded as the papers do; `nearest` may exceed a limit."""
    if how == "nearest":
        # Halfway goes to the lower bit-width.
        order = np.argsort(problem.bits, kind="stable")
        distance = np.abs(np.array(problem.bits)[order][None] - relaxed.bits[:, None])
        distance[distance < WHOLE] = 0.0
        distance = np.where(reduced.open[:, order], distance, np.inf)
        return order[distance.argmin(axis=1)]
    lower, upper = _neighbours(problem, reduced, relaxed.bits)
    if how == "down":
        return lower
    return _closest_below(reduced, relaxed, lower, upper)


def _neighbours(
    problem: Problem, reduced: Reduced, bits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the candidates next below and above the fractional bit-widths."""
    lower, upper = np.zeros(len(bits), np.int64), np.zeros(len(bits), np.int64)
    for g, b in enumerate(bits):
        columns = sorted(np.flatnonzero(reduced.open[g]), key=lambda k: problem.bits[k])
        below = [k for k in columns if problem.bits[k] <= b + WHOLE]
        above = [k for k in columns if problem.bits[k] >= b - WHOLE]
        lower[g] = below[-1] if below else columns[0]
        upper[g] = above[0] if above else columns[-1]
    return lower, upper


def _closest_below(
    reduced: Reduced, relaxed: Relaxation, lower: np.ndarray, upper: np.ndarray
) -> np.ndarray:
    """Of all floors and ceilings the one closest from below to the fractional usage."""
    fractional = np.flatnonzero(lower != upper)
    # A vertex of the relaxation has about one fractional layer per limit.
    if not len(reduced.room) or len(fractional) > 16:
        return lower
    aim = float((relaxed.share * reduced.usage[0]).sum())
    aim_whole = min(int(np.floor(aim * (1 + 1e-12) + 1e-6)), reduced.room[0])
    best, best_key = lower, None
    for ups in itertools.product((False, True), repeat=len(fractional)):
        picked = lower.copy()
        picked[fractional] = np.where(ups, upper[fractional], lower[fractional])
        usage = int(reduced.used(picked)[0])
        if usage > aim_whole or not reduced.fits(picked):
            continue
        key = (-usage, reduced.excess(picked), picked.tolist())
        if best_key is None or key < best_key:
            best, best_key = picked, key
    return best


def _told(problem: Problem, rounding: str, rough: Sequence[int], final: Sequence[int]) -> str:
    over = next(limit for limit in problem.limits if used(limit, rough) > limit.budget)
    have, asked = over.show_units(over.in_units(used(over, rough)), over.asked_in_units)
    changed = sum(a != b for a, b in zip(rough, final, strict=True))
    return (
        f"rounding ({rounding}) took {have} of {over.name}, above the {asked} asked; "
        f"{changed} layer{'s were' if changed > 1 else ' was'} changed to keep the budget."
    )
