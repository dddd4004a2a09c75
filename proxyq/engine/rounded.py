"""Rounded weights of single sites, as weights and as changes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from proxyq.engine.engine import Engine
from proxyq.engine.segments import Edit
from proxyq.model.layers import Layer, Site
from proxyq.model.network import Network
from proxyq.quantize import SCALE_BITS, Rounding, quantize_columns


def site_rounding(site: Site, rounding: Rounding | None = None) -> Rounding:
    """The rounding as it is at a site: groups only where whole ones lie along one axis."""
    rounding = rounding or Rounding()
    if rounding.group_size is None:
        return rounding
    axis = site.summed_axis
    if axis is not None and rounding.groups(site.weight.aval.shape[axis]) > 1:
        return rounding
    return replace(rounding, group_size=None)


def sized_layers(network: Network, rounding: Rounding | None = None) -> tuple[Layer, ...]:
    """The network's layers, with what the scales take that this rounding gives their groups."""

    def scale_bits(name: str) -> int:
        own = {site.weight: site for i in network.sites_of(name) for site in (network.sites[i],)}
        grouped = [(s, site_rounding(s, rounding).group_size) for s in own.values()]
        scales = sum(s.weight.aval.size // size for s, size in grouped if size is not None)
        return SCALE_BITS * scales

    if rounding is None or rounding.group_size is None:
        return network.layers
    return tuple(replace(one, scale_bits=scale_bits(one.name)) for one in network.layers)


def rounded_columns(engine: Engine, site: int, bits: int, rounding: Rounding | None = None) -> Any:
    """A site's weight rounded to `bits`, `[fan_in, channels]`."""
    how = site_rounding(engine.network.sites[site], rounding)
    return quantize_columns(engine.columns(site), bits, how)


def rounded_weight(engine: Engine, site: int, bits: int, rounding: Rounding | None = None) -> Any:
    """A site's weight rounded to `bits`, in its own shape."""
    columns = rounded_columns(engine, site, bits, rounding)
    return engine.network.sites[site].from_columns(columns, engine.weight(site).shape)


def weight_changes(
    engine: Engine, site: int, bits: Sequence[int], rounding: Rounding | None = None
) -> list[Any]:
    """`Q_b(W) - W` of a site, for each bit-width."""
    columns, shape = engine.columns(site), engine.weight(site).shape
    where = engine.network.sites[site]
    changes = (rounded_columns(engine, site, b, rounding) - columns for b in bits)
    return [where.from_columns(change, shape) for change in changes]


def rounded_layer(
    engine: Engine, layer: str, bits: int, rounding: Rounding | None = None
) -> dict[int, Edit]:
    """Edits that round one layer's weight at all its sites."""
    return {
        site: Edit(weight=rounded_weight(engine, site, bits, rounding))
        for site in engine.network.sites_of(layer)
    }
