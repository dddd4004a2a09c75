"""Rules and parameters for qwix: the networks that it makes of them, and what it cannot hold."""

import builtins
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SmallNet
from test_parameters import only
from test_reconstruct import images, plan_of

from proxyq.api import quantize_model
from proxyq.errors import MissingExtra, ProxyqError, UsageError
from proxyq.export.parameters import to_linen, to_params, unfolded_integers
from proxyq.export.qwix import _container, _stored, export_qwix, load_qwix, load_qwix_rules
from proxyq.model.flax_import import from_linen, from_nnx
from proxyq.model.function_import import from_function
from proxyq.quantize import Rounding
from proxyq.quantize.integers import to_integers
from proxyq.search.allocate.plan import PlannedBudget

qwix = pytest.importorskip("qwix")
# qwix calls what Flax has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'm.iter_modules:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning"),
]


class Attention(linen.Module):
    """Attention with kernels of several axes, and a dense head."""

    @linen.compact
    def __call__(self, x, scale=1.0):
        x = linen.Dense(8, name="embed")(x) * scale
        x = x + linen.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return linen.Dense(5, name="head")(linen.gelu(x).mean(1))


def attention():
    module = Attention()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 6, 4)))
    return (module, variables), from_linen(module, variables, (6, 4))


def convolutions():
    module = SmallNet(nnx.Rngs(0))
    module.eval()
    return module, from_nnx(module, (12, 12, 3))


def run(made, x):
    if isinstance(made, tuple):
        return np.asarray(made[0].apply(made[1], jnp.asarray(x)))
    return np.asarray(made(jnp.asarray(x)))


def close(found, wanted, tolerance=2e-5):
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("correction", ["none", "weights", "statistics"])
@pytest.mark.parametrize("make", [attention, convolutions])
def test_weights_alone_are_exact(make, correction, tmp_path):
    module, model = make()
    x = images(model)
    made = quantize_model(model, plan_of(model, 3), x, correction=correction)
    done = export_qwix(made, tmp_path / "out", module=module, inputs=x)
    assert done.difference is not None and done.difference < 2e-5
    close(run(load_qwix(tmp_path / "out", module, jnp.asarray(x[:1])), x), made.logits(x))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "parameters.safetensors",
        "rules.json",
    ]
    convs = {name for name in made.bits if make is convolutions and name != "head"}
    floats = {name for name, (_, stored) in done.raised.items() if stored == 32}
    if correction == "weights":  # a restored mean has no whole zero point
        assert floats == set(made.bits)
    else:
        assert floats == convs
        assert all(v == (3, 4) for n, v in done.raised.items() if n not in convs)
    if convs and correction != "weights":
        assert any("convolutions only together with their inputs" in note for note in done.notes)


def test_the_arrays_of_qwix_are_our_codes(tmp_path):
    module, model = attention()
    made = quantize_model(model, plan_of(model, 4), images(model))
    done = export_qwix(made, tmp_path / "out", module=module)
    assert any(note.startswith("Calibrated by qwix itself") for note in done.notes)
    assert done.raised == {} and done.size_bits == done.planned_bits
    _, variables = load_qwix(tmp_path / "out", module, jnp.zeros((1, 6, 4)))
    params = variables["params"]
    codes = unfolded_integers(made)
    for name in ("attention.query", "attention.out", "embed"):
        node = params
        for part in name.split("."):
            node = node[part]
        array, own = node["kernel"].array, codes[name]
        assert array.qvalue.dtype == jnp.int4 and array.zero_point is None
        np.testing.assert_array_equal(
            np.asarray(array.qvalue, np.int32).reshape(own.codes.shape),
            own.codes.astype(np.int32) - 8,
        )
        np.testing.assert_array_equal(qwix.dequantize(array).reshape(own.codes.shape), own.values())


