"""What an evolution searches: free trees, or one of EMQ's three restricted structures.

A structure knows how individuals are grown, crossed and mutated, and which formula one stands
for. Of a free tree the genes are the tree itself,
in canonical form. Of EMQ's structures (Dong et al., ICCV 2023,
arXiv:2307.10554) they are slots, each with a name of a leaf or operation:

- `tree`: f = B(u2(u1(x)), v2(v1(y)));
- `chain`: f = u4(u3(u2(u1(x))));
- `graph`: two inputs and three nodes, each the sum of a unary of every state before it; f is the
  sum of the nodes' means (their mean, but for a factor that changes no ranking).

EMQ's code of these is not public. What stands here is its description, and where that is silent
the rules of a sibling project of the same author (pprp/LPZero). Two things are ours, so that each
gene is a valid formula: states of different types are averaged before they are joined, and an
operation that goes over entries does nothing to what is one number already.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from proxyq.errors import UsageError, near
from proxyq.proxies.formula import canonical, grow, parse_formula
from proxyq.proxies.formula.grammar import (
    ELEMENTWISE,
    LAYERWISE,
    REDUCTIONS,
    STATISTICS,
    Node,
    rooted,
)
from proxyq.search.evolve.operators import Trees, crossover, mutate

KEEP = "keep"
"""The unary operation that does nothing."""
# In the order of the sibling's list; its `mean` stands there twice, under two names.
UNARY = (
    *("log", "abslog", "abs", "square", "exp", "normalise", "relu", "invert", "norm", "mean"),
    *("l1", "softmax", "sigmoid", "logsoftmax", "sqrt", "neg", "minmax", "mean", "std", KEEP),
)
# Doing nothing is twice as likely as any other operation.
UNARY_WEIGHTS = (1.0,) * (len(UNARY) - 1) + (2.0,)
# The matrix product's 0.05 went to the product: the grammar has no matrix product.
JOINS, JOIN_WEIGHTS = ("add", "sub", "mul"), (0.6, 0.3, 0.1)
CHAIN, NODES = 4, 3
SLOT_RATE = 0.5
STRUCTURES = ("free", "tree", "chain", "graph")

Genes = Any


class Structure(Protocol):
    """Individuals of one kind. Genes are values: an operator gives new ones."""

    def grow(self, rng: Random) -> Genes:
        """New genes at random."""
        ...

    def cross(self, rng: Random, one: Genes, other: Genes) -> Genes:
        """A child of two."""
        ...

    def mutate(self, rng: Random, genes: Genes) -> Genes:
        """Genes with a change."""
        ...

    def node(self, genes: Genes) -> Node:
        """The formula, its root of type `layer`."""
        ...

    def write(self, genes: Genes) -> Any:
        """Genes as JSON."""
        ...

    def read(self, record: Any) -> Genes:
        """The same again."""
        ...


def structure(name: str, leaves: Sequence[str], *, nodes: int = 30, levels: int = 9) -> Structure:
    """A structure by name, over the statistics `leaves`; the limits are those of free trees.

    **Raises** `UsageError` for an unknown name or leaf, or leaves without entries to read.
    """
    for leaf in leaves:
        if leaf not in STATISTICS:
            raise UsageError(f"unknown statistic {leaf!r}: {near(leaf, list(STATISTICS))}")
    entries = tuple(n for n in STATISTICS if n in leaves and STATISTICS[n].type != "layer")
    if not entries:
        raise UsageError(
            "`leaves` must have at least one statistic of weights or activations, got "
            f"{', '.join(leaves) or 'none'}."
        )
    if name == "free":
        return Free(Trees(leaves=tuple(leaves), nodes=nodes, levels=levels))
    if name == "tree":
        return Slots([_leaf(entries)] * 2 + [_UNARY] * 4 + [_JOIN], _tree)
    if name == "chain":
        return Slots([_leaf(entries)] + [_UNARY] * CHAIN, _chain)
    if name == "graph":
        unaries = sum(2 + node for node in range(NODES))
        return Slots([_leaf(entries)] * 2 + [_UNARY] * unaries, _graph)
    raise UsageError(f"unknown structure {name!r}: {near(name, STRUCTURES)}")


@dataclass(frozen=True)
class Free:
    """Any tree of correct types within the limits; see `operators.py`."""

    trees: Trees

    def grow(self, rng: Random) -> Node:
        """Ramped half-and-half."""
        most = min(6, self.trees.levels)
        tree = grow(rng, least=2, most=most, leaves=self.trees.leaves, nodes=self.trees.nodes)
        return canonical(tree)

    def cross(self, rng: Random, one: Node, other: Node) -> Node:
        """Subtree crossover."""
        return canonical(crossover(rng, one, other, self.trees))

    def mutate(self, rng: Random, genes: Node) -> Node:
        """One of six kinds of change."""
        return canonical(mutate(rng, genes, self.trees))

    def node(self, genes: Node) -> Node:
        """The tree itself."""
        return genes

    def write(self, genes: Node) -> str:
        """As text."""
        return str(genes)

    def read(self, record: str) -> Node:
        """From text."""
        return parse_formula(record)


@dataclass(frozen=True)
class Slot:
    """What may stand in a slot, how likely each is drawn, and how often a child has it from its
    first parent."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    from_first: float = 0.5

    def draw(self, rng: Random) -> str:
        """A name at random."""
        return rng.choices(self.names, self.weights)[0]


