"""The correction of layer statistics: closed forms, a naive walk, and what `auto` keeps."""

import jax.numpy as jnp
import numpy as np
import pytest
from networks import mixer, small_net

from proxyq.engine import Engine
from proxyq.engine.divergence import kl_divergence, log_softmax
from proxyq.engine.loss import Loss
from proxyq.engine.ranges import activation_grids
from proxyq.engine.statistics import (
    CLAMP,
    Moments,
    correct_statistics,
    correct_weights,
    float_moments,
    match,
)
from proxyq.errors import UsageError
from proxyq.model.graph import evaluate
from proxyq.ptq.correct import correct
from proxyq.ptq.measure import top1
from proxyq.ptq.quantized import round_weights, with_grids


def images(model, count=64, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *model.input_shape)).astype(np.float32)


def moments_of(x):
    """Moments of `[images, positions, channels]`."""
    return Moments(first=x.sum(axis=1), second=(x**2).sum(axis=1), positions=x.shape[1])


def test_match_restores_mean_and_deviation():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(32, 50, 3)) * [1.0, 2.0, 0.1] + [0.0, 5.0, -1.0]
    rounded = 0.7 * exact + 0.3
    ratio, shift = match(moments_of(exact), moments_of(rounded), shrink=False)
    np.testing.assert_allclose(ratio, 1 / 0.7)
    mean, deviation = moments_of(ratio * rounded + shift).mean_and_deviation()
    np.testing.assert_allclose(mean, exact.mean(axis=(0, 1)), atol=1e-9)
    np.testing.assert_allclose(deviation, exact.std(axis=(0, 1)), rtol=1e-9)
    # A ratio that every group of images agrees on is not shrunk.
    shrunk, _ = match(moments_of(exact), moments_of(rounded))
    np.testing.assert_allclose(shrunk, ratio, rtol=1e-6)


def test_a_noisy_ratio_is_shrunk_towards_one_and_a_wild_one_clamped():
    rng = np.random.default_rng(0)
    exact, rounded = rng.standard_t(2, size=(2, 16, 2, 1))
    plain, _ = match(moments_of(exact), moments_of(rounded), shrink=False)
    shrunk, _ = match(moments_of(exact), moments_of(rounded))
    assert abs(np.log(shrunk[0])) < 0.8 * abs(np.log(plain[0]))
    ratio, _ = match(moments_of(exact), moments_of(1e-3 * exact))
    assert ratio[0] == pytest.approx(CLAMP)
    dead, shift = match(moments_of(exact), moments_of(np.zeros_like(exact)))
    assert dead[0] == 1 and shift[0] == pytest.approx(exact.mean())


