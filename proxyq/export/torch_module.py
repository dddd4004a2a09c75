"""A quantized network put back into the `torch.nn.Module` that it came from, by name.

Weights and biases get the values that proxyq runs; batch norm that went into them becomes an
`Identity`. What exporters start from, and a way to run a plan in torch as it is.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from proxyq.errors import ProxyqError, UsageError
from proxyq.model.layers import TIED_EMBEDDING
from proxyq.model.torch_import import import_torch
from proxyq.ptq.deploy import DeployedLayer, deployed_layers
from proxyq.ptq.quantized import QuantizedModel

_OWN = frozenset({"weight", "bias", "running_mean", "running_var"})


def to_torch(quantized: QuantizedModel, module: Any, *, round_inputs: bool = True) -> Any:
    """A copy of `module`, in evaluation mode and float32, with a quantized network's numbers.

    **Arguments:**

    - `module`: the one that the model was made from, or one with the same names and shapes.
    - `round_inputs`: whether layers whose plan says so round what they read, by torch's own fake
      quantization in a hook before each of them.

    **Raises** `ProxyqError` when a layer cannot be put back: its module is missing or has another
    shape, its weight is computed from several parameters, something other than batch norm went
    into it, or its input cannot be reached; with `round_inputs` also where the plan rounds
    products of two activations, which no hook reaches.
    """
    torch = import_torch()
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"`module` must be a torch.nn.Module, got {type(module).__name__}.")
    if round_inputs and quantized.attention_bits:
        raise ProxyqError(
            f"the {len(quantized.attention_bits)} products of two activations (attention) that the "
            "plan rounds cannot be reached from outside of their modules: search without "
            "--attention-bits, or round no inputs (round_inputs=False)."
        )
    made = copy.deepcopy(module).eval().float()
    _fill(torch, made, quantized.model.params)
    layers = deployed_layers(quantized)
    norms: dict[str, str] = {}
    for layer in layers:
        biases = _biases(made, layer)
        _put_back(torch, made, layer)
        for norm in _norms(torch, made, layer, biases):
            if norms.setdefault(norm, layer.name) != layer.name:
                raise ProxyqError(
                    f"the batch norm {norm!r} follows two layers, {norms[norm]!r} and "
                    f"{layer.name!r}, and cannot be folded into both."
                )
    for norm in norms:
        owner, _, attribute = norm.rpartition(".")
        setattr(made.get_submodule(owner), attribute, torch.nn.Identity())
    if round_inputs:
        _round_inputs(torch, made, layers)
    _untie_embeddings(torch, made, module, layers)
    return made


def owner_of(module: Any, layer: DeployedLayer) -> tuple[Any, str]:
    """The module that multiplies by a layer's weight, and the attribute that it is.

    A layer may bear the name of an embedding whose weight its own is; an embedding multiplies by
    nothing, so another module that holds the weight is taken then.

    **Raises** `ProxyqError` where the module has none of that name and shape.
    """
    owner, _, attribute = layer.parameter.rpartition(".")
    try:
        holder = module.get_submodule(owner)
        found = getattr(holder, attribute)
        shape = tuple(found.shape)
    except AttributeError:
        raise ProxyqError(
            f"the module has no parameter {layer.parameter!r}: it is not the one that the model "
            "was made from."
        ) from None
    if layer.computed:
        raise ProxyqError(
            f"the weight of {layer.name!r} is computed from several parameters, or has other "
            "numbers at each use, and cannot be put back into one."
        )
    if shape != layer.weight.codes.shape:
        raise ProxyqError(
            f"the parameter {layer.parameter!r} has the shape {shape} in the module and "
            f"{layer.weight.codes.shape} in the quantized network."
        )
    return next(((m, name) for _, m, name in holders_of(module, found)), (holder, attribute))


def holders_of(module: Any, parameter: Any, *, lookups: bool = False) -> list[tuple[str, Any, str]]:
    """Names and modules that multiply by a parameter, and the attribute that it is in each.

    With `lookups` also those that look up its rows.
    """
    torch = import_torch()
    return [
        (name, one, attribute)
        for name, one in module.named_modules()
        if lookups or not isinstance(one, torch.nn.Embedding)
        for attribute, own in one.named_parameters(recurse=False, remove_duplicate=False)
        if own is parameter
    ]


def _untie_embeddings(torch: Any, made: Any, module: Any, layers: Sequence[DeployedLayer]) -> None:
    """Give embeddings that share the weight of a layer their own again, which stays float.

    Where the plan rounds what is looked up as well, they share it still.
    """
    tied = (owner_of(module, layer) for layer in layers if layer.kind == TIED_EMBEDDING)
    kept = {id(getattr(holder, attribute)) for holder, attribute in tied}
    for name, one in module.named_modules():
        if isinstance(one, torch.nn.Embedding) and id(one.weight) not in kept:
            if not holders_of(module, one.weight):
                continue
            weight = one.weight.detach().clone().float()
            made.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)


def _fill(torch: Any, module: Any, params: Mapping[str, Any]) -> None:
    """The model's numbers: the module may have others by now, and the model new ones."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, value in params.items():
            if name in own and tuple(own[name].shape) == np.shape(value):
                own[name].copy_(torch.from_numpy(np.array(value)))


