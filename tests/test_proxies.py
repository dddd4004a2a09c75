"""Proxies against naive references, closed forms and invariances of their cards."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import mixer, small_net

import proxyq.proxies as proxies
from proxyq.engine import Engine, collect
from proxyq.errors import ProxyqError, UsageError
from proxyq.proxies import PROXIES, Scores, as_cost, make_proxy
from proxyq.proxies._orthogonality import importance, orthogonality_matrix
from proxyq.proxies._separability import tf_idf
from proxyq.proxies.cost import weight_errors
from proxyq.registry import Registry

fast = settings(deadline=None, max_examples=30, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def images(model, count=6, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *model.input_shape)).astype(np.float32)


def centred_gram(x):
    x = x - x.mean(axis=0)
    return x @ x.T


def orm_naive(x, y):
    """ORM in feature space: |Y'X|_F^2 / (|X'X|_F |Y'Y|_F), features centred."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return np.sum((y.T @ x) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


# --- orthogonality ---


@given(seed=seeds)
@fast
def test_gram_form_equals_feature_form(seed):
    rng = np.random.default_rng(seed)
    features = [rng.normal(size=(9, p)) @ rng.normal(size=(p, p)) + 3 for p in (4, 7, 20, 3)]
    orm = orthogonality_matrix([centred_gram(x) for x in features])
    for i, x in enumerate(features):
        for j, y in enumerate(features):
            assert orm[i, j] == pytest.approx(orm_naive(x, y), abs=1e-6)


@given(seed=seeds)
@fast
def test_orm_invariances(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(8, 5)), rng.normal(size=(8, 6))
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    grams = [centred_gram(z) for z in (x, y, 7.5 * x, x + rng.normal(size=5), x @ rotation)]
    orm = orthogonality_matrix(grams)
    np.testing.assert_allclose(orm, orm.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(orm), 1)
    assert (orm >= 0).all() and (orm <= 1 + 1e-12).all()
    # Scale, shift and rotation of features change nothing; equal features give 1.
    for other in (2, 3, 4):
        assert orm[0, other] == pytest.approx(1, abs=1e-9)
        assert orm[1, other] == pytest.approx(orm[0, 1], abs=1e-9)


def test_orm_of_orthogonal_and_of_constant_features():
    x = np.array([[1.0], [-1], [0], [0]])
    y = np.array([[0.0], [0], [1], [-1]])
    orm = orthogonality_matrix([centred_gram(x), centred_gram(y), np.zeros((4, 4))])
    np.testing.assert_allclose(orm, np.eye(3), atol=1e-15)


def test_importance_follows_the_formulas():
    rng = np.random.default_rng(0)
    orm = orthogonality_matrix([centred_gram(rng.normal(size=(10, 4))) for _ in range(5)])
    gamma = [sum(orm[i, j] for j in range(5) if j != i) for i in range(5)]
    theta = np.exp(-3.0 * np.array(gamma))
    suffix = np.array([theta[i:].mean() for i in range(5)])
    ratio = importance(orm, beta=3.0) / suffix
    np.testing.assert_allclose(ratio, ratio[0])  # one common factor
    plain = importance(orm, beta=3.0, suffix_mean=False) / theta
    np.testing.assert_allclose(plain, plain[0])


def test_importance_does_not_underflow():
    orm = np.full((18, 18), 0.9) + 0.1 * np.eye(18)
    assert (importance(orm, beta=100.0) > 0).all()


def test_orthogonality_of_a_network_equals_the_naive_way():
    model = small_net()
    x = images(model)
    scores = proxies.orthogonality(model, x, beta=2.0)
    taps = collect(Engine.build(model, len(x)), x, ("feature",), (2,))
    # The shortcut hands on what the last convolution of its block does: one feature, not two.
    alone = [tap for tap in taps if tap.name != "blocks.1.shortcut"]
    flat = [np.asarray(tap.feature, np.float64).reshape(len(x), -1) for tap in alone]
    size = len(flat)
    gamma = np.array(
        [sum(orm_naive(flat[i], flat[j]) for j in range(size) if j != i) for i in range(size)]
    )
    theta = np.exp(-2.0 * gamma)
    expected = {tap.name: theta[i:].mean() for i, tap in enumerate(alone)}
    expected["blocks.1.shortcut"] = expected["blocks.1.conv2"]
    wanted = np.array([expected[tap.name] for tap in taps])
    np.testing.assert_allclose(scores.values / scores.values[0], wanted / wanted[0], rtol=1e-4)


