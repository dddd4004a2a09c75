"""Shared fixtures: where the optional CIFAR-10 material is, and how tests find it."""

import os
from importlib.metadata import version
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


@pytest.fixture(autouse=True, scope="session")
def _programs_are_kept() -> None:
    """JAX opens the folder of its programs once, with the first of them: let that be here, not in
    a command with `--no-cache`, which would then compile alone what all others share."""
    import jax

    jax.jit(lambda x: x + 1)(1.0)


# Twenty seconds and more each, so that they are not the last, with one process left to run them.
LONG = {
    *("auto", "cifar", "cli", "conformance", "curvature", "engine", "evolve", "examples"),
    *("flax_networks", "onnx", "proxy_references", "qwix", "ray", "reconstruct", "score"),
    *("table", "torch_import", "torchao", "unwritable"),
}


def flags() -> list[str]:
    """What makes XLA compile for a processor fast, if not fast programs.

    Its older code for loops takes a third of the time of the newer to compile at level 0; an XLA
    that does not know a flag ends the process, so that the versions are those that were tried.
    """
    level = ["--xla_backend_optimization_level=0"]
    if version("jaxlib").split(".")[:2] != ["0", "10"]:
        return level
    return [
        *level,
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]


def pytest_configure(config: pytest.Config) -> None:
    """Give each test process cores of its own, and compile each program once for all of them.

    Processes that share cores wait for each other in the middle of every sum. Compilation is most
    of their time: it is told not to optimise, unless `XLA_FLAGS` says otherwise, and the programs
    stay in pytest's cache folder, for the next run.
    """
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if number.isdigit() and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        own = cores[int(number) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
        os.sched_setaffinity(0, own or [cores[int(number) % len(cores)]])
    os.environ.setdefault("XLA_FLAGS", " ".join(flags()))
    cache = getattr(config, "cache", None)  # none with `-p no:cacheprovider`
    folder = cache.mkdir("xla") if cache is not None else None
    if folder is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        # Else the folder's name is part of a program's key, for the sake of GPUs.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
