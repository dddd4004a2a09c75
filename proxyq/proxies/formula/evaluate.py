"""Values of many formulas at once, on what is known of a network's layers.

`Statistics` keeps the entries of all layers in one flat array for each leaf, so that an operation
is one NumPy call for the whole network. `evaluate` computes what formulas have in common once.

What operations mean on an entry x (those of EMQ, made safe):

    log      ln(x + 1e-9), and 0 where x <= 0       abslog   ln|x|, and 0 where x = 0
    exp      e^min(x, 80)                           sqrt     square root of max(x, 0)
    relu     max(x, 0)                              invert   1 / (x ± 1e-9), away from zero
    sigmoid  1 / (1 + e^-x)                         a / b    a times the invert of b

and on the entries of one layer:

    normalise  (x - mean) / std, 0 where std is 0   minmax   (x - min) / (max - min + 1e-9)
    l1         mean of |x|                          norm     square root of the sum of x^2
    softmax, logsoftmax: over the output channels at each position of the fan-in, as EMQ's over
    the first axis of a convolution's weight; of activations, over all that are known of a layer

A standard deviation below 1e-12 of the mean is rounding, and counts as 0.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from proxyq.errors import UsageError
from proxyq.proxies.formula.grammar import (
    CONSTANT,
    REDUCTIONS,
    STATISTICS,
    Node,
    Type,
)
from proxyq.proxies.formula.statistics import Segments, Statistics

TINY = 1e-9
MOST_EXPONENT = 80.0
ROUNDING = 1e-12
MEMORY = 1 << 28


def evaluate(
    formulas: Sequence[Node],
    statistics: Statistics,
    *,
    memory: int = MEMORY,
    tiny: float = TINY,
) -> list[np.ndarray | None]:
    """The numbers of each formula: `[layers]`, or `[layers, bits]` where it depends on bits.

    A formula with a number that is not finite is invalid: `None` stands in its place. Arrays that
    several formulas share are kept until the last has read them, in at most `memory` bytes; what
    does not fit is computed again. `tiny` is what operations are made safe by, above 1e-9: a proxy
    is evaluated as it stands, and another value shows what depends on it.

    **Raises** `UsageError` when a formula reads a leaf that the statistics do not have.
    """
    plan = _Plan(statistics.leaves)
    roots = [plan.root(formula) for formula in formulas]
    run = _Run(plan, statistics, memory, tiny)
    found: list[np.ndarray | None] = []
    with np.errstate(all="ignore"):
        for formula, root in zip(formulas, roots, strict=True):
            values = np.asarray(run.value(root), np.float64)
            shape: tuple[int, ...] = (len(statistics.layers),)
            if formula.depends_on_bits:
                shape = (len(statistics.bits), *shape)
            values = np.broadcast_to(values, shape)
            found.append(values.T.copy() if np.isfinite(values).all() else None)
    return found


def totals(values: np.ndarray, choices: Any, total: str) -> np.ndarray:
    """The score of each plan, `[plans]`: the `sum` or `mean` of its layers' numbers.

    - `values`: what `evaluate` gives, `[layers]` or `[layers, bits]`.
    - `choices`: for each plan and layer the place of its bit-width among the bits,
      `[plans, layers]`.
    """
    if total not in ("sum", "mean"):
        raise UsageError(f"`total` must be 'sum' or 'mean', got {total!r}.")
    choices = np.asarray(choices)
    if choices.ndim != 2 or choices.shape[1] != len(values):
        raise UsageError(
            f"`choices` must have the shape [plans, {len(values)}], got {choices.shape}."
        )
    if values.ndim == 2:
        chosen = values[np.arange(len(values)), choices]
    else:
        chosen = np.broadcast_to(values, choices.shape)
    # sum_l v[l, b_l], or over the number of layers
    return chosen.sum(axis=1) if total == "sum" else chosen.mean(axis=1)


class _Plan:
    """All formulas as one graph: equal parts are one step, after the steps that it reads."""

    def __init__(self, known: Mapping[str, Any]):
        self.known = known
        self.steps: list[tuple[str, float, tuple[int, ...], Type]] = []
        self.types: list[Type] = []
        self.uses: list[int] = []
        self.index: dict[tuple[Any, ...], int] = {}

    def root(self, node: Node) -> int:
        """The step of a whole formula, whose entries are averaged where it ends in them."""
        step = self.add(node)
        if node.type != "layer":
            step = self.step("mean", 0.0, (step,), "layer")
        self.uses[step] += 1
        return step

    def add(self, node: Node) -> int:
        """The step of a node, after those of its arguments."""
        if not node.args and node.name != CONSTANT and node.name not in self.known:
            raise UsageError(
                f"the formula reads {node.name!r}, which these statistics do not have: they hold "
                f"{', '.join(name for name in STATISTICS if name in self.known)}."
            )
        args = tuple([self.add(arg) for arg in node.args])
        return self.step(node.name, node.value, args, node.type)

    def step(self, name: str, value: float, args: tuple[int, ...], type: Type) -> int:
        """The number of a step, which is made where there is none like it."""
        key = (name, value, args)
        step = self.index.get(key)
        if step is None:
            step = self.index[key] = len(self.steps)
            # An operation goes over the entries of the type that it reads.
            over: Type = "layer"
            for arg in args:
                over = over if self.types[arg] == "layer" else self.types[arg]
            self.steps.append((name, value, args, over))
            self.types.append(type)
            self.uses.append(0)
            for arg in args:
                self.uses[arg] += 1
        return step


class _Run:
    """Computes steps; keeps what is read again while it fits into memory."""

    def __init__(self, plan: _Plan, statistics: Statistics, memory: int, tiny: float):
        self.plan = plan
        self.statistics = statistics
        self.left = list(plan.uses)
        self.kept: OrderedDict[int, Any] = OrderedDict()
        self.free = memory
        self.tiny = tiny

    def value(self, step: int) -> Any:
        """The value of a step for one reader; the last reader takes it out of memory."""
        self.left[step] -= 1
        value = self.kept.get(step)
        if value is not None:
            if self.left[step] <= 0:
                del self.kept[step]
                self.free += value.nbytes
            return value
        name, number, args, over = self.plan.steps[step]
        if name == CONSTANT:
            return np.float64(number)
        if not args:
            return self.statistics.leaves[name]
        segments = self.statistics.segments[over] if over != "layer" else None
        values = [self.value(arg) for arg in args]
        if len(args) == 2 and segments is not None:
            values = [
                spread(value, segments) if self.plan.types[arg] == "layer" else value
                for arg, value in zip(args, values, strict=True)
            ]
        safe = {"tiny": self.tiny} if name in GUARDED else {}
        if name in _ENTRY:
            value = _ENTRY[name](*values, **safe)
        else:
            assert segments is not None  # the grammar has refused it for numbers of layers
            value = (_REDUCE if name in REDUCTIONS else _LAYER)[name](values[0], segments, **safe)
        if self.left[step] > 0:
            self.keep(step, value)
        return value

    def keep(self, step: int, value: Any) -> None:
        """Put a value aside, in place of those that have waited longest."""
        while self.kept and self.free < value.nbytes:
            self.free += self.kept.popitem(last=False)[1].nbytes
        if self.free >= value.nbytes:
            self.kept[step] = value
            self.free -= value.nbytes


def spread(x: np.ndarray, segments: Segments) -> np.ndarray:
    """Numbers of layers `[…, layers]` as entries `[…, entries]`; what fits any layer stays."""
    if x.ndim == 0 or (x.shape[-1] == 1 and len(segments.counts) > 1):
        return x
    return np.repeat(x, segments.counts, axis=-1)


def log(x: np.ndarray, tiny: float = TINY) -> np.ndarray:
    """`ln(x + 1e-9)`, 0 where x <= 0."""
    return np.log(np.where(x <= 0, 1.0, x + tiny))


def abslog(x: np.ndarray) -> np.ndarray:
    """`ln|x|`, 0 where x = 0."""
    return np.log(np.where(x == 0, 1.0, np.abs(x)))


def invert(x: np.ndarray, tiny: float = TINY) -> np.ndarray:
    """`1 / (x + 1e-9)`, of negative x `1 / (x - 1e-9)`."""
    return divide(1.0, x, tiny)


def divide(a: Any, b: np.ndarray, tiny: float = TINY) -> np.ndarray:
    """`a / b`, b moved by 1e-9 from zero; adding 0 makes minus zero plus zero: both go one way."""
    return a / (b + np.copysign(tiny, b + 0.0))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """`1 / (1 + exp(-x))`, which overflow leaves right."""
    return 1.0 / (1.0 + np.exp(-x))


_ENTRY: dict[str, Callable[..., Any]] = {
    "log": log,
    "abslog": abslog,
    "abs": np.abs,
    "square": lambda x: x * x,
    "exp": lambda x: np.exp(np.minimum(x, MOST_EXPONENT)),
    "sqrt": lambda x: np.sqrt(np.maximum(x, 0.0)),
    "relu": lambda x: np.maximum(x, 0.0),
    "invert": invert,
    "sigmoid": sigmoid,
    "neg": np.negative,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": divide,
}


GUARDED = ("log", "invert", "div", "minmax")
"""Operations that `tiny` keeps finite."""


def apply(name: str, *args: float) -> float:
    """An entry operation on plain numbers, as `evaluate` would compute it."""
    with np.errstate(all="ignore"):
        return float(_ENTRY[name](*map(np.float64, args)))


def mean(x: np.ndarray, segments: Segments) -> np.ndarray:
    """Average of each layer's entries."""
    return np.add.reduceat(x, segments.starts, axis=-1) / segments.counts


