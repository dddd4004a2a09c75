"""ONNX files: the integers in them are ours, and ONNX Runtime gives our outputs."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from commandline import here
from networks import small_net
from test_reconstruct import images, plan_of

import proxyq
from proxyq.api import quantize_model
from proxyq.errors import MissingExtra, ProxyqError
from proxyq.export import agreement
from proxyq.export.onnx import export_onnx, run_onnx, stored
from proxyq.model.torch_import import import_torchvision
from proxyq.ptq.deploy import deployed_layers
from proxyq.quantize.integers import Integers
from proxyq.search.allocate.plan import PlannedBudget

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from torch import nn  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cifar_resnet.py"


class Net(nn.Module):
    """Convolutions with batch norm, depthwise, attention, and a weight that is used twice."""

    input_shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.first = nn.Linear(16, 16, bias=False)
        self.second = nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.depthwise(x)).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.second(torch.relu(self.first(x)))
        return self.head(x.mean(1))


def randomised(module, seed=0):
    """Batch norm as if trained, and no weight that starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean.normal_(0, 0.2, generator=generator)
                part.running_var.uniform_(0.5, 1.5, generator=generator)
                part.weight.uniform_(0.5, 1.5, generator=generator)
                part.bias.normal_(0, 0.2, generator=generator)
        for name, parameter in module.named_parameters():
            if "head" in name or "class_token" in name or name.endswith("in_proj_bias"):
                parameter.normal_(0, 0.1, generator=generator)
    return module.eval()


def net() -> nn.Module:
    """For the command line too: the same weights at every call."""
    torch.manual_seed(0)
    return randomised(Net())


def resnet20():
    spec = importlib.util.spec_from_file_location("cifar_resnet", EXAMPLE)
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    torch.manual_seed(0)
    return randomised(code.resnet20())


@pytest.fixture(scope="module")
def model():
    return proxyq.from_torch(net(), Net.input_shape, name="net")


@pytest.fixture(scope="module")
def residual():
    return proxyq.from_torch(resnet20(), (3, 32, 32), name="resnet20")


def mixed(model, widths=(1, 2, 3, 4, 5, 8), activation=None, **method):
    plan = plan_of(model, 4, activation)
    layers = {
        name: layer.model_copy(update={"weight_bits": widths[i % len(widths)]})
        for i, (name, layer) in enumerate(plan.layers.items())
    }
    return plan.model_copy(update={"layers": layers, "method": {**plan.method, **method}})


def values_in(path):
    """What the file's DequantizeLinear nodes of weights give, by name of the initializer."""
    graph = onnx.load(path).graph
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in held:
            continue
        codes, scale, zero = (held[name].astype(np.float32) for name in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), None)
        shape = [1] * codes.ndim
        if axis is not None:
            shape[axis] = -1
        found[node.input[0]] = (codes - zero.reshape(shape)) * scale.reshape(shape)
    return found


def agrees(quantized, path):
    """Every weight bit for bit; where the file holds one transposed, so is ours."""
    found = values_in(path)
    layers = deployed_layers(quantized)
    assert set(found) == {layer.parameter for layer in layers}
    for layer in layers:
        own, ours = found[layer.parameter], layer.weight.values()
        assert np.array_equal(own, ours) or np.array_equal(own, ours.T), layer.name


@pytest.mark.parametrize("extra_code", [pytest.param("negative", marks=pytest.mark.slow), "either"])
def test_weights_of_all_widths(model, extra_code, tmp_path):
    plan = mixed(model, rounding={"extra_code": extra_code})
    quantized = quantize_model(model, plan, images(model))
    made = export_onnx(quantized, tmp_path / "net.onnx", plan=plan)
    agrees(quantized, tmp_path / "net.onnx")
    assert made.difference < 1e-2  # ONNX Runtime rounds what meets weights of few bits
    layers = {layer.name: layer for layer in deployed_layers(quantized)}
    container = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8}
    assert dict(made.raised) == {
        name: (own.bits, container[own.bits])
        for name, own in layers.items()
        if own.bits != container[own.bits]
    }
    assert made.planned_bits == sum(
        plan.layers[name].weights * plan.layers[name].weight_bits for name in plan.layers
    )
    file = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(file, full_check=True)
    held = {prop.key: prop.value for prop in file.metadata_props}
    assert json.loads(held["proxyq_plan"]) == json.loads(plan.to_json())
    assert held["proxyq_version"] == proxyq.__version__
    assert json.loads(held["proxyq_bits"])["stem"] == [1, None]
    assert str(Path(__file__).parent).encode() not in (tmp_path / "net.onnx").read_bytes()
    # Any batch, and the same bytes again.
    for count in (1, 3):
        x = images(model, count)
        out = run_onnx((tmp_path / "net.onnx").read_bytes(), x, optimized=False)
        np.testing.assert_allclose(out, quantized.logits(x), rtol=1e-4, atol=1e-5)
    export_onnx(quantized, tmp_path / "again.onnx", plan=plan)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "net.onnx").read_bytes()


