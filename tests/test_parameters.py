"""A quantized network's numbers as parameters by name: outputs, grids, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from networks import SmallNet, mixer, randomised, small_net
from test_reconstruct import images, plan_of

from proxyq.api import quantize_model
from proxyq.engine import Edit, Engine
from proxyq.errors import ProxyqError, UsageError
from proxyq.export.parameters import to_linen, to_nnx, to_params, unfolded_integers
from proxyq.model.digits import load_digits
from proxyq.model.flax_import import from_linen, from_nnx
from proxyq.model.function_import import from_function
from proxyq.ptq.quantized import QuantizedModel
from proxyq.ptq.reconstruct import Learning
from proxyq.search.allocate.plan import Plan


def close(model, params, quantized, x, tolerance=2e-5):
    wanted = quantized.logits(x)
    found = np.asarray(model.apply(params, x))
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


def only(plan: Plan, *names: str) -> Plan:
    """The plan with all other layers float."""
    layers = {
        name: layer if name in names else layer.model_copy(update={"weight_bits": None})
        for name, layer in plan.layers.items()
    }
    return plan.model_copy(update={"layers": layers})


@pytest.mark.parametrize("make", [small_net, load_digits, mixer])
@pytest.mark.parametrize("correction", ["none", "weights", "statistics"])
def test_the_outputs_are_those_of_the_quantized_network(make, correction):
    model = make()
    x = images(model)
    plan = plan_of(model, 3)
    if make is mixer:  # it has no biases; its tied weight has other channels at each use
        with pytest.raises(ProxyqError, match="the weight of 'tied' is computed"):
            to_params(quantize_model(model, plan, x, correction="none"))
        plan = only(plan, *[name for name in plan.layers if name != "tied"])
        if correction == "statistics":
            made = quantize_model(model, plan, x, correction=correction)
            with pytest.raises(ProxyqError, match="neither a bias nor a batch norm"):
                to_params(made)
            return
    made = quantize_model(model, plan, x, correction=correction)
    params = to_params(made)
    assert {n: v.shape for n, v in params.items()} == {n: v.shape for n, v in model.params.items()}
    close(model, params, made, x)


@pytest.mark.parametrize("reconstruction", ["bias", pytest.param("block", marks=pytest.mark.slow)])
def test_learned_rounding(reconstruction):
    model = small_net()
    x = images(model, 64)
    made = quantize_model(
        model,
        plan_of(model, 3),
        x,
        reconstruction=reconstruction,
        learning=Learning(steps=10) if reconstruction == "block" else None,
    )
    close(model, to_params(made), made, x)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("correction", ["none", "weights", "statistics"])
def test_kernels_stay_on_grids_with_the_same_codes(bits, correction):
    model = small_net()
    made = quantize_model(model, plan_of(model, bits), images(model), correction=correction)
    params, codes = to_params(made), unfolded_integers(made)
    network = Engine.build(model, 2, batch_size=2).network
    signs = set()
    for name, own in codes.items():
        layer = network.layer(name)
        kernel = params[layer.parameter]
        np.testing.assert_array_equal(kernel, own.values())
        # By hand: the codes that are nearest to the kernel's own numbers.
        np.testing.assert_array_equal(np.round(kernel / own.scale + own.zero), own.codes)
        assert own.codes.max() <= 2**bits - 1
        channel_values = [len(np.unique(row)) for row in np.moveaxis(kernel, -1, 0)]
        assert max(channel_values) <= 2**bits
        (index,) = network.sites_of(name)
        site = network.sites[index]
        np.testing.assert_array_equal(site.columns(own.codes), made.integers[index].codes)
        signs |= set(np.sign(own.scale).ravel())
    assert signs == {-1.0, 1.0}  # batch norm turns the sign of a few channels


def test_unfolding_against_batch_norm_by_hand():
    model = small_net()
    made = quantize_model(model, plan_of(model, 4), images(model), correction="statistics")
    params, name = to_params(made), "blocks.0."
    old = model.params
    factor = old[f"{name}bn1.scale"] / np.sqrt(old[f"{name}bn1.var"] + 1e-5)
    network = Engine.build(model, 2, batch_size=2).network
    (index,) = network.sites_of(f"{name}conv1")
    folded = np.asarray(made.edits[index].weight)
    np.testing.assert_allclose(params[f"{name}conv1.kernel"] * factor, folded, rtol=1e-5)
    np.testing.assert_allclose(
        params[f"{name}bn1.bias"], old[f"{name}bn1.bias"] + made.edits[index].offset, rtol=1e-5
    )
    for kept in ("scale", "mean", "var"):
        np.testing.assert_array_equal(params[f"{name}bn1.{kept}"], old[f"{name}bn1.{kept}"])


_STEPS = {
    "mul": lambda y, v: y * v,
    "div": lambda y, v: y / v,
    "add": lambda y, v: y + v,
    "sub": lambda y, v: y - v,
    "from": lambda y, v: v - y,
}


def chained(scale, use=("sub", "mul", "add")):
    """A dense layer with constants of its channels after it, in any order."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(6, 4)).astype(np.float32)}
    for place, kind in enumerate(use):
        value = np.asarray(scale) if kind in ("mul", "div") else rng.normal(size=4)
        params[f"{kind}{place}"] = value.astype(np.float32)
    params["head"] = rng.normal(size=(4, 3)).astype(np.float32)

    def apply(p, x):
        y = x @ p["w"]
        for place, kind in enumerate(use):
            v = p[f"{kind}{place}"]
            y = _STEPS[kind](y, v)
        return jnp.tanh(y) @ p["head"]

    return from_function(apply, params, (6,), name="chained")


