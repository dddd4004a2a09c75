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

Of a large layer some entries stand for all: positions of the fan-in at a fixed stride, each with
all its output channels, from a start that the seed draws. Sums are scaled by how many were left
out, which makes `sum` (and the square of `norm`) an unbiased estimate; `max` is that of the
entries kept.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from proxyq.errors import UsageError
from proxyq.proxies.formula.grammar import (
    CONSTANT,
    REDUCTIONS,
    STATISTICS,
    Node,
    Type,
)

TINY = 1e-9
MOST_EXPONENT = 80.0
ROUNDING = 1e-12
ENTRIES = 512
MEMORY = 1 << 28


@dataclass(frozen=True, kw_only=True, eq=False)
class Segments:
    """Which entries of a flat array belong together: those of each layer, and of each row.

    - `counts`, `[layers]`: entries of each layer; `scale`, `[layers]`: entries of the whole layer
      over those kept.
    - `row_counts`, `[rows]`: entries of each row; a softmax goes over a row.
    """

    counts: np.ndarray
    scale: np.ndarray
    row_counts: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each layer begins, `[layers]`."""
        return np.cumsum(self.counts) - self.counts

    @cached_property
    def row_starts(self) -> np.ndarray:
        """Where each row begins, `[rows]`."""
        return np.cumsum(self.row_counts) - self.row_counts

    @cached_property
    def size(self) -> int:
        """All entries."""
        return int(self.counts.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """What formulas read, of all layers of a network; make one with `build`.

    - `leaves`: `[entries]` by name, and `[bits, entries]` for those that depend on bits; of type
      `layer`, `[layers]`, and `[bits, 1]` for `bits`.
    - `segments`: how entries lie, of the types `weight` and `activation`.
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    leaves: Mapping[str, np.ndarray]
    segments: Mapping[str, Segments]

    @classmethod
    def build(
        cls,
        layers: Mapping[str, Mapping[str, Any]],
        bits: Sequence[int],
        *,
        entries: int | None = ENTRIES,
        seed: int = 0,
    ) -> "Statistics":
        """Statistics from arrays for each layer, by name of layer and leaf.

        - `W`, `G`, `F`, `V`, `H`: `[fan_in, channels]`; `D`: `[bits, fan_in, channels]`.
        - `A`: `[values]`; `E`: `[bits, values]`; `activations`: of how many values `A` is a
          sample (all, unless told).
        - `weights`, `macs`: numbers; `weights` is counted where a weight is given.
        - `entries`: how many of a layer are kept at most, though always one row of channels;
          `None` keeps all. `seed` draws where the kept ones begin.

        **Raises** `UsageError` naming layer and leaf for what is missing in one layer, has the
        wrong shape, or is not finite.
        """
        if not layers or not bits:
            raise UsageError("statistics must have at least one layer and one bit-width.")
        if entries is not None and entries < 1:
            raise UsageError(f"`entries` must be at least 1, or None for all, got {entries}.")
        names = _given(layers)
        rng = np.random.default_rng(seed)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        kept: dict[str, list[_Kept]] = {"weight": [], "activation": []}
        for layer, given in layers.items():
            phase = float(rng.random())  # drawn for each layer, whatever it holds
            for name in (name for name in names if STATISTICS[name].type == "layer"):
                number = _number(given[name], f"{name!r} of layer {layer!r}")
                parts[name].append(np.asarray([number]))
            for kind, found in kept.items():
                own = [name for name in names if STATISTICS[name].type == kind]
                if own:
                    found.append(_kept(layer, given, own, kind, len(bits), entries, phase))
                    for name, values in found[-1].values.items():
                        parts[name].append(values)
        leaves = {name: np.concatenate(found, axis=-1) for name, found in parts.items()}
        if "weights" not in leaves and kept["weight"]:
            leaves["weights"] = np.asarray([one.whole for one in kept["weight"]])
        leaves["bits"] = np.asarray(bits, np.float64)[:, None]
        segments = {
            kind: Segments(
                counts=np.asarray([sum(one.rows) for one in found]),
                scale=np.asarray([one.whole / sum(one.rows) for one in found]),
                row_counts=np.asarray([count for one in found for count in one.rows]),
            )
            for kind, found in kept.items()
            if found
        }
        return cls(layers=tuple(layers), bits=tuple(bits), leaves=leaves, segments=segments)


def evaluate(
    formulas: Sequence[Node], statistics: Statistics, *, memory: int = MEMORY
) -> list[np.ndarray | None]:
    """The numbers of each formula: `[layers]`, or `[layers, bits]` where it depends on bits.

    A formula with a number that is not finite is invalid: `None` stands in its place. Arrays that
    several formulas share are kept until the last has read them, in at most `memory` bytes; what
    does not fit is computed again.

    **Raises** `UsageError` when a formula reads a leaf that the statistics do not have.
    """
    plan = _Plan(statistics.leaves)
    roots = [plan.root(formula) for formula in formulas]
    run = _Run(plan, statistics, memory)
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

    def __init__(self, plan: _Plan, statistics: Statistics, memory: int):
        self.plan = plan
        self.statistics = statistics
        self.left = list(plan.uses)
        self.kept: OrderedDict[int, Any] = OrderedDict()
        self.free = memory

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
        if name in _ENTRY:
            value = _ENTRY[name](*values)
        else:
            assert segments is not None  # the grammar has refused it for numbers of layers
            value = (_REDUCE if name in REDUCTIONS else _LAYER)[name](values[0], segments)
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


