"""A quantized model as its layers are deployed: whole numbers in the shapes of its own parameters.

The engine rounds a layer's weight as the graph reads it, batch norm folded in. Here each layer
comes back under the names and in the shapes that its author gave: codes like the parameter, a
scale and a zero point for each output channel that broadcast against it, one bias that holds all
that is added to the channel, and the names of the parameters that went into both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from proxyq.engine import Edit, Edits, Engine
from proxyq.model.layers import EMBEDDING, TIED_EMBEDDING
from proxyq.model.network import LAYERS_AT, Network
from proxyq.model.origin import parameter_indices, trailing_bias
from proxyq.ptq.quantized import QuantizedModel
from proxyq.quantize import Grid
from proxyq.quantize.integers import Integers


@dataclass(frozen=True, kw_only=True, eq=False)
class DeployedLayer:
    """One quantized layer.

    - `parameter`: the parameter that holds the weight, `weight`: its codes in that shape, with a
      scale and a zero point that broadcast. Where the weight is computed from parameters
      (`computed`), or its uses differ, no such array exists: `weight` is one use's, as the
      graph reads it.
    - `bias`: all that is added to each output channel, `[channels]`, or `None`; `bias_parameter`:
      the layer's own parameter for it, if it has one.
    - `absorbed`: parameters other than those two that went into weight and bias (batch norm's).
    - `inputs`: the grid of what the layer reads; `None` where that stays float.
    """

    name: str
    kind: str
    parameter: str
    weight: Integers
    bias: np.ndarray | None
    bias_parameter: str | None
    absorbed: tuple[str, ...]
    inputs: Grid | None
    activation_bits: int | None
    computed: bool = False

    @property
    def bits(self) -> int:
        """Bit-width of the weight."""
        return self.weight.bits

    @property
    def looked_up(self) -> bool:
        """Whether its rows are looked up: an embedding, alone or tied to a layer."""
        return self.kind in (EMBEDDING, TIED_EMBEDDING)


def deployed_layers(quantized: QuantizedModel) -> tuple[DeployedLayer, ...]:
    """All quantized layers, in the order of first use; one entry for each use whose numbers differ.

    A weight that several sites share is one entry where they agree. Where folding gave each use
    numbers of its own, later ones are called `NAME#2`, `NAME#3`, and all are `computed`.
    """
    engine = Engine.build(quantized.model, LAYERS_AT, batch_size=LAYERS_AT)
    network = engine.network
    indices = parameter_indices(network)
    found: list[DeployedLayer] = []
    for layer in network.layers:
        sites = [i for i in network.sites_of(layer.name) if i in quantized.integers]
        if not sites:
            continue
        shape = tuple(quantized.model.params[layer.parameter].shape)
        whole = in_parameter(network, sites, indices, quantized.integers, shape)
        bias = None if whole is None else _bias(engine, sites, indices, quantized.edits)
        groups = [sites] if bias is not None else [[i] for i in sites]
        for number, group in enumerate(groups, 1):
            if whole is None or bias is None:
                weight = _in_graph(network, group[0], quantized.integers)
                own, leaves = _added(engine, group[0], quantized.edits)
            else:
                weight, (own, leaves) = whole, bias
            folded = (network.graph.leaves[network.sites[i].weight] for i in group)
            leaves = leaves.union(*folded) - {layer.parameter}
            name = _bias_name(layer.parameter, leaves)
            reads = [i for i in group if not network.sites[i].lookup]
            edit = quantized.edits.get((reads or group)[0], Edit())
            found.append(
                DeployedLayer(
                    name=layer.name if number == 1 else f"{layer.name}#{number}",
                    kind=layer.kind,
                    parameter=layer.parameter,
                    weight=weight,
                    bias=own,
                    bias_parameter=name,
                    absorbed=tuple(sorted(leaves - {name})),
                    inputs=edit.input_grid,
                    activation_bits=quantized.activation_bits.get(layer.name),
                    computed=bias is None,
                )
            )
    return tuple(found)


def in_parameter(
    network: Network,
    sites: list[int],
    indices: Mapping[int, np.ndarray | None],
    integers: Mapping[int, Integers],
    shape: tuple[int, ...],
) -> Integers | None:
    """All uses of a weight put together in its parameter's shape; `None` where they disagree."""
    size = int(np.prod(shape))
    parts: dict[str, np.ndarray] = {}
    seen = np.zeros(size, bool)
    for index in sites:
        where = indices[index]
        if where is None:
            return None
        own = _in_graph(network, index, integers)
        for name, value in (("codes", own.codes), ("scale", own.scale), ("zero", own.zero)):
            flat = parts.setdefault(name, np.zeros(size, value.dtype))
            given = np.broadcast_to(value, where.shape).ravel()
            place = where.ravel()
            again = seen[place]
            if not np.array_equal(flat[place][again], given[again]):
                return None
            flat[place] = given
        seen[where.ravel()] = True
    if not seen.all():
        return None
    grids = []
    for name in ("scale", "zero"):
        grids.append(narrowed(parts[name].reshape(shape)))
    return Integers(parts["codes"].reshape(shape), grids[0], grids[1], integers[sites[0]].bits)


def _in_graph(network: Network, index: int, integers: Mapping[int, Integers]) -> Integers:
    """A site's integers in the shape in which the graph multiplies by them."""
    site, own = network.sites[index], integers[index]
    shape = tuple(site.weight.aval.shape)
    codes, scale, zero = (
        np.asarray(site.from_columns(np.broadcast_to(part, own.codes.shape), shape))
        for part in (own.codes, own.scale, own.zero)
    )
    return Integers(codes, narrowed(scale), narrowed(zero), own.bits)


def narrowed(array: np.ndarray) -> np.ndarray:
    """The smallest array that broadcasts to this one: axes along which nothing changes are 1."""
    for axis in range(array.ndim):
        first = array.take([0], axis=axis)
        if np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return np.ascontiguousarray(array)


def _bias(
    engine: Engine, sites: list[int], indices: Mapping[int, Any], edits: Edits
) -> tuple[np.ndarray | None, frozenset[str]] | None:
    """What is added to the channels of a layer in all; `None` where its uses differ in it.

    Lookups have no say in it: nothing can be added to their channels.
    """
    sites = [i for i in sites if not engine.network.sites[i].lookup]
    ordered = sorted(sites, key=lambda i: int(indices[i].min()))
    parts = [_added(engine, index, edits) for index in ordered]
    leaves = frozenset().union(*(own for _, own in parts))
    values = [value for value, _ in parts if value is not None]
    if not values:
        return None, leaves
    if len(values) < len(parts):
        return None
    if len(values) == 1:
        return values[0], leaves
    sizes = sum(indices[index].size for index in sites)
    if len(np.unique(np.concatenate([indices[i].ravel() for i in sites]))) == sizes:
        return np.concatenate(values), leaves  # slices of one weight, one after the other
    return (values[0], leaves) if all(np.array_equal(values[0], v) for v in values) else None


def _added(engine: Engine, index: int, edits: Edits) -> tuple[np.ndarray | None, frozenset[str]]:
    """What is added to the channels of one site's output, and what it is made of."""
    own, leaves = trailing_bias(engine.network, engine.network.sites[index], engine.frontier)
    offset = edits.get(index, Edit()).offset
    if offset is not None:
        own = np.asarray(offset, np.float32) + (np.float32(0) if own is None else own)
    return own, leaves


def _bias_name(parameter: str, leaves: frozenset[str]) -> str | None:
    """The parameter beside a weight that holds its bias."""
    head, _, last = parameter.rpartition(".")
    for kind in ("weight", "kernel"):
        name = f"{head}.{last.replace(kind, 'bias')}" if head else last.replace(kind, "bias")
        if kind in last and name in leaves:
            return name
    return None
