"""Networks as their libraries write them, through the bridge: the page's own measurement.

All of them are in `docs/architectures.md`, which `benchmarks/architectures.py` makes.
"""

import importlib.util
from pathlib import Path

import pytest

from proxyq.model.torch_import import import_torchvision

pytest.importorskip("torch")
import_torchvision()  # timm and transformers ask for it
PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "architectures.py"
spec = importlib.util.spec_from_file_location("benchmark_architectures", PATH)
assert spec is not None and spec.loader is not None
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("timm:lcnet_050", 33),
        pytest.param("torchvision:squeezenet1_1", 26, marks=pytest.mark.slow),
        pytest.param("timm:levit_128s", 52, marks=pytest.mark.slow),
        pytest.param("timm:xcit_nano_12_p16_224", 89, marks=pytest.mark.slow),
        pytest.param("transformers:minilm", 37, marks=pytest.mark.slow),
        pytest.param("transformers:gpt2", 17, marks=pytest.mark.slow),
        pytest.param("transformers:t5-encoder", 36, marks=pytest.mark.slow),
        pytest.param("transformers:fnet", 10, marks=pytest.mark.slow),
    ],
)
def test_torch_and_proxyq_say_the_same(name, layers):
    library = name.partition(":")[0]
    pytest.importorskip(library)
    row = benchmark.measured(name)
    assert row["layers"] == layers and sum(row["kinds"].values()) == layers
    assert row["parity"] < 1e-4 and row["spread"] > 1e-3  # outputs all alike would prove nothing


def test_the_page_tells_of_failures():
    rows = [
        {
            "spec": "timm:one",
            "parameters": 2_500_000,
            "layers": 3,
            "kinds": {"conv": 2, "linear": 1},
            "parity": 2e-7,
            "export_cpu_s": 1.0,
            "trace_cpu_s": 0.25,
        },
        {"spec": "timm:two", "error": "first line\nunknown | operator"},
    ]
    page = "\n".join(benchmark.table(rows))
    assert (
        "1 of 2 networks" in page
        and "| one | 2.5 M | 3 | 2 conv, 1 linear | 2.0e-07 | 1.0 | 0.2 |" in page
    )
    assert "CPU seconds of the process, without compiling. `" in page
    assert "unknown / operator" in page
    assert "brackets" not in page and "Not measured" not in page
    waiting = ["timm:three", "transformers:four", "timm:five"]
    page = "\n".join(benchmark.table(rows, waiting))
    assert "Not measured yet: three, five." in page and "Not measured yet: four." in page
    rows[0] |= {"parity": 3e-5, "torch_rounding": 2e-5}
    page = "\n".join(benchmark.table(rows))
    assert "| 3.0e-05 (2.0e-05) |" in page and "above 1e-05, torch's own" in page
    del rows[0]["torch_rounding"]
    del rows[0]["export_cpu_s"], rows[0]["trace_cpu_s"]  # as rows of before were
    page = "\n".join(benchmark.table(rows))
    assert "| 3.0e-05 |  |  |" in page and "rows without them" in page


def test_every_name_is_there_once_and_is_known():
    names = benchmark.every()
    assert len(names) == len(set(names)) >= 200
    timm = pytest.importorskip("timm")
    assert all(timm.is_model(name) for name in benchmark.TIMM)
    known = import_torchvision().models.list_models()
    assert set(benchmark.TORCHVISION) <= set(known)
