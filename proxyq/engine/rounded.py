"""Rounded weights of single sites, as weights and as changes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from proxyq.engine.engine import Engine
from proxyq.engine.segments import Edit
from proxyq.model.layers import Layer, Site
from proxyq.model.network import Network
from proxyq.quantize import SCALE_BITS, Rounding, quantize_columns, resolved
from proxyq.widths import GroupSize


def site_rounding(site: Site, rounding: Rounding | None = None) -> Rounding:
    """The rounding as it is at a site: groups only where whole ones lie along one axis."""
    rounding = rounding or Rounding()
    if rounding.group_size is None:
        return rounding
    axis = site.summed_axis
    if axis is not None and rounding.groups(site.weight.aval.shape[axis]) > 1:
        return rounding
    return replace(rounding, group_size=None)


def site_width(site: Site, bits: Any, rounding: Rounding | None = None) -> tuple[Any, Rounding]:
    """A bit-width as a plain number, and how weights of a site are rounded to it."""
    width, how = resolved(bits, rounding)
    return width, site_rounding(site, how)


def sized_layers(
    network: Network,
    rounding: Rounding | None = None,
    group_sizes: Sequence[GroupSize] = (),
    held: Sequence[int] = (),
) -> tuple[Layer, ...]:
    """The network's layers, with what the scales of their groups of weights take.

    - `rounding`: what all layers are rounded by, where nothing else is said of them.
    - `group_sizes`: what each may choose from (`None`: one grid a channel); those that a layer
      cannot have are left out, and one that can have none of them keeps one grid a channel.
    - `held`: sizes that pins name, which are no choices.
    """
    rounding = rounding or Rounding()

    def scale_bits(name: str, how: Rounding) -> int:
        own = {site.weight: site for i in network.sites_of(name) for site in (network.sites[i],)}
        grouped = [(s, site_rounding(s, how).group_size) for s in own.values()]
        scales = sum(s.weight.aval.size // size for s, size in grouped if size is not None)
        return SCALE_BITS * scales

    def by_group_size(name: str) -> dict[GroupSize, int]:
        found: dict[GroupSize, int] = {}
        for size in dict.fromkeys([*group_sizes, *held]):
            if size is not None and (bits := scale_bits(name, replace(rounding, group_size=size))):
                found[size] = bits
        if None in group_sizes or not found.keys() & set(group_sizes):
            found = {None: scale_bits(name, rounding), **found}
        return found

    layers = network.layers
    if rounding.group_size is not None:
        layers = (replace(one, scale_bits=scale_bits(one.name, rounding)) for one in layers)
    if group_sizes or held:
        layers = (replace(one, group_scale_bits=by_group_size(one.name)) for one in layers)
    return tuple(layers)


def rounded_columns(engine: Engine, site: int, bits: int, rounding: Rounding | None = None) -> Any:
    """A site's weight rounded to `bits`, `[fan_in, channels]`."""
    width, how = site_width(engine.network.sites[site], bits, rounding)
    return quantize_columns(engine.columns(site), width, how)


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
