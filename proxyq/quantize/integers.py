"""Rounded weights as what hardware stores: whole numbers, scales and zero points."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.quantize.grid import Grid, Rounding, fit_columns, quantize


class Integers(NamedTuple):
    """Unsigned codes and the grid that gives them values: `value = (code - zero) * scale`.

    - `codes`: whole numbers from 0 to `2^bits - 1`, uint16, any shape;
    - `scale`, `zero`: float32, broadcast against `codes`: one for each output channel or, where
      groups of weights have grids of their own, as many as codes. A symmetric grid in two's
      complement has the zero point `2^(bits - 1)`; one with the odd code on the positive side,
      one less. One bit has 0.5. Zero points are whole otherwise, unless a mean was restored.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int

    def values(self) -> np.ndarray:
        """The weights, float32. Exact in any implementation of IEEE 754: two operations."""
        return (self.codes.astype(np.float32) - self.zero) * self.scale

    def times(self, factors: np.ndarray) -> "Integers":
        """The same codes, the values of each channel times one of `factors`, `[channels]`.

        Scales of groups stay bfloat16 numbers.
        """
        scale = (factors * self.scale).astype(np.float32)
        if len(scale) > 1:
            scale = scale.astype(jnp.bfloat16).astype(np.float32)
        return self._replace(scale=scale)

    def taking(self, values: np.ndarray) -> "Integers":
        """The same codes on the grid that comes nearest to `values`, `[fan_in, channels]`.

        For values that are an affine function of the old ones in each channel, as those that a
        correction of statistics leaves: found by least squares over the fan-in, in float64.
        """
        have, wanted = self.values().astype(np.float64), np.asarray(values, np.float64)
        centre, mean = have.mean(axis=0), wanted.mean(axis=0)
        spread = ((have - centre) ** 2).sum(axis=0)
        slope = ((have - centre) * (wanted - mean)).sum(axis=0)
        # v = a w + b, w = s (c - z):  a = cov(w, v) / var(w), and v = a s (c - (z - b / (a s)))
        ratio = np.where(spread > 0, slope / np.where(spread > 0, spread, 1.0), 1.0)
        ratio = np.where(np.abs(ratio) > 0, ratio, 1.0)
        moved = self.times(ratio)
        shift = (mean - ratio * centre) / moved.scale.astype(np.float64)
        # Zero points that have not moved stay whole numbers.
        zero = np.where(np.abs(shift) < 1e-3, self.zero, self.zero - shift)
        return moved._replace(zero=zero.astype(np.float32))


def to_integers(columns: Any, bits: int, rounding: Rounding | None = None) -> Integers:
    """Weights `[fan_in, channels]` rounded to the nearest code of the grids of `fit_columns`."""
    return from_grid(columns, fit_columns(columns, bits, rounding), bits)


def from_grid(columns: Any, grid: Grid, bits: int) -> Integers:
    """The nearest codes on a grid whose fields broadcast against the columns."""
    return from_codes(_nearest(columns, grid), grid, bits)


@jax.jit
def _nearest(columns: Any, grid: Grid) -> Any:
    return quantize(columns.astype(jnp.float32), grid)


def from_codes(codes: Any, grid: Grid, bits: int) -> Integers:
    """Codes of a grid, as unsigned ones: the lowest code becomes 0."""
    lower = np.asarray(grid.lower, np.float32)
    shape = np.shape(grid.scale)
    return Integers(
        (np.asarray(codes) - lower).astype(np.uint16),
        np.asarray(grid.scale, np.float32),
        np.broadcast_to(np.asarray(grid.zero, np.float32) - lower, shape).copy(),
        bits,
    )


class Runs(NamedTuple):
    """An array that repeats itself along an axis: one value for each `size` in a row."""

    values: np.ndarray
    axis: int
    size: int

    def whole(self) -> np.ndarray:
        """The array."""
        return np.repeat(self.values, self.size, axis=self.axis)

    def once(self, array: np.ndarray) -> np.ndarray:
        """One value of each run of another array with the same runs, or fewer changes."""
        length = self.values.shape[self.axis] * self.size
        if array.shape[self.axis] == 1:
            return array
        return array.take(range(0, length, self.size), self.axis)


def groups_of(weight: Integers) -> Runs | None:
    """The scales of a weight's groups, where it has groups; zero points change where they do."""
    for axis, length in enumerate(weight.scale.shape):
        parts = [weight.scale, np.broadcast_to(weight.zero, weight.scale.shape)]
        # Where one value is followed by another, for any of the rest of the weight.
        changes = [np.flatnonzero(_changes(part, axis)) + 1 for part in parts]
        size = int(np.gcd.reduce([length, *np.concatenate(changes)]))
        if size > 1:
            found = Runs(weight.scale.take(range(0, length, size), axis), axis, size)
            # Output channels may be alike too, but their scales are any float32 numbers.
            exact = found.values == found.values.astype(jnp.bfloat16)
            return found if exact.all() else None
    return None


def _changes(array: np.ndarray, axis: int) -> np.ndarray:
    """Whether anything changes from each place along an axis to the next."""
    others = tuple(i for i in range(array.ndim) if i != axis)
    return (np.diff(array, axis=axis) != 0).any(axis=others)
