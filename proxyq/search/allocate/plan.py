"""plan.json: the answer as people and other programs read it, and how it came about.

The file is JSON with the tag `"schema": "proxyq/plan/1"`. Written twice from the same plan it
is the same bytes: fields in a fixed order, free-form objects sorted by key, layers in network
order. Read and written again it is the same plan.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from proxyq.errors import ProxyqError, UsageError, shown
from proxyq.files import read_json, write_atomic
from proxyq.record_file import Bits, Count, GroupSize, Json, Number, Record, first_problem, line
from proxyq.search.allocate.assignment import Assignment
from proxyq.search.allocate.budget import SHARE, Budget, parse_budget, raw_budget, share_of
from proxyq.search.allocate.build import ActivationBits, LayerLike, reads_numbers
from proxyq.search.allocate.products import Attention
from proxyq.search.allocate.text import elided, wrapped
from proxyq.widths import (
    candidates,
    check_bits,
    check_group_sizes,
    with_groups,
)

SCHEMA = "proxyq/plan/1"
FLOAT_BITS = 32


class PlannedLayer(Record):
    """One layer; `None` bits mean that it stays float.

    `group_size` is how many of its weights share a grid, where layers were free to choose; else
    all are rounded as the method says. `scale_bits` is what the scales of its groups of weights
    take, where it has such.
    """

    weight_bits: Bits
    activation_bits: Bits = None
    weights: Count
    macs: Count
    group: str | None = None
    pinned: bool = False
    scale_bits: Count = 0
    group_size: GroupSize = None

    @model_validator(mode="after")
    def _has_whole_groups(self) -> "PlannedLayer":
        if self.group_size is not None and self.weights % self.group_size:
            raise ValueError(
                f"{self.weights} weights are no whole number of groups of {self.group_size}"
            )
        return self

    @property
    def width(self) -> int | None:
        """`weight_bits` with the layer's own group size, if it has one: `GroupedBits` then."""
        return None if self.weight_bits is None else with_groups(self.weight_bits, self.group_size)

    @property
    def size_bits(self) -> int:
        """Bits of the weights with the scales of groups; float ones take 32 each."""
        if self.weight_bits is None:
            return self.weights * FLOAT_BITS
        return self.weights * self.weight_bits + self.scale_bits


class PlannedProduct(Record):
    """A product of two activations, such as those of attention: the bits of both operands."""

    bits: Bits
    macs: Count


class PlannedBudget(Record):
    """A budget and what the plan takes of it, both in `unit`.

    In `%`, `low` and `high` are the raw amounts (bits, operations, picoseconds) that 0 and
    100 % stand for.
    """

    name: str
    asked: Number
    achieved: Number
    unit: str = ""
    low: Count | None = None
    high: Count | None = None

    @model_validator(mode="after")
    def _has_ends(self) -> "PlannedBudget":
        if self.unit == SHARE and (self.low is None or self.high is None or self.low > self.high):
            raise ValueError("a budget in % must hold the raw amounts 'low' <= 'high' of its ends")
        return self

    def budget(self) -> Budget:
        """The budget on its own: a share as the raw amount that it stood for.

        **Raises** `UsageError` for a budget that this version does not know.
        """
        found = parse_budget(f"{self.name}={self.asked}{self.unit}")
        if not found.is_share:
            return found
        assert self.low is not None and self.high is not None
        return raw_budget(self.name, share_of(self.low, self.high, found.amount))


class SolverRecord(Record):
    """How the answer was found; `optimal` is proven within the gap limit."""

    name: str
    status: Literal["optimal", "feasible"]
    objective: Number
    bound: Number | None = None
    gap: Number | None = None
    seconds: Number | None = None
    notes: list[str] = []


