"""compressed-tensors: the format that vLLM, transformers and llm-compressor read.

A folder with `config.json`, whose `quantization_config` names a group of layers for each scheme,
and `model.safetensors`, whose weights the library's own compressors wrote: `pack-quantized` (codes
at their true width in int32 words), or `int-quantized` (a byte each) for 8-bit weights with
rounded inputs. Formats hold `Linear` layers of 2 to 8 bits, one grid an output channel:

    weight = (code - zero) * scale        in float32
"""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
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
    with_float_inputs,
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
from proxyq.export.torch_module import holders_of, owner_of, to_torch
from proxyq.model.layers import Layer
from proxyq.model.network import LAYERS_AT, network
from proxyq.model.torch_import import import_torch, import_torchvision
from proxyq.ptq.deploy import DeployedLayer, deployed_layers
from proxyq.ptq.quantized import QuantizedModel
from proxyq.quantize.integers import Integers, groups_of
from proxyq.search.allocate.plan import FLOAT_BITS, Plan
from proxyq.search.allocate.together import fused

SCHEMA = "proxyq/compressed-tensors/1"


def export_compressed_tensors(
    quantized: QuantizedModel,
    path: str | os.PathLike[str],
    *,
    module: Any = None,
    plan: Plan | None = None,
    strict: bool = False,
    inputs: Any = None,
) -> Exported:
    """Write a folder that `load_compressed_tensors` and compressed-tensors read.

    `Linear` layers become integers, those of 1 bit in 2 bits with the same values. All others,
    convolutions among them, keep their rounded values in float32 and read float inputs. What was
    written is read again, and its weights must be the quantized network's bit for bit.

    **Arguments:**

    - `module`: the torch module with the network's structure; the model's `source` by default.
    - `plan`: whose size budgets are counted again at the widths that are stored.
    - `strict`: refuse instead of storing a layer with more bits than asked for.
    - `inputs`: what the written network is run on and compared, `[images, …]`; random without.
      Where inputs stay float that the plan rounds, they do in both.

    **Raises** `MissingExtra` without compressed-tensors; `ProxyqError` when layers that runtimes
    fuse have different bits, as `proxyq.export.torch_module.to_torch`, when `strict` and a layer is
    stored otherwise, when the folder cannot be written, or when its network differs.
    """
    ct = _compressed_tensors()
    torch = import_torch()
    quantized, left_float = with_float_attention(
        quantized, strict=strict, format="compressed-tensors"
    )
    module = quantized.model.source if module is None else module
    graph = network(quantized.model, LAYERS_AT).layers
    check_fused(graph, _widths(quantized), quantized.activation_bits)
    made = to_torch(quantized, module, round_inputs=False).cpu()
    facts = structure(made, module)  # before the library changes the names of parameters
    schemes: dict[str, _Scheme] = {}
    by_layer: dict[str, tuple[str, ...]] = {}
    raised: dict[str, Raised] = {}
    unrounded: list[str] = []
    for layer in deployed_layers(quantized):
        holder, attribute = owner_of(module, layer)
        names = [name for name, *_ in holders_of(module, getattr(holder, attribute))]
        why, own = _refused(torch, [made.get_submodule(n) for n in names], attribute, layer)
        if own is None:
            raised[layer.name] = Raised(layer.bits, FLOAT_BITS, why)
        elif own.bits != layer.bits:
            raised[layer.name] = Raised(layer.bits, own.bits, why)
        scheme = None if own is None else _Scheme.of(own, layer)
        if layer.inputs is not None and (scheme is None or scheme.activation_bits is None):
            unrounded.append(layer.name)
        if scheme is not None:
            schemes.update(dict.fromkeys(names, scheme))
            by_layer[layer.name] = tuple(names)
    for siblings in fused(graph):
        _agree(siblings, schemes, by_layer, raised)
    check_strict(widths(raised), strict=strict, format="compressed-tensors")
    if not schemes:
        told = f": {next(iter(raised.items()))[1].why}" if raised else ""
        raise ProxyqError(
            f"compressed-tensors can hold no layer of the network{told}; export to another format."
        )
    config = _configuration(torch, ct, made, schemes)
    _compress(torch, ct, made, config, schemes)
    written = config.model_copy(update={"quantization_status": ct.Status.COMPRESSED})
    examples = examples_of(quantized.model, inputs)

    def check(folder: Path) -> tuple[float, str | None]:
        back = load_compressed_tensors(folder, module)
        _check_weights(back, schemes)
        same = with_float_inputs(quantized, unrounded)
        return check_agreement(same, module_runner(back), examples, what="compressed-tensors")

    size, (difference, note) = write_folder(
        path,
        made.state_dict(),
        {"format": "pt"},
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                **written.model_dump(mode="json"),
                "version": ct.version,
            },
            "proxyq": {
                "schema": SCHEMA,
                "model": {"name": quantized.model.name, "digest": quantized.model.digest()},
                **facts,
                "inputs": {},
            },
        },
        check,
    )
    notes = [*left_float, f"the weights' file takes {size:,} bytes.", *([note] if note else [])]
    if unrounded:
        notes.append(
            f"inputs of {', '.join(unrounded)} stay float: compressed-tensors rounds those of "
            "quantized Linear layers to 8 bits at most."
        )
    return exported(
        quantized,
        Path(path),
        format="compressed-tensors",
        plan=plan,
        raised=raised,
        difference=difference,
        notes=notes,
    )


