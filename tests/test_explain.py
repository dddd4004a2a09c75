"""`inspect --explain`: what stays float and why, and every operator that is missing."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from commandline import here
from flax import nnx

from proxyq.errors import MissingOperators
from proxyq.model.explain import kept_float, summary
from proxyq.model.flax_import import from_nnx
from proxyq.model.network import network


class Tokens(nnx.Module):
    """An embedding with positions, a norm, attention, and a parameter that nothing reads."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.positions = nnx.Param(jnp.ones((4, 8)))
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.head = nnx.Linear(8, 3, rngs=rngs)
        self.spare = nnx.Param(jnp.ones(5))

    def __call__(self, ids):
        x = self.embed(ids) + self.positions
        x = x + self.attention(self.norm(x))
        return self.head(x.mean(1))


def test_why_a_parameter_is_no_weight_of_a_layer():
    model = from_nnx(Tokens(nnx.Rngs(0)), (4,), dtype=jnp.int32)
    found = network(model, 2)
    why = {one.parameter: one.why for one in kept_float(found)}
    assert why["embed.embedding"] == "rows looked up by tokens"
    assert why["positions"] == "added to data"
    assert why["norm.scale"] == "a scale of data"
    assert why["norm.bias"] == why["head.bias"] == "added to data"
    assert why["spare"] == "not used by the output"
    weights = {layer.parameter for layer in found.layers}
    assert not weights & set(why) and weights | set(why) == set(model.params)
    assert len(found.attention) == 2  # queries with keys, attention with values
    count, numbers = summary(kept_float(found))["rows looked up by tokens"]
    assert (count, numbers) == (1, 88)


def test_batch_norm_is_folded():
    done = here("inspect", "--explain", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    folded = [key for key, one in told["float"].items() if one["why"].startswith("folded into ")]
    assert folded and told["missing_operators"] == {} and told["attention"] == {}
    weights = sum(one["weights"] for one in told["layers"].values())
    rest = sum(one["weights"] for one in told["float"].values())
    from proxyq.model.digits import load_digits

    assert weights + rest == sum(np.size(p) for p in load_digits().params.values())
    text = here("inspect", "--explain")
    assert text.code == 0 and "stays float" in text.out and "folded into layers" in text.out


def test_missing_operators_are_listed_with_their_modules():
    torch = pytest.importorskip("torch")
    import proxyq

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Linear(4, 4)

        def forward(self, x):
            x = torch.special.bessel_j0(torch.special.bessel_j0(self.stem(x)))
            return torch.kthvalue(x, 2).values

    with pytest.raises(MissingOperators, match="special_bessel_j0") as caught:
        proxyq.from_torch(Odd(), (4,))
    assert caught.value.operators == {
        "special_bessel_j0": (2, "the top level"),
        "kthvalue": (1, "the top level"),
    }


def odd():
    import torch

    class Odd(torch.nn.Module):
        input_shape = (4,)

        def forward(self, x):
            return torch.kthvalue(x, 2).values

    return Odd()


@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_the_command_lists_them_and_fails(extra):
    pytest.importorskip("torch")
    done = here("inspect", f"{__file__}:odd", "--explain", *extra)
    assert done.code == 1 and done.err.count("\n") == 1 and "register_aten" in done.err
    if extra:
        assert json.loads(done.out)["missing_operators"]["kthvalue"]["uses"] == 1
    else:
        assert "kthvalue" in done.out
