"""Pooling and resizing."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.model.torch_import.aten.layers import Sizes, per_axis
from proxyq.model.torch_import.aten.promotion import Array, is_float
from proxyq.model.torch_import.aten.table import register_aten


def _windows(
    size: int, kernel: int, stride: int, pad: int, dilation: int, ceil_mode: bool
) -> tuple[int, int]:
    """How many windows there are along an axis, and the padding they need behind it."""
    span = dilation * (kernel - 1) + 1
    room = size + 2 * pad - span
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    # A window may hang over the end, but must not start beyond the data and left padding.
    if ceil_mode and (count - 1) * stride >= size + pad:
        count -= 1
    behind = max((count - 1) * stride + span - size - pad, 0)
    return count, behind


def _setting(
    kernel: Sizes, stride: Sizes | None, padding: Sizes, dilation: Sizes, rank: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    kernels = per_axis(kernel, rank)
    strides = kernels if stride is None or stride == [] else per_axis(stride, rank)
    return kernels, strides, per_axis(padding, rank), per_axis(dilation, rank)


def _reduce(
    x: Array,
    initial: Any,
    function: Any,
    kernels: Sequence[int],
    strides: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    dilations: Sequence[int],
) -> Array:
    """`reduce_window` over the last axes."""
    lead = x.ndim - len(kernels)
    return jax.lax.reduce_window(
        x,
        np.asarray(initial, x.dtype),
        function,
        (1,) * lead + tuple(kernels),
        (1,) * lead + tuple(strides),
        ((0, 0),) * lead + tuple(pairs),
        window_dilation=(1,) * lead + tuple(dilations),
    )


def _max_pool(
    x: Array,
    rank: int,
    kernel: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool,
) -> Array:
    kernels, strides, pads, dilations = _setting(kernel, stride, padding, dilation, rank)
    sizes = x.shape[-rank:]
    pairs = []
    for size, k, s, p, d in zip(sizes, kernels, strides, pads, dilations, strict=True):
        pairs.append((p, _windows(size, k, s, p, d, ceil_mode)[1]))
    lowest = -np.inf if is_float(x) else jnp.iinfo(x.dtype).min
    return _reduce(x, lowest, jax.lax.max, kernels, strides, pairs, dilations)


def _register_max_pool(rank: int) -> None:
    @register_aten(f"max_pool{rank}d")
    def max_pool(
        x: Array,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        ceil_mode: bool = False,
    ) -> Array:
        return _max_pool(x, rank, kernel_size, stride, padding, dilation, ceil_mode)

    @register_aten(f"max_pool{rank}d_with_indices")
    def max_pool_with_indices(*args: Any) -> tuple[Array]:
        return (max_pool(*args),)  # a model that reads the indices was refused before


def _avg_pool(
    x: Array,
    rank: int,
    kernel: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Array:
    kernels, strides, pads, ones = _setting(kernel, stride, padding, 1, rank)
    sizes = x.shape[-rank:]
    pairs, counts = [], []
    for size, k, s, p in zip(sizes, kernels, strides, pads, strict=True):
        count, behind = _windows(size, k, s, p, 1, ceil_mode)
        pairs.append((p, behind))
        start = np.arange(count) * s - p
        if count_include_pad:  # padding counts, what ceil mode adds behind it does not
            counts.append(np.minimum(start + k, size + p) - start)
        else:
            counts.append(np.minimum(start + k, size) - np.maximum(start, 0))
    total = _reduce(x, 0, jax.lax.add, kernels, strides, pairs, ones)
    if divisor_override is not None:
        return total / np.asarray(divisor_override, x.dtype)
    divisor = counts[0].astype(np.float64)
    for count in counts[1:]:
        divisor = divisor[..., None] * count
    if np.all(divisor == divisor.flat[0]):
        return total * np.asarray(1 / divisor.flat[0], x.dtype)
    reciprocal = (1 / divisor).astype(x.dtype)
    return total * reciprocal.reshape((1,) * (x.ndim - rank) + reciprocal.shape)


def _register_avg_pool(rank: int) -> None:
    @register_aten(f"avg_pool{rank}d")
    def avg_pool(
        x: Array,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Array:
        return _avg_pool(
            x, rank, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )


def _edges(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of each adaptive window: ⌊i·size/out⌋ and ⌈(i+1)·size/out⌉."""
    i = np.arange(out)
    return i * size // out, -(-((i + 1) * size) // out)


