"""How a result came about: versions, seed, digests."""

import platform
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from proxyq.version import __version__

_PACKAGES = ("jax", "numpy", "scipy", "flax", "torch")


def provenance(**facts: Any) -> dict[str, Any]:
    """Versions of what computes, and the given facts (seed, digests); `None` facts left out.

    No time of day: the same run gives the same record.
    """
    return {"versions": dict(_versions()), **{k: v for k, v in facts.items() if v is not None}}


@cache
def _versions() -> dict[str, str]:
    versions = {"proxyq": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
