"""Arrays made from nothing but sizes and values.

Contents that torch leaves undefined (`empty`) are zeros here.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from proxyq.model.torch_import.aten.promotion import FLOAT, INTEGER, Array, cast
from proxyq.model.torch_import.aten.table import register_aten


def _full(size: list[int], value: Any, dtype: np.dtype) -> Array:
    return jnp.full(tuple(size), cast(value, dtype), dtype)


def _dtype_of(value: Any) -> np.dtype:
    """The dtype of an array made from a Python number."""
    if isinstance(value, bool):
        return np.dtype(np.bool_)
    return INTEGER if isinstance(value, int) else FLOAT


@register_aten("zeros", "empty", "empty_strided")
def zeros(size: list[int], *_: Any, dtype: np.dtype | None = None) -> Array:
    """All 0."""
    return _full(size, 0, dtype or FLOAT)


@register_aten("ones")
def ones(size: list[int], *, dtype: np.dtype | None = None) -> Array:
    """All 1."""
    return _full(size, 1, dtype or FLOAT)


@register_aten("full")
def full(size: list[int], value: Any, *, dtype: np.dtype | None = None) -> Array:
    """All the same value."""
    return _full(size, value, dtype or _dtype_of(value))


@register_aten("scalar_tensor")
def scalar_tensor(value: Any, *, dtype: np.dtype | None = None) -> Array:
    """One value without axes; float32 unless said otherwise, as in torch."""
    return _full([], value, dtype or FLOAT)


@register_aten("zeros_like", "empty_like", "zero")
def zeros_like(x: Array, *, dtype: np.dtype | None = None) -> Array:
    """All 0, in the shape of x."""
    return _full(list(x.shape), 0, dtype or x.dtype)


@register_aten("ones_like")
def ones_like(x: Array, *, dtype: np.dtype | None = None) -> Array:
    """All 1, in the shape of x."""
    return _full(list(x.shape), 1, dtype or x.dtype)


@register_aten("full_like")
def full_like(x: Array, value: Any, *, dtype: np.dtype | None = None) -> Array:
    """All the same value, in the shape of x."""
    return _full(list(x.shape), value, dtype or x.dtype)


@register_aten("fill")
def fill(x: Array, value: Any) -> Array:
    """`full_like` with a number or an array without axes."""
    return jnp.broadcast_to(cast(value, x.dtype), x.shape)


@register_aten("new_zeros", "new_empty", "new_empty_strided")
def new_zeros(x: Array, size: list[int], *_: Any, dtype: np.dtype | None = None) -> Array:
    """All 0, of x's dtype."""
    return _full(size, 0, dtype or x.dtype)


@register_aten("new_ones")
def new_ones(x: Array, size: list[int], *, dtype: np.dtype | None = None) -> Array:
    """All 1, of x's dtype."""
    return _full(size, 1, dtype or x.dtype)


@register_aten("new_full")
def new_full(x: Array, size: list[int], value: Any, *, dtype: np.dtype | None = None) -> Array:
    """All the same value, of x's dtype."""
    return _full(size, value, dtype or x.dtype)


@register_aten("arange.start_step")
def arange(
    start: float, end: float, step: float = 1, *, dtype: np.dtype | None = None
) -> np.ndarray:
    """start, start + step, ... below end; a constant."""
    if dtype is None:
        dtype = INTEGER if all(isinstance(x, int) for x in (start, end, step)) else FLOAT
    count = max(math.ceil((end - start) / step), 0)
    return (start + step * np.arange(count)).astype(dtype)


@register_aten("arange.start")
def arange_from(start: float, end: float, *, dtype: np.dtype | None = None) -> np.ndarray:
    """`arange` in steps of 1."""
    return arange(start, end, dtype=dtype)


@register_aten("arange")
def arange_to(end: float, *, dtype: np.dtype | None = None) -> np.ndarray:
    """`arange` from 0 in steps of 1."""
    return arange(0, end, dtype=dtype)


@register_aten("linspace")
def linspace(start: float, end: float, steps: int, *, dtype: np.dtype | None = None) -> np.ndarray:
    """So many values from start to end, inclusive; a constant."""
    return np.linspace(start, end, steps).astype(dtype or FLOAT)


@register_aten("eye")
def eye(n: int, *, dtype: np.dtype | None = None) -> np.ndarray:
    """The unit matrix."""
    return np.eye(n, dtype=dtype or FLOAT)


@register_aten("eye.m")
def eye_of(n: int, m: int, *, dtype: np.dtype | None = None) -> np.ndarray:
    """Ones on the diagonal of n rows and m columns."""
    return np.eye(n, m, dtype=dtype or FLOAT)
