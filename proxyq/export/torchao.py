"""torchao: a network whose weights are torchao's integer tensors, with proxyq's own codes.

`IntxUnpackedToInt8Tensor` (torchao 0.18) holds codes of 1 to 8 bits, a byte each, with scales and
zero points for blocks; a block is an output channel here. It multiplies in `Linear` and `Conv2d`
(also grouped), at

    weight = (code - zero) * scale        in float32

which is the arithmetic of `proxyq.quantize.integers`. torchao's own configurations would choose
scales anew, so that ours carries the tensor itself, and `quantize_` puts it in by name.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from proxyq.errors import MissingExtra, ProxyqError, reason
from proxyq.export.agreement import (
    check_agreement,
    examples_of,
    module_runner,
    with_float_attention,
)
from proxyq.export.exported import Exported, check_strict
from proxyq.export.stored import Raised, exported, widths
from proxyq.export.torch_folder import (
    put_state,
    read_config,
    read_weights,
    restructured,
    structure,
    write_folder,
)
from proxyq.export.torch_module import (
    holders_of,
    input_facts,
    owner_of,
    to_torch,
)
from proxyq.model.torch_import import import_torch
from proxyq.ptq.deploy import DeployedLayer, deployed_layers
from proxyq.ptq.quantized import QuantizedModel
from proxyq.quantize.integers import groups_of
from proxyq.search.allocate.plan import FLOAT_BITS, Plan

SCHEMA = "proxyq/torchao/1"


def to_torchao(quantized: QuantizedModel, module: Any) -> Any:
    """A copy of `module`, on the CPU, that runs a quantized network with torchao's integers.

    `Linear`, `Conv2d` and `Embedding` get an `IntxUnpackedToInt8Tensor`; all other layers keep
    their rounded values as float, and inputs are rounded by torch's fake quantization, in hooks.

    **Arguments:**

    - `module`: the one that the model was made from, or one with the same names and shapes.

    **Raises** `MissingExtra` without torchao, `ProxyqError` as
    `proxyq.export.torch_module.to_torch`.
    """
    return _applied(quantized, module).module


def export_torchao(
    quantized: QuantizedModel,
    path: str | os.PathLike[str],
    *,
    module: Any = None,
    plan: Plan | None = None,
    strict: bool = False,
    inputs: Any = None,
) -> Exported:
    """Write a folder that `load_torchao` and torchao read.

    - `model.safetensors`: the tensors as `torchao.prototype.safetensors` flattens them; its
      `unflatten_tensor_state_dict` gives a state that `load_state_dict(assign=True)` takes.
    - `config.json`: `quantization_config` as transformers writes it, with torchao's
      `FqnToConfig` of bits by name, for who quantizes in torchao; `proxyq` for `load_torchao`.

    **Arguments:**

    - `module`: the torch module with the network's structure; the model's `source` by default.
    - `plan`: whose size budgets are counted again at the widths that are stored.
    - `strict`: refuse instead of storing a layer as float.
    - `inputs`: what the written network is run on and compared, `[images, …]`; random without.

    **Raises** `MissingExtra` without torchao; `ProxyqError` as `to_torchao`, when `strict` and a
    layer is stored otherwise, when the folder cannot be written, or when its network differs.
    """
    ao = _torchao()
    quantized, left_float = with_float_attention(quantized, strict=strict, format="torchao")
    module = quantized.model.source if module is None else module
    applied = _applied(quantized, module)
    raised, notes = applied.raised, [*left_float, *applied.notes]
    check_strict(widths(raised), strict=strict, format="torchao")
    made = applied.module
    tensors, metadata = _flattened(ao, made)
    layers = {
        name: ao.IntxWeightOnlyConfig(
            weight_dtype=weight.target_dtype, granularity=_granularity(ao, weight)
        )
        for name, weight in applied.weights.items()
    }
    kept = {name: None for name in applied.kept}
    config = {
        "quantization_config": {
            "quant_method": "torchao",
            "quant_type": {
                "default": ao.config_to_dict(ao.FqnToConfig(OrderedDict({**layers, **kept})))
            },
            "modules_to_not_convert": None,
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        },
        "proxyq": {
            "schema": SCHEMA,
            "model": {"name": quantized.model.name, "digest": quantized.model.digest()},
            **structure(made, module),
            "inputs": applied.inputs,
        },
    }
    examples = examples_of(quantized.model, inputs)

    def check(folder: Path) -> tuple[float, str | None]:
        run = module_runner(load_torchao(folder, module))
        return check_agreement(quantized, run, examples, what="torchao")

    size, (difference, note) = write_folder(path, tensors, metadata, config, check)
    notes += [note] if note else []
    notes.append(f"torchao keeps each code in a byte: the weights' file takes {size:,} bytes.")
    if applied.inputs:
        notes.append(
            f"{len(applied.inputs)} layers round what they read: load_torchao puts that in by "
            "hooks, torchao alone leaves it float."
        )
    return exported(
        quantized,
        Path(path),
        format="torchao",
        plan=plan,
        raised=raised,
        difference=difference,
        notes=notes,
    )


def load_torchao(path: str | os.PathLike[str], module: Any) -> Any:
    """The network of a folder of `export_torchao`, in a copy of a fresh module.

    **Raises** `MissingExtra` without torchao, `ProxyqError` when a file is missing or damaged, or
    the module is not the one that was exported: names and shapes must be the same.
    """
    ao = _torchao()
    folder = Path(path)
    config = read_config(folder, SCHEMA)
    made = restructured(module, config["proxyq"], folder)
    tensors, metadata = read_weights(folder)
    try:
        state, rest = ao.unflatten(tensors, metadata)
    except Exception as error:  # the library checks nothing of its own metadata
        raise ProxyqError(
            f"torchao cannot read the weights in {str(folder)!r}: {reason(error)}."
        ) from None
    put_state(made, {**state, **rest}, folder)
    return made


@dataclass(frozen=True, kw_only=True)
class _Applied:
    """A module with torchao's tensors, by the names of their modules; `kept` stay float."""

    module: Any
    weights: Mapping[str, Any]
    kept: tuple[str, ...]
    raised: Mapping[str, Raised]
    inputs: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]


