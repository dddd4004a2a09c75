"""The scripts in `examples/` do what `examples/README.md` says, to the number."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
NEEDS = {"onnx_export": ("torch", "onnx", "onnxruntime", "onnxscript")}
NUMBER = r"-?\d+(?:\.\d+)?"


def stated():
    """The number of each script, as text, from the table."""
    rows = re.findall(
        rf"^\| \[(\w+)\.py\]\(\1\.py\) \|.*\| ({NUMBER}) \|$",
        (FOLDER / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return dict(rows)


def test_every_script_is_in_the_table():
    # All others are networks, for use as MODEL.
    scripts = {p.stem for p in FOLDER.glob("*.py") if "The number:" in p.read_text("utf-8")}
    assert set(stated()) == scripts and len(scripts) >= 8


@pytest.mark.parametrize("name", sorted(stated()))
def test_a_script_is_short(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert "The number:" in text.split('"""')[1]


@pytest.mark.parametrize("name", sorted(stated()))
def test_a_script_prints_its_number(name):
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    last = out.getvalue().rstrip().splitlines()[-1]
    (found,) = re.findall(rf"(?<![\w.-]){NUMBER}(?![\w-])", last.rpartition(":")[2])
    expected = stated()[name]
    assert len(found.partition(".")[2]) == len(expected.partition(".")[2]), "as many digits"
    # Two images of 400, where another processor rounds otherwise.
    assert float(found) == pytest.approx(float(expected), abs=0.5 if "top-1" in last else 0.005)
