"""The integer program of a reduced problem, by HiGHS (through `scipy.optimize.milp`).

    minimise  sum_gk r_gk x_gk  s. t.  sum_k x_gk = 1,  sum_gk u_mgk x_gk <= room_m,  x in {0, 1}

HiGHS works in float64 with absolute tolerances (1e-6 for rows and for the gap). So that its
answer is the exact one:
- regrets are scaled by a power of two until what is at stake is about 2^20: a gap of 1e-6
  is then 1e-12 of it, whether costs are 1e-9 or 1e12;
- choices that alone cost more than a known answer are left out (they cannot be part of a
  better one), so that a few huge costs do not drown the rest;
- rows are scaled by powers of two, and every answer is checked in integers. A point that
  HiGHS takes for feasible and that is not is cut off by a cover inequality, which no
  feasible point violates, and the program is solved again.
"""

import math
import time
from dataclasses import dataclass

import numpy as np

from proxyq.search.allocate.quiet import quiet_highs
from proxyq.search.allocate.reduce import Reduced

STAKE = 2.0**20
ROW = 2.0**20
MAX_CUTS = 50


@dataclass(frozen=True, kw_only=True)
class Found:
    """What HiGHS found: `picked` `[variables]` or None; `bound` on the regret; `proven`."""

    picked: np.ndarray | None
    bound: float
    proven: bool
    infeasible: bool = False


def power_of_two(value: float, target: float) -> float:
    """The power of two that brings a positive `value` nearest to `target` (exact to apply)."""
    if not value > 0 or not math.isfinite(value):
        return 1.0
    # A shift too far would leave the range of float64; 2^1000 is still inside.
    return 2.0 ** max(-1000, min(1000, round(math.log2(target) - math.log2(value))))


def rows(reduced: Reduced, variable: np.ndarray, column: np.ndarray):
    """Rows over one x per chosen (variable, column) pair: `(one_hot, limit_rows, rooms, scales)`.

    `scales` `[limits]` holds what each limit's row was multiplied by, 0 for those left out
    because no choice exceeds them; `limit_rows` and `rooms` hold the others.
    """
    from scipy import sparse

    count = len(variable)
    # scipy before 1.15 hands indices of 64 bits on to a HiGHS that takes 32.
    one_hot = sparse.csr_array(
        (np.ones(count), (variable.astype(np.int32), np.arange(count, dtype=np.int32))),
        shape=(reduced.variables, count),
    )
    kept, rooms, scales = [], [], []
    for usage, room in zip(reduced.usage, reduced.room, strict=True):
        row = usage[variable, column]
        most = np.zeros(reduced.variables, np.int64)
        np.maximum.at(most, variable, row)
        if int(most.sum()) <= room:
            scales.append(0.0)
            continue
        scale = min(1.0, power_of_two(float(row.max()), ROW))
        kept.append(row.astype(np.float64) * scale)
        rooms.append(room * scale)
        scales.append(scale)
    return one_hot, kept, rooms, np.array(scales)


def integer_program(
    reduced: Reduced,
    *,
    time_limit: float,
    rel_gap: float = 0.0,
    known: np.ndarray | None = None,
    any_point: bool = False,
) -> Found:
    """Solve; `known` is a feasible answer to beat, `any_point` asks for feasibility only."""
    from scipy.optimize import LinearConstraint, milp

    deadline = time.perf_counter() + time_limit
    kept = reduced.kept
    stake = float(reduced.regret[kept].max())
    if known is not None:
        stake = reduced.excess(known)
        kept = kept & (reduced.regret <= stake * (1 + 1e-9))
    variable, column = np.nonzero(kept)
    regret = np.zeros(len(variable)) if any_point else reduced.regret[variable, column]
    scale = power_of_two(stake, STAKE)
    one_hot, limit_rows, rooms, _ = rows(reduced, variable, column)
    constraints = [LinearConstraint(one_hot, 1.0, 1.0)]
    if limit_rows:
        constraints.append(
            LinearConstraint(np.stack(limit_rows), -np.inf, np.array(rooms))  # type: ignore[arg-type]
        )
    for _ in range(MAX_CUTS):
        left = deadline - time.perf_counter()
        if left <= 0:
            break
        with quiet_highs():
            result = milp(
                regret * scale,
                integrality=np.ones(len(variable)),
                bounds=(0, 1),
                constraints=constraints,
                options={"time_limit": left, "mip_rel_gap": rel_gap},
            )
        bound = result.mip_dual_bound
        if bound is None or not math.isfinite(bound):
            bound = result.fun if result.status == 0 and rel_gap == 0 else 0.0
        bound = max(bound / scale, 0.0)
        if result.status == 2:
            return Found(picked=None, bound=0.0, proven=False, infeasible=known is None)
        if result.x is None:
            return Found(picked=None, bound=bound, proven=False)
        picked = _picked(reduced, variable, column, np.asarray(result.x))
        if reduced.fits(picked):
            return Found(picked=picked, bound=bound, proven=result.status == 0)
        constraints.append(_cover(reduced, variable, column, picked))
    return Found(picked=None, bound=0.0, proven=False)


def _picked(
    reduced: Reduced, variable: np.ndarray, column: np.ndarray, x: np.ndarray
) -> np.ndarray:
    dense = np.full(reduced.regret.shape, -1.0)
    dense[variable, column] = x
    return dense.argmax(axis=1)


def _cover(reduced: Reduced, variable: np.ndarray, column: np.ndarray, picked: np.ndarray):
    """A valid inequality that the infeasible point `picked` violates.

    With m a limit it exceeds: choices that use at least as much of m as `picked` does cannot
    be taken by all variables at once, sum_g sum_{k: u_gk >= u_g,picked} x_gk <= variables - 1.
    """
    from scipy.optimize import LinearConstraint

    over = reduced.used(picked) > np.array(reduced.room, np.int64)
    usage = reduced.usage[int(np.argmax(over))]
    at_least = usage[variable, column] >= usage[variable, picked[variable]]
    return LinearConstraint(at_least[None].astype(np.float64), -np.inf, reduced.variables - 1.0)