@pytest.mark.parametrize("activation", [pytest.param(4, marks=pytest.mark.slow), 8, 16])
def test_rounded_inputs(model, activation, tmp_path):
    plan = mixed(model, (4, 8), activation)
    quantized = quantize_model(model, plan, images(model))
    export_onnx(quantized, tmp_path / "net.onnx", plan=plan, inputs=images(model))
    agrees(quantized, tmp_path / "net.onnx")
    file = onnx.load(tmp_path / "net.onnx")
    held = {t.name: onnx.numpy_helper.to_array(t) for t in file.graph.initializer}
    kinds = [node.op_type for node in file.graph.node]
    # first and second share a weight and read different things.
    assert kinds.count("QuantizeLinear") == len(plan.layers) + 1
    assert kinds.count("Clip") == (kinds.count("QuantizeLinear") if activation == 4 else 0)
    for layer in deployed_layers(quantized):
        assert held[f"{layer.name}.input.scale"] == np.float32(layer.inputs.scale)
        assert held[f"{layer.name}.input.zero_point"] == float(layer.inputs.zero)
    x = images(model, 64, seed=7)
    plain = run_onnx((tmp_path / "net.onnx").read_bytes(), x, optimized=False)
    ours = quantized.logits(x)
    assert np.median(np.abs(plain - ours)) < 1e-4 * np.abs(ours).max()