def load_compressed_tensors(path: str | os.PathLike[str], module: Any) -> Any:
    """The network of a folder of `export_compressed_tensors`, in a copy of a fresh module.

    compressed-tensors reads and decompresses it; layers round what they read as it does.

    **Raises** `MissingExtra` without compressed-tensors, `ProxyqError` when a file is missing or
    damaged, or the module is not the one that was exported: names and shapes must be the same.
    """
    ct, torch = _compressed_tensors(), import_torch()
    folder = Path(path)
    config = read_config(folder, SCHEMA)
    made = restructured(module, config["proxyq"], folder)
    try:
        own = ct.QuantizationConfig.model_validate(config["quantization_config"])
    except (KeyError, ValueError) as error:
        raise ProxyqError(
            f"compressed-tensors cannot read the configuration in {str(folder)!r}: {reason(error)}."
        ) from None
    try:
        ct.apply(made, own, show_progress=False)
        found = [one for one in made.modules() if hasattr(one, "quantization_scheme")]
        with torch.no_grad():
            for one in found:  # gives it the names and shapes of compressed weights
                one.weight_scale.fill_(1)
                ct.compress(one)
    except Exception as error:  # a scheme that it reads and cannot apply
        raise ProxyqError(
            f"compressed-tensors cannot apply the configuration in {str(folder)!r}: "
            f"{reason(error)}."
        ) from None
    tensors, _ = read_weights(folder)
    put_state(made, tensors, folder)
    try:
        for one in found:
            ct.decompress(one)
    except Exception as error:
        raise ProxyqError(
            f"compressed-tensors cannot decompress the weights in {str(folder)!r}: {reason(error)}."
        ) from None
    return made


def _agree(
    siblings: tuple[str, ...],
    schemes: dict[str, "_Scheme"],
    by_layer: Mapping[str, tuple[str, ...]],
    raised: dict[str, Raised],
) -> None:
    """Store layers that are fused alike: all as float where one is, asymmetric where one is."""
    found = [one for name in siblings for one in by_layer.get(name, ())]
    refused = [name for name in siblings if name not in by_layer]
    if refused:
        for name in siblings:
            if name in by_layer:
                why = f"it is fused with {refused[0]!r}, which stays float"
                raised[name] = Raised(raised[refused[0]].asked, FLOAT_BITS, why)
        for one in found:
            schemes.pop(one)
    elif not all(schemes[one].symmetric for one in found):
        for one in found:
            schemes[one].symmetric = False


