"""Normalisations.

Batch norm with running statistics is written as `x * scale + shift` with vectors (C,)
that depend on parameters only, so that they leave the loop over inputs and can be folded
into the convolution before.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.model.torch_import.aten.promotion import Array, cast
from proxyq.model.torch_import.aten.table import register_aten

_RUNNING = {"aten.batch_norm", "aten._native_batch_norm_legit_no_training"}


def _channels(vector: Array, rank: int) -> Array:
    """(C,) as (1, C, 1, ...)."""
    return vector.reshape((1, -1) + (1,) * (rank - 2))


def _affine_norm(
    x: Array, weight: Array | None, bias: Array | None, mean: Array, var: Array, eps: float
) -> Array:
    """x (N, C, ...) times a scale (C,) plus a shift (C,)."""
    scale = jax.lax.rsqrt(var + cast(float(eps), var.dtype))
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return x * _channels(scale, x.ndim) + _channels(shift, x.ndim)


def _batch_norm_of_data(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    axis_name: str | None = None,
) -> tuple[Array, Array, Array]:
    """Output, mean (C,) and 1 / standard deviation (C,), by the statistics of x itself.

    The variance is the biased one. `axis_name` is the mapped axis that holds the examples
    when x is a single one.
    """
    axes = (0, *range(2, x.ndim))

    def mean_of(values: Array) -> Array:
        mean = jnp.mean(values, axis=axes)
        return mean if axis_name is None else jax.lax.pmean(mean, axis_name)

    mean = mean_of(x)
    centred = x - _channels(mean, x.ndim)
    inverse = jax.lax.rsqrt(mean_of(centred * centred) + cast(float(eps), x.dtype))
    scale = inverse if weight is None else inverse * weight
    y = centred * _channels(scale, x.ndim)
    return (y if bias is None else y + _channels(bias, x.ndim)), mean, inverse


def uses_running_statistics(operator: str) -> bool:
    """Whether the operator is a batch norm in evaluation mode."""
    return operator.rpartition(".")[0] in _RUNNING


def batch_statistics(operator: str, axis_name: str | None) -> Callable[..., Any]:
    """The replacement of a batch norm that normalises with the statistics of the batch."""
    if operator.startswith("aten.batch_norm."):
        return functools.partial(_batch_norm_measured, axis_name=axis_name)
    return functools.partial(_legit_measured, axis_name=axis_name)


def _batch_norm_measured(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    mean: Array | None,
    var: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
    axis_name: str | None = None,
) -> Array:
    return _batch_norm_of_data(x, weight, bias, eps, axis_name)[0]


def _legit_measured(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    mean: Array,
    var: Array,
    momentum: float,
    eps: float,
    *,
    axis_name: str | None = None,
) -> tuple[Array, Array, Array]:
    return _batch_norm_of_data(x, weight, bias, eps, axis_name)


@register_aten("_native_batch_norm_legit_no_training")
def batch_norm_evaluation(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    mean: Array,
    var: Array,
    momentum: float,
    eps: float,
) -> tuple[Array, None, None]:
    """Batch norm with running statistics; it saves none."""
    return _affine_norm(x, weight, bias, mean, var, eps), None, None


@register_aten("batch_norm")
def batch_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    mean: Array | None,
    var: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Array:
    """The undecomposed batch norm."""
    if mean is None or var is None or training:
        return _batch_norm_of_data(x, weight, bias, eps)[0]
    return _affine_norm(x, weight, bias, mean, var, eps)


@register_aten("_native_batch_norm_legit", "_native_batch_norm_legit_functional")
def batch_norm_legit(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    mean: Array,
    var: Array,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Array, None, None]:
    """Batch norm with running statistics and `training=False`."""
    return _affine_norm(x, weight, bias, mean, var, eps), None, None


@register_aten("_native_batch_norm_legit.no_stats")
def batch_norm_without_statistics(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Array, Array, Array]:
    """Normalisation by the data's own statistics: weight standardisation uses it."""
    return _batch_norm_of_data(x, weight, bias, eps)


@register_aten("instance_norm")
def instance_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    mean: Array | None,
    var: Array | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Array:
    """Per example and channel, over the spatial axes; or with running statistics."""
    if not use_input_stats:
        assert mean is not None and var is not None
        return _affine_norm(x, weight, bias, mean, var, eps)
    y, _, _ = _normalise(x, tuple(range(2, x.ndim)), eps)
    if weight is not None:
        y = y * _channels(weight, x.ndim)
    return y if bias is None else y + _channels(bias, x.ndim)


