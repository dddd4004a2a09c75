"""What an allocation problem is: one choice of bits per layer, least total cost, hard limits.

    minimise  sum_l cost[l, k_l] + x' G x   subject to   fixed_m + sum_l usage_m[l, k_l] <= budget_m

over one column k_l per layer, where the layers of a group take the same column. G, where there
is one, couples the choices x (one-hot) of different layers (CLADO). A column is a
weight bit-width bits[k] and, where these are decided too, the number group_sizes[k] of weights
that share a grid and the bit-width activation_bits[k] of the layer's input. Usages and budgets
are exact integers, so that "within the budget" is a fact and not a tolerance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from proxyq.errors import ProxyqError, UsageError, shown
from proxyq.widths import GroupedBits, check_group_size, with_groups

# The sum of all usages of a limit stays below this, so that int64 arithmetic is exact.
USAGE_CEILING = 2**62


class InfeasibleError(ProxyqError):
    """No assignment keeps all limits; the message says what is reachable and why."""


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.array(array, order="C", copy=True)
    array.setflags(write=False)
    return array


def exact_integer(value: Any, what: str) -> int:
    """`value` as a Python int, if it is an integer and not a bool; else `UsageError`."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise UsageError(f"{what} must be an integer, got {shown(value)}.")


def check_widths(
    bits: Sequence[int], what: str = "`bits`", *, distinct: bool = True
) -> tuple[int, ...]:
    """`bits` as a tuple: at least one, distinct, each 1..8 or 16; else `UsageError`.

    Those that bring a group size are kept as they are.
    """
    checked = tuple(
        b if isinstance(b, GroupedBits) else exact_integer(b, f"every bit-width in {what}")
        for b in bits
    )
    if not checked:
        raise UsageError(f"{what} must name at least one bit-width, got none.")
    for b in checked:
        if not (1 <= b <= 8 or b == 16):
            raise UsageError(f"a bit-width in {what} must be 1 to 8 or 16, got {shown(b)}.")
    if distinct and len(set(checked)) < len(checked):
        twice = next(b for b in checked if checked.count(b) > 1)
        raise UsageError(f"{what} names the bit-width {twice} twice; name each once.")
    return checked


@dataclass(frozen=True, kw_only=True, eq=False)
class Limit:
    """`fixed + sum of usage <= budget`, in whole raw amounts (bits, operations).

    - `usage`: int64 `[layers, bits]`, not negative; given for all columns, also those that
      are not allowed, so that the effect of a pin can be told.
    - `fixed`: what is counted but belongs to none of the layers.
    - `unit`, `per_unit`: how users write the amount; `per_unit` raw amounts make one unit.
    - `ends`: the raw amounts that 0 and 100 units stand for, where the unit is a share of the
      way between them; `per_unit` is not read then.
    - `asked`: the budget as the user wrote it, in units; `None` means the budget itself.
    - `part`: which one of several limits that are one budget together, such as a layer at which
      memory is taken; the largest of them is what is achieved.
    """

    name: str
    usage: np.ndarray
    budget: int
    unit: str = ""
    fixed: int = 0
    per_unit: Fraction = Fraction(1)
    ends: tuple[int, int] | None = None
    asked: Fraction | None = None
    part: str = ""

    def __post_init__(self) -> None:
        usage = np.asarray(self.usage)
        if usage.ndim != 2:
            raise UsageError(
                f"the usage of the limit {self.name!r} must have the shape [layers, bits], got "
                f"{usage.shape}."
            )
        if usage.dtype.kind not in "iu":
            whole = usage.dtype.kind == "O" and all(
                isinstance(u, (int, np.integer)) for u in usage.flat
            )
            if not whole:
                raise UsageError(
                    f"the usage of the limit {self.name!r} must be integers, got "
                    f"{usage.dtype.name}; give it in whole smaller units."
                )
        object.__setattr__(self, "budget", exact_integer(self.budget, f"budget of {self.name!r}"))
        object.__setattr__(self, "fixed", exact_integer(self.fixed, f"fixed part of {self.name!r}"))
        object.__setattr__(self, "per_unit", Fraction(self.per_unit))
        if self.per_unit <= 0:
            raise UsageError(f"`per_unit` of the limit {self.name!r} must be positive.")
        if self.fixed < 0 or (usage.size and int(usage.min()) < 0):
            raise UsageError(f"the usage of the limit {self.name!r} must not be negative.")
        largest = sum((int(u) for u in usage.max(axis=1)), 0) if usage.size else 0
        if largest + self.fixed + abs(self.budget) >= USAGE_CEILING:
            raise UsageError(
                f"the usage of the limit {self.name!r} reaches 2^62 and cannot be summed exactly; "
                "give it in larger units."
            )
        object.__setattr__(self, "usage", _frozen(usage.astype(np.int64)))

    def in_units(self, raw: int | Fraction) -> Fraction:
        """A raw amount in the unit that users write."""
        if self.ends is None:
            return Fraction(raw) / self.per_unit
        low, high = self.ends
        # Ends that meet leave no way to share out: all that is reachable is then 0 %.
        return Fraction(100 * (raw - low)) / max(high - low, 1)

    @property
    def asked_in_units(self) -> Fraction:
        """The budget in the unit that users write."""
        return self.in_units(self.budget) if self.asked is None else self.asked

    def show(self, *raw: int) -> list[str]:
        """Raw amounts as text with the unit, with digits enough to tell all of them apart."""
        return self.show_units(*(self.in_units(r) for r in raw))

    def show_units(self, *amounts: Fraction) -> list[str]:
        """Like `show`, for amounts that are in units already."""
        for digits in range(4, 18):
            texts = [f"{float(amount):.{digits}g}" for amount in amounts]
            if len(set(texts)) == len(set(amounts)):
                break
        return [f"{text} {self.unit}".rstrip() for text in texts]  # type: ignore[possibly-unbound]