def test_batch_statistics_change_the_scores_and_are_recorded():
    model = small_net()
    x = images(model)
    running = proxies.orthogonality(model, x)
    batch = proxies.orthogonality(model, x, batch_norm="batch")
    assert batch.options["batch_norm"] == "batch"
    assert not np.allclose(running.values, batch.values)


# --- separability ---


def tf_idf_naive(a):
    channels, images = a.shape
    total = 0.0
    for c in range(channels):
        mean = sum(a[c]) / images
        chosen = [n for n in range(images) if a[c, n] >= mean]
        tf = sum(a[c, n] / sum(a[k, n] for k in range(channels)) for n in chosen)
        total += tf / (len(chosen) + 1e-11) * np.log(images / (len(chosen) + 1))
    return total / channels


@given(seed=seeds)
@fast
def test_tf_idf_equals_a_loop_and_ignores_order_and_scale(seed):
    rng = np.random.default_rng(seed)
    a = np.maximum(rng.normal(size=(5, 8)), 0) + 1e-3
    g = tf_idf(a)
    assert g == pytest.approx(tf_idf_naive(a), rel=1e-9)
    assert tf_idf(3.7 * a) == pytest.approx(g)
    assert tf_idf(a[rng.permutation(5)]) == pytest.approx(g)
    assert tf_idf(a[:, rng.permutation(8)]) == pytest.approx(g)


@pytest.mark.parametrize("n", [4, 10, 33])
def test_tf_idf_closed_forms(n):
    # One channel fires on one image: m = 1/N, s = 1, tfbar = 1, idf = ln(N / 2).
    assert tf_idf(np.eye(n)) == pytest.approx(np.log(n / 2))
    # All equal: s = N, tfbar = 1/C, idf = ln(N / (N + 1)).
    assert tf_idf(np.ones((6, n))) == pytest.approx(np.log(n / (n + 1)) / 6)


def test_tf_idf_of_silent_images_and_channels_is_finite():
    a = np.eye(4)
    a[:, 3] = 0  # an image without any activation; its channel is dead
    assert np.isfinite(tf_idf(a))


def test_kappa_weighs_by_the_width():
    a = np.random.default_rng(0).random((7, 9))
    assert tf_idf(a, kappa="log") == pytest.approx(tf_idf(a) * np.log(np.e * 7))


def test_separability_forms():
    model = small_net()
    x = images(model)
    raw = proxies.separability(model, x).values
    np.testing.assert_allclose(
        proxies.separability(model, x, form="exp", beta=2.0).values, np.exp(-2.0 * raw)
    )
    with pytest.raises(UsageError, match="'raw' or 'exp'"):
        proxies.separability(model, x, form="log")


# --- weights ---


@pytest.mark.parametrize("build", [small_net, mixer])
def test_weight_errors_equal_loops(build):
    model = build()
    taps = collect(Engine.build(model, 1), None, ("weight",), (2, 4))
    squared = proxies.weight_mse.on(taps).values
    mean = proxies.weight_mse.on(taps, reduce="mean").values
    relative = proxies.sqnr.on(taps).values
    for row, tap in enumerate(taps):
        for column, bits in enumerate((2, 4)):
            w = np.asarray(tap.columns, np.float64)
            error = np.sum((np.asarray(tap.quantized(bits), np.float64) - w) ** 2)
            assert squared[row, column] == pytest.approx(error, rel=1e-4)
            assert mean[row, column] == pytest.approx(error / w.size, rel=1e-4)
            assert relative[row, column] == pytest.approx(error / np.sum(w**2), rel=1e-4)


