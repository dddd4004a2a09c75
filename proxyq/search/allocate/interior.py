"""Convex quadratic programs by an interior point method: small dense ones, by the thousand.

    minimise  c'z + z'Pz   subject to   A z <= b,  z >= 0

with multipliers y of the rows and x of the signs. Mehrotra's predictor and corrector (1992, SIAM
Journal on Optimization 2) from a start that need not keep the rows; each step inverts one matrix
and uses it twice.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

MAX_STEPS = 40
# Of the way to the boundary a step goes this far.
BOUNDARY = 0.99


class Program(NamedTuple):
    """The arrays of the program above: `[n, n]`, `[n]`, `[rows, n]`, `[rows]`."""

    p: np.ndarray
    c: np.ndarray
    a: np.ndarray
    b: np.ndarray


class Step(NamedTuple):
    """A point on the way: z, x, slack and y positive, `gradient` = c + 2 P z.

    How far it is: `missed` = A z + slack - b, and `mean`, the mean of all z x and slack y.
    """

    z: np.ndarray
    x: np.ndarray
    slack: np.ndarray
    y: np.ndarray
    gradient: np.ndarray
    missed: np.ndarray
    mean: float

    @property
    def violation(self) -> float:
        """The most by which A z + slack misses b."""
        return float(np.abs(self.missed).max())


def steps(program: Program, start: np.ndarray, *, mean: float = 0.0) -> Iterator[Step]:
    """Points ever nearer to the solution, from `start` > 0; to be left when one is good enough.

    With `mean` > 0 they go where every z x and slack y is `mean`: to the least of the objective
    minus mean * (sum of log z + sum of log slack).
    """
    p, c, a, b = program
    z, slack = start, np.maximum(b - a @ start, 0.1)
    scale = 0.1 * max(float(np.abs(c).max()), 1e-300)
    x, y = np.full(len(c), scale), np.full(len(b), scale)
    count = len(c) + len(b)
    for _ in range(MAX_STEPS):
        now = float(z @ x + slack @ y) / count
        step = Step(z, x, slack, y, c + 2 * (p @ z), a @ z + slack - b, now)
        yield step
        if not now > 0:
            return
        try:
            inverse = newton_inverse(program, step)
        except np.linalg.LinAlgError:
            return
        z, x, slack, y = _next(program, step, inverse, mean)


def newton_inverse(program: Program, step: Step) -> np.ndarray:
    """Inverse of 2 P + Diag(x / z) + A' Diag(y / slack) A, `[n, n]`."""
    matrix = 2 * program.p + (program.a.T * (step.y / step.slack)) @ program.a
    matrix.flat[:: len(matrix) + 1] += step.x / step.z
    return np.linalg.inv(matrix)


def _next(
    program: Program, step: Step, inverse: np.ndarray, mean: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """z, x, slack and y after one step from `step`."""
    z, x, slack, y, now = step.z, step.x, step.slack, step.y, step.mean
    # Towards products of zero, and from where that would end towards ones all alike.
    dz, dx, ds, dy = _newton(program, step, inverse, -z * x, -slack * y)
    length = _longest((z, dz), (x, dx), (slack, ds), (y, dy))
    after = (z + length * dz) @ (x + length * dx) + (slack + length * ds) @ (y + length * dy)
    aim = max(now * (float(after) / (len(z) + len(y)) / now) ** 3, mean)
    zx, sy = aim - z * x - dz * dx, aim - slack * y - ds * dy
    dz, dx, ds, dy = _newton(program, step, inverse, zx, sy)
    length = min(1.0, BOUNDARY * _longest((z, dz), (x, dx), (slack, ds), (y, dy)))
    return z + length * dz, x + length * dx, slack + length * ds, y + length * dy


def _newton(
    program: Program, step: Step, inverse: np.ndarray, zx: np.ndarray, sy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The changes of z, x, slack and y that change the products z x and slack y like this."""
    z, x, slack, y, gradient, missed, _ = step
    right = zx / z - gradient - program.a.T @ (y + (sy + y * missed) / slack) + x
    dz = inverse @ right
    ds = -missed - program.a @ dz
    return dz, (zx - x * dz) / z, ds, (sy - y * ds) / slack


def _longest(*pairs: tuple[np.ndarray, np.ndarray]) -> float:
    """The longest step, at most 1 / `BOUNDARY`, on which all values stay at least zero."""
    falling = max(float((-change / value).max()) for value, change in pairs)
    return 1 / max(falling, BOUNDARY)