def _applied(quantized: QuantizedModel, module: Any) -> _Applied:
    torch, ao = import_torch(), _torchao()
    made = to_torch(quantized, module).cpu()
    weights: dict[str, Any] = {}
    raised: dict[str, Raised] = {}
    inputs: dict[str, Mapping[str, Any]] = {}
    kept: list[str] = []
    moved: list[str] = []
    for layer in deployed_layers(quantized):
        holder, attribute = owner_of(module, layer)
        parameter, lookups = getattr(holder, attribute), layer.looked_up
        names = [name for name, *_ in holders_of(module, parameter, lookups=lookups)]
        if layer.inputs is not None:
            first = next(n for n, one in module.named_modules() if one is holder)
            inputs[first] = input_facts(layer)
        why = _refused(torch, [made.get_submodule(name) for name in names], attribute, layer)
        if why:
            raised[layer.name] = Raised(layer.bits, FLOAT_BITS, why)
            kept += names
            continue
        tensor = _tensor(torch, ao, layer)
        if not np.array_equal(tensor.dequantize().numpy(), layer.weight.values()):
            moved.append(layer.name)
        weights.update(dict.fromkeys(names, tensor))
    # One parameter for all modules that share a weight.
    shared = {id(one): torch.nn.Parameter(one, requires_grad=False) for one in weights.values()}
    given = {name: ao.Given(shared[id(one)]) for name, one in weights.items()}
    if given:
        ao.quantize_(made, ao.FqnToConfig(OrderedDict(given)), filter_fn=None)
    missed = [name for name in weights if not isinstance(made.get_submodule(name).weight, ao.Intx)]
    if missed:
        raise ProxyqError(f"torchao did not take the weight of {missed[0]!r}.")
    notes = []
    if moved:
        notes.append(
            f"zero points that are not whole move weights of {len(moved)} layers by a rounding of "
            "float32."
        )
    return _Applied(
        module=made,
        weights=weights,
        kept=tuple(kept),
        raised=raised,
        inputs=inputs,
        notes=tuple(notes),
    )


