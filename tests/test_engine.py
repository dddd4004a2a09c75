"""The segmented engine: equal to the plain forward pass, compiled once, bounded in memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import mixer, small_net

from proxyq.engine import Edit, Engine, collect, compiled_count, single_layer_sweep
from proxyq.engine.divergence import kl_divergence
from proxyq.engine.memory import bytes_per_image, images_at_once
from proxyq.engine.taps import TapOptions
from proxyq.engine.walk import _restored
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.function_import import from_function
from proxyq.model.graph import evaluate
from proxyq.model.network import network
from proxyq.ptq.quantized import round_weights
from proxyq.quantize import quantize_columns


def measure_kl(reference, logits, start):
    del start
    return kl_divergence(reference, logits)


def images(model, count, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *model.input_shape)).astype(np.float32)


@pytest.mark.parametrize("build", [small_net, mixer])
@pytest.mark.parametrize(("count", "batch"), [(4, 4), (7, 3), (5, 8)])
def test_logits_equal_the_plain_forward_pass(build, count, batch):
    model = build()
    x = images(model, count)
    engine = Engine.build(model, count, batch_size=batch)
    np.testing.assert_allclose(engine.logits(x), model(x), atol=3e-5)


def plain_forward(engine, x, edits):
    """The network in one piece, weights and outputs replaced equation by equation."""
    found = engine.network
    at = {found.sites[index].position: (found.sites[index], edit) for index, edit in edits.items()}
    env = dict(engine.frontier)
    env.update(zip(found.graph.inputs, [jnp.asarray(x)], strict=True))
    for position, eqn in enumerate(found.graph.main):
        if position in at:
            site, edit = at[position]
            values = [env[v] if not hasattr(v, "val") else v.val for v in eqn.invars]
            if edit.weight is not None:
                values[site.operand] = edit.weight
            out = eqn.primitive.bind(*values, **eqn.params)
            env[eqn.outvars[0]] = out if edit.offset is None else out + site.on_output(edit.offset)
        else:
            evaluate([eqn], env)
    return np.asarray(env[found.graph.outputs[0]])


@pytest.mark.parametrize("build", [small_net, mixer])
def test_edits_equal_replacing_in_the_plain_forward_pass(build):
    model = build()
    x = images(model, 4)
    engine = Engine.build(model, 4)
    rng = np.random.default_rng(0)
    edits = {}
    for index, site in enumerate(engine.network.sites):
        weight = engine.weight(index)
        channels = engine.network.layer(site.layer).channels
        edits[index] = Edit(
            weight=weight + 0.05 * jnp.asarray(rng.normal(size=weight.shape), jnp.float32),
            offset=jnp.asarray(rng.normal(0, 0.1, channels), jnp.float32),
        )
    np.testing.assert_allclose(engine.logits(x, edits), plain_forward(engine, x, edits), atol=3e-5)


@pytest.mark.parametrize("build", [small_net, mixer])
def test_resume_equals_a_whole_run(build):
    model = build()
    x = jnp.asarray(images(model, 4))
    engine = Engine.build(model, 4)
    state = engine.start(x)
    for index in range(len(engine.network.sites)):
        edit = {index: Edit(weight=engine.weight(index) * 0.9)}
        np.testing.assert_array_equal(
            np.asarray(engine.resume(state, index, edit)), np.asarray(engine.run(x, edit))
        )
        state, _ = engine.step(state, index)


def test_nothing_is_compiled_on_a_second_call():
    model = small_net(seed=3)
    x = images(model, 4)
    engine = Engine.build(model, 4)
    edits = round_weights(engine, dict.fromkeys(engine.network.names, 3))
    engine.logits(x)
    engine.logits(x, edits)
    compiled = compiled_count()
    other = round_weights(engine, dict.fromkeys(engine.network.names, 5))
    engine.logits(x + 1, other)
    Engine.build(model, 4).logits(x)
    # Equal segments of an equal network are shared, too.
    Engine.build(small_net(seed=4), 4).logits(x)
    assert compiled_count() == compiled


def test_equal_segments_share_one_program():
    def apply(p, x):
        for i in range(12):
            x = jax.nn.relu(x @ p[f"w{i}"])
        return x

    params = {f"w{i}": np.eye(5, dtype=np.float32) for i in range(12)}
    model = from_function(apply, params, (5,), name="chain")
    before = compiled_count()
    Engine.build(model, 3).logits(images(model, 3))
    assert compiled_count() - before <= 3  # head, a block, perhaps the last


def alternatives(engine, bits):
    return {name: [round_weights(engine, {name: b}) for b in bits] for name in engine.network.names}


@pytest.mark.parametrize("build", [small_net, mixer])
@pytest.mark.parametrize("stacked", [False, True])
def test_sweep_equals_one_full_run_for_each_change(build, stacked):
    model = build()
    x = images(model, 6)
    engine = Engine.build(model, 6, batch_size=4)
    bits = (2, 4)
    table = single_layer_sweep(engine, x, alternatives(engine, bits), measure_kl, stacked=stacked)
    reference = engine.logits(x)
    whole = Engine.build(model, 6, batch_size=6)
    for row, name in enumerate(engine.network.names):
        for column, b in enumerate(bits):
            logits = plain_forward(whole, x, round_weights(whole, {name: b}))
            expected = kl_divergence(reference, logits).mean()
            assert table[row, column] == pytest.approx(expected, rel=2e-3, abs=1e-7)


def test_sweep_refuses_missing_layers():
    engine = Engine.build(small_net(), 2)
    with pytest.raises(UsageError, match="every layer"):
        single_layer_sweep(engine, images(small_net(), 2), {"stem": [{}]}, measure_kl)


def test_memory_bound_sets_the_batch_size():
    model = small_net()
    per_image = bytes_per_image(network(model, 4).graph)
    # At least the stem's output, 12 x 12 x 8 floats, is alive together with its input.
    assert per_image >= 4 * 12 * 12 * (8 + 3)
    assert images_at_once(model, 100, memory=2 * per_image * 25) == 25
    assert images_at_once(model, 100, memory=2 * per_image * 30) == 25  # four equal batches
    assert images_at_once(model, 100, memory=2 * per_image) == 1
    with pytest.raises(UsageError, match="one image in the network 'small' takes"):
        images_at_once(model, 100, memory=2 * per_image - 1)
    assert images_at_once(model, 10, memory=1 << 40) == 10


def test_taps_record_what_layers_read_and_make():
    model = small_net()
    x = images(model, 5)
    engine = Engine.build(model, 5, batch_size=2)
    taps = collect(engine, x, ("input", "output", "feature", "pooled", "gram"), (2, 4))
    whole = Engine.build(model, 5, batch_size=5).network
    env = dict(whole.prelude())
    env.update(zip(whole.graph.inputs, [x], strict=True))
    evaluate(whole.graph.main, env)
    for tap in taps:
        site = whole.sites[whole.sites_of(tap.name)[0]]
        eqn = whole.graph.main[site.position]
        np.testing.assert_allclose(tap.input, env[eqn.invars[0]], atol=2e-5)
        out = np.asarray(env[eqn.outvars[0]]).reshape(5, -1, tap.layer.channels)
        np.testing.assert_allclose(tap.output, out, atol=2e-5)
        pooled = np.maximum(np.asarray(tap.feature), 0).mean(axis=1)
        np.testing.assert_allclose(tap.pooled, pooled, atol=1e-5)
        flat = np.asarray(tap.feature, np.float64).reshape(5, -1)
        flat = flat - flat.mean(axis=0)
        np.testing.assert_allclose(tap.gram, flat @ flat.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [small_net, mixer])
def test_output_error_equals_the_definition(build):
    model = build()
    x = images(model, 5)
    engine = Engine.build(model, 5, batch_size=2)
    taps = collect(engine, x, ("output-error", "restored-error"), (2, 3))
    whole = Engine.build(model, 5, batch_size=5)
    env = dict(whole.frontier)
    env.update(zip(whole.network.graph.inputs, [jnp.asarray(x)], strict=True))
    evaluate(whole.network.graph.main, env)
    for tap in taps:
        ratios, restored = [], []
        for index in whole.network.sites_of(tap.name):
            site = whole.network.sites[index]
            eqn = whole.network.graph.main[site.position]
            clean = np.asarray(env[eqn.outvars[0]], np.float64)
            row, left = [], []
            y = np.asarray(site.output_columns(clean, 5)).reshape(-1, tap.layer.channels)
            for b in (2, 3):
                columns = quantize_columns(whole.columns(index), b)
                values = [env[v] for v in eqn.invars]
                values[site.operand] = site.from_columns(columns, whole.weight(index).shape)
                wrong = np.asarray(eqn.primitive.bind(*values, **eqn.params), np.float64)
                row.append(np.mean((wrong - clean) ** 2) / np.var(clean))
                z = np.asarray(site.output_columns(wrong, 5)).reshape(y.shape)
                z = (z - z.mean(axis=0)) / z.std(axis=0) * y.std(axis=0) + y.mean(axis=0)
                left.append(np.mean((z - y) ** 2) / np.var(clean))
            ratios.append(row)
            restored.append(left)
        np.testing.assert_allclose(tap.output_error, np.mean(ratios, axis=0), rtol=1e-3)
        np.testing.assert_allclose(tap.restored_error, np.mean(restored, axis=0), rtol=1e-3)


def test_restored_error_of_channels_that_rounding_scales_moves_or_silences():
    """A channel that is only scaled costs nothing, one that is gone costs its variance."""
    y = np.random.default_rng(0).normal(3.0, 2.0, (4, 50, 3))
    half, moved, gone = -0.5 * y, np.full_like(y, 7.0), -y

    def sums(y, changes):
        of_changes = [*changes, *(d * d for d in changes), *(y * d for d in changes)]
        count = np.full(y.shape[-1], y[..., 0].size)
        of_images = (part.sum(axis=(0, 1)) for part in (y, y * y, *of_changes))
        return np.stack([count, *of_images], axis=1)

    errors = _restored(sums(y, [half, moved, gone]))
    share = y.var(axis=(0, 1)).mean() / y.var()
    np.testing.assert_allclose(errors, [0.0, 0.0, share], atol=1e-5)
    # Of channels that never vary there is nothing to lose.
    assert _restored(sums(np.zeros((4, 5, 2)), [np.ones((4, 5, 2))])).tolist() == [0.0]
    # Nor of those that are constant but for the last digits of their sums, of either sign.
    y = np.broadcast_to([3.0, 5.0], (4, 5, 2))
    for noise in itertools.product((-1e-6, 0.0, 1e-6), repeat=3):
        constant = sums(y, [np.full(y.shape, 0.1)])
        constant[:, [2, 4, 5]] += noise
        assert 0 <= _restored(constant)[0] < 1e-6


def test_restored_error_of_one_image_is_refused_where_a_channel_has_one_value():
    """Two images give two of them; `output-error` does with one."""
    model = small_net()
    engine = Engine.build(model, 1, batch_size=1)
    with pytest.raises(ProxyqError, match=r"'restored-error'.*layer 'head' gives one value"):
        collect(engine, images(model, 1), ("restored-error",), (2, 3))
    taps = collect(engine, images(model, 1), ("output-error",), (2, 3))
    assert np.isfinite([tap.output_error for tap in taps]).all()
    two = collect(engine, images(model, 2), ("restored-error",), (2, 3))
    assert np.isfinite([tap.restored_error for tap in two]).all()


def test_batch_statistics_need_all_images_at_once():
    model = small_net()
    engine = Engine.build(model, 4, batch_norm="batch", batch_size=2)
    with pytest.raises(ProxyqError, match="all 4 images at once"):
        collect(engine, images(model, 4), ("gram",), (2,), options=TapOptions(batch_norm="batch"))


def test_asking_for_what_was_not_recorded_names_the_need():
    engine = Engine.build(small_net(), 2)
    taps = collect(engine, images(small_net(), 2), ("pooled",), (2,))
    with pytest.raises(ProxyqError, match=r"needs=\('gram',\)"):
        taps.map(lambda tap: tap.gram.sum())


def test_segments_that_differ_in_inner_constants_share_no_program():
    def apply(p, x):
        for i in range(2):
            table = np.full((5,), 1.0 + i, np.float32)
            inner = jax.jit(lambda v, table=table: v + table)
            x = jax.jit(lambda v, inner=inner: jnp.tanh(inner(v)))(x @ p[f"w{i}"])
        return x @ p["w2"]

    params = {f"w{i}": np.eye(5, dtype=np.float32) for i in range(3)}
    model = from_function(apply, params, (5,), name="tables")
    x = images(model, 3)
    np.testing.assert_allclose(Engine.build(model, 3).logits(x), model(x), atol=1e-6)


def test_weights_are_the_same_at_every_batch_size():
    # A factor that is repeated along the batch looks foldable at batch 1 alone.
    def apply(p, x):
        h = x @ p["w"]
        scale = jnp.broadcast_to(p["g"], h.shape) / jnp.sqrt(jnp.broadcast_to(p["v"], h.shape))
        return (h * scale) @ p["out"]

    rng = np.random.default_rng(0)
    shapes = {"w": (4, 6), "g": (6,), "v": (6,), "out": (6, 3)}
    params = {k: rng.uniform(0.5, 2, s).astype(np.float32) for k, s in shapes.items()}
    model = from_function(apply, params, (4,), name="repeated")
    one, four = (Engine.build(model, n, batch_size=n) for n in (1, 4))
    for site in range(2):
        np.testing.assert_allclose(one.weight(site), four.weight(site), rtol=1e-6)


def test_a_weight_that_is_a_repeated_parameter():
    def apply(p, x):
        kernel = jnp.broadcast_to(p["blur"], (3, 3, 1, 4))
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )  # fmt: skip
        return jnp.mean(x, axis=(1, 2)) @ p["head"]

    rng = np.random.default_rng(0)
    params = {
        "blur": rng.normal(size=(3, 3, 1, 1)).astype(np.float32),
        "head": rng.normal(size=(4, 3)).astype(np.float32),
    }
    model = from_function(apply, params, (6, 6, 4), name="blurred")
    x = images(model, 3)
    engine = Engine.build(model, 3)
    assert engine.network.names == ("blur", "head")
    np.testing.assert_allclose(engine.logits(x), model(x), atol=1e-5)


def test_a_network_that_computes_in_bfloat16_can_be_corrected():
    from proxyq.ptq.correct import correct

    def apply(p, x):
        h = jax.nn.relu(x.astype(jnp.bfloat16) @ p["a"].astype(jnp.bfloat16))
        return (h @ p["b"].astype(jnp.bfloat16)).astype(jnp.float32)

    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=(8, 8)).astype(np.float32) for k in "ab"}
    model = from_function(apply, params, (8,), name="half")
    x = images(model, 32)
    engine = Engine.build(model, 32)
    edits = round_weights(engine, dict.fromkeys(engine.network.names, 3))
    for correction in ("weights", "statistics", "auto"):
        fitted, _, _ = correct(engine, edits, x, correction)
        assert np.isfinite(engine.logits(x, fitted)).all()


def test_stacked_sweep_where_the_first_output_does_not_see_the_layer():
    def apply(p, x):
        return x @ p["a"], x @ p["b"]

    params = {k: np.eye(4, dtype=np.float32) for k in "ab"}
    model = from_function(apply, params, (4,), name="two-heads")
    engine = Engine.build(model, 3)
    x = images(model, 3)
    tables = [
        single_layer_sweep(engine, x, alternatives(engine, (1, 2)), measure_kl, stacked=stacked)
        for stacked in (False, True)
    ]
    np.testing.assert_allclose(*tables, atol=1e-6)
    assert (tables[0][1] == 0).all()
