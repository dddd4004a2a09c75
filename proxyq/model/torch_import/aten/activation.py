"""Activations and the identity that dropout is in evaluation."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.model.torch_import.aten.promotion import Array, cast, to_float
from proxyq.model.torch_import.aten.table import register_aten

# Functions of one array whose meaning is the same under the same name.
_SAME: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "selu": jax.nn.selu,
    "log_sigmoid": jax.nn.log_sigmoid,
    "softsign": jax.nn.soft_sign,
    "hardswish": jax.nn.hard_swish,
    "hardsigmoid": jax.nn.hard_sigmoid,
}
for _name, _function in _SAME.items():
    register_aten(_name)(
        lambda x, _function=_function: _function(x if x.dtype != np.bool_ else to_float(x))
    )


@register_aten("gelu")
def gelu(x: Array, *, approximate: str = "none") -> Array:
    """x Φ(x), exact, or its tanh approximation."""
    return jax.nn.gelu(x, approximate=approximate == "tanh")


@register_aten("hardtanh")
def hardtanh(x: Array, min_val: float = -1.0, max_val: float = 1.0) -> Array:
    """x limited to [min_val, max_val]."""
    return jnp.clip(x, cast(min_val, x.dtype), cast(max_val, x.dtype))


@register_aten("mish")
def mish(x: Array) -> Array:
    """x tanh(log(1 + eˣ))."""
    return x * jnp.tanh(jax.nn.softplus(x))


@register_aten("leaky_relu")
def leaky_relu(x: Array, negative_slope: float = 0.01) -> Array:
    """x, times the slope where negative."""
    return jnp.where(x > 0, x, x * cast(negative_slope, x.dtype))


@register_aten("prelu", "_prelu_kernel")
def prelu(x: Array, weight: Array) -> Array:
    """`leaky_relu` with one learned slope per channel (axis 1), or one in all."""
    if weight.ndim != x.ndim and x.ndim > 1:
        weight = weight.reshape((1, -1) + (1,) * (x.ndim - 2))
    return jnp.where(x > 0, x, x * weight)


@register_aten("elu")
def elu(x: Array, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Array:
    """scale · x, and scale · alpha · (exp(input_scale · x) - 1) where negative."""
    below = jnp.expm1(jnp.minimum(x, jnp.zeros_like(x)) * cast(float(input_scale), x.dtype))
    y = jnp.where(x > 0, x, below * cast(float(alpha), x.dtype))
    return y if scale == 1 else y * cast(float(scale), x.dtype)


@register_aten("celu")
def celu(x: Array, alpha: float = 1.0) -> Array:
    """`elu` that is smooth for every alpha."""
    return elu(x, alpha, 1.0, 1 / alpha)


@register_aten("softplus")
def softplus(x: Array, beta: float = 1, threshold: float = 20) -> Array:
    """log(1 + exp(beta x)) / beta, and x itself above the threshold."""
    scaled = x * cast(float(beta), x.dtype)
    soft = jax.nn.softplus(scaled) / cast(float(beta), x.dtype)
    return jnp.where(scaled > cast(float(threshold), x.dtype), x, soft)


@register_aten("softshrink")
def softshrink(x: Array, lambd: float = 0.5) -> Array:
    """x moved towards zero by lambd, zero in between."""
    size = cast(float(lambd), x.dtype)
    return x - jnp.clip(x, -size, size)


@register_aten("hardshrink")
def hardshrink(x: Array, lambd: float = 0.5) -> Array:
    """x, zero where |x| <= lambd."""
    return jnp.where(jnp.abs(x) > cast(float(lambd), x.dtype), x, jnp.zeros_like(x))


@register_aten("threshold")
def threshold(x: Array, limit: float, value: float) -> Array:
    """x above the limit, else the value."""
    filled = jnp.full_like(x, cast(value, x.dtype))
    return jnp.where(x > cast(limit, x.dtype), x, filled)


@register_aten("glu")
def glu(x: Array, dim: int = -1) -> Array:
    """First half times the sigmoid of the second."""
    a, b = jnp.split(x, 2, axis=dim)
    return a * jax.nn.sigmoid(b)


def _softmax_input(x: Array, dtype: np.dtype | None) -> Array:
    return to_float(x) if dtype is None else cast(x, dtype)


@register_aten("softmax", "special_softmax")
def softmax(x: Array, dim: int, dtype: np.dtype | None = None) -> Array:
    """exp(x) / Σ exp(x) along `dim`, computed in `dtype`."""
    return jax.nn.softmax(_softmax_input(x, dtype), axis=dim)


@register_aten("log_softmax", "special_log_softmax")
def log_softmax(x: Array, dim: int, dtype: np.dtype | None = None) -> Array:
    """Logarithm of `softmax`."""
    return jax.nn.log_softmax(_softmax_input(x, dtype), axis=dim)


@register_aten("_softmax")
def native_softmax(x: Array, dim: int, half_to_float: bool = False) -> Array:
    """`softmax` as the core set spells it."""
    return softmax(x, dim, np.dtype(np.float32) if half_to_float else None)


@register_aten("_log_softmax")
def native_log_softmax(x: Array, dim: int, half_to_float: bool = False) -> Array:
    """`log_softmax` as the core set spells it."""
    return log_softmax(x, dim, np.dtype(np.float32) if half_to_float else None)


@register_aten("_safe_softmax")
def safe_softmax(x: Array, dim: int, dtype: np.dtype | None = None) -> Array:
    """`softmax` with zeros, not NaN, where everything is -∞."""
    x = _softmax_input(x, dtype)
    dead = jnp.all(x == -math.inf, axis=dim, keepdims=True)
    return jnp.where(dead, jnp.zeros_like(x), jax.nn.softmax(x, axis=dim))


@register_aten("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(x: Array, p: float, train: bool) -> Array:
    """Nothing, in evaluation; training is refused before anything is run."""
    assert not train
    return x


@register_aten("native_dropout")
def native_dropout(x: Array, p: float, train: bool | None) -> tuple[Any, Any]:
    """`dropout` with the mask of what was kept: everything."""
    assert not train
    return x, jnp.ones(x.shape, np.bool_)
