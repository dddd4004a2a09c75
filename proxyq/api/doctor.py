"""`doctor`: whether what is installed works, found out by using it."""

import contextlib
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from proxyq.api.quantize import quantize_model
from proxyq.api.search import search
from proxyq.data import load_data, model_inputs
from proxyq.devices import main_memory
from proxyq.errors import ProxyqError
from proxyq.installed import NEEDED, OPTIONAL, Package, look_at
from proxyq.model.load import load_model
from proxyq.model.torch_import import from_torch, import_torch, import_torchvision
from proxyq.progress import Progress, silent
from proxyq.version import __version__

AGREEMENT = 1e-4
"""Most that outputs of a torch module may differ in proxyq, relative to the largest."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something that was tried: what came out, or what is wrong, and the seconds it took."""

    name: str
    found: Mapping[str, Any]
    seconds: float
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `doctor` found.

    - `packages`: those that proxyq needs, then those of extras.
    - `devices`: of JAX, with `platform`, `kind` and `memory_bytes` (`None` where it is not told).
    - `memory`: of the machine in bytes, `total` and `available`, `None` where it is not told.
    - `cache`: `folder`, `bytes`, `files` and `writable`; `None` where none is used.
    - `checks`: what was tried.
    """

    python: str
    proxyq: str
    platform: str
    packages: tuple[Package, ...]
    devices: tuple[Mapping[str, Any], ...]
    memory: Mapping[str, int | None]
    cache: Mapping[str, Any] | None
    checks: tuple[Check, ...]

    @property
    def problems(self) -> list[str]:
        """What is installed and does not work, one sentence each."""
        return [one.problem for one in (*self.packages, *self.checks) if one.problem is not None]

    @property
    def missing(self) -> list[Package]:
        """Optional packages that are not installed."""
        return [one for one in self.packages if one.version is None and not one.needed]

    def to_json(self) -> dict[str, Any]:
        """The object that `doctor --json` prints."""
        return {
            "ok": not self.problems,
            "python": self.python,
            "proxyq": self.proxyq,
            "platform": self.platform,
            "packages": [package.to_json() for package in self.packages],
            "devices": [dict(device) for device in self.devices],
            "memory": dict(self.memory),
            "cache": None if self.cache is None else dict(self.cache),
            "checks": [
                {
                    "name": one.name,
                    "ok": one.problem is None,
                    "seconds": round(one.seconds, 3),
                    **one.found,
                }
                for one in self.checks
            ],
            "problems": self.problems,
        }


def doctor(
    *, cache_dir: str | os.PathLike[str] | None = None, progress: Progress = silent
) -> Diagnosis:
    """Whether what is installed works.

    Every package is imported; the embedded network is searched and the plan is run; where torch
    is installed, a small module is read and its outputs are compared. Nothing is downloaded, and
    of `cache_dir` (`None`: no cache is used) only a file is tried.

    **Returns** a `Diagnosis`. What is wrong stands in it and is not raised.
    """
    packages = [*look_at(NEEDED, needed=True), *_optional()]
    checks = [_check("search", _search)]
    progress("self-test", 1, 2)
    usable = {one.name for one in packages if one.version is not None and one.problem is None}
    if "torch" in usable:
        checks.append(_check("torch bridge", _bridge))
    progress("self-test", 2, 2)
    devices, problem = _devices()
    if problem is not None:
        checks.append(Check(name="devices", found={}, seconds=0.0, problem=problem))
    return Diagnosis(
        python=platform.python_version(),
        proxyq=__version__,
        platform=platform.platform(),
        packages=tuple(packages),
        devices=devices,
        memory=main_memory(),
        cache=None if cache_dir is None else _cache(Path(cache_dir)),
        checks=tuple(checks),
    )


def _optional() -> list[Package]:
    """The extras. Those that import torchvision are judged by their own faults, not by its."""
    found = []
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what they lack for other devices is no concern here
    try:
        for name, module in OPTIONAL.items():
            found += look_at({name: module}, needed=False)
            if name == "torchvision" and found[-1].problem is not None:
                with contextlib.suppress(Exception):  # its fault is told already
                    import_torchvision()
                    # proxyq has declared the operators that were missing: its networks work.
                    found[-1] = replace(found[-1], problem=None, note=found[-1].problem)
    finally:
        logging.disable(before)
    return found


# -- what is tried ---------------------------------------------------------------------


def _check(name: str, what: Callable[[], dict[str, Any]]) -> Check:
    started = time.perf_counter()
    try:
        found, problem = what(), None
    except Exception as error:
        text = " ".join(str(error).split()).rstrip(".")
        kind = "" if isinstance(error, ProxyqError) else f"{type(error).__name__}: "
        found, problem = {}, f"the self-test {name!r} fails ({kind}{text[:300]})."
    return Check(name=name, found=found, seconds=time.perf_counter() - started, problem=problem)


def _search() -> dict[str, Any]:
    """The embedded network at 3 bits on average, searched and run on its test images."""
    model = load_model("digits")
    # Without correction and timing, which would take most of the time to compile.
    plan = search(
        model,
        proxy="orthogonality",
        cost="times-relative-dw2",
        budget="size=3bit",
        correction="none",
        samples=32,
    )
    status = plan.solver.status if plan.solver else None
    bits = float(plan.budgets[0].achieved)
    quantized = quantize_model(model, plan)
    data = load_data("digits", split="test")
    logits = np.asarray(quantized.logits(model_inputs(model, data)))
    top1 = float(100 * (logits.argmax(axis=-1) == data.labels).mean())
    # On every machine a proof, and 98 % of the test images; float has 99 %, chance 10 %.
    if status != "optimal" or not bits <= 3 or not top1 >= 95:
        raise ProxyqError(
            f"the plan of the embedded network is {status}, of {bits:.4g} bits, with {top1:.4g} % "
            "top-1"
        )
    return {"status": status, "bits": round(bits, 4), "top1": top1}


def _bridge() -> dict[str, Any]:
    """A small torch module through the bridge, at a batch size it was not exported at."""
    torch = import_torch()
    nn = torch.nn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.LayerNorm(8),
            nn.Linear(8, 10),
        ).eval()
        x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        theirs = module(x).numpy()
    model = from_torch(module, (3, 16, 16), name="self-test")
    ours = np.asarray(jax.jit(model.apply)(model.params, x.numpy()))
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not error <= AGREEMENT:
        raise ProxyqError(
            f"a small torch module differs by {error:.1e} of its largest output, more than "
            f"{AGREEMENT:g}"
        )
    return {"parity_error": error}


# -- the machine -----------------------------------------------------------------------


def _devices() -> tuple[tuple[dict[str, Any], ...], str | None]:
    try:
        found = jax.devices()
    except Exception as error:
        return (), f"JAX finds no device ({' '.join(str(error).split())[:200]})."
    return tuple(
        {
            "platform": device.platform,
            "kind": device.device_kind,
            "memory_bytes": _device_bytes(device),
        }
        for device in found
    ), None


def _device_bytes(device: Any) -> int | None:
    with contextlib.suppress(Exception):  # not every backend tells
        return int((device.memory_stats() or {})["bytes_limit"])
    return None


def _cache(folder: Path) -> dict[str, Any]:
    size = files = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process may delete it meanwhile
                size += os.stat(os.path.join(parent, name)).st_size
                files += 1
    return {
        "folder": str(folder),
        "bytes": size,
        "files": files,
        "writable": _writable(folder),
    }


def _writable(folder: Path) -> bool:
    """Whether a file can be made there, or in the nearest folder above that there is."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
