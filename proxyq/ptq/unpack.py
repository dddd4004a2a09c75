"""Read a packed network with NumPy alone: `proxyq/packed/1`.

This file imports nothing of proxyq and can be copied beside the network that it reads:

    weights = load("network.safetensors")      # {"layer1.0.conv1.weight": float32 array, …}

The file is in the format of safetensors. A quantized weight is a tensor of bytes with its codes,
`bits` to each, the first code in the lowest bits of the first byte, in the C order of the
parameter's shape. Beside it lie `NAME.scale` and `NAME.zero`, which broadcast against it:

    weight = (code - zero) * scale        in float32

Where groups of weights have scales of their own, `groups` in the layer's record says along which
`axis` of the parameter so many (`size`) in a row share one: scales and zero points, where they are
fewer than the weights there, stand for `size` weights each.

All other tensors are as they are. The metadata's entry `proxyq` is JSON: `layers` tells of each
layer which tensor is its `weight` and its `bias`, the `shape`, the `bits`, and which parameters of
the original network are `absorbed` in the two; `inputs`, where it is there, is the grid of what
the layer reads, in the same formula, with codes from 0 to `2^bits - 1`. `attention`, where it is
there, names products of two activations: their `bits`, and such a grid for each of both `operands`.
"""

import json
import os
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

SCHEMA = "proxyq/packed/1"
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Every parameter of the network in the file by name: quantized weights as float32 values.

    **Raises** `ValueError` when the file is not one, or damaged.
    """
    header, tensors = read(path)
    arrays = dict(tensors)
    for layer in header["layers"].values():
        name = layer["weight"]
        codes = unpack(tensors[name], layer["bits"], layer["shape"])
        scale, zero = grid_of(layer, tensors)
        del arrays[f"{name}.scale"], arrays[f"{name}.zero"]
        arrays[name] = (codes.astype(np.float32) - zero) * scale
    return arrays


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON of the metadata, and all tensors as they lie in the file.

    **Raises** `ValueError` when the file is not one, or damaged.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        (length,) = struct.unpack("<Q", content[:8])
        table = json.loads(content[8 : 8 + length].decode())
        header = json.loads(table.pop("__metadata__")["proxyq"])
    except (struct.error, KeyError, ValueError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{os.fspath(path)!r} is no packed network, or cut short.") from None
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        found = header.get("schema") if isinstance(header, dict) else None
        found = repr(found)[:80] if isinstance(found, str) else type(found).__name__
        raise ValueError(f"{os.fspath(path)!r} has the schema {found}; this reads {SCHEMA!r}.")
    data = memoryview(content)[8 + length :]
    try:
        tensors = {name: _tensor(data, entry) for name, entry in table.items()}
        for name, layer in header["layers"].items():
            _check(name, layer, tensors)
        for name, product in header.get("attention", {}).items():
            left, right = product["operands"]
            for grid in (left, right):
                _check_grid(grid, product["bits"], f"operands of the product {name!r}")
        weights = [layer["weight"] for layer in header["layers"].values()]
        if len(set(weights)) < len(weights):
            raise ValueError("two layers have one weight")
    except KeyError as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged (it lacks {str(error)[:80]}).") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"{os.fspath(path)!r} is damaged ({told}).") from None
    return header, tensors


def grid_of(
    layer: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of a layer's record, such that they broadcast against its codes."""
    parts = [tensors[f"{layer['weight']}.{part}"] for part in ("scale", "zero")]
    if (groups := layer.get("groups")) is not None:
        axis, size = groups["axis"], groups["size"]
        parts = [p if p.shape[axis] == 1 else np.repeat(p, size, axis) for p in parts]
    return parts[0], parts[1]


def _tensor(data: memoryview, entry: dict[str, Any]) -> np.ndarray:
    start, stop = entry["data_offsets"]
    if not 0 <= start <= stop <= len(data):
        raise ValueError("a tensor lies outside of the file")
    if entry["dtype"] == "BF16":  # the upper half of a float32
        halves = np.frombuffer(data[start:stop], "<u2").astype(np.uint32) << 16
        return halves.view(np.float32).reshape(entry["shape"])
    return np.frombuffer(data[start:stop], _TYPES[entry["dtype"]]).reshape(entry["shape"])


