"""Every benchmark runs with `--quick` and prints its ratios; times are never checked."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "ratios"),
    [
        pytest.param("orthogonality_search.py", 5, marks=pytest.mark.slow),
        pytest.param("single_layer_sweep.py", 3, marks=pytest.mark.slow),
        pytest.param("bridge_forward.py", 7, marks=pytest.mark.slow),
        pytest.param("curvature.py", 11, marks=pytest.mark.slow),
        pytest.param("clado.py", 5, marks=pytest.mark.slow),
        ("iqp.py", 3),
        ("formulas.py", 3),
    ],
)
def test_a_quick_run_prints_ratios(script: str, ratios: int) -> None:
    pytest.importorskip("torch")
    if script in ("orthogonality_search.py", "bridge_forward.py"):
        pytest.importorskip("proxyq.model.torch_import").import_torchvision()
    if script == "iqp.py":
        pytest.importorskip("pyscipopt")
    run = subprocess.run(
        [sys.executable, FOLDER / script, "--quick"], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.rstrip().splitlines()[-ratios:]
    assert len(lines) == ratios
    for line in lines:
        assert re.fullmatch(r"ratio .+: \d+\.\d{3} wall, \d+\.\d{3} cpu", line), line


@pytest.mark.slow
def test_a_quick_evolution_prints_curves() -> None:
    run = subprocess.run(
        [sys.executable, FOLDER / "evolution.py", "--quick"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert "random search" in run.stdout and "EMQ's settings" in run.stdout


@pytest.mark.slow
def test_a_small_discovery_is_reported(tmp_path: Path) -> None:
    given = ["--tables", tmp_path, "--into", tmp_path, "--networks", "digits", "--samples", "64"]
    given += ["--evaluations", "400", "--seeds", "1", "--out", tmp_path / "report.md"]
    for step in ("evolve", "rank", "report"):
        run = subprocess.run(
            [sys.executable, FOLDER / "discovery.py", step, *given],
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert run.returncode == 0, run.stderr
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"^\| restored-error \| 0\.\d{3} \(", text, re.MULTILINE)
    assert re.search(r"^- `.+`: 0\.\d{3}", text, re.MULTILINE)
