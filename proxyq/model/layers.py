"""Find the quantizable layers of a graph: what has a weight that comes from parameters.

A *site* is one convolution or dot product, one of whose operands is made from parameters
alone and the other from data. A *layer* is a weight with all the sites that use it: a
weight used twice (tied) is one layer with two sites and one choice of bits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from proxyq.model.examples import Examples, locate, split_examples
from proxyq.model.graph import LAYER_PRIMITIVES, Equation, Graph, Var

_SUFFIXES = (".weight", ".kernel", ".embedding")


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One equation that multiplies data by a layer's weight.

    - `position`: index in `graph.main`; `operand`: which operand is the weight.
    - `weight`: the variable of that operand, after all parameter-only arithmetic (folded
      batch norm, transposes): what hardware would store.
    - `channel_axes`: axes of the weight that count output channels; `output_axes`: where
      the same axes lie in the output, in the same order (there they always ascend);
      `channel_shape`: their sizes. `summed_axis`: the axis of a matrix that is summed over;
      `None` for convolutions, and where there are several.
    - `examples`: where the examples of the batch lie in the output; `apart` tells whether
      that is known. If not, the network must run one example at a time.
    """

    position: int
    operand: int
    weight: Var
    layer: str
    channel_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    channel_shape: tuple[int, ...]
    summed_axis: int | None
    output_ndim: int
    examples: Examples
    apart: bool

    def columns(self, weight: Any) -> Any:
        """The weight as `[fan_in, channels]`: one column an output channel."""
        return weight_columns(weight, self.channel_axes)

    def from_columns(self, columns: Any, shape: tuple[int, ...]) -> Any:
        """The inverse of `columns`, for a weight of this shape."""
        order = self._order(len(shape))
        moved = columns.reshape([shape[axis] for axis in order])
        return moved.transpose(sorted(range(len(shape)), key=order.__getitem__))

    def on_output(self, vector: Any) -> Any:
        """A vector `[channels]`, shaped to broadcast over the site's output."""
        sizes = [1] * self.output_ndim
        for axis, size in zip(self.output_axes, self.channel_shape, strict=True):
            sizes[axis] = size
        return vector.reshape(sizes)

    def rows(self, output: Any, batch: int) -> Any:
        """The output (or a tensor of its shape) as `[batch, elements]`."""
        return split_examples(output, self.examples, batch).reshape(batch, -1)

    def output_columns(self, output: Any, batch: int) -> Any:
        """The output (or a tensor of its shape) as `[batch, positions, channels]`."""
        return columns_of(output, self.output_axes, self.examples, batch)

    def _order(self, ndim: int) -> tuple[int, ...]:
        rest = (axis for axis in range(ndim) if axis not in self.channel_axes)
        return (*rest, *self.channel_axes)


@partial(jax.jit, static_argnums=1)
def weight_columns(weight: Any, channel_axes: tuple[int, ...]) -> Any:
    """`Site.columns`, from plain numbers; jitted, for it runs once a layer outside of others."""
    rest = (axis for axis in range(weight.ndim) if axis not in channel_axes)
    channels = math.prod(weight.shape[axis] for axis in channel_axes)
    return weight.transpose((*rest, *channel_axes)).reshape(-1, channels)


def columns_of(output: Any, channel_axes: tuple[int, ...], examples: Examples, batch: int) -> Any:
    """`Site.output_columns`, from plain numbers (a site would not hash by value)."""
    channels = math.prod(output.shape[axis] for axis in channel_axes)
    split = split_examples(output, examples, batch)  # every old axis moves back by one
    last = [axis + 1 for axis in channel_axes]
    rest = [axis for axis in range(1, split.ndim) if axis not in last]
    return split.transpose((0, *rest, *last)).reshape(batch, -1, channels)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A quantizable layer, as the allocation and the reports see it.

    `weights` counts elements, `macs` multiply-accumulates for ONE example, and
    `output_shape` leaves the batch axis out. Layers with the same `group` feed the same
    residual sum; `shares_input` names those that read the same tensor. `scale_bits` is what the
    scales of groups of weights take, where weights are rounded in groups; the one scale of an
    output channel is not counted.
    """

    name: str
    kind: str
    parameter: str
    weights: int
    macs: int
    channels: int
    output_shape: tuple[int, ...]
    group: str | None = None
    shares_input: str | None = None
    scale_bits: int = 0


def find_sites(
    graph: Graph, frozen: frozenset[str], parameters: Mapping[str, Any]
) -> tuple[tuple[Site, ...], dict[str, str]]:
    """All sites in execution order, and the parameter that each layer is named after."""
    places = locate(graph)
    found: list[tuple[int, int, Var, str]] = []
    for position, eqn in enumerate(graph.main):
        operand = _weight_operand(eqn, graph, frozen)
        if operand is not None:
            weight = eqn.invars[operand]
            leaf = _primary(graph.leaves[weight] - frozen, weight.aval.size, parameters)
            found.append((position, operand, weight, leaf))
    names = _layer_names({leaf for *_, leaf in found}, parameters)
    sites = tuple(
        Site(
            position=position,
            operand=operand,
            weight=weight,
            layer=names[leaf],
            **_axes(graph.main[position], operand),
            **_examples(graph, places, position),
        )
        for position, operand, weight, leaf in found
    )
    return sites, {names[leaf]: leaf for *_, leaf in found}


def _weight_operand(eqn: Equation, graph: Graph, frozen: frozenset[str]) -> int | None:
    if eqn.primitive.name not in LAYER_PRIMITIVES:
        return None

    def is_weight(atom: Any) -> bool:
        return (
            not graph.is_data(atom)
            and atom in graph.leaves
            and bool(graph.leaves[atom] - frozen)
            and jnp.issubdtype(atom.aval.dtype, jnp.floating)
        )

    left, right = eqn.invars[:2]
    if graph.is_data(left) and is_weight(right):
        return 1
    if graph.is_data(right) and is_weight(left) and eqn.primitive.name == "dot_general":
        return 0
    return None


def _primary(leaves: frozenset[str], size: int, parameters: Mapping[str, Any]) -> str:
    """The parameter a weight is named after, among all that it is made from."""

    def rank(name: str) -> tuple[bool, bool, int, str]:
        shape = parameters[name].shape
        count = math.prod(shape)
        # A gain or a scale enters many weights; the weight proper has its element count.
        return (count != size, len(shape) < 2, -count, name)

    return min(leaves, key=rank)


def _layer_names(leaves: set[str], parameters: Mapping[str, Any]) -> dict[str, str]:
    """Names as users know them: the module's, when nothing else would have the same."""
    short = {}
    for leaf in parameters:
        if leaf in leaves:
            suffix = next((s for s in _SUFFIXES if leaf.endswith(s)), "")
            short[leaf] = leaf.removesuffix(suffix)
    taken = list(short.values())
    return {leaf: name if taken.count(name) == 1 else leaf for leaf, name in short.items()}


