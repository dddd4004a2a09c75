"""torchao: our integers are its, the network runs the same, and what it cannot hold is told."""

import json
import sys

import numpy as np
import pytest
from torch_networks import (
    SmallTransformer,
    Tied,
    cifar_resnet,
    made_of,
    plan_of,
    resnet,
    run_of,
    weight_of,
)

import proxyq
from proxyq.api import quantize_model
from proxyq.data import load_data, model_inputs
from proxyq.errors import MissingExtra, ProxyqError
from proxyq.export import torchao
from proxyq.export.torch_module import largest_difference, to_torch
from proxyq.export.torchao import export_torchao, load_torchao, to_torchao
from proxyq.model.torch_import import import_torchvision
from proxyq.ptq.deploy import deployed_layers
from proxyq.search.allocate.plan import PlannedBudget

torch = pytest.importorskip("torch")
pytest.importorskip("torchao")
nn = torch.nn

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_integers(quantized, module, raised=()):
    """Codes, scales, zero points and values are ours, bit for bit."""
    for layer in deployed_layers(quantized):
        weight = weight_of(module, layer)
        if layer.name in raised:
            assert type(weight) is nn.Parameter
            np.testing.assert_array_equal(weight.detach().numpy(), layer.weight.values())
            continue
        assert weight.target_dtype == getattr(torch, f"int{layer.bits}")
        half = 2 ** (layer.bits - 1)
        assert weight.qdata.min() >= -half and weight.qdata.max() <= half - 1
        np.testing.assert_array_equal(
            weight.qdata.numpy().astype(int) + half, layer.weight.codes.astype(int)
        )
        scales = np.broadcast_to(layer.weight.scale, weight.scale.shape)
        np.testing.assert_array_equal(weight.scale.numpy(), scales)
        np.testing.assert_array_equal(weight.dequantize().numpy(), layer.weight.values())


def mobilenet():
    return import_torchvision().models.mobilenet_v2(weights=None, width_mult=0.35, num_classes=10)


def vision_transformer():
    torchvision = import_torchvision()
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64
    )


