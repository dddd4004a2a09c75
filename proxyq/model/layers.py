"""Find the quantizable layers of a graph: what has a weight that comes from parameters.

A *site* is one convolution or dot product, one of whose operands is made from parameters
alone and the other from data. A *layer* is a weight with all the sites that use it: a
weight used twice (tied) is one layer with two sites and one choice of bits.

Where the model asks for it (`Model.embeddings`), a lookup is a site too: a gather of whole rows
of a table made from parameters, by indices that depend on data. Each row has a grid of its own,
as each output channel has elsewhere: a table that is also the head's weight, whose output
channels are the rows, is one layer with one set of grids. The indices are never rounded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from proxyq.model.examples import Examples, locate, split_examples
from proxyq.model.graph import LAYER_PRIMITIVES, LOOKUP, Equation, Graph, Var

_SUFFIXES = (".weight", ".kernel", ".embedding")
EMBEDDING, TIED_EMBEDDING = "embedding", "tied-embedding"
"""Kinds of layers: a table that is looked up, and one that data are multiplied by as well."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One equation that multiplies data by a layer's weight, or looks up rows of it.

    - `position`: index in `graph.main`; `operand`: which operand is the weight.
    - `weight`: the variable of that operand, after all parameter-only arithmetic (folded
      batch norm, transposes): what hardware would store.
    - `channel_axes`: axes of the weight that count output channels; `output_axes`: where
      the same axes lie in the output, in the same order (there they always ascend);
      `channel_shape`: their sizes. `summed_axis`: the axis of a matrix that is summed over (of a
      table that is looked up, that within a row); `None` for convolutions, and where there are
      several.
    - `lookup`: whether it looks up rows. These are its channels, and its output has no axis
      for them: `output_axes` is empty, and nothing can be scaled or added channel by channel.
    - `feature_axes`: axes of the output that tell its features apart: the `output_axes`, or of
      a lookup those within a row.
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
    feature_axes: tuple[int, ...]
    lookup: bool
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
        """A vector `[channels]`, shaped to broadcast over the site's output; of no lookup."""
        sizes = [1] * self.output_ndim
        for axis, size in zip(self.output_axes, self.channel_shape, strict=True):
            sizes[axis] = size
        return vector.reshape(sizes)

    def rows(self, output: Any, batch: int) -> Any:
        """The output (or a tensor of its shape) as `[batch, elements]`."""
        return split_examples(output, self.examples, batch).reshape(batch, -1)

    def output_columns(self, output: Any, batch: int) -> Any:
        """The output (or a tensor of its shape) as `[batch, positions, channels]`.

        Of a lookup `[batch, positions, width]`, by the places within a row.
        """
        return columns_of(output, self.feature_axes, self.examples, batch)

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
    output channel is not counted. `group_scale_bits` is the same for each group size to choose
    from (`None`: one grid a channel), where there are several; other sizes it cannot have.

    `kind` is `conv`, `depthwise-conv`, `grouped-conv`, `transposed-conv`, `linear`, `embedding`
    (rows of a table, looked up: no MACs, and `channels` are the rows) or `tied-embedding` (a
    table that is looked up and multiplied by).
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
    group_scale_bits: Mapping[int | None, int] = field(default_factory=dict, hash=False)

    @property
    def reads_numbers(self) -> bool:
        """Whether it reads activations, which can be rounded; an embedding reads indices alone."""
        return self.kind != EMBEDDING


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
    lookup = graph.lookups and row_axis(eqn) is not None
    if eqn.primitive.name not in LAYER_PRIMITIVES and not lookup:
        return None

    def is_weight(atom: Any) -> bool:
        return (
            not graph.is_data(atom)
            and atom in graph.leaves
            and bool(graph.leaves[atom] - frozen)
            and jnp.issubdtype(atom.aval.dtype, jnp.floating)
        )

    left, right = eqn.invars[:2]
    if lookup:
        return 0 if graph.is_data(right) and is_weight(left) else None
    if graph.is_data(left) and is_weight(right):
        return 1
    if graph.is_data(right) and is_weight(left) and eqn.primitive.name == "dot_general":
        return 0
    return None


def row_axis(eqn: Equation) -> int | None:
    """The axis of a table that a gather takes whole rows from, one for each index.

    `None` for what is no gather, or takes other things: parts of rows, several axes at once.
    """
    if eqn.primitive.name != LOOKUP:
        return None
    numbers, table = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    axes = tuple(numbers.start_index_map)
    if len(axes) != 1 or len(table) < 2 or numbers.operand_batching_dims:
        return None
    whole = [*table[: axes[0]], 1, *table[axes[0] + 1 :]]
    if tuple(numbers.collapsed_slice_dims) != axes or list(eqn.params["slice_sizes"]) != whole:
        return None
    return axes[0]


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
    axis = row_axis(eqn)
    if axis is not None:
        return {
            "channel_axes": (axis,),
            "output_axes": (),
            "channel_shape": (weight.shape[axis],),
            "summed_axis": 1 - axis if weight.ndim == 2 else None,
            "output_ndim": eqn.outvars[0].aval.ndim,
            "feature_axes": tuple(eqn.params["dimension_numbers"].offset_dims),
            "lookup": True,
        }
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
        "feature_axes": output_axes,
        "lookup": False,
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
        products = [graph.main[site.position] for site in own if not site.lookup]
        kind = _kind(products[0]) if products else EMBEDDING
        if products and len(products) < len(own):
            kind = TIED_EMBEDDING
        layers.append(
            Layer(
                name=name,
                kind=kind,
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
    if site.lookup:
        return 0
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
