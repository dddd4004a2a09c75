"""`proxyq export` in every format, of a plan and of a packed file: what it wrote runs as ours."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from commandline import here
from flax import nnx
from networks import SmallNet
from test_reconstruct import images
from torch_networks import SmallTransformer

import proxyq
from proxyq.api import quantize_model
from proxyq.export.compressed_tensors import load_compressed_tensors
from proxyq.export.onnx import run_onnx
from proxyq.export.qwix import load_qwix
from proxyq.export.registry import EXPORTERS
from proxyq.export.torchao import load_torchao
from proxyq.model.torch_import import import_torchvision

torch = pytest.importorskip("torch")
import_torchvision()  # transformers asks for it
PACKAGES = {
    "onnx": "onnxruntime",
    "torchao": "torchao",
    "compressed-tensors": "compressed_tensors",
    "qwix": "qwix",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'm.iter_modules:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning"),
]


def transformer():
    torch.manual_seed(0)
    return SmallTransformer().eval()


def convolutions():
    module = SmallNet(nnx.Rngs(0))
    module.eval()
    return module


NETWORKS = {"transformer": (transformer, (6, 16)), "convolutions": (convolutions, (12, 12, 3))}


def run(format, out, module, x):
    if format == "onnx":
        return run_onnx(out.read_bytes(), x, optimized=False)
    if format == "qwix":
        return np.asarray(load_qwix(out, module, jnp.asarray(x[:1]))(jnp.asarray(x)))
    load = {"torchao": load_torchao, "compressed-tensors": load_compressed_tensors}[format]
    with torch.no_grad():
        return load(out, module)(torch.from_numpy(x)).numpy()


def test_every_format_is_here():
    assert list(PACKAGES) == list(EXPORTERS.available())


@pytest.mark.parametrize(
    "format",
    # `test_onnx.py` runs the command too.
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "onnx")) for name in PACKAGES],
)
def test_a_plan_and_a_packed_file(format, tmp_path):
    pytest.importorskip(PACKAGES[format])
    name = "convolutions" if format == "qwix" else "transformer"
    make, shape = NETWORKS[name]
    model = (f"{__file__}:{name}", "--input-shape", ",".join(map(str, shape)))
    plan, out, packed = (tmp_path / part for part in ("plan.json", "out", "packed"))
    done = here(
        *("search", *model, "--proxy", "weight-mse", "--budget", "size=5bit"),
        *("--bits", "4,8", "--out", plan, "--quiet"),
    )
    assert done.code == 0, done.err
    loaded = proxyq.load_model(model[0], input_shape=shape)
    x = images(loaded)
    ours = quantize_model(loaded, proxyq.Plan.load(plan), x, correction="none").logits(x)
    raw = ("--correction", "none", "--quiet")

    done = here("export", *model, plan, "--to", format, "--out", out, "--json", *raw)
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["format"] == format and all(str(out) in path for path in record["paths"])
    # ONNX Runtime's own optimisations round what meets 4-bit weights; torch and qwix do not.
    assert record["difference"] < (1e-2 if format == "onnx" else 1e-4)
    tolerance = 2e-5 * float(np.abs(ours).max())
    np.testing.assert_allclose(run(format, out, make(), x), ours, atol=tolerance)

    assert here("quantize", *model, plan, "--out", packed, *raw).code == 0
    again, file = tmp_path / "again", packed / "packed.safetensors"
    done = here("export", *model, "--packed", file, "--to", format, "--out", again, "--quiet")
    assert done.code == 0 and "as stored" in done.out, done.err
    np.testing.assert_allclose(run(format, again, make(), x), ours, atol=tolerance)
