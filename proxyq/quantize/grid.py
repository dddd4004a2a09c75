"""Uniform quantization grids: four pure array functions, the bit-width a traced number.

A grid with `b` bits has `2^b` codes. Symmetric grids use `-2^(b-1) … 2^(b-1)-1` around zero
(for one bit the two values lie at plus and minus half a step, since a grid with zero and
one sign would be useless); asymmetric grids use `0 … 2^b-1` with an integer zero point.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from proxyq.errors import UsageError
from proxyq.widths import GroupedBits, check_bits, check_group_size

Range = Literal["absmax", "percentile", "mse"]
ExtraCode = Literal["negative", "either"]
SCALE_BITS = 16
"""What the scale of a group takes: a bfloat16 number."""


class Grid(NamedTuple):
    """A uniform grid: value = (code - zero) * scale for codes from `lower` to `upper`.

    Every field broadcasts against the array that is quantized.
    """

    scale: Any
    zero: Any
    lower: Any
    upper: Any


def quantize(x: Any, grid: Grid) -> Any:
    """The nearest code for each element, as floating-point whole numbers.

    Codes are `round(x / scale + zero)`; for the half-step zero of one bit, the sign.
    """
    # round(x / s + z), clipped to the grid; ties go to the even code, as IEEE rounds.
    return jnp.clip(jnp.round(x / grid.scale + grid.zero), grid.lower, grid.upper)


def dequantize(codes: Any, grid: Grid) -> Any:
    """The value of each code: `(code - zero) * scale`."""
    return (codes - grid.zero) * grid.scale


@jax.custom_vjp
def fake_quantize(x: Any, grid: Grid) -> Any:
    """`dequantize(quantize(x, grid), grid)`, with the straight-through gradient.

    The derivative with respect to `x` is 1 inside the grid's range and 0 outside (Bengio et
    al. 2013, arXiv:1308.3432); the grid itself is a constant here.
    """
    return dequantize(quantize(x, grid), grid)


def _forward(x: Any, grid: Grid) -> tuple[Any, Any]:
    exact = x / grid.scale + grid.zero
    # Half a step beyond the last code still rounds onto it.
    inside = (exact >= grid.lower - 0.5) & (exact <= grid.upper + 0.5)
    return fake_quantize(x, grid), (inside, grid, jnp.zeros((), x.dtype))


def _backward(saved: Any, cotangent: Any) -> tuple[Any, Grid]:
    inside, grid, like = saved
    # Of bfloat16 the values on a float32 grid are float32; the derivative is of what was given.
    return (cotangent * inside).astype(like.dtype), jax.tree.map(jnp.zeros_like, grid)


fake_quantize.defvjp(_forward, _backward)


def fit_grid(
    x: Any,
    bits: Any,
    *,
    symmetric: bool = True,
    axes: tuple[int, ...] | None = None,
    method: Range = "absmax",
    percentile: float = 99.9,
    extra_code: ExtraCode = "negative",
) -> Grid:
    """The grid for `x`.

    **Arguments:**

    - `x`: array of any shape.
    - `bits`: bit-width, 1 to 8 or 16; may be a traced number.
    - `symmetric`: grid centred on zero, or with a zero point.
    - `axes`: the axes reduced over; all others keep a grid of their own. `None` is one grid
      for the tensor.
    - `method`: `absmax` covers every value, `percentile` the given share of them (of
      magnitudes if symmetric, else of each side), `mse` takes the range with the least
      squared error among some hundred fractions of the full one.
    - `extra_code`: a symmetric grid has one code more on one side of zero. Two's complement
      puts it on the `negative` side; `either` takes the side with the smaller squared error
      for each grid, which an unsigned code with a zero point of its own stores as well.

    **Returns** a `Grid` whose fields broadcast against `x`.
    """
    if isinstance(bits, int):
        check_bits(bits)
    axes = tuple(range(x.ndim)) if axes is None else axes
    if extra_code not in ("negative", "either"):
        raise UsageError(f"`extra_code` must be 'negative' or 'either', got {extra_code!r}.")
    if extra_code == "either" and symmetric:
        plain, other = (
            fit_grid(y, bits, axes=axes, method=method, percentile=percentile) for y in (x, -x)
        )
        # Q(x) on the mirrored grid is -Q(-x) on the plain one.
        mirrored = Grid(other.scale, -other.zero, -other.upper, -other.lower)
        better = _squared_error(x, mirrored, axes) < _squared_error(x, plain, axes)
        return Grid(*(jnp.where(better, m, p) for m, p in zip(mirrored, plain, strict=True)))
    low, high = _extent(x, axes, symmetric, method, percentile)
    if method != "mse":
        return _grid(low, high, bits, symmetric)

    def error(fraction: Any) -> Any:
        return _squared_error(x, _grid(low * fraction, high * fraction, bits, symmetric), axes)

    # Coarse fractions of the full range, then finer ones around the best of each channel. The
    # error of few values is a jagged curve, which wants a closer look.
    values = math.prod(x.shape[axis] for axis in axes)
    steps = 48 if values >= 128 else 192
    width = (1.0 - 0.06) / (steps - 1)
    coarse = jnp.linspace(1.0, 0.06, steps, dtype=x.dtype)
    best = coarse[jnp.argmin(lax.map(error, coarse), axis=0)]
    nearby = jnp.linspace(-0.75, 0.75, 8, dtype=x.dtype).reshape(-1, *[1] * x.ndim)
    fine = best[None] + width * nearby
    index = jnp.argmin(lax.map(error, fine), axis=0)
    best = jnp.take_along_axis(fine, index[None], axis=0)[0]
    return _grid(low * best, high * best, bits, symmetric)


def _squared_error(x: Any, grid: Grid, axes: tuple[int, ...]) -> Any:
    wrong = dequantize(quantize(x, grid), grid) - x
    return jnp.sum(wrong * wrong, axis=axes, keepdims=True)


def _extent(x: Any, axes: Any, symmetric: bool, method: Range, percentile: float) -> Any:
    if method not in ("absmax", "percentile", "mse"):
        raise UsageError(
            f"`method` of `fit_grid` must be 'absmax', 'percentile' or 'mse', got {method!r}."
        )
    if method == "percentile":
        if symmetric:
            high = jnp.percentile(jnp.abs(x), percentile, axis=axes, keepdims=True)
            return -high, high
        low = jnp.percentile(x, 100 - percentile, axis=axes, keepdims=True)
        high = jnp.percentile(x, percentile, axis=axes, keepdims=True)
    elif symmetric:
        high = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
        return -high, high
    else:
        low = jnp.min(x, axis=axes, keepdims=True)
        high = jnp.max(x, axis=axes, keepdims=True)
    # Zero must be a code: padding and ReLU produce it exactly.
    return jnp.minimum(low, 0), jnp.maximum(high, 0)


def _grid(low: Any, high: Any, bits: Any, symmetric: bool) -> Grid:
    dtype = high.dtype
    levels = jnp.exp2(jnp.asarray(bits, dtype))
    tiny = jnp.finfo(dtype).tiny
    if symmetric:
        # The largest magnitude falls on the largest code, 2^(b-1) - 1 (half a step for 1 bit).
        one_bit = levels == 2
        top = jnp.where(one_bit, 0.5, levels / 2 - 1)
        scale = jnp.maximum(high / top, tiny)
        zero = jnp.where(one_bit, -0.5, 0.0).astype(dtype) * jnp.ones_like(scale)
        return Grid(scale, zero, -levels / 2, levels / 2 - 1)
    scale = jnp.maximum((high - low) / (levels - 1), tiny)
    zero = jnp.round(-low / scale)
    return Grid(scale, zero, jnp.zeros_like(levels), levels - 1)


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How weights are rounded: symmetric grids, one an output channel or several.

    - `method` finds the range, `extra_code` places the odd code; see `fit_grid`.
    - `group_size`: so many weights of an output channel, side by side along the axis that is
      summed over, share a grid; `None` is one for all of them. It holds for layers that multiply
      by a matrix with a whole number of groups to a channel; all others have one grid a channel.
      Each group's scale is a bfloat16 number, and budgets on size count it.
    """

    method: Range = "mse"
    extra_code: ExtraCode = "negative"
    group_size: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("method", get_args(Range)), ("extra_code", get_args(ExtraCode))):
            value = getattr(self, name)
            if value not in allowed:
                known = ", ".join(allowed)
                raise UsageError(f"`{name}` of the rounding must be one of {known}, got {value!r}.")
        if self.group_size is not None:
            check_group_size(self.group_size)

    def groups(self, fan_in: int) -> int:
        """How many grids a channel of so many weights has."""
        if self.group_size is None or fan_in % self.group_size:
            return 1
        return fan_in // self.group_size


