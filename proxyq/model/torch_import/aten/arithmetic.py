"""Arithmetic, comparisons, masks and reductions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.model.torch_import.aten.promotion import (
    INTEGER,
    Array,
    cast,
    category,
    elementwise,
    is_float,
    is_number,
    result_type,
    same_rank,
    to_float,
)
from proxyq.model.torch_import.aten.table import register_aten

Operand = Any  # an array or a Python number
Axes = int | list[int] | tuple[int, ...] | None

# Floating-point functions of one array: integers become float32 first.
_FLOATING: dict[str, Callable[[Array], Array]] = {
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "log": jnp.log,
    "log2": jnp.log2,
    "log10": jnp.log10,
    "log1p": jnp.log1p,
    "sqrt": jnp.sqrt,
    "rsqrt": jax.lax.rsqrt,
    "reciprocal": jnp.reciprocal,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tan": jnp.tan,
    "asin": jnp.arcsin,
    "acos": jnp.arccos,
    "atan": jnp.arctan,
    "sinh": jnp.sinh,
    "cosh": jnp.cosh,
    "asinh": jnp.arcsinh,
    "acosh": jnp.arccosh,
    "atanh": jnp.arctanh,
    "erf": jax.lax.erf,
    "erfc": jax.lax.erfc,
    "special_erf": jax.lax.erf,
    "special_expm1": jnp.expm1,
    "special_exp2": jnp.exp2,
    "special_log1p": jnp.log1p,
    "special_expit": jax.nn.sigmoid,
    "lgamma": jax.lax.lgamma,
    "sinc": jnp.sinc,
    "deg2rad": jnp.deg2rad,
    "rad2deg": jnp.rad2deg,
}
# Functions of one array that keep its dtype (booleans for the tests).
_KEEPING: dict[str, Callable[[Array], Array]] = {
    "abs": jnp.abs,
    "neg": jnp.negative,
    "positive": jnp.positive,
    "sign": jnp.sign,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": jnp.round,
    "trunc": jnp.trunc,
    "square": jnp.square,
    "isnan": jnp.isnan,
    "isinf": jnp.isinf,
    "isfinite": jnp.isfinite,
    "logical_not": jnp.logical_not,
    "bitwise_not": jnp.bitwise_not,
}
# Other names of the same functions.
_ALIASES = {
    "absolute": "abs",
    "negative": "neg",
    "fix": "trunc",
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "arcsinh": "asinh",
    "arccosh": "acosh",
    "arctanh": "atanh",
}
# Functions of two operands, promoted and broadcast.
_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "mul": jnp.multiply,
    "multiply": jnp.multiply,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "max.other": jnp.maximum,
    "min.other": jnp.minimum,
    "fmax": jnp.fmax,
    "fmin": jnp.fmin,
    "remainder": jnp.remainder,
    "fmod": jnp.fmod,
    "floor_divide": jnp.floor_divide,
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "ge": jnp.greater_equal,
    "gt": jnp.greater,
    "le": jnp.less_equal,
    "lt": jnp.less,
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
    "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
    "bitwise_xor": jnp.bitwise_xor,
    "__and__": jnp.bitwise_and,
    "__or__": jnp.bitwise_or,
    "__xor__": jnp.bitwise_xor,
}

# Functions of two operands that are floats, or become float32.
_FLOATING_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "atan2": jnp.arctan2,
    "arctan2": jnp.arctan2,
    "hypot": jnp.hypot,
    "copysign": jnp.copysign,
    "logaddexp": jnp.logaddexp,
    "logaddexp2": jnp.logaddexp2,
    "xlogy": jax.scipy.special.xlogy,
    "special_xlogy": jax.scipy.special.xlogy,
}

for _name, _function in _FLOATING_BINARY.items():
    register_aten(_name)(
        lambda a, b, _function=_function: elementwise(_function, a, b, floating=True)
    )
_FLOATING |= {name: _FLOATING[same] for name, same in _ALIASES.items() if same in _FLOATING}
_KEEPING |= {name: _KEEPING[same] for name, same in _ALIASES.items() if same in _KEEPING}
for _name, _function in _FLOATING.items():
    register_aten(_name)(lambda x, _function=_function: _function(to_float(x)))
for _name, _function in _KEEPING.items():
    register_aten(_name)(lambda x, _function=_function: _function(x))
for _name, _function in _BINARY.items():
    register_aten(_name)(lambda a, b, _function=_function: elementwise(_function, a, b))


@register_aten("add")
def add(a: Operand, b: Operand, *, alpha: float = 1) -> Array:
    """a + alpha · b."""
    return elementwise(jnp.add, a, b if alpha == 1 else mul(b, alpha))


@register_aten("sub")
def sub(a: Operand, b: Operand, *, alpha: float = 1) -> Array:
    """a - alpha · b."""
    return elementwise(jnp.subtract, a, b if alpha == 1 else mul(b, alpha))


@register_aten("rsub")
def rsub(a: Operand, b: Operand, alpha: float = 1) -> Array:
    """b - alpha · a."""
    return sub(b, a, alpha=alpha)


def mul(a: Operand, b: Operand) -> Any:
    """a · b, of two numbers too."""
    return a * b if is_number(a) and is_number(b) else elementwise(jnp.multiply, a, b)


@register_aten("div", "true_divide")
def div(a: Operand, b: Operand, *, rounding_mode: str | None = None) -> Array:
    """a / b, in floats; with a rounding mode, in the operands' own dtype."""
    if rounding_mode is None:
        return elementwise(jnp.divide, a, b, floating=True)
    if rounding_mode == "floor":
        return elementwise(jnp.floor_divide, a, b)
    if category(result_type(a, b)) == 2:
        return jnp.trunc(elementwise(jnp.divide, a, b))
    return elementwise(jax.lax.div, *_broadcast(a, b))


