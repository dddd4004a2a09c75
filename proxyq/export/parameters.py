"""A quantized network as parameters of the network as its author wrote it, by name.

A layer is rounded with batch norm folded into it. Batch norm stays where it is here, so what
folding brought in is taken out again: the kernel is divided by the factor of its channel, which
leaves it on a grid of as many codes, and what is added to a channel goes into the last parameter
that adds to it. Nothing of the network's code changes, and any framework can run the numbers.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from proxyq.engine import Engine
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.function_import import kind_of
from proxyq.model.graph import Graph, Var
from proxyq.model.layers import Layer
from proxyq.model.network import LAYERS_AT
from proxyq.model.origin import Tail, parameter_indices, tails, trailing_bias, trailing_sums
from proxyq.model.scanned import whole_params
from proxyq.ptq.deploy import in_parameter
from proxyq.ptq.quantized import QuantizedModel
from proxyq.quantize.integers import Integers


def to_params(quantized: QuantizedModel) -> dict[str, np.ndarray]:
    """The model's parameters by name with a quantized network's numbers.

    `model.apply(to_params(quantized), x)` is `quantized.logits(x)` up to the rounding of float32
    where inputs of layers stay float, of bfloat16 where layers compute in that (2^-8 in each
    weight); rounded inputs are no parameters and are left out.

    **Raises** `ProxyqError` when a layer cannot be put back: its weight is computed from
    parameters, has other numbers at each use, or is read elsewhere as it was; or something is
    added to its channels and no parameter could hold it.
    """
    engine = Engine.build(quantized.model, LAYERS_AT, batch_size=LAYERS_AT)
    found = tails(engine.network)
    params = {name: np.asarray(value) for name, value in quantized.model.params.items()}
    for layer, weight in _unfolded(engine, quantized, found).items():
        params[engine.network.layer(layer).parameter] = weight.values()
    _add_offsets(engine, quantized, found, params)
    _check(engine, quantized, params)
    return params


def unfolded_integers(quantized: QuantizedModel) -> dict[str, Integers]:
    """Each quantized layer's codes in the shape of its parameter, by the layer's name.

    The scales are those of the parameter before folding, negative where batch norm turns the
    sign of a channel; they and the zero points broadcast against the codes.

    **Raises** `ProxyqError` as `to_params` does for weights.
    """
    engine = Engine.build(quantized.model, LAYERS_AT, batch_size=LAYERS_AT)
    return _unfolded(engine, quantized, tails(engine.network))


def to_nnx(quantized: QuantizedModel, module: Any) -> Any:
    """A copy of an nnx module, in evaluation mode, with a quantized network's numbers.

    Arrays keep the module's types: what is bfloat16 there takes the nearest numbers, and outputs
    are then those of the quantized network to the precision of bfloat16, 2^-8 in each weight.

    - `module`: the one that the model was made from, or one with the same names and shapes.

    **Raises** `ProxyqError` as `to_params` does, or when names or shapes do not match.
    """
    from flax import nnx

    from proxyq.model.flax_import import put_into_nnx

    if not isinstance(module, nnx.Module):
        raise UsageError(f"`module` must be a flax.nnx.Module, got {kind_of(module)}.")
    return put_into_nnx(module, whole_params(to_params(quantized), quantized.model.stacks))


def to_linen(quantized: QuantizedModel, variables: Mapping[str, Any]) -> dict[str, Any]:
    """A linen module's variables with a quantized network's numbers; types as `to_nnx` does.

    - `variables`: those that the model was made from, or others with the same names and shapes.

    **Raises** `ProxyqError` as `to_params` does, or when names or shapes do not match.
    """
    from proxyq.model.flax_import import put_into_linen

    if not isinstance(variables, Mapping) or "params" not in variables:
        raise UsageError(
            "`variables` must be a dictionary with the collection 'params', as `module.init` "
            f"returns it, got {kind_of(variables)}."
        )
    params = whole_params(to_params(quantized), quantized.model.stacks)
    return put_into_linen(variables, params)


def _unfolded(
    engine: Engine, quantized: QuantizedModel, found: Mapping[int, Tail]
) -> dict[str, Integers]:
    network = engine.network
    indices = parameter_indices(network)
    # A channel whose factor is 0 is constant: any kernel will do, and its own is all zeros.
    own = {
        index: one._replace(scale=_divided(one.scale, found[index].factor))
        for index, one in quantized.integers.items()
    }
    whole: dict[str, Integers] = {}
    for layer in network.layers:
        sites = [index for index in network.sites_of(layer.name) if index in own]
        if not sites:
            continue
        shape = tuple(quantized.model.params[layer.parameter].shape)
        weight = in_parameter(network, sites, indices, own, shape)
        if weight is None:
            raise ProxyqError(
                f"the weight of {layer.name!r} is computed from several parameters, or has other "
                f"numbers at each use, and cannot be put back into {layer.parameter!r}: leave the "
                "layer float, or use correction='none'."
            )
        whole[layer.name] = weight
    return whole


def _divided(scale: np.ndarray, factor: np.ndarray) -> np.ndarray:
    safe = np.where(factor == 0, 1.0, factor)
    return (scale.astype(np.float64) / safe).astype(np.float32)


def _add_offsets(
    engine: Engine,
    quantized: QuantizedModel,
    found: Mapping[int, Tail],
    params: dict[str, np.ndarray],
) -> None:
    """Put what a correction adds to the channels into the parameters that add to them."""
    changes: dict[str, np.ndarray] = {}
    for index, edit in quantized.edits.items():
        if edit.offset is None or not np.any(edit.offset):
            continue
        offset, tail = np.asarray(edit.offset, np.float64), found[index]
        layer = engine.network.sites[index].layer
        if tail.parameter is None or tail.where is None or tail.slope is None:
            raise ProxyqError(
                f"the layer {layer!r} has neither a bias nor a batch norm that could hold what the "
                "correction adds to its channels: use correction='weights' or 'none'."
            )
        if np.any((tail.slope == 0) & (offset != 0)):
            raise ProxyqError(
                f"what the correction adds to channels of {layer!r} cannot go into "
                f"{tail.parameter!r}, which is multiplied by 0: use correction='weights' or 'none'."
            )
        # y = ... + slope * p:  p <- p + offset / slope
        change = offset / np.where(tail.slope == 0, 1.0, tail.slope)
        shape = params[tail.parameter].shape
        whole = changes.setdefault(tail.parameter, np.zeros(shape))
        whole.reshape(-1)[tail.where] = change
    for name, change in changes.items():
        params[name] = (params[name] + change).astype(np.float32)


def _check(engine: Engine, quantized: QuantizedModel, params: Mapping[str, np.ndarray]) -> None:
    """Refuse parameters with which any layer would compute something else than it should.

    What the network computes of parameters alone (folded weights, biases) is compared with what
    the quantized network runs; all that no layer of the plan reads must be as it was.
    """
    network = engine.network
    before, after = engine.frontier, network.prelude(params)
    replaced: dict[Var, set[int]] = {}
    for index, edit in quantized.edits.items():
        site = network.sites[index]
        layer = network.layer(site.layer)
        if edit.weight is not None:
            _same(after[site.weight], edit.weight, layer, after[site.weight].dtype)
            replaced.setdefault(site.weight, set()).add(site.position)
        bias, _ = trailing_bias(network, site, before)
        if bias is not None:
            offset = 0 if edit.offset is None else np.asarray(edit.offset)
            found, _ = trailing_bias(network, site, after)
            _same(found, bias + offset, layer, after[site.weight].dtype)
        for position, operand, _ in trailing_sums(network.graph, site):
            replaced.setdefault(_read_by_main(network.graph, operand), set()).add(position)
    old = quantized.model.params
    changed = {name for name in params if not np.array_equal(params[name], old[name])}
    for var in network.graph.frontier:
        leaves = network.graph.leaves[var] & changed
        if not leaves or _readers(network.graph, var) <= replaced.get(var, set()):
            continue
        if not _close(after[var], before[var], after[var].dtype):
            raise ProxyqError(
                f"{', '.join(map(repr, sorted(leaves)))} would hold a quantized layer's numbers, "
                "and is read elsewhere in the network too, as it is: leave the layer float, or "
                "use correction='weights' or 'none'."
            )


def _same(found: Any, wanted: Any, layer: Layer, dtype: Any) -> None:
    if not _close(found, wanted, dtype):
        raise ProxyqError(
            f"the layer {layer.name!r} cannot be put back into {layer.parameter!r}: the network "
            "would compute another weight or bias from it."
        )


def _close(found: Any, wanted: Any, dtype: Any) -> bool:
    """Whether numbers are the same, but for what rounding to a layer's type does to them."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    largest = float(np.max(np.abs(wanted), initial=0.0))
    # In bfloat16: the kernel is rounded, and its product with batch norm's factor again, by half
    # a step each.
    step = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0
    return np.allclose(
        found, wanted, rtol=max(1e-4, 1.25 * step), atol=max(1e-5, step / 4) * largest + 1e-30
    )


def _read_by_main(graph: Graph, var: Var) -> Var:
    """The prelude's variable behind the broadcasts that main holds."""
    while var in graph.producer:
        (var,) = graph.main[graph.producer[var]].invars
    return var


def _readers(graph: Graph, var: Var) -> set[int]:
    """Positions of the equations that read a variable, also through broadcasts; -1: an output."""
    found = {-1} if var in graph.outputs else set()
    for index in graph.consumers.get(var, ()):
        eqn = graph.main[index]
        if eqn.primitive.name == "broadcast_in_dim":
            found |= _readers(graph, eqn.outvars[0])
        else:
            found.add(index)
    return found
