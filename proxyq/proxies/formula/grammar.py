"""Proxy formulas as data: typed expression trees over what is known of each layer.

A formula gives one number for each layer, and for each bit-width where it reads one. Its leaves
are statistics of a layer, in three types:

- `weight`: one value for each entry of the layer's weight, `[fan_in, channels]`;
- `activation`: one value for each sampled activation, `[values]`;
- `layer`: one number for each layer, or each layer and bit-width.

Unary operations keep the type, reductions go from `weight` or `activation` to `layer`, binary
operations take two equal types, or a `layer` with any. What reads a bit-width (`bits`, and the
errors `D`, `E`, `O`, `R`) makes all above it depend on bits.

The operations are those published with EMQ (Dong et al., ICCV 2023, arXiv:2307.10554) and with
proxy searches like it; its matrix product is left out, since the product of two weights has a
shape that no other operation can join. Each operation is protected, so that no entry leaves the
numbers: `evaluate.py` says how.

A `Node` checks itself when it is made: whatever tree there is has correct types and at most
`MAX_NODES` nodes in `MAX_DEPTH` levels, so that no function here can run out of stack.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from proxyq.errors import UsageError, near

Type = Literal["weight", "activation", "layer"]
MAX_NODES = 500
MAX_DEPTH = 60
MAX_CONSTANT = 1e30
CONSTANT = "constant"


class Statistic(NamedTuple):
    """A leaf: its type, whether it depends on the bit-width, what the engine records for it."""

    type: Type
    bits: bool
    needs: tuple[str, ...]
    meaning: str


STATISTICS = {
    "W": Statistic("weight", False, ("weight",), "weight, batch norm folded in"),
    "G": Statistic("weight", False, ("gradient",), "gradient of the mean loss"),
    "F": Statistic("weight", False, ("gradient-squares",), "mean over images of squared gradients"),
    "V": Statistic(
        "weight", False, ("weight",), "virtual gradient: positive weights, input of ones"
    ),
    "H": Statistic("weight", False, ("engine",), "probe of the Hessian's diagonal, z (H z)"),
    "D": Statistic("weight", True, ("weight",), "rounding error of the weight, Q_b(W) - W"),
    "A": Statistic("activation", False, ("sample",), "sampled activations"),
    "E": Statistic("activation", True, ("sample",), "rounding error of them, Q_b(A) - A"),
    "O": Statistic(
        "layer", True, ("output-error",), "relative error of the layer's output, weight rounded"
    ),
    "R": Statistic(
        "layer", True, ("restored-error",), "the same with its channels' statistics restored"
    ),
    "bits": Statistic("layer", True, (), "the bit-width b"),
    "weights": Statistic("layer", False, ("weight",), "how many weights the layer has"),
    "macs": Statistic("layer", False, (), "multiplications for one image"),
}
ELEMENTWISE = ("log", "abslog", "abs", "square", "exp", "sqrt", "relu", "invert", "sigmoid", "neg")
LAYERWISE = ("normalise", "minmax", "softmax", "logsoftmax")
REDUCTIONS = ("mean", "sum", "l1", "norm", "std", "max")
BINARY = ("add", "sub", "mul", "div")
COMMUTATIVE = ("add", "mul")
OPERATIONS = {
    **dict.fromkeys(ELEMENTWISE, 1),
    **dict.fromkeys(LAYERWISE, 1),
    **dict.fromkeys(REDUCTIONS, 1),
    **dict.fromkeys(BINARY, 2),
}
"""How many arguments each operation takes."""


@dataclass(frozen=True)
class Node:
    """One node of a formula: a statistic, a constant, or an operation on other nodes.

    `Node("W")`, `constant(0.5)`, `Node("mul", (one, other))`. Equal trees are equal and have the
    same hash. `type`, `size` (nodes, this one included), `depth` (levels, a leaf has one) and
    `depends_on_bits` follow from what the node is made of.

    **Raises** `UsageError` for an unknown name, arguments of wrong number or type, a constant
    that is not finite or beyond `MAX_CONSTANT`, and a tree that is too large.
    """

    name: str
    args: "tuple[Node, ...]" = ()
    value: float = 0.0
    type: Type = field(init=False, compare=False, repr=False)
    size: int = field(init=False, compare=False, repr=False)
    depth: int = field(init=False, compare=False, repr=False)
    depends_on_bits: bool = field(init=False, compare=False, repr=False)
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        if not (isinstance(self.args, tuple) and all(isinstance(a, Node) for a in self.args)):
            raise UsageError(f"`args` of a node must be a tuple of nodes, got {self.args!r}.")
        if self.name == CONSTANT:
            put(self, "value", _checked_constant(self.value))
        elif self.value:
            raise UsageError(f"only a constant has a value: {self.name!r} got {self.value!r}.")
        put(self, "type", _type_of(self.name, self.args))
        put(self, "size", 1 + sum(arg.size for arg in self.args))
        put(self, "depth", 1 + max((arg.depth for arg in self.args), default=0))
        if self.size > MAX_NODES:
            raise UsageError(
                f"a formula must have at most {MAX_NODES} nodes, got {self.size}: make it shorter."
            )
        if self.depth > MAX_DEPTH:
            raise UsageError(
                f"a formula must be at most {MAX_DEPTH} levels deep, got {self.depth}: nest less."
            )
        own = self.name in STATISTICS and STATISTICS[self.name].bits
        put(self, "depends_on_bits", own or any(arg.depends_on_bits for arg in self.args))
        # Made once from the hashes below, or each look into a dictionary would walk the tree.
        put(self, "_hash", hash((self.name, self.value, tuple(arg._hash for arg in self.args))))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> Any:
        # Made anew in another process, whose hashes of text are others.
        return Node, (self.name, self.args, self.value)

    def walk(self) -> "Iterator[Node]":
        """All nodes of the tree, this one first, then those of each argument in turn."""
        yield self
        for arg in self.args:
            yield from arg.walk()

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the statistics that are read, in the order of `STATISTICS`."""
        found = {node.name for node in self.walk()}
        return tuple(name for name in STATISTICS if name in found)

    def needs(self) -> tuple[str, ...]:
        """What the engine must record for the leaves (keys of `proxyq.engine.NEEDS`).

        `V` and `H` are made from what their need gives: see `synflow` and `hessian-trace`.
        """
        needs = [need for name in self.leaves for need in STATISTICS[name].needs]
        return tuple(dict.fromkeys(needs))

    def __str__(self) -> str:
        from proxyq.proxies.formula.text import print_formula

        return print_formula(self)