def test_rules_work_with_qwix_alone(tmp_path):
    """What someone does who calibrates in qwix: one rule a layer, scales near ours."""
    (module, variables), model = attention()
    x = jnp.asarray(images(model, 8))
    plan = plan_of(model, 8)
    layers = dict(plan.layers)
    layers["embed"] = layers["embed"].model_copy(update={"weight_bits": 4})
    layers["attention.key"] = layers["attention.key"].model_copy(update={"weight_bits": None})
    made = quantize_model(model, plan.model_copy(update={"layers": layers}), np.asarray(x))
    export_qwix(made, tmp_path / "out", module=(module, variables))
    rules = load_qwix_rules(tmp_path / "out")
    assert [r.module_path for r in rules][:2] == ["embed", "attention/query"]
    provider = qwix.PtqProvider(rules)
    quantized = qwix.quantize_model(module, provider)
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)
    assert provider.get_unused_rules() == []
    assert abstract["params"]["embed"]["kernel"].how.qtype == "int4"
    assert not hasattr(abstract["params"]["attention"]["key"]["kernel"], "how")
    own = to_linen(made, variables)["params"]
    params = qwix.quantize_params(jax.tree.map(jnp.asarray, own), abstract["params"])
    found = quantized.apply({"params": params}, x)
    wanted = made.logits(np.asarray(x))
    assert 1e-5 < np.abs(found - wanted).max() / np.abs(wanted).max() < 0.3


@pytest.mark.parametrize("make", [attention, pytest.param(convolutions, marks=pytest.mark.slow)])
def test_rounded_inputs_are_qwixs_own(make, tmp_path):
    module, model = make()
    x = images(model)
    made = quantize_model(model, plan_of(model, 4, 8), x)
    done = export_qwix(made, tmp_path / "out", module=module, inputs=x)
    assert done.difference is not None and 1e-5 < done.difference < 0.1
    assert any("largest magnitude" in note for note in done.notes)
    kinds = {
        r.module_path: (r.weight_qtype, r.act_qtype) for r in load_qwix_rules(tmp_path / "out")
    }
    assert kinds.pop("head" if make is convolutions else "embed") == ("int4", "int8")
    if make is convolutions:  # one type for both
        assert set(kinds.values()) == {("int8", "int8")}
        assert done.raised["blocks.0.depthwise"] == (4, 8)
    loaded = load_qwix(tmp_path / "out", module, jnp.asarray(x[:1]))
    close(run(loaded, x), made.logits(x), 0.1)


@pytest.mark.slow
def test_convolutions_of_few_bits_on_both_sides_take_eight(tmp_path):
    """XLA cannot convolve integers of 4 bits on the CPU; linear layers multiply them."""
    module, model = convolutions()
    x = images(model)
    made = quantize_model(model, plan_of(model, 4, 4), x)
    done = export_qwix(made, tmp_path / "out", module=module, inputs=x)
    kinds = {
        r.module_path: (r.weight_qtype, r.act_qtype) for r in load_qwix_rules(tmp_path / "out")
    }
    assert kinds.pop("head") == ("int4", "int4")
    assert set(kinds.values()) == {("int8", "int8")}
    assert {told for name, told in done.raised.items() if name != "head"} == {(4, 8)}
    assert done.difference is not None and np.isfinite(done.difference)


def test_budgets_and_strictness(tmp_path):
    module, model = attention()
    plan = plan_of(model, 3)
    budget = PlannedBudget(name="size", asked=3, achieved=3, unit="bit")
    plan = plan.model_copy(update={"budgets": [budget]})
    made = quantize_model(model, plan)
    done = export_qwix(made, tmp_path / "out", module=module, plan=plan)
    assert any("more than the plan's budget of 3 bit" in note for note in done.notes)
    with pytest.raises(ProxyqError, match="qwix cannot store all layers as planned: 'embed'"):
        export_qwix(made, tmp_path / "strict", module=module, plan=plan, strict=True)
    assert not (tmp_path / "strict").exists()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8), st.sampled_from(["negative", "either"]), st.booleans(), st.integers(0, 2**32)
)
def test_codes_keep_their_values(bits, extra, centred, seed):
    columns = np.random.default_rng(seed).normal(size=(20, 3)).astype(np.float32)
    own = to_integers(columns, bits, Rounding(extra_code=extra))
    stored = _stored(own, centred=centred)
    if stored is None:
        assert bits == 8 and centred and extra == "either"
        return
    low = -(2 ** (stored.bits - 1))
    assert low <= stored.codes.min() and stored.codes.max() < -low
    assert bits <= stored.bits <= bits + 1 and _container(stored.bits) in (4, 8)
    zero = 0 if stored.zero is None else stored.zero
    values = (stored.codes - zero).astype(np.float32) * stored.scale
    np.testing.assert_array_equal(values, own.values())


