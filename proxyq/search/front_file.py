"""front.json: plans for many budgets, from one set of scores, and what each costs.

The file is JSON with the tag `"schema": "proxyq/front/1"`. What all plans share is written once;
`Front.plan` makes a whole plan of a point. Written twice from the same front it is the same
bytes, and the same run writes the same bytes but for the solver's `seconds`, each on a line of
its own. Read and written again it is the same front.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from proxyq.errors import UsageError
from proxyq.files import read_json, write_atomic
from proxyq.record_file import Bits, Count, GroupSize, Json, Number, Record, line, record_from
from proxyq.search.allocate.budget import Budget
from proxyq.search.allocate.pareto import dominated
from proxyq.search.allocate.plan import (
    Plan,
    PlannedBudget,
    PlannedLayer,
    PlannedProduct,
    SolverRecord,
    number,
    without_scales,
)

SCHEMA = "proxyq/front/1"


class FrontLayer(Record):
    """What does not change from point to point of a layer."""

    weights: Count
    macs: Count
    group: str | None = None
    pinned: bool = False
    scale_bits: Count = 0


class BudgetRange(Record):
    """The budget that changes: `points` amounts evenly from `first` to `last`, in `unit`.

    `low` and `high` are the raw amounts that 0 and 100 % stand for, of a share.
    """

    name: str
    unit: str = ""
    first: Number
    last: Number
    points: Annotated[int, Field(ge=2)]
    low: Count | None = None
    high: Count | None = None


class PointMeasured(Record):
    """A plan run quantized: top-1 in percent, KL to the float network in nats.

    Each is dominated where another measured plan takes no more of the budget, is no worse in it,
    and is better in one of the two.
    """

    top1: Number
    kl: Number
    correction: str
    top1_dominated: bool = False
    kl_dominated: bool = False


class FrontPoint(Record):
    """One plan, and the budgets at which it is the answer.

    - `asked`: these budgets, ascending; `achieved`: what the plan takes, in `unit`.
    - `predicted`: its cost; `status`, `bound`, `gap`: as in a plan, proven for all of `asked`;
      `seconds` of the solver for all of them.
    - `budgets`: the other budgets, which are the same at every point.
    - `group_sizes`, `scale_bits`: by layer, where group sizes were chosen too; as in a plan.
    - `dominated`: another point takes no more, is predicted to cost no more, and is better in
      one of the two.
    """

    asked: list[Number] = Field(min_length=1)
    achieved: Number
    unit: str = ""
    predicted: Number
    dominated: bool = False
    solver: str
    status: Literal["optimal", "feasible"]
    bound: Number | None = None
    gap: Number | None = None
    seconds: Number | None = None
    notes: list[str] = []
    average_bits: Number
    size_bits: Count
    budgets: list[PlannedBudget] = []
    bits: dict[str, Bits]
    activation_bits: dict[str, Bits]
    group_sizes: dict[str, GroupSize] | None = None
    scale_bits: dict[str, Count] | None = None
    measured: PointMeasured | None = None


class Front(Record):
    """Plans over a range of budgets, the smallest budget first.

    `model`, `method`, `attention`, `predicted` (the scores) and `provenance` are those of every
    plan; `notes` tell what was left out. `measured` holds the float network's accuracy, where
    plans were run.
    """

    schema_: Literal["proxyq/front/1"] = Field(SCHEMA, alias="schema")
    model: Json = {}
    method: Json = {}
    budget: BudgetRange
    notes: list[str] = []
    points: list[FrontPoint] = Field(min_length=1)
    layers: dict[str, FrontLayer] = Field(min_length=1)
    attention: dict[str, PlannedProduct] = {}
    measured: Json | None = None
    predicted: Json | None = None
    provenance: Json = {}

    @model_validator(mode="after")
    def _is_whole(self) -> "Front":
        for index, point in enumerate(self.points, 1):
            if (point.group_sizes is None) != (point.scale_bits is None):
                raise ValueError(f"point {index} must hold both 'group_sizes' and 'scale_bits'")
            for what in ("bits", "activation_bits", "group_sizes", "scale_bits"):
                found = getattr(point, what)
                if found is None:
                    continue
                for name in {*found} ^ {*self.layers}:
                    says = "name" if name in found else "say nothing of"
                    raise ValueError(f"the {what!r} of point {index} {says} the layer {name!r}")
            for name, size in (point.group_sizes or {}).items():
                if size is not None and self.layers[name].weights % size:
                    raise ValueError(
                        f"the 'group_sizes' of point {index} must divide the weights of the layer "
                        f"{name!r}, {self.layers[name].weights}, got {size}"
                    )
        return self

    def plan(self, point: int) -> Plan:
        """The plan of a point, which is counted from 0: that of `allocate` at its last budget.

        **Raises** `UsageError` when there is no such point.
        """
        if not 0 <= point < len(self.points):
            raise UsageError(
                f"there is no point {point}: the front has {len(self.points)}, counted from 0."
            )
        one = self.points[point]
        own: dict[str, dict[str, Any]] = {name: dict(layer) for name, layer in self.layers.items()}
        for name, size in (one.group_sizes or {}).items():
            assert one.scale_bits is not None  # the file is whole
            own[name] |= {"group_size": size, "scale_bits": one.scale_bits[name]}
        layers = {
            name: PlannedLayer(
                weight_bits=one.bits[name], activation_bits=one.activation_bits[name], **layer
            )
            for name, layer in own.items()
        }
        budget = PlannedBudget(
            name=self.budget.name,
            asked=one.asked[-1],
            achieved=one.achieved,
            unit=self.budget.unit,
            low=self.budget.low,
            high=self.budget.high,
        )
        return Plan(
            schema="proxyq/plan/1",
            model=self.model,
            method=self.method,
            layers=layers,
            attention=self.attention,
            budgets=[budget, *one.budgets],
            solver=SolverRecord(
                name=one.solver,
                status=one.status,
                objective=one.predicted,
                bound=one.bound,
                gap=one.gap,
                seconds=one.seconds,
                notes=one.notes,
            ),
            provenance=self.provenance,
            predicted=self.predicted,
        )

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans of all points."""
        return tuple(map(self.plan, range(len(self.points))))

    def with_measured(
        self, float_network: dict[str, Any], points: Sequence[dict[str, Any]]
    ) -> "Front":
        """The same front with what was measured: of the float network, and of each point
        `top1`, `kl` and `correction`."""
        amounts = [point.achieved for point in self.points]
        by_top1 = dominated([(a, -one["top1"]) for a, one in zip(amounts, points, strict=True)])
        by_kl = dominated([(a, one["kl"]) for a, one in zip(amounts, points, strict=True)])
        measured = [
            point.model_copy(
                update={"measured": PointMeasured(**one, top1_dominated=top1, kl_dominated=kl)}
            )
            for point, one, top1, kl in zip(self.points, points, by_top1, by_kl, strict=True)
        ]
        record = {**dict(self), "schema": SCHEMA, "measured": {"float": float_network}}
        del record["schema_"]
        return Front.model_validate({**record, "points": measured})

    def to_json(self) -> str:
        """The text of the file: stable, what is long on one line for each layer or field."""
        data = self.model_dump(mode="json", by_alias=True)
        for optional in ("measured", "predicted"):
            if data[optional] is None:
                del data[optional]
        without_scales(data["layers"])
        if not self.attention:
            del data["attention"]
        for end in ("low", "high"):
            if data["budget"][end] is None:
                del data["budget"][end]
        for point in data["points"]:
            for optional in ("measured", "group_sizes", "scale_bits"):
                if point[optional] is None:
                    del point[optional]
            for budget in point["budgets"]:
                for end in ("low", "high"):
                    if budget[end] is None:
                        del budget[end]
        parts = []
        for key, value in data.items():
            if key == "points":
                text = "[\n" + ",\n".join(f"    {_rows(one, '      ')}" for one in value) + "\n  ]"
            elif key in ("layers", "attention"):
                text = _rows(value, "    ")
            else:
                text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
                text = text.replace("\n", "\n  ")
            parts.append(f"  {line(key)}: {text}")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @classmethod
    def from_json(cls, data: Any, what: str = "file") -> "Front":
        """A front from parsed JSON; raises `ProxyqError` naming the first wrong field."""
        return record_from(cls, data, what, schema=SCHEMA, holds="front", command="pareto")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Front":
        """Read a front; raises `ProxyqError` when it is missing, cut short or wrong."""
        return cls.from_json(read_json(path, "front"), f"file {str(path)!r}")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the front, wholly or not at all."""
        return write_atomic(path, self.to_json())

    def __repr__(self) -> str:
        ends = f"{self.budget.first:g} to {self.budget.last:g} {self.budget.unit}".rstrip()
        return f"<Front: {len(self.points)} plans, {self.budget.name} {ends}>"

    def __str__(self) -> str:
        """A line for each point: what it takes of the budget, and its predicted cost."""
        unit = self.budget.unit
        lines = [f"{self.budget.name}, {unit}" if unit else self.budget.name]
        lines[0] = f"{lines[0]:<20}  predicted"
        for one in self.points:
            star = " *" if one.dominated else ""
            lines.append(f"{one.achieved:<20.6g}  {one.predicted:.6g}{star}")
        return "\n".join(lines)


def front_of(
    plans: Sequence[Plan], ends: tuple[Budget, Budget], points: int, notes: Sequence[str] = ()
) -> Front:
    """The front of `plans`, the answers at budgets between `ends`; equal plans are one point.

    `points`: how many budgets were asked for, also those that could not be met.
    """
    kind, unit = ends[0].kind, ends[0].unit
    together: dict[tuple[Any, ...], list[Plan]] = {}
    for plan in plans:
        key = tuple((one.width, one.activation_bits) for one in plan.layers.values())
        together.setdefault(key, []).append(plan)
    # Where layers chose their groups, points tell what the scales take.
    grouped = any(one.group_size for plan in plans for one in plan.layers.values())
    found = [_point(alike, kind, unit, grouped) for alike in together.values()]
    beaten = dominated([(point.achieved, point.predicted) for point in found])
    first = plans[0]
    changing = next(one for one in first.budgets if (one.name, one.unit) == (kind, unit))
    return Front(
        schema=SCHEMA,
        model=first.model,
        method=first.method,
        budget=BudgetRange(
            name=kind,
            unit=unit,
            first=number(ends[0].amount),
            last=number(ends[1].amount),
            points=points,
            low=changing.low,
            high=changing.high,
        ),
        notes=list(notes),
        points=[
            point.model_copy(update={"dominated": other})
            for point, other in zip(found, beaten, strict=True)
        ],
        layers={
            name: FrontLayer(
                weights=one.weights,
                macs=one.macs,
                group=one.group,
                pinned=one.pinned,
                scale_bits=0 if grouped else one.scale_bits,
            )
            for name, one in first.layers.items()
        },
        attention=first.attention,
        predicted=first.predicted,
        provenance=first.provenance,
    )


def _point(plans: Sequence[Plan], kind: str, unit: str, grouped: bool) -> FrontPoint:
    """What plans that are alike say together; what is proven of the last holds for all."""
    last, asked, others = plans[-1], [], []
    for plan in plans:
        changing = [one for one in plan.budgets if (one.name, one.unit) == (kind, unit)]
        others = [one for one in plan.budgets if one not in changing]
        asked += changing
    sizes = {name: one.group_size for name, one in last.layers.items()}
    scales = {name: one.scale_bits for name, one in last.layers.items()}
    solver = last.solver
    assert solver is not None  # plans of answers have one
    seconds = [plan.solver.seconds or 0.0 for plan in plans if plan.solver is not None]
    return FrontPoint(
        asked=[one.asked for one in asked],
        achieved=asked[-1].achieved,
        unit=unit,
        predicted=solver.objective,
        solver=solver.name,
        status=solver.status,
        bound=solver.bound,
        gap=solver.gap,
        seconds=round(sum(seconds), 6),
        notes=solver.notes,
        average_bits=last.average_bits,
        size_bits=last.size_bits,
        budgets=others,
        bits=last.bits(),
        activation_bits={name: one.activation_bits for name, one in last.layers.items()},
        group_sizes=sizes if grouped else None,
        scale_bits=scales if grouped else None,
    )


def _rows(value: dict[str, Any], indent: str) -> str:
    """An object with a line for each field."""
    rows = [f"{indent}{line(key)}: {line(item)}" for key, item in value.items()]
    return "{\n" + ",\n".join(rows) + f"\n{indent[:-2]}}}"