def _put_back(torch: Any, module: Any, layer: DeployedLayer) -> None:
    holder, attribute = owner_of(module, layer)
    with torch.no_grad():
        getattr(holder, attribute).copy_(torch.from_numpy(layer.weight.values()))
        if layer.bias is None:
            return
        name = (layer.bias_parameter or "bias").rpartition(".")[2]
        bias = torch.nn.Parameter(torch.from_numpy(np.array(layer.bias)), requires_grad=False)
        if layer.bias_parameter is None and attribute != "weight":
            name = attribute.replace("weight", "bias")
        if not hasattr(holder, name):
            raise ProxyqError(
                f"the layer {layer.name!r} has a bias, and its module "
                f"({type(holder).__name__}) no place for one."
            )
        setattr(holder, name, bias)


def _biases(module: Any, layer: DeployedLayer) -> frozenset[str]:
    """All names of the bias of the module that multiplies by a layer's weight.

    A head that shares an embedding's weight may have a bias of a name that tells nothing of it.
    """
    bias = getattr(owner_of(module, layer)[0], "bias", None)
    named = module.named_parameters(remove_duplicate=False)
    return frozenset(name for name, own in named if own is bias)


def _norms(torch: Any, module: Any, layer: DeployedLayer, biases: frozenset[str]) -> list[str]:
    """The batch norms that went into a layer, wholly; its own `biases` are none."""
    found: dict[str, set[str]] = {}
    for name in layer.absorbed:
        if name in biases:
            continue
        owner, _, attribute = name.rpartition(".")
        found.setdefault(owner, set()).add(attribute)
    for owner, attributes in found.items():
        norm = module.get_submodule(owner)
        own = {n for n in _OWN if isinstance(getattr(norm, n, None), torch.Tensor)}
        kind = torch.nn.modules.batchnorm._BatchNorm
        if not isinstance(norm, kind) or attributes != own:
            raise ProxyqError(
                f"{sorted(f'{owner}.{a}' for a in attributes)} went into the weight of "
                f"{layer.name!r}, and only a whole batch norm can be taken out of a module."
            )
    return list(found)


def _round_inputs(torch: Any, module: Any, layers: Sequence[DeployedLayer]) -> None:
    for layer in layers:
        if layer.inputs is None:
            continue
        holder, attribute = owner_of(module, layer)
        kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
        inside = type(holder).__name__ == "NonDynamicallyQuantizableLinear"
        attention = isinstance(holder, torch.nn.MultiheadAttention)
        if inside or not (isinstance(holder, kinds) or (attention and attribute != "weight")):
            raise ProxyqError(
                f"what {layer.name!r} reads cannot be reached from outside of its module: leave "
                "its activations float (--pin 'PATTERN=BITS/float'), or round no inputs."
            )
        round_input(holder, input_facts(layer))


def input_facts(layer: DeployedLayer) -> dict[str, Any]:
    """The grid of what a layer reads as plain numbers: `bits`, `scale`, `zero`."""
    assert layer.inputs is not None and layer.activation_bits is not None
    return {
        "bits": layer.activation_bits,
        "scale": float(np.float32(layer.inputs.scale)),
        "zero": round(float(layer.inputs.zero)),
    }


def round_input(holder: Any, facts: Mapping[str, Any]) -> None:
    """Let a module round what it reads to the grid of `input_facts`, in a hook before it."""
    torch = import_torch()
    attention = isinstance(holder, torch.nn.MultiheadAttention)
    rounder = _Rounder(torch, facts, inputs=3 if attention else 1)
    holder.register_forward_pre_hook(rounder, with_kwargs=True)


class _Rounder:
    """Rounds the first inputs of a module to a grid."""

    def __init__(self, torch: Any, facts: Mapping[str, Any], *, inputs: int):
        self.torch, self.inputs = torch, inputs
        self.scale, self.zero = float(facts["scale"]), int(facts["zero"])
        bits = int(facts["bits"])
        if not (1 <= bits <= 16 and 0 < self.scale < 1e30 and 0 <= self.zero < 2**bits):
            raise ValueError("a grid of inputs is none")
        self.top = 2**bits - 1

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
        del module

        def one(x: Any) -> Any:
            return self.torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, 0, self.top)

        names = ("input", "query", "key", "value")
        args = tuple(one(x) if i < self.inputs else x for i, x in enumerate(args))
        return args, {k: one(v) if k in names else v for k, v in kwargs.items()}


def largest_difference(quantized: QuantizedModel, run: Any, inputs: Any) -> float:
    """How far a function of NCHW float32 images is from the quantized network, relative to the
    largest output."""
    ours = quantized.logits(inputs)
    theirs = np.asarray(run(jax.tree.map(np.asarray, inputs)))
    return float(np.max(np.abs(ours - theirs)) / max(float(np.max(np.abs(ours))), 1e-30))
