"""proxyq: a bit-width for every layer of a trained network, in seconds, without training.

`proxyq.search(model, data, proxy="orthogonality", budget="size=3bit")` walks the whole road.
Names are loaded when they are first used, so that `import proxyq` takes no time.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from proxyq.errors import ProxyqError as ProxyqError
from proxyq.errors import UsageError as UsageError
from proxyq.version import __version__ as __version__

if TYPE_CHECKING:
    from proxyq.api import Diagnosis as Diagnosis
    from proxyq.api import Evaluation as Evaluation
    from proxyq.api import Evolution as Evolution
    from proxyq.api import ModelSpec as ModelSpec
    from proxyq.api import allocate as allocate
    from proxyq.api import doctor as doctor
    from proxyq.api import evaluate as evaluate
    from proxyq.api import evolve as evolve
    from proxyq.api import export_model as export_model
    from proxyq.api import inspect as inspect
    from proxyq.api import pack as pack
    from proxyq.api import pareto as pareto
    from proxyq.api import quantize_model as quantize_model
    from proxyq.api import rank as rank
    from proxyq.api import score as score
    from proxyq.api import table as table
    from proxyq.api import write_report as write_report
    from proxyq.data import Data as Data
    from proxyq.data import load_data as load_data
    from proxyq.devices import give_back_large_blocks as give_back_large_blocks
    from proxyq.devices import on_devices as on_devices
    from proxyq.engine import Engine as Engine
    from proxyq.export.exported import Exported as Exported
    from proxyq.export.parameters import to_linen as to_linen
    from proxyq.export.parameters import to_nnx as to_nnx
    from proxyq.export.torch_module import to_torch as to_torch
    from proxyq.model.flax_import import from_linen as from_linen
    from proxyq.model.flax_import import from_nnx as from_nnx
    from proxyq.model.function_import import from_function as from_function
    from proxyq.model.load import load_model as load_model
    from proxyq.model.model import Model as Model
    from proxyq.model.model import Preprocessing as Preprocessing
    from proxyq.model.network import Network as Network
    from proxyq.model.network import network as network
    from proxyq.model.torch_import import from_torch as from_torch
    from proxyq.proxies import Proxy as Proxy
    from proxyq.proxies import Scores as Scores
    from proxyq.proxies import register as register
    from proxyq.ptq.packed import load_packed as load_packed
    from proxyq.ptq.quantized import QuantizedModel as QuantizedModel
    from proxyq.ptq.reconstruct import Learning as Learning
    from proxyq.search.allocate import Assignment as Assignment
    from proxyq.search.allocate import InfeasibleError as InfeasibleError
    from proxyq.search.allocate import Limit as Limit
    from proxyq.search.allocate import Problem as Problem
    from proxyq.search.allocate import Status as Status
    from proxyq.search.allocate import solve as solve
    from proxyq.search.allocate.plan import Plan as Plan
    from proxyq.search.front_file import Front as Front
    from proxyq.search.scores_file import ScoreFile as ScoreFile
    from proxyq.search.table_file import MeasuredTable as MeasuredTable

# Public names by the module that defines them, in the order of the walk.
_PUBLIC = {
    "proxyq.model.model": ("Model", "Preprocessing"),
    "proxyq.model.load": ("load_model",),
    "proxyq.model.torch_import": ("from_torch",),
    "proxyq.model.flax_import": ("from_nnx", "from_linen"),
    "proxyq.model.function_import": ("from_function",),
    "proxyq.model.network": ("Network", "network"),
    "proxyq.data": ("Data", "load_data"),
    "proxyq.devices": ("on_devices", "give_back_large_blocks"),
    "proxyq.engine": ("Engine",),
    "proxyq.proxies": ("Proxy", "Scores", "register"),
    "proxyq.search.allocate": (
        "Problem",
        "Limit",
        "Status",
        "Assignment",
        "InfeasibleError",
        "solve",
    ),
    "proxyq.search.allocate.plan": ("Plan",),
    "proxyq.search.scores_file": ("ScoreFile",),
    "proxyq.search.front_file": ("Front",),
    "proxyq.search.table_file": ("MeasuredTable",),
    "proxyq.ptq.quantized": ("QuantizedModel",),
    "proxyq.ptq.reconstruct": ("Learning",),
    "proxyq.ptq.packed": ("load_packed",),
    "proxyq.export.exported": ("Exported",),
    "proxyq.export.parameters": ("to_nnx", "to_linen"),
    "proxyq.export.torch_module": ("to_torch",),
    "proxyq.api": (
        "inspect",
        "score",
        "allocate",
        "pareto",
        "evaluate",
        "table",
        "rank",
        "evolve",
        "Evolution",
        "ModelSpec",
        "quantize_model",
        "pack",
        "export_model",
        "write_report",
        "doctor",
        "Diagnosis",
        "Evaluation",
    ),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'proxyq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "search"})


class _Search(ModuleType):
    """`proxyq.search` is a package and, as people expect, the function too."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from proxyq.api import search

        return search(*args, **options)


importlib.import_module("proxyq.search").__class__ = _Search