def _along(x: Array, matrix: np.ndarray, axis: int) -> Array:
    """`matrix` (out, in) applied to one axis of x."""
    weights = np.asarray(matrix, x.dtype)
    y = jax.lax.dot_general(x, weights, (((axis,), (1,)), ((), ())))
    return jnp.moveaxis(y, -1, axis)


def _adaptive_avg_pool(x: Array, rank: int, output: Sequence[int | None]) -> Array:
    for axis, out in zip(range(x.ndim - rank, x.ndim), output, strict=True):
        size = x.shape[axis]
        if out is None or out == size:
            continue
        if size % out == 0:
            shape = (*x.shape[:axis], out, size // out, *x.shape[axis + 1 :])
            x = jnp.mean(x.reshape(shape), axis=axis + 1)
        else:  # windows of unequal sizes that overlap: a small matrix product
            start, end = _edges(size, out)
            column = np.arange(size)
            inside = (column >= start[:, None]) & (column < end[:, None])
            x = _along(x, inside / (end - start)[:, None], axis)
    return x


def _adaptive_max_pool(x: Array, rank: int, output: Sequence[int | None]) -> Array:
    for axis, out in zip(range(x.ndim - rank, x.ndim), output, strict=True):
        size = x.shape[axis]
        if out is None or out == size:
            continue
        start, end = _edges(size, out)
        # Each window as a row of places, the shorter ones ending in repetitions.
        places = np.minimum(start[:, None] + np.arange((end - start).max()), end[:, None] - 1)
        windows = jnp.take(x, places.astype(np.int32), axis=axis)
        x = jnp.max(windows, axis=axis + 1)
    return x


def _register_adaptive(rank: int) -> None:
    @register_aten(f"adaptive_avg_pool{rank}d", f"_adaptive_avg_pool{rank}d")
    def adaptive_avg_pool(x: Array, output_size: Sizes) -> Array:
        if all(size == 1 for size in per_axis(output_size, rank)):
            return jnp.mean(x, axis=tuple(range(x.ndim - rank, x.ndim)), keepdims=True)
        return _adaptive_avg_pool(x, rank, per_axis(output_size, rank))

    @register_aten(f"adaptive_max_pool{rank}d")
    def adaptive_max_pool(x: Array, output_size: Sizes) -> tuple[Array]:
        return (_adaptive_max_pool(x, rank, per_axis(output_size, rank)),)


for _rank in (1, 2, 3):
    _register_max_pool(_rank)
    _register_avg_pool(_rank)
    _register_adaptive(_rank)


def _resized(
    x: Array, rank: int, output_size: Sequence[int] | None, factors: Sequence[float] | None
) -> list[tuple[int, int, int, float | None]]:
    """Axis, size, new size and given factor for each of the last axes."""
    sizes = x.shape[-rank:]
    if output_size is None:
        assert factors is not None
        output_size = [math.floor(size * f) for size, f in zip(sizes, factors, strict=True)]
    given: Sequence[float | None] = [None] * rank if not factors else list(factors)
    axes = range(x.ndim - rank, x.ndim)
    return list(zip(axes, sizes, output_size, given, strict=True))


def _nearest(x: Array, plan: list[tuple[int, int, int, float | None]], offset: float) -> Array:
    for axis, size, out, factor in plan:
        scale = np.float32(1 / factor if factor else size / out)
        places = np.floor((np.arange(out, dtype=np.float32) + np.float32(offset)) * scale)
        places = np.minimum(places.astype(np.int32), size - 1)
        if not np.array_equal(places, np.arange(size)):
            x = jnp.take(x, places, axis=axis)
    return x


def _interpolated(
    x: Array, plan: list[tuple[int, int, int, float | None]], align_corners: bool, cubic: bool
) -> Array:
    """Separable interpolation as one small matrix per axis."""
    for axis, size, out, factor in plan:
        if size == out and (align_corners or factor in (None, 1.0)):
            continue
        i = np.arange(out, dtype=np.float64)
        if align_corners:
            where = i * ((size - 1) / (out - 1) if out > 1 else 0.0)
        else:
            where = (i + 0.5) * (1 / factor if factor else size / out) - 0.5
            if not cubic:
                where = np.maximum(where, 0)
        first = np.floor(where)
        t = where - first
        if cubic:
            taps = [(-1, _cubic_far(t + 1)), (0, _cubic_near(t))]
            taps += [(1, _cubic_near(1 - t)), (2, _cubic_far(2 - t))]
        else:
            taps = [(0, 1 - t), (1, t)]
        matrix = np.zeros((out, size))
        for shift, weight in taps:  # what falls outside takes the value at the border
            place = np.clip(first.astype(int) + shift, 0, size - 1)
            np.add.at(matrix, (np.arange(out), place), weight)
        x = _along(x, matrix, axis)
    return x


_A = -0.75  # the constant of torch's bicubic kernel


def _cubic_near(t: np.ndarray) -> np.ndarray:
    return ((_A + 2) * t - (_A + 3)) * t * t + 1


def _cubic_far(t: np.ndarray) -> np.ndarray:
    return ((_A * t - 5 * _A) * t + 8 * _A) * t - 4 * _A


def _smoothed(
    x: Array, plan: list[tuple[int, int, int, float | None]], align_corners: bool, cubic: bool
) -> Array:
    """`_interpolated` without aliasing: where an axis shrinks, the kernel widens with it.

    Weights beyond the border are left out and the others brought to the sum 1.
    """
    for axis, size, out, factor in plan:
        if size == out and (align_corners or factor in (None, 1.0)):
            continue
        i = np.arange(out, dtype=np.float64)
        if align_corners:
            scale = (size - 1) / (out - 1) if out > 1 else 0.0
        else:
            scale = 1 / factor if factor else size / out
        wide = max(scale, 1.0)
        centre, reach = scale * (i + 0.5), wide * (2 if cubic else 1)
        place = np.arange(size) + 0.5
        first = np.maximum((centre - reach + 0.5).astype(int), 0)
        last = np.minimum((centre + reach + 0.5).astype(int), size)
        inside = (place > first[:, None]) & (place < last[:, None])
        t = np.abs(place - centre[:, None]) / wide
        weights = np.where(inside, _keys(t) if cubic else np.maximum(1 - t, 0), 0)
        x = _along(x, weights / weights.sum(1, keepdims=True), axis)
    return x


def _keys(t: np.ndarray) -> np.ndarray:
    """The cubic kernel with the constant -1/2, which torch has where it avoids aliasing."""
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0))


