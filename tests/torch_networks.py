"""torch networks for tests of exporters, with plans that give their layers different bits."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from test_torch_import import randomise

import proxyq
from proxyq.api import quantize_model
from proxyq.model.network import network
from proxyq.search.allocate.plan import Plan, PlannedLayer

torch = pytest.importorskip("torch")
nn = torch.nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BITS = (3, 8, 2, 5, 4, 1, 7, 6)


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


def cifar_resnet():
    """The examples' file of CIFAR ResNets."""
    spec = importlib.util.spec_from_file_location("cifar_resnet", EXAMPLES / "cifar_resnet.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def resnet():
    """With one block a stage: 8 layers."""
    return cifar_resnet().CifarResNet(1)


def plan_of(model, bits, activation_bits=None, budgets=()):
    """A plan with bits from a cycle, or by layer."""
    found = network(model, 2).layers
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
