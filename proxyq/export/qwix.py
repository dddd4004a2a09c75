"""Rules and parameters for qwix, which quantizes Flax models.

A folder with two files. `rules.json` has one rule for each layer, in qwix's terms, by the exact
path of its module; `parameters.safetensors` has all parameters of the network as its author wrote
it, batch norm in its place, and beside each quantized one its `NAME.scale` and `NAME.zero_point`:

    kernel = (code - zero_point) * scale        codes are whole numbers of qwix's type

`load_qwix` makes qwix's own arrays of the codes, so that nothing is calibrated again. Without
proxyq, `qwix.quantize_model` takes the rules and `qwix.quantize_params` the parameters; it finds
scales of its own then. qwix sets `absmax = (2^(bits - 1) - 1/2) * scale`, half a step beyond the
last code, so its scales differ from ours even where all codes are the same.

qwix (github.com/google/qwix) holds codes of 2 to 4 bits in int4 and of 5 to 8 in int8. It
quantizes a convolution's weights only together with its inputs, in one type and around zero.
"""

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from proxyq.engine import Engine
from proxyq.errors import (
    MissingExtra,
    ProxyqError,
    UsageError,
    kind_and_line,
    reason,
    shown,
)
from proxyq.export.agreement import (
    LOOSEST_TOLERANCE,
    TOLERANCE,
    differences,
    examples_of,
    with_float_attention,
)
from proxyq.export.exported import (
    Exported,
    check_strict,
    exceeded_budgets,
    raised_and_sizes,
)
from proxyq.export.parameters import to_params, unfolded_integers
from proxyq.files import check_folder, read_bytes, read_json, write_together
from proxyq.model.function_import import kind_of
from proxyq.model.model import call_arguments, logits_of
from proxyq.model.network import LAYERS_AT
from proxyq.model.scanned import whole_params
from proxyq.provenance import provenance
from proxyq.ptq.deploy import DeployedLayer, deployed_layers, narrowed
from proxyq.ptq.quantized import QuantizedModel
from proxyq.quantize.integers import Integers, Runs, groups_of
from proxyq.search.allocate.plan import FLOAT_BITS, Plan

SCHEMA = "proxyq/qwix/1"
RULES, PARAMETERS = "rules.json", "parameters.safetensors"