def _broadcast(a: Operand, b: Operand) -> tuple[Array, Array]:
    dtype = result_type(a, b)
    first, second = jnp.asarray(cast(a, dtype)), jnp.asarray(cast(b, dtype))
    shape = jnp.broadcast_shapes(first.shape, second.shape)
    return jnp.broadcast_to(first, shape), jnp.broadcast_to(second, shape)


@register_aten("pow")
def power(a: Operand, b: Operand) -> Array:
    """a to the power b; small whole exponents by multiplication."""
    if is_number(b) and not isinstance(b, complex) and not is_number(a):
        if float(b) == int(b) and 0 <= b <= 16 and (is_float(a) or isinstance(b, int)):
            return jax.lax.integer_pow(cast(a, result_type(a, b)), int(b))
        if b == 0.5:
            return jnp.sqrt(to_float(a))
    return elementwise(jnp.power, a, b)


@register_aten("frac")
def frac(x: Array) -> Array:
    """What follows the point, with the sign of x."""
    return x - jnp.trunc(x)


@register_aten("clamp", "clip")
def clamp(x: Array, low: Operand | None = None, high: Operand | None = None) -> Array:
    """x limited from below and above; where the limits cross, the upper one wins."""
    if low is not None:
        x = elementwise(jnp.maximum, x, low)
    return x if high is None else elementwise(jnp.minimum, x, high)


@register_aten("clamp_min")
def clamp_min(x: Array, low: Operand) -> Array:
    """x limited from below."""
    return clamp(x, low)


@register_aten("clamp_max")
def clamp_max(x: Array, high: Operand) -> Array:
    """x limited from above."""
    return clamp(x, None, high)


@register_aten("addcmul")
def addcmul(x: Array, a: Array, b: Array, *, value: float = 1) -> Array:
    """x + value · a · b."""
    return add(x, mul(a, b), alpha=value)


@register_aten("addcdiv")
def addcdiv(x: Array, a: Array, b: Array, *, value: float = 1) -> Array:
    """x + value · a / b."""
    return add(x, div(a, b), alpha=value)


@register_aten("lerp")
def lerp(a: Array, b: Array, weight: Operand) -> Array:
    """a + weight · (b - a)."""
    return add(a, mul(sub(b, a), weight))


@register_aten("where")
def where(condition: Array, a: Operand, b: Operand) -> Array:
    """a where the condition holds, else b."""
    dtype = result_type(a, b)
    mask, first, second = same_rank(condition, cast(a, dtype), cast(b, dtype))
    return jnp.where(mask, first, second)


@register_aten("masked_fill")
def masked_fill(x: Array, mask: Array, value: Operand) -> Array:
    """The value, in x's dtype, where the mask holds, else x."""
    condition, filled, kept = same_rank(mask, cast(value, x.dtype), x)
    return jnp.where(condition, filled, kept)


