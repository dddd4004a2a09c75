"""Formulas as proxies: those of the shelf equal their functions, on a real network."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import small_net

import proxyq
from proxyq.cli import main
from proxyq.engine import Engine
from proxyq.errors import ProxyqError, UsageError
from proxyq.proxies import PROXIES, Cache, fisher, score, snip, synflow, weight_mse
from proxyq.proxies._synflow import magnitudes, virtual_gradients
from proxyq.proxies.formula import Formula, available_formulas, load_formula
from proxyq.proxies.formula.binding import formula_proxy
from proxyq.testing import check_proxy

BITS = (2, 3, 8)


def images(model, count=8, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *model.input_shape)).astype(np.float32)


def of(text, direction="cost", **more):
    return formula_proxy(Formula(name="own", formula=text, direction=direction, **more))


@pytest.mark.parametrize(
    ("name", "function", "options"),
    [
        ("snip", snip, {"labels": "predicted"}),
        ("fisher", fisher, {"labels": "sampled"}),
        ("weight-mse", weight_mse, {}),
        ("synflow", synflow, {}),
    ],
)
def test_formulas_of_the_shelf_equal_their_functions(name, function, options):
    model = small_net()
    x = images(model)
    found = PROXIES.get(f"formula:{name}")(model, x, bits=BITS, entries=0, **options)
    wanted = function(model, x, bits=BITS, **options)
    if name == "synflow":  # whose values are relative to the largest
        np.testing.assert_allclose(
            found.values / found.values.max(), wanted.values, rtol=1e-4, atol=1e-12
        )
    else:
        np.testing.assert_allclose(found.values, wanted.values, rtol=1e-4, atol=1e-12)
    assert found.proxy == f"formula:{name}"


def test_the_virtual_gradient_is_that_of_the_sum_of_outputs():
    """Of a network small enough for one derivative of it all, in float64."""
    model = small_net()
    engine = Engine.build(model, 1, batch_size=1)
    positive = magnitudes(Engine.build(model, 1, batch_size=1))
    graph, frontier = positive.network.graph, positive.frontier
    sites = positive.network.sites
    ones = jax.tree.map(lambda leaf: np.ones((1, *leaf.shape), np.float32), model.inputs)

    def flow(weights):
        replaced = Engine(network=positive.network)
        values = dict(frontier)
        values.update({site.weight: w for site, w in zip(sites, weights, strict=True)})
        replaced.__dict__["frontier"] = values
        return jnp.sum(jax.tree.leaves(replaced.run(ones))[0])

    assert graph is not None
    exact = jax.grad(flow)([frontier[site.weight] for site in sites])
    columns = [np.asarray(s.columns(g)) for s, g in zip(sites, exact, strict=True)]
    most = max(np.abs(c).max() for c in columns)
    for found, wanted in zip(virtual_gradients(engine), columns, strict=True):
        np.testing.assert_allclose(found, wanted / most, rtol=1e-4, atol=1e-7)


def test_the_published_tree_is_what_it_says():
    model = small_net()
    engine = Engine.build(model, 1, batch_size=1)
    found = PROXIES.get("formula:emq")(model, None, bits=BITS, entries=0)
    for row, (layer, v) in enumerate(zip(found.layers, virtual_gradients(engine), strict=True)):
        w = np.asarray(engine.columns(engine.network.sites_of(layer.name)[0]), np.float64)
        logs = np.where(v == 0, 0.0, np.log(np.abs(np.where(v == 0, 1.0, v))))
        powers = np.exp(logs - logs.max(axis=1, keepdims=True))
        each = powers / powers.sum(axis=1, keepdims=True) * np.sqrt(np.maximum(w, 0))
        np.testing.assert_allclose(found.values[row], -np.array(BITS) * each.mean(), rtol=1e-6)


def test_the_evolved_function_is_the_best_formula_of_the_shelf():
    model = small_net()
    x = images(model)
    function = PROXIES.get("evolved")(model, x, bits=BITS)
    formula = PROXIES.get("formula:evolved-3")(model, x, bits=BITS, entries=0)
    np.testing.assert_allclose(function.values, formula.values, rtol=1e-9)
    assert (np.diff(function.values, axis=1) < 0).all()


@pytest.mark.parametrize(
    ("text", "direction"),
    [
        ("sum(square(D)) / weights", "cost"),
        ("R + mean(square(E)) * l1(G)", "cost"),
        pytest.param("l1(H) * mean(square(D))", "cost", marks=pytest.mark.slow),
        pytest.param("R + sqrt(O) / macs", "cost", marks=pytest.mark.slow),
        ("std(A) + norm(F)", "importance"),
        ("sum(abs(V * W)) / macs", "importance"),
    ],
)
def test_formulas_keep_the_rules_of_proxies(text, direction):
    check_proxy(of(text, direction))


def test_samples_stand_for_all():
    model = small_net()
    x = images(model)
    own = of("sum(square(D * G))")
    whole = own(model, x, bits=BITS, entries=0, labels="predicted").values
    some = [
        own(model, x, bits=BITS, entries=40, labels="predicted", seed=seed).values
        for seed in range(40)
    ]
    assert np.std(some, axis=0).max() > 0
    np.testing.assert_allclose(np.mean(some, axis=0), whole, rtol=0.5)


@pytest.mark.slow
def test_a_hessian_probe_is_unbiased_in_its_square():
    """Mean over draws of z (H z) is the diagonal: against the trace of a tiny network."""
    model = small_net()
    x = images(model)
    own = of("sum(H) * (9 - bits)")
    draws = [own(model, x, bits=(2, 8), labels="predicted", seed=s).values[:, 1] for s in range(30)]
    trace = PROXIES.get("hessian-trace")
    exact = trace(model, x, bits=(2, 8), curvature="hessian", labels="predicted").notes["trace"]
    error = np.std(draws, axis=0) / np.sqrt(len(draws))
    assert (np.abs(np.mean(draws, axis=0) - exact) < 5 * error + 0.2 * np.abs(exact)).all()


def test_caches_know_formulas_apart(tmp_path):
    model = small_net()
    x = images(model)
    cache = Cache(tmp_path)
    first, second = of("sum(square(D))"), of("2 * sum(square(D))")
    (one,) = score(model, [(first, {})], x, bits=BITS, cache=cache)
    (two,) = score(model, [(second, {})], x, bits=BITS, cache=cache)
    np.testing.assert_allclose(two.values, 2 * one.values)
    (again,) = score(model, [(first, {})], x, bits=BITS, cache=cache)
    np.testing.assert_array_equal(again.values, one.values)


def test_what_cannot_be_a_proxy_is_told():
    with pytest.raises(UsageError, match="must depend on bits"):
        of("sum(square(W))")
    with pytest.raises(UsageError, match="unknown formula 'emp'"):
        PROXIES.get("formula:emp")
    with pytest.raises(ProxyqError, match="not finite"):
        of("std(D) * " + " * ".join(["exp(80 + bits)"] * 10))(small_net(), None, bits=BITS)


def test_files_stand_where_names_do(tmp_path, capsys):
    file = tmp_path / "own.json"
    Formula(name="own", formula="sum(square(D)) / norm(W)", direction="cost").save(file)
    common = ["--bits", "2,4", "--budget", "size=3bit", "--no-cache", "--json"]
    assert main(["search", "--proxy", str(file), *common]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["method"]["proxy"] == "formula:own"
    scores = tmp_path / "scores.json"
    asked = ["--proxy", str(file), "--proxy", "formula:snip", "--option", "entries=0"]
    assert main(["score", *asked, "--out", str(scores), "--no-cache", "--samples", "16"]) == 0
    capsys.readouterr()
    assert main(["allocate", str(scores), "--proxy", "formula:own", "--budget", "size=3bit"]) == 0
    capsys.readouterr()
    result = proxyq.rank(table="digits", proxies=[str(file)], resamples=50)
    assert "formula:own" in [row.name for row in result.rows]
    assert main(["proxies", str(file)]) == 0
    assert "By the formula sum(square(D)) / norm(W)." in capsys.readouterr().out
    assert main(["search", "--proxy", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_the_shelf_is_whole():
    assert {"emq", "snip", "fisher", "synflow", "weight-mse"} <= set(available_formulas())
    for name in available_formulas():
        assert PROXIES.get(f"formula:{name}").name == f"formula:{load_formula(name).name}"