class Stored(NamedTuple):
    """A weight as qwix holds it: codes around zero, in the shape of its parameter.

    `scale` and `zero` broadcast against the codes; no `zero` where it is 0 everywhere. Groups of
    weights that share a scale are qwix's `tiles`.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    bits: int
    tiles: Runs | None = None


def export_qwix(
    quantized: QuantizedModel,
    path: str | os.PathLike[str],
    *,
    module: Any = None,
    plan: Plan | None = None,
    strict: bool = False,
    inputs: Any = None,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a quantized network as rules and parameters for qwix, and run them there.

    **Arguments:**

    - `path`: a folder, made where it is missing.
    - `module`: the nnx module, or the pair of linen module and variables, that the model was
      made from; the model's `source` by default.
    - `plan`: its size budgets are checked for the weights as stored; `strict`: whether it is an
      error to exceed them, or that qwix cannot hold a layer at its bit-width.
    - `inputs`: what to run the result on, `[images, …]`; random without.
    - `apply_kwargs`: fixed keyword arguments of the module's call.

    **Raises** `ProxyqError` for a model that is not from Flax, weights that cannot be put back
    (see `to_params`), outputs that are not the quantized network's, and where `strict`;
    `MissingExtra` without qwix.
    """
    import_qwix()
    check_folder(path)
    quantized, left_float = with_float_attention(quantized, strict=strict, format="qwix")
    module = quantized.model.source if module is None else module
    _check_kind(module)
    integers, stacks = unfolded_integers(quantized), quantized.model.stacks
    params = whole_params(to_params(quantized), stacks)
    layers = [layer for layer in deployed_layers(quantized) if layer.name in integers]
    forms, rules, reasons = _choose(quantized, layers, integers)
    example = quantized.model.example(1)
    example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
    made = _quantize(module, params, [rules[name] for name in forms], example, apply_kwargs)
    for layer in layers:
        if layer.name in forms and not _fits(made.find(layer.parameter), forms[layer.name]):
            del forms[layer.name]
            reasons.setdefault("qwix does not find the weight in the module's call", []).append(
                layer.name
            )
    own = [rules[name] for name in forms]
    stored = {
        layer.name: _container(forms[layer.name].bits) if layer.name in forms else FLOAT_BITS
        for layer in layers
    }
    sizes = raised_and_sizes(layers, stored)
    check_strict(sizes["raised"], strict=strict, format="qwix")
    notes = [
        *left_float,
        *(
            f"{why}: {', '.join(names)} stay float, on their grids."
            for why, names in reasons.items()
        ),
        *exceeded_budgets(plan, stored, format="qwix"),
    ]
    rounded = [layer for layer in layers if layer.inputs is not None]
    if rounded:
        notes.append(
            "qwix rounds inputs by the largest magnitude of each example, around zero, not on the "
            "fixed grids of the plan: outputs differ."
        )
        left = [n.name for n in rounded if n.name not in forms or not rules[n.name]["act_qtype"]]
        if left:
            notes.append(f"The inputs of {', '.join(left)} stay float.")
    tensors = {name: np.ascontiguousarray(value) for name, value in params.items()}
    records = {}
    for layer in layers:
        if layer.name not in forms:
            continue
        form = forms[layer.name]
        records[layer.name] = {"parameter": layer.parameter, "bits": form.bits}
        tensors[f"{layer.parameter}.scale"] = _once_a_tile(form.scale, form)
        if form.zero is not None:
            zero = _once_a_tile(form.zero, form).astype(np.int8)
            tensors[f"{layer.parameter}.zero_point"] = zero
    weights = {layer.parameter: forms[layer.name] for layer in layers if layer.name in forms}
    made = _quantize(module, params, own, example, apply_kwargs)
    if forms:
        calibrated = _difference(quantized, made.calibrated(), inputs, apply_kwargs)
        notes.append(
            "Calibrated by qwix itself, not loaded with `load_qwix`, outputs differ from the "
            f"quantized network's by {calibrated:.2g} of the largest."
        )
    difference = _difference(quantized, made.filled(weights), inputs, apply_kwargs)
    half = _has_half_precision(quantized, module)
    if half:
        notes.append("What the module holds or computes in bfloat16 agrees to its precision alone.")
    if not rounded and difference > (LOOSEST_TOLERANCE if half else TOLERANCE):
        raise ProxyqError(
            f"the outputs in qwix differ from the quantized network's by {difference:.2g} of the "
            "largest: is `module` the one that the model was made from?"
        )
    record = {
        "schema": SCHEMA,
        "model": {"name": quantized.model.name, "digest": quantized.model.digest()},
        "rules": own,
        "layers": records,
        "notes": notes,
        "provenance": provenance(),
    }
    folder = Path(path)
    files = (folder / PARAMETERS, folder / RULES)
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    write_together({files[0]: save(tensors), files[1]: text}, folder=folder)
    return Exported(format="qwix", paths=files, difference=difference, notes=tuple(notes), **sizes)


def load_qwix_rules(path: str | os.PathLike[str]) -> list[Any]:
    """The `qwix.QuantizationRule`s of a folder that `export_qwix` wrote.

    **Raises** `ProxyqError` when the file is no such one; `MissingExtra` without qwix.
    """
    return _rules(import_qwix(), _record(path)["rules"])


