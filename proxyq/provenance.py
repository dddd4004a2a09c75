"""How a result came about: versions, seed, digests."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from proxyq.version import __version__

_PACKAGES = ("jax", "numpy", "scipy", "flax", "torch")


def provenance(**facts: Any) -> dict[str, Any]:
    """Versions of what computes, and the given facts (seed, digests); `None` facts left out.

    No time of day: the same run gives the same record.
    """
    versions = {"proxyq": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"versions": versions, **{k: v for k, v in facts.items() if v is not None}}
