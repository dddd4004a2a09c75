"""Several proxies at once: what they share must not change what they say."""

import numpy as np
import pytest
from networks import small_net

import proxyq.proxies as proxies
from proxyq.cli.score import with_options
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.function_import import from_function
from proxyq.proxies import PROXIES, Cache, make_proxy, score

CHEAP = [proxy for proxy in PROXIES if proxy.cost_class not in ("training", "curvature")]


@pytest.fixture(scope="module")
def case():
    model, rng = small_net(), np.random.default_rng(0)
    x = rng.normal(size=(6, *model.input_shape)).astype(np.float32)
    return model, x, rng.integers(0, 10, 6)


@pytest.mark.parametrize(
    "some", [CHEAP[::3], pytest.param(CHEAP, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_proxies_say_the_same_together_and_alone(case, some):
    model, x, labels = case
    together = score(model, [(p, {}) for p in some], x, labels=labels, bits=(2, 4))
    for proxy, one in zip(some, together, strict=True):
        (alone,) = score(model, [(proxy, {})], x, labels=labels, bits=(2, 4))
        scale = np.abs(alone.values).max()
        np.testing.assert_allclose(one.values, alone.values, rtol=1e-3, atol=1e-5 * scale)


def test_another_ones_batch_norm_is_not_taken(case):
    model, x, _ = case
    asked = [(proxies.orthogonality, {"batch_norm": "batch"}), (proxies.sqnr, {})]
    together = score(model, asked, x, bits=(3,))[1]
    (alone,) = score(model, [(proxies.sqnr, {})], x, bits=(3,))
    np.testing.assert_array_equal(together.values, alone.values)


def test_what_one_cannot_do_stops_no_other(case):
    model, x, _ = case
    wrong = np.full(6, 100)  # no class of this model
    failed = {}
    asked = [(proxies.sqnr, {}), (proxies.snip, {}), (proxies.output_error, {})]
    found = score(
        model, asked, x, labels=wrong, bits=(2,), failed=lambda p, e: failed.update({p.name: e})
    )
    assert [one.proxy for one in found] == ["sqnr", "output-error"]
    assert "label 100" in str(failed["snip"])
    with pytest.raises(ProxyqError, match="label 100"):
        score(model, asked, x, labels=wrong, bits=(2,))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0.7] * 6, ["a"] * 6, 3])
def test_wrong_labels_are_told(case, labels):
    model, x, _ = case
    with pytest.raises(UsageError, match="`labels` must be whole numbers, for each of the 6"):
        score(model, [(proxies.snip, {})], x, labels=np.array(labels), bits=(2,))


@pytest.mark.parametrize("name", ["loss-delta", "grasp", "hessian-eigenvalue", "snip"])
def test_probes_are_for_squares_alone(case, name):
    model, x, _ = case
    with pytest.raises(UsageError, match="labels='probes'"):
        score(model, [(PROXIES.get(name), {"labels": "probes"})], x, bits=(2,))


def test_the_cache_tells_kernels_and_models_apart(tmp_path, case):
    cache = Cache(tmp_path)

    def factory(k):
        def mine(taps, *, key):
            """A number for each layer."""
            return k * (1.0 + np.arange(len(taps)))

        return make_proxy(mine, needs=(), passes="none", reference="test")

    small, large = (score(case[0], [(factory(k), {})], cache=cache)[0] for k in (1.0, 100.0))
    np.testing.assert_allclose(large.values, 100 * small.values)

    params = {name: np.eye(4, dtype=np.float32) for name in ("a.weight", "b.weight")}

    def net(p, x):
        return x @ p["a.weight"] @ p["b.weight"]

    whole = from_function(net, params, (4,))
    assert len(score(whole, [(proxies.params, {})], cache=cache)[0].layers) == 2
    part = whole.replace(frozen=frozenset({"a.weight"}))
    (one,) = score(part, [(proxies.params, {})], cache=cache)
    assert [layer.name for layer in one.layers] == ["b"] and one.values.shape == (1,)


def test_options_for_all_train_nothing():
    asked = dict(with_options(["all"], {"labels": "predicted"})[1:])
    assert "snip" in asked and "limpq" not in asked
