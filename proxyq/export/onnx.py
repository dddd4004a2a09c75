"""ONNX with QuantizeLinear and DequantizeLinear, for ONNX Runtime.

Each quantized weight is an integer initializer with a DequantizeLinear of its own, one scale and
zero point for each output channel, whose values are bit for bit those that proxyq runs:

    w = (q - zero) * scale        https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html

Each rounded input goes through QuantizeLinear and DequantizeLinear, preceded by a Clip to the
grid's range where that is narrower than the container; so do both operands of products of two
activations that are rounded. Everything else stays float.

Storage. Codes of 1 and 2 bits are INT2 where the installed packages know it (opset 25), else INT4
like those of 3 and 4; so they are in linear layers whose input is rounded, for ONNX Runtime 1.31
joins the two into an operator that it then refuses for INT2. Codes of 5 to 8 bits are INT8, of 16
INT16 (opset 21). Codes are shifted so that the zero point is 0 wherever the type has room for it.
Weights of exactly 8 bits whose input is rounded too are UINT8: without VNNI, x86 adds products of
UINT8 and INT8 in pairs with saturation at 16 bits, and 2 * 255 * 128 is too much.
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import jax
import numpy as np

from proxyq.engine import Edit, Engine
from proxyq.errors import MissingExtra, ProxyqError, first_line
from proxyq.export.agreement import (
    check_agreement,
    differences,
    examples_of,
    with_float_inputs,
)
from proxyq.export.exported import Exported, check_strict, exceeded_budgets, raised_and_sizes
from proxyq.export.torch_module import to_torch
from proxyq.files import check_writable, write_atomic
from proxyq.model.model import Model, call_arguments
from proxyq.model.network import LAYERS_AT, network
from proxyq.model.torch_import import import_torch
from proxyq.model.torch_import.export import quiet_export
from proxyq.ptq.deploy import DeployedLayer, deployed_layers
from proxyq.ptq.quantized import QuantizedModel, attention_grids
from proxyq.quantize.integers import groups_of
from proxyq.search.allocate.plan import Plan
from proxyq.version import __version__

OPSET, OPSET_INT2 = 21, 25
"""The first with 4-bit and 16-bit integers, and the first with 2-bit ones."""
OPTIMIZED_TOLERANCE = 2e-3
"""The median that is worth a note where ONNX Runtime optimises as it likes."""
MAX_BYTES = 2**31 - 2**20
"""A protocol buffer holds 2 GiB at most."""
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators that hand a weight on as it is, as far as the grid of what meets it is concerned.
_VIEWS = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Split", "Slice")


class Stored(NamedTuple):
    """A weight as ONNX holds it: `value = (codes - zero) * scale` along `axis`.

    `codes` and `zero` are whole numbers, int32, to be stored with `bits` each, `signed` or not.
    `scale` and `zero` are `[channels]`, or scalars where `axis` is `None`. With a `block` they
    have the axes of the codes, and along `axis` one value for so many codes in a row.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    axis: int | None
    bits: int
    signed: bool
    block: int | None = None

    def transposed(self, order: Sequence[int]) -> "Stored":
        """The same with its axes in another order."""
        axis = None if self.axis is None else list(order).index(self.axis)
        own = self._replace(codes=self.codes.transpose(order), axis=axis)
        if self.block is None:
            return own
        return own._replace(scale=self.scale.transpose(order), zero=self.zero.transpose(order))


