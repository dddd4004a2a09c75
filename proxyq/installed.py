"""What is installed, and whether it can be imported.

Knows no package but the standard library's, so that it can tell which of the others is broken.
"""

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from typing import Any

NEEDED = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "numpy": "numpy",
    "scipy": "scipy",
    "deap": "deap",
    "pydantic": "pydantic",
    "matplotlib": "matplotlib",
    "pillow": "PIL",
    "safetensors": "safetensors",
}
"""What proxyq cannot do without: names of distributions and of the modules that they bring.

Those of the command line alone (typer, rich) have worked when anything is told at all."""

OPTIONAL = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "transformers",
    "datasets": "datasets",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxscript",
    "torchao": "torchao",
    "compressed-tensors": "compressed_tensors",
    "qwix": "qwix",
    "ray": "ray",
    "sympy": "sympy",
}
"""The same of what extras bring, each after those that it imports itself."""

_DEVELOPMENT = {"dev", "docs", "all"}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A distribution: its version, `None` where it is missing; what is wrong with it, if it is;
    a `note` where something is that proxyq does without.

    - `needed`: whether proxyq cannot do without.
    - `install`: the line that brings it.
    """

    name: str
    version: str | None
    needed: bool
    install: str
    problem: str | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The record that `doctor --json` prints."""
        return asdict(self)


def look_at(
    packages: Mapping[str, str],
    *,
    needed: bool,
    load: Callable[[str], Any] = importlib.import_module,
) -> list[Package]:
    """Each of the packages, imported where it is installed.

    A needed one that is missing is a problem; an optional one is not. Whatever an import
    raises is told in one sentence.
    """
    lines = _extras()
    found = []
    for name, module in packages.items():
        install = f"pip install '{lines[name]}'" if name in lines else f"pip install {name}"
        try:
            number = version(name)
        except PackageNotFoundError:
            problem = f"{name} is not installed: run `{install}`." if needed else None
            found.append(
                Package(name=name, version=None, needed=needed, install=install, problem=problem)
            )
            continue
        problem = None
        try:
            load(module)
        except Exception as error:
            problem = why(name, number, error, install)
        found.append(
            Package(name=name, version=number, needed=needed, install=install, problem=problem)
        )
    return found


def why(name: str, number: str, error: BaseException, install: str) -> str:
    """One sentence about a package whose import has failed."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {text[:200]}".rstrip(" .:")
    if "operator torchvision::" in text:
        return (
            f"torchvision {number} was built for another torch, so that its operators are missing "
            f"({text}): proxyq reads its classifiers all the same, all else needs a matching pair "
            "(`pip install --force-reinstall torch torchvision`)."
        )
    return (
        f"{name} {number} is installed and cannot be imported ({text}): "
        f"install it again (`{install} --force-reinstall`)."
    )


def _extras() -> dict[str, str]:
    """Which extra brings a distribution, from what proxyq's own distribution says."""
    try:
        requirements: Iterable[str] = metadata("proxyq").get_all("Requires-Dist") or ()
    except PackageNotFoundError:  # run from a folder, without having been installed
        return {}
    found: dict[str, str] = {}
    for one in requirements:
        match = re.match(r"([\w.-]+).*;.*extra\s*==\s*['\"]([\w-]+)['\"]", one)
        if match and match[2] not in _DEVELOPMENT:
            found.setdefault(match[1], f"proxyq[{match[2]}]")
    return found
