"""Rounded weights of single sites, as weights and as changes."""

from collections.abc import Sequence
from typing import Any

from proxyq.engine.engine import Engine
from proxyq.engine.segments import Edit
from proxyq.quantize import Rounding, quantize_columns


def rounded_weight(engine: Engine, site: int, bits: int, rounding: Rounding | None = None) -> Any:
    """A site's weight rounded to `bits`, one grid an output channel."""
    columns = quantize_columns(engine.columns(site), bits, rounding)
    return engine.network.sites[site].from_columns(columns, engine.weight(site).shape)


def weight_changes(
    engine: Engine, site: int, bits: Sequence[int], rounding: Rounding | None = None
) -> list[Any]:
    """`Q_b(W) - W` of a site, for each bit-width."""
    columns, shape = engine.columns(site), engine.weight(site).shape
    where = engine.network.sites[site]
    changes = (quantize_columns(columns, b, rounding) - columns for b in bits)
    return [where.from_columns(change, shape) for change in changes]


def rounded_layer(
    engine: Engine, layer: str, bits: int, rounding: Rounding | None = None
) -> dict[int, Edit]:
    """Edits that round one layer's weight at all its sites."""
    return {
        site: Edit(weight=rounded_weight(engine, site, bits, rounding))
        for site in engine.network.sites_of(layer)
    }