@register_aten("nan_to_num")
def nan_to_num(
    x: Array, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Array:
    """x with NaN and infinities replaced, by 0 and the extreme numbers unless given."""
    return jnp.nan_to_num(x, nan=nan or 0.0, posinf=posinf, neginf=neginf)


def axes_of(dim: Axes) -> int | tuple[int, ...] | None:
    """torch's `dim` (an empty list means all axes) as an `axis` argument."""
    if dim is None or isinstance(dim, int):
        return dim
    return tuple(dim) or None


@register_aten("mean")
def mean(
    x: Array, dim: Axes = None, keepdim: bool = False, *, dtype: np.dtype | None = None
) -> Array:
    """Arithmetic mean over `dim`."""
    return jnp.mean(x if dtype is None else cast(x, dtype), axis=axes_of(dim), keepdims=keepdim)


def _summable(x: Array, dtype: np.dtype | None) -> Array:
    """Sums of integers and booleans are taken in int32."""
    if dtype is None:
        dtype = x.dtype if is_float(x) else INTEGER
    return cast(x, dtype)


@register_aten("sum")
def total(
    x: Array, dim: Axes = None, keepdim: bool = False, *, dtype: np.dtype | None = None
) -> Array:
    """Sum over `dim`."""
    return jnp.sum(_summable(x, dtype), axis=axes_of(dim), keepdims=keepdim)


@register_aten("prod")
def product(
    x: Array, dim: Axes = None, keepdim: bool = False, *, dtype: np.dtype | None = None
) -> Array:
    """Product over `dim`."""
    return jnp.prod(_summable(x, dtype), axis=axes_of(dim), keepdims=keepdim)


@register_aten("cumsum")
def cumsum(x: Array, dim: int, *, dtype: np.dtype | None = None) -> Array:
    """Running sum along `dim`."""
    return jnp.cumsum(_summable(x, dtype), axis=dim)


def _running(x: Array, dim: int, function: Callable[..., Array]) -> tuple[Array, Array]:
    """The running extreme along `dim` and the last place where it was met."""
    axis = dim % x.ndim
    extreme = function(x, axis=axis)
    places = jax.lax.broadcasted_iota(INTEGER, x.shape, axis)
    return extreme, jax.lax.cummax(jnp.where(x == extreme, places, 0), axis=axis)


register_aten("cummax")(lambda x, dim: _running(x, dim, jax.lax.cummax))
register_aten("cummin")(lambda x, dim: _running(x, dim, jax.lax.cummin))


@register_aten("diff")
def diff(
    x: Array,
    n: int = 1,
    dim: int = -1,
    prepend: Array | None = None,
    append: Array | None = None,
) -> Array:
    """Differences of neighbours along `dim`, n times over."""
    return jnp.diff(x, n, dim, prepend, append)


@register_aten("cumprod")
def cumprod(x: Array, dim: int, *, dtype: np.dtype | None = None) -> Array:
    """Running product along `dim`."""
    return jnp.cumprod(_summable(x, dtype), axis=dim)


def _variance(x: Array, dim: Axes, correction: float, keepdim: bool) -> tuple[Array, Array]:
    axes = axes_of(dim)
    centre = jnp.mean(x, axis=axes, keepdims=True)
    centred = x - centre
    count = x.size // max(centre.size, 1)
    # Fewer values than the correction leave no degree of freedom: NaN, as in torch.
    divisor = np.asarray(max(count - correction, 0), x.dtype)
    squares = jnp.sum(centred * centred, axis=axes, keepdims=keepdim) / divisor
    return squares, centre if keepdim else jnp.mean(x, axis=axes)


def _correction(unbiased: Any, correction: float | None) -> float:
    """1 by default, as the sample variance has it."""
    if isinstance(unbiased, bool):
        return float(unbiased)
    return 1.0 if correction is None else float(correction)


@register_aten("var")
def var(
    x: Array, *args: Any, correction: float | None = None, keepdim: bool = False, **old: Any
) -> Array:
    """Variance over `dim` with `correction` degrees of freedom taken off."""
    return var_mean(x, *args, correction=correction, keepdim=keepdim, **old)[0]


@register_aten("std")
def std(
    x: Array, *args: Any, correction: float | None = None, keepdim: bool = False, **old: Any
) -> Array:
    """Root of `var`."""
    return jnp.sqrt(var(x, *args, correction=correction, keepdim=keepdim, **old))


@register_aten("var_mean")
def var_mean(
    x: Array, *args: Any, correction: float | None = None, keepdim: bool = False, **old: Any
) -> tuple[Array, Array]:
    """Variance and mean. The schemas are (dim, *, correction, keepdim), the older
    (dim, unbiased, keepdim), and (unbiased) alone."""
    if len(args) == 1 and isinstance(args[0], bool):
        return _variance(x, None, float(args[0]), False)
    dim = args[0] if args else old.get("dim")
    unbiased = args[1] if len(args) > 1 else old.get("unbiased")
    keepdim = args[2] if len(args) > 2 else keepdim
    return _variance(x, dim, _correction(unbiased, correction), keepdim)


@register_aten("std_mean")
def std_mean(
    x: Array, *args: Any, correction: float | None = None, keepdim: bool = False, **old: Any
) -> tuple[Array, Array]:
    """Standard deviation and mean."""
    variance, centre = var_mean(x, *args, correction=correction, keepdim=keepdim, **old)
    return jnp.sqrt(variance), centre


@register_aten("amax")
def amax(x: Array, dim: Axes = None, keepdim: bool = False) -> Array:
    """Largest value over `dim`."""
    return jnp.max(x, axis=axes_of(dim), keepdims=keepdim)


@register_aten("amin")
def amin(x: Array, dim: Axes = None, keepdim: bool = False) -> Array:
    """Smallest value over `dim`."""
    return jnp.min(x, axis=axes_of(dim), keepdims=keepdim)


register_aten("max")(lambda x: jnp.max(x))
register_aten("min")(lambda x: jnp.min(x))


@register_aten("max.dim")
def max_and_place(x: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    """Largest value along `dim` and its place."""
    return jnp.max(x, axis=dim, keepdims=keepdim), argmax(x, dim, keepdim)


@register_aten("min.dim")
def min_and_place(x: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    """Smallest value along `dim` and its place."""
    return jnp.min(x, axis=dim, keepdims=keepdim), argmin(x, dim, keepdim)


@register_aten("argmax")
def argmax(x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    """Place of the largest value."""
    return jnp.argmax(x, axis=dim, keepdims=keepdim).astype(INTEGER)


@register_aten("argmin")
def argmin(x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    """Place of the smallest value."""
    return jnp.argmin(x, axis=dim, keepdims=keepdim).astype(INTEGER)


@register_aten("topk")
def topk(
    x: Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Array, Array]:
    """The k largest (or smallest) along `dim` in order, and their places."""
    moved = jnp.moveaxis(x, dim, -1)
    values, places = jax.lax.top_k(moved if largest else -moved, k)
    return (
        jnp.moveaxis(values if largest else -values, -1, dim),
        jnp.moveaxis(places.astype(INTEGER), -1, dim),
    )


@register_aten("sort")
def sort(x: Array, dim: int = -1, descending: bool = False) -> tuple[Array, Array]:
    """Values in order along `dim`, and their places; equal values keep their order."""
    places = jnp.argsort(x, axis=dim, descending=descending, stable=True)
    return jnp.take_along_axis(x, places, axis=dim), places.astype(INTEGER)


@register_aten("argsort")
def argsort(x: Array, dim: int = -1, descending: bool = False) -> Array:
    """The places of `sort`."""
    return sort(x, dim, descending)[1]


@register_aten("aminmax")
def aminmax(x: Array, *, dim: int | None = None, keepdim: bool = False) -> tuple[Array, Array]:
    """Smallest and largest value."""
    return jnp.min(x, axis=dim, keepdims=keepdim), jnp.max(x, axis=dim, keepdims=keepdim)


@register_aten("count_nonzero")
def count_nonzero(x: Array, dim: Axes = None) -> Array:
    """How many values are not zero."""
    return jnp.count_nonzero(x, axis=axes_of(dim)).astype(INTEGER)


@register_aten("histc")
def histc(x: Array, bins: int = 100, low: float = 0, high: float = 0) -> Array:
    """How many values fall into each of `bins` equal parts of [low, high]; equal limits mean
    the extremes of x."""
    start, end = (jnp.min(x), jnp.max(x)) if low == high else (low, high)
    inside = (x >= start) & (x <= end)
    place = jnp.floor((x - start) / (end - start) * cast(float(bins), x.dtype)).astype(INTEGER)
    place = jnp.clip(place, 0, bins - 1)  # the highest value belongs to the last part
    return jnp.zeros(bins, x.dtype).at[place].add(cast(inside, x.dtype))


@register_aten("logsumexp", "special_logsumexp")
def logsumexp(x: Array, dim: Axes, keepdim: bool = False) -> Array:
    """log Σ exp(x) over `dim`."""
    return jax.nn.logsumexp(to_float(x), axis=axes_of(dim), keepdims=keepdim)


@register_aten("any")
def any_of(x: Array, dim: Axes = None, keepdim: bool = False) -> Array:
    """Whether any value over `dim` is not zero."""
    return jnp.any(x, axis=axes_of(dim), keepdims=keepdim)


@register_aten("all")
def all_of(x: Array, dim: Axes = None, keepdim: bool = False) -> Array:
    """Whether all values over `dim` are not zero."""
    return jnp.all(x, axis=axes_of(dim), keepdims=keepdim)


@register_aten("cosine_similarity")
def cosine_similarity(a: Array, b: Array, dim: int = 1, eps: float = 1e-8) -> Array:
    """a · b / (|a| |b|) along `dim`, each length at least eps."""

    def unit(x: Array) -> Array:
        length = jnp.sqrt(jnp.sum(x * x, axis=dim, keepdims=True))
        return x / jnp.maximum(length, cast(eps, x.dtype))

    return jnp.sum(unit(a) * unit(b), axis=dim)
