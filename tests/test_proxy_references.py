"""Every proxy of gradients, curvature, entropy and measured change against a naive computation."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import (
    Naive,
    cross_entropy,
    float64,
    gelu_net,
    naive_gelu_net,
    naive_mixer,
    naive_small_net,
)
from networks import mixer, small_net

import proxyq.proxies as proxies
from proxyq.engine import Engine, Taps, collect
from proxyq.engine.gradients import stride
from proxyq.engine.ranges import fit_input_grid
from proxyq.engine.rounded import weight_changes
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.function_import import from_function
from proxyq.model.model import Model
from proxyq.proxies import COSTS, Scores, as_cost, make_proxy
from proxyq.proxies._jacobian_covariance import independence
from proxyq.proxies._weight_entropy import histogram_entropy
from proxyq.proxies.cost import WeightErrors
from proxyq.quantize import fake_quantize, quantize_columns

IMAGES, BITS = 5, (2, 4)


class Case(NamedTuple):
    """A network in proxyq and by hand, its images and labels, and its taps."""

    model: Model
    naive: Naive
    x: np.ndarray
    labels: np.ndarray
    taps: Taps

    def score(self, proxy, *, targets=None, seed=0, activation_bits=(), **options):
        """Scores of the network; `targets` is the option `labels`."""
        if targets is not None:
            options["labels"] = targets
        (scores,) = proxies.score(
            self.model,
            [(proxy, options)],
            self.x if proxy.needs_images else None,
            labels=self.labels,
            bits=BITS,
            activation_bits=activation_bits,
            seed=seed,
        )
        return scores

    @property
    def first(self):
        """Each layer's first block."""
        names = list(self.naive.weights)
        return [names[self.naive.rows.index(row)] for row in range(len(self.taps))]

    @property
    def layers(self):
        """The blocks of each layer, each with its first site in the engine."""
        found = [[] for _ in self.taps]
        for site, block in enumerate(self.naive.weights):
            found[self.naive.rows[site]].append((block, site))
        return found

    def changes(self, row, bits):
        """`Q(W) - W` of each block of a layer, in float64."""
        found = {}
        for block, site in self.layers[row]:
            (change,) = weight_changes(self.taps.engine, site, (bits,))
            found[block] = np.asarray(change, np.float64)
        return found


def case(build, naive, classes):
    model = build()
    rng = np.random.default_rng(7)
    x = rng.normal(size=(IMAGES, *model.input_shape)).astype(np.float32)
    taps = collect(Engine.build(model, IMAGES), x, ("input", "output", "feature"), BITS)
    return Case(model, naive(model), x, rng.integers(0, classes, IMAGES), taps)


@pytest.fixture(scope="module")
def cases():
    return {
        "small": case(small_net, naive_small_net, 10),
        "mixer": case(mixer, naive_mixer, 8),
    }


@pytest.fixture(scope="module")
def gradients(cases):
    """Each image's gradient of the cross-entropy, image by image, in float64."""
    return {n: c.naive.image_gradients(cross_entropy, c.x, c.labels) for n, c in cases.items()}


both = pytest.mark.parametrize("name", ["small", pytest.param("mixer", marks=pytest.mark.slow)])


def close(scores, expected, rtol=2e-4, atol=0.0):
    """Equal, and not all alike or nothing."""
    values = scores.values if isinstance(scores, Scores) else np.asarray(scores)
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max()
    assert np.isfinite(scale) and scale > 0 and np.ptp(expected) > 0
    np.testing.assert_allclose(values, expected, rtol=rtol, atol=atol * scale)


# --- gradients --------------------------------------------------------------------------------


@both
def test_snip(cases, gradients, name):
    c = cases[name]
    mean = {block: each.mean(axis=0) for block, each in gradients[name].items()}
    close(c.score(proxies.snip), [np.abs(mean[b] * c.naive.weights[b]).sum() for b in c.first])


@both
def test_grad_norm(cases, gradients, name):
    c = cases[name]
    expected = [np.sqrt((gradients[name][b].mean(axis=0) ** 2).sum()) for b in c.first]
    close(c.score(proxies.grad_norm), expected)