def load_qwix(
    path: str | os.PathLike[str],
    module: Any,
    inputs: Any,
    *,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The quantized network of a folder that `export_qwix` wrote, in qwix, with our own scales.

    - `module`: the nnx module, or the pair of linen module and variables, to quantize.
    - `inputs`: a batch as the module's call takes it; only shapes matter.

    **Returns** a quantized copy of the module, in the linen case again a pair.

    **Raises** `ProxyqError` when the files are damaged or the module is another one.
    """
    import_qwix()
    _check_kind(module)
    record = _record(path)
    try:
        tensors = load(read_bytes(Path(path) / PARAMETERS, "parameters"))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ProxyqError(
            f"the parameters in {str(Path(path))!r} are damaged ({reason(error)})."
        ) from None
    weights = {}
    try:
        for layer in record["layers"].values():
            name = layer["parameter"]
            scale, zero = tensors.pop(f"{name}.scale"), tensors.pop(f"{name}.zero_point", None)
            scale, tiles = _whole(scale, tensors[name].shape)
            zero = None if zero is None else _whole(zero, tensors[name].shape)[0]
            # Exact: codes of at most 8 bits are far from half a step off.
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                codes = np.round(tensors[name] / scale) + (0 if zero is None else zero)
            if not (np.abs(codes) <= 128).all():
                raise ValueError(f"{shown(name)} has no codes of 8 bits")
            weights[name] = Stored(codes.astype(np.int8), scale, zero, int(layer["bits"]), tiles)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        raise ProxyqError(
            f"the rules and parameters in {str(Path(path))!r} do not fit together "
            f"({lacks}{reason(error)}): export them again."
        ) from None
    try:
        made = _quantize(module, tensors, record["rules"], inputs, apply_kwargs)
    except ProxyqError:
        raise
    except Exception as error:  # what qwix makes of rules and shapes that are none of its own
        raise ProxyqError(
            f"qwix cannot quantize the module by the rules and parameters in {str(Path(path))!r} "
            f"({reason(error)}): it may not be the one that was exported."
        ) from None
    for name, stored in weights.items():
        if not _fits(made.find(name), stored):
            raise ProxyqError(
                f"the module has no quantized parameter {name!r} of the shape "
                f"{stored.codes.shape}: it is not the one that was exported."
            )
    return made.filled(weights)


def import_qwix() -> Any:
    """The package qwix; **raises** `MissingExtra` without it."""
    try:
        import qwix
    except ImportError:
        raise MissingExtra("qwix", "qwix", "an export for qwix") from None
    return qwix


def _check_kind(module: Any) -> None:
    from flax import linen, nnx

    pair = isinstance(module, tuple) and len(module) == 2 and isinstance(module[0], linen.Module)
    if not pair and not isinstance(module, nnx.Module):
        raise UsageError(
            "`module` must be a flax.nnx.Module or a pair of a flax.linen.Module and its "
            f"variables, got {kind_of(module)}: qwix quantizes Flax models."
        )


def _has_half_precision(quantized: QuantizedModel, module: Any) -> bool:
    """Whether a parameter of the module, or a layer's arithmetic, has fewer bits than float32."""
    from flax import nnx

    network = Engine.build(quantized.model, LAYERS_AT, batch_size=LAYERS_AT).network
    types = [site.weight.aval.dtype for site in network.sites]
    state = module[1] if isinstance(module, tuple) else nnx.state(module, nnx.Param)
    types += [leaf.dtype for leaf in jax.tree.leaves(state) if hasattr(leaf, "dtype")]
    floats = (kind for kind in types if jnp.issubdtype(kind, jnp.floating))
    return any(jnp.finfo(kind).bits < 32 for kind in floats)


def _choose(
    quantized: QuantizedModel, layers: Sequence[DeployedLayer], integers: Mapping[str, Integers]
) -> tuple[dict[str, Stored], dict[str, dict[str, Any]], dict[str, list[str]]]:
    """How qwix can hold each layer, its rule, and for those that it cannot hold, why."""
    forms: dict[str, Stored] = {}
    rules: dict[str, dict[str, Any]] = {}
    reasons: dict[str, list[str]] = {}
    stacked = {part for stack in quantized.model.stacks.values() for part in stack.parts}
    network = Engine.build(quantized.model, LAYERS_AT, batch_size=LAYERS_AT).network
    for layer in layers:
        conv = layer.kind != "linear"
        width = layer.activation_bits if layer.inputs is not None else None
        form = _stored(integers[layer.name], centred=conv)
        tiles = None
        if form is not None and (tiles := groups_of(integers[layer.name])) is not None:
            form = form._replace(tiles=tiles)
        if layer.looked_up:
            why = "qwix has no rule for tables that are looked up"
        elif layer.parameter in stacked:
            why = "one rule of qwix takes all steps of a loop over layers"
        elif form is None:
            why = "qwix has at most 8 bits and whole zero points"
        elif conv and (width is None or width > 8):
            why = "qwix quantizes convolutions only together with their inputs, to 8 bits at most"
        else:
            act = None if width is None or width > 8 else max(width, 2)
            if conv:
                assert act is not None
                act = max(act, form.bits)
                if _container(act) < 8:
                    act = 8  # XLA has no convolution of 4-bit integers on the CPU
                form = form._replace(bits=act)
            forms[layer.name] = form
            rules[layer.name] = {
                "module_path": re.escape(_module_of(layer.parameter)),
                "weight_qtype": f"int{form.bits}",
                "act_qtype": None if act is None else f"int{act}",
            }
            if tiles is not None:
                rules[layer.name]["tile_size"] = tiles.size
            continue
        reasons.setdefault(why, []).append(layer.name)
    # A rule chooses a module, with all the weights in it.
    for layer in network.layers:
        mates = [
            n for n in network.layers if _module_of(n.parameter) == _module_of(layer.parameter)
        ]
        if any(rules.get(n.name) != rules.get(layer.name) for n in mates):
            for name in [n.name for n in mates if n.name in forms]:
                del forms[name]
                reasons.setdefault("a rule of qwix chooses all weights of a module", []).append(
                    name
                )
    return forms, rules, reasons


def _stored(own: Integers, *, centred: bool) -> Stored | None:
    """Codes as qwix can hold them; `centred`: without a zero point."""
    codes, half = own.codes.astype(np.int32), 2 ** (own.bits - 1)
    if own.bits == 1 and np.all(own.zero == 0.5):
        return Stored(2 * codes - 1, own.scale / 2, None, 2)  # plus and minus half a step
    if own.bits > 8 or np.any(own.zero != np.round(own.zero)):
        return None
    zero = own.zero.astype(np.int32) - half
    if not zero.any():
        return Stored(codes - half, own.scale, None, max(own.bits, 2))
    if not centred and zero.min() >= -half and zero.max() < half:
        zero = np.broadcast_to(zero, own.scale.shape)
        return Stored(codes - half, own.scale, zero, max(own.bits, 2))
    # One bit more has room for the codes without a zero point.
    return Stored(codes - half - zero, own.scale, None, own.bits + 1) if own.bits < 8 else None


def _once_a_tile(part: np.ndarray, form: Stored) -> np.ndarray:
    """A scale or zero point with one number for each tile, where there are tiles."""
    if form.tiles is None:
        return part
    whole = np.broadcast_to(part, form.codes.shape)
    return whole.take(range(0, whole.shape[form.tiles.axis], form.tiles.size), form.tiles.axis)


def _whole(part: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, Runs | None]:
    """A scale or zero point as it broadcasts against a weight of this shape, and its tiles."""
    for axis, (own, size) in enumerate(zip(part.shape, shape, strict=True)):
        if 1 < own < size and size % own == 0:
            tiles = Runs(part, axis, size // own)
            return tiles.whole(), tiles
    return part, None


def _container(bits: int) -> int:
    """Bits of the integers in which qwix holds codes of so many."""
    return 4 if bits <= 4 else 8


def _module_of(parameter: str) -> str:
    """A module's path as qwix writes it."""
    return parameter.rpartition(".")[0].replace(".", "/")


def _record(path: str | os.PathLike[str]) -> dict[str, Any]:
    record = read_json(Path(path) / RULES, "rules")
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise ProxyqError(
            f"{str(Path(path))!r} has the schema {shown(found)}; this reads {SCHEMA!r}."
        )
    rules, layers = record.get("rules"), record.get("layers")
    if not (
        isinstance(rules, list)
        and all(isinstance(rule, dict) for rule in rules)
        and all(isinstance(one, str | int | None) for rule in rules for one in rule.values())
        and isinstance(layers, dict)
    ):
        raise ProxyqError(
            f"{str(Path(path) / RULES)!r} is damaged: its field 'rules' must be a list of objects "
            "of text, and 'layers' an object; export it again."
        )
    return record


def _rules(qwix: Any, rules: Sequence[Mapping[str, Any]]) -> list[Any]:
    try:
        return [qwix.QuantizationRule(**rule) for rule in rules]
    except TypeError as error:
        raise ProxyqError(
            f"a rule for qwix has a field that it does not know ({reason(error)})."
        ) from None


def _quantize(
    module: Any,
    params: Mapping[str, Any],
    rules: Sequence[Mapping[str, Any]],
    inputs: Any,
    apply_kwargs: Mapping[str, Any] | None,
) -> Any:
    """The module with these parameters, quantized by qwix."""

    qwix = import_qwix()
    provider = qwix.PtqProvider(_rules(qwix, rules))
    args, keywords = call_arguments(inputs)
    keywords = {**keywords, **dict(apply_kwargs or {})}
    kind = _Linen if isinstance(module, tuple) else _Nnx
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # qwix calls what Flax has renamed
        try:
            return kind(provider, module, params, args, keywords)
        except ProxyqError:
            raise
        except Exception as error:  # whatever qwix, or the module in its hands, says
            raise ProxyqError(
                f"qwix cannot run the module ({kind_and_line(error)}): write what it multiplies as "
                "layers of Flax, or choose another format (--to)."
            ) from error


class _Nnx:
    """An nnx module that qwix has quantized."""

    def __init__(self, provider: Any, module: Any, params: Any, args: Any, keywords: Any):
        from proxyq.model.flax_import import put_into_nnx

        self.model = import_qwix().quantize_model(
            put_into_nnx(module, params), provider, *args, **keywords
        )

    def find(self, name: str) -> Any:
        holder, attribute = self._place(name)
        return getattr(holder, attribute, None)

    def calibrated(self) -> Any:
        return self.model

    def filled(self, weights: Mapping[str, Stored]) -> Any:
        from flax import nnx

        for name, stored in weights.items():
            holder, attribute = self._place(name)
            own = _quantized_array(getattr(holder, attribute), stored)
            setattr(holder, attribute, jax.tree.map(nnx.Param, own))
        return self.model

    def _place(self, name: str) -> tuple[Any, str]:
        from flax import nnx

        path, _, attribute = name.rpartition(".")
        nodes = {".".join(map(str, at)): node for at, node in nnx.iter_graph(self.model)}
        return nodes.get(path), attribute


class _Linen:
    """A linen module that qwix has quantized, with its variables."""

    def __init__(self, provider: Any, module: Any, params: Any, args: Any, keywords: Any):
        from flax.core import meta

        from proxyq.model.flax_import import put_into_linen

        network, variables = module
        self.model = import_qwix().quantize_model(network, provider)
        self.variables = meta.unbox(put_into_linen(variables, params))
        made = jax.eval_shape(
            lambda *args: self.model.init(jax.random.key(0), *args, **keywords), *args
        )
        self.abstract = meta.unbox(made)["params"]

    def find(self, name: str) -> Any:
        node = self.abstract
        for part in name.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node

    def calibrated(self) -> Any:
        params = import_qwix().quantize_params(self.variables["params"], self.abstract)
        return self.model, {**self.variables, "params": params}

    def filled(self, weights: Mapping[str, Stored]) -> Any:
        params = jax.tree.map(lambda leaf: leaf, dict(self.variables["params"]))
        for name, stored in weights.items():
            *parts, last = name.split(".")
            node: Any = params
            for part in parts:
                node = node[part]
            node[last] = _quantized_array(self.find(name), stored)
        return self.model, {**self.variables, "params": params}


def _fits(found: Any, stored: Stored) -> bool:
    """Whether qwix has quantized the parameter here, in this shape or one reshaped for its use."""
    if not hasattr(found, "how"):
        return False
    codes, scale = (tuple(part.shape) for part in (found.array.qvalue, found.array.scale))
    if stored.tiles is not None:
        tiled = list(stored.codes.shape)
        tiled[stored.tiles.axis] //= stored.tiles.size
        return codes == stored.codes.shape and scale == tuple(tiled)
    return int(np.prod(codes)) == stored.codes.size and stored.scale.ndim == stored.codes.ndim


def _quantized_array(found: Any, stored: Stored) -> Any:
    """Our numbers in the place of those that qwix found, reshaped as the module uses them."""
    qwix = import_qwix()
    shape = tuple(found.array.qvalue.shape)
    dtype = jnp.int4 if stored.bits <= 4 else jnp.int8

    def grid(part: np.ndarray, dtype: Any) -> Any:
        if stored.tiles is not None:
            return jnp.asarray(_once_a_tile(part, stored), dtype)
        whole = np.broadcast_to(part, stored.codes.shape).reshape(shape)
        return jnp.asarray(narrowed(whole), dtype)

    scale, zero = grid(stored.scale, jnp.float32), None
    if stored.zero is not None:
        scale, zero = jnp.broadcast_arrays(scale, grid(stored.zero, dtype))
    codes = jnp.asarray(stored.codes.reshape(shape), dtype)
    return found.replace(array=qwix.QArray(codes, scale, zero, found.how.qtype))


def _difference(quantized: QuantizedModel, made: Any, inputs: Any, keywords: Any) -> float:
    """Largest difference of the outputs in qwix from ours, relative to the largest output."""

    inputs = examples_of(quantized.model, inputs)
    args, named = call_arguments(jax.tree.map(jnp.asarray, inputs))
    named = {**named, **dict(keywords or {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if isinstance(made, tuple):
            outputs = made[0].apply(made[1], *args, **named)
        else:
            outputs = made(*args, **named)
    return float(differences(quantized.logits(inputs), np.asarray(logits_of(outputs))).max())
