"""The diagonal that makes the relaxation of a coupled problem tightest.

For every delta with P(delta) = E'(G - Diag(delta))E positive definite (E: see `relax.View`) the
relaxation is a bound, and the best delta is a semidefinite program (Billionnet, Elloumi and
Plateau 2009, Discrete Applied Mathematics 157). Here it is solved by Newton's method with
barriers: maximise over delta, while m falls,

    min_x [ f(x; delta) - m sum(log z) - m sum(log slack) ] + m log det P(delta).

The minimum is an interior point of the relaxation. By the envelope theorem its gradient is
x - x^2, whose change with delta is -D E K E' D with D = Diag(1 - 2x), K the inverse of the
interior method's Newton matrix. With M = E inv(P) E' the log det has the gradient -diag(M) and
the Hessian -M * M, elementwise.
"""

import time

import numpy as np

from proxyq.search.allocate import interior
from proxyq.search.allocate.quadratic import Quadratic
from proxyq.search.allocate.relax import Convex, View

MAX_STEPS = 40
# How far the barrier weight falls after a step that was near enough to Newton's.
FALL = 0.2
RIDGE = 1e-9
# What a start is moved inside: this share of the diagonal.
INSIDE = 0.01


def safe_delta(program: Quadratic) -> np.ndarray:
    """A constant delta `[choices]` with which the matrix is positive semidefinite."""
    values = np.linalg.eigvalsh(program.pair + program.within)
    # Eigenvalues are exact to a few units in the last place of the largest.
    doubt = 1e-15 * len(values) * float(np.abs(values).max())
    return np.full(len(values), min(float(values[0]), 0.0) - doubt)


def convexify(
    convex: Convex, open_: np.ndarray, hint: np.ndarray, cutoff: float, deadline: float
) -> Convex:
    """`convex` with the delta that is best for the plans among `open_`, or nearly."""
    program = convex.program
    view = View(convex, open_, hint)
    if not view.program.p.any():
        return convex
    used = np.union1d(view.free, view.base)
    # E restricted to the choices that are not decided, [used, free].
    e = np.zeros((len(used), len(view.free)))
    each = np.arange(len(view.free))
    e[np.searchsorted(used, view.free), each] = 1
    e[np.searchsorted(used, view.base), each] = -1
    delta = convex.delta.copy()
    # Strictly inside: a semidefinite matrix becomes a definite one.
    own = np.abs(view.program.p.diagonal())
    own = np.where(e != 0, own, 0.0).max(axis=1)
    floor = delta[used] - INSIDE * np.maximum(own, 1e-9 * own.max())
    delta[used] = (delta[used] + floor) / 2
    weight = 0.0
    for _ in range(MAX_STEPS):
        view = View(Convex(program, delta), open_, hint)
        inverse = e @ np.linalg.inv(view.program.p) @ e.T
        if not weight:
            weight = 0.05 / float(np.quantile(inverse.diagonal(), 0.1))
        step = _central(view, weight)
        value = view.constant + float((view.program.c + step.gradient) @ step.z) / 2
        if weight * (2 * len(each)) < 0.02 * abs(cutoff - value) or time.perf_counter() > deadline:
            break
        x = view.relaxed(step.z)[used]
        d = 1 - 2 * x
        moved = e @ interior.newton_inverse(view.program, step) @ e.T
        above = delta[used] - floor
        gradient = x - x * x - weight * inverse.diagonal() + weight / above
        hessian = weight * inverse * inverse + d[:, None] * moved * d + np.diag(weight / above**2)
        scale = 1 / np.sqrt(hessian.diagonal())
        # Of two choices only the sum of their deltas matters: a ridge keeps them apart.
        hessian = scale[:, None] * hessian * scale + RIDGE * np.eye(len(used))
        newton = scale * np.linalg.solve(hessian, scale * gradient)
        # The decrement of a self-concordant function tells how long a step is safe.
        decrement = float(np.sqrt(max(gradient @ newton, 0.0) / weight))
        length = 1.0 if decrement < 0.5 else 1 / (1 + decrement)
        length = min(1.0, 4 * length, 0.9 / max(float((-newton / above).max()), 1e-300))
        length = _inside(view.program.p, e, newton, length)
        delta[used] += length * newton
        if decrement * (1 - length) < 0.5:
            weight *= FALL
    return Convex(program, delta)


def _central(view: View, weight: float) -> interior.Step:
    """The relaxation with barriers of this weight, solved."""
    step = None
    for step in interior.steps(view.program, view.start, mean=weight):
        if step.violation < 1e-9 and step.mean <= 1.01 * weight:
            break
    assert step is not None
    return step


def _inside(p: np.ndarray, e: np.ndarray, change: np.ndarray, length: float) -> float:
    """`length`, halved until P stays positive definite with `length * change` off the diagonal."""
    moved = (e.T * change) @ e
    while length > 1e-12:
        try:
            np.linalg.cholesky(p - 1.01 * length * moved)
            return length
        except np.linalg.LinAlgError:
            length /= 2
    return 0.0
