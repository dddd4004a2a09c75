"""Convolutions, products, embeddings, attention."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.model.torch_import.aten.promotion import Array, cast, elementwise, same_rank
from proxyq.model.torch_import.aten.table import register_aten

Sizes = int | list[int] | tuple[int, ...]

_AXES = {1: "W", 2: "HW", 3: "DHW"}


def per_axis(value: Sizes, rank: int) -> list[int]:
    """One integer per spatial axis, from one integer or a list with one or `rank`."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _add_bias(y: Array, bias: Array | None) -> Array:
    """Channel axis 1 plus a vector (C,)."""
    return y if bias is None else y + bias.reshape((1, -1) + (1,) * (y.ndim - 2))


def _convolve(
    x: Array,
    weight: Array,
    bias: Array | None,
    *,
    stride: list[int],
    padding: list[tuple[int, int]],
    dilation: list[int],
    groups: int,
    lhs_dilation: list[int] | None = None,
) -> Array:
    """x (N, C, spatial...), weight (O, C / groups, spatial...) -> (N, O, spatial...)."""
    axes = _AXES[weight.ndim - 2]
    unbatched = x.ndim == weight.ndim - 1
    if unbatched:
        x = x[None]
    y = jax.lax.conv_general_dilated(
        x,
        weight,
        window_strides=stride,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=dilation,
        dimension_numbers=(f"NC{axes}", f"OI{axes}", f"NC{axes}"),
        feature_group_count=groups,
    )
    y = _add_bias(y, bias)
    return y[0] if unbatched else y


@register_aten("conv1d", "conv2d", "conv3d")
def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Array:
    """Cross-correlation with weight (O, C / groups, ...)."""
    rank = weight.ndim - 2
    dilations = per_axis(dilation, rank)
    if isinstance(padding, str):
        pairs = [(0, 0)] * rank
        if padding == "same":  # an odd total puts the larger half behind
            totals = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
            pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(p, p) for p in per_axis(padding, rank)]
    return _convolve(
        x,
        weight,
        bias,
        stride=per_axis(stride, rank),
        padding=pairs,
        dilation=dilations,
        groups=groups,
    )


