"""What a torch runtime stores instead of what a plan asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxyq.export.exported import (
    STORED_SCALE_BITS,
    Exported,
    exceeded_budgets,
    group_scales,
)
from proxyq.export.torch_folder import CONFIG, WEIGHTS
from proxyq.model.network import LAYERS_AT, network
from proxyq.ptq.quantized import QuantizedModel
from proxyq.quantize import SCALE_BITS
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


def widths(raised: Mapping[str, Raised]) -> dict[str, tuple[int, int]]:
    """Bits asked for and stored, by layer."""
    return {name: (one.asked, one.stored) for name, one in raised.items()}


def exported(
    quantized: QuantizedModel,
    folder: Path,
    *,
    format: str,
    plan: Plan | None,
    raised: Mapping[str, Raised],
    difference: float | None,
    notes: Sequence[str],
) -> Exported:
    """The record of an export to `folder`, with the plan's size budgets counted again."""
    weights = {one.name: one.weights for one in network(quantized.model, LAYERS_AT).layers}
    scales = group_scales(quantized)
    stored = {**quantized.bits, **{name: one.stored for name, one in raised.items()}}
    told = [f"{name}: {one}." for name, one in raised.items()]
    return Exported(
        format=format,
        paths=(folder / CONFIG, folder / WEIGHTS),
        raised=widths(raised),
        size_bits=sum(
            weights[name] * bits + (0 if bits == FLOAT_BITS else STORED_SCALE_BITS * scales[name])
            for name, bits in stored.items()
        ),
        planned_bits=sum(
            weights[name] * bits + SCALE_BITS * scales[name]
            for name, bits in quantized.bits.items()
        ),
        difference=difference,
        notes=(*told, *exceeded_budgets(plan, stored, format=format), *notes),
    )
