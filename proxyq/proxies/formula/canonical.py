"""One form for formulas that are written differently and mean the same.

Every rewriting holds for floating-point numbers as `evaluate.py` computes with them: values stay
the same up to rounding, and so does whether they are finite. What holds on paper alone is left
as it is: `x - x` (infinity), `sqrt(square(x))` (underflow), `x / 1` and `invert(invert(x))`
(protected), sums of three in another order.
"""

import math

from proxyq.errors import UsageError
from proxyq.proxies.formula.evaluate import apply
from proxyq.proxies.formula.grammar import (
    BINARY,
    COMMUTATIVE,
    ELEMENTWISE,
    MAX_CONSTANT,
    Node,
    constant,
    is_constant,
    rooted,
)
from proxyq.proxies.formula.text import print_formula

_EVEN = ("abs", "square", "abslog", "l1", "norm", "std")
_BLIND_TO_ABS = ("abs", "square", "abslog", "l1", "norm")
_BLIND_TO_RELU = ("relu", "sqrt", "log")
_ODD = ("mean", "sum")
_NEVER_NEGATIVE = frozenset(
    {"abs", "square", "exp", "sqrt", "relu", "sigmoid", "softmax", "minmax", "l1", "norm", "std"}
)


def canonical(node: Node) -> Node:
    """The same formula in canonical form, its root of type `layer`.

    A tree at the limit of levels, which its form would exceed, is returned as it is.
    """
    try:
        return _canonical(rooted(node))
    except UsageError:
        return node


def _canonical(node: Node) -> Node:
    return _make(node.name, *map(_canonical, node.args)) if node.args else node


def _make(name: str, *args: Node) -> Node:
    """A node in canonical form, of arguments in canonical form."""
    if all(map(is_constant, args)):
        folded = _folded(name, *args)
        if folded is not None:
            return folded
    if name in BINARY:
        return _binary(name, *args)
    return _unary(name, args[0])


def _folded(name: str, *args: Node) -> Node | None:
    """A constant in place of an operation on constants, where it is one."""
    assert name in ELEMENTWISE or name in BINARY  # nothing else takes numbers of layers
    value = apply(name, *(arg.value for arg in args))
    return constant(value) if math.isfinite(value) and abs(value) <= MAX_CONSTANT else None


def _unary(name: str, x: Node) -> Node:
    if name in _EVEN:
        if x.name == "neg":  # |-x| = |x|
            return _make(name, x.args[0])
        if x.name == "sub" and _order(x.args[0]) > _order(x.args[1]):  # |a - b| = |b - a|
            return _make(name, _make("sub", x.args[1], x.args[0]))
    if name in _BLIND_TO_ABS and x.name == "abs":  # square(|x|) = square(x)
        return _make(name, x.args[0])
    if name in _BLIND_TO_RELU and x.name == "relu":  # sqrt(max(x, 0)), with a maximum of its own
        return _make(name, x.args[0])
    if name in ("abs", "relu") and never_negative(x):
        return x
    if name == "l1" and never_negative(x):  # mean |x| = mean x
        return _make("mean", x)
    if name == "mean" and x.name == "abs":
        return _make("l1", x.args[0])
    if name in _ODD and x.name == "neg":  # sum(-x) = -sum(x)
        return _make("neg", _make(name, x.args[0]))
    if name == "neg":
        return _negative(x)
    return Node(name, (x,))


def _negative(x: Node) -> Node:
    if x.name == "neg":  # -(-x) = x
        return x.args[0]
    if x.name == "sub":  # -(a - b) = b - a
        return _make("sub", x.args[1], x.args[0])
    if x.name in ("mul", "div") and is_constant(x.args[0]):  # -(c x) = (-c) x
        return _make(x.name, _make("neg", x.args[0]), x.args[1])
    return Node("neg", (x,))


def _binary(name: str, a: Node, b: Node) -> Node:
    if name in COMMUTATIVE and _order(a) > _order(b):
        a, b = b, a
    if name == "add":
        if is_constant(a) and a.value == 0:  # 0 + x = x
            return b
        if a == b:  # x + x = 2 x, exactly
            return _make("mul", constant(2), a)
        if a.name == "neg" and b.name == "neg":  # -a + -b = -(a + b)
            return _make("neg", _make("add", a.args[0], b.args[0]))
        if b.name == "neg":  # a + -b = a - b
            return _make("sub", a, b.args[0])
        if a.name == "neg":
            return _make("sub", b, a.args[0])
    if name == "sub":
        if is_constant(b):  # x - c = -c + x
            return _make("add", _make("neg", b), a)
        if is_constant(a) and a.value == 0:  # 0 - x = -x
            return _make("neg", b)
        if b.name == "neg":  # a - -b = a + b
            return _make("add", a, b.args[0])
        if a.name == "neg":  # -a - b = -(a + b)
            return _make("neg", _make("add", a.args[0], b))
    if name == "mul":
        if is_constant(a) and a.value == 1:  # 1 x = x
            return b
        if is_constant(a) and a.value == -1:  # -1 x = -x
            return _make("neg", b)
        if is_constant(a) and b.name == "neg":  # c (-x) = (-c) x
            return _make("mul", _make("neg", a), b.args[0])
        if a == b:  # x x = square(x), exactly
            return _make("square", a)
    if name in ("mul", "div") and a.name == "neg":  # (-a) b = -(a b)
        return _make("neg", _make(name, a.args[0], b))
    if name == "mul" and b.name == "neg":
        return _make("neg", _make(name, a, b.args[0]))
    return Node(name, (a, b))


def never_negative(node: Node) -> bool:
    """Whether no value of the node is below zero, as far as its operations tell."""
    if is_constant(node):
        return node.value >= 0
    if node.name in ("add", "mul", "div", "mean", "sum", "max", "invert"):
        return all(map(never_negative, node.args))
    return node.name in _NEVER_NEGATIVE


def _order(node: Node) -> tuple[bool, int, str]:
    """Constants first, then the shorter, then by text."""
    return not is_constant(node), node.size, print_formula(node)