def _check(name: str, layer: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Refuse a layer whose tensors do not fit each other."""
    weight, bits, shape = layer["weight"], layer["bits"], layer["shape"]
    if type(bits) is not int or not 1 <= bits <= 16:
        raise ValueError(f"the layer {name!r} has {str(bits)[:80]} bits")
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"the layer {name!r} has the shape {str(shape)[:80]}")
    count = 1
    for size in shape:
        count *= size
    if tensors[weight].dtype != np.uint8 or tensors[weight].size != -(-count * bits // 8):
        raise ValueError(f"the layer {name!r} has not the codes of its shape")
    groups = layer.get("groups")
    if groups is not None:
        axis, size = groups["axis"], groups["size"]
        if type(axis) is not int or type(size) is not int or not 0 <= axis < len(shape):
            raise ValueError(f"the groups of the layer {name!r} have no axis and size")
        if not 1 < size <= shape[axis] or shape[axis] % size:
            raise ValueError(f"the layer {name!r} has no groups of {str(size)[:80]}")
    for part in ("scale", "zero"):
        values = tensors[f"{weight}.{part}"]
        own = list(values.shape)
        if groups is not None and len(own) == len(shape) and own[axis] != 1:
            own[axis] *= size
        if len(own) != len(shape) or any(a not in (1, b) for a, b in zip(own, shape, strict=True)):
            raise ValueError(f"the {part} of the layer {name!r} has the shape {values.shape}")
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise ValueError(f"the {part} of the layer {name!r} must be finite floats")
    # Values beyond float32 would be infinite weights.
    scale, zero = (np.abs(tensors[f"{weight}.{part}"]).max(initial=0) for part in ("scale", "zero"))
    if float(scale) * (float(zero) + 2**bits) > 3e38:
        raise ValueError(f"the grid of the layer {name!r} is too wide")
    if "bias" in layer and tensors[layer["bias"]].ndim != 1:
        raise ValueError(f"the bias of the layer {name!r} has the wrong shape")
    grid = layer.get("inputs")
    if grid is not None:
        _check_grid(grid, grid["bits"], f"inputs of the layer {name!r}")


def _check_grid(grid: dict[str, Any], bits: Any, what: str) -> None:
    numbers = [grid[part] for part in ("scale", "zero")]
    if type(bits) is not int or not 1 <= bits <= 16:
        raise ValueError(f"the {what} have the wrong bits")
    if any(type(one) not in (int, float) or not abs(one) < 1e30 for one in numbers):
        raise ValueError(f"the {what} have no grid")
    if not np.float32(numbers[0]) > 0:
        raise ValueError(f"the {what} have a grid without a step")


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes as bytes, `bits` to each, the first code in the lowest bits."""
    flat = np.ascontiguousarray(codes, np.uint16).ravel()
    step = 1 << 20  # a multiple of 8, so that every part fills whole bytes
    parts = []
    for start in range(0, len(flat), step):
        some = flat[start : start + step, None]
        parts.append(np.packbits((some >> np.arange(bits)) & 1, bitorder="little"))
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def unpack(packed: np.ndarray, bits: int, shape: Any) -> np.ndarray:
    """The codes that `pack` made bytes of, uint16, in their shape."""
    count = int(np.prod(shape, dtype=np.int64))
    codes = np.empty(count, np.uint16)
    step = 1 << 20
    weights = (1 << np.arange(bits)).astype(np.uint16)
    for start in range(0, count, step):
        some = min(step, count - start)
        part = packed[start * bits // 8 : -(-(start + some) * bits // 8)]
        rows = np.unpackbits(part, count=some * bits, bitorder="little").reshape(some, bits)
        codes[start : start + some] = rows @ weights
    return codes.reshape(shape)