@both
def test_grasp(cases, gradients, name):
    c = cases[name]
    g = {block: gradients[name][block].mean(axis=0) for block in c.first}
    hg = c.naive.products(cross_entropy, c.x, c.labels, g)
    expected = [abs((c.naive.weights[block] * hg[block]).sum()) for block in c.first]
    close(c.score(proxies.grasp), expected, rtol=1e-3, atol=1e-5)


@both
def test_zico(cases, gradients, name):
    c = cases[name]
    expected = []
    for block in c.first:
        total = 0.0
        for weight in np.abs(gradients[name][block]).reshape(IMAGES, -1).T:
            deviation = math.sqrt(sum((g - sum(weight) / IMAGES) ** 2 for g in weight) / IMAGES)
            # A derivative that is the same for all images is that of a dead unit: zero.
            total += sum(weight) / IMAGES / deviation if deviation > 1e-9 else 0.0
        expected.append(math.log(total))
    close(c.score(proxies.zico), expected, rtol=1e-3)


def first_orders(c, each, row, bits):
    """Every image's gradient times the rounding error, over all uses of the weight."""
    changes = c.changes(row, bits).items()
    return sum((each[b] * change).reshape(IMAGES, -1).sum(axis=1) for b, change in changes)


def table(c, function):
    return [[function(row, bits) for bits in BITS] for row in range(len(c.taps))]


@both
def test_first_order(cases, gradients, name):
    c, each = cases[name], gradients[name]
    signed = np.array(table(c, lambda row, b: first_orders(c, each, row, b).mean()))
    assert (signed < 0).any() and (signed > 0).any()
    close(c.score(proxies.first_order, form="signed"), signed, rtol=1e-3, atol=1e-5)
    close(c.score(proxies.first_order), np.abs(signed), rtol=1e-3, atol=1e-5)
    with pytest.raises(UsageError, match="'absolute' or 'signed', got 'plain'"):
        c.score(proxies.first_order, form="plain")


@both
def test_taylor_fisher(cases, gradients, name):
    c, each = cases[name], gradients[name]
    expected = table(c, lambda row, b: 0.5 * np.mean(first_orders(c, each, row, b) ** 2))
    close(c.score(proxies.taylor_fisher, targets="data"), expected, rtol=2e-3, atol=1e-5)


@both
def test_mpqco(cases, name):
    c = cases[name]

    def log_logit(logits, targets):
        picked = jnp.take_along_axis(logits, jnp.asarray(targets)[:, None], axis=-1)[:, 0]
        return jnp.log(jnp.abs(picked))

    each = c.naive.image_gradients(log_logit, c.x, c.labels)
    expected = table(c, lambda row, b: np.sum(first_orders(c, each, row, b) ** 2) / (2 * IMAGES))
    close(c.score(proxies.mpqco), expected, rtol=3e-3, atol=1e-5)


@both
@pytest.mark.parametrize("form", ["diagonal", "trace"])
def test_fisher_of_labels(cases, gradients, name, form):
    c = cases[name]

    def cost(row, bits):
        block = c.first[row]
        squares = c.changes(row, bits)[block] ** 2
        diagonal = (gradients[name][block] ** 2).mean(axis=0)
        if form == "trace":
            return 0.5 * diagonal.sum() / diagonal.size * squares.sum()
        return 0.5 * (diagonal * squares).sum()

    close(c.score(proxies.fisher, targets="data", form=form), table(c, cost), rtol=1e-3)


def test_fisher_of_predictions_is_that_of_the_predicted_labels(cases):
    c = cases["mixer"]
    with float64():
        best = np.asarray(c.naive.logits(c.x.astype(np.float64))).argmax(axis=-1)
    assert (best != c.labels).any()
    predicted = c.score(proxies.fisher, targets="predicted")
    same = proxies.score(
        c.model, [(proxies.fisher, {"labels": "data"})], c.x, labels=best, bits=BITS
    )
    np.testing.assert_array_equal(predicted.values, same[0].values)
    with pytest.raises(UsageError, match="'diagonal' or 'trace', got 'full'"):
        c.score(proxies.fisher, form="full")


