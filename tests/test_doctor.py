"""`doctor`: what works is told, and what is broken, one sentence each."""

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from commandline import here

from proxyq import api
from proxyq.installed import NEEDED, OPTIONAL, Package, look_at, why
from proxyq.version import __version__

diagnosis = sys.modules["proxyq.api.doctor"]
ROOT = Path(__file__).resolve().parents[1]


def package(name="torch", **changes):
    fields = {"version": "1.0", "needed": False, "install": "pip install 'proxyq[torch]'"}
    return Package(name=name, **{**fields, **changes})


@pytest.fixture
def healthy(monkeypatch):
    """A machine where all is well, without the time that finding out takes."""
    found = [package("jax", needed=True), package(), package("timm", version=None)]
    monkeypatch.setattr(diagnosis, "look_at", lambda packages, *, needed: found)
    monkeypatch.setattr(diagnosis, "_optional", list)
    monkeypatch.setattr(diagnosis, "_search", lambda: {"top1": 98.0})
    monkeypatch.setattr(diagnosis, "_bridge", lambda: {"parity_error": 2e-7})
    return found


# -- packages ----------------------------------------------------------------------------


def test_every_package_of_the_project_is_looked_at():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements):
        return {one.split(">")[0].split("[")[0] for one in requirements} - {"proxyq"}

    # The command line's own (typer, rich) have worked when anything is told at all.
    needed = {name.lower() for name in NEEDED} - {"jaxlib"}
    assert names(project["dependencies"]) - {"typer", "rich"} == needed
    extras = project["optional-dependencies"]
    brought = set().union(*(names(v) for k, v in extras.items() if k not in ("dev", "docs")))
    assert brought | {"transformers"} == set(OPTIONAL)


def test_what_is_installed_is_imported():
    asked = []
    (found,) = look_at({"numpy": "numpy"}, needed=True, load=asked.append)
    assert asked == ["numpy"]
    assert found == Package(
        name="numpy", version=version("numpy"), needed=True, install="pip install numpy"
    )


def test_what_is_missing_has_its_install_line(monkeypatch):
    monkeypatch.setattr("proxyq.installed._extras", lambda: {"no-such": "proxyq[torch]"})
    (found,) = look_at({"no-such": "no_such"}, needed=False)
    assert (found.version, found.problem) == (None, None)
    assert found.install == "pip install 'proxyq[torch]'"
    (found,) = look_at({"no-such": "no_such"}, needed=True)
    assert found.problem == "no-such is not installed: run `pip install 'proxyq[torch]'`."


def test_extras_are_read_from_the_distribution(monkeypatch):
    class Metadata:
        def get_all(self, field):
            assert field == "Requires-Dist"
            return [
                "jax>=0.7",
                'torch>=2.6; extra == "torch"',
                'sympy>=1.12; extra == "dev"',
                'sympy>=1.12; extra == "formula"',
                'compressed-tensors>=0.20; extra == "compressed-tensors"',
            ]

    monkeypatch.setattr("proxyq.installed.metadata", lambda name: Metadata())
    from proxyq.installed import _extras

    assert _extras() == {
        "torch": "proxyq[torch]",
        "sympy": "proxyq[formula]",
        "compressed-tensors": "proxyq[compressed-tensors]",
    }


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("libcudart.so.12: cannot open\nmore"), "(OSError: libcudart.so.12: cannot open)"),
        (ImportError(""), "(ImportError)"),
    ],
)
def test_what_cannot_be_imported_is_told_in_one_sentence(error, told):
    def load(module):
        raise error

    (found,) = look_at({"numpy": "numpy"}, needed=True, load=load)
    assert found.problem == (
        f"numpy {version('numpy')} is installed and cannot be imported {told}: install it again "
        "(`pip install numpy --force-reinstall`)."
    )


def test_a_torchvision_without_its_operators_is_recognised():
    error = RuntimeError("operator torchvision::nms does not exist")
    told = why("torchvision", "0.28.0", error, "pip install 'proxyq[torch]'")
    assert told.startswith("torchvision 0.28.0 was built for another torch")
    assert "nms does not exist" in told and "\n" not in told


# -- the whole -----------------------------------------------------------------------------


def test_all_is_well(healthy, tmp_path):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "one").write_bytes(b"x" * 1000)
    found = api.doctor(cache_dir=tmp_path)
    assert found.problems == [] and found.missing == [healthy[2]]
    assert found.cache == {"folder": str(tmp_path), "bytes": 1000, "files": 1, "writable": True}
    assert [one.name for one in found.checks] == ["search", "torch bridge"]
    assert found.devices[0]["platform"] and found.memory["total"] > 2**27
    record = found.to_json()
    assert record["ok"] and record["proxyq"] == __version__
    assert json.loads(json.dumps(record)) == record
    assert record["checks"][1]["parity_error"] == 2e-7


def test_what_is_broken_is_a_problem(healthy, monkeypatch, tmp_path):
    healthy[1] = replace(healthy[1], problem="torch is broken.")

    def fails():
        raise ValueError("no\nmore")

    monkeypatch.setattr(diagnosis, "_search", fails)
    found = api.doctor(cache_dir=tmp_path / "none")
    # No bridge without a torch that works.
    assert [one.name for one in found.checks] == ["search"]
    assert found.problems == [
        "torch is broken.",
        "the self-test 'search' fails (ValueError: no more).",
    ]
    assert not found.to_json()["ok"]


