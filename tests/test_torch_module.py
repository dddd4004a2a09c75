"""A quantized network back in its torch module: outputs, names, and what cannot be put back."""

import numpy as np
import pytest
from test_reconstruct import plan_of

import proxyq
from proxyq.api import quantize_model
from proxyq.errors import ProxyqError, UsageError
from proxyq.export.torch_module import to_torch

torch = pytest.importorskip("torch")
nn = torch.nn


def drawn(module, seed=0):
    """Random weights and batch-norm statistics, without the zeros of an initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point():
                spread = 0.3 if value.ndim < 2 else value[0].numel() ** -0.5
                value.copy_(torch.randn(value.shape, generator=generator) * spread)
                if name.endswith("weight") and value.ndim == 1:
                    value.add_(1)
    return module.eval()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.out = nn.Linear(8, 5, bias=False)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.deep(x))) + x
        return self.out(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("correction", ["none", "weights", "statistics"])
def test_the_module_gives_the_same_outputs(correction):
    module = drawn(Net())
    before = {k: v.clone() for k, v in module.state_dict().items()}
    model = proxyq.from_torch(module, (3, 8, 8))
    x = np.random.default_rng(0).normal(size=(32, 3, 8, 8)).astype(np.float32)
    made = quantize_model(model, plan_of(model, 3), x, correction=correction)
    back = proxyq.to_torch(made, module)
    with torch.no_grad():
        found = back(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, made.logits(x), rtol=1e-5, atol=1e-5)
    assert isinstance(back.bn1, nn.Identity) and isinstance(back.bn2, nn.Identity)
    for key, value in module.state_dict().items():  # the user's module is left as it was
        assert torch.equal(value, before[key])
    values = np.unique(back.conv1.weight[0].detach().numpy())
    assert len(values) <= 8


def test_inputs_are_rounded_on_the_same_grids():
    module = drawn(Net())
    model = proxyq.from_torch(module, (3, 8, 8))
    x = np.random.default_rng(0).normal(size=(32, 3, 8, 8)).astype(np.float32)
    made = quantize_model(model, plan_of(model, 4, 4), x, correction="statistics")
    with torch.no_grad():
        found = to_torch(made, module)(torch.from_numpy(x)).numpy()
        float_inputs = to_torch(made, module, round_inputs=False)(torch.from_numpy(x)).numpy()
    ours = made.logits(x)
    # Few values lie so near to the middle of two codes that they go the other way.
    assert np.median(np.abs(found - ours)) < 1e-5 * np.abs(ours).max()
    assert np.median(np.abs(float_inputs - ours)) > 1e-3 * np.abs(ours).max()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


def test_attention_with_one_weight_for_query_key_and_value():
    module = drawn(Attention())
    model = proxyq.from_torch(module, (6, 16))
    x = np.random.default_rng(0).normal(size=(16, 6, 16)).astype(np.float32)
    made = quantize_model(model, plan_of(model, 4), x)
    with torch.no_grad():
        found = to_torch(made, module)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, made.logits(x), rtol=1e-4, atol=1e-5)
    rounded = quantize_model(model, plan_of(model, 4, 8), x)
    with pytest.raises(ProxyqError, match=r"'attention\.out_proj' reads cannot be reached"):
        to_torch(rounded, module)


class Shared(nn.Module):
    """Two convolutions before one batch norm's weights."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.second(torch.relu(self.norm(self.first(x))))).mean(dim=(2, 3))


def test_what_cannot_be_put_back_is_told_in_one_sentence():
    module = drawn(Shared())
    model = proxyq.from_torch(module, (3, 4, 4))
    made = quantize_model(model, plan_of(model, 4))
    with pytest.raises(ProxyqError, match="'norm' follows two layers, 'first' and 'second'"):
        to_torch(made, module)
    net = drawn(Net())
    model = proxyq.from_torch(net, (3, 8, 8))
    made = quantize_model(model, plan_of(model, 4))
    with pytest.raises(ProxyqError, match=r"has no parameter 'conv1\.weight'"):
        to_torch(made, nn.Linear(3, 3))
    other = Net()
    other.out = nn.Linear(8, 7, bias=False)
    with pytest.raises(ProxyqError, match=r"'out.weight' has the shape \(7, 8\)"):
        to_torch(made, other)
    with pytest.raises(UsageError, match=r"must be a torch\.nn\.Module, got dict"):
        to_torch(made, {})