def test_trivial_baselines():
    model = small_net()
    taps = collect(Engine.build(model, 1), None, (), (2, 4))
    np.testing.assert_array_equal(proxies.params.on(taps).values, [t.layer.weights for t in taps])
    np.testing.assert_array_equal(proxies.macs.on(taps).values, [t.layer.macs for t in taps])
    one = proxies.random.on(taps, key=jax.random.key(1)).values
    np.testing.assert_array_equal(one, proxies.random.on(taps, key=jax.random.key(1)).values)
    assert (one != proxies.random.on(taps, key=jax.random.key(2)).values).any()


def test_uniform_proxy_gives_uniform_bits():
    import proxyq

    plan = proxyq.search(small_net(), proxy="uniform", budget="size=3bit", bits=(2, 3, 4, 8))
    assert set(plan.bits().values()) == {3}


# --- every registered proxy ---


# What trains wants labels, and is run by tests/test_conformance.py, as are all others on other
# networks: this one adds attention, tokens, and a weight on the left of a product.
UNTRAINED = [proxy.name for proxy in PROXIES if proxy.cost_class != "training"]


@pytest.mark.parametrize("name", UNTRAINED)
def test_every_proxy_scores_a_mixer(name):
    proxy = PROXIES.get(name)
    model = mixer()
    x = images(model) if proxy.needs_images else None
    scores = proxy(model, x, bits=(2, 4), seed=0)
    expected = (len(scores.layers),) if proxy.shape == "layers" else (len(scores.layers), 2)
    assert scores.values.shape == expected
    assert np.isfinite(scores.values).all()
    assert as_cost(scores, errors=weight_errors(model, (2, 4))).shape == (len(scores.layers), 2)
    assert scores.layers[0].name in str(scores)


def test_cost_of_an_importance_is_linear_in_bits():
    taps = collect(Engine.build(small_net(), 1), None, ("weight",), (2, 3, 8))
    scores = proxies.params.on(taps)
    steps = np.diff(as_cost(scores), axis=1)
    np.testing.assert_allclose(steps, -scores.values[:, None] * np.array([1, 5]))
    table = as_cost(scores, "times-dw2", errors=weight_errors(taps))
    np.testing.assert_allclose(
        table, scores.values[:, None] * proxies.weight_mse.on(taps).values, rtol=1e-5
    )
    with pytest.raises(UsageError, match="already"):
        as_cost(proxies.sqnr.on(taps), "linear-bits")
    with pytest.raises(UsageError, match="did you mean 'linear-bits'"):
        as_cost(scores, "linear-bit")


def test_a_score_that_is_not_finite_names_layer_and_proxy():
    def broken(taps, *, key):
        """Broken."""
        return np.where(np.arange(len(taps)) == 2, np.nan, 1.0)

    proxy = make_proxy(broken, needs=(), passes="none", reference="test")
    with pytest.raises(ProxyqError, match=r"'broken' gives nan for layer 'blocks.0.depthwise'"):
        proxy(small_net())


def test_registry_refuses_duplicates_and_names_near_misses():
    registry = Registry("proxy")
    registry.add(proxies.sqnr)
    with pytest.raises(UsageError, match="registered already"):
        registry.add(proxies.sqnr)
    with pytest.raises(UsageError, match="did you mean 'orthogonality'"):
        PROXIES.get("orthogonalty")
    with pytest.raises(UsageError, match="has no option 'bta'"):
        proxies.orthogonality(small_net(), images(small_net()), bta=1)


def test_scores_print_the_most_sensitive_first():
    taps = collect(Engine.build(small_net(), 1), None, (), (2,))
    text = str(Scores(proxy="x", layers=taps.layers, bits=(2,), values=np.arange(9.0)))
    assert text.splitlines()[1].startswith("head")


def test_labels_as_text_are_the_option():
    model, x = small_net(), images(small_net())
    drawn = proxies.fisher(model, x, labels="sampled", bits=(2,))
    assert drawn.options["labels"] == "sampled"
    given = proxies.fisher(model, x, labels=np.zeros(6, int), bits=(2,))
    assert given.options["labels"] == "probes"
    with pytest.raises(UsageError, match="'sampld'"):
        proxies.fisher(model, x, labels="sampld", bits=(2,))
