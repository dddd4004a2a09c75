"""torchao: our integers are its, the network runs the same, and what it cannot hold is told."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from test_torch_import import randomise

import proxyq
from proxyq.api import quantize_model
from proxyq.errors import MissingExtra, ProxyqError
from proxyq.export.torch_module import largest_difference, to_torch
from proxyq.export.torchao import export_torchao, load_torchao, to_torchao
from proxyq.model.torch_import import import_torchvision
from proxyq.ptq.deploy import deployed_layers
from proxyq.search.allocate.plan import Plan, PlannedBudget, PlannedLayer

torch = pytest.importorskip("torch")
pytest.importorskip("torchao")
nn = torch.nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BITS = (3, 8, 2, 5, 4, 1, 7, 6)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Attention(nn.Module):
    """One head with separate projections: (N, L, width) -> (N, L, width)."""

    def __init__(self, width):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
        return self.out_proj(weights @ v)


class SmallTransformer(nn.Module):
    """Two blocks of attention and a gated layer: (N, 6, 16) -> (N, 5)."""

    def __init__(self, width=16):
        super().__init__()
        self.attention = nn.ModuleList(Attention(width) for _ in range(2))
        self.norm1 = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.norm2 = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.gate_proj = nn.ModuleList(nn.Linear(width, 24) for _ in range(2))
        self.up_proj = nn.ModuleList(nn.Linear(width, 24, bias=False) for _ in range(2))
        self.down_proj = nn.ModuleList(nn.Linear(24, width) for _ in range(2))
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = x + self.start
        for i, attention in enumerate(self.attention):
            x = x + attention(self.norm1[i](x))
            y = self.norm2[i](x)
            gated = nn.functional.silu(self.gate_proj[i](y)) * self.up_proj[i](y)
            x = x + self.down_proj[i](gated)
        return self.head(x.mean(dim=1))


def resnet(name="resnet20"):
    spec = importlib.util.spec_from_file_location("cifar_resnet", EXAMPLES / "cifar_resnet.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)()


def plan_of(model, bits, activation_bits=None, budgets=()):
    """A plan with bits from a cycle, or by layer."""
    found = proxyq.model.network.network(model, 2).layers
    layers = {}
    for place, layer in enumerate(found):
        own = bits[layer.name] if isinstance(bits, dict) else bits[place % len(bits)]
        layers[layer.name] = PlannedLayer(
            weight_bits=own,
            activation_bits=activation_bits,
            weights=layer.weights,
            macs=layer.macs,
        )
    return Plan(layers=layers, budgets=list(budgets))


def made_of(make, shape, bits=BITS, activation_bits=None, **options):
    torch.manual_seed(0)
    module = randomise(make()).eval()
    model = proxyq.from_torch(module, shape)
    plan = plan_of(model, bits, activation_bits)
    inputs = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    return module, quantize_model(model, plan, inputs, **options), plan, inputs


def run_of(module):
    def run(images):
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return run


def weight_of(module, layer):
    owner, _, attribute = layer.parameter.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)


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
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64
    )


@pytest.mark.parametrize(
    ("make", "shape", "float_layers"),
    [
        (resnet, (3, 32, 32), 0),
        (SmallTransformer, (6, 16), 0),
        (mobilenet, (3, 32, 32), 0),
        (vision_transformer, (3, 32, 32), 4),  # in_proj and out_proj of two blocks
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


@pytest.mark.parametrize("correction", ["weights", "statistics"])
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
    assert sum("is exceeded" in note for note in done.notes) == 2
    assert any("no integer weights for Conv1d" in note for note in done.notes)
    back = load_torchao(tmp_path, Kinds())
    check_integers(quantized, back, done.raised)
    with pytest.raises(ProxyqError, match=r"'conv' \(4 bits became float.*'up'.*'wide'"):
        export_torchao(quantized, tmp_path / "no", module=module, strict=True)
    assert not (tmp_path / "no").exists()


class Tied(nn.Module):
    """A weight of two layers, a module used twice, and a head with an embedding's weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.embedding = nn.Embedding(6, 6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.alias = self.twice = nn.Linear(6, 6)

    def forward(self, x):
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        x = x + self.embedding(torch.arange(6))[None, 0]
        return self.head(self.alias(torch.tanh(self.twice(torch.tanh(x)))))


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
    import sys

    from proxyq.export import torchao

    torchao._torchao.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingExtra, match=r"pip install 'proxyq\[torchao\]'"):
        torchao._torchao()


@pytest.mark.data
def test_cifar_top1(cifar, tmp_path):
    from proxyq.model.load import load_model

    model, module = None, resnet()
    from safetensors.torch import load_file

    module.load_state_dict(load_file(cifar / "cifar10_resnet20.safetensors"))
    module.eval()
    del load_model
    model = proxyq.from_torch(module, (3, 32, 32))
    with np.load(cifar / "cifar10.npz", allow_pickle=False) as data:
        images, labels = data["x_test"][:1000], data["y_test"][:1000]
    print(images.shape, images.dtype, model)