@pytest.mark.parametrize("build", [small_net, mixer])
def test_weights_get_mean_and_norm_of_the_float_ones(build):
    engine = Engine.build(build(), 4)
    edits = correct_weights(engine, round_weights(engine, dict.fromkeys(engine.network.names, 3)))
    for index, edit in edits.items():
        exact = np.asarray(engine.columns(index), np.float64)
        fixed = np.asarray(engine.network.sites[index].columns(edit.weight), np.float64)
        np.testing.assert_allclose(fixed.mean(axis=0), exact.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(fixed.std(axis=0), exact.std(axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [small_net, mixer])
def test_statistics_match_at_every_layer_of_the_running_network(build):
    model = build()
    x = images(model)
    engine = Engine.build(model, len(x), batch_size=24)  # the last chunk is padded
    edits = round_weights(engine, dict.fromkeys(engine.network.names, 3))
    reference, logits = float_moments(engine, x)
    np.testing.assert_allclose(logits, model(x), atol=3e-5)
    fitted = correct_statistics(engine, edits, x, reference, shrink=False)

    # Run the corrected network in one piece and look at every layer's output.
    whole = Engine.build(model, len(x), batch_size=len(x))
    outputs = []
    for changed in ({}, fitted):
        env = dict(whole.frontier)
        env.update(zip(whole.network.graph.inputs, [jnp.asarray(x)], strict=True))
        at = {whole.network.sites[i].position: (i, edit) for i, edit in changed.items()}
        for position, eqn in enumerate(whole.network.graph.main):
            evaluate([eqn], env) if position not in at else None
            if position in at:
                index, edit = at[position]
                site = whole.network.sites[index]
                values = [env[v] if not hasattr(v, "val") else v.val for v in eqn.invars]
                values[site.operand] = edit.weight
                out = eqn.primitive.bind(*values, **eqn.params) + site.on_output(edit.offset)
                env[eqn.outvars[0]] = out
        outputs.append(env)
    for site in whole.network.sites:
        var = whole.network.graph.main[site.position].outvars[0]
        exact, fixed = (
            np.asarray(site.output_columns(env[var], len(x)), np.float64).reshape(
                -1, int(np.prod(site.channel_shape))
            )
            for env in outputs
        )
        scale = exact.std()
        np.testing.assert_allclose(fixed.mean(axis=0), exact.mean(axis=0), atol=2e-3 * scale)
        np.testing.assert_allclose(fixed.std(axis=0), exact.std(axis=0), atol=2e-3 * scale)


def test_auto_keeps_what_is_closest_on_held_back_images():
    model = small_net()
    x = images(model)
    engine = Engine.build(model, len(x))
    edits = round_weights(engine, dict.fromkeys(engine.network.names, 3))
    chosen, used, notes = correct(engine, edits, x, "auto")
    rescaled, kl = notes["held_back_rescaled"], notes["held_back_kl"]
    found = {name: Loss(rescaled[name], kl[name]) for name in ("none", "weights", "statistics")}
    assert set(kl) == set(found) and used == min(found, key=found.get)
    assert notes["held_back_images"] == 16
    assert set(chosen) == set(edits)
    untouched, used, notes = correct(engine, edits, x, "none")
    assert untouched == edits and used == "none" and not notes


def test_auto_keeps_nothing_where_correction_hurts():
    # Weights that are on the grid already: rounding changes nothing, so nothing may help.
    model = small_net()
    engine = Engine.build(model, 64)
    edits = round_weights(engine, dict.fromkeys(engine.network.names, 16))
    _, used, notes = correct(engine, edits, images(model), "auto")
    found = notes["held_back_rescaled"]
    assert found[used] <= found["none"] <= notes["held_back_kl"]["none"] < 1e-6


def test_corrections_that_need_images_say_so():
    engine = Engine.build(small_net(), 4)
    for correction in ("auto", "statistics"):
        with pytest.raises(UsageError, match=r"needs calibration images, at least \d, got 0"):
            correct(engine, {}, None, correction)
    with pytest.raises(UsageError, match="must be one of"):
        correct(engine, {}, None, "bias")


def test_rounded_inputs_are_used_and_close_at_eight_bits():
    model = small_net()
    x = images(model, 16)
    engine = Engine.build(model, 16)
    widths = dict.fromkeys(engine.network.names, 8)
    grids = activation_grids(engine, widths, {}, x)
    reference = engine.logits(x)
    errors = []
    for bits in (8, 3):
        grids = activation_grids(engine, dict.fromkeys(widths, bits), {}, x)
        logits = engine.logits(x, with_grids(engine.network, {}, grids))
        errors.append(np.abs(logits - reference).mean() / np.abs(reference).mean())
    assert 0 < errors[0] < 0.05 < errors[1]


def test_measures_against_definitions():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 5, 7)) * 3
    a, b = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (p, q))
    np.testing.assert_allclose(kl_divergence(p, q), (a * np.log(a / b)).sum(axis=1))
    np.testing.assert_allclose(kl_divergence(p, p), 0, atol=1e-15)
    np.testing.assert_allclose(kl_divergence(p, q, temperature=2.0), kl_divergence(p / 2, q / 2))
    np.testing.assert_allclose(np.exp(log_softmax(p + 1000)).sum(axis=1), 1)
    assert top1(np.eye(4), np.array([0, 1, 2, 0])) == 75.0
