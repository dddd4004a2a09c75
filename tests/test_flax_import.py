"""Flax nnx, linen and plain functions against their native calls."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from proxyq.errors import UsageError
from proxyq.model.flax_import import from_linen, from_nnx
from proxyq.model.function_import import flatten_names, from_function
from proxyq.model.model import Preprocessing


def images(n, shape=(8, 8, 3), seed=0):
    return jax.random.normal(jax.random.key(seed), (n, *shape))


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


class NnxBlock(nnx.Module):
    def __init__(self, width, *, rngs):
        self.conv1 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), rngs=rngs)

    def __call__(self, x):
        return x + self.conv2(self.dropout(nnx.relu(self.bn1(self.conv1(x)))))


class NnxNet(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(8, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def uneven_statistics(module):
    """Running statistics that differ from their start, so that ignoring them shows."""
    for _, part in nnx.iter_graph(module):
        if isinstance(part, nnx.BatchNorm):
            part.mean[...] = jnp.linspace(-0.5, 0.5, part.mean.shape[0])
            part.var[...] = jnp.linspace(0.5, 2.0, part.var.shape[0])
    return module


@pytest.fixture
def nnx_net():
    return uneven_statistics(NnxNet(rngs=nnx.Rngs(0)))


def test_nnx_equals_the_native_call(nnx_net):
    model = from_nnx(nnx_net, (8, 8, 3))
    native = nnx.clone(nnx_net)
    native.eval()
    for n in (1, 5):
        close(model(images(n)), native(images(n)))
        close(jax.jit(model.apply)(model.params, images(n)), native(images(n)))


def test_nnx_names_and_state(nnx_net):
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(nnx_net, nnx.BatchStat))]
    model = from_nnx(nnx_net, (8, 8, 3), preprocessing=Preprocessing(mean=(0.5,)))
    assert model.name == "NnxNet" and model.image_layout == "NHWC"
    assert model.input_shape == (8, 8, 3) and model.preprocessing.mean == (0.5,)
    assert "blocks.0.conv1.kernel" in model.params and "head.bias" in model.params
    assert model.frozen == {f"blocks.{i}.bn1.{s}" for i in (0, 1) for s in ("mean", "var")}
    assert not any("dropout" in name for name in model.params)  # random state stays inside
    assert all(value.dtype == jnp.float32 for value in model.params.values())
    assert model.identity["source"] == "flax.nnx"
    # The user's module is as it was: in training mode, with its own statistics and class.
    assert nnx_net.blocks[0].bn1.use_running_average is False
    assert nnx_net.blocks[0].dropout.deterministic is False
    assert type(nnx_net.blocks[0].bn1) is nnx.BatchNorm
    model(images(3))
    after = jax.tree.leaves(nnx.state(nnx_net, nnx.BatchStat))
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_nnx_parameters_are_live_and_transformable(nnx_net):
    model = from_nnx(nnx_net, (8, 8, 3))
    changed = {**model.params, "head.bias": model.params["head.bias"] + 1}
    close(model.apply(changed, images(2)), model(images(2)) + 1)

    def loss(params, x):
        return model.apply(params, x).sum()

    slope = jax.grad(loss)(model.params, images(2))
    close(slope["head.bias"], np.full(5, 2.0))
    stack = {name: jnp.stack([v, v]) for name, v in model.params.items()}
    mapped = jax.vmap(model.apply, in_axes=(0, None))(stack, images(2))
    close(mapped[0], model(images(2)))
    # Under a trace nothing may stay behind: the next plain call must still work.
    jax.jit(jax.grad(loss))(model.params, images(3))
    with jax.checking_leaks():
        jax.jit(lambda params, x: model.apply(params, x))(model.params, images(3))
    close(model(images(2)), mapped[1])


def test_nnx_training_on_does_not_change_the_model(nnx_net):
    model = from_nnx(nnx_net, (8, 8, 3))
    before = np.asarray(model(images(2)))
    nnx_net.head.bias[...] += 1
    close(model(images(2)), before)


def test_nnx_batch_statistics(nnx_net):
    model = from_nnx(nnx_net, (8, 8, 3))
    native = nnx.clone(nnx_net)
    native.eval()
    native.set_attributes(nnx.BatchNorm, use_running_average=False)
    x = images(6)
    assert model.batch_statistics_apply is not None
    for n in (4, 6):
        native_out = nnx.clone(native)(x[:n])  # a clone: the call updates the statistics
        close(jax.jit(model.batch_statistics_apply)(model.params, x[:n]), native_out)
    assert np.abs(model(x) - model.batch_statistics_apply(model.params, x)).max() > 1e-3


def test_nnx_batch_statistics_against_a_flag_in_the_call():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.bn = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x, train=True):
            return self.bn(x, use_running_average=not train)

    model = from_nnx(Net(nnx.Rngs(0)), (4, 4, 3), apply_kwargs={"train": False})
    x = images(5, (4, 4, 3)) * 3 + 1
    close(model(x), x / np.sqrt(1 + 1e-5))
    out = model.batch_statistics_apply(model.params, x)
    close(out.mean((0, 1, 2)), np.zeros(3), 1e-4)


def test_nnx_without_batch_norm_has_no_batch_statistics():
    model = from_nnx(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), (4,))
    assert model.batch_statistics_apply is None
    assert model.image_layout is None  # one axis is no image


def test_nnx_attention_and_several_inputs():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                num_heads=2, in_features=8, dropout_rate=0.3, decode=False, rngs=rngs
            )
            self.norm = nnx.LayerNorm(8, rngs=rngs)

        def __call__(self, tokens, bias):
            x = self.embed(tokens) + bias
            return self.norm(x + self.attention(x)).mean(1)

    net = Net(nnx.Rngs(0))
    tokens = jax.ShapeDtypeStruct((6,), jnp.int32)
    model = from_nnx(net, (tokens, (6, 8)))
    ids = jax.random.randint(jax.random.key(1), (3, 6), 0, 11)
    net.eval()
    close(model((ids, images(3, (6, 8)))), net(ids, images(3, (6, 8))))
    assert model.params["attention.query.kernel"].shape == (8, 2, 4)
    keyed = from_nnx(net, {"tokens": tokens, "bias": (6, 8)})
    close(keyed({"tokens": ids, "bias": images(3, (6, 8))}), net(ids, images(3, (6, 8))))


def test_nnx_shared_variable_is_one_array():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 4, rngs=rngs)
            self.second = nnx.Linear(4, 4, rngs=rngs)
            self.second.kernel = self.first.kernel

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    net = Net(nnx.Rngs(0))
    model = from_nnx(net, (4,))
    assert set(model.params) == {"first.kernel", "first.bias", "second.bias"}
    close(model(images(3, (4,))), net(images(3, (4,))))
    # Changing the one array changes both places.
    params = {**model.params, "first.kernel": jnp.zeros((4, 4))}
    close(model.apply(params, images(3, (4,))), jnp.broadcast_to(net.second.bias[...], (3, 4)))


def test_nnx_other_variables_bare_arrays_and_half_precision():
    class Net(nnx.Module):
        def __init__(self):
            self.table = nnx.Param({"a": jnp.ones(2), "b": [jnp.full(2, 2.0, jnp.bfloat16)]})
            self.index = nnx.Variable(jnp.array([1, 0]))
            self.offset = jnp.array([3.0, 4.0])
            self.nothing = nnx.Param(None)
            self.rngs = nnx.Rngs(0)

        def __call__(self, x):
            return x * self.table["a"] + self.table["b"][0] + self.offset[self.index[...]]

    model = from_nnx(Net(), (2,))
    assert set(model.params) == {"table.a", "table.b.0", "index", "offset"}
    assert model.frozen == {"index", "offset"}
    assert model.params["table.b.0"].dtype == jnp.float32
    close(model(jnp.zeros((1, 2))), [[6.0, 5.0]])


def test_nnx_wrong_arguments(nnx_net):
    with pytest.raises(UsageError, match=r"must be a flax\.nnx\.Module, got dict"):
        from_nnx({}, (8, 8, 3))
    with pytest.raises(UsageError, match="got the class NnxNet itself: call it"):
        from_nnx(NnxNet, (8, 8, 3))
    with pytest.raises(UsageError, match="use `from_linen`"):
        from_nnx(linen.Dense(3), (8,))
    with pytest.raises(UsageError, match="does not run on a batch of inputs of shape"):
        from_nnx(nnx_net, (8, 8, 4))
    with pytest.raises(UsageError, match="`input_shape` must be the shape of one example"):
        from_nnx(nnx_net, "32")
    with pytest.raises(UsageError, match="must be positive"):
        from_nnx(nnx_net, (0, 8, 3))
    with pytest.raises(UsageError, match="`image_layout` must be"):
        from_nnx(nnx_net, (8, 8, 3), image_layout="HWC")
    with pytest.raises(UsageError, match="`preprocessing` must be"):
        from_nnx(nnx_net, (8, 8, 3), preprocessing={"mean": 0})
    with pytest.raises(UsageError, match="no values: initialise"):
        from_nnx(nnx.eval_shape(lambda: NnxNet(rngs=nnx.Rngs(0))), (8, 8, 3))
    with pytest.raises(UsageError, match="`apply_kwargs` must be a dictionary"):
        from_nnx(nnx_net, (8, 8, 3), apply_kwargs=[("train", False)])


class LinenNet(linen.Module):
    by_position: bool = False

    @linen.compact
    def __call__(self, x, train: bool = True):
        x = linen.Conv(8, (3, 3), strides=2)(x)
        for _ in range(2):
            y = linen.Conv(8, (3, 3), use_bias=False)(x)
            if self.by_position:
                y = linen.BatchNorm()(y, not train)
            else:
                y = linen.BatchNorm(use_running_average=not train)(y)
            y = linen.Dropout(0.5, deterministic=not train)(linen.relu(y))
            x = x + y
        self.sow("intermediates", "features", x)
        return linen.Dense(5)(x.mean((1, 2)))


@pytest.fixture(params=[False, True])
def linen_net(request):
    module = LinenNet(by_position=request.param)
    variables = module.init(jax.random.key(0), images(1), train=False)
    variables = {key: variables[key] for key in ("params", "batch_stats")}
    statistics = jax.tree.map(
        lambda v: v + jnp.linspace(0.1, 1.0, v.size).reshape(v.shape), variables["batch_stats"]
    )
    return module, {**variables, "batch_stats": statistics}


def test_linen_equals_the_native_call(linen_net):
    module, variables = linen_net
    model = from_linen(module, variables, (8, 8, 3), apply_kwargs={"train": False})
    for n in (1, 5):
        close(model(images(n)), module.apply(variables, images(n), train=False))
        close(jax.jit(model.apply)(model.params, images(n)), model(images(n)))
    assert model.name == "LinenNet"
    assert "Conv_0.kernel" in model.params and "BatchNorm_0.scale" in model.params
    assert model.frozen == {f"BatchNorm_{i}.{s}" for i in (0, 1) for s in ("mean", "var")}
    slope = jax.grad(lambda p: model.apply(p, images(2)).sum())(model.params)
    close(slope["Dense_0.bias"], np.full(5, 2.0))


def test_linen_batch_statistics(linen_net):
    module, variables = linen_net
    model = from_linen(module, variables, (8, 8, 3), apply_kwargs={"train": False})
    # Dropout has no part in evaluation; a rate of zero leaves only batch norm to train.
    x = images(6)
    with linen.intercept_methods(
        lambda f, a, k, c: a[0] if isinstance(c.module, linen.Dropout) else f(*a, **k)
    ):
        native, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
    assert model.batch_statistics_apply is not None
    close(jax.jit(model.batch_statistics_apply)(model.params, x), native)
    assert np.abs(model(x) - native).max() > 1e-3


def test_linen_names_that_clash_keep_their_collection():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            scale = self.param("scale", linen.initializers.constant(2.0), (3,))
            offset = self.variable("constants", "scale", lambda: jnp.full(3, 5.0))
            return x * scale + offset.value

    variables = Net().init(jax.random.key(0), jnp.zeros((1, 3)))
    model = from_linen(Net(), variables, (3,))
    assert set(model.params) == {"scale", "constants.scale"}
    assert model.frozen == {"constants.scale"}
    assert model.batch_statistics_apply is None
    close(model(jnp.ones((2, 3))), np.full((2, 3), 7.0))


def test_linen_attention_method_and_boxed_parameters():
    class Net(linen.Module):
        def setup(self):
            init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "model"))
            self.project = linen.Dense(8, kernel_init=init)
            self.attention = linen.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.1)

        def __call__(self, x, deterministic):
            return self.encode(x, deterministic).mean(1)

        def encode(self, x, deterministic):
            return self.attention(self.project(x), deterministic=deterministic)

    x = images(3, (6, 4))
    variables = Net().init(jax.random.key(0), x, True)
    for method in (None, "encode"):
        fixed = {"deterministic": True, **({"method": method} if method else {})}
        model = from_linen(Net(), variables, (6, 4), apply_kwargs=fixed)
        native = Net().apply(variables, x, **fixed)
        close(model(x), native)
    assert {"project.kernel", "attention.query.kernel"} <= set(model.params)


def test_linen_wrong_arguments(linen_net):
    module, variables = linen_net
    with pytest.raises(UsageError, match=r"`apply_kwargs`, such as \{'train': False\}"):
        from_linen(module, variables, (8, 8, 3))
    with pytest.raises(UsageError, match="with the collection 'params'"):
        from_linen(module, variables["params"], (8, 8, 3))
    with pytest.raises(UsageError, match=r"must be a flax\.linen\.Module"):
        from_linen(lambda x: x, variables, (8, 8, 3))
    with pytest.raises(UsageError, match="must not hold 'mutable'"):
        from_linen(module, variables, (8, 8, 3), apply_kwargs={"mutable": ["batch_stats"]})


@dataclasses.dataclass(frozen=True)
class Layer:
    weight: jax.Array
    bias: jax.Array
    kind: str = "dense"

    def __post_init__(self):
        # Rebuilding with abstract values must not run this again.
        assert isinstance(self.weight, jax.Array) and not isinstance(self.weight, jax.core.Tracer)


class Pair(NamedTuple):
    layer: Layer
    gain: jax.Array


def test_function_of_any_tree():
    key = jax.random.key(0)
    weight = jax.random.normal(key, (4, 4))
    tree = {
        "layers": [Pair(Layer(weight, jnp.ones(4)), np.float32(2)), (weight.T, 0.5, jnp.tanh)],
        "order": np.array([3, 2, 1, 0]),
        "statistics": {"mean": np.zeros(4)},
    }

    def apply(params, x):
        pair, (matrix, factor, activation) = params["layers"]
        assert isinstance(pair.layer, Layer) and pair.layer.kind == "dense"
        x = activation(x @ pair.layer.weight + pair.layer.bias) * pair.gain
        x = x - params["statistics"]["mean"]
        return (x @ matrix * factor)[:, params["order"]]

    model = from_function(apply, tree, (4,), frozen=["statistics.*"])
    assert set(model.params) == {
        "layers.0.layer.weight",
        "layers.0.layer.bias",
        "layers.0.gain",
        "layers.1.0",
        "order",
        "statistics.mean",
    }
    assert model.frozen == {"order", "statistics.mean"}
    assert model.name == "apply" and model.identity["source"] == "jax function"
    x = images(3, (4,))
    for n in (1, 3):
        close(model(x[:n]), apply(tree, x[:n]))
        close(jax.jit(model.apply)(model.params, x[:n]), apply(tree, x[:n]))
    tree["statistics"]["mean"] += 1  # the model holds its own copy
    close(model.params["statistics.mean"], np.zeros(4))


def test_function_with_batch_statistics_and_layout():
    def apply(params, x):
        return (x * params["w"]).mean((2, 3))

    model = from_function(
        apply,
        {"w": np.ones((3, 1, 1))},
        (3, 8, 8),
        name="mine",
        image_layout="NCHW",
        batch_statistics_apply=lambda params, x: apply(params, x - x.mean(0)),
    )
    assert model.name == "mine" and model.image_layout == "NCHW"
    x = images(2, (3, 8, 8))
    close(model.batch_statistics_apply(model.params, x), (x - x.mean(0)).mean((2, 3)))
    assert from_function(lambda p, x: x @ p, np.eye(3), (3,)).params.keys() == {"weight"}


def test_function_wrong_arguments():
    weight = {"w": np.eye(3)}
    with pytest.raises(UsageError, match="`apply` must be a function"):
        from_function(3, weight, (3,))
    with pytest.raises(UsageError, match="holds no arrays"):
        from_function(lambda p, x: x, {"a": 1}, (3,))
    with pytest.raises(UsageError, match="for a function of one example use"):
        from_function(lambda p, x: (x @ p["w"]).sum(), weight, (3,))
    with pytest.raises(UsageError, match="returns no array"):
        from_function(lambda p, x: None, weight, (3,))
    with pytest.raises(UsageError, match="`frozen` names no array 'v': "):
        from_function(lambda p, x: x, weight, (3,), frozen="v")
    with pytest.raises(UsageError, match=r"same name 'a\.b'"):
        flatten_names({"a.b": np.ones(1), "a": {"b": np.ones(1)}})
    with pytest.raises(UsageError, match="being traced"):
        jax.jit(lambda w: from_function(lambda p, x: x @ p, w, (3,)).params)(np.eye(3))