def export_onnx(
    quantized: QuantizedModel,
    path: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    strict: bool = False,
    inputs: Any = None,
    module: Any = None,
) -> Exported:
    """Write a quantized network as an ONNX file, and run it in ONNX Runtime where there is one.

    **Arguments:**

    - `plan`: kept in the file, and its size budgets are checked for the weights as stored;
      `strict`: whether it is an error that ONNX stores a layer with more bits than asked for.
    - `inputs`: what to run the file on, `[images, …]` as the model takes them; random without.
    - `module`: the torch module with the network's structure; the model's `source` by default.

    The batch is the first axis of every input and output, of any size. Initializers and nodes
    are named by layer and parameter; `metadata_props` hold `proxyq_version`, `proxyq_bits` and
    `proxyq_plan` as JSON.

    **Raises** `ProxyqError` for a model that is not from torch, weights or grids that the format
    cannot hold, a layer that cannot be put back into the module, a raised width where
    `strict`, and outputs that are not the quantized network's; `MissingExtra` without onnx.
    """
    check_writable(path)
    module = quantized.model.source if module is None else module
    torch = import_torch()
    if not isinstance(module, torch.nn.Module):
        raise ProxyqError(
            f"ONNX files are made from torch modules, and the model {quantized.model.name!r} has "
            "none: name a model of torch, or choose another format (--to)."
        )
    _import_onnx("onnxscript")
    layers = deployed_layers(quantized)
    narrow = {layer.name for layer in layers if layer.bits <= 2 and not _is_rounded_matmul(layer)}
    two_bits = bool(narrow) and _runs_int2()
    weights = {
        layer.name: stored(layer, two_bits=two_bits and layer.name in narrow) for layer in layers
    }
    widths = {name: own.bits for name, own in weights.items()}
    sizes = raised_and_sizes(layers, widths)
    check_strict(sizes["raised"], strict=strict, format="ONNX")
    notes = list(exceeded_budgets(plan, widths, format="ONNX"))
    floats = to_torch(quantized, module, round_inputs=False)
    exported, note = _float_graph(
        floats,
        quantized.model,
        OPSET_INT2 if two_bits else OPSET,
        fused_attention=not quantized.attention_bits,
    )
    notes += [note] if note else []
    found = _put_weights(exported, floats, layers, weights)
    _describe(exported, layers, plan)
    content = _serialized(exported)
    examples = examples_of(quantized.model, inputs)
    _check(content, with_float_inputs(quantized), examples)
    if quantized.attention_bits:
        _round_attention(exported, quantized, examples)
    if any(layer.inputs is not None for layer in layers):
        _round_inputs(exported.graph, quantized, layers, found, weights)
    if quantized.attention_bits or any(layer.inputs is not None for layer in layers):
        content = _serialized(exported)
        note = _check(content, quantized, examples)
        notes += [note] if note else []
    difference, note = _optimized_difference(content, quantized, examples)
    notes += [note] if note else []
    return Exported(
        format="onnx",
        paths=(write_atomic(path, content),),
        difference=difference,
        notes=tuple(notes),
        **sizes,
    )


# -- storage -----------------------------------------------------------------------------


def stored(layer: DeployedLayer, *, two_bits: bool) -> Stored:
    """A layer's weight in the narrowest type that ONNX has for it; the values are the same.

    **Raises** `ProxyqError` for zero points that are not whole, and grids along several axes.
    """
    weight, groups = layer.weight, groups_of(layer.weight)
    bits = next(b for b in ((2,) if two_bits else ()) + (4, 8, 16) if b >= weight.bits)
    grids = [np.ndim(a) for a in (weight.scale, weight.zero) if np.size(a) > 1]
    shape = np.broadcast_shapes(np.shape(weight.scale), np.shape(weight.zero))
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    if len(axes) > 1 and groups is None:
        raise ProxyqError(
            f"the scales of {layer.name!r} differ along {len(axes)} axes of its weight, and ONNX "
            "has one: leave the layer float (--pin 'PATTERN=float')."
        )
    if groups is not None:
        # One value for each block along one axis, and for each code along all others.
        axis, block = groups.axis, groups.size
        scale, zero = (
            np.broadcast_to(part, weight.codes.shape).take(
                range(0, weight.codes.shape[axis], block), axis
            )
            for part in (weight.scale, weight.zero)
        )
    else:
        axis, block = (axes[0] if grids else None), None
        scale, zero = (
            np.broadcast_to(part, shape).reshape(-1 if axis is not None else ())
            for part in (weight.scale, weight.zero)
        )
    codes = weight.codes.astype(np.int32)
    if weight.bits == 1:
        # (c - 1/2) s = (2 c - 1) (s / 2)
        codes, scale, zero = 2 * codes - 1, scale / np.float32(2), np.zeros(zero.shape)
        return Stored(codes, scale, zero.astype(np.int32), axis, bits, True, block)
    if not np.array_equal(zero, np.round(zero)):
        raise ProxyqError(
            f"the zero points of {layer.name!r} are no whole numbers, which ONNX needs, after a "
            "correction that restores means in the weights: quantize with --correction "
            "statistics, or none."
        )
    zero = zero.astype(np.int32)
    if weight.bits == 8 and layer.inputs is not None:
        return Stored(codes, scale, zero, axis, bits, False, block)
    half = 2 ** (bits - 1)
    # Codes c - z fit from -half to half - 1, or the zero point has to be stored.
    fits = (zero <= half) & (2**weight.bits - 1 - zero <= half - 1)
    shift = np.where(fits, zero, half).astype(np.int32)
    if axis is None:
        along = shift
    elif block is not None:
        along = np.repeat(shift, block, axis)
    else:
        along = shift.reshape([-1 if a == axis else 1 for a in range(codes.ndim)])
    return Stored(codes - along, scale, zero - shift, axis, bits, True, block)