def test_a_cache_that_cannot_be_written_is_told_and_no_problem(healthy, monkeypatch, tmp_path):
    def refuse(**_):
        raise PermissionError(13, "not writable")

    monkeypatch.setattr(diagnosis.tempfile, "TemporaryFile", refuse)
    found = api.doctor(cache_dir=tmp_path / "not" / "there")
    assert found.cache["writable"] is False and found.problems == []
    assert not (tmp_path / "not").exists()


def test_a_torchvision_that_is_broken_does_not_break_what_imports_it(monkeypatch):
    looked, helped = [], []

    def look(packages, *, needed):
        (name,) = packages
        looked.append(name)
        return [package(name, problem="broken" if name == "torchvision" else None)]

    monkeypatch.setattr(diagnosis, "look_at", look)
    monkeypatch.setattr(diagnosis, "import_torchvision", lambda: helped.append(len(looked)))
    found = diagnosis._optional()
    assert looked == list(OPTIONAL) == [one.name for one in found]
    assert helped == [looked.index("torchvision") + 1]
    # proxyq has helped itself, so it is told and is no problem; where it cannot, it is one.
    (torchvision,) = (one for one in found if one.name == "torchvision")
    assert (torchvision.problem, torchvision.note) == (None, "broken")

    def cannot():
        raise RuntimeError("no such operator")

    monkeypatch.setattr(diagnosis, "import_torchvision", cannot)
    (torchvision,) = (one for one in diagnosis._optional() if one.name == "torchvision")
    assert (torchvision.problem, torchvision.note) == ("broken", None)


def test_a_wrong_search_is_a_problem(monkeypatch):
    from types import SimpleNamespace

    right = diagnosis.load_data("digits", split="test").labels

    def gives(wrong, status="optimal"):
        """Of a search whose plan has so many of 400 images wrong."""
        solver, budgets = SimpleNamespace(status=status), (SimpleNamespace(achieved=2.99),)
        plan = SimpleNamespace(solver=solver, budgets=budgets)
        monkeypatch.setattr(diagnosis, "search", lambda *_, **__: plan)
        answers = np.eye(10)[(right + (np.arange(400) < wrong)) % 10]
        run = SimpleNamespace(logits=lambda inputs: answers[: len(inputs)])
        monkeypatch.setattr(diagnosis, "quantize_model", lambda *_: run)
        return diagnosis._check("search", diagnosis._search)

    assert gives(8).problem is None and gives(8).found["top1"] == 98.0
    assert "with 12 % top-1" in gives(352).problem
    assert "is feasible, of 2.99 bits" in gives(8, "feasible").problem


# -- the self-tests, for real --------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_network_is_searched():
    check = diagnosis._check("search", diagnosis._search)
    assert check.problem is None
    assert check.found["status"] == "optimal" and check.found["bits"] <= 3
    assert check.found["top1"] > 95


@pytest.mark.slow
def test_a_torch_module_goes_through_the_bridge():
    torch = pytest.importorskip("torch")
    before = torch.random.get_rng_state()
    check = diagnosis._check("torch bridge", diagnosis._bridge)
    assert check.problem is None and 0 <= check.found["parity_error"] < 1e-5
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
def test_a_bridge_that_is_wrong_is_told(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(diagnosis, "AGREEMENT", 0.0)
    monkeypatch.setattr(diagnosis, "from_torch", _doubled(diagnosis.from_torch))
    check = diagnosis._check("torch bridge", diagnosis._bridge)
    assert "differs by 1.0e+00" in check.problem


def _doubled(from_torch):
    def wrong(*arguments, **options):
        model = from_torch(*arguments, **options)
        return model.replace(apply=lambda p, x, apply=model.apply: 2 * apply(p, x))

    return wrong


# -- the command ---------------------------------------------------------------------------


def test_the_command_tells_and_exits(healthy):
    done = here("doctor")
    assert (done.code, done.err) == (0, "")
    assert f"Python {sys.version.split()[0]}" in done.out
    assert "timm" in done.out and "missing: pip install 'proxyq[torch]'" in done.out
    assert "search: works · top1 98.0 · " in done.out
    assert max(map(len, done.out.splitlines())) <= 88
    healthy[1] = replace(healthy[1], problem="torch is broken.")
    done = here("doctor", "--json", "--quiet")
    assert done.code == 1 and done.err == "proxyq: torch is broken.\n"
    record = json.loads(done.out)
    assert record["problems"] == ["torch is broken."] and not record["ok"]
    assert [one["name"] for one in record["packages"]] == ["jax", "torch", "timm"]


def test_a_jax_that_cannot_be_imported_is_told(tmp_path):
    (tmp_path / "jax.py").write_text("raise RuntimeError('jaxlib is too old')")
    done = subprocess.run(
        [sys.executable, "-m", "proxyq", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert done.returncode == 1, done.stderr
    record = json.loads(done.stdout)
    assert "jaxlib is too old" in record["problems"][0] and not record["ok"]
    assert record["problems"][0].startswith("jax ")


@pytest.mark.slow
def test_the_whole_for_real(tmp_path):
    done = here("doctor", "--json", "--cache-dir", tmp_path)
    record = json.loads(done.out)
    assert done.code == (0 if record["ok"] else 1)
    assert all(one["ok"] for one in record["checks"])
    assert {one["name"] for one in record["packages"]} == {*NEEDED, *OPTIONAL}
