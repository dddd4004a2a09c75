"""What every choice takes of a budget, in whole bits, operations or picoseconds.

    size = sum_l (weights_l b + scale_bits_l(g))
    bops = sum_l macs_l b a + sum_p macs_p a_p^2      macs-bits = sum_l macs_l b
    latency = other + sum_l time_l(b, a)
    activation-memory = max_s sum_(t live at s) elements_t max_(l reads t) a

with p the products of two activations (attention's), both of whose operands have a_p bits. Python
integers throughout; float activations count as 32 bits in BOPs. The maximum over steps
is several limits, one budget together: see `memory`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from proxyq.errors import UsageError
from proxyq.model.live import Step
from proxyq.search.allocate.budget import Budget, share_of
from proxyq.search.allocate.feasible import reach
from proxyq.search.allocate.memory import Row, memory_rows
from proxyq.search.allocate.problem import Limit, Problem
from proxyq.search.allocate.products import Attention

FLOAT_BITS = 32


class Latencies(Protocol):
    """Whole picoseconds by layer and bits, and of what is no layer; `name` is for messages."""

    @property
    def name(self) -> str: ...
    @property
    def other(self) -> int: ...
    def of(self, layer: str, bits: int, activation_bits: int | None) -> int | None: ...


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What is counted of the layers of a problem, `[layers]` each.

    `fixed` holds activation bits (`None`: float) where the problem's columns do not;
    `searched` is false for pinned layers, and `reads_numbers` for those that read indices, whose
    activations stay as they are. `scale_bits` are those of the scales of groups of weights, the
    same at every width, and `group_scale_bits` those of each group size to choose from.
    `attention`: the products of two activations.
    """

    weights: Sequence[int]
    macs: Sequence[int]
    fixed: Sequence[int | None]
    searched: Sequence[bool]
    reads_numbers: Sequence[bool]
    scale_bits: Sequence[int] = ()
    group_scale_bits: Sequence[Mapping[int | None, int]] = ()
    latency: Latencies | None = None
    schedule: Sequence[Step] | None = None
    attention: Attention = field(default_factory=dict)

    def scales(self, problem: Problem, layer: int, column: int) -> int:
        """Bits of the scales of a layer at a column; of groups that it cannot have, none."""
        size = None if problem.group_sizes is None else problem.group_sizes[column]
        if size is None:
            return self.scale_bits[layer] if self.scale_bits else 0
        return self.group_scale_bits[layer].get(size, 0)

    def activations(self, problem: Problem, layer: int, column: int) -> int | None:
        """The activation bits of a layer at a column."""
        if not self.reads_numbers[layer]:
            return None
        if problem.activation_bits is None:
            return self.fixed[layer]
        return problem.activation_bits[column]


def limits_of(budget: Budget, problem: Problem, counted: Counted) -> tuple[Limit, ...]:
    """The limits that a budget sets on the choices of `problem`: one, or one for each part.

    **Raises** `UsageError` when the amount cannot be counted.
    """
    if budget.kind == "activation-memory":
        rows = _memory(budget, problem, counted)
        parts = [_limit(budget, row.usage, fixed=row.fixed, part=row.part) for row in rows]
    else:
        parts = [_single(budget, problem, counted)]
    ends = reach(problem, parts) if budget.is_share else None
    return tuple(asking(replace(part, ends=ends), budget) for part in parts)


def asking(limit: Limit, budget: Budget) -> Limit:
    """`limit` at the amount of `budget`, which is of its kind and unit."""
    if limit.ends is None:
        amount = min(int(budget.amount * limit.per_unit), 2**61)
    else:
        amount = share_of(*limit.ends, budget.amount)
    return replace(limit, budget=amount, asked=budget.amount)


