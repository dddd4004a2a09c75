"""The latency table of the documentation, and the script that measures such tables."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from commandline import here
from jax import lax
from networks import mixer, small_net

from proxyq.api import inspect
from proxyq.model.function_import import from_function
from proxyq.model.model import Model
from proxyq.model.network import network
from proxyq.search.allocate.latency import load_latency
from proxyq.search.allocate.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "latency_table.py"


def search_with(table: Path, budget: str, out: Path, *options: str) -> Plan:
    """The plan that the command line finds within a budget on latency."""
    asked = ("--budget", budget, "--latency-table", table, "--proxy", "sqnr", "--out", out)
    done = here("search", *asked, *options)
    assert done.code == 0, done.err
    return Plan.load(out)


def test_the_documented_table_is_one(tmp_path: Path) -> None:
    file = ROOT / "docs" / "latency_digits.json"
    table = load_latency(file)
    assert set(table.layers) == set(inspect().names) and "int8" in table.device
    options = ("--bits", "4,8,16", "--activation-bits", "8")
    plan = search_with(file, "latency=50%", tmp_path / "plan.json", *options)
    taken = sum(
        table.of(name, layer.weight_bits or 0, layer.activation_bits) or 0
        for name, layer in plan.layers.items()
    )
    (entry,) = plan.budgets
    assert entry.low is not None and entry.high is not None
    assert entry.low <= taken <= (entry.low + entry.high) / 2
    assert len(set(plan.bits().values())) > 1


def test_the_documented_example_is_what_the_code_reads(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "latency.md").read_text()
    file = tmp_path / "example.json"
    file.write_text(text.split("```json")[1].split("```")[0])
    table = load_latency(file)
    assert table.of("conv1", 8, None) == 1_100_000_000 and table.other == 10**8


def test_without_onnx_runtime_the_script_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['onnxruntime'] = None; "
        f"sys.argv = ['latency_table.py']; sys.path.insert(0, {str(SCRIPT.parent)!r}); "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: measuring layers needs the package 'onnx")
    assert "pip install onnxruntime onnx" in done.stderr and done.stderr.count("\n") == 1


# -- with ONNX Runtime -----------------------------------------------------------------


def run(*options: object) -> subprocess.CompletedProcess:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_measured_table_is_one_that_search_takes(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    done = run("--quick", "--out", file, "--bits", "2,4,8,16", "--activation-bits", "8,float")
    assert done.returncode == 0, done.stderr
    assert "all layers" in done.stdout
    table = load_latency(file)
    assert set(table.layers) == set(inspect().names)
    assert "float32 and int8 kernels only" in table.device and "batch 1" in table.device
    for name in table.layers:
        known = {pair: table.of(name, *pair) for pair in table.layers[name]}
        assert set(known) == {(b, a) for b in (2, 4, 8, 16) for a in (8, None)}
        # Narrow bits take int8's time, all else float32's.
        assert len({known[b, 8] for b in (2, 4, 8)}) == 1
        assert len({known[16, 8], *(known[b, None] for b in (2, 4, 8, 16))}) == 1
        assert min(filter(None, known.values())) > 0
    plan = search_with(
        file, "latency=1s", tmp_path / "plan.json", "--bits", "2,8", "--activation-bits", "8"
    )
    assert plan.budgets[0].name == "latency"
    # The file is written a line for each time.
    assert len(file.read_text().splitlines()) > 8 * len(json.loads(file.read_text())["layers"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "2,9"), "--bits must be 1 to 8 or 16, got 9"),
        (("--bits", "2,float"), "--bits must be bit-widths such as 4,8, got '2,float'"),
        (("--activation-bits", "8,8"), "names the bit-width 8 twice"),
        (("--out", "/nowhere/table.json"), "'/nowhere' does not exist"),
        (("torchvison:resnet18",), "torchvison"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(tmp_path: Path, options: tuple, words: str) -> None:
    done = run("--quick", "--out", tmp_path / "table.json", *options)
    assert done.returncode == 1 and not (tmp_path / "table.json").exists()
    assert done.stderr.startswith("error: ") and words in done.stderr
    assert done.stderr.count("\n") == 1


def test_wrong_numbers_are_refused() -> None:
    for option, value in (("--batch", "0"), ("--threads", "two"), ("--input-shape", "3,x")):
        done = run(option, value)
        assert done.returncode == 2 and f"argument {option}: invalid" in done.stderr


def convolutions() -> Model:
    """Convolutions of all kinds: dilated, grouped, padded on one side, transposed, in 1-D."""
    rng = np.random.default_rng(0)
    shapes = {
        "dilated": (3, 3, 3, 8),
        "grouped": (3, 3, 4, 8),
        "lopsided": (2, 3, 8, 6),
        "up": (3, 3, 6, 4),
        "line": (5, 4, 4),
    }
    params = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}

    def apply(p: Any, x: Any) -> Any:
        names = ("NHWC", "HWIO", "NHWC")

        def conv(x: Any, name: str, strides: Any, padding: Any, **options: Any) -> Any:
            return lax.conv_general_dilated(
                x, p[name], strides, padding, dimension_numbers=names, **options
            )

        x = conv(x, "dilated", (1, 2), "SAME", rhs_dilation=(2, 1))
        x = conv(x, "grouped", (1, 1), "VALID", feature_group_count=2)
        x = conv(x, "lopsided", (2, 1), ((0, 1), (2, 0)))
        x = conv(x, "up", (1, 1), ((1, 2), (1, 1)), lhs_dilation=(2, 2))
        x = jnp.mean(x, axis=1)
        x = lax.conv_general_dilated(
            x, p["line"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return x.mean(axis=1)

    return from_function(apply, params, (12, 14, 3), name="convolutions")


@pytest.mark.parametrize("build", [small_net, mixer, convolutions])
def test_kernels_compute_the_layers_own_shapes(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import onnx_layers

    found = network(build(), 2)
    kinds = set()
    for site in found.sites:
        eqn = found.graph.main[site.position]
        op = onnx_layers.operation(eqn, site.operand)
        shape = eqn.outvars[0].aval.shape
        exact = onnx_layers.float_kernel(op, 1)
        int8 = onnx_layers.int8_kernel(op, 1)
        assert exact.executed() - onnx_layers.MOVES <= onnx_layers.FLOAT_OPS
        if isinstance(op, onnx_layers.Conv):
            out = [shape[axis] for axis in eqn.params["dimension_numbers"].out_spec]
            assert list(exact.output().shape) == out, site.layer
            kinds.add(int8 is None)
        else:
            assert exact.output().size == np.prod(shape)
        if int8 is None:
            assert max(op.upsample) > 1
            continue
        assert int8.executed() <= onnx_layers.INT8_OPS
        assert int8.output().dtype == np.uint8 and int8.output().size == np.prod(shape)
    if build is convolutions:
        assert kinds == {True, False}
