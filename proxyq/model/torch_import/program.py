"""An exported torch graph as plain data, free of torch, at any batch size.

`Program` is a list of `Node`s in execution order. A node's arguments are Python literals,
NumPy dtypes, nested lists, and two kinds of holes: `Ref` (the value of an earlier node, an
input, a parameter or a constant) and `Scaled` (an integer that is a multiple of the batch
size).
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Ref:
    """The value with this number."""

    value: int


@dataclass(frozen=True)
class Scaled:
    """`factor` times the batch size."""

    factor: int


@dataclass(frozen=True)
class Node:
    """One operator call; its result gets the number `value`."""

    value: int
    operator: str  # "aten.conv2d.default", "operator.getitem"
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    path: str  # the torch module it came from: "layer1.0.conv1", "" for the root


@dataclass(frozen=True, kw_only=True)
class Program:
    """A graph: flattened inputs, parameters by name, constants, nodes, outputs.

    `order[i]` is the place, among the user's flattened inputs, of the graph's input `i`.
    """

    inputs: tuple[int, ...]
    order: tuple[int, ...]
    params: Mapping[int, str]
    constants: Mapping[int, np.ndarray]
    nodes: tuple[Node, ...]
    outputs: Any = field(default=None)

    def without_dead_nodes(self) -> "Program":
        """Only what the outputs need."""
        needed = set(refs(self.outputs))
        kept = []
        for node in reversed(self.nodes):
            if node.value in needed:
                kept.append(node)
                needed.update(refs((node.args, node.kwargs)))
        return replace(
            self,
            nodes=tuple(reversed(kept)),
            params={value: name for value, name in self.params.items() if value in needed},
            constants={v: array for v, array in self.constants.items() if v in needed},
        )


class Different(Exception):
    """Two exports of one model are not the same graph up to multiples of the batch."""


def refs(tree: Any) -> Iterator[int]:
    """The numbers of all values that `tree` mentions."""
    if isinstance(tree, Ref):
        yield tree.value
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from refs(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from refs(item)
    elif isinstance(tree, slice):
        yield from refs((tree.start, tree.stop, tree.step))


def _like(sequence: Any, items: list[Any]) -> Any:
    """`items` as a list, a tuple or a named tuple, as `sequence` is."""
    return sequence._make(items) if hasattr(sequence, "_make") else type(sequence)(items)


def fill(tree: Any, values: Mapping[int, Any], batch: int) -> Any:
    """`tree` with every `Ref` looked up and every `Scaled` multiplied out."""
    if isinstance(tree, Ref):
        return values[tree.value]
    if isinstance(tree, Scaled):
        return tree.factor * batch
    if isinstance(tree, list):
        return [fill(item, values, batch) for item in tree]
    if isinstance(tree, tuple):
        return _like(tree, [fill(item, values, batch) for item in tree])
    if isinstance(tree, Mapping):
        items = [(key, fill(item, values, batch)) for key, item in tree.items()]
        return OrderedDict(items) if isinstance(tree, OrderedDict) else dict(items)
    if isinstance(tree, slice):
        return slice(*fill([tree.start, tree.stop, tree.step], values, batch))
    return tree


def merge(first: Program, second: Program, batches: tuple[int, int]) -> Program:
    """One program for every batch size, from two exports at two coprime batch sizes.

    An integer literal that differs must be exactly proportional to the batch: a, b at
    batches m, n with a·n = b·m, so a = k·m and b = k·n with the integer k, which replaces
    the pair.

    **Raises** `Different` when the node lists, the constants or any other literal differ.
    """
    if len(first.nodes) != len(second.nodes):
        raise Different(f"{len(first.nodes)} nodes against {len(second.nodes)}")
    same = (first.inputs, first.order, first.params, set(first.constants))
    if same != (second.inputs, second.order, second.params, set(second.constants)):
        raise Different("inputs, parameters or constants")
    for value, array in first.constants.items():
        if not np.array_equal(array, second.constants[value], equal_nan=array.dtype.kind == "f"):
            raise Different("the value of a constant")
    nodes = []
    for a, b in zip(first.nodes, second.nodes, strict=True):
        if (a.value, a.operator, a.path) != (b.value, b.operator, b.path):
            raise Different(f"{a.operator} against {b.operator}")
        args, kwargs = _merge((a.args, a.kwargs), (b.args, b.kwargs), batches, a.operator)
        nodes.append(replace(a, args=args, kwargs=kwargs))
    outputs = _merge(first.outputs, second.outputs, batches, "the outputs")
    return replace(first, nodes=tuple(nodes), outputs=outputs)


def _merge(a: Any, b: Any, batches: tuple[int, int], where: str) -> Any:
    if type(a) is not type(b):
        raise Different(f"an argument of {where}")
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            raise Different(f"an argument of {where}")
        return _like(a, [_merge(x, y, batches, where) for x, y in zip(a, b, strict=True)])
    if isinstance(a, Mapping):
        if list(a) != list(b):
            raise Different(f"an argument of {where}")
        items = [(key, _merge(a[key], b[key], batches, where)) for key in a]
        return OrderedDict(items) if isinstance(a, OrderedDict) else dict(items)
    if isinstance(a, slice):
        merged = _merge([a.start, a.stop, a.step], [b.start, b.stop, b.step], batches, where)
        return slice(*merged)
    if a == b or (a != a and b != b):  # NaN equals nothing, itself included
        return a
    if type(a) is int and a * batches[1] == b * batches[0]:
        return Scaled(a // batches[0])
    raise Different(f"{a!r} against {b!r} in {where}")