@pytest.mark.parametrize("labels", ["sampled", "probes"])
def test_fisher_of_draws_meets_the_expectation_over_all_classes(labels):
    c = case(gelu_net, naive_gelu_net, 4)
    with float64():
        p = np.asarray(jax.nn.softmax(c.naive.logits(c.x.astype(np.float64))))
    of_class = [
        c.naive.image_gradients(cross_entropy, c.x, np.full(IMAGES, k)) for k in range(p.shape[1])
    ]
    exact = np.zeros((len(c.taps), len(BITS)))
    along = np.zeros_like(exact)
    for row, block in enumerate(c.first):
        # E over images and classes, each with its probability
        weighed = [
            (p[:, k, None, None] * g[block] ** 2).mean(axis=0) for k, g in enumerate(of_class)
        ]
        for column, bits in enumerate(BITS):
            # The one weight that is used twice is used in one shape: one block, two sites.
            where = c.taps.engine.network.sites_of(c.taps.taps[row].name)[0]
            (change,) = weight_changes(c.taps.engine, where, (bits,))
            dw = np.asarray(change, np.float64)
            exact[row, column] = 0.5 * (sum(weighed) * dw**2).sum()
            forms = [
                p[:, k] * (g[block] * dw).sum(axis=(1, 2)) ** 2 for k, g in enumerate(of_class)
            ]
            along[row, column] = 0.5 * np.mean(sum(forms))
    draws = 60
    for proxy, expected in ((proxies.fisher, exact), (proxies.taylor_fisher, along)):
        values = np.stack(
            [c.score(proxy, targets=labels, seed=seed).values for seed in range(draws)]
        )
        error = values.std(axis=0, ddof=1) / math.sqrt(draws)
        assert (np.abs(values.mean(axis=0) - expected) <= 4 * error).all()
        assert (error < 0.25 * expected).all() and (error > 0).all()


# --- what layers read and hand on -------------------------------------------------------------


