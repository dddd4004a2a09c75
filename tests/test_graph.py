"""The graph computes what the model computes; layers, names, counts and groups are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import mixer, small_net, strided_conv

from proxyq.errors import ProxyqError
from proxyq.model.elementwise import feature_of
from proxyq.model.features import features, layers_by_feature
from proxyq.model.function_import import from_function
from proxyq.model.graph import evaluate, trace
from proxyq.model.network import network


def images(model, count=4, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *model.input_shape)).astype(np.float32)


@pytest.mark.parametrize("build", [small_net, mixer])
@pytest.mark.parametrize("batch", [1, 3])
def test_graph_equals_model_at_every_batch_size(build, batch):
    model = build()
    x = images(model, batch)
    found = network(model, batch)
    np.testing.assert_allclose(found.graph(model.params, x), model(x), atol=2e-5)


def test_layers_of_a_residual_network():
    found = network(small_net(), 2)
    layers = {layer.name: layer for layer in found.layers}
    assert list(layers) == [
        "stem",
        "blocks.0.conv1",
        "blocks.0.depthwise",
        "blocks.0.conv2",
        "blocks.1.conv1",
        "blocks.1.depthwise",
        "blocks.1.conv2",
        "blocks.1.shortcut",
        "head",
    ]
    assert layers["stem"].weights == 3 * 3 * 3 * 8
    # 12 x 12 positions, 8 output channels, fan-in 27
    assert layers["stem"].macs == 12 * 12 * 8 * 27
    assert layers["stem"].output_shape == (12, 12, 8)
    assert layers["blocks.1.depthwise"].kind == "depthwise-conv"
    assert layers["blocks.1.depthwise"].macs == 6 * 6 * 12 * 9
    assert layers["head"].kind == "linear"
    assert layers["head"].macs == 120


def test_groups_meet_in_residual_sums_and_share_inputs():
    layers = {layer.name: layer for layer in network(small_net(), 2).layers}
    # The first block adds its convolution to the stem's output, the second to its shortcut.
    assert layers["stem"].group == layers["blocks.0.conv2"].group == "stem"
    assert layers["blocks.1.conv2"].group == layers["blocks.1.shortcut"].group == "blocks.1.conv2"
    assert layers["blocks.0.conv1"].group is None
    assert layers["blocks.1.conv1"].shares_input == layers["blocks.1.shortcut"].shares_input
    assert layers["head"].shares_input is None
    qkv = {layer.name: layer for layer in network(mixer(), 2).layers}
    assert {qkv[name].shares_input for name in ("query", "key", "value")} == {"query"}


def test_features_join_where_a_sum_joins():
    assert layers_by_feature(network(small_net(), 2)) == (("blocks.1.conv2", "blocks.1.shortcut"),)


def test_feature_is_the_tensor_after_sum_and_activation():
    model = small_net()
    found = network(model, 2)
    x = images(model, 2)
    site = found.sites[found.sites_of("blocks.0.conv2")[0]]
    var = feature_of(found.graph, found.graph.main[site.position].outvars[0])
    env = dict(found.prelude())
    env.update(zip(found.graph.inputs, [x], strict=True))
    evaluate(found.graph.main, env)
    feature = np.asarray(env[var])
    assert (feature >= 0).all() and (feature == 0).any()  # after ReLU
    # It is what the next block reads.
    reader = found.graph.main[found.sites[found.sites_of("blocks.1.conv1")[0]].position]
    np.testing.assert_array_equal(feature, env[reader.invars[0]])


def test_features_are_the_same_tensors_under_batch_statistics():
    model = small_net()
    x = images(model, 6)
    found = network(model, 6, batch_norm="batch")
    assert layers_by_feature(found) == (("blocks.1.conv2", "blocks.1.shortcut"),)
    env = dict(found.prelude())
    env.update(zip(found.graph.inputs, [x], strict=True))
    evaluate(found.graph.main, env)
    for name, var in features(found).items():
        feature = np.asarray(env[var])
        assert (feature.min() == 0) == (name != "head"), name  # all but the logits end in ReLU


def test_tied_weight_is_one_layer_with_two_sites():
    found = network(mixer(), 2)
    tied = found.layer("tied")
    assert len(found.sites_of("tied")) == 2
    assert tied.weights == 64
    assert tied.macs == 2 * 6 * 64


def test_weight_on_the_left_and_several_channel_axes():
    found = network(mixer(), 2)
    left = found.sites[found.sites_of("tokens")[0]]
    assert found.layer("tokens").channels == 6 and found.layer("tokens").macs == 6 * 6 * 8
    weight = found.prelude()[left.weight]
    columns = left.columns(weight)
    np.testing.assert_array_equal(left.from_columns(columns, weight.shape), weight)
    query = found.sites[found.sites_of("query")[0]]
    assert found.layer("query").channels == 8 and query.channel_shape == (2, 4)


def test_derived_weight_is_named_after_the_tensor_with_its_size():
    rng = np.random.default_rng(0)
    params = {
        "gain": rng.normal(size=(5,)).astype(np.float32),
        "w": rng.normal(size=(3, 3, 2, 5)).astype(np.float32),
    }
    model = from_function(strided_conv, params, (8, 8, 2), name="standardised")
    found = network(model, 2)
    assert [layer.name for layer in found.layers] == ["w"]
    # Standardisation runs once per set of weights, not once per batch.
    assert all(eqn.primitive.name != "sqrt" for eqn in found.graph.main)


def test_batch_norm_is_folded_into_the_weights():
    model = small_net()
    found = network(model, 2)
    plain = trace(model, 2)
    assert len(found.graph.main) < len(plain.main)
    site = found.sites[found.sites_of("blocks.0.conv1")[0]]
    weight = np.asarray(found.prelude()[site.weight])
    p = model.params
    scale = p["blocks.0.bn1.scale"] / np.sqrt(p["blocks.0.bn1.var"] + 1e-5)
    np.testing.assert_allclose(weight, p["blocks.0.conv1.kernel"] * scale, rtol=1e-5)


def test_relu_keeps_its_derivative_at_zero():
    # Splicing relu's call would turn the derivative at 0 from 0 into 1/2.
    def apply(p, x):
        return jax.nn.relu(x * 0.0 + (x @ p["w"]) * 0.0)

    model = from_function(apply, {"w": np.ones((3, 3), np.float32)}, (3,), name="zero")
    graph = network(model, 1).graph
    gradient = jax.grad(lambda x: jnp.sum(graph(model.params, x)))(jnp.ones((1, 3)))
    assert float(jnp.abs(gradient).sum()) == 0.0


def test_a_loop_over_layers_is_unrolled():
    def apply(p, x):
        return jax.lax.scan(lambda c, w: (c @ w, None), x, p["stack"])[0]

    model = from_function(apply, {"stack": np.ones((3, 4, 4), np.float32)}, (4,), name="scanned")
    assert [layer.name for layer in network(model, 2).layers] == ["stack.0", "stack.1", "stack.2"]
    assert all(eqn.primitive.name != "scan" for eqn in network(model, 2).graph.main)


def test_a_model_without_layers_is_refused():
    model = from_function(
        lambda p, x: x * p["a"], {"a": np.ones(4, np.float32)}, (4,), name="scale"
    )
    with pytest.raises(ProxyqError, match="no layer to quantize"):
        network(model, 2)


def sequence_first(seed=0):
    """Attention as torch writes it: the sequence first, then sequence and batch in one axis."""
    rng = np.random.default_rng(seed)
    params = {
        name: rng.normal(0, 0.4, shape).astype(np.float32)
        for name, shape in {"a": (6, 8), "b": (8, 8), "c": (8, 5)}.items()
    }

    def apply(p, x):
        h = jnp.swapaxes(x, 0, 1) @ p["a"]  # [length, batch, 8]
        length, batch, width = h.shape
        h = jax.nn.relu(h).reshape(length * batch, width) @ p["b"]
        h = jnp.swapaxes(h.reshape(length, batch, width), 0, 1)
        weights = jax.nn.softmax(jnp.einsum("bsd,btd->bst", h, h), axis=-1)
        return jnp.mean(jnp.einsum("bst,btd->bsd", weights, h), axis=1) @ p["c"]

    return from_function(apply, params, (7, 6), name="sequence-first")


def windowed(seed=0):
    """Windows of an image folded into the batch axis, as Swin does."""
    rng = np.random.default_rng(seed)
    params = {
        "a": rng.normal(size=(3, 8)).astype(np.float32),
        "b": rng.normal(size=(8, 4)).astype(np.float32),
    }

    def apply(p, x):
        n = x.shape[0]
        h = x.reshape(n, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n * 4, 16, 3)
        h = jax.nn.relu(h @ p["a"])
        h = h.reshape(n, 2, 2, 4, 4, 8).transpose(0, 1, 3, 2, 4, 5).reshape(n, 8, 8, 8)
        return jnp.mean(h, axis=(1, 2)) @ p["b"]

    return from_function(apply, params, (8, 8, 3), name="windowed")


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(sequence_first, marks=pytest.mark.slow),
        windowed,
        pytest.param(mixer, marks=pytest.mark.slow),
        small_net,
    ],
)
def test_what_is_measured_for_each_image_does_not_hang_on_the_batch_size(build):
    from proxyq.engine import Engine, collect
    from proxyq.engine.statistics import float_moments

    model = build()
    x = images(model, 5)
    needs = ("gram", "pooled", "output", "output-error", "restored-error", "input")
    found = []
    for batch in (1, 3):
        engine = Engine.build(model, 5, batch_size=batch)  # 5 is no multiple of 3
        assert all(site.apart for site in engine.network.sites)
        found.append((collect(engine, x, needs, (2, 4)), float_moments(engine, x)[0]))
    for taps, moments in found[:-1]:
        for one, other in zip(taps, found[-1][0], strict=True):
            np.testing.assert_allclose(one.gram, other.gram, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(one.pooled, other.pooled, atol=1e-5)
            np.testing.assert_allclose(one.output, other.output, atol=3e-5)
            np.testing.assert_allclose(one.output_error, other.output_error, rtol=1e-3)
            np.testing.assert_allclose(one.restored_error, other.restored_error, rtol=1e-3)
            np.testing.assert_allclose(
                np.reshape(one.input, (5, -1)), np.reshape(other.input, (5, -1)), atol=3e-5
            )
        for one, other in zip(moments, found[-1][1], strict=True):
            np.testing.assert_allclose(one.first, other.first, atol=1e-3)


def test_images_that_cannot_be_told_apart_are_run_one_by_one():
    def apply(p, x):
        # A sort along the batch mixes the examples on purpose, then undoes it.
        order = jnp.argsort(x[:, 0])
        return (x[order] @ p["w"])[jnp.argsort(order)]

    from proxyq.engine import Engine

    model = from_function(apply, {"w": np.eye(3, dtype=np.float32)}, (3,), name="sorted")
    x = images(model, 4)
    engine = Engine.build(model, 4)
    if engine.batch_size > 1:
        assert all(site.apart for site in engine.network.sites)
    np.testing.assert_allclose(engine.logits(x), x, atol=1e-6)


def test_transposed_convolutions_do_not_count_inserted_zeros():
    def apply(p, x):
        y = jax.lax.conv_transpose(x, p["w"], (2, 2), "SAME")
        return jnp.mean(y, axis=(1, 2))

    params = {"w": np.ones((3, 3, 4, 8), np.float32)}
    layer = network(from_function(apply, params, (6, 6, 4), name="up"), 2).layers[0]
    assert layer.kind == "transposed-conv" and layer.output_shape == (12, 12, 8)
    assert layer.macs == 6 * 6 * 4 * 9 * 8
