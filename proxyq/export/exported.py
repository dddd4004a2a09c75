"""What an export made, and whether it still keeps the plan's budget: the same for all formats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from proxyq.errors import ProxyqError
from proxyq.model.network import LAYERS_AT, network
from proxyq.ptq.deploy import DeployedLayer
from proxyq.ptq.quantized import QuantizedModel
from proxyq.quantize import SCALE_BITS
from proxyq.quantize.integers import groups_of
from proxyq.search.allocate.plan import FLOAT_BITS, Plan
from proxyq.search.allocate.text import elided

STORED_SCALE_BITS = 32
"""What other programs' files take for a scale: a float32 number."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A quantized network in a file of another program.

    - `paths`: the files that were written.
    - `raised`: layers whose bit-width the format cannot store, with the bits that were asked for
      and those that their codes take up. Their values are the same.
    - `size_bits`: of the quantized weights as stored, `planned_bits`: as the plan has them, both
      with the scales of groups; those of output channels, zero points and biases are not counted.
    - `difference`: largest difference of the outputs of the exported network from the quantized
      one's, relative to the largest output; `None` where it was not run.
    - `notes`: what else its user should know, a sentence each.
    """

    format: str
    paths: tuple[Path, ...]
    raised: Mapping[str, tuple[int, int]]
    size_bits: int
    planned_bits: int
    difference: float | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that `export --json` prints."""
        return {
            "format": self.format,
            "paths": [str(path) for path in self.paths],
            "raised": {
                name: {"asked": asked, "stored": stored}
                for name, (asked, stored) in self.raised.items()
            },
            "size_bits": self.size_bits,
            "planned_bits": self.planned_bits,
            "difference": self.difference,
            "notes": list(self.notes),
        }


def group_scales(quantized: QuantizedModel) -> dict[str, int]:
    """How many scales of groups each quantized layer has, one an output channel not counted."""
    graph = network(quantized.model, LAYERS_AT)
    found = dict.fromkeys(quantized.bits, 0)
    weights = set()
    for index, own in quantized.integers.items():
        site, groups = graph.sites[index], groups_of(own)
        if groups is not None and site.weight not in weights:
            weights.add(site.weight)
            found[site.layer] += groups.values.size
    return found


def raised_and_sizes(layers: Sequence[DeployedLayer], stored: Mapping[str, int]) -> dict[str, Any]:
    """The fields `raised`, `size_bits` and `planned_bits` of layers stored with so many bits."""
    grouped = [groups_of(layer.weight) for layer in layers]
    scales = [0 if groups is None else groups.values.size for groups in grouped]
    pairs = list(zip(layers, scales, strict=True))
    return {
        "raised": {
            layer.name: (layer.bits, stored[layer.name])
            for layer in layers
            if stored[layer.name] != layer.bits
        },
        "size_bits": sum(
            layer.weight.codes.size * stored[layer.name]
            + (STORED_SCALE_BITS * count if stored[layer.name] != FLOAT_BITS else 0)
            for layer, count in pairs
        ),
        "planned_bits": sum(
            layer.weight.codes.size * layer.bits + SCALE_BITS * count for layer, count in pairs
        ),
    }


def check_strict(raised: Mapping[str, tuple[int, int]], *, strict: bool, format: str) -> None:
    """**Raises** `ProxyqError` where `strict` and a layer takes other bits than asked for."""
    if raised and strict:
        told = ", ".join(
            f"{name!r} ({asked} bits as {'float' if stored == FLOAT_BITS else f'{stored} bits'})"
            for name, (asked, stored) in raised.items()
        )
        raise ProxyqError(
            f"{format} cannot store all layers as planned: {elided(told, 300)}; give them other "
            "bits (--candidates, --pin), or leave --strict out."
        )


def exceeded_budgets(
    plan: Plan | None, stored: Mapping[str, int], *, format: str
) -> tuple[str, ...]:
    """A sentence for each size budget of the plan that the weights as stored do not keep.

    `stored` are the bits of each layer. Budgets count as in `proxyq.search.allocate.budget`: an
    average is over the layers that are not pinned, an amount over all, float ones at 32 bits.
    """
    found = []
    for planned in () if plan is None else plan.budgets:
        if planned.name != "size":
            continue
        assert plan is not None
        budget = planned.budget()
        free = [n for n, own in plan.layers.items() if not own.pinned and own.weights]
        counted = (free or list(plan.layers)) if budget.is_average else list(plan.layers)
        weights = sum(plan.layers[name].weights for name in counted)
        used = 0
        for name in counted:
            own = plan.layers[name]
            width = stored.get(name, own.weight_bits or FLOAT_BITS)
            used += own.weights * width
            if width != FLOAT_BITS:
                used += own.scale_bits * STORED_SCALE_BITS // SCALE_BITS
        allowed = budget.amount * budget.per_unit(weights)
        if used > allowed:
            found.append(
                f"as {format} stores them, the weights take {_amount(used, weights, budget)}, more "
                f"than the plan's budget of {_amount(allowed, weights, budget)}."
            )
    return tuple(found)


def _amount(bits: int | Fraction, weights: int, budget: Any) -> str:
    if budget.is_average:
        return f"{float(Fraction(bits) / max(weights, 1)):.4g} bit on average"
    return f"{float(bits) / 8192:,.1f} KiB"