def test_jacobian_covariance_of_closed_forms():
    k = 1e-5
    # All images alike: one eigenvalue is their number, all others zero.
    alike = np.tile(np.random.default_rng(0).normal(size=20), (3, 1))
    values = np.array([3.0, 0.0, 0.0])
    expected = np.exp(-np.mean(np.log(values + k) + 1 / (values + k)))
    assert independence(alike) == pytest.approx(expected, rel=1e-6, abs=1e-300)
    # No correlation: all eigenvalues 1, about 1/e.
    rows = np.array([[1.0, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    assert independence(rows) == pytest.approx(np.exp(-1), rel=1e-3)
    # Two images of correlation r: eigenvalues 1 + r and 1 - r.
    pair = np.random.default_rng(1).normal(size=(2, 30))
    r = np.corrcoef(pair)[0, 1]
    v = np.array([1 + r, 1 - r])
    expected = np.exp(-np.mean(np.log(v + k) + 1 / (v + k)))
    assert independence(pair) == pytest.approx(expected, rel=1e-9)


@both
def test_jacobian_covariance_of_a_network(cases, name):
    c = cases[name]
    expected = []
    with float64():
        x = c.x.astype(np.float64)
        zero = {
            block: np.zeros(np.shape(tap.input)) for block, tap in zip(c.first, c.taps, strict=True)
        }
        slope = jax.jit(jax.grad(lambda m, x: c.naive.logits(x, moved=m).sum()))
        each = [
            slope({b: z[s : s + 1] for b, z in zero.items()}, x[s : s + 1]) for s in range(IMAGES)
        ]
    for block in c.first:
        jacobians = np.stack([np.asarray(one[block]).ravel() for one in each])
        if np.ptp(jacobians) == 0:  # the head's: the same for all images
            jacobians = np.zeros_like(jacobians)
        v = np.linalg.eigvalsh(np.corrcoef(jacobians)) if jacobians.any() else None
        found = 0.0 if v is None else np.exp(-np.mean(np.log(v + 1e-5) + 1 / (v + 1e-5)))
        expected.append(found)
    scores = c.score(proxies.jacobian_covariance)
    np.testing.assert_allclose(scores.values, expected, rtol=0.02, atol=1e-4)
    assert np.ptp(expected) > 0.01


@both
def test_naswot(cases, name):
    c = cases[name]
    expected = []
    for tap in c.taps:
        on = (np.asarray(tap.feature) > 0).reshape(IMAGES, -1)
        kernel = np.zeros((IMAGES, IMAGES))
        for s in range(IMAGES):
            for t in range(IMAGES):
                kernel[s, t] = sum(a == b for a, b in zip(on[s], on[t], strict=True)) / on.shape[1]
        expected.append(np.linalg.det(kernel + 1e-6 * np.eye(IMAGES)) ** (1 / IMAGES))
    close(c.score(proxies.naswot), expected, rtol=1e-6)


@both
def test_zen(cases, name):
    c = cases[name]
    key = jax.random.key(0)
    first, second = (
        np.asarray(jax.random.normal(k, (3, *c.model.input_shape))) for k in jax.random.split(key)
    )
    moved = first + np.float32(0.5) * second
    engine = Engine.build(c.model, 3)
    plain, other = (collect(engine, x, ("output",), BITS) for x in (first, moved))
    expected = []
    for a, b in zip(plain, other, strict=True):
        change = (np.asarray(b.output, np.float64) - a.output).reshape(3, -1)
        expected.append(np.mean([math.sqrt(sum(row**2)) for row in change]) / 0.5)
    close(c.score(proxies.zen, images=3, step=0.5), expected)


def entropy(values, bins):
    """In bits, counting value by value."""
    x = np.asarray(values, np.float64).ravel()
    edges = np.linspace(x.min(), x.max(), bins + 1)
    counts: dict[int, int] = {}
    for value in x:
        place = min(int(np.searchsorted(edges, value, side="right")) - 1, bins - 1)
        counts[place] = counts.get(place, 0) + 1
    return -sum(n / len(x) * math.log2(n / len(x)) for n in counts.values())


def test_histogram_entropy_of_closed_forms():
    assert histogram_entropy(np.arange(64.0), 16) == pytest.approx(4)
    assert histogram_entropy(np.array([0.0, 1, 0, 1]), 256) == pytest.approx(1)
    assert histogram_entropy(np.full(9, 3.0), 256) == 0
    quarters = np.array([0.0, 0, 1, 2])  # 1/2 log 2 + 1/4 log 4 twice
    assert histogram_entropy(quarters, 3) == pytest.approx(1.5)


@both
@pytest.mark.parametrize("bins", [256, 5])
def test_weight_entropy(cases, name, bins):
    c = cases[name]
    expected = [entropy(tap.columns, bins) for tap in c.taps]
    close(c.score(proxies.weight_entropy, bins=bins), expected, rtol=1e-9)


def test_activation_entropy(cases):
    c = cases["mixer"]
    expected = [entropy(tap.feature, 256) for tap in c.taps]
    close(c.score(proxies.activation_entropy), expected, rtol=1e-6)
    # Of the larger network some values only: at most 4096 of its five images, which ran together.
    c = cases["small"]
    seen = [np.asarray(tap.feature).ravel() for tap in c.taps]
    expected = [entropy(values[:: stride(values.size, 4096)], 16) for values in seen]
    close(c.score(proxies.activation_entropy, bins=16), expected, rtol=1e-6)
    for proxy in (proxies.activation_entropy, proxies.weight_entropy):
        with pytest.raises(UsageError, match=r"`bins` of .* must be at least 2, got 1"):
            c.score(proxy, bins=1)


def rounded_outputs(c, row, bits):
    """A layer's output on its float input, with its weight rounded: at its first use."""
    engine, tap = c.taps.engine, c.taps.taps[row]
    network = engine.network
    site = network.sites[network.sites_of(tap.name)[0]]
    eqn = network.graph.main[site.position]
    columns = quantize_columns(tap.columns, bits)
    weight = site.from_columns(columns, tap.weight.shape)
    values = [tap.input, weight] if site.operand else [weight, tap.input]
    return np.asarray(eqn.primitive.bind(*values, **eqn.params), np.float64)


@both
def test_quantization_entropy(cases, name):
    c = cases[name]
    once = [r for r, blocks in enumerate(c.layers) if len(blocks) == 1]
    plain = [np.var(np.asarray(tap.output, np.float64)) for tap in c.taps]
    expected = np.array(
        table(c, lambda row, b: 0.5 * np.log(plain[row] / np.var(rounded_outputs(c, row, b))))
    )
    close(c.score(proxies.quantization_entropy).values[once], expected[once], 1e-3, 1e-4)


@both
def test_activation_mse(cases, name):
    c = cases[name]
    once = [r for r, blocks in enumerate(c.layers) if len(blocks) == 1]

    def error(row, bits):
        x = np.asarray(c.taps.taps[row].input, np.float32).ravel()
        grid = fit_input_grid(np.append(x, [x.min(), x.max()]), bits)
        return np.mean((np.asarray(fake_quantize(x, grid), np.float64) - x) ** 2)

    expected = np.array(table(c, error))
    variance = np.array([np.var(np.asarray(tap.input, np.float64)) for tap in c.taps])
    scores = c.score(proxies.activation_mse, activation_bits=(4,))
    close(scores.values[once], (expected / variance[:, None])[once], 1e-3)
    close(scores.activations[once][:, 0], (expected[:, 1] / variance)[once], 1e-3)
    close(c.score(proxies.activation_mse, relative=False).values[once], expected[once], 1e-3)


# --- measured ---------------------------------------------------------------------------------


@both
def test_measured_changes(cases, name):
    c = cases[name]
    x = c.x.astype(np.float64)
    with float64():
        plain = np.asarray(c.naive.logits(x))
        found = {}
        for row in range(len(c.taps)):
            for bits in BITS:
                changes = c.changes(row, bits)
                weights = {b: c.naive.weights[b] + change for b, change in changes.items()}
                found[row, bits] = np.asarray(c.naive.logits(x, weights))

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)

    def kl(z, temperature):
        p, q = softmax(plain / temperature), softmax(z / temperature)
        each = zip(p.ravel(), q.ravel(), strict=True)
        return sum(a * math.log(a / b) for a, b in each) / IMAGES

    def loss(z):
        return -np.mean([math.log(row[y]) for row, y in zip(softmax(z), c.labels, strict=True)])

    for temperature in (1.0, 4.0):
        expected = table(c, lambda r, b, t=temperature: kl(found[r, b], t))
        close(c.score(proxies.kl_delta, temperature=temperature), expected, 5e-3, 1e-5)
    expected = table(c, lambda r, b: np.mean((found[r, b] - plain) ** 2))
    close(c.score(proxies.logit_mse), expected, 2e-3, 1e-6)
    expected = table(c, lambda r, b: loss(found[r, b]) - loss(plain))
    assert np.min(expected) < 0  # to random labels rounding may help
    close(c.score(proxies.loss_delta), expected, 2e-3, 1e-5)


# --- curvature --------------------------------------------------------------------------------


def test_hessian_trace(cases):
    c = cases["mixer"]
    gauss_newton, hessian = np.zeros(len(c.taps)), np.zeros(len(c.taps))
    for row, block in zip(c.naive.rows, c.naive.weights, strict=True):
        gauss_newton[row] += c.naive.gauss_newton_trace(c.x, block)
        hessian[row] += np.trace(c.naive.hessian(cross_entropy, c.x, c.labels, block))
    sizes = np.array([c.naive.weights[block].size for block in c.first])
    for curvature, exact in (("gauss-newton", gauss_newton), ("hessian", hessian)):
        scores = c.score(
            proxies.hessian_trace, curvature=curvature, least=40, most=40, activation_bits=(4,)
        )
        trace, error = (np.array(scores.notes[k]) for k in ("trace", "standard_error"))
        assert (np.abs(trace - exact) <= 4 * error).all()
        np.testing.assert_allclose(scores.values, np.maximum(trace, 0) / sizes)
        assert scores.activations.shape == (len(c.taps), 1) and (scores.activations >= 0).all()
        whole = c.score(
            proxies.hessian_trace, curvature=curvature, least=40, most=40, average=False
        )
        np.testing.assert_allclose(whole.values, np.maximum(trace, 0))
    assert (gauss_newton > 4 * np.array(whole.notes["standard_error"])).any()
    alone = c.score(proxies.hessian_trace, least=1, most=1)
    assert alone.notes["standard_error"] == [None] * len(c.taps)


def test_hessian_trace_of_a_linear_network_costs_activations_what_it_should():
    # z = x W: in x the Gauss-Newton block is W (diag p - p p') W', the same at any batch.
    rng = np.random.default_rng(0)
    w = rng.normal(size=(6, 4)).astype(np.float32)
    model = from_function(lambda p, x: x @ p["w"], {"w": w}, (6,), name="linear")
    x = rng.normal(size=(9, 6)).astype(np.float32)
    scores = proxies.hessian_trace(model, x, activation_bits=(3,), least=400, most=400)
    z = x.astype(np.float64) @ w
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    traces = [np.trace(w @ (np.diag(q) - np.outer(q, q)) @ w.T) for q in p]
    flat = x.ravel()
    grid = fit_input_grid(np.append(flat, [flat.min(), flat.max()]), 3)
    error = np.mean((np.asarray(fake_quantize(flat, grid), np.float64) - flat) ** 2)
    # (tr / n) |dx|^2 = (tr / n) n mse
    assert scores.activations[0, 0] == pytest.approx(np.mean(traces) * error, rel=0.05)


def test_hessian_eigenvalue(cases):
    c = cases["mixer"]
    expected = []
    for block in c.first:
        values = np.linalg.eigvalsh(c.naive.hessian(cross_entropy, c.x, c.labels, block))
        expected.append(np.abs(values).max())
    scores = c.score(proxies.hessian_eigenvalue, tolerance=1e-5, most=60)
    np.testing.assert_allclose(scores.values, expected, rtol=0.03)
    np.testing.assert_array_equal(scores.values, np.abs(scores.notes["eigenvalue"]))
    sizes = [c.naive.weights[block].size for block in c.first]
    each = c.score(proxies.hessian_eigenvalue, tolerance=1e-5, most=60, per_weight=True)
    np.testing.assert_allclose(each.values, scores.values / sizes)


# --- synaptic flow ----------------------------------------------------------------------------


def test_synflow(cases):
    c = cases["small"]
    with float64():
        weights = {block: np.abs(w) for block, w in c.naive.weights.items()}
        ones = np.ones((1, *c.model.input_shape))
        no_bias = dict.fromkeys(weights, 0.0)
        slope = jax.grad(lambda w: c.naive.apply(w, ones, {}, no_bias).sum())(weights)
    expected = np.array([(weights[b] * np.asarray(slope[b])).sum() for b in c.first])
    scores = c.score(proxies.synflow)
    close(scores, expected / expected.max(), rtol=1e-5)
    np.testing.assert_allclose(scores.notes["log_score"], np.log(expected), rtol=1e-5)


def test_synflow_beyond_floating_point_numbers():
    # Whole numbers, so that Python computes the flow exactly: about 10^80.
    depth, width = 60, 3
    rng = np.random.default_rng(0)
    weights = [rng.integers(1, 9, (width, width)) for _ in range(depth)]
    signs = [rng.choice([-1, 1], (width, width)) for _ in range(depth)]
    params = {f"w{i:02}": (weights[i] * signs[i]).astype(np.float32) for i in range(depth)}
    params["bias"] = np.full(width, 5.0, np.float32)

    def apply(p, x):
        for i in range(depth):
            # A branch around every third layer: those flow less than the rest.
            y = jax.nn.relu(x @ p[f"w{i:02}"] + p["bias"])
            x = x + y if i % 3 == 0 else y
        return x

    model = from_function(apply, params, (width,), name="deep")
    states, outs = [[1] * width], []
    for i, w in enumerate(weights):
        y = [sum(states[-1][a] * int(w[a, b]) for a in range(width)) for b in range(width)]
        outs.append(y)
        states.append([s + t for s, t in zip(states[-1], y, strict=True)] if i % 3 == 0 else y)
    assert sum(states[-1]) > 10**60
    slope, flows = [1] * width, []
    for i in reversed(range(depth)):
        flows.append(sum(s * t for s, t in zip(slope, outs[i], strict=True)))
        w = weights[i]
        back = [sum(int(w[a, b]) * slope[b] for b in range(width)) for a in range(width)]
        slope = [s + t for s, t in zip(slope, back, strict=True)] if i % 3 == 0 else back
    logs = np.array([math.log(flow) for flow in reversed(flows)])
    scores = proxies.synflow(model)
    np.testing.assert_allclose(scores.notes["log_score"], logs, atol=1e-4)
    np.testing.assert_allclose(scores.values, np.exp(logs - logs.max()), rtol=1e-4)


def test_synflow_tells_nothing_of_a_chain_and_refuses_zeros():
    def apply(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    w = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    model = from_function(apply, {"a": np.eye(3, dtype=np.float32), "b": np.eye(3)}, (3,))
    with pytest.raises(ProxyqError, match=r"'synflow' gives 1 for every layer, from 'a' on"):
        proxies.synflow(model)
    nothing = from_function(apply, {"a": w, "b": np.zeros((3, 3), np.float32)}, (3,), name="zero")
    with pytest.raises(ProxyqError, match=r"no flow reaches the outputs of 'zero'"):
        proxies.synflow(nothing)


# --- from scores to costs ---------------------------------------------------------------------


def scores_of(values, cost="linear-bits", bits=(2, 3, 8)):
    layers = collect(Engine.build(mixer(), 1), None, (), bits).layers[: len(values)]
    return Scores(proxy="x", layers=layers, bits=bits, values=np.array(values), cost=cost)


ERRORS = WeightErrors(
    squared=np.array([[4.0, 1.0, 0.25], [9.0, 4.0, 1.0]]), energy=np.array([16.0, 4.0])
)
CLOSED = {
    "linear-bits": [[12.0, 10.0, 0.0], [30.0, 25.0, 0.0]],  # c (8 - b)
    "times-dw2": [[8.0, 2.0, 0.5], [45.0, 20.0, 5.0]],  # c |dW|^2
    "times-relative-dw2": [[0.5, 0.125, 0.03125], [11.25, 5.0, 1.25]],  # over 16 and 4
    "times-relative-dw": [[1.0, 0.5, 0.25], [7.5, 5.0, 2.5]],  # c |dW| / |W|
    "exponential": [[2 / 16, 2 / 64, 2 / 4**8], [5 / 16, 5 / 64, 5 / 4**8]],  # c 4^-b
}


@pytest.mark.parametrize("cost", list(COSTS))
def test_mappings_of_importances_have_closed_forms(cost):
    scores = scores_of([2.0, 5.0])
    np.testing.assert_allclose(as_cost(scores, cost, errors=ERRORS), CLOSED[cost], rtol=1e-12)
    own = scores_of([2.0, 5.0], cost=cost)
    np.testing.assert_array_equal(as_cost(own, errors=ERRORS), as_cost(scores, cost, errors=ERRORS))


def test_mappings_that_cannot_be_made():
    with pytest.raises(UsageError, match="needs `errors`"):
        as_cost(scores_of([2.0, 5.0]), "times-dw2")
    huge = WeightErrors(squared=np.full((2, 3), 1e200), energy=np.ones(2))
    with pytest.raises(ProxyqError, match=r"'x' with cost='times-dw2' overflows for layer 'embed'"):
        as_cost(scores_of([1e140, 1.0]), "times-dw2", errors=huge)
    with pytest.raises(UsageError, match="unknown cost 'times-dw3'"):
        as_cost(scores_of([2.0, 5.0], cost="times-dw3"), errors=ERRORS)
    # Of a layer of zeros nothing is lost by rounding.
    zeros = WeightErrors(squared=np.zeros((2, 3)), energy=np.zeros(2))
    assert not as_cost(scores_of([2.0, 5.0]), "times-relative-dw", errors=zeros).any()


@pytest.mark.parametrize(
    ("values", "shape", "message"),
    [
        ([1.0, np.inf, *[1.0] * 5], "layers", r"'given' gives inf for layer 'tokens'"),
        ([1.0, *[2.0] * 5, -np.inf], "layers", r"'given' gives -inf for layer 'tied'"),
        ([np.nan, *[1.0] * 6], "layers", r"'given' gives nan for layer 'embed'"),
        ([1e151, *[1.0] * 6], "layers", r"'given' gives 1e\+151 for layer 'embed'"),
        ([3.0] * 7, "layers", r"'given' gives 3 for every layer, from 'embed' on"),
        ([[2.0, 2.0]] * 7, "layers bits", r"'given' gives 2 for every layer"),
        ([1.0, -2.0, *[1.0] * 5], "layers", r"'given' gives -2 for layer 'tokens'"),
        ([[1.0, 2.0]] * 6 + [[1.0, np.nan]], "layers bits", r"layer 'tied' at 4 bits"),
        ([1.0, 2.0], "layers", r"'given' must return an array of shape \(7,\)"),
    ],
)
def test_scores_that_no_solver_can_use_name_proxy_and_layer(values, shape, message):
    def given(taps, *, key):
        """Given."""
        return np.array(values)

    proxy = make_proxy(given, needs=(), shape=shape, passes="none", reference="test")
    with pytest.raises(ProxyqError, match=message) as told:
        proxy(mixer(), bits=BITS)
    assert "\n" not in str(told.value)


def test_negative_costs_and_single_layers_are_fine():
    def given(taps, *, key):
        """Given."""
        return np.full((len(taps), len(taps.bits)), -1.0) * np.arange(1, len(taps) + 1)[:, None]

    proxy = make_proxy(given, needs=(), shape="layers bits", passes="none", reference="test")
    assert proxy(mixer(), bits=BITS).values.min() == -7
    one = from_function(lambda p, x: x @ p["w"], {"w": np.ones((2, 2), np.float32)}, (2,))
    assert proxy(one, bits=BITS).values.tolist() == [[-1.0, -1.0]]


# --- labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        (None, {"labels": "data"}, UsageError, "labels='data' needs labelled images"),
        (None, {"labels": "true"}, UsageError, "must be one of auto, data, .* got 'true'"),
        ([0, 1, 2, 3, 8], {}, ProxyqError, "label 8 is not one of the model's 8 classes"),
        ([0, 1, 2, 3, -1], {}, ProxyqError, "label -1 is not one of the model's 8 classes"),
        ([[0], [1], [2], [3], [4]], {}, ProxyqError, r"labels of shape \(5, 1\) do not fit"),
    ],
)
def test_labels_that_do_not_fit_are_told(cases, labels, options, error, message):
    c = cases["mixer"]
    with pytest.raises(error, match=message):
        proxies.score(c.model, [(proxies.snip, options)], c.x, labels=labels, bits=BITS)


def test_labels_go_with_the_loss(cases):
    c = cases["mixer"]
    with pytest.raises(UsageError, match="labels='probes' are for squared gradients alone"):
        proxy = make_proxy(
            lambda taps, *, key: taps.map(lambda t: t.gradient.sum()),
            name="odd", needs=("gradient",), passes="", reference="",
            fixed={"loss": "log-logit", "labels": "probes"},
        )  # fmt: skip
        proxy(c.model, c.x, bits=BITS)
    # Without labels, the network's own answers; with labels, those.
    with float64():
        best = np.asarray(c.naive.logits(c.x.astype(np.float64))).argmax(axis=-1)
    auto, data = (
        proxies.snip(c.model, c.x, labels=labels, bits=BITS).values for labels in (None, best)
    )
    np.testing.assert_array_equal(auto, data)
    assert not np.allclose(auto, c.score(proxies.snip).values)
