"""Shared fixtures: where the optional CIFAR-10 material is, and how tests find it."""

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def cifar() -> Path:
    """The folder with `cifar10.npz` and the four CIFAR ResNets; skips where it is absent."""
    folder = SHARED / "data"
    if not (folder / "cifar10.npz").is_file():
        pytest.skip("the CIFAR-10 images and networks are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def published() -> dict:
    """Published plans and inputs of the methods; skips where the file is absent."""
    import json

    file = SHARED / "reference" / "published_configs.json"
    if not file.is_file():
        pytest.skip("published_configs.json is not beside this checkout")
    return json.loads(file.read_text())


def pytest_configure(config: pytest.Config) -> None:
    """Compile each program once for all test processes: compilation is most of their time.

    The programs stay in pytest's cache folder, for the next run.
    """
    cache = getattr(config, "cache", None)  # none with `-p no:cacheprovider`
    folder = cache.mkdir("xla") if cache is not None else None
    if folder is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
