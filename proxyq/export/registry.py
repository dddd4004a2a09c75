"""Exporters by name. Each is imported when it is used, for each needs packages of its own."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from proxyq.export.exported import Exported
from proxyq.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """An exporter for the command line and the tests to find.

    `function` is `"module:name"` of `(quantized, path, *, plan, strict, inputs) -> Exported`:
    the quantized network, where to write, the `Plan` that it was made from or `None`, whether it
    is an error that a layer takes more bits than asked for, and calibration inputs or `None`.
    """

    name: str
    function: str
    summary: str

    def load(self) -> Callable[..., Exported]:
        """The function."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


# name -> (module:function, summary)
_OURS = {
    "onnx": (
        "proxyq.export.onnx:export_onnx",
        "ONNX with QuantizeLinear and DequantizeLinear, for ONNX Runtime",
    ),
    "torchao": ("proxyq.export.torchao:export_torchao", "a folder for torchao"),
    "compressed-tensors": (
        "proxyq.export.compressed_tensors:export_compressed_tensors",
        "a folder for compressed-tensors, vLLM and transformers",
    ),
    "qwix": ("proxyq.export.qwix:export_qwix", "rules and parameters for qwix, of Flax models"),
}

EXPORTERS: Registry[Exporter] = Registry("export format", group="proxyq.exporters")
for _name, (_function, _summary) in _OURS.items():
    EXPORTERS.add(Exporter(name=_name, function=_function, summary=_summary))