def test_widths_that_qwix_lacks(tmp_path):
    module, model = attention()
    x = images(model)
    plan = plan_of(model, 8)
    widths = dict(zip(plan.layers, (1, 16, 2, 5, 8, 4), strict=True))
    layers = {
        name: layer.model_copy(update={"weight_bits": widths[name]})
        for name, layer in plan.layers.items()
    }
    made = quantize_model(model, plan.model_copy(update={"layers": layers}), x)
    done = export_qwix(made, tmp_path / "out", module=module, inputs=x)
    asked = [(1, 4), (16, 32), (2, 4), (5, 8), None, None]
    assert [done.raised.get(name) for name in widths] == asked
    assert done.difference is not None and done.difference < 2e-5
    close(run(load_qwix(tmp_path / "out", module, jnp.asarray(x[:1])), x), made.logits(x))


class Both(nnx.Module):
    """A module with two weights of its own, one of them multiplied in a way qwix misses."""

    def __init__(self, rngs):
        self.first = nnx.Param(jax.random.normal(rngs.params(), (6, 6)))
        self.second = nnx.Param(jax.random.normal(rngs.params(), (6, 4)))

    def __call__(self, x):
        return jnp.tanh(jnp.dot(x, self.first[...])) @ self.second[...]


def test_weights_that_a_rule_cannot_tell_apart(tmp_path):
    module = nnx.Sequential(Both(nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1)))
    model = from_nnx(module, (6,))
    plan = plan_of(model, 4)
    made = quantize_model(model, only(plan, "layers.0.first", "layers.1"))
    done = export_qwix(made, tmp_path / "out", module=module)
    assert done.raised == {"layers.0.first": (4, 32)}
    assert any("all weights of a module" in note for note in done.notes)


def test_missing_and_wrong(tmp_path, monkeypatch):
    module, model = attention()
    made = quantize_model(model, plan_of(model, 4))
    with pytest.raises(UsageError, match="qwix quantizes Flax models"):
        export_qwix(made, tmp_path / "out", module=lambda x: x)
    plain = from_function(lambda p, x: x @ p["w"], {"w": np.eye(3, dtype=np.float32)}, (3,))
    with pytest.raises(UsageError, match="a pair of a flax"):
        export_qwix(quantize_model(plain, plan_of(plain, 4)), tmp_path / "out")
    with pytest.raises(ProxyqError, match="the module has no parameter"):
        export_qwix(made, tmp_path / "out", module=SmallNet(nnx.Rngs(0)))
    export_qwix(made, tmp_path / "out", module=module)
    rules = tmp_path / "out" / "rules.json"
    record = json.loads(rules.read_text())
    rules.write_text(json.dumps({**record, "rules": [{"module": "a"}]}))
    with pytest.raises(ProxyqError, match="a field that it does not know"):
        load_qwix_rules(tmp_path / "out")
    rules.write_text(json.dumps({**record, "layers": {"a": {"parameter": "none"}}}))
    with pytest.raises(ProxyqError, match="do not fit together"):
        load_qwix(tmp_path / "out", module, jnp.zeros((1, 6, 4)))
    rules.write_text(json.dumps({"schema": "other"}))
    with pytest.raises(ProxyqError, match="has the schema 'other'"):
        load_qwix_rules(tmp_path / "out")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "qwix":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"pip install 'proxyq\[qwix\]'"):
        export_qwix(made, tmp_path / "out", module=module)


@pytest.mark.slow
def test_parameters_lie_in_the_file_by_name(tmp_path):
    from safetensors.numpy import load_file

    module, model = convolutions()
    made = quantize_model(model, plan_of(model, 4, 8), images(model), correction="statistics")
    export_qwix(made, tmp_path / "out", module=module)
    found = load_file(tmp_path / "out" / "parameters.safetensors")
    for name, value in to_params(made).items():
        np.testing.assert_array_equal(found[name], value)
    codes = found["head.kernel"] / found["head.kernel.scale"]
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)


def test_a_module_that_qwix_cannot_run(tmp_path, monkeypatch):
    """As with attention that is no layer of Flax: products outside of any module's method."""

    def fails(*args, **kwargs):
        raise ValueError("Current module is not known")

    module, model = convolutions()
    quantized = quantize_model(model, plan_of(model, 4), images(model))
    monkeypatch.setattr(qwix, "quantize_model", fails)
    with pytest.raises(ProxyqError, match="qwix cannot run the module"):
        export_qwix(quantized, tmp_path / "out", module=module)
    assert not list(tmp_path.glob("out/*"))