@pytest.mark.parametrize(
    "use",
    [
        ("sub", "mul", "add"),
        ("sub", "mul"),
        ("add", "div", "from", "mul"),
        ("mul", "from", "div", "sub"),
        ("add",),
        ("mul", "from"),
    ],
)
def test_any_order_of_factors_and_sums(use):
    model = chained([2.0, -0.5, 1.0, -3.0], use)
    x = images(model)
    if use[-1] == "from":  # what is taken from a constant ends what folds
        use = use[:-1]
    plan = only(plan_of(model, 3), "w")
    made = quantize_model(model, plan, x)
    site = Engine.build(model, 2, batch_size=2).network.sites_of("w")[0]
    close(model, to_params(made), made, x)
    shifted = {site: made.edits[site]._replace(offset=jnp.arange(4.0))}
    moved = QuantizedModel(model=model, bits=made.bits, edits=shifted, integers=made.integers)
    if {"add", "sub", "from"} & set(use):
        close(model, to_params(moved), moved, x)
    else:
        with pytest.raises(ProxyqError, match="neither a bias nor a batch norm"):
            to_params(moved)


def test_channels_that_batch_norm_switches_off():
    model = chained([0.0, -0.5, 0.0, 3.0])
    x = images(model)
    for bits in (1, 3):
        made = quantize_model(model, only(plan_of(model, bits), "w"), x, correction="weights")
        params = to_params(made)
        assert np.isfinite(params["w"]).all()
        close(model, params, made, x)
    made = quantize_model(model, only(plan_of(model, 3), "w"), x, correction="statistics")
    close(model, to_params(made), made, x)
    last = chained([0.0, -0.5, 0.0, 3.0], ("add", "mul"))
    made = quantize_model(last, only(plan_of(last, 3), "w"), x)
    (site,) = made.integers
    edits = {site: made.edits[site]._replace(offset=jnp.ones(4))}
    with pytest.raises(ProxyqError, match="multiplied by 0"):
        to_params(QuantizedModel(model=last, bits={}, edits=edits, integers=made.integers))