def _widths(quantized: QuantizedModel) -> dict[str, int | str]:
    """Bits of the layers, with the size of their groups where they have such: `4g64`."""
    found: dict[str, int | str] = dict(quantized.bits)
    sites = network(quantized.model, LAYERS_AT).sites
    for index, own in quantized.integers.items():
        if (groups := groups_of(own)) is not None:
            found[sites[index].layer] = f"{own.bits}g{groups.size}"
    return found


def check_fused(
    layers: Sequence[Layer], bits: Mapping[str, int | str], activation_bits: Mapping[str, int]
) -> None:
    """**Raises** `ProxyqError` when layers that runtimes fuse have different bits, or groups."""
    for names in fused(layers):
        chosen = {name: (bits.get(name), activation_bits.get(name)) for name in names}
        if len(set(chosen.values())) < 2:
            continue
        told = ", ".join(
            f"{name} {_shown(own)}" + (f"/{_shown(beside)}" if activation_bits else "")
            for name, (own, beside) in chosen.items()
        )
        grouped = any(isinstance(own, str) for own, _ in chosen.values())
        what = "bits and groups" if grouped else "bits"
        parent = names[0].rpartition(".")[0]
        last = "|".join(re.escape(name.rpartition(".")[2]) for name in names)
        pattern = "re:" + (re.escape(f"{parent}.") if parent else "") + f"({last})"
        raise ProxyqError(
            f"runtimes of compressed-tensors fuse {told} bits into one matrix, which needs equal "
            f"{what}: search with --tie '{pattern}'."
        )


def _shown(bits: int | str | None) -> str:
    return "float" if bits is None else str(bits)


@dataclass
class _Scheme:
    """How one `Linear` is stored; `codes` are those of a weight in its own shape."""

    integers: Integers
    symmetric: bool
    activation_bits: int | None
    grid: Any

    @classmethod
    def of(cls, integers: Integers, layer: DeployedLayer) -> "_Scheme":
        bits = layer.activation_bits if layer.inputs is not None else None
        bits = bits if bits is not None and bits <= 8 else None
        symmetric = bool(np.all(integers.zero == 2 ** (integers.bits - 1)))
        return cls(integers, symmetric, bits, layer.inputs)

    @property
    def group_size(self) -> int | None:
        groups = groups_of(self.integers)
        return None if groups is None else groups.size

    @property
    def key(self) -> tuple[int, bool, int | None, int | None]:
        return self.integers.bits, self.symmetric, self.activation_bits, self.group_size

    @property
    def format(self) -> str:
        whole = self.integers.bits == 8 and self.activation_bits is not None
        return "int-quantized" if whole else "pack-quantized"


def _refused(
    torch: Any, holders: list[Any], attribute: str, layer: DeployedLayer
) -> tuple[str, Integers | None]:
    """The integers to store and why they have more bits; `None` where the layer stays float."""
    own = layer.weight
    if layer.looked_up:
        return "the format holds Linear layers and no tables that are looked up", None
    if own.bits > 8:
        return "the format holds 2 to 8 bits", None
    for holder in holders:
        kind = type(holder).__name__
        if attribute != "weight" or kind == "NonDynamicallyQuantizableLinear":
            return "MultiheadAttention reads its weights itself", None
        if not isinstance(holder, torch.nn.Linear):
            return f"the format holds Linear layers and no {kind}", None
    groups = groups_of(own)
    by_groups = groups is not None and groups.axis == 1
    if not by_groups and (own.scale.shape[1] != 1 or own.zero.shape[1] != 1):
        return "its grids are not one for each output channel", None
    why = ""
    if own.bits == 1 and np.all(own.zero == 0.5):
        # (c - 1/2) s = ((2 c + 1) - 2) s/2: one bit is every second code of two.
        half = np.float32(0.5)
        own = Integers(own.codes * 2 + 1, own.scale * half, np.full_like(own.zero, 2), 2)
        why = "the format holds 2 to 8 bits, and 2 have the same values"
    zero = own.zero
    if not np.array_equal(zero, np.round(zero)) or zero.min() < 0 or zero.max() >= 2**own.bits:
        return (
            "its zero points are no codes, as correction 'weights' leaves them (take another)",
            None,
        )
    return why, own