def constant(value: float) -> Node:
    """A number as a node."""
    return Node(CONSTANT, (), value)


def is_constant(node: Node) -> bool:
    """Whether the node is a number."""
    return node.name == CONSTANT


def rooted(node: Node) -> Node:
    """The formula with one number for each layer: entries are averaged, as EMQ does."""
    return node if node.type == "layer" else Node("mean", (node,))


def _checked_constant(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"a constant must be a number, got {value!r}.")
    # Compared as it is: a whole number may be too long to become a float.
    if not -MAX_CONSTANT <= value <= MAX_CONSTANT or math.isnan(value):
        shown = f"{value:g}" if isinstance(value, float) else "a longer one"
        raise UsageError(
            f"a constant must be a finite number of at most {MAX_CONSTANT:g}, got {shown}."
        )
    return float(value) + 0.0  # there is one zero only


def _type_of(name: str, args: tuple[Node, ...]) -> Type:
    if name == CONSTANT or name in STATISTICS:
        if args:
            raise UsageError(f"{name!r} takes no arguments, got {len(args)}.")
        return "layer" if name == CONSTANT else STATISTICS[name].type
    if name not in OPERATIONS:
        raise UsageError(f"unknown operation {name!r}: {near(name, [*OPERATIONS, *STATISTICS])}")
    wanted = OPERATIONS[name]
    if len(args) != wanted:
        plural = "s" * (wanted != 1)
        raise UsageError(f"{name!r} takes {wanted} argument{plural}, got {len(args)}.")
    first, last = args[0].type, args[-1].type
    if name in LAYERWISE or name in REDUCTIONS:
        if first == "layer":
            raise UsageError(
                f"{name!r} must have entries of a weight or activations to go over, got one "
                "number for each layer: leave it out."
            )
        return first if name in LAYERWISE else "layer"
    if first == last or last == "layer":
        return first
    if first == "layer":
        return last
    raise UsageError(
        f"{name!r} must have arguments that go together, got entries of {first} and of {last}: "
        "reduce one of them first, for example by mean(...)."
    )