@register_aten("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Array:
    """The transpose of a convolution: weight (C, O / groups, ...), inputs spread by the
    stride and correlated with the flipped kernel."""
    rank = weight.ndim - 2
    kernel = weight.shape[2:]
    dilations = per_axis(dilation, rank)
    full = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    pairs = [
        (f - p, f - p + extra)
        for f, p, extra in zip(
            full, per_axis(padding, rank), per_axis(output_padding, rank), strict=True
        )
    ]
    # (g · C/g, O/g, ...) -> (g · O/g, C/g, ...), spatial axes reversed
    weight = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    weight = jnp.swapaxes(weight, 1, 2).reshape(-1, weight.shape[1], *kernel)
    weight = jax.lax.rev(weight, tuple(range(2, weight.ndim)))
    return _convolve(
        x,
        weight,
        bias,
        stride=[1] * rank,
        padding=pairs,
        dilation=dilations,
        groups=groups,
        lhs_dilation=per_axis(stride, rank),
    )


@register_aten("convolution", "_convolution")
def convolution(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
    *_: Any,
) -> Array:
    """The general form of both of the above."""
    if transposed:
        return conv_transpose(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(x, weight, bias, stride, padding, dilation, groups)


@register_aten("linear")
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x (..., I), weight (O, I) -> (..., O), in one product on the weight as it lies."""
    y = jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


@register_aten("matmul", "mm", "bmm", "mv", "dot")
def matmul(a: Array, b: Array) -> Array:
    """Matrix product over the last two axes; leading axes broadcast."""
    if a.ndim >= 2 and b.ndim == 2:
        return jax.lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())))
    if a.ndim > 2 and b.ndim > 2:
        a, b = same_rank(a, b)
    return jnp.matmul(a, b)


@register_aten("addmm", "addmv", "baddbmm", "addbmm")
def addmm(c: Array, a: Array, b: Array, *, beta: float = 1, alpha: float = 1) -> Array:
    """beta · c + alpha · a @ b."""
    product = matmul(a, b)
    if alpha != 1:
        product = elementwise(jnp.multiply, product, alpha)
    if beta == 0:  # then c may hold NaN
        return product
    if beta != 1:
        c = elementwise(jnp.multiply, c, beta)
    return elementwise(jnp.add, product, c)


@register_aten("einsum")
def einsum(equation: str, operands: list[Array], path: Any = None) -> Array:
    """Einstein summation."""
    return jnp.einsum(equation.replace(" ", ""), *operands)


@register_aten("outer", "ger")
def outer(a: Array, b: Array) -> Array:
    """Products of all pairs."""
    return a[:, None] * b[None, :]


@register_aten("bilinear")
def bilinear(a: Array, b: Array, weight: Array, bias: Array | None = None) -> Array:
    """y_o = Σ_ij a_i W_oij b_j + bias_o."""
    y = jnp.einsum("...i,oij,...j->...o", a, weight, b)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


@register_aten("transformers::grouped_mm_fallback")
def grouped_product(x: Array, weights: Array, ends: Array) -> Array:
    """Rows of x [rows, in] up to ends[0] times weights[0] [in, out], those up to ends[1] times
    weights[1], and so on: the experts of transformers, rows sorted by expert."""
    sizes = jnp.diff(ends, prepend=jnp.zeros(1, ends.dtype))
    return jax.lax.ragged_dot(x, weights, sizes)


@register_aten("embedding")
def embedding(
    weight: Array,
    indices: Array,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Array:
    """Rows of weight (entries, width) for each index; the flags concern training."""
    return jnp.take(weight, indices, axis=0)


@register_aten("one_hot")
def one_hot(indices: Array, classes: int = -1) -> Array:
    """Integer indicator vectors of a fixed length."""
    if classes < 0:
        raise ValueError("one_hot needs a fixed number of classes, not one read from the data")
    return (indices[..., None] == jnp.arange(classes)).astype(np.int32)


@register_aten("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """softmax(q kᵀ · scale + mask) v; q (..., L, E), k (..., S, E), v (..., S, V).

    A row whose entries are all masked attends to nothing and gives zeros, as in torch.
    """
    if dropout_p:
        raise ValueError("attention drops weights at random, in evaluation mode")
    if enable_gqa:  # each key and value head serves several query heads
        key = jnp.repeat(key, query.shape[-3] // key.shape[-3], axis=-3)
        value = jnp.repeat(value, query.shape[-3] // value.shape[-3], axis=-3)
    query, key, value = same_rank(query, key, value)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    scores = jnp.matmul(query, jnp.swapaxes(key, -1, -2)) * cast(float(scale), query.dtype)
    if is_causal:
        attn_mask = np.tril(np.ones(scores.shape[-2:], np.bool_))
    if attn_mask is None:
        return jnp.matmul(jax.nn.softmax(scores, axis=-1), value)
    if attn_mask.dtype == np.bool_:
        lowest = np.asarray(-np.inf, scores.dtype)
        scores = elementwise_where(attn_mask, scores, lowest)
    else:
        scores = elementwise(jnp.add, scores, attn_mask)
    top = jnp.max(scores, axis=-1, keepdims=True)
    alive = top > -np.inf
    # Both the shift and the sum are made harmless in dead rows: no NaN, nor in gradients.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.where(alive, top, jnp.zeros_like(top))))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(alive, total, jnp.ones_like(total))
    return jnp.matmul(weights, value)


def elementwise_where(condition: Array, a: Array, b: Array) -> Array:
    """`where` for arrays of equal dtype whose ranks may differ."""
    condition, a, b = same_rank(condition, a, b)
    return jnp.where(condition, a, b)