def _configuration(torch: Any, ct: Any, made: Any, schemes: Mapping[str, _Scheme]) -> Any:
    """A group for each scheme, with layers by name, and the names of layers that stay float."""
    groups: dict[Any, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault((scheme.key, scheme.format), []).append(name)
    found = {}
    for index, (((bits, symmetric, beside, size), form), names) in enumerate(groups.items()):
        rounded = None
        if beside is not None:
            rounded = ct.Args(num_bits=beside, type="int", symmetric=False, strategy="tensor")
        found[f"group_{index}"] = ct.Scheme(
            targets=names,
            weights=ct.Args(
                num_bits=bits,
                type="int",
                symmetric=symmetric,
                strategy="channel" if size is None else "group",
                group_size=size,
            ),
            input_activations=rounded,
            format=form,
        )
    forms = sorted({scheme.format for scheme in schemes.values()})
    kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd, torch.nn.MultiheadAttention)
    return ct.QuantizationConfig(
        config_groups=found,
        format=forms[0] if len(forms) == 1 else "mixed-precision",
        ignore=[
            name
            for name, one in made.named_modules()
            if isinstance(one, kinds) and name not in schemes
        ],
    )


def _compress(torch: Any, ct: Any, made: Any, config: Any, schemes: Mapping[str, _Scheme]) -> None:
    """Give the library our scales and zero points, and let it compress."""
    ct.apply(made, config, show_progress=False)
    for name, scheme in schemes.items():
        one, own = made.get_submodule(name), scheme.integers
        if not hasattr(one, "quantization_scheme"):
            raise ProxyqError(f"compressed-tensors did not take the layer {name!r}.")
        half, fan_in = np.float32(2 ** (own.bits - 1)), own.codes.shape[1]
        starts = slice(0, fan_in, scheme.group_size or fan_in)
        scale, zero = (
            np.broadcast_to(part, own.codes.shape)[:, starts] for part in (own.scale, own.zero)
        )
        scale, zero = scale.astype(np.float32), (zero - half).astype(np.int8)
        with torch.no_grad():
            one.weight_scale.copy_(torch.from_numpy(scale))
            one.weight_zero_point.copy_(torch.from_numpy(zero))
            if scheme.activation_bits is not None:
                middle = 2 ** (scheme.activation_bits - 1)
                one.input_scale.fill_(float(np.float32(scheme.grid.scale)))
                one.input_zero_point.fill_(round(float(scheme.grid.zero)) - middle)
            ct.compress(one)


def _check_weights(back: Any, schemes: Mapping[str, _Scheme]) -> None:
    for name, scheme in schemes.items():
        found = back.get_submodule(name).weight.detach().numpy()
        if not np.array_equal(found, scheme.integers.values()):
            raise ProxyqError(f"compressed-tensors reads other weights of {name!r} than written.")


@cache
def _compressed_tensors() -> Any:
    """What is used of compressed-tensors."""
    import_torch()
    with suppress(MissingExtra):
        # It imports transformers, and that torchvision, which may need help.
        import_torchvision()
    try:
        from compressed_tensors.compressors.base import compress_module, decompress_module
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
            apply_quantization_config,
        )
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "compressed_tensors":
            raise
        raise MissingExtra(
            "compressed-tensors", "compressed-tensors", "Exporting to compressed-tensors"
        ) from error
    return SimpleNamespace(
        Args=QuantizationArgs,
        QuantizationConfig=QuantizationConfig,
        Scheme=QuantizationScheme,
        Status=QuantizationStatus,
        apply=apply_quantization_config,
        compress=compress_module,
        decompress=decompress_module,
        version=metadata.version("compressed-tensors"),
    )
