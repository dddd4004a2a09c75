"""Shapes, indexing, joining and padding."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from proxyq.model.torch_import.aten.promotion import (
    BOOL,
    Array,
    cast,
    is_number,
    result_type,
    to_float,
)
from proxyq.model.torch_import.aten.table import register_aten

# Views, copies and marks that leave the value as it is.
register_aten(
    "alias", "clone", "contiguous", "detach", "detach_", "lift", "lift_fresh", "lift_fresh_copy"
)(lambda x, **_: x)


@register_aten("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
def reshape(x: Array, size: list[int], *_: Any) -> Array:
    """x in a new shape; one size may be -1."""
    return jnp.reshape(x, tuple(size))


@register_aten("view.dtype", "view_copy.dtype")
def view_dtype(x: Array, dtype: np.dtype) -> Array:
    """The bits of x as another type; the same type is all that makes sense here."""
    if x.dtype != dtype:
        raise ValueError(f"the bits of a {x.dtype} array cannot be read as {dtype}")
    return x


register_aten("view_as", "reshape_as")(lambda x, other: jnp.reshape(x, other.shape))


@register_aten("flatten")
def flatten(x: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    """Axes start to end, inclusive, as one."""
    start, end = start_dim % max(x.ndim, 1), end_dim % max(x.ndim, 1)
    return jnp.reshape(x, (*x.shape[:start], -1, *x.shape[end + 1 :]))


@register_aten("unflatten")
def unflatten(x: Array, dim: int, sizes: list[int]) -> Array:
    """One axis as several."""
    dim %= x.ndim
    sizes = list(sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = x.shape[dim] // -math.prod(sizes)
    return jnp.reshape(x, (*x.shape[:dim], *sizes, *x.shape[dim + 1 :]))


@register_aten("transpose", "swapaxes", "swapdims", "transpose_copy")
def transpose(x: Array, dim0: int, dim1: int) -> Array:
    """Two axes exchanged."""
    return jnp.swapaxes(x, dim0, dim1) if x.ndim else x


register_aten("t", "numpy_T", "mT")(lambda x: jnp.swapaxes(x, -1, -2) if x.ndim > 1 else x)
register_aten("adjoint", "mH", "matrix_H")(lambda x: jnp.conj(jnp.swapaxes(x, -1, -2)))
register_aten("permute", "permute_copy")(lambda x, dims: jnp.transpose(x, tuple(dims)))
register_aten("movedim")(lambda x, source, target: jnp.moveaxis(x, source, target))


@register_aten("expand", "expand_copy")
def expand(x: Array, size: list[int], *, implicit: bool = False) -> Array:
    """Axes of size 1 repeated; -1 keeps a size; new axes go in front."""
    lead = len(size) - x.ndim
    shape = [x.shape[axis - lead] if wanted == -1 else wanted for axis, wanted in enumerate(size)]
    x = jnp.reshape(x, (1,) * lead + x.shape)
    return jnp.broadcast_to(x, tuple(shape))


register_aten("copy")(
    lambda x, source, non_blocking=False: expand(cast(source, x.dtype), list(x.shape))
)
register_aten("expand_as")(lambda x, other: expand(x, list(other.shape)))
register_aten("broadcast_to")(lambda x, size: expand(x, list(size)))
register_aten("unsqueeze", "unsqueeze_copy")(lambda x, dim: jnp.expand_dims(x, dim))


@register_aten("squeeze", "squeeze_copy")
def squeeze(x: Array, dim: int | list[int] | None = None) -> Array:
    """Axes of size 1 removed: all, or those of `dim` that have size 1."""
    axes = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    drop = tuple(axis % x.ndim for axis in axes if x.ndim and x.shape[axis] == 1)
    return jnp.squeeze(x, axis=drop) if drop else x


@register_aten("cat", "concat", "concatenate")
def cat(tensors: list[Array], dim: int = 0) -> Array:
    """Arrays one after another; empty vectors are skipped, as an old rule has it."""
    dtype = result_type(*tensors)
    kept = [x for x in tensors if x.shape != (0,)] or tensors
    return jnp.concatenate([cast(x, dtype) for x in kept], axis=dim)


register_aten("hstack")(lambda tensors: cat(tensors, 1 if tensors[0].ndim > 1 else 0))
register_aten("vstack")(lambda tensors: cat([jnp.atleast_2d(x) for x in tensors], 0))


@register_aten("stack")
def stack(tensors: list[Array], dim: int = 0) -> Array:
    """Arrays along a new axis."""
    dtype = result_type(*tensors)
    return jnp.stack([jnp.asarray(cast(x, dtype)) for x in tensors], axis=dim)


def _pieces(x: Array, sizes: Sequence[int], dim: int) -> list[Array]:
    ends = np.cumsum(sizes)
    return [
        slice_(x, dim, int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)
    ]


@register_aten("split_with_sizes", "split.sizes", "split_with_sizes_copy")
def split_with_sizes(x: Array, sizes: list[int], dim: int = 0) -> list[Array]:
    """Pieces of the given sizes."""
    return _pieces(x, sizes, dim)


@register_aten("split", "split_copy", "unsafe_split")
def split(x: Array, size: int | list[int], dim: int = 0) -> list[Array]:
    """Pieces of one size; the last may be smaller."""
    if not isinstance(size, int):
        return _pieces(x, size, dim)
    total = x.shape[dim]
    full, rest = divmod(total, size) if size else (1, 0)
    return _pieces(x, [size] * full + [rest] * bool(rest), dim)


@register_aten("chunk", "unsafe_chunk")
def chunk(x: Array, chunks: int, dim: int = 0) -> list[Array]:
    """At most `chunks` pieces of equal size; the last may be smaller."""
    return split(x, -(-x.shape[dim] // chunks), dim)


@register_aten("tensor_split")
def tensor_split(x: Array, where: int | list[int], dim: int = 0) -> list[Array]:
    """Exactly so many pieces (the first ones one longer), or cut at the given places."""
    return jnp.array_split(x, where if isinstance(where, int) else list(where), axis=dim)


@register_aten("unbind", "unbind_copy")
def unbind(x: Array, dim: int = 0) -> list[Array]:
    """One array for each place along `dim`."""
    return [select(x, dim, index) for index in range(x.shape[dim])]


def _at(x: Array, dim: int, what: Any) -> tuple[Any, ...]:
    """An index that takes `what` along one axis and everything along the others."""
    return (slice(None),) * (dim % x.ndim) + (what,)


@register_aten("select", "select_copy")
def select(x: Array, dim: int, index: int) -> Array:
    """One place along `dim`, which disappears."""
    return x[_at(x, dim, index)]


@register_aten("slice", "slice_copy")
def slice_(
    x: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    """Places start to end along `dim`; an end beyond the axis (2^63 - 1 means all) is cut."""
    return x[_at(x, dim, slice(start, end, step))]


@register_aten("narrow")
def narrow(x: Array, dim: int, start: int, length: int) -> Array:
    """So many places from `start`."""
    return slice_(x, dim, start, start + length)


@register_aten("slice_scatter")
def slice_scatter(
    x: Array,
    source: Array,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Array:
    """x with a slice replaced."""
    return jnp.asarray(x).at[_at(x, dim, slice(start, end, step))].set(cast(source, x.dtype))


@register_aten("select_scatter")
def select_scatter(x: Array, source: Array, dim: int, index: int) -> Array:
    """x with one place along `dim` replaced."""
    return jnp.asarray(x).at[_at(x, dim, index)].set(cast(source, x.dtype))


@register_aten("roll")
def roll(x: Array, shifts: int | list[int], dims: int | list[int] = ()) -> Array:  # type: ignore[assignment]
    """Places moved round cyclically; without `dims` in the flattened array."""
    shift = shifts if isinstance(shifts, int) else tuple(shifts)
    if isinstance(dims, int):
        return jnp.roll(x, shift, dims)
    if not dims:
        return jnp.roll(x, shift if isinstance(shift, int) else shift[0])
    return jnp.roll(x, shift, tuple(dims))


register_aten("flip")(lambda x, dims: jnp.flip(x, axis=tuple(dims)))
register_aten("fliplr")(jnp.fliplr)
register_aten("flipud")(jnp.flipud)
register_aten("rot90")(lambda x, k=1, dims=(0, 1): jnp.rot90(x, k, tuple(dims)))


@register_aten("repeat", "tile")
def repeat(x: Array, repeats: list[int]) -> Array:
    """The whole array so many times along each axis; new axes go in front."""
    return jnp.tile(x, tuple(repeats))


@register_aten("repeat_interleave.self_int")
def repeat_interleave(
    x: Array, repeats: int, dim: int | None = None, *, output_size: int | None = None
) -> Array:
    """Each value so many times in a row."""
    return jnp.repeat(x, repeats, axis=dim)


@register_aten("index")
def index(x: Array, indices: list[Array | None]) -> Array:
    """Advanced indexing; None takes a whole axis."""
    return x[tuple(_constant(i) for i in indices)]


def _constant(i: Array | None) -> Any:
    """An index; boolean masks must be constants, since their count sets a shape."""
    return slice(None) if i is None else i


@register_aten("index_put", "_unsafe_index_put")
def index_put(
    x: Array, indices: list[Array | None], values: Array, accumulate: bool = False
) -> Array:
    """x with the indexed places replaced, or added to."""
    if len(indices) == 1 and indices[0] is not None and indices[0].dtype == BOOL:
        mask = indices[0].reshape(indices[0].shape + (1,) * (x.ndim - indices[0].ndim))
        if values.ndim == 0:
            return jnp.where(mask, x + values if accumulate else cast(values, x.dtype), x)
    place = jnp.asarray(x).at[tuple(_constant(i) for i in indices)]
    return place.add(cast(values, x.dtype)) if accumulate else place.set(cast(values, x.dtype))


register_aten("_unsafe_index")(index)
register_aten("index_select")(lambda x, dim, where: jnp.take(x, where.reshape(-1), axis=dim))


def _mesh(x: Array, where: Array, dim: int) -> tuple[Any, ...]:
    """Indices of x for `gather` and `scatter`: `where` along `dim`, else its own places."""
    grid: list[Any] = [
        np.arange(size, dtype=np.int32).reshape((-1,) + (1,) * (where.ndim - axis - 1))
        for axis, size in enumerate(where.shape)
    ]
    grid[dim % x.ndim] = where
    return tuple(grid)


@register_aten("gather")
def gather(x: Array, dim: int, where: Array, *, sparse_grad: bool = False) -> Array:
    """y[i, j] = x[where[i, j], j] for dim 0; `where` may be smaller than x."""
    return x[_mesh(x, where, dim)]


register_aten("take_along_dim")(
    lambda x, where, dim=None: (
        jnp.take_along_axis(x.reshape(-1), where.reshape(-1), axis=0)
        if dim is None
        else jnp.take_along_axis(x, where, axis=dim)
    )
)


@register_aten("scatter")
def scatter(x: Array, dim: int, where: Array, source: Any) -> Array:
    """The inverse of `gather`: x[where[i, j], j] = source[i, j]."""
    if not is_number(source):
        source = source[tuple(slice(size) for size in where.shape)]
    return jnp.asarray(x).at[_mesh(x, where, dim)].set(cast(source, x.dtype))


@register_aten("scatter_add")
def scatter_add(x: Array, dim: int, where: Array, source: Array) -> Array:
    """`scatter` that adds."""
    source = source[tuple(slice(size) for size in where.shape)]
    return jnp.asarray(x).at[_mesh(x, where, dim)].add(cast(source, x.dtype))


@register_aten("index_add")
def index_add(x: Array, dim: int, where: Array, source: Array, *, alpha: float = 1) -> Array:
    """x with `source` times alpha added at those places along `dim`."""
    added = cast(source if alpha == 1 else source * alpha, x.dtype)
    return jnp.asarray(x).at[_at(x, dim, where)].add(added)


@register_aten("index_copy")
def index_copy(x: Array, dim: int, where: Array, source: Array) -> Array:
    """x with those places along `dim` replaced."""
    return jnp.asarray(x).at[_at(x, dim, where)].set(cast(source, x.dtype))


@register_aten("index_fill")
def index_fill(x: Array, dim: int, where: Array, value: Any) -> Array:
    """x with one value at those places along `dim`."""
    return jnp.asarray(x).at[_at(x, dim, where)].set(cast(value, x.dtype))


@register_aten("searchsorted")
def searchsorted(
    edges: Array,
    values: Array,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Array | None = None,
) -> Array:
    """Where each value would go among sorted edges of one axis, before or after equals."""
    if edges.ndim != 1:
        raise ValueError(f"edges of {edges.ndim} axes: searchsorted takes one axis here")
    after = right or side == "right"
    places = jnp.searchsorted(edges, values, side="right" if after else "left", sorter=sorter)
    return places.astype(np.int32)


@register_aten("bucketize")
def bucketize(
    values: Array, edges: Array, *, out_int32: bool = False, right: bool = False
) -> Array:
    """`searchsorted` with its arguments the other way round."""
    return searchsorted(edges, values, right=right)


@register_aten("diagonal", "diagonal_copy")
def diagonal(x: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    """The diagonal of two axes, as the last one."""
    return jnp.diagonal(x, offset, dim1, dim2)


register_aten("tril")(lambda x, k=0: jnp.tril(x, k))
register_aten("triu")(lambda x, k=0: jnp.triu(x, k))
register_aten("meshgrid")(lambda tensors, indexing="ij": jnp.meshgrid(*tensors, indexing=indexing))


@register_aten("unfold", "unfold_copy")
def unfold(x: Array, dim: int, size: int, step: int) -> Array:
    """Windows along `dim`, their content as a new last axis."""
    count = (x.shape[dim] - size) // step + 1
    places = np.arange(count, dtype=np.int32)[:, None] * step + np.arange(size, dtype=np.int32)
    windows = jnp.take(x, places, axis=dim)
    return jnp.moveaxis(windows, dim % x.ndim + 1, -1)


@register_aten("im2col")
def im2col(
    x: Array, kernel_size: list[int], dilation: list[int], padding: list[int], stride: list[int]
) -> Array:
    """x (N, C, H, W) -> (N, C · kh · kw, windows)."""
    n, channels = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding)))
    for axis, k, d, s in zip((2, 4), kernel_size, dilation, stride, strict=True):
        count = (x.shape[axis] - d * (k - 1) - 1) // s + 1
        places = np.arange(k, dtype=np.int32)[:, None] * d + np.arange(count, dtype=np.int32) * s
        x = jnp.take(x, places, axis=axis)  # (N, C, kh, H', W) then (N, C, kh, H', kw, W')
    x = jnp.transpose(x, (0, 1, 2, 4, 3, 5))
    return x.reshape(n, channels * x.shape[2] * x.shape[3], -1)


@register_aten("col2im")
def col2im(
    x: Array,
    output_size: list[int],
    kernel_size: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Array:
    """The transpose of `im2col`: windows added up where they lie, (N, C · kh · kw, windows) ->
    (N, C, H, W)."""
    height, width = (size + 2 * p for size, p in zip(output_size, padding, strict=True))
    (kh, kw), (dh, dw), (sh, sw) = kernel_size, dilation, stride
    down, across = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    windows = x.reshape(len(x), -1, kh, kw, down, across)
    y = jnp.zeros((len(x), windows.shape[1], height, width), x.dtype)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dh, i * dh + sh * (down - 1) + 1, sh)
            columns = slice(j * dw, j * dw + sw * (across - 1) + 1, sw)
            y = y.at[:, :, rows, columns].add(windows[:, :, i, j])
    top, left = padding
    return y[:, :, top : top + output_size[0], left : left + output_size[1]]


@register_aten("pixel_shuffle")
def pixel_shuffle(x: Array, factor: int) -> Array:
    """(..., C r², H, W) -> (..., C, H r, W r)."""
    *lead, channels, height, width = x.shape
    x = x.reshape(*lead, channels // factor**2, factor, factor, height, width)
    n = len(lead)
    x = jnp.transpose(x, (*range(n), n, n + 3, n + 1, n + 4, n + 2))
    return x.reshape(*lead, channels // factor**2, height * factor, width * factor)


@register_aten("pixel_unshuffle")
def pixel_unshuffle(x: Array, factor: int) -> Array:
    """(..., C, H r, W r) -> (..., C r², H, W)."""
    *lead, channels, height, width = x.shape
    x = x.reshape(*lead, channels, height // factor, factor, width // factor, factor)
    n = len(lead)
    x = jnp.transpose(x, (*range(n), n, n + 2, n + 4, n + 1, n + 3))
    return x.reshape(*lead, channels * factor**2, height // factor, width // factor)


@register_aten("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(x: Array, groups: int) -> Array:
    """Channels dealt out anew: group and place within it change roles."""
    n, channels, *spatial = x.shape
    x = x.reshape(n, groups, channels // groups, *spatial)
    return jnp.swapaxes(x, 1, 2).reshape(n, channels, *spatial)


_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@register_aten("pad")
def pad(x: Array, pads: list[int], mode: str = "constant", value: float | None = None) -> Array:
    """Pairs (before, after) from the last axis backwards; negative ones cut."""
    pairs = [(0, 0)] * x.ndim
    for place in range(len(pads) // 2):
        pairs[x.ndim - 1 - place] = (pads[2 * place], pads[2 * place + 1])
    for axis, (before, after) in enumerate(pairs):
        if before < 0 or after < 0:
            end = x.shape[axis] + min(after, 0)
            x = slice_(x, axis, max(-before, 0), end)
    pairs = [(max(before, 0), max(after, 0)) for before, after in pairs]
    if mode != "constant":
        return jnp.pad(x, pairs, mode=_PAD_MODES[mode])
    return jnp.pad(x, pairs, constant_values=cast(value or 0, x.dtype))


register_aten("constant_pad_nd")(lambda x, pads, value=0: pad(x, pads, "constant", value))
for _rank in (1, 2, 3):
    register_aten(f"reflection_pad{_rank}d")(lambda x, pads: pad(x, pads, "reflect"))
    register_aten(f"replication_pad{_rank}d")(lambda x, pads: pad(x, pads, "replicate"))


@register_aten("to", "_to_copy", "type_as")
def to(x: Array, *args: Any, dtype: np.dtype | None = None, **_: Any) -> Array:
    """x in another dtype, given by name or by the array whose dtype it is."""
    for argument in args:
        if isinstance(argument, np.dtype):
            dtype = argument
        elif hasattr(argument, "dtype"):
            dtype = np.dtype(argument.dtype)
    if dtype is None or x.dtype == dtype:
        return x
    return jnp.asarray(x).astype(dtype)


register_aten("float")(to_float)
register_aten("sym_size.int")(lambda x, dim: x.shape[dim])
register_aten("sym_numel")(lambda x: math.prod(x.shape))
register_aten("sym_size")(lambda x: list(x.shape))
