"""What a runtime stores instead of what a plan asks for, and what becomes of the budgets then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxyq.errors import ProxyqError
from proxyq.export.exported import Exported
from proxyq.model.network import LAYERS_AT, network
from proxyq.ptq.quantized import QuantizedModel
from proxyq.search.allocate.plan import FLOAT_BITS, Plan


@dataclass(frozen=True)
class Raised:
    """A layer that takes more bits than asked for, and why."""

    asked: int
    stored: int
    why: str

    def __str__(self) -> str:
        stored = "float" if self.stored == FLOAT_BITS else f"{self.stored} bits"
        return f"{self.asked} bits became {stored}: {self.why}"


def check_strict(raised: Mapping[str, Raised], runtime: str) -> None:
    """**Raises** `ProxyqError` when a layer would not be stored as it was asked for."""
    if raised:
        named = ", ".join(f"{name!r} ({one})" for name, one in raised.items())
        raise ProxyqError(
            f"{runtime} cannot store all layers as planned: {named}; give them other bits "
            "(--candidates, --pin), or leave `strict` out."
        )


def exported(
    quantized: QuantizedModel,
    path: Path,
    *,
    plan: Plan | None,
    raised: Mapping[str, Raised],
    notes: Sequence[str],
) -> Exported:
    """The record of an export, with the plan's size budgets counted again at the stored widths."""
    weights = {one.name: one.weights for one in network(quantized.model, LAYERS_AT).layers}
    asked = {name: quantized.bits.get(name, FLOAT_BITS) for name in weights}
    stored = {**asked, **{name: one.stored for name, one in raised.items()}}
    told = [f"{name}: {one}." for name, one in raised.items()]
    if plan is not None:
        told += _exceeded(plan, stored)
    return Exported(
        path=path,
        raised={name: (one.asked, one.stored) for name, one in raised.items()},
        size_bits=sum(weights[name] * bits for name, bits in stored.items()),
        planned_bits=sum(weights[name] * bits for name, bits in asked.items()),
        notes=(*told, *notes),
    )


def _exceeded(plan: Plan, stored: Mapping[str, int]) -> list[str]:
    """A sentence for each size budget that the stored widths do not keep."""
    found = []
    for own in plan.budgets:
        if own.name != "size":
            continue
        budget = own.budget()
        counted = {
            name: layer.weights
            for name, layer in plan.layers.items()
            if not (budget.is_average and layer.pinned)
        }
        per_unit = budget.per_unit(sum(counted.values()))
        raw = sum(count * stored[name] for name, count in counted.items())
        if raw > budget.amount * per_unit:
            found.append(
                f"the budget size={own.asked:g}{own.unit} is exceeded: as stored, the layers take "
                f"{float(raw / per_unit):.4g} {budget.unit}."
            )
    return found