@dataclass(frozen=True)
class Slots:
    """Genes of fixed length, a name in every slot."""

    slots: list[Slot]
    express: Callable[[Sequence[str]], Node]

    def grow(self, rng: Random) -> tuple[str, ...]:
        """Every slot drawn."""
        return tuple([slot.draw(rng) for slot in self.slots])

    def cross(self, rng: Random, one: Genes, other: Genes) -> tuple[str, ...]:
        """Every slot from one of the parents."""
        return tuple(
            [
                a if rng.random() < slot.from_first else b
                for slot, a, b in zip(self.slots, one, other, strict=True)
            ]
        )

    def mutate(self, rng: Random, genes: Genes) -> tuple[str, ...]:
        """Every slot drawn anew with the chance of one half."""
        return tuple(
            [
                slot.draw(rng) if rng.random() < SLOT_RATE else old
                for slot, old in zip(self.slots, genes, strict=True)
            ]
        )

    def node(self, genes: Genes) -> Node:
        """The formula of the slots."""
        return rooted(self.express(genes))

    def write(self, genes: Genes) -> list[str]:
        """As a list of names."""
        return list(genes)

    def read(self, record: Any) -> tuple[str, ...]:
        """From a list of names."""
        return tuple(record)


_UNARY = Slot(UNARY, UNARY_WEIGHTS)
_JOIN = Slot(JOINS, JOIN_WEIGHTS, from_first=0.2)


def _leaf(names: tuple[str, ...]) -> Slot:
    return Slot(names, (1.0,) * len(names))


def _apply(name: str, x: Node) -> Node:
    """A unary operation on a state; nothing where it cannot be."""
    if name == KEEP or (x.type == "layer" and name in LAYERWISE + REDUCTIONS):
        return x
    assert name in ELEMENTWISE + LAYERWISE + REDUCTIONS
    return Node(name, (x,))


def _joined(name: str, a: Node, b: Node) -> Node:
    """A binary operation; entries of different types are averaged first."""
    if a.type != b.type and "layer" not in (a.type, b.type):
        a, b = rooted(a), rooted(b)
    return Node(name, (a, b))


def _tree(genes: Sequence[str]) -> Node:
    x, y, u1, u2, v1, v2, join = genes
    return _joined(join, _apply(u2, _apply(u1, Node(x))), _apply(v2, _apply(v1, Node(y))))


def _chain(genes: Sequence[str]) -> Node:
    state = Node(genes[0])
    for name in genes[1:]:
        state = _apply(name, state)
    return state


def _graph(genes: Sequence[str]) -> Node:
    states, names = [Node(genes[0]), Node(genes[1])], iter(genes[2:])
    for _ in range(NODES):
        # s_i = sum_j u_ij(s_j) over all states before it
        total = _apply(next(names), states[0])
        for state in states[1:]:
            total = _joined("add", total, _apply(next(names), state))
        states.append(total)
    first, *others = states[2:]
    result = rooted(first)
    for state in others:
        result = Node("add", (result, rooted(state)))
    return result