def total(x: np.ndarray, segments: Segments) -> np.ndarray:
    """Sum over each layer's entries, those not kept included."""
    return np.add.reduceat(x, segments.starts, axis=-1) * segments.scale


def largest(x: np.ndarray, segments: Segments) -> np.ndarray:
    """Maximum of each layer's entries."""
    return np.maximum.reduceat(x, segments.starts, axis=-1)


def _deviation(x: np.ndarray, segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """x less its layer's mean, `[…, entries]`, and the standard deviation, `[…, layers]`."""
    centre = mean(x, segments)
    apart = x - spread(centre, segments)
    deviation = np.sqrt(mean(apart * apart, segments))
    return apart, np.where(deviation <= ROUNDING * np.abs(centre), 0.0, deviation)


def normalise(x: np.ndarray, segments: Segments) -> np.ndarray:
    """`(x - mean) / std` in each layer, 0 where all entries are the same."""
    apart, deviation = _deviation(x, segments)
    factor = np.where(deviation == 0, 0.0, 1.0 / deviation)
    return apart * spread(factor, segments)


def minmax(x: np.ndarray, segments: Segments, tiny: float = TINY) -> np.ndarray:
    """`(x - min) / (max - min + 1e-9)` in each layer."""
    low = np.minimum.reduceat(x, segments.starts, axis=-1)
    span = largest(x, segments) - low + tiny
    return (x - spread(low, segments)) * spread(1.0 / span, segments)


def _by_rows(x: np.ndarray, segments: Segments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x less its row's maximum, its exponential, and each row's sum of those."""
    top = np.maximum.reduceat(x, segments.row_starts, axis=-1)
    below = x - np.repeat(top, segments.row_counts, axis=-1)
    powers = np.exp(below)
    return below, powers, np.add.reduceat(powers, segments.row_starts, axis=-1)


def softmax(x: np.ndarray, segments: Segments) -> np.ndarray:
    """`e^x / sum e^x` in each row."""
    _, powers, sums = _by_rows(x, segments)
    return powers * np.repeat(1.0 / sums, segments.row_counts, axis=-1)


def logsoftmax(x: np.ndarray, segments: Segments) -> np.ndarray:
    """`x - ln sum e^x` in each row."""
    below, _, sums = _by_rows(x, segments)
    return below - np.repeat(np.log(sums), segments.row_counts, axis=-1)


_LAYER: dict[str, Callable[[np.ndarray, Segments], np.ndarray]] = {
    "normalise": normalise,
    "minmax": minmax,
    "softmax": softmax,
    "logsoftmax": logsoftmax,
}
_REDUCE: dict[str, Callable[[np.ndarray, Segments], np.ndarray]] = {
    "mean": mean,
    "sum": total,
    "l1": lambda x, segments: mean(np.abs(x), segments),
    "norm": lambda x, segments: np.sqrt(total(x * x, segments)),
    "std": lambda x, segments: _deviation(x, segments)[1],
    "max": largest,
}