def _refused(torch: Any, holders: list[Any], attribute: str, layer: DeployedLayer) -> str | None:
    """Why torchao cannot hold a layer's integers; `None` when it can."""
    if layer.bits > 8:
        return "torchao holds 1 to 8 bits"
    for holder in holders:
        kind = type(holder).__name__
        # Attention reads these weights without calling a module, as a transposed matrix, which
        # torchao's tensor does in inference mode alone.
        if attribute != "weight" or kind == "NonDynamicallyQuantizableLinear":
            return "MultiheadAttention reads its weights itself, and torchao's tensors cannot"
        # It looks up rows of what it has dequantized.
        if not isinstance(holder, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)):
            return f"torchao has no integer weights for {kind}"
    groups = groups_of(layer.weight)
    if groups is not None and groups.axis == 1 and layer.weight.codes.ndim == 2:
        return None
    if any(size != 1 for size in layer.weight.scale.shape[1:] + layer.weight.zero.shape[1:]):
        return "its grids are not one for each output channel"
    return None


def _tensor(torch: Any, ao: Any, layer: DeployedLayer) -> Any:
    """A layer's integers as torchao's tensor: signed codes, a block a channel or group."""
    own, groups = layer.weight, groups_of(layer.weight)
    half = 1 << (own.bits - 1)
    block = (1, *own.codes.shape[1:]) if groups is None else (1, groups.size)
    starts = np.ix_(*(range(0, n, b) for n, b in zip(own.codes.shape, block, strict=True)))
    scale, zero = (np.broadcast_to(part, own.codes.shape)[starts] for part in (own.scale, own.zero))
    # (code - half) - (zero - half) = code - zero
    zero = (zero - np.float32(half)).astype(np.float32)
    whole = np.array_equal(zero, np.round(zero)) and zero.min() >= -128 and zero.max() <= 127
    return ao.Intx(
        torch.from_numpy((own.codes.astype(np.int16) - half).astype(np.int8)),
        torch.from_numpy(scale),
        torch.from_numpy(zero.astype(np.int8) if whole else zero),
        getattr(torch, f"int{own.bits}"),
        block,
        torch.float32,
        None,
    )


def _granularity(ao: Any, weight: Any) -> Any:
    """How torchao calls the blocks of one of its tensors."""
    if weight.ndim == 2 and weight.block_size[1] < weight.shape[1]:
        return ao.PerGroup(weight.block_size[1])
    return ao.PerAxis(0)


def _flattened(ao: Any, made: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The state as plain tensors and torchao's metadata, which has no names without a dot."""
    state = made.state_dict()
    rooted = {name: value for name, value in state.items() if "." not in name}
    if any(isinstance(value, ao.Intx) for value in rooted.values()):
        raise ProxyqError(
            "torchao cannot write a module that is a layer itself: put it in a torch.nn.Sequential."
        )
    tensors, metadata = ao.flatten({n: v for n, v in state.items() if n not in rooted})
    return {**tensors, **rooted}, metadata


@cache
def _torchao() -> Any:
    """What is used of torchao, and the configuration that holds a finished parameter."""
    import_torch()
    try:
        # torchao tells of kernels for other processors that it could not load.
        with _quiet():
            from torchao.core.config import AOBaseConfig, config_to_dict
            from torchao.prototype.safetensors.safetensors_support import (
                flatten_tensor_state_dict,
                unflatten_tensor_state_dict,
            )
            from torchao.quantization import (
                FqnToConfig,
                IntxUnpackedToInt8Tensor,
                IntxWeightOnlyConfig,
                quantize_,
            )
            from torchao.quantization.granularity import PerAxis, PerGroup
            from torchao.quantization.transform_module import register_quantize_module_handler
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "torchao":
            raise
        raise MissingExtra("torchao", "torchao", "Exporting to torchao") from error

    @dataclass
    class Given(AOBaseConfig):
        """The weight itself."""

        weight: Any

    @register_quantize_module_handler(Given)
    def put(module: Any, config: Given) -> Any:
        module.weight = config.weight
        return module

    return SimpleNamespace(
        Given=Given,
        FqnToConfig=FqnToConfig,
        Intx=IntxUnpackedToInt8Tensor,
        IntxWeightOnlyConfig=IntxWeightOnlyConfig,
        PerAxis=PerAxis,
        PerGroup=PerGroup,
        config_to_dict=config_to_dict,
        flatten=flatten_tensor_state_dict,
        unflatten=unflatten_tensor_state_dict,
        quantize_=quantize_,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