def _is_rounded_matmul(layer: DeployedLayer) -> bool:
    return layer.inputs is not None and not layer.kind.endswith("conv")


def _runs_int2() -> bool:
    """Whether the installed onnx, and ONNX Runtime where there is one, know 2-bit integers."""
    onnx = _import_onnx("onnx")
    kinds = onnx.TensorProto.DataType
    if "INT2" not in list(kinds.keys()) or onnx.defs.onnx_opset_version() < OPSET_INT2:
        return False
    make = onnx.helper
    graph = make.make_graph(
        [make.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0)],
        "probe",
        [],
        [make.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4])],
        [
            make.make_tensor("q", onnx.TensorProto.INT2, [4], [-2, -1, 0, 1]),
            make.make_tensor("s", onnx.TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0]),
            make.make_tensor("z", onnx.TensorProto.INT2, [4], [0, 0, 0, -1]),
        ],
    )
    probe = make.make_model(graph, opset_imports=[make.make_opsetid("", OPSET_INT2)])
    probe.ir_version = 10
    try:
        session = _session(probe.SerializeToString())
        return session is None or session.run(None, {})[0].tolist() == [-2.0, -2.0, 0.0, 8.0]
    except Exception:  # whatever an older runtime says
        return False


# -- the graph ---------------------------------------------------------------------------


def _float_graph(
    module: Any, model: Model, opset: int, *, fused_attention: bool
) -> tuple[Any, str | None]:
    """The module as an `onnx_ir.Model`, with the batch free where torch can trace it so.

    It is not optimised yet: constants may only be folded where no quantized weight is one. Without
    `fused_attention` the products inside attention are nodes of their own.
    """
    torch = import_torch()

    def example(shape: Any, batch: int) -> Any:
        drawn = torch.zeros((batch, *shape.shape))
        return drawn if np.issubdtype(shape.dtype, np.floating) else drawn.to(torch.int64)

    def run(batch: int, dynamic: bool) -> Any:
        leaves = jax.tree.map(lambda shape: example(shape, batch), model.inputs)
        args, kwargs = call_arguments(leaves)
        axes = torch.utils._pytree.tree_map(lambda leaf: {0: "batch"}, kwargs or args)
        if not fused_attention:
            return _unfused(module, args, kwargs, opset, dynamic=dynamic)
        with quiet_export(), contextlib.redirect_stdout(io.StringIO()):
            return torch.onnx.export(
                module,
                args,
                kwargs=kwargs or None,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=axes if dynamic else None,
            ).model

    try:
        return run(2, True), None
    except Exception:  # the module may ask for the size of its batch
        pass
    try:
        return run(1, False), "the file takes one image at a time: torch cannot free its batch."
    except Exception as error:
        raise ProxyqError(
            f"torch.onnx cannot export {model.name!r} ({first_line(error)}): rewrite the "
            "operator that it names, or choose another format (--to)."
        ) from error


