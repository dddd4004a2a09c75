"""The example of a package that adds a proxy: found, used and checked as if it were installed."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from commandline import alone

PLUGIN = Path(__file__).resolve().parents[1] / "examples" / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder for PYTHONPATH that looks as `pip install ./examples/plugin` would leave it."""
    folder = tmp_path_factory.mktemp("site")
    settings = tomllib.loads((PLUGIN / "pyproject.toml").read_text())
    project = settings["project"]
    for module in settings["tool"]["setuptools"]["py-modules"]:
        (folder / f"{module}.py").write_text((PLUGIN / f"{module}.py").read_text())
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(metadata)
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(site, tmp_path_factory):
    """Run a command in a process that sees the package."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda *arguments: alone(*arguments, cache=cache, PYTHONPATH=str(site))


def test_it_is_listed_beside_the_others(run):
    done = run("proxies", "--json")
    assert done.code == 0, done.err
    found = {record["name"]: record for record in json.loads(done.out)}
    assert found["kurtosis"]["summary"] == "How heavy the tails of the weights are."
    assert found["kurtosis"]["options"] == {"excess": False}
    assert "orthogonality" in found


@pytest.mark.slow
def test_it_finds_a_plan(run):
    done = run("search", "--proxy", "kurtosis", "--budget", "size=3bit", "--json")
    assert done.code == 0, done.err
    assert "kurtosis" in json.dumps(json.loads(done.out))


def test_it_scores_beside_another_with_its_option(run):
    done = run(
        *("score", "--proxy", "kurtosis", "--proxy", "sqnr", "--json"),
        *("--option", "kurtosis.excess=true"),
    )
    assert done.code == 0, done.err
    assert "kurtosis" in json.dumps(json.loads(done.out))


def test_it_keeps_the_rules_and_is_what_it_says(site):
    code = """
import numpy as np
from proxyq.model.function_import import from_function
from proxyq.testing import check_proxy
from proxyq_kurtosis import kurtosis
check_proxy(kurtosis)
w = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
even = np.linspace(-1, 1, 900, dtype=np.float32).reshape(300, 3)
model = from_function(lambda p, x: x @ p["w"] @ p["even"], {"w": w, "even": even}, (300,))
print(*kurtosis(model).values)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose([float(x) for x in done.stdout.split()], [3.0, 1.8], rtol=0.03)
