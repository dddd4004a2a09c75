"""torch's rules for mixed dtypes and shapes, on JAX arrays.

torch ranks operands: arrays with axes decide the dtype, then arrays without axes, then
Python numbers; a lower rank counts only when its category (bool < integer < float <
complex) is higher. Everything is made explicit, so the results do not depend on JAX's own settings
for promotion.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any

FLOAT = np.dtype(np.float32)
INTEGER = np.dtype(np.int32)
BOOL = np.dtype(np.bool_)
COMPLEX = np.dtype(np.complex64)


def is_number(value: Any) -> bool:
    """A Python number (or bool), as opposed to an array."""
    return isinstance(value, bool | int | float | complex)


def category(dtype: Any) -> int:
    """0 for bool, 1 for integers, 2 for floats, 3 for complex numbers."""
    if dtype == BOOL:
        return 0
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return 3
    return 2 if jnp.issubdtype(dtype, jnp.floating) else 1


def is_float(x: Any) -> bool:
    """Whether an array or a number is a floating-point or a complex one."""
    return isinstance(x, float | complex) if is_number(x) else category(jnp.result_type(x)) >= 2


def result_type(*operands: Any) -> np.dtype:
    """The dtype that torch computes in for these arrays and Python numbers."""
    ranks: list[np.dtype | None] = [None, None, None]
    for operand in operands:
        if is_number(operand):
            kinds = {bool: BOOL, int: INTEGER, float: FLOAT, complex: COMPLEX}
            rank, dtype = 2, kinds[type(operand)]
        else:
            rank, dtype = (0 if operand.ndim else 1), np.dtype(operand.dtype)
        known = ranks[rank]
        ranks[rank] = dtype if known is None else _promote(known, dtype)
    return _combine(ranks[0], _combine(ranks[1], ranks[2])) or FLOAT


def _promote(a: np.dtype, b: np.dtype) -> np.dtype:
    return np.dtype(jnp.promote_types(a, b))


def _combine(higher: np.dtype | None, lower: np.dtype | None) -> np.dtype | None:
    if higher is None or lower is None:
        return higher or lower
    return _promote(higher, lower) if category(lower) > category(higher) else higher


def cast(x: Any, dtype: Any) -> Array:
    """`x`, an array or a Python number, as an array of `dtype`.

    Numbers out of range saturate (integers) or become infinite (floats), as the lowest
    64-bit values, which models use as "minus infinity", should.
    """
    if is_number(x):
        dtype = np.dtype(dtype)
        if category(dtype) == 1:
            limits = np.iinfo(dtype)
            x = min(max(int(x), limits.min), limits.max) if np.isfinite(x) else 0
        with np.errstate(over="ignore"):
            return np.asarray(x, dtype)
    return x if x.dtype == dtype else jax.lax.convert_element_type(jnp.asarray(x), dtype)


def to_float(x: Any) -> Array:
    """`x`, as float32 unless it is a floating-point or complex array already."""
    return cast(x, FLOAT if is_number(x) or not is_float(x) else x.dtype)


def same_rank(*arrays: Array) -> list[Array]:
    """The arrays with axes of size 1 put in front of the shorter shapes; scalars stay."""
    rank = max(array.ndim for array in arrays)

    def raised(array: Array) -> Array:
        if array.ndim in (0, rank):
            return array
        return array.reshape((1,) * (rank - array.ndim) + array.shape)

    return [raised(array) for array in arrays]


def elementwise(function: Callable[..., Array], *operands: Any, floating: bool = False) -> Array:
    """`function` on the operands, promoted as torch does (to a float with `floating`)."""
    dtype = result_type(*operands)
    if floating and category(dtype) < 2:
        dtype = FLOAT
    arrays = same_rank(*(cast(operand, dtype) for operand in operands))
    if not any(isinstance(array, jax.Array) for array in arrays):
        arrays[0] = jnp.asarray(arrays[0])
    return function(*arrays)
