"""Random formulas of correct types: the start of a search, and the food of tests.

Trees are grown as in genetic programming (Koza 1992): the depth is drawn evenly from a range, and
half of the trees are full, with leaves only at that depth, half are grown, with leaves anywhere
("ramped half-and-half"). What is drawn depends on the generator alone, never on an order of sets.
"""

from collections.abc import Sequence
from random import Random

from proxyq.errors import UsageError
from proxyq.proxies.formula.grammar import (
    BINARY,
    ELEMENTWISE,
    LAYERWISE,
    MAX_NODES,
    REDUCTIONS,
    STATISTICS,
    Node,
    Type,
    constant,
)

OF_ENTRIES: tuple[Type, ...] = ("weight", "activation")
DEEPEST = 12
LEAF_SHARE = 0.2
"""Of the nodes of a grown tree that may have arguments: those that have none."""
CONSTANT_SHARE = 0.15
"""Of the leaves that are numbers of layers."""
BINARY_SHARE = 0.5
"""Of the operations."""
REDUCTION_SHARE = 0.7
"""Of the operations on one argument that give a number for each layer."""
LAYER_SHARE = 0.25
"""Of the operations on two arguments, one an entry: those whose other is a number of the layer."""
TRIES = 100


def grow(
    rng: Random,
    *,
    least: int = 2,
    most: int = 6,
    type: Type = "layer",
    leaves: Sequence[str] = tuple(STATISTICS),
    constants: bool = True,
    nodes: int = MAX_NODES,
) -> Node:
    """A random tree of a type, of `least` to `most` levels and at most `nodes` nodes.

    `leaves`: the statistics that it may read; `constants`: whether it may hold numbers. A tree
    that came out too large is drawn anew, in the end with fewer levels.

    **Raises** `UsageError` when no tree can be grown from these leaves.
    """
    if not 2 <= least <= most <= DEEPEST:
        raise UsageError(
            f"`least` and `most` must be levels from 2 to {DEEPEST}, in this order, got {least} "
            f"and {most}."
        )
    unknown = [name for name in leaves if name not in STATISTICS]
    if unknown:
        raise UsageError(f"`leaves` must be of {', '.join(STATISTICS)}, got {unknown[0]!r}.")
    pools = {
        kind: tuple(name for name in STATISTICS if name in leaves and STATISTICS[name].type == kind)
        for kind in ("weight", "activation", "layer")
    }
    elements: Sequence[Type] = [kind for kind in OF_ENTRIES if pools[kind]]
    if not elements or (type != "layer" and type not in elements) or nodes < 2:
        raise UsageError(
            f"a {type} formula of at most {nodes} nodes cannot be grown from the leaves "
            f"{', '.join(leaves) or '(none)'}: give it a leaf of a weight or of activations."
        )
    levels = rng.randint(least, most)
    while True:
        for _ in range(TRIES):
            tree = _tree(rng, type, levels, rng.random() < 0.5, pools, elements, constants)
            if tree is not None and tree.size <= nodes:
                return tree
        levels = max(2, levels - 1)


def _tree(
    rng: Random,
    type: Type,
    levels: int,
    full: bool,
    pools: dict[str, tuple[str, ...]],
    elements: Sequence[Type],
    constants: bool,
) -> Node | None:
    """A tree of at most `levels` levels, exactly that many along each path where it is `full`.

    `None` where it would exceed the limits of formulas.
    """

    def below(kind: Type) -> Node | None:
        return _tree(rng, kind, levels - 1, full, pools, elements, constants)

    leaf = levels <= 1 or (not full and rng.random() < LEAF_SHARE)
    if leaf and (type != "layer" or pools["layer"] or constants):
        return _leaf(rng, type, pools, constants)
    if levels <= 1:  # no number of layers to read: reduce a weight instead
        return Node(rng.choice(REDUCTIONS), (Node(rng.choice(pools[rng.choice(elements)])),))
    if rng.random() < BINARY_SHARE:
        kinds: list[Type] = [type, type]
        if type != "layer" and rng.random() < LAYER_SHARE:
            kinds[rng.randrange(2)] = "layer"
        name, args = rng.choice(BINARY), [below(kind) for kind in kinds]
    elif type == "layer" and rng.random() < REDUCTION_SHARE:
        name, args = rng.choice(REDUCTIONS), [below(rng.choice(elements))]
    else:
        own = ELEMENTWISE if type == "layer" else ELEMENTWISE + LAYERWISE
        name, args = rng.choice(own), [below(type)]
    found = tuple(arg for arg in args if arg is not None)
    if len(found) < len(args) or sum(arg.size for arg in found) >= MAX_NODES:
        return None
    return Node(name, found)


def _leaf(rng: Random, type: Type, pools: dict[str, tuple[str, ...]], constants: bool) -> Node:
    number = type == "layer" and constants
    if number and (not pools["layer"] or rng.random() < CONSTANT_SHARE):
        return constant(round(rng.uniform(-2.0, 2.0), 2))
    return Node(rng.choice(pools[type]))
