"""Where the examples of a batch lie in each tensor of a graph.

They enter on the first axis, but a network may move them (attention that wants the sequence
first), or fold other things into their axis (the windows of an image). What is measured for
each example has to follow.
"""

import math
from typing import Any, NamedTuple

from proxyq.model.elementwise import is_elementwise
from proxyq.model.graph import Equation, Graph, Var, bodies


class Examples(NamedTuple):
    """Examples lie on `axis`, whose index is `(outer * batch + example) * inner + rest`."""

    axis: int
    inner: int = 1


def split_examples(x: Any, where: Examples, batch: int) -> Any:
    """`x` with the examples moved to a first axis of their own.

    The axis that they lay on keeps what else was folded into it.
    """
    outer = x.shape[where.axis] // (batch * where.inner)
    before, after = x.shape[: where.axis], x.shape[where.axis + 1 :]
    split = x.reshape(*before, outer, batch, where.inner, *after)
    order = [where.axis + 1, *(a for a in range(split.ndim) if a != where.axis + 1)]
    return split.transpose(order).reshape(batch, *before, outer * where.inner, *after)


def locate(graph: Graph) -> dict[Var, Examples]:
    """The place of the examples in every tensor where it can be told from the equations."""
    known = {var: Examples(0) for var in graph.inputs}
    _follow(graph.main, known, graph.batch_size)
    return known


def _follow(eqns: Any, known: dict[Any, Examples], batch: int) -> None:
    for eqn in eqns:
        where = _after(eqn, known, batch)
        for var, place in zip(eqn.outvars, where, strict=True):
            shape = var.aval.shape
            if place is None or place.axis >= len(shape):
                continue
            if shape[place.axis] % (batch * place.inner) == 0:
                known[var] = place


def _after(eqn: Equation, known: dict[Any, Examples], batch: int) -> list[Examples | None]:
    """The place in each output, `None` where it cannot be told."""
    found = [(i, known[v]) for i, v in enumerate(eqn.invars) if _hashable(v) and v in known]
    nowhere: list[Examples | None] = [None] * len(eqn.outvars)
    if not found:
        return nowhere
    index, place = found[0]
    params, source = eqn.params, eqn.invars[index].aval.shape
    name = eqn.primitive.name
    inner = bodies(eqn)
    if len(inner) == 1 and len(inner[0].invars) == len(eqn.invars):
        own = {
            var: known[outer]
            for var, outer in zip(inner[0].invars, eqn.invars, strict=True)
            if _hashable(outer) and outer in known
        }
        _follow(inner[0].eqns, own, batch)
        return [own.get(v) if _hashable(v) else None for v in inner[0].outvars]
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        kept = index == 0 and place.axis == numbers.lhs_spec[0]
        return [place._replace(axis=numbers.out_spec[0])] if kept else nowhere
    if name == "dot_general":
        return [_after_dot(eqn, index, place)]
    if name == "transpose":
        return [place._replace(axis=params["permutation"].index(place.axis))]
    if name == "broadcast_in_dim":
        return [place._replace(axis=params["broadcast_dimensions"][place.axis])]
    if name in ("reshape", "squeeze", "expand_dims"):
        return [_after_reshape(source, eqn.outvars[0].aval.shape, place, batch)]
    if name == "stack":  # along a new axis
        return [place._replace(axis=place.axis + (params["axis"] <= place.axis))]
    if "axes" in params and name.startswith(("reduce_", "arg")):
        axes = params["axes"]
        if place.axis in axes:
            return nowhere
        return [place._replace(axis=place.axis - sum(a < place.axis for a in axes))] * len(nowhere)
    if name == "gather" and [i for i, _ in found] == [1]:
        # The axes of the indices, the last one left out, stand where no offsets are.
        offsets = params["dimension_numbers"].offset_dims
        free = [a for a in range(len(eqn.outvars[0].aval.shape)) if a not in offsets]
        return [place._replace(axis=free[place.axis]) if place.axis < len(free) else None]
    if name in ("gather", "scatter", "dynamic_slice") or (
        name == "concatenate" and params["dimension"] == place.axis
    ):
        same = eqn.outvars[0].aval.shape
        return [place] if len(same) == len(source) and same == source else nowhere
    # Element by element, or windows and slices along other axes: the axis stays.
    stays = [
        len(var.aval.shape) == len(source) and var.aval.shape[place.axis] == source[place.axis]
        for var in eqn.outvars
    ]
    if is_elementwise(eqn):
        rank = len(eqn.outvars[0].aval.shape)
        whole = [p for i, p in found if len(eqn.invars[i].aval.shape) == rank]
        return [whole[0] if whole else None]
    return [place if stay else None for stay in stays]


def _after_dot(eqn: Equation, index: int, place: Examples) -> Examples | None:
    contract, batched = eqn.params["dimension_numbers"]
    if place.axis in batched[index]:
        return place._replace(axis=batched[index].index(place.axis))
    if place.axis in contract[index]:
        return None

    def free(side: int) -> list[int]:
        bound = {*contract[side], *batched[side]}
        return [a for a in range(len(eqn.invars[side].aval.shape)) if a not in bound]

    start = len(batched[0]) + (len(free(0)) if index == 1 else 0)
    return place._replace(axis=start + free(index).index(place.axis))


def _after_reshape(
    source: tuple[int, ...], target: tuple[int, ...], place: Examples, batch: int
) -> Examples | None:
    # One example further is this many elements further, before as after.
    stride = place.inner * math.prod(source[place.axis + 1 :])
    below = math.prod(target)
    for axis, size in enumerate(target):
        below //= size
        if stride % below == 0 and size % (batch * (stride // below)) == 0:
            return Examples(axis, stride // below)
    return None


def _hashable(atom: Any) -> bool:
    return not hasattr(atom, "val") or isinstance(atom, Var)