def resolved(bits: Any, rounding: Rounding | None = None) -> tuple[Any, Rounding]:
    """A bit-width as a plain number, and the rounding, with the groups that it brings."""
    rounding = rounding or Rounding()
    if isinstance(bits, GroupedBits):
        return int(bits), replace(rounding, group_size=bits.group_size)
    return bits, rounding


@partial(jax.jit, static_argnames="rounding")
def quantize_columns(columns: Any, bits: Any, rounding: Rounding | None = None) -> Any:
    """Fake-quantized weights, a grid for each output channel or group.

    `columns` is `[fan_in, channels]`, as `Site.columns` gives it; `bits` may be traced.
    """
    # Grids of 8 bits are too fine for bfloat16.
    return fake_quantize(columns.astype(jnp.float32), fit_columns(columns, bits, rounding))


@partial(jax.jit, static_argnames="rounding")
def fit_columns(columns: Any, bits: Any, rounding: Rounding | None = None) -> Grid:
    """The grids of weights `[fan_in, channels]`, one for each output channel or group.

    Scales and zero points are `[1, channels]`, or `[fan_in, channels]` where there are groups.
    """
    how = rounding or Rounding()
    columns = columns.astype(jnp.float32)
    groups = how.groups(len(columns))
    apart = columns.reshape(groups, -1, columns.shape[1])
    grid = fit_grid(apart, bits, axes=(1,), method=how.method, extra_code=how.extra_code)
    if groups > 1:
        grid = grid._replace(scale=wider_bfloat16(grid.scale))
    each = columns.shape[0] // groups if groups > 1 else 1
    shape = (groups, each, columns.shape[1])
    fields = (jnp.broadcast_to(jnp.asarray(f, jnp.float32), shape) for f in grid)
    return Grid(*(field.reshape(-1, columns.shape[1]) for field in fields))


def wider_bfloat16(scale: Any) -> Any:
    """The least bfloat16 number that is no smaller, as float32: no code falls off the grid."""
    raw = lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    # bfloat16 is the upper half of float32: what the lower half holds becomes a unit above.
    raw = (raw + 0xFFFF) & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(raw, jnp.float32)