@pytest.mark.parametrize(
    ("make", "shape", "float_layers"),
    [
        (resnet, (3, 32, 32), 0),
        (SmallTransformer, (6, 16), 0),
        pytest.param(mobilenet, (3, 32, 32), 0, marks=pytest.mark.slow),
        (vision_transformer, (3, 32, 32), 2),  # in_proj and out_proj
    ],
)
def test_integers_outputs_and_files(make, shape, float_layers, tmp_path):
    module, quantized, plan, inputs = made_of(make, shape)
    done = export_torchao(quantized, tmp_path, module=module, plan=plan, inputs=inputs)
    assert len(done.raised) == float_layers
    assert all(stored == 32 for _, stored in done.raised.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    for ours in (to_torchao(quantized, module), load_torchao(tmp_path, make())):
        check_integers(quantized, ours, done.raised)
        assert largest_difference(quantized, run_of(ours), inputs) < 1e-5
        with torch.inference_mode():
            ours(torch.from_numpy(inputs))
    assert done.planned_bits == plan.size_bits
    assert (done.size_bits > plan.size_bits) == bool(float_layers)


@pytest.mark.parametrize(
    "correction", [pytest.param("weights", marks=pytest.mark.slow), "statistics"]
)
def test_corrected_networks_and_rounded_inputs(correction, tmp_path):
    module, quantized, _, inputs = made_of(
        resnet, (3, 32, 32), (4,), activation_bits=8, correction=correction
    )
    done = export_torchao(quantized, tmp_path, module=module, inputs=inputs)
    assert any("round what they read" in note for note in done.notes)
    back = load_torchao(tmp_path, resnet())
    same = run_of(to_torch(quantized, module))(inputs)
    found = run_of(back)(inputs)
    # Zero points that are not whole move a weight by a rounding, which may turn one of an input.
    tolerance = 1e-6 if correction == "statistics" else 2e-2
    assert np.abs(found - same).max() <= tolerance * np.abs(same).max()
    for layer in deployed_layers(quantized):
        values, own = weight_of(back, layer).dequantize().numpy(), layer.weight.values()
        np.testing.assert_allclose(values, own, rtol=0, atol=1e-6 * np.abs(own).max())


def test_what_a_torchao_user_reads(tmp_path):
    """torchao and transformers' form alone, without proxyq."""
    from safetensors import safe_open
    from torchao.core.config import config_from_dict
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    from torchao.quantization import quantize_

    module, quantized, plan, inputs = made_of(SmallTransformer, (6, 16))
    export_torchao(quantized, tmp_path, module=module, plan=plan)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state, rest = unflatten_tensor_state_dict(tensors, file.metadata())
    fresh = SmallTransformer().eval()
    fresh.load_state_dict({**state, **rest}, assign=True)
    assert largest_difference(quantized, run_of(fresh), inputs) < 1e-5
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config = config_from_dict(written["quant_type"]["default"])
    assert set(config.fqn_to_config) == set(plan.layers)
    stock = SmallTransformer().eval()
    quantize_(stock, config, filter_fn=None)
    for name, bits in plan.bits().items():
        assert stock.get_submodule(name).weight.target_dtype == getattr(torch, f"int{bits}")


class Kinds(nn.Module):
    """Layers that torchao has no integers for, and one at 16 bits: (N, 4, 8) -> (N, 3)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.wide = nn.Linear(64, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.up(torch.relu(self.conv(x))))
        return self.head(torch.relu(self.wide(x.flatten(1))))


def test_what_torchao_cannot_hold_stays_float_and_is_told(tmp_path):
    bits = {"conv": 4, "up": 4, "wide": 16, "head": 4}
    module, quantized, _, inputs = made_of(Kinds, (4, 8), bits)
    budgets = [
        PlannedBudget(name="size", asked=20, achieved=15.0, unit="bit"),
        PlannedBudget(name="size", asked=1, achieved=0.9, unit="kB"),
        PlannedBudget(name="bops", asked=1, achieved=1, unit="G"),
    ]
    plan = plan_of(quantized.model, bits, budgets=budgets)
    done = export_torchao(quantized, tmp_path, module=module, plan=plan, inputs=inputs)
    assert done.raised == {"conv": (4, 32), "up": (4, 32), "wide": (16, 32)}
    weights = {name: layer.weights for name, layer in plan.layers.items()}
    assert done.size_bits == 32 * sum(weights.values()) - 28 * weights["head"]
    assert sum("more than the plan's budget" in note for note in done.notes) == 2
    assert any("no integer weights for Conv1d" in note for note in done.notes)
    back = load_torchao(tmp_path, Kinds())
    check_integers(quantized, back, done.raised)
    with pytest.raises(ProxyqError, match=r"'conv' \(4 bits as float.*'up'.*'wide'"):
        export_torchao(quantized, tmp_path / "no", module=module, strict=True)
    assert not (tmp_path / "no").exists()


def test_weights_that_two_layers_share(tmp_path):
    module, quantized, plan, inputs = made_of(Tied, (6,), (3,))
    ours = to_torchao(quantized, module)
    assert ours.first.weight is ours.second.weight
    # Looking up multiplies by nothing: only the head is rounded.
    np.testing.assert_array_equal(
        ours.embedding.weight.detach().numpy(), module.embedding.weight.detach().numpy()
    )
    assert largest_difference(quantized, run_of(ours), inputs) < 1e-5
    export_torchao(quantized, tmp_path, module=module, plan=plan, inputs=inputs)
    assert largest_difference(quantized, run_of(load_torchao(tmp_path, Tied())), inputs) < 1e-5


def test_other_modules_and_damaged_files_are_refused(tmp_path):
    module, quantized, _, _ = made_of(SmallTransformer, (6, 16))
    export_torchao(quantized, tmp_path, module=module)
    with pytest.raises(ProxyqError, match="is of another module"):
        load_torchao(tmp_path, Kinds())
    with pytest.raises(ProxyqError, match="has the shape"):
        load_torchao(tmp_path, SmallTransformer(32))
    with pytest.raises(ProxyqError, match="no parameter"):
        to_torchao(quantized, Kinds())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ProxyqError, match="are damaged"):
        load_torchao(tmp_path, SmallTransformer())
    file.unlink()
    with pytest.raises(ProxyqError, match="cannot read the weights"):
        load_torchao(tmp_path, SmallTransformer())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ProxyqError, match="no part 'proxyq'"):
        load_torchao(tmp_path, SmallTransformer())


def test_without_torchao_the_install_line_is_told(monkeypatch):
    torchao._torchao.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingExtra, match=r"pip install 'proxyq\[torchao\]'"):
        torchao._torchao()


@pytest.mark.data
@pytest.mark.slow
def test_top1_of_resnet20_on_cifar10(cifar, tmp_path):
    from safetensors.torch import load_file

    module = cifar_resnet().resnet20().eval()
    module.load_state_dict(load_file(cifar / "cifar10_resnet20.safetensors"))
    model = proxyq.from_torch(module, (3, 32, 32)).replace(
        preprocessing=proxyq.Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    )
    file = cifar / "cifar10.npz"
    calibration = load_data(f"{file}:x_train,y_train").take(256)
    test = load_data(f"{file}:x_test,y_test").take(1000)
    images = np.asarray(model_inputs(model, test))
    labels = np.asarray(test.labels)
    quantized = quantize_model(
        model,
        plan_of(model, (4, 3, 5)),
        np.asarray(model_inputs(model, calibration)),
        correction="statistics",
    )
    export_torchao(quantized, tmp_path, module=module)
    back = load_torchao(tmp_path, cifar_resnet().resnet20())
    ours, theirs = quantized.logits(images), run_of(back)(images)
    top1 = [100 * float((logits.argmax(axis=1) == labels).mean()) for logits in (ours, theirs)]
    assert abs(top1[0] - top1[1]) <= 0.1 and top1[0] > 80
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(ours).max()