def _normalise(x: Array, axes: tuple[int, ...], eps: float) -> tuple[Array, Array, Array]:
    """(x - mean) / √(variance + eps) over `axes`, the mean, and 1 / √(variance + eps)."""
    mean = jnp.mean(x, axis=axes, keepdims=True)
    centred = x - mean
    variance = jnp.mean(centred * centred, axis=axes, keepdims=True)
    inverse = jax.lax.rsqrt(variance + cast(float(eps), x.dtype))
    return centred * inverse, mean, inverse


def _trailing(vector: Array, rank: int) -> Array:
    return vector.reshape((1,) * (rank - vector.ndim) + vector.shape)


@register_aten("native_layer_norm")
def native_layer_norm(
    x: Array,
    normalized_shape: list[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> tuple[Array, Array, Array]:
    """Over the last axes, whose sizes are `normalized_shape`."""
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    y, mean, inverse = _normalise(x, axes, eps)
    if weight is not None:
        y = y * _trailing(weight, x.ndim)
    if bias is not None:
        y = y + _trailing(bias, x.ndim)
    return y, mean, inverse


@register_aten("layer_norm")
def layer_norm(
    x: Array,
    normalized_shape: list[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Array:
    """`native_layer_norm` without its statistics."""
    return native_layer_norm(x, normalized_shape, weight, bias, eps)[0]


@register_aten("rms_norm")
def rms_norm(
    x: Array, normalized_shape: list[int], weight: Array | None = None, eps: float | None = None
) -> Array:
    """x / √(mean of x² + eps) over the last axes; eps defaults to that of the dtype."""
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    small = float(jnp.finfo(x.dtype).eps) if eps is None else float(eps)
    power = jnp.mean(x * x, axis=axes, keepdims=True)
    y = x * jax.lax.rsqrt(power + cast(small, x.dtype))
    return y if weight is None else y * _trailing(weight, x.ndim)


@register_aten("_fused_rms_norm")
def fused_rms_norm(
    x: Array, normalized_shape: list[int], weight: Array | None, eps: float | None
) -> tuple[Array, None]:
    """`rms_norm` in a tuple; nothing in evaluation reads the second item."""
    return rms_norm(x, normalized_shape, weight, eps), None


@register_aten("group_norm")
def group_norm(
    x: Array,
    groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Array:
    """Per example and group of channels."""
    grouped = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    y = _normalise(grouped, tuple(range(2, grouped.ndim)), eps)[0].reshape(x.shape)
    if weight is not None:
        y = y * _channels(weight, x.ndim)
    return y if bias is None else y + _channels(bias, x.ndim)


@register_aten("native_group_norm")
def native_group_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    n: int,
    c: int,
    spatial: int,
    groups: int,
    eps: float,
) -> tuple[Array, None, None]:
    """`group_norm` in a tuple; nothing in evaluation reads the statistics."""
    return group_norm(x, groups, weight, bias, eps), None, None


@register_aten("linalg_vector_norm")
def vector_norm(
    x: Array,
    ord: float = 2,
    dim: int | list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: np.dtype | None = None,
) -> Array:
    """(Σ |x|^p)^(1/p), with the usual limits for 0, ∞ and -∞."""
    x = x if dtype is None else cast(x, dtype)
    axes = None if dim is None or dim == [] else (dim,) if isinstance(dim, int) else tuple(dim)
    size = jnp.abs(x)
    if ord == 2:
        return jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=keepdim))
    if ord == 1:
        return jnp.sum(size, axis=axes, keepdims=keepdim)
    if ord == 0:
        return jnp.sum((x != 0).astype(x.dtype), axis=axes, keepdims=keepdim)
    if math.isinf(ord):
        reduce = jnp.max if ord > 0 else jnp.min
        return reduce(size, axis=axes, keepdims=keepdim)
    power = cast(float(ord), x.dtype)
    total = jnp.sum(jnp.power(size, power), axis=axes, keepdims=keepdim)
    return jnp.power(total, cast(1 / float(ord), x.dtype))


@register_aten("norm")
def norm(
    x: Array,
    p: float | None = 2,
    dim: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: np.dtype | None = None,
) -> Array:
    """The older name of `linalg_vector_norm`."""
    return vector_norm(x, 2 if p is None else p, dim, keepdim, dtype=dtype)


@register_aten("_weight_norm")
def weight_norm(direction: Array, length: Array, dim: int = 0) -> Array:
    """A weight by its direction and its length per place along `dim` (-1: one in all)."""
    axes = tuple(axis for axis in range(direction.ndim) if dim == -1 or axis != dim)
    size = jnp.sqrt(jnp.sum(direction * direction, axis=axes, keepdims=True))
    return direction * (length.reshape(size.shape) / size)


@register_aten("_weight_norm_interface")
def weight_norm_interface(direction: Array, length: Array, dim: int = 0) -> tuple[Array, None]:
    """`weight_norm` in a tuple; nothing in evaluation reads the lengths."""
    return weight_norm(direction, length, dim), None