class Plan(Record):
    """A bit-width for every layer, with its budgets and its origin.

    `attention` holds products of two activations whose operands are rounded, and where a budget
    counts them the others too; what it does not name stays float.
    `model`, `method`, `provenance`, `predicted` and `measured` are free-form JSON objects.
    """

    schema_: Literal["proxyq/plan/1"] = Field(SCHEMA, alias="schema")
    model: Json = {}
    method: Json = {}
    layers: dict[str, PlannedLayer] = Field(min_length=1)
    attention: dict[str, PlannedProduct] = {}
    budgets: list[PlannedBudget] = []
    solver: SolverRecord | None = None
    provenance: Json = {}
    predicted: Json | None = None
    measured: Json | None = None

    def bits(self) -> dict[str, int | None]:
        """Weight bit-width by layer name, in network order."""
        return {name: layer.weight_bits for name, layer in self.layers.items()}

    def widths(self) -> dict[str, int | None]:
        """As `bits`, with the group sizes of layers that have their own: `GroupedBits` there."""
        return {name: layer.width for name, layer in self.layers.items()}

    @property
    def candidates(self) -> list[Any]:
        """What the method chose from, in the order of its costs, as far as it says so.

        The part is free-form, and what is no bit-width stays as it is.
        """
        bits, sizes = self.method.get("bits"), self.method.get("group_sizes")
        found = list(bits) if isinstance(bits, list) else []
        try:
            return list(candidates(map(check_bits, found), check_group_sizes(sizes)))
        except (UsageError, TypeError):  # there are no groups, or it means something else
            return found

    @property
    def size_bits(self) -> int:
        """Bits of all layers' weights with the scales of groups, float layers at 32.

        Scales of output channels and biases are not counted.
        """
        return sum(layer.size_bits for layer in self.layers.values())

    @property
    def average_bits(self) -> float:
        """Average bits per weight as `size=…bit` counts it: over the layers not pinned.

        Over all layers when every one is pinned.
        """
        free = [layer for layer in self.layers.values() if not layer.pinned and layer.weights]
        counted = free or list(self.layers.values())
        weights = sum(layer.weights for layer in counted)
        return sum(layer.size_bits for layer in counted) / weights if weights else 0.0

    def to_json(self) -> str:
        """The text of the file: stable, a line per layer."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=False)
        for optional in ("predicted", "measured", "solver"):
            if data[optional] is None:
                del data[optional]
        if self.solver is not None and not self.solver.notes:
            del data["solver"]["notes"]
        for budget in data["budgets"]:
            for end in ("low", "high"):
                if budget[end] is None:
                    del budget[end]
        without_scales(data["layers"])
        if not self.attention:
            del data["attention"]
        parts = []
        for key, value in data.items():
            if key in ("layers", "attention"):
                rows = [f"    {line(name)}: {line(layer)}" for name, layer in value.items()]
                text = "{\n" + ",\n".join(rows) + "\n  }"
            elif key == "budgets" and value:
                text = "[\n" + ",\n".join(f"    {line(item)}" for item in value) + "\n  ]"
            else:
                text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
                text = text.replace("\n", "\n  ")
            parts.append(f"  {line(key)}: {text}")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @classmethod
    def from_json(cls, data: Any, what: str = "plan") -> "Plan":
        """A plan from parsed JSON; raises `ProxyqError` naming the first wrong field."""
        if not isinstance(data, dict):
            raise ProxyqError(f"the {what} is not a plan: it must be a JSON object.")
        schema = data.get("schema")
        if schema != SCHEMA:
            if isinstance(schema, str) and schema.startswith("proxyq/plan/"):
                raise ProxyqError(
                    f"the {what} has the schema {shown(schema)}, which this version does not read; "
                    f"it reads {SCHEMA!r}: use the version of proxyq that wrote it."
                )
            raise ProxyqError(
                f"the {what} is not a plan: its field 'schema' must be {SCHEMA!r}, got "
                f"{shown(schema)}."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ProxyqError(f"the {what} has a bad field {first_problem(error)}.") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan; raises `ProxyqError` when it is missing, cut short or wrong."""
        return cls.from_json(read_json(path, "plan"), f"plan {str(path)!r}")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan, wholly or not at all."""
        return write_atomic(path, self.to_json())

    def __repr__(self) -> str:
        return f"<Plan: {len(self.layers)} layers, {self.average_bits:.3g} bits on average>"

    def __str__(self) -> str:
        """The whole in a line or two, then a table with a line per layer, 88 columns wide."""
        head = []
        if self.solver is not None:
            head += [self.solver.status, self.solver.name]
        head += [
            f"{b.name} {b.achieved:.4g} of {b.asked:.4g} {b.unit}".rstrip() for b in self.budgets
        ]
        head.append(f"{self.average_bits:.4g} bits on average")
        if self.attention:
            widths = sorted({_shown(product.bits) for product in self.attention.values()})
            head.append(f"{len(self.attention)} products of activations at {', '.join(widths)}")
        lines = wrapped(head)
        total = self.size_bits or 1
        lines.append(f"{'layer':<42} weight  act.     weights        size   share")
        for name, layer in self.layers.items():
            size = layer.size_bits
            star = "*" if layer.pinned else " "
            lines.append(
                f"{elided(name, 42):<42} {_shown(layer.width):>5}{star} "
                f"{_shown(layer.activation_bits):>5} {layer.weights:>11,} {size / 8192:>7.1f} KiB "
                f"{100 * size / total:>5.1f} %"
            )
        if any(layer.pinned for layer in self.layers.values()):
            lines.append("* pinned")
        return "\n".join(lines)


def without_scales(layers: dict[str, dict[str, Any]]) -> None:
    """Leave out of records of layers what only groups of weights have."""
    for layer in layers.values():
        for name in ("scale_bits", "group_size", "group_scale_bits"):
            if name in layer and not layer[name]:
                del layer[name]


def _shown(bits: int | None) -> str:
    return "float" if bits is None else str(bits)


def plan_from(
    assignment: Assignment,
    layers: Sequence[LayerLike],
    *,
    model: Mapping[str, Any] | None = None,
    method: Mapping[str, Any] | None = None,
    activation_bits: ActivationBits = None,
    attention: Attention | None = None,
    provenance: Mapping[str, Any] | None = None,
    predicted: Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of an `Assignment`; `layers` are those that the problem was built from.

    Activation bits are the assignment's where they were chosen, else `activation_bits`, for all
    layers or by name; an embedding has none. Of `attention` the plan names what is rounded, or
    counted by a budget.

    **Raises** `ProxyqError` when the names differ or a free-form part is no plain JSON.
    """
    problem = assignment.problem
    if tuple(layer.name for layer in layers) != problem.layers:
        raise ProxyqError("the layers of the plan are not those of the assignment.")
    pinned = {i for pin in problem.pins for i in pin.layers}
    beside = assignment.activation_bits
    if beside is None:
        beside = [
            activation_bits.get(layer.name)
            if isinstance(activation_bits, Mapping)
            else activation_bits
            for layer in layers
        ]
    budgets = [
        PlannedBudget(
            name=limit.name,
            asked=number(limit.asked_in_units),
            achieved=number(limit.in_units(amount)),
            unit=limit.unit,
            low=None if limit.ends is None else limit.ends[0],
            high=None if limit.ends is None else limit.ends[1],
        )
        for limit, amount in assignment.achieved
    ]
    sizes = assignment.group_sizes or (None,) * len(layers)
    counted = any(budget.name == "bops" for budget in budgets)
    try:
        planned = {
            layer.name: PlannedLayer(
                weight_bits=assignment.bits[i],
                activation_bits=beside[i] if reads_numbers(layer) else None,  # type: ignore[arg-type]
                weights=int(layer.weights),
                macs=int(layer.macs),
                group=layer.group,
                pinned=i in pinned,
                scale_bits=scale_bits_of(layer, sizes[i]),
                group_size=sizes[i],
            )
            for i, layer in enumerate(layers)
        }
        return Plan(
            model=dict(model or {}),
            method=dict(method or {}),
            layers=planned,
            attention={
                name: PlannedProduct(bits=own.bits, macs=own.macs)
                for name, own in (attention or {}).items()
                if own.bits is not None or counted
            },
            budgets=budgets,
            solver=SolverRecord(
                name=assignment.solver,
                status=assignment.status.short,  # type: ignore[arg-type]
                objective=assignment.objective,
                bound=assignment.bound,
                gap=assignment.gap,
                seconds=round(assignment.seconds, 6),
                notes=list(assignment.notes),
            ),
            provenance=dict(provenance or {}),
            predicted=None if predicted is None else dict(predicted),
            measured=None if measured is None else dict(measured),
        )
    except ValidationError as error:
        raise ProxyqError(f"the plan has a bad field {first_problem(error)}.") from None


def scale_bits_of(layer: LayerLike, group_size: int | None) -> int:
    """What the scales of a layer take, with groups of that size where it chose one."""
    if group_size is None:
        return int(getattr(layer, "scale_bits", 0))
    return int(getattr(layer, "group_scale_bits", {})[group_size])


def number(value: Any) -> int | float:
    """An exact fraction as an int where it is whole, else as the nearest float."""
    return int(value) if value.denominator == 1 else float(value)
