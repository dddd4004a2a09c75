"""The packed file: a quantized network at the size that its plan promised.

Integers at their true bit-width, scales, zero points and biases, what stays float, and the plan,
in one safetensors file; `unpack.py` tells its form and reads it with NumPy alone.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from proxyq.engine import Edit, Engine
from proxyq.errors import ProxyqError
from proxyq.files import read_bytes, write_atomic
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT, network, with_embeddings
from proxyq.model.origin import parameter_indices, trailing_bias
from proxyq.provenance import provenance
from proxyq.ptq.deploy import DeployedLayer, deployed_layers
from proxyq.ptq.quantized import (
    QuantizedModel,
    attention_grids,
    with_attention,
    with_weights,
)
from proxyq.ptq.unpack import SCHEMA, grid_of, pack, read, unpack
from proxyq.quantize import Grid
from proxyq.quantize.integers import Integers, groups_of
from proxyq.search.allocate.plan import Plan


@dataclass(frozen=True, kw_only=True)
class PackedSize:
    """Bytes of a packed file: `codes` of the weights with the scales of their groups, which is
    what a plan counts; `scales` of output channels, zero points and biases; what stays
    `unquantized`; and the `header` with names, plan and provenance."""

    codes: int
    scales: int
    unquantized: int
    header: int

    @property
    def total(self) -> int:
        """The size of the file."""
        return self.codes + self.scales + self.unquantized + self.header


def save_packed(
    quantized: QuantizedModel,
    path: str | os.PathLike[str],
    *,
    facts: Mapping[str, Any] | None = None,
) -> PackedSize:
    """Write a quantized network; see `proxyq.ptq.unpack` for the form of the file.

    - `facts`: more for the provenance. The plan is kept whole.

    **Raises** `ProxyqError` when the file cannot be written.
    """
    content, size = packed_bytes(quantized, facts)
    write_atomic(path, content)
    return size


def packed_bytes(
    quantized: QuantizedModel, facts: Mapping[str, Any] | None = None
) -> tuple[bytes, PackedSize]:
    """The content of the file that `save_packed` writes, and what takes how much of it."""
    layers = deployed_layers(quantized)
    tensors: dict[str, np.ndarray] = {}
    sizes = {"codes": 0, "scales": 0, "unquantized": 0}

    def add(name: str, value: np.ndarray, kind: str) -> None:
        array = np.ascontiguousarray(value)
        tensors[name] = array
        sizes[kind] += array.nbytes

    records = {}
    for layer in layers:
        weight = layer.name if layer.computed else layer.parameter
        add(weight, pack(layer.weight.codes, layer.bits), "codes")
        record: dict[str, Any] = {
            "weight": weight,
            "bits": layer.bits,
            "shape": list(layer.weight.codes.shape),
            "kind": layer.kind,
            "absorbed": list(layer.absorbed),
        }
        grouped = groups_of(layer.weight)
        if grouped is None:
            add(f"{weight}.scale", layer.weight.scale, "scales")
        else:
            record["groups"] = {"axis": grouped.axis, "size": grouped.size}
            add(f"{weight}.scale", grouped.values.astype(jnp.bfloat16), "codes")
        zero = layer.weight.zero
        add(f"{weight}.zero", zero if grouped is None else grouped.once(zero), "scales")
        if layer.computed:
            record["computed"] = True
        if layer.bias is not None:
            record["bias"] = _bias_tensor(layer)
            add(record["bias"], layer.bias, "scales")
        if layer.inputs is not None:
            record["inputs"] = {"bits": layer.activation_bits, **_grid_record(layer.inputs)}
        records[layer.name] = record
    gone = {name for layer in layers for name in (layer.parameter, *layer.absorbed)}
    for name, value in quantized.model.params.items():
        if name not in gone and name not in tensors:
            add(name, np.asarray(value), "unquantized")
    attention = _products(quantized)
    header = {
        "schema": SCHEMA,
        "model": {
            "name": quantized.model.name,
            "digest": quantized.model.digest(),
            **({"embeddings": True} if quantized.model.embeddings else {}),
        },
        "layers": records,
        **({"attention": attention} if attention else {}),
        "correction": quantized.correction,
        "reconstruction": quantized.reconstruction,
        "plan": None if quantized.plan is None else json.loads(quantized.plan.to_json()),
        "provenance": provenance(**dict(facts or {})),
    }
    text = json.dumps(header, ensure_ascii=False, allow_nan=False, sort_keys=True)
    content = save(tensors, {"proxyq": text})
    return content, PackedSize(header=len(content) - sum(sizes.values()), **sizes)


def _products(quantized: QuantizedModel) -> dict[str, Any]:
    """The products of two activations that are rounded: bits, and the grids of both operands."""
    products = network(quantized.model, LAYERS_AT).attention
    grids = attention_grids(products, quantized.edits)
    return {
        products[index].name: {
            "bits": quantized.attention_bits[products[index].name],
            "operands": [_grid_record(grid) for grid in own],
        }
        for index, own in grids.items()
    }


def _grid_record(grid: Grid) -> dict[str, float]:
    return {name: float(np.float32(getattr(grid, name))) for name in ("scale", "zero")}


def _grid(record: Mapping[str, Any], bits: int) -> Grid:
    lower, upper = jnp.float32(0), jnp.float32(2.0**bits - 1)
    return Grid(jnp.float32(record["scale"]), jnp.float32(record["zero"]), lower, upper)


def _bias_tensor(layer: DeployedLayer) -> str:
    if layer.bias_parameter is not None and not layer.computed:
        return layer.bias_parameter
    return f"{layer.name}.bias"


def load_packed(path: str | os.PathLike[str], model: Model) -> QuantizedModel:
    """The quantized network of a packed file, on the model that it was made of.

    **Raises** `ProxyqError` when the file is no packed network, is damaged, or is one of another
    model.
    """
    read_bytes(path, "packed network")  # one sentence where it is not there
    try:
        header, tensors = read(path)
    except ValueError as error:
        raise ProxyqError(f"the packed network {error}") from None
    records, plan = header["layers"], header.get("plan")
    model = with_embeddings(model, bool(_model_of(header).get("embeddings")))
    engine = Engine.build(model, LAYERS_AT, batch_size=LAYERS_AT)
    traced, indices = engine.network, parameter_indices(engine.network)
    integers: dict[int, Integers] = {}
    edits: dict[int, Edit] = {}
    activations: dict[str, int] = {}
    used = set()
    for layer in traced.layers:
        own = [f"{layer.name}#{n}" if n > 1 else layer.name for n in range(1, 99)]
        entries = [name for name in own if name in records]
        used.update(entries)
        for place, index in enumerate(traced.sites_of(layer.name)):
            if not entries:
                continue
            record = records[entries[min(place, len(entries) - 1)]]
            site = traced.sites[index]
            whole = _integers(record, tensors)
            where = indices[index]
            if record.get("computed"):
                if whole.codes.shape != tuple(site.weight.aval.shape):
                    raise _other(path, layer.name)
                parts = [np.broadcast_to(p, whole.codes.shape) for p in whole[:3]]
            else:
                if where is None or whole.codes.size != np.prod(
                    model.params[layer.parameter].shape
                ):
                    raise _other(path, layer.name)
                parts = [np.broadcast_to(p, whole.codes.shape).ravel()[where] for p in whole[:3]]
            codes, scale, zero = (np.asarray(site.columns(jnp.asarray(p))) for p in parts)
            integers[index] = Integers(codes, _once(scale), _once(zero), whole.bits)
            edit = Edit()
            if "bias" in record and not site.lookup:
                added, _ = trailing_bias(traced, site, engine.frontier)
                bias = tensors[record["bias"]]
                bias = _slice(bias, where, site) if len(bias) != scale.shape[1] else bias
                if len(bias) != scale.shape[1]:
                    raise _other(path, layer.name)
                offset = bias if added is None else bias - added
                edit = edit._replace(offset=jnp.asarray(offset, jnp.float32))
            if record.get("inputs") is not None:
                activations[layer.name] = int(record["inputs"]["bits"])
            if record.get("inputs") is not None and not site.lookup:
                grid = record["inputs"]
                edit = edit._replace(input_grid=_grid(grid, int(grid["bits"])))
            edits[index] = edit
    if set(records) - used:
        raise _other(path, min(set(records) - used))
    attention, products = {}, header.get("attention", {})
    for place, product in enumerate(traced.attention):
        if (record := products.get(product.name)) is not None:
            left, right = (_grid(own, int(record["bits"])) for own in record["operands"])
            attention[place] = (left, right)
    if missing := set(products) - {traced.attention[place].name for place in attention}:
        raise _other(path, min(missing))
    return QuantizedModel(
        model=model,
        bits={
            layer.name: records[layer.name]["bits"]
            for layer in traced.layers
            if layer.name in records
        },
        edits=with_attention(traced.attention, with_weights(engine, integers, edits), attention),
        integers=integers,
        activation_bits=activations,
        attention_bits={name: int(own["bits"]) for name, own in products.items()},
        correction=str(header.get("correction", "none")),
        reconstruction=str(header.get("reconstruction", "nearest")),
        plan=None if plan is None else Plan.from_json(plan, f"plan in {str(Path(path))!r}"),
    )


def _model_of(header: Mapping[str, Any]) -> Mapping[str, Any]:
    found = header.get("model")
    return found if isinstance(found, Mapping) else {}


def _slice(bias: np.ndarray, where: Any, site: Any) -> np.ndarray:
    """A slice's part of the bias of a whole weight, by the rank of its first element."""
    width = int(np.prod(site.channel_shape))
    if where is None or not len(bias) or where.size * len(bias) < width:
        return bias  # which does not fit
    first = int(where.min()) * len(bias) // (where.size * len(bias) // width)
    return bias[first : first + width]


def _integers(record: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Integers:
    name = record["weight"]
    codes = unpack(tensors[name], record["bits"], record["shape"])
    return Integers(codes, *grid_of(record, tensors), record["bits"])


def _once(columns: np.ndarray) -> np.ndarray:
    """`[1, channels]` where all rows are alike, else all of them."""
    return columns[:1] if (columns == columns[:1]).all() else columns


def _other(path: str | os.PathLike[str], layer: str) -> ProxyqError:
    return ProxyqError(
        f"the packed network {str(Path(path))!r} is of another model: its {layer!r} does not fit."
    )