def _axes(eqn: Equation, operand: int) -> dict[str, Any]:
    weight, data = eqn.invars[operand].aval, eqn.invars[1 - operand].aval
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        channel_axes, output_axes = (numbers.rhs_spec[0],), (numbers.out_spec[1],)
        summed = None
    else:
        contract, batch = eqn.params["dimension_numbers"]
        bound = {*contract[operand], *batch[operand]}
        free = [axis for axis in range(weight.ndim) if axis not in bound]
        batches = len(batch[operand])
        # The output of a dot product is (batch, free axes of the left, free of the right).
        data_free = data.ndim - len(contract[1 - operand]) - batches
        start = batches + (data_free if operand == 1 else 0)
        channel_axes = (*batch[operand], *free)
        output_axes = (*range(batches), *range(start, start + len(free)))
        summed = contract[operand][0] if len(contract[operand]) == 1 else None
    return {
        "channel_axes": channel_axes,
        "output_axes": output_axes,
        "channel_shape": tuple(weight.shape[axis] for axis in channel_axes),
        "summed_axis": summed,
        "output_ndim": eqn.outvars[0].aval.ndim,
    }


def _examples(graph: Graph, places: Mapping[Var, Examples], position: int) -> dict[str, Any]:
    out = graph.main[position].outvars[0]
    if out in places:
        return {"examples": places[out], "apart": True}
    # A single example is the whole tensor, wherever it lies.
    return {"examples": Examples(0, out.aval.shape[0]), "apart": graph.batch_size == 1}


def describe(
    graph: Graph, sites: tuple[Site, ...], named: Mapping[str, str], parameters: Mapping[str, Any]
) -> tuple[Layer, ...]:
    """One `Layer` for each weight, in the order of first use."""
    layers = []
    for name in dict.fromkeys(site.layer for site in sites):
        own = [site for site in sites if site.layer == name]
        parameter = named[name]
        operands = {site.weight: site.weight.aval.size for site in own}
        # Slices of one tensor add up; the same tensor seen twice (transposed) does not.
        weights = sum(operands.values())
        if len(own) > 1:
            weights = min(weights, math.prod(parameters[parameter].shape))
        first = graph.main[own[0].position]
        layers.append(
            Layer(
                name=name,
                kind=_kind(first),
                parameter=parameter,
                weights=weights,
                macs=sum(_macs(graph, site) for site in own),
                channels=math.prod(own[0].channel_shape),
                output_shape=_per_example(
                    first.outvars[0].aval.shape, own[0].examples, graph.batch_size
                ),
            )
        )
    return tuple(layers)


def _kind(eqn: Equation) -> str:
    if eqn.primitive.name == "dot_general":
        return "linear"
    groups = eqn.params["feature_group_count"]
    numbers = eqn.params["dimension_numbers"]
    if groups > 1:
        channels = eqn.invars[0].aval.shape[numbers.lhs_spec[1]]
        return "depthwise-conv" if groups == channels else "grouped-conv"
    if any(step != 1 for step in eqn.params["lhs_dilation"]):
        return "transposed-conv"
    return "conv"


def _macs(graph: Graph, site: Site) -> int:
    """Multiply-accumulates of one site for one example."""
    eqn = graph.main[site.position]
    outputs = eqn.outvars[0].aval.size
    weight = eqn.invars[site.operand].aval
    # Every output element sums over the fan-in of its channel.
    fan_in = weight.size // math.prod(site.channel_shape)
    if eqn.primitive.name == "conv_general_dilated":
        # A transposed convolution inserts zeros between its inputs; nobody multiplies them.
        return outputs * fan_in // graph.batch_size // math.prod(eqn.params["lhs_dilation"])
    return outputs * fan_in // graph.batch_size


def _per_example(shape: tuple[int, ...], examples: Examples, batch: int) -> tuple[int, ...]:
    rest = shape[examples.axis] // batch  # what else is folded into the axis, such as windows
    kept = (rest,) if rest > 1 else ()
    return (*shape[: examples.axis], *kept, *shape[examples.axis + 1 :])