def log(x: np.ndarray) -> np.ndarray:
    """`ln(x + 1e-9)`, 0 where x <= 0."""
    return np.log(np.where(x <= 0, 1.0, x + TINY))


def abslog(x: np.ndarray) -> np.ndarray:
    """`ln|x|`, 0 where x = 0."""
    return np.log(np.where(x == 0, 1.0, np.abs(x)))


def invert(x: np.ndarray) -> np.ndarray:
    """`1 / (x + 1e-9)`, of negative x `1 / (x - 1e-9)`."""
    return np.divide(1.0, away_from_zero(x))


def away_from_zero(x: np.ndarray) -> np.ndarray:
    """x moved by 1e-9 from zero; adding 0 makes minus zero plus zero, so that both go one way."""
    return x + np.copysign(TINY, x + 0.0)


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
    "div": lambda a, b: a / away_from_zero(b),
}


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


def minmax(x: np.ndarray, segments: Segments) -> np.ndarray:
    """`(x - min) / (max - min + 1e-9)` in each layer."""
    low = np.minimum.reduceat(x, segments.starts, axis=-1)
    span = largest(x, segments) - low + TINY
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


def _given(layers: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The leaves that layers are given, in the order of `STATISTICS`: all have the same."""
    first, *others = layers
    for name in layers[first]:
        if name == "bits" or (name not in STATISTICS and name != "activations"):
            raise UsageError(
                f"layer {first!r} must be given statistics of "
                f"{', '.join(n for n in STATISTICS if n != 'bits')}, got {name!r}."
            )
    for other in others:
        for name in (*layers[first], *layers[other]):
            if (name in layers[first]) != (name in layers[other]):
                lacks = other if name in layers[first] else first
                raise UsageError(f"layer {lacks!r} has no {name!r}, which another layer has.")
    return tuple(name for name in STATISTICS if name in layers[first])


class _Kept(NamedTuple):
    """What is kept of a layer: flat values by leaf, entries by row, and how many there are."""

    values: dict[str, np.ndarray]
    rows: list[int]
    whole: float


def _kept(
    layer: str,
    given: Mapping[str, Any],
    own: Sequence[str],
    kind: str,
    bits: int,
    entries: int | None,
    phase: float,
) -> _Kept:
    """The same entries of all a layer's statistics of one type."""
    arrays = {name: _array(given[name], f"{name!r} of layer {layer!r}") for name in own}
    shape = _shape(arrays, own, kind, bits, layer)
    rows, columns = shape if kind == "weight" else (shape[0], 1)
    picked = _rows(rows, columns, entries, phase)
    values = {}
    for name, array in arrays.items():
        lead = (bits,) if STATISTICS[name].bits else ()
        values[name] = array.reshape(*lead, rows, columns)[..., picked, :].reshape(*lead, -1)
    if kind == "weight":
        return _Kept(values, [columns] * len(picked), float(rows * columns))
    whole = _number(given.get("activations", rows), f"'activations' of layer {layer!r}")
    if whole < rows:
        raise UsageError(
            f"'activations' of layer {layer!r} must be at least the {rows} values that are given, "
            f"got {whole:g}."
        )
    return _Kept(values, [len(picked)], whole)


def _array(value: Any, what: str) -> np.ndarray:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"{what} must be numbers, got {type(value).__name__}.") from None
    if not array.size or not np.isfinite(array).all():
        raise UsageError(f"{what} must be finite numbers, at least one: check the model.")
    return array


def _number(value: Any, what: str) -> float:
    array = _array(value, what)
    if array.size != 1:
        raise UsageError(f"{what} must be one number, got the shape {array.shape}.")
    return float(array.item())


def _shape(
    arrays: Mapping[str, np.ndarray], own: Sequence[str], kind: str, bits: int, layer: str
) -> tuple[int, ...]:
    """The shape that all statistics of a type have in common, without bits."""
    first: tuple[int, ...] | None = None
    for name in own:
        shape, wanted = arrays[name].shape, 2 if kind == "weight" else 1
        if STATISTICS[name].bits:
            lead, shape = shape[:1], shape[1:]
            if lead != (bits,):
                raise UsageError(
                    f"{name!r} of layer {layer!r} must have one array for each of {bits} "
                    f"bit-widths, got the shape {arrays[name].shape}."
                )
        if len(shape) != wanted or (first is not None and shape != first):
            form = first or ("[fan_in, channels]" if kind == "weight" else "[values]")
            raise UsageError(
                f"{name!r} of layer {layer!r} must have the shape {form}, got {shape}."
            )
        first = shape
    assert first is not None
    return first


def _rows(rows: int, columns: int, entries: int | None, phase: float) -> np.ndarray:
    """Which rows are kept: at a stride that shares no factor with their number, in order.

    Such a stride meets every row once before it meets one again, and goes through all positions
    of a kernel. With a start that is as likely to be any row, so is each row to be kept.
    """
    keep = rows if entries is None else min(rows, max(1, entries // columns))
    if keep == rows:
        return np.arange(rows)
    stride = max(1, rows // keep)
    while math.gcd(stride, rows) > 1:
        stride += 1
    return np.sort((int(phase * rows) + stride * np.arange(keep)) % rows)