@dataclass(frozen=True, kw_only=True)
class Pin:
    """Layers held at one bit-width by the user's wish `text`.

    `free` are the columns these layers could take without the pin.
    """

    text: str
    layers: tuple[int, ...]
    free: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One choice of bits per layer, at least total cost, within all limits.

    - `layers`: names, `[layers]`; `bits`: the weight bit-width of every column, `[bits]`.
    - `activation_bits`: the activation bit-width of every column beside it, `None` in a column
      for float; `None` for all: activations are no part of the problem.
    - `group_sizes`: how many weights share a grid in every column, `None` in a column for one grid
      a channel; `None` for all: they are no part of the problem. Columns are distinct as triples.
    - `cost`: float64 `[layers, bits]`, predicted rise of the loss (nats unless said
      otherwise); what is not allowed may hold anything and is stored as infinity.
    - `coupling`: float64 `[layers * bits, layers * bits]`, symmetric, or `None`: what two
      choices add together beside their own costs, each pair in both of its places; choice
      `l * len(bits) + k` is layer `l` at column `k`. Entries within a layer are read only on
      the diagonal, yet a matrix that keeps all of them may be positive semidefinite where it
      would not be without. Rows of what is not allowed are stored as zeros.
    - `allowed`: bool `[layers, bits]`, all by default.
    - `limits`: hard, all at once.
    - `groups`: layers, by index, that take the same column; disjoint.
    - `pins`: which layers are held where, already expressed in `allowed`; kept so that an
      infeasible problem can say which wish causes it.
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    cost: np.ndarray
    allowed: np.ndarray = None  # type: ignore[assignment]
    limits: tuple[Limit, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    pins: tuple[Pin, ...] = ()
    activation_bits: tuple[int | None, ...] | None = None
    coupling: np.ndarray | None = None
    group_sizes: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "layers", tuple(self.layers))
        alone = self.activation_bits is None and self.group_sizes is None
        put(self, "bits", tuple(map(int, check_widths(self.bits, distinct=alone))))
        if self.group_sizes is not None:
            put(self, "group_sizes", self._checked_groups(self.group_sizes))
        if self.activation_bits is not None:
            put(self, "activation_bits", self._checked_activations(self.activation_bits))
        self._check_distinct()
        put(self, "limits", tuple(self.limits))
        put(self, "pins", tuple(self.pins))
        put(self, "groups", tuple(tuple(int(i) for i in group) for group in self.groups))
        shape = (len(self.layers), len(self.bits))
        if not self.layers:
            raise UsageError("a problem needs at least one layer, got none.")
        if len(set(self.layers)) < len(self.layers):
            twice = next(n for n in self.layers if self.layers.count(n) > 1)
            raise UsageError(f"the layer {twice!r} is given twice; layer names must be distinct.")
        allowed = np.ones(shape, bool) if self.allowed is None else np.asarray(self.allowed)
        if allowed.shape != shape or allowed.dtype != np.bool_:
            raise UsageError(
                f"`allowed` must be bool of shape [layers, bits] = {list(shape)}, got "
                f"{allowed.dtype.name} of shape {list(allowed.shape)}."
            )
        put(self, "allowed", _frozen(allowed))
        try:
            cost = np.asarray(self.cost, np.float64)
        except (TypeError, ValueError) as error:
            raise UsageError(f"`cost` must be numbers of shape [layers, bits]: {error}.") from error
        if cost.shape != shape:
            raise UsageError(
                f"`cost` must have the shape [layers, bits] = {list(shape)}, got "
                f"{list(cost.shape)}."
            )
        self._check_candidates()
        self._check_cost(cost)
        put(self, "cost", _frozen(np.where(allowed, cost, np.inf)))
        if self.coupling is not None:
            put(self, "coupling", self._checked_coupling(self.coupling))
        self._check_limits(shape)

    def _checked_activations(self, given: Sequence[int | None]) -> tuple[int | None, ...]:
        given = tuple(given)
        check_widths(
            [b for b in given if b is not None] or [1], "`activation_bits`", distinct=False
        )
        if len(given) != len(self.bits):
            raise UsageError(
                f"`activation_bits` must have an entry for each of the {len(self.bits)} columns, "
                f"got {len(given)}."
            )
        return given

    def _checked_groups(self, given: Sequence[int | None]) -> tuple[int | None, ...]:
        given = tuple(None if size is None else check_group_size(size) for size in given)
        if len(given) != len(self.bits):
            raise UsageError(
                f"`group_sizes` must have an entry for each of the {len(self.bits)} columns, got "
                f"{len(given)}."
            )
        return given

    def _check_distinct(self) -> None:
        beside = self.activation_bits or (None,) * len(self.bits)
        pairs = list(zip(self.widths, beside, strict=True))
        if len(set(pairs)) < len(pairs):
            bits, activations = next(pair for pair in pairs if pairs.count(pair) > 1)
            words = f"weights at {bits} bits"
            if self.activation_bits is not None:
                words += f" with activations at {activations or 'float'}"
            raise UsageError(f"{words} are given twice; name each choice once.")

    def _checked_coupling(self, given: Any) -> np.ndarray:
        try:
            matrix = np.array(given, np.float64)
        except (TypeError, ValueError) as error:
            raise UsageError(f"`coupling` must be a matrix of numbers: {error}.") from error
        size = len(self.layers) * len(self.bits)
        if matrix.shape != (size, size):
            raise UsageError(
                f"`coupling` must have the shape [layers * bits, layers * bits] = [{size}, {size}]"
                f", got {list(matrix.shape)}."
            )
        closed = ~self.allowed.ravel()
        matrix[closed], matrix[:, closed] = 0.0, 0.0
        if not np.isfinite(matrix).all():
            row, column = np.argwhere(~np.isfinite(matrix))[0]
            a, b = (f"{self._choice(i)}" for i in (row, column))
            raise UsageError(f"the coupling of {a} with {b} is {matrix[row, column]}.")
        largest = np.abs(matrix).max()
        if not np.isfinite(largest * 4 * len(self.layers) ** 2):
            raise UsageError("the couplings are too large to be summed; divide them by a constant.")
        if (np.abs(matrix - matrix.T) > 1e-9 * largest).any():
            row, column = np.unravel_index(np.abs(matrix - matrix.T).argmax(), matrix.shape)
            a, b = self._choice(int(row)), self._choice(int(column))
            raise UsageError(
                f"`coupling` must be symmetric: {a} with {b} has {matrix[row, column]:g}, the "
                f"other way round {matrix[column, row]:g}."
            )
        return _frozen((matrix + matrix.T) / 2)

    def _choice(self, index: int) -> str:
        layer, column = divmod(int(index), len(self.bits))
        return f"layer {self.layers[layer]!r} at {self.shown(column)} bits"

    def shown(self, column: int) -> str:
        """What a column stands for: `4`, `4g64` in groups, `4/8` with activations decided too."""
        if self.activation_bits is None:
            return str(self.widths[column])
        activations = self.activation_bits[column]
        return f"{self.widths[column]}/{'float' if activations is None else activations}"

    @property
    def widths(self) -> tuple[int, ...]:
        """`bits` with the group sizes that columns have: `GroupedBits` there."""
        sizes = self.group_sizes or (None,) * len(self.bits)
        return tuple(map(with_groups, self.bits, sizes))

    def _check_cost(self, cost: np.ndarray) -> None:
        bad = np.argwhere(self.allowed & ~np.isfinite(cost))
        if len(bad):
            layer, column = bad[0]
            raise UsageError(
                f"the cost of layer {self.layers[layer]!r} at {self.shown(column)} bits is "
                f"{cost[layer, column]}; leave out that bit-width or find out why its score is "
                "not a number."
            )
        with np.errstate(over="ignore"):
            total = np.abs(np.where(self.allowed, cost, 0.0)).sum()
        if not np.isfinite(total * 4):
            raise UsageError("the costs are too large to be summed; divide them by a constant.")

    def _check_candidates(self) -> None:
        seen: set[int] = set()
        for group in self.groups:
            for i in group:
                if not 0 <= i < len(self.layers):
                    raise UsageError(
                        f"a group names layer number {i}, but there are {len(self.layers)} layers."
                    )
                if i in seen:
                    raise UsageError(f"layer {self.layers[i]!r} is in two groups; join them.")
                seen.add(i)
        for i, name in enumerate(self.layers):
            if not self.allowed[i].any():
                raise UsageError(f"layer {name!r} has no bit-width left to choose from.")
        for group in self.groups:
            if group and not self.allowed[list(group)].all(axis=0).any():
                names = ", ".join(repr(self.layers[i]) for i in group)
                raise UsageError(
                    f"the layers {names} must share one bit-width but have none in common."
                )

    def _check_limits(self, shape: tuple[int, int]) -> None:
        for limit in self.limits:
            if limit.usage.shape != shape:
                raise UsageError(
                    f"the usage of the limit {limit.name!r} must have the shape [layers, bits] = "
                    f"{list(shape)}, got {list(limit.usage.shape)}."
                )
        labels = [(limit.name, limit.unit, limit.part) for limit in self.limits]
        if len(set(labels)) < len(labels):
            name, unit, _ = next(label for label in labels if labels.count(label) > 1)
            raise UsageError(f"the limit {name!r} in {unit or 'one unit'} is given twice.")
        for first, *others in self.budgets:
            for other in others:
                if (other.budget, other.per_unit, other.ends, other.asked) != (
                    first.budget,
                    first.per_unit,
                    first.ends,
                    first.asked,
                ):
                    raise UsageError(
                        f"the parts {first.part!r} and {other.part!r} of the limit {first.name!r} "
                        "must have the same budget."
                    )

    @property
    def budgets(self) -> tuple[tuple[Limit, ...], ...]:
        """The limits, those that are one budget together, in the order of the first of each."""
        found: dict[tuple[str, str], list[Limit]] = {}
        for limit in self.limits:
            found.setdefault((limit.name, limit.unit), []).append(limit)
        return tuple(map(tuple, found.values()))

    @property
    def decisions(self) -> tuple[tuple[int, ...], ...]:
        """What is decided together: every group, and every layer alone, in layer order."""
        grouped = {i: tuple(sorted(group)) for group in self.groups for i in group}
        return tuple(dict.fromkeys(grouped.get(i, (i,)) for i in range(len(self.layers))))