def _register_upsample(name: str, rank: int, offset: float) -> None:
    @register_aten(f"{name}.vec")
    def upsample_by_factors(
        x: Array, output_size: list[int] | None, scale_factors: list[float] | None
    ) -> Array:
        return _nearest(x, _resized(x, rank, output_size, scale_factors), offset)

    @register_aten(name)
    def upsample(x: Array, output_size: list[int], *scales: float | None) -> Array:
        factors = [s for s in scales if s is not None]
        plan = _resized(x, rank, output_size, factors if len(factors) == rank else None)
        return _nearest(x, plan, offset)


def _register_interpolate(
    name: str, rank: int, cubic: bool, function: Callable[..., Array] = _interpolated
) -> None:
    @register_aten(f"{name}.vec")
    def interpolate_by_factors(
        x: Array,
        output_size: list[int] | None,
        align_corners: bool,
        scale_factors: list[float] | None,
    ) -> Array:
        return function(x, _resized(x, rank, output_size, scale_factors), align_corners, cubic)

    @register_aten(name)
    def interpolate(
        x: Array, output_size: list[int], align_corners: bool, *scales: float | None
    ) -> Array:
        factors = [s for s in scales if s is not None]
        plan = _resized(x, rank, output_size, factors if len(factors) == rank else None)
        return function(x, plan, align_corners, cubic)


for _rank in (1, 2, 3):
    _register_upsample(f"upsample_nearest{_rank}d", _rank, 0.0)
    _register_upsample(f"_upsample_nearest_exact{_rank}d", _rank, 0.5)
_register_interpolate("upsample_linear1d", 1, False)
_register_interpolate("upsample_bilinear2d", 2, False)
_register_interpolate("upsample_trilinear3d", 3, False)
_register_interpolate("upsample_bicubic2d", 2, True)
_register_interpolate("_upsample_bilinear2d_aa", 2, False, _smoothed)
_register_interpolate("_upsample_bicubic2d_aa", 2, True, _smoothed)
