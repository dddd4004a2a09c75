"""The memory of activations as linear limits.

    peak = max over steps s of sum over tensors t live at s of elements_t bits_t
    bits_t = max over the layers l that read t of activation_bits_l

and over the products of two activations that read it. A tensor that nothing of both reads, or that
one reads in floating point, has the float network's bits.

The sum at a step is a maximum of linear functions of the choices: one for each way to name, for
every tensor that several layers read, the reader that it is counted for. All of these rows
within the budget is the peak within the budget, exactly.

Most rows say nothing: a reader that never has more bits than another one is not named, tensors
of the same readers go together, and a row is left out where another one is at least as large
whatever is chosen. Rows too small to reach the budget stay, for they may be the peak.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from proxyq.errors import UsageError, near
from proxyq.model.live import Step
from proxyq.search.allocate.feasible import lifted
from proxyq.search.allocate.problem import Problem
from proxyq.search.allocate.reduce import candidates, merged

MOST_ROWS = 64
"""Rows of one step; what more of them would tell apart is bounded from above."""


Shared = tuple[int, int, tuple[int, ...]]
"""Tensors that go together: their bits in the float network, the most that a product of activations
reads (0 where none does), and the layers that can decide theirs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """`fixed + sum of usage` bits at the step `part`, from `least` to `most`.

    `usage` is int64 `[layers, columns]`.
    """

    part: str
    fixed: int
    usage: np.ndarray
    least: int
    most: int


def memory_rows(
    steps: Sequence[Step],
    problem: Problem,
    activations: Callable[[int, int], int | None],
    products: Mapping[str, int | None] | None = None,
) -> tuple[Row, ...]:
    """Rows whose largest is the peak, in the order of the steps; at least one.

    `activations` gives the activation bits of a layer at a column, `None` for float; `products`
    those of products of two activations, by name, in which case all that the steps name.

    **Raises** `UsageError` when the steps name a layer that the problem does not have.
    """
    # Messages tell what lifting a pin would give, so nothing may rest on what a pin closes.
    open_ = candidates(problem, lifted(problem, problem.pins))

    @cache
    def readers(bits: int, least: int) -> _Readers:
        return _Readers.of(problem, open_, lambda i, k: max(activations(i, k) or bits, least))

    rows: list[Row] = []
    for step in steps:
        for fixed, usage in _sums(step, problem, readers, products or {}):
            table = merged(problem, usage)
            row = Row(
                part="the input" if step.layer is None else step.layer,
                fixed=fixed,
                usage=usage,
                least=fixed + int(np.where(open_, table, table.max()).min(axis=1).sum()),
                most=fixed + int(np.where(open_, table, 0).max(axis=1).sum()),
            )
            if not any(other.least >= row.most for other in rows):
                rows = [other for other in rows if row.least < other.most] + [row]
    return _numbered(_undominated(rows, problem, open_))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Readers:
    """What bits the readers of a tensor give it, for tensors of the same bits in float.

    - `widths`: int64 `[layers, columns]`; `least`, `most`: over the columns open to a layer.
    - `decision`: layers with the same number take the same column.
    """

    widths: np.ndarray
    least: np.ndarray
    most: np.ndarray
    decision: tuple[int, ...]

    @classmethod
    def of(
        cls, problem: Problem, open_: np.ndarray, width: Callable[[int, int], int]
    ) -> "_Readers":
        """From `open_`, bool `[decisions, columns]`, and the bits of a layer at a column."""
        layers, columns = range(len(problem.layers)), range(len(problem.bits))
        widths = np.array([[width(i, k) for k in columns] for i in layers], np.int64)
        numbers = {i: g for g, members in enumerate(problem.decisions) for i in members}
        decision = tuple(numbers[i] for i in layers)
        open_to = open_[list(decision)]
        return cls(
            widths=widths,
            least=np.where(open_to, widths, widths.max()).min(axis=1),
            most=np.where(open_to, widths, 0).max(axis=1),
            decision=decision,
        )

    def deciding(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The `layers` that may have more bits than each of the others."""
        kept = list(layers)
        for layer in layers:
            if any(self._covers(other, layer) for other in kept if other != layer):
                kept.remove(layer)
        return tuple(kept)

    def _covers(self, one: int, other: int) -> bool:
        if self.decision[one] == self.decision[other]:
            return bool((self.widths[one] >= self.widths[other]).all())
        return bool(self.least[one] >= self.most[other])


def _sums(
    step: Step,
    problem: Problem,
    readers: Callable[[int, int], _Readers],
    products: Mapping[str, int | None],
) -> Iterator[tuple[int, np.ndarray]]:
    """Fixed part and usage of every row of a step."""
    index = {name: i for i, name in enumerate(problem.layers)}
    fixed = 0
    elements: Counter[Shared] = Counter()
    for tensor in step.tensors:
        for name in tensor.readers:
            if name not in index:
                raise UsageError(
                    f"the schedule names an unknown layer {name!r}: {near(name, list(index))}"
                )
        beside = (products[name] or tensor.bits for name in tensor.products if name in products)
        least = max(beside, default=0)
        found = readers(tensor.bits, least).deciding([index[name] for name in tensor.readers])
        if found:
            elements[tensor.bits, least, found] += tensor.elements
        else:
            fixed += tensor.elements * (least or tensor.bits)

    exact, bounded = _split(elements)
    start = np.zeros((len(problem.layers), len(problem.bits)), np.int64)
    for bits, least, layers in bounded:
        found, count = readers(bits, least), elements[bits, least, layers]
        # max_l b_l <= m + sum_l max(b_l - m, 0), with m what one of the layers always has
        floor = int(found.least[list(layers)].max())
        fixed += count * floor
        for i in layers:
            start[i] += count * np.maximum(found.widths[i] - floor, 0)
    for named in itertools.product(*(layers for *_, layers in exact)):
        usage = start.copy()
        for i, (bits, least, layers) in zip(named, exact, strict=True):
            usage[i] += elements[bits, least, layers] * readers(bits, least).widths[i]
        yield fixed, usage


def _split(elements: Mapping[Shared, int]) -> tuple[list[Shared], list[Shared]]:
    """What is counted exactly, the largest first, while rows are few; and the rest."""
    exact: list[Shared] = []
    bounded: list[Shared] = []
    count = 1
    for key in sorted(elements, key=lambda key: (-elements[key], key)):
        if count * len(key[2]) <= MOST_ROWS:
            count *= len(key[2])
            exact.append(key)
        else:
            bounded.append(key)
    return exact, bounded


def _undominated(rows: Sequence[Row], problem: Problem, open_: np.ndarray) -> list[Row]:
    """The rows that no other one is at least as large as, whatever is chosen."""
    fixed = np.array([row.fixed for row in rows], np.int64)
    tables = np.stack([merged(problem, row.usage) for row in rows])
    alive = np.ones(len(rows), bool)
    for r in range(len(rows)):
        above = np.where(open_, tables - tables[r], np.iinfo(np.int64).max).min(axis=-1)
        covers = alive & (fixed - fixed[r] + above.sum(axis=-1) >= 0)
        covers[r] = False
        alive[r] = not covers.any()
    return [row for row, stays in zip(rows, alive, strict=True) if stays]


def _numbered(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows of one step told apart by their numbers."""
    seen: Counter[str] = Counter()
    found = []
    for row in rows:
        seen[row.part] += 1
        number = seen[row.part]
        found.append(row if number == 1 else replace(row, part=f"{row.part} ({number})"))
    return tuple(found)
