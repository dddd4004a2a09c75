"""Crossover and mutation of free formula trees, by strongly typed genetic programming.

Source: Koza 1992 (subtree crossover, point and hoist mutation), typed as by Montana 1995: a part
is only ever replaced by one of the same type, so that a tree of correct types stays one. All that
is drawn comes from the generator that is given. A tree beyond the limits is drawn again, and in
the end the first parent is returned as it is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from proxyq.proxies.formula.grammar import (
    BINARY,
    CONSTANT,
    ELEMENTWISE,
    LAYERWISE,
    MAX_CONSTANT,
    REDUCTIONS,
    STATISTICS,
    Node,
    Type,
    constant,
    is_constant,
)
from proxyq.proxies.formula.random import grow

TRIES = 10
INNER_SHARE = 0.9
"""Of the places of a crossover those that have arguments (Koza's): leaves alone change little."""
CONSTANT_SHARE = 0.15
"""Of new leaves that are numbers of layers."""

Path = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Trees:
    """What free trees are made of: the statistics they may read, and how large they may be."""

    leaves: tuple[str, ...]
    nodes: int = 30
    levels: int = 9

    def allow(self, node: Node) -> bool:
        """Whether a tree is within the limits."""
        return node.size <= self.nodes and node.depth <= self.levels

    def pool(self, type: Type) -> list[str]:
        """The statistics of a type, in the grammar's order."""
        return [n for n in STATISTICS if n in self.leaves and STATISTICS[n].type == type]


def crossover(rng: Random, one: Node, other: Node, trees: Trees) -> Node:
    """`one` with one of its parts replaced by a part of `other` of the same type."""
    for _ in range(TRIES):
        path, old = _place(rng, one)
        parts = [part for part in other.walk() if part.type == old.type]
        if not parts:
            continue
        child = _replaced(one, path, rng.choice(parts))
        if child != one and trees.allow(child):
            return child
    return one


def mutate(rng: Random, node: Node, trees: Trees) -> Node:
    """The tree with one change, of a kind drawn from `MUTATIONS`."""
    kinds, weights = zip(*MUTATIONS.items(), strict=True)
    for _ in range(TRIES):
        (kind,) = rng.choices(kinds, weights)
        child = kind(rng, node, trees)
        if child != node and trees.allow(child):
            return child
    return node


# -- kinds of mutation -----------------------------------------------------------------


def subtree(rng: Random, node: Node, trees: Trees) -> Node:
    """A part replaced by one grown anew."""
    path, old = _place(rng, node)
    most = min(4, max(2, trees.levels - len(path)))
    new = grow(rng, least=2, most=most, type=old.type, leaves=trees.leaves, nodes=trees.nodes)
    return _replaced(node, path, new)


def point(rng: Random, node: Node, trees: Trees) -> Node:
    """One operation or leaf replaced by another that fits in its place."""
    path, old = rng.choice(_places(node))
    if not old.args:
        return _replaced(node, path, _leaf(rng, old.type, trees))
    others = [name for name in _alike(old) if name != old.name]
    return _replaced(node, path, Node(rng.choice(others), old.args))


def hoist(rng: Random, node: Node, trees: Trees) -> Node:
    """A part replaced by a smaller part of its own."""
    del trees
    path, old = _place(rng, node)
    inside = [part for arg in old.args for part in arg.walk() if part.type == old.type]
    return _replaced(node, path, rng.choice(inside)) if inside else node


def shrink(rng: Random, node: Node, trees: Trees) -> Node:
    """A part replaced by a leaf."""
    path, old = _place(rng, node)
    return _replaced(node, path, _leaf(rng, old.type, trees))


def insert(rng: Random, node: Node, trees: Trees) -> Node:
    """An operation put on top of a part, on two arguments with a leaf beside it."""
    path, old = rng.choice(_places(node))
    if rng.random() < 0.5:
        names = ELEMENTWISE if old.type == "layer" else ELEMENTWISE + LAYERWISE
        return _replaced(node, path, Node(rng.choice(names), (old,)))
    beside = _leaf(rng, "layer" if rng.random() < 0.5 else old.type, trees)
    args = (old, beside) if rng.random() < 0.5 else (beside, old)
    return _replaced(node, path, Node(rng.choice(BINARY), args))


def nudge(rng: Random, node: Node, trees: Trees) -> Node:
    """A constant made a little larger or smaller, now and then of the other sign."""
    del trees
    found = [(path, old) for path, old in _places(node) if is_constant(old)]
    if not found:
        return node
    path, old = rng.choice(found)
    value = (old.value or 0.1) * math.exp(rng.uniform(-1.0, 1.0))
    if rng.random() < 0.1:
        value = -value
    # Three digits: what a rank correlation tells no further apart should be short to read.
    value = float(f"{value:.3g}")
    return _replaced(node, path, constant(value)) if abs(value) <= MAX_CONSTANT else node


Mutation = Callable[[Random, Node, Trees], Node]
MUTATIONS: dict[Mutation, float] = {
    subtree: 0.3,
    point: 0.25,
    hoist: 0.15,
    shrink: 0.1,
    insert: 0.15,
    nudge: 0.05,
}
"""Kinds of mutation and how likely each is: as often shorter as longer."""


# -- places ----------------------------------------------------------------------------


def _places(node: Node, path: Path = ()) -> list[tuple[Path, Node]]:
    """All parts and where they are, the whole tree first."""
    found = [(path, node)]
    for index, arg in enumerate(node.args):
        found += _places(arg, (*path, index))
    return found


def _place(rng: Random, node: Node) -> tuple[Path, Node]:
    """A place drawn at random, mostly one with arguments."""
    places = _places(node)
    inner = [(path, part) for path, part in places if part.args]
    return rng.choice(inner if inner and rng.random() < INNER_SHARE else places)


def _replaced(node: Node, path: Path, new: Node) -> Node:
    """The tree with another part at `path`."""
    if not path:
        return new
    args = list(node.args)
    args[path[0]] = _replaced(args[path[0]], path[1:], new)
    return Node(node.name, tuple(args))


def _leaf(rng: Random, type: Type, trees: Trees) -> Node:
    """A leaf of a type: a statistic, or for numbers of layers a constant now and then."""
    pool = trees.pool(type)
    if type == "layer" and (not pool or rng.random() < CONSTANT_SHARE):
        return constant(round(rng.uniform(-2.0, 2.0), 2))
    return Node(rng.choice(pool))


def _alike(node: Node) -> Sequence[str]:
    """Operations that can stand in the place of one."""
    assert node.args and node.name != CONSTANT
    if node.name in BINARY:
        return BINARY
    if node.name in REDUCTIONS:
        return REDUCTIONS
    return ELEMENTWISE if node.type == "layer" else ELEMENTWISE + LAYERWISE