def _limit(
    budget: Budget, usage: Any, *, per_unit: Fraction | None = None, fixed: int = 0, part: str = ""
) -> Limit:
    """A limit whose amount is still to be set."""
    return Limit(
        name=budget.kind,
        usage=np.array(usage, dtype=object),
        budget=0,
        unit=budget.unit,
        fixed=fixed,
        per_unit=per_unit or budget.per_unit(0) or Fraction(1),
        asked=budget.amount,
        part=part,
    )


def _single(budget: Budget, problem: Problem, counted: Counted) -> Limit:
    """What a budget counts where it is one sum over the layers."""
    if budget.kind == "latency":
        usage, other = _latency(budget, problem, counted)
        return _limit(budget, usage, fixed=other)
    if budget.is_average:
        per_unit = budget.per_unit(
            sum(w for w, s in zip(counted.weights, counted.searched, strict=True) if s)
        )
        if not per_unit:
            raise UsageError(
                f"the budget {budget.text!r} is an average over the searched layers, but every "
                "layer with weights is pinned; lift a pin or give the size in MiB."
            )
        usage = [
            [bits if searched else 0 for bits in row]
            for row, searched in zip(_sizes(problem, counted), counted.searched, strict=True)
        ]
        return _limit(budget, usage, per_unit=per_unit)
    if budget.kind == "size":
        return _limit(budget, _sizes(problem, counted))
    if budget.kind == "bops":
        usage = [
            [
                macs * b * (counted.activations(problem, i, k) or FLOAT_BITS)
                for k, b in enumerate(problem.bits)
            ]
            for i, macs in enumerate(counted.macs)
        ]
        products = counted.attention.values()
        fixed = sum(own.macs * (own.bits or FLOAT_BITS) ** 2 for own in products)
        return _limit(budget, usage, fixed=fixed)
    return _limit(budget, [[macs * b for b in problem.bits] for macs in counted.macs])


def _sizes(problem: Problem, counted: Counted) -> list[list[int]]:
    """Bits of the weights and of their groups' scales, `[layers, columns]`."""
    return [
        [count * b + counted.scales(problem, i, k) for k, b in enumerate(problem.bits)]
        for i, count in enumerate(counted.weights)
    ]


def _memory(budget: Budget, problem: Problem, counted: Counted) -> tuple[Row, ...]:
    """The sums of live activations that may be the peak."""
    if counted.schedule is None:
        raise UsageError(
            f"the budget {budget.text!r} needs to know which tensors are live at each layer, and "
            "nothing tells it: score the model again with this version (proxyq score), or search "
            "with the model."
        )
    products = {name: own.bits for name, own in counted.attention.items()}
    return memory_rows(
        counted.schedule, problem, lambda i, k: counted.activations(problem, i, k), products
    )


def _latency(
    budget: Budget, problem: Problem, counted: Counted
) -> tuple[list[list[int | Fraction]], int]:
    """Picoseconds `[layers, columns]`, and those of what is no layer."""
    table = counted.latency
    if table is None:
        raise UsageError(
            f"the budget {budget.text!r} needs a latency table, which says how long each layer "
            "takes at each bit-width: give one (--latency-table)."
        )
    usage, missing = [], []
    for i, name in enumerate(problem.layers):
        row = []
        for k, b in enumerate(problem.bits):
            activations = counted.activations(problem, i, k)
            row.append(table.of(name, b, activations))
            if row[k] is None and problem.allowed[i, k]:
                missing.append(f"layer {name!r} at {b} weight bits and {_shown(activations)}")
        # What no one may choose only has to be a number, and no tempting one.
        known = max((value for value in row if value is not None), default=0)
        usage.append([known if value is None else value for value in row])
    if missing:
        more = f" (and of {len(missing) - 1} more choices)" if len(missing) > 1 else ""
        raise UsageError(
            f"the latency table {table.name!r} says nothing of {missing[0]}{more}; measure it, or "
            "leave out that choice."
        )
    return usage, table.other


def _shown(activations: int | None) -> str:
    return "float activations" if activations is None else f"{activations} activation bits"