@pytest.mark.slow
def test_a_residual_network(residual, tmp_path):
    plan = mixed(residual, (2, 3, 4, 8))
    quantized = quantize_model(residual, plan, images(residual), correction="statistics")
    made = export_onnx(quantized, tmp_path / "net.onnx")
    agrees(quantized, tmp_path / "net.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert "BatchNormalization" not in kinds and kinds.count("DequantizeLinear") == 20
    assert made.difference < 1e-4


def test_a_wrong_grid_is_noticed(model, tmp_path, monkeypatch):
    plan = mixed(model, (8,), 8)
    quantized = quantize_model(model, plan, images(model))
    index = next(iter(quantized.edits))
    edit = quantized.edits[index]
    wrong = edit.input_grid._replace(scale=edit.input_grid.scale * 1.1)
    other = dataclasses.replace(
        quantized, edits={**quantized.edits, index: edit._replace(input_grid=wrong)}
    )
    # The file is made of one network and compared with the other.
    monkeypatch.setattr(type(quantized), "logits", lambda self, x: _logits(other, self, x))
    with pytest.raises(ProxyqError, match="gives other outputs than the quantized network"):
        export_onnx(quantized, tmp_path / "net.onnx", inputs=images(model))
    assert not (tmp_path / "net.onnx").exists()


def test_a_network_that_turns_codes_by_itself(residual, tmp_path, monkeypatch):
    """Where float32's own rounding moves the outputs, as much is allowed, and told; no more."""
    quantized = quantize_model(residual, mixed(residual, (4,), 4), images(residual, 16))
    monkeypatch.setattr(agreement, "ROUNDED_TOLERANCE", 0.0)
    made = export_onnx(quantized, tmp_path / "net.onnx", inputs=images(residual, 16))
    assert "could not be compared more closely" in made.notes[0]
    run = proxyq.QuantizedModel.logits(quantized, images(residual, 16))
    wrong = run + 0.04 * np.abs(run).max()
    with pytest.raises(ProxyqError, match="it gives other outputs"):
        agreement.check_agreement(quantized, lambda _: wrong, images(residual, 16), what="it")


LOGITS = proxyq.QuantizedModel.logits


def _logits(other, own, inputs):
    rounded = any(edit.input_grid is not None for edit in own.edits.values())
    return LOGITS(other if rounded else own, inputs)


def layer_of(model, weight, inputs=None):
    layers = deployed_layers(quantize_model(model, mixed(model)))
    return dataclasses.replace(layers[0], weight=weight, inputs=inputs)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("two_bits", [True, False])
def test_what_is_stored_has_the_same_values(model, bits, two_bits):
    codes = np.arange(2**bits, dtype=np.uint16)[None].repeat(2, 0)
    scale = np.array([[0.3], [0.7]], np.float32)
    middle = 2 ** (bits - 1)
    zero = np.array([[middle], [middle - 1]] if bits > 1 else [[0.5], [0.5]], np.float32)
    weight = Integers(codes, scale, zero, bits)
    own = stored(layer_of(model, weight), two_bits=two_bits)
    low, high = -(2 ** (own.bits - 1)), 2 ** (own.bits - 1) - 1
    assert own.codes.min() >= low and own.codes.max() <= high and own.axis == 0
    np.testing.assert_array_equal(
        (own.codes - own.zero[:, None]).astype(np.float32) * own.scale[:, None], weight.values()
    )


def test_what_cannot_be_stored(model, tmp_path):
    weight = Integers(
        np.zeros((2, 3), np.uint16), np.ones((2, 1), "f4"), np.full((2, 1), 1.3, "f4"), 2
    )
    with pytest.raises(ProxyqError, match="--correction statistics"):
        stored(layer_of(model, weight), two_bits=True)
    grids = weight._replace(scale=np.arange(1, 7, dtype="f4").reshape(2, 3))
    with pytest.raises(ProxyqError, match="differ along 2 axes"):
        stored(layer_of(model, grids), two_bits=True)
    means = quantize_model(model, mixed(model), correction="weights")
    with pytest.raises(ProxyqError, match="--correction statistics"):
        export_onnx(means, tmp_path / "net.onnx")
    flax = small_net()
    with pytest.raises(ProxyqError, match="made from torch modules"):
        export_onnx(quantize_model(flax, plan_of(flax, 4)), tmp_path / "net.onnx")
    good = quantize_model(model, mixed(model))
    with pytest.raises(ProxyqError, match="has no parameter"):
        export_onnx(good, tmp_path / "net.onnx", module=nn.Linear(2, 2))
    with pytest.raises(ProxyqError, match="does not exist"):
        export_onnx(good, tmp_path / "none" / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_without_the_packages(model, tmp_path, monkeypatch):
    quantized = quantize_model(model, mixed(model, (3, 4)))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    made = export_onnx(quantized, tmp_path / "net.onnx")
    assert made.difference is None and any("was not run" in note for note in made.notes)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r"pip install 'proxyq\[onnx\]'"):
        export_onnx(quantized, tmp_path / "net.onnx")


def test_new_numbers_and_floats_are_the_models(model, tmp_path):
    """The module may have been trained on since it was read."""
    params = {name: np.asarray(value) * 1.1 for name, value in model.params.items()}
    other = model.replace(params=params)
    plan = mixed(other, (4,))
    names = list(plan.layers)
    floats = plan.layers[names[1]].model_copy(update={"weight_bits": None})
    plan = plan.model_copy(update={"layers": {**plan.layers, names[1]: floats}})
    quantized = quantize_model(other, plan, images(other))
    export_onnx(quantized, tmp_path / "net.onnx")
    x = images(other)
    out = run_onnx((tmp_path / "net.onnx").read_bytes(), x, optimized=False)
    np.testing.assert_allclose(out, quantized.logits(x), rtol=1e-4, atol=1e-5)
    assert len(values_in(tmp_path / "net.onnx")) == len(names) - 1


def with_budget(plan, asked, unit, achieved):
    budget = PlannedBudget(name="size", asked=asked, achieved=achieved, unit=unit)
    return plan.model_copy(update={"budgets": [budget]})


def test_budgets_hold_for_what_is_stored(model, tmp_path):
    plan = with_budget(mixed(model, (3,)), 3, "bit", 3)
    quantized = quantize_model(model, plan)
    made = export_onnx(quantized, tmp_path / "net.onnx", plan=plan)
    assert "4 bit on average, more than the plan's budget of 3 bit" in made.notes[0]
    assert made.size_bits * 3 == made.planned_bits * 4
    with pytest.raises(ProxyqError, match="leave --strict out"):
        export_onnx(quantized, tmp_path / "strict.onnx", plan=plan, strict=True)
    assert not (tmp_path / "strict.onnx").exists()
    roomy = with_budget(plan, 1, "MiB", 0.1)
    assert not export_onnx(quantized, tmp_path / "net.onnx", plan=roomy).notes


def test_the_command(tmp_path):
    spec, out = f"{__file__}:net", tmp_path / "net.onnx"
    module = proxyq.load_model(spec, input_shape=(3, 8, 8))
    plan = with_budget(mixed(module, (3, 4)), 3.6, "bit", 3.5)
    plan.save(tmp_path / "plan.json")
    model = (spec, "--input-shape", "3,8,8")
    common = (*model, tmp_path / "plan.json", "--to", "onnx", "--out", out)
    done = here("export", *common, "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["paths"] == [str(out)] and record["size_bits"] > record["planned_bits"]
    assert "more bits in onnx than planned" in done.err and "budget" in done.err
    out.unlink()
    strict = here("export", *common, "--strict")
    assert strict.code == 1 and strict.err.count("\n") == 1 and not out.exists()
    packed = tmp_path / "packed"
    assert here("quantize", *model, tmp_path / "plan.json", "--out", packed).code == 0
    file = packed / "packed.safetensors"
    done = here("export", *model, "--packed", file, "--to", "onnx", "--out", out)
    assert done.code == 0 and "as stored" in done.out, done.err
    # A packed network is held to the budgets of the plan that it carries.
    assert "more than the plan's budget" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--to", "onxn"], 2, "did you mean 'onnx'?"),
        ([], 2, "say the format: --to onnx"),
        (["--to", "onnx", "--packed", "none.safetensors"], 1, "cannot read the packed network"),
        (["--to", "onnx"], 1, "made from torch modules"),
        (["--to", "onnx", "again.json"], 2, "name one plan to export"),
        (["--to", "onnx", "--reconstruct", "best"], 2, "must be one of none, bias"),
        (["--to", "onnx", "--steps", "20"], 2, "must go with a reconstruction that learns"),
        (["--to", "onnx", "--packed", "x.safetensors", "--steps", "20"], 2, "or `packed`"),
    ],
)
def test_bad_arguments(arguments, code, says, tmp_path):
    plan = tmp_path / "plan.json"
    here("search", "--proxy", "sqnr", "--budget", "size=3bit", "--out", plan, "--quiet")
    done = here("export", plan, *arguments, "--out", tmp_path / "net.onnx", "--quiet")
    assert done.code == code and says in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "activation"),
    [("mobilenet_v2", None), ("mobilenet_v2", 8), ("vit_b_16", None), ("vit_b_16", 8)],
)
def test_networks_of_torchvision(name, activation, tmp_path):
    torchvision = import_torchvision()
    torch.manual_seed(0)
    options = {"image_size": 32} if name == "vit_b_16" else {}
    module = randomised(getattr(torchvision.models, name)(**options))
    side = 32 if name == "vit_b_16" else 64
    model = proxyq.from_torch(module, (3, side, side), name=name)
    plan = mixed(model, (4, 8), activation, rounding={"extra_code": "either"})
    quantized = quantize_model(model, plan, images(model, 16))
    made = export_onnx(quantized, tmp_path / "net.onnx", plan=plan, inputs=images(model, 16))
    agrees(quantized, tmp_path / "net.onnx")
    assert made.difference < 0.1


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("activation", [None, 8])
def test_accuracy_of_a_trained_network(cifar, activation, tmp_path):
    weights = cifar / "cifar10_resnet20.safetensors"
    model = proxyq.load_model(f"{EXAMPLE}:resnet20", weights=weights)
    with np.load(cifar / "cifar10.npz") as file:
        train, test, labels = (file[k] for k in ("x_train", "x_test", "y_test"))
        train, test, labels = train[:256], test[:1000], labels[:1000]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    def prepared(raw):
        raw = raw if raw.shape[-1] == 3 else raw.transpose(0, 2, 3, 1)
        return ((raw / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)

    quantized = quantize_model(
        model, mixed(model, (3, 4, 6, 8), activation), prepared(train), correction="statistics"
    )
    export_onnx(quantized, tmp_path / "net.onnx", inputs=prepared(train))
    x = prepared(test)
    # By default ONNX Runtime adds integers up in other orders and rounds between.
    content = (tmp_path / "net.onnx").read_bytes()
    theirs = run_onnx(content, x, optimized=False).argmax(-1) == labels
    ours = quantized.logits(x).argmax(-1) == labels
    assert ours.mean() > 0.85 and abs(theirs.mean() - ours.mean()) <= 0.001 + 1e-9