def _unfused(module: Any, args: Any, kwargs: Any, opset: int, *, dynamic: bool) -> Any:
    """The same with attention as its two products and a softmax between them."""
    torch = import_torch()
    shapes = None
    if dynamic:
        shapes = torch.export.ShapesCollection()
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs)):
            shapes[leaf] = {0: torch.export.Dim.DYNAMIC}
    with quiet_export(), contextlib.redirect_stdout(io.StringIO()):
        traced = torch.export.export(
            module, args, kwargs or None, dynamic_shapes=shapes, strict=False
        )
        fused = torch.ops.aten.scaled_dot_product_attention.default
        traced = traced.run_decompositions({fused: _attention})
        found = torch.onnx.export(
            traced, (), dynamo=True, optimize=False, verbose=False, opset_version=opset
        ).model
    ir = _import_onnx("onnx_ir")
    free = {own.shape[0] for own in found.graph.inputs if not isinstance(own.shape[0], int)}
    made = (output for node in found.graph for output in node.outputs)
    for value in (*found.graph.inputs, *made):
        for axis, size in enumerate(value.shape or ()):
            if size in free:
                value.shape[axis] = ir.SymbolicDim("batch")
    return found


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(q k' scale + mask) v, of torch's arguments, whose products read what proxyq's do.

    torch's own decomposition scales queries and keys beforehand, each by the root of the scale.
    A row whose entries are all masked attends to nothing and gives zeros, as in torch.
    """
    torch = import_torch()
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = torch.matmul(query, key.transpose(-1, -2))
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.softmax(scores, -1)
    if attn_mask is not None and not is_causal:
        dead = scores.amax(-1, keepdim=True) == -math.inf
        weights = weights.masked_fill(dead, 0.0)
    return torch.matmul(weights, value)


def _put_weights(
    model: Any, module: Any, layers: Sequence[DeployedLayer], weights: Mapping[str, Stored]
) -> dict[str, Any]:
    """Integer weights take the place of float ones in a graph.

    **Returns** the values that the layers' products read them as, by layer.
    """
    graph = model.graph
    values = {layer.name: _weight_values(graph, module, layer) for layer in layers}
    for value in (value for found in values.values() for value in found):
        del graph.initializers[value.name]
        value.const_value = None
        graph.inputs.append(value)
    # A weight that the graph is given is one that nothing can be folded into.
    _import_onnx("onnxscript.optimizer").optimize(model)
    outputs = {}
    for layer in layers:
        own, found = weights[layer.name], values[layer.name]
        uses = [use for value in found for use in value.uses()]
        order = _common_transpose(uses)
        if order is not None:
            own = own.transposed(order)
        for value in found:
            graph.inputs.remove(value)
        # The layer may bear the name of an embedding that stays float, whose weight the head's was.
        taken = layer.parameter in graph.initializers
        name = found[0].name if taken else layer.parameter
        outputs[layer.name] = output = _dequantized(graph, name, own)
        for value in found if order is None else [use.node.outputs[0] for use in uses]:
            value.replace_all_uses_with(output, replace_graph_outputs=True)
        if order is not None:
            for node in {use.node for use in uses}:
                graph.remove(node, safe=True)
    graph.sort()
    return outputs


def _weight_values(graph: Any, module: Any, layer: DeployedLayer) -> list[Any]:
    """The initializers that hold a layer's weight: one, or one for each name of a tied weight."""
    torch = import_torch()
    named = dict(module.named_parameters(remove_duplicate=False))
    own = named[layer.parameter]
    rounded = torch.from_numpy(layer.weight.values())
    if not torch.equal(own, rounded):
        # The name is that of an embedding that stays float; the head has the weight.
        same = (one for one in named.values() if torch.equal(one, rounded))
        own = next(same, own)
    names = [name for name, tensor in named.items() if tensor is own]
    found = [graph.initializers[name] for name in names if name in graph.initializers]
    if found:
        return found
    wanted = own.detach().to(torch.float32).numpy()
    for value in graph.initializers.values():
        held = value.const_value
        if held is None or tuple(held.shape) != wanted.shape:
            continue
        if np.array_equal(held.numpy(), wanted):
            found.append(value)
    if not found:
        raise ProxyqError(
            f"the weight {layer.parameter!r} is not in the graph that torch.onnx makes: leave the "
            "layer float (--pin 'PATTERN=float')."
        )
    return found


def _round_inputs(
    graph: Any,
    quantized: QuantizedModel,
    layers: Sequence[DeployedLayer],
    weights: Mapping[str, Any],
    stored_weights: Mapping[str, Stored],
) -> None:
    """QuantizeLinear and DequantizeLinear before each product of layers that round inputs."""
    sites_of = network(quantized.model, LAYERS_AT).sites_of
    rounded: dict[Any, Any] = {}
    for layer in layers:
        if layer.inputs is None or layer.activation_bits is None:
            continue
        grids = [quantized.edits[i].input_grid for i in sites_of(layer.name)]
        keys = [
            (float(np.float32(grid.scale)), float(np.float32(grid.zero)), layer.activation_bits)
            for grid in grids
            if grid is not None
        ]
        products = _products(weights[layer.name])
        if len(set(keys)) == 1:
            keys = keys[:1] * len(products)
        if not products or len(keys) != len(products):
            raise ProxyqError(
                f"what {layer.name!r} reads cannot be told apart in the graph that torch.onnx "
                "makes: leave its activations float (--pin 'PATTERN=BITS/float')."
            )
        for number, ((node, place), key) in enumerate(zip(products, keys, strict=True), 1):
            read = node.inputs[place]
            if (read, key) not in rounded:
                name = f"{layer.name}.input" if number == 1 else f"{layer.name}.input#{number}"
                rounded[read, key] = _rounded(graph, name, read, *key)
            node.replace_input_with(place, rounded[read, key])
            if _bias_overflows(node, key[0], stored_weights[layer.name].scale):
                _add_bias_apart(graph, node)
    graph.sort()


def _round_attention(model: Any, quantized: QuantizedModel, examples: Any) -> None:
    """QuantizeLinear and DequantizeLinear before both operands of products of two activations."""
    graph = model.graph
    products = network(quantized.model, LAYERS_AT).attention
    nodes = _nodes_of_two_activations(graph)
    sides = _sides(model, nodes, quantized, examples) if len(nodes) == len(products) else None
    if sides is None:
        raise ProxyqError(
            f"the {len(products)} products of two activations cannot be told apart among the "
            f"{len(nodes)} in the graph that torch.onnx makes: search without --attention-bits."
        )
    for index, grids in attention_grids(products, quantized.edits).items():
        name, node = products[index].name, nodes[index]
        for place, side in enumerate(sides[index]):
            scale, zero = (float(np.float32(part)) for part in grids[side][:2])
            key = (scale, zero, quantized.attention_bits[name])
            own = _rounded(graph, f"{name}.{('left', 'right')[side]}", node.inputs[place], *key)
            node.replace_input_with(place, own)
    graph.sort()


def _nodes_of_two_activations(graph: Any) -> list[Any]:
    """The products both of whose operands depend on the graph's inputs, in execution order.

    Those of whole numbers, such as masks, are none.
    """
    known, found = set(graph.inputs), []
    for node in graph:
        data = [value in known for value in node.inputs]
        if node.op_type in (*PRODUCTS, "Einsum") and len(data) >= 2 and all(data[:2]):
            kinds = [value.dtype for value in node.inputs[:2] if value.dtype is not None]
            if all(kind.is_floating_point() for kind in kinds):
                found.append(node)
        if any(data):
            known.update(node.outputs)
    return found


def _sides(
    model: Any, nodes: Sequence[Any], quantized: QuantizedModel, examples: Any
) -> list[tuple[int, int]] | None:
    """Which operand of ours (0 is the left one) each operand of the nodes is, by their values.

    An einsum may have them the other way round. `None` where they are no operands of ours. Without
    ONNX Runtime they are taken as they come.
    """
    graph, one = model.graph, jax.tree.map(lambda x: x[:1], examples)
    read = list(dict.fromkeys(value for node in nodes for value in node.inputs[:2]))
    before = len(graph.outputs)
    graph.outputs.extend(read)
    session = _session(_serialized(model), optimized=False)
    del graph.outputs[before:]
    if session is None:
        return [(0, 1)] * len(nodes)
    outputs = session.run(None, _feeds(session, one))[before:]
    theirs = dict(zip(read, outputs, strict=True))
    found = []
    for node, ours in zip(nodes, _operands(with_float_inputs(quantized), one), strict=True):
        own = [np.sort(theirs[value].ravel()) for value in node.inputs[:2]]
        orders = [
            order
            for order in ((0, 1), (1, 0))
            if all(_alike(a, ours[side]) for a, side in zip(own, order, strict=True))
        ]
        if not orders:
            return None
        found.append(orders[0])
    return found


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two sorted arrays are the same numbers, but for the order of sums."""
    return a.shape == b.shape and bool(np.abs(a - b).max() <= 1e-3 * max(np.abs(b).max(), 1e-30))


def _operands(quantized: QuantizedModel, inputs: Any) -> list[list[np.ndarray]]:
    """All values of both operands of each product of two activations, sorted."""
    engine = Engine.build(quantized.model, 1, batch_size=1)
    products, found = engine.network.attention, []
    ((batch, _),) = engine.chunks(inputs)
    state = engine.start(batch)
    for index in range(len(engine.network.sites)):
        own = [var for one in products if one.site == index for var in one.operands]
        edit = quantized.edits.get(index, Edit())
        state, values = engine.step(state, index, edit, capture=tuple(own))
        arrays = [np.sort(np.asarray(value).ravel()) for value in values]
        found += [arrays[i : i + 2] for i in range(0, len(arrays), 2)]
    return found


def _bias_overflows(node: Any, step: float, scale: np.ndarray) -> bool:
    """Whether ONNX Runtime would saturate a bias, which it rounds to 32 bits and `step * scale`.

    So it does by default where inputs, weights and outputs are integers, and checks no range.
    """
    if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    bias = node.inputs[2].const_value
    if bias is None:
        return True
    with np.errstate(divide="ignore", over="ignore"):
        return bool((np.abs(bias.numpy()) / np.abs(step * scale) >= 2.0**30).any())


def _add_bias_apart(graph: Any, node: Any) -> None:
    """A product and an addition in place of one operator for both."""
    ir = _import_onnx("onnx_ir")
    bias, output = node.inputs[2], node.outputs[0]
    node.replace_input_with(2, None)
    if node.op_type == "Conv":
        # [channels] -> [channels, 1, 1], beside [batch, channels, height, width]
        value = bias.const_value.numpy().reshape(-1, *[1] * (len(node.inputs[1].shape) - 2))
        bias = _initializer(graph, f"{bias.name}.column", value, ir.DataType.FLOAT)
    added = ir.node("Add", [output, bias], name=f"{node.name}.bias")
    added.outputs[0].name = f"{output.name}.biased"
    added.outputs[0].type, added.outputs[0].shape = output.type, output.shape
    output.replace_all_uses_with(added.outputs[0], replace_graph_outputs=True)
    added.replace_input_with(0, output)
    graph.append(added)


def _products(value: Any) -> list[tuple[Any, int]]:
    """The products that a weight goes into, each with the place of what it is multiplied by."""
    found = []
    for use in value.uses():
        node = use.node
        if node.op_type in PRODUCTS and use.idx < 2:
            found.append((node, 1 - use.idx))
        elif node.op_type in _VIEWS and use.idx == 0:
            found += [product for output in node.outputs for product in _products(output)]
    return found


def _common_transpose(uses: Sequence[Any]) -> list[int] | None:
    """The order of axes where all uses of a weight transpose it alike: stored so, it need not."""
    orders = {
        tuple(use.node.attributes["perm"].as_ints())
        if use.node.op_type == "Transpose" and "perm" in use.node.attributes
        else None
        for use in uses
    }
    order = orders.pop() if len(orders) == 1 else None
    return None if order is None else list(order)


def _dequantized(graph: Any, name: str, own: Stored) -> Any:
    """The output of a new DequantizeLinear of a layer's weight."""
    ir, kind = _import_onnx("onnx_ir"), _integer_type(own.bits, own.signed)
    inputs = [
        _initializer(graph, name, own.codes, kind),
        _initializer(graph, f"{name}.scale", own.scale, ir.DataType.FLOAT),
        _initializer(graph, f"{name}.zero_point", own.zero, kind),
    ]
    attributes = {} if own.axis is None else {"axis": own.axis}
    if own.block is not None:
        attributes["block_size"] = own.block
    output = _node(graph, "DequantizeLinear", inputs, name, attributes)
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(own.codes.shape)
    return output


def _rounded(graph: Any, name: str, x: Any, scale: float, zero: float, bits: int) -> Any:
    """A value after QuantizeLinear and DequantizeLinear, clipped before where the type is wider."""
    ir = _import_onnx("onnx_ir")
    width, whole, step = (8 if bits <= 8 else 16), round(zero), np.float32(scale)
    kind = _integer_type(width, False)
    if bits < width:
        ends = [np.float32(code - whole) * step for code in (0, 2**bits - 1)]
        bounds = [
            _initializer(graph, f"{name}.{end}", np.array(value), ir.DataType.FLOAT)
            for end, value in zip(("min", "max"), ends, strict=True)
        ]
        x = _node(graph, "Clip", [x, *bounds], name, {}, like=x)
    grid = [
        _initializer(graph, f"{name}.scale", np.array(step), ir.DataType.FLOAT),
        _initializer(graph, f"{name}.zero_point", np.array(whole), kind),
    ]
    codes = _node(graph, "QuantizeLinear", [x, *grid], name, {}, like=x)
    codes.type = ir.TensorType(kind)
    return _node(graph, "DequantizeLinear", [codes, *grid], name, {}, like=x)


def _node(graph: Any, kind: str, inputs: Any, name: str, attributes: Any, like: Any = None) -> Any:
    """The output of a new node; the graph is brought in order when all are there."""
    node = _import_onnx("onnx_ir").node(kind, inputs, attributes=attributes, name=f"{name}.{kind}")
    output = node.outputs[0]
    output.name = f"{name}.{kind.removesuffix('Linear').lower()}d"
    if like is not None:
        output.type, output.shape = like.type, like.shape
    graph.append(node)
    return output


def _initializer(graph: Any, name: str, array: np.ndarray, kind: Any) -> Any:
    ir = _import_onnx("onnx_ir")
    # The types of few bits are ml_dtypes' to NumPy; onnx_ir packs them.
    tensor = ir.tensor(np.ascontiguousarray(array.astype(kind.numpy())), dtype=kind, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(kind), const_value=tensor)
    graph.register_initializer(value)
    return value


def _integer_type(bits: int, signed: bool) -> Any:
    return _import_onnx("onnx_ir").DataType[f"{'INT' if signed else 'UINT'}{bits}"]


def _describe(model: Any, layers: Sequence[DeployedLayer], plan: Plan | None) -> None:
    """What the file says of itself; the exporter's own notes name files of this machine."""
    graph = model.graph
    for part in (model, graph, *graph, *(o for node in graph for o in node.outputs)):
        part.metadata_props.clear()
    for part in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        part.metadata_props.clear()
    for node in graph:
        node.doc_string = None
    bits = {layer.name: [layer.bits, layer.activation_bits] for layer in layers}
    model.producer_name, model.producer_version = "proxyq", __version__
    model.metadata_props["proxyq_version"] = __version__
    model.metadata_props["proxyq_bits"] = json.dumps(bits)
    if plan is not None:
        model.metadata_props["proxyq_plan"] = plan.to_json()


def _serialized(model: Any) -> bytes:
    ir = _import_onnx("onnx_ir")
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    if size > MAX_BYTES:
        raise ProxyqError(
            f"the network takes {size / 2**30:.1f} GiB as ONNX, and a file holds 2: leave fewer "
            "layers float, or choose another format (--to)."
        )
    return ir.serde.serialize_model(model).SerializeToString(deterministic=True)


# -- running it --------------------------------------------------------------------------


def _check(content: bytes, quantized: QuantizedModel, examples: Any) -> str | None:
    """A note where the file cannot be compared closely; see `check_agreement`."""
    theirs = run_onnx(content, examples, optimized=False)
    if theirs is None:
        return None
    return check_agreement(quantized, lambda _: theirs, examples, what="the ONNX file")[1]


def _optimized_difference(
    content: bytes, quantized: QuantizedModel, examples: Any
) -> tuple[float | None, str | None]:
    """How far ONNX Runtime's own optimisations move the outputs, and a note where it is much.

    They round biases to 32 bits, and what meets a weight of 4 or 8 bits in a MatMul to 8 bits.
    """
    try:
        theirs = run_onnx(content, examples)
    except Exception as error:  # its own kinds: it has run the same file operator by operator
        return None, (
            "ONNX Runtime runs the file operator by operator, but not with its default "
            f"optimisations ({first_line(error)}): disable them in the session's options."
        )
    if theirs is None:
        return None, "the file was not run: `pip install 'proxyq[onnx]'` brings ONNX Runtime."
    found = differences(quantized.logits(examples), theirs)
    note = None
    if not np.median(found) <= OPTIMIZED_TOLERANCE:
        note = (
            f"ONNX Runtime's default optimisations change the outputs by {np.median(found):.1e} "
            "of the largest in the median: set session.qdq_matmulnbits_accuracy_level to 1, or "
            "measure the accuracy with them."
        )
    return float(found.max()), note


def run_onnx(content: bytes, inputs: Any, *, optimized: bool = True) -> np.ndarray | None:
    """The first output of a model in ONNX Runtime on the CPU; `None` where that is missing.

    `inputs` are arrays `[images, …]` in the structure that the proxyq model takes.
    """
    session = _session(content, optimized=optimized)
    if session is None:
        return None
    feeds = _feeds(session, inputs)
    if not isinstance(session.get_inputs()[0].shape[0], int):
        return session.run(None, feeds)[0]
    rows = range(len(jax.tree.leaves(inputs)[0]))
    runs = [session.run(None, {k: v[i : i + 1] for k, v in feeds.items()})[0] for i in rows]
    return np.concatenate(runs)


def _feeds(session: Any, inputs: Any) -> dict[str, np.ndarray]:
    """Inputs by the names of the session's, and of their types."""
    by_name = inputs if isinstance(inputs, Mapping) else {}
    leaves = jax.tree.leaves(inputs)
    return {
        own.name: np.asarray(by_name.get(own.name, leaf)).astype(_NUMPY.get(own.type, np.float32))
        for own, leaf in zip(session.get_inputs(), leaves, strict=True)
    }


_NUMPY = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}


def _session(content: bytes, *, optimized: bool = True) -> Any:
    """A session of ONNX Runtime, with its default settings or as the file says it, operator by
    operator; `None` where it is missing."""
    try:
        runtime = import_module("onnxruntime")
    except ImportError:
        return None
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what it has to say comes as exceptions
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _import_onnx(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or name).partition(".")[0]
        if package not in ("onnx", "onnx_ir", "onnxscript"):
            raise
        raise MissingExtra(package, "onnx", "Writing an ONNX file") from error