def test_weights_that_are_computed_or_used_elsewhere():
    rng = np.random.default_rng(0)
    params = {
        "mix": rng.normal(size=(6, 6)).astype(np.float32),
        "gain": rng.normal(size=(6, 6)).astype(np.float32),
        "tied": rng.normal(size=(6, 6)).astype(np.float32),
        "bias": rng.normal(size=6).astype(np.float32),
    }

    def apply(p, x):
        y = jnp.tanh(x @ (p["mix"] @ p["gain"]))
        y = jnp.tanh(y @ p["tied"] + p["bias"])
        y = jnp.tanh(y @ p["tied"] + p["bias"])
        return y + p["tied"][0]

    model = from_function(apply, params, (6,), name="shared")
    x = images(model)
    plan = plan_of(model, 4)
    computed = next(name for name in plan.layers if name != "tied")
    with pytest.raises(ProxyqError, match="computed from several parameters"):
        to_params(quantize_model(model, only(plan, computed), x))
    with pytest.raises(ProxyqError, match="'tied' would hold a quantized layer's numbers"):
        to_params(quantize_model(model, only(plan, "tied"), x))

    def twice(p, x):
        y = jnp.tanh(x @ p["tied"] + p["bias"])
        return y @ p["tied"] + p["bias"]

    model = from_function(twice, {n: params[n] for n in ("tied", "bias")}, (6,), name="twice")
    made = quantize_model(model, plan_of(model, 4), x)
    close(model, to_params(made), made, x)
    first, second = made.integers
    edits = {
        first: made.edits[first]._replace(offset=jnp.ones(6)),
        second: Edit(weight=made.edits[second].weight),
    }
    uneven = QuantizedModel(model=model, bits={}, edits=edits, integers=made.integers)
    with pytest.raises(ProxyqError, match="another weight or bias"):
        to_params(uneven)


def test_into_an_nnx_module():
    module = SmallNet(nnx.Rngs(0))
    plain = from_nnx(module, (12, 12, 3))
    model = plain.replace(params=randomised(plain.params))
    x = images(model)
    made = quantize_model(model, plan_of(model, 4), x, correction="statistics")
    before = np.array(module.stem.kernel[...])
    back = to_nnx(made, module)
    wanted = made.logits(x)
    np.testing.assert_allclose(back(jnp.asarray(x)), wanted, atol=2e-5 * np.abs(wanted).max())
    np.testing.assert_array_equal(module.stem.kernel[...], before)
    other = SmallNet(nnx.Rngs(0))
    other.head = nnx.Linear(12, 7, rngs=nnx.Rngs(0))
    with pytest.raises(ProxyqError, match=r"'head.bias' has the shape \(7,\) in the module"):
        to_nnx(made, other)
    with pytest.raises(ProxyqError, match="the module has no parameter 'b"):
        to_nnx(made, nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(UsageError, match="must be a flax"):
        to_nnx(made, model)


class Classifier(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(6, (3, 3))(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        return linen.Dense(5, kernel_init=linen.with_partitioning(
            linen.initializers.lecun_normal(), (None, "out")))(x.mean((1, 2)))  # fmt: skip


def test_into_the_variables_of_a_linen_module():
    module = Classifier()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 6, 6, 3)))
    model = from_linen(module, variables, (6, 6, 3))
    x = images(model)
    made = quantize_model(model, plan_of(model, 3), x, correction="statistics")
    back = to_linen(made, variables)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    wanted = made.logits(x)
    np.testing.assert_allclose(module.apply(back, x), wanted, atol=2e-5 * np.abs(wanted).max())
    with pytest.raises(ProxyqError, match="the module has no parameter 'BatchNorm_0"):
        to_linen(made, {"params": {"Dense_0": variables["params"]["Dense_0"]}})
    with pytest.raises(UsageError, match="with the collection 'params'"):
        to_linen(made, {})


def test_parameters_of_a_torch_network():
    torch = pytest.importorskip("torch")
    from proxyq import from_torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, bias=False),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 16, 5),
    ).eval()
    with torch.no_grad():
        module[1].running_mean.uniform_(-0.5, 0.5)
        module[1].running_var.uniform_(0.5, 1.5)
        module[1].weight.uniform_(-1, 1)
    model = from_torch(module, (3, 6, 6))
    x = images(model)
    made = quantize_model(model, plan_of(model, 4), x, correction="statistics")
    params = to_params(made)
    close(model, params, made, x)
    module.load_state_dict(
        {name: torch.from_numpy(np.array(params[name])) for name in params}, strict=False
    )
    with torch.no_grad():
        found = module(torch.from_numpy(x)).numpy()
    wanted = made.logits(x)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
