"""The diagonal that makes the relaxation of a coupled problem tight.

For every delta with P(delta) = E'(G - Diag(delta))E positive definite (E: see `relax.View`) the
relaxation is a bound, and the best delta is a semidefinite program (Billionnet, Elloumi and
Plateau 2009, Discrete Applied Mathematics 157). Here it is solved by Newton's method with
barriers: maximise over delta, while the weight m falls,

    min_x [ f(x; delta) - m sum log z - m sum log slack ] + m log det P(delta)
        + LATER sum delta + m sum log(delta - floor).

The minimum is an interior point of the relaxation. By the envelope theorem its gradient is
x - x^2, whose change with delta is -D E K E' D with D = Diag(1 - 2x), K the inverse of the
interior method's Newton matrix. With M = E inv(P) E' the log det has the gradient -diag(M) and
the Hessian -M * M, elementwise.

What is best at the root need not be good further down, where choices are undecided that are
decided here. Two things keep it good there: LATER counts every choice as a little undecided,
and the floor keeps delta, but for a little, from falling: where no delta falls, f(x; delta) is
nowhere less than before.
"""

import contextlib
import time

import numpy as np

from proxyq.search.allocate import interior
from proxyq.search.allocate.quadratic import Quadratic
from proxyq.search.allocate.relax import Convex, View

MAX_STEPS = 40
LATER = 0.03
# The weight falls by this factor after a step that was near enough to Newton's, until the
# barriers are this share of what the bound lacks.
FALL, ENOUGH = 0.2, 0.02
# Of two choices only the sum of their deltas matters: a ridge keeps the Hessian definite.
RIDGE = 1e-9


def safe_delta(program: Quadratic) -> np.ndarray:
    """A constant delta `[choices]` with which the matrix is positive semidefinite."""
    values = np.linalg.eigvalsh(program.pair + program.within)
    # Eigenvalues are exact to a few units in the last place of the largest.
    doubt = 1e-15 * len(values) * float(np.abs(values).max())
    return np.full(len(values), min(float(values[0]), 0.0) - doubt)


def convexify(
    convex: Convex,
    open_: np.ndarray,
    hint: np.ndarray,
    cutoff: float,
    deadline: float,
    *,
    below: float,
) -> Convex:
    """`convex` with a delta that is nearly the best for the plans among `open_`.

    `below`: how far under the present delta the floor is, as a share of P's diagonal.
    """
    view = View(convex, open_, hint)
    if not view.program.p.any():
        return convex
    used = np.union1d(view.free, view.base)
    # The rows of E of the choices that are not decided.
    e = np.zeros((len(used), len(view.free)))
    each = np.arange(len(view.free))
    e[np.searchsorted(used, view.free), each] = 1
    e[np.searchsorted(used, view.base), each] = -1
    own = np.where(e != 0, np.abs(view.program.p.diagonal()), 0.0).max(axis=1)
    delta = convex.delta.copy()
    floor = delta[used] - below * np.maximum(own, 1e-9 * own.max())
    # Half way to the floor P is definite, as it is semidefinite at the present delta.
    delta[used] -= (delta[used] - floor) / 2
    weight = 0.0
    with contextlib.suppress(np.linalg.LinAlgError), np.errstate(all="ignore"):
        for _ in range(MAX_STEPS):
            view = View(Convex(convex.program, delta), open_, hint)
            m = e @ np.linalg.inv(view.program.p) @ e.T
            weight = weight or 0.05 / float(np.quantile(m.diagonal(), 0.1))
            step = _central(view, weight)
            value = view.constant + float((view.program.c + step.gradient) @ step.z) / 2
            if weight * 2 * len(each) < ENOUGH * abs(cutoff - value):
                break
            if time.perf_counter() > deadline:
                break
            x, above = view.relaxed(step.z)[used], delta[used] - floor
            d = 1 - 2 * x
            gradient = LATER + x - x * x - weight * m.diagonal() + weight / above
            hessian = weight * m * m + np.diag(weight / above**2)
            hessian += d[:, None] * (e @ interior.newton_inverse(view.program, step) @ e.T) * d
            scale = 1 / np.sqrt(hessian.diagonal())
            hessian = scale[:, None] * hessian * scale + RIDGE * np.eye(len(used))
            newton = scale * np.linalg.solve(hessian, scale * gradient)
            # The decrement of a self-concordant function tells how long a step is safe.
            decrement = float(np.sqrt(max(gradient @ newton, 0.0) / weight))
            length = 1.0 if decrement < 0.5 else min(1.0, 4 / (1 + decrement))
            length = min(length, 0.9 / max(float((-newton / above).max()), 1e-300))
            length = _inside(view.program.p, e, newton, length)
            delta[used] += length * newton
            if decrement * (1 - length) < 0.5:
                weight *= FALL
    return Convex(convex.program, delta)


def _central(view: View, weight: float) -> interior.Step:
    """The relaxation with barriers of this weight, solved."""
    step = None
    for step in interior.steps(view.program, view.start, mean=weight):
        if step.violation < 1e-9 and step.mean <= 1.01 * weight:
            break
    assert step is not None
    return step


def _inside(p: np.ndarray, e: np.ndarray, change: np.ndarray, length: float) -> float:
    """`length`, halved until P is positive definite with `length * change` off the diagonal."""
    moved = (e.T * change) @ e
    while length > 1e-12:
        try:
            np.linalg.cholesky(p - 1.01 * length * moved)
            return length
        except np.linalg.LinAlgError:
            length /= 2
    return 0.0
