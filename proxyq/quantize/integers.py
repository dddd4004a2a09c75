"""Rounded weights as what hardware stores: whole numbers, scales and zero points."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.quantize.grid import Grid, Rounding, fit_grid, quantize


class Integers(NamedTuple):
    """Unsigned codes and the grid that gives them values: `value = (code - zero) * scale`.

    - `codes`: whole numbers from 0 to `2^bits - 1`, uint16, any shape;
    - `scale`, `zero`: float32, broadcast against `codes`. A symmetric grid in two's complement
      has the zero point `2^(bits - 1)`; one with the odd code on the positive side, one less.
      One bit has 0.5. Zero points are whole otherwise, unless a mean was restored.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int

    def values(self) -> np.ndarray:
        """The weights, float32. Exact in any implementation of IEEE 754: two operations."""
        return (self.codes.astype(np.float32) - self.zero) * self.scale

    def taking(self, values: np.ndarray) -> "Integers":
        """The same codes on the grid that comes nearest to `values`, `[fan_in, channels]`.

        For values that are an affine function of the old ones in each channel, as those that a
        correction of statistics leaves: found by least squares over the fan-in, in float64.
        """
        codes, wanted = self.codes.astype(np.float64), np.asarray(values, np.float64)
        centre, mean = codes.mean(axis=0), wanted.mean(axis=0)
        spread = ((codes - centre) ** 2).sum(axis=0)
        slope = ((codes - centre) * (wanted - mean)).sum(axis=0)
        # v = s (c - z):  s = cov(c, v) / var(c),  z = mean c - mean v / s
        scale = np.where(spread > 0, slope / np.where(spread > 0, spread, 1.0), self.scale[0])
        scale = np.where(np.abs(scale) > 0, scale, self.scale[0]).astype(np.float32)
        zero = centre - mean / scale.astype(np.float64)
        # Zero points that have not moved stay whole numbers.
        zero = np.where(np.abs(zero - self.zero[0]) < 1e-3, self.zero[0], zero)
        return self._replace(scale=scale[None], zero=zero.astype(np.float32)[None])


def to_integers(columns: Any, bits: int, rounding: Rounding | None = None) -> Integers:
    """Weights `[fan_in, channels]` rounded to the nearest code, one grid an output channel."""
    return from_grid(columns, fit_columns(columns, bits, rounding), bits)


@partial(jax.jit, static_argnames="rounding")
def fit_columns(columns: Any, bits: Any, rounding: Rounding | None = None) -> Grid:
    """The grid of each output channel of `[fan_in, channels]`; fields are `[1, channels]`."""
    how = rounding or Rounding()
    columns = columns.astype(jnp.float32)
    grid = fit_grid(columns, bits, axes=(0,), method=how.method, extra_code=how.extra_code)
    return Grid(*(jnp.broadcast_to(field, grid.scale.shape) for field in grid))


def from_grid(columns: Any, grid: Grid, bits: int) -> Integers:
    """The nearest codes on a grid with fields `[1, channels]`."""
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
