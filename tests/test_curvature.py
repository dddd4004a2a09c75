"""Hessian products, traces and eigenvalues against closed forms, float64 and finite differences."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import (
    Naive,
    cross_entropy,
    float64,
    gauss_newton_form,
    gelu_net,
    naive_gelu_net,
    naive_mixer,
    naive_small_net,
)
from networks import mixer, small_net

import proxyq.engine.objectives as objectives
from proxyq.checkpoint import Checkpoint
from proxyq.engine import Edit, Engine, single_layer_sweep
from proxyq.engine.backward import record
from proxyq.engine.blocks import along, blocks, first_blocks
from proxyq.engine.curvature import hessian_products, hutchinson, input_sizes, top_eigenvalues
from proxyq.engine.divergence import kl_divergence
from proxyq.engine.gradients import GRADIENT_NEEDS, record_gradients
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.function_import import from_function
from proxyq.quantize import Rounding

KEY = jax.random.key(3)
IMAGES, BATCH = 6, 4  # the last batch is padded
HESSIAN = {"key": KEY, "curvature": "hessian"}
GAUSS_NEWTON = {"key": KEY, "curvature": "gauss-newton"}


class Case(NamedTuple):
    """A network in the engine and by hand, with images and labels."""

    engine: Engine
    naive: Naive
    x: np.ndarray
    labels: np.ndarray

    @property
    def first(self) -> list[str]:
        """The name of each layer's first block in the hand-written network."""
        names = list(self.naive.weights)
        return [names[self.naive.rows.index(row)] for row in range(max(self.naive.rows) + 1)]

    @property
    def arguments(self) -> tuple:
        """What the engine's functions take."""
        aims = objectives.targets("data", self.labels)
        return self.engine, self.x, objectives.cross_entropy, aims

    @property
    def truth(self) -> tuple:
        """What the hand-written network's functions take."""
        return cross_entropy, self.x, self.labels


def case(build, naive, classes):
    model = build()
    rng = np.random.default_rng(5)
    x = rng.normal(size=(IMAGES, *model.input_shape)).astype(np.float32)
    engine = Engine.build(model, IMAGES, batch_size=BATCH)
    return Case(engine, naive(model), x, rng.integers(0, classes, IMAGES))


NETWORKS = {
    "small": (small_net, naive_small_net, 10),
    "mixer": (mixer, naive_mixer, 8),
    "gelu": (gelu_net, naive_gelu_net, 4),
}


@pytest.fixture(scope="module")
def cases():
    return {name: case(*parts) for name, parts in NETWORKS.items()}


class Hessians(dict):
    """Diagonal blocks as matrices, in float64: of some layers where the network is large.

    Each network's are computed when they are first asked for: the mixer's take half a minute.
    """

    def __init__(self, cases):
        super().__init__()
        self.cases = cases

    def __missing__(self, name):
        c = self.cases[name]
        wanted = list(c.naive.weights)
        if name == "small":
            wanted = ["blocks.0.depthwise", "blocks.1.shortcut", "head"]
        self[name] = {block: c.naive.hessian(*c.truth, block) for block in wanted}
        return self[name]


@pytest.fixture(scope="module")
def hessians(cases):
    return Hessians(cases)


DEAR = pytest.param("mixer", marks=pytest.mark.slow)


every = pytest.mark.parametrize(
    "name",
    [DEAR if name == "mixer" else name for name in NETWORKS],
)


def directions_of(c, seed=0):
    rng = np.random.default_rng(seed)
    return {row: rng.normal(size=c.naive.weights[block].shape) for row, block in enumerate(c.first)}


def close(actual, expected, tolerance=2e-5):
    """Equal up to `tolerance` of the norm."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


# --- quadratic losses: everything is known ---------------------------------------------------


def quadratic(matrix):
    """A network whose logits are its weight, and the loss `1/2 z' A z`, whose Hessian is A."""
    a = jnp.asarray(matrix, jnp.float32)
    w = np.random.default_rng(0).normal(size=(1, len(matrix))).astype(np.float32)
    model = from_function(lambda p, x: x @ p["w"], {"w": w}, (1,), name="quadratic")

    def objective(z: Any, targets: Any) -> Any:
        del targets
        return 0.5 * jnp.sum((z @ a) * z, axis=-1)

    x = np.ones((5, 1), np.float32)
    return Engine.build(model, 5, batch_size=2), x, objective, objectives.targets("predicted")


def symmetric(size, seed=0):
    a = np.random.default_rng(seed).normal(size=(size, size))
    return (a + a.T) / 2


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_the_trace_of_a_diagonal_hessian_is_exact_from_any_probe(curvature):
    toy = quadratic(np.diag([3.0, -1.5, 0.25, 8.0]))
    found = hutchinson(*toy, key=KEY, curvature=curvature, probes="layer", least=4, most=40)
    assert found.trace[0] == pytest.approx(9.75, rel=1e-6)
    assert found.error[0] <= 1e-6 and found.probes[0] == 4


@pytest.mark.parametrize(
    "eigenvalues", [(6.0, 1.0, -2.0, 0.5), (1.0, -7.0, 2.0, 3.0)], ids=["positive", "negative"]
)
def test_power_iteration_finds_the_eigenvalue_of_largest_magnitude(eigenvalues):
    basis, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))
    toy = quadratic(basis @ np.diag(eigenvalues) @ basis.T)
    found = top_eigenvalues(*toy, key=KEY, tolerance=1e-7, most=100)
    assert found.value[0] == pytest.approx(max(eigenvalues, key=abs), rel=1e-4)
    assert 3 <= found.iterations[0] < 100 and found.change[0] <= 1e-7


def test_standard_errors_are_honest():
    a = symmetric(6)
    toy = quadratic(a)
    off = a - np.diag(np.diag(a))
    expected = np.sqrt(2 * np.sum(off**2) / 24)  # Hutchinson 1990
    runs = [
        hutchinson(*toy, **{**HESSIAN, "key": jax.random.key(s)}, least=24, most=24)
        for s in range(60)
    ]
    wrong = np.array([run.trace[0] - np.trace(a) for run in runs])
    claimed = np.array([run.error[0] for run in runs])
    # Of 60 means: their spread has a relative error of 1 / sqrt(120), 9 %.
    assert np.sqrt(np.mean(wrong**2)) == pytest.approx(expected, rel=0.3)
    assert abs(wrong.mean()) <= 3 * expected / np.sqrt(60)
    assert np.sqrt(np.mean(claimed**2)) == pytest.approx(expected, rel=0.1)


def test_the_trace_of_a_linear_layer_under_squared_error_has_a_closed_form():
    rng = np.random.default_rng(0)
    number, fan_in, outputs = 7, 5, 3
    model = from_function(
        lambda p, x: x @ p["w"], {"w": rng.normal(size=(fan_in, outputs)).astype(np.float32)}, (5,)
    )

    def squared_error(z: Any, targets: Any) -> Any:
        return jnp.sum((z - jax.nn.one_hot(targets, outputs)) ** 2, axis=-1)

    aims = objectives.targets("data", rng.integers(0, outputs, number))
    engine = Engine.build(model, number, batch_size=4)
    x = rng.normal(size=(number, fan_in)).astype(np.float32)
    # H = 2/N X'X, once for each output
    expected = 2 / number * np.sum(x.astype(np.float64) ** 2) * outputs
    found = hutchinson(engine, x, squared_error, aims, **HESSIAN, least=200, most=200)
    assert abs(found.trace[0] - expected) <= 4 * found.error[0]
    # Columns of X that are orthogonal make H diagonal: then one probe is exact.
    x, _ = np.linalg.qr(x)
    expected = 2 / number * np.sum(x.astype(np.float64) ** 2) * outputs
    found = hutchinson(engine, x, squared_error, aims, **HESSIAN, least=2, most=2)
    assert found.trace[0] == pytest.approx(expected, rel=1e-5)
    top = top_eigenvalues(engine, x, squared_error, aims, key=KEY)
    assert top.value[0] == pytest.approx(2 / number, rel=1e-5)  # X'X = 1


@pytest.mark.parametrize("axes", [(), (1,)], ids=["[images]", "[images, 1]"])
def test_a_single_logit_has_the_hessian_of_logistic_regression(axes):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(4, *axes)).astype(np.float32)
    model = from_function(lambda p, x: x @ p["w"], {"w": w}, (4,))
    x, labels = rng.normal(size=(6, 4)).astype(np.float32), rng.integers(0, 2, 6)
    engine = Engine.build(model, 6, batch_size=4)
    arguments = (engine, x, objectives.cross_entropy, objectives.targets("data", labels))
    p = 1 / (1 + np.exp(-(x.astype(np.float64) @ w).reshape(-1)))
    hessian = (x.T * (p * (1 - p))) @ x / 6
    v = rng.normal(size=w.shape)
    found = hessian_products(*arguments, {0: v})[0]
    close(found.reshape(-1), hessian @ v.reshape(-1))
    for curvature in ("hessian", "gauss-newton"):
        trace = hutchinson(*arguments, key=KEY, curvature=curvature, least=100, most=100)
        assert abs(trace.trace[0] - np.trace(hessian)) <= 4 * trace.error[0] + 1e-6
        assert trace.error[0] < 0.2 * np.trace(hessian)


def test_predictions_for_tokens_count_for_their_image_on_average():
    rng = np.random.default_rng(0)
    tokens, outputs = 3, 4
    w = rng.normal(size=(5, outputs)).astype(np.float32)
    model = from_function(lambda p, x: x @ p["w"], {"w": w}, (tokens, 5))
    x = rng.normal(size=(5, tokens, 5)).astype(np.float32)
    labels = rng.integers(0, outputs, (5, tokens))
    aims = objectives.targets("data", labels)
    hessian = np.zeros((5, outputs, 5, outputs))
    for row in x.reshape(-1, 5).astype(np.float64):
        p = np.exp(row @ w) / np.exp(row @ w).sum()
        hessian += np.einsum("i,kl,j->ikjl", row, np.diag(p) - np.outer(p, p), row) / 15
    v = rng.normal(size=w.shape)
    arguments = (Engine.build(model, 5, batch_size=2), x, objectives.cross_entropy, aims)
    close(hessian_products(*arguments, {0: v})[0], np.einsum("ikjl,jl->ik", hessian, v))
    exact = np.einsum("ikik->", hessian)
    for options in (HESSIAN, {**GAUSS_NEWTON, "probes": "layer"}, GAUSS_NEWTON):
        found = hutchinson(*arguments, **options, least=60, most=60)
        assert abs(found.trace[0] - exact) <= 4 * found.error[0]
        assert found.error[0] < 0.1 * exact


# --- products against float64 ---------------------------------------------------------------


@every
def test_hand_written_networks_are_the_engine_s(cases, name):
    c = cases[name]
    with float64():
        close(c.engine.logits(c.x), c.naive.logits(c.x.astype(np.float64)))
    for block, weight in zip(blocks(c.engine), c.naive.weights.values(), strict=True):
        close(c.engine.weight(block.sites[0]), weight, 1e-6)
    assert tuple(block.layer for block in blocks(c.engine)) == c.naive.rows


@every
def test_products_of_single_layers(cases, name):
    c = cases[name]
    directions = directions_of(c)
    found = hessian_products(*c.arguments, directions)
    assert list(found) == list(range(len(c.first)))
    for row, block in enumerate(c.first):
        expected = c.naive.products(*c.truth, {block: directions[row]})[block]
        close(found[row], expected)


@every
def test_joint_products_multiply_by_the_whole_hessian(cases, name):
    c = cases[name]
    directions = directions_of(c)
    found = hessian_products(*c.arguments, directions, joint=True)
    whole = c.naive.products(*c.truth, {b: directions[r] for r, b in enumerate(c.first)})
    alone = hessian_products(*c.arguments, directions)
    for row, block in enumerate(c.first):
        close(found[row], whole[block])
        assert np.linalg.norm(found[row] - alone[row]) > 1e-2 * np.linalg.norm(found[row])


@every
def test_products_equal_finite_differences_of_the_gradient(cases, name):
    c = cases[name]
    row = len(c.first) // 2
    v, h = directions_of(c)[row], 1e-6
    after, before = (c.naive.gradient(*c.truth, c.first[row], step * v) for step in (h, -h))
    close(hessian_products(*c.arguments, {row: v})[row], (after - before) / (2 * h), 1e-4)


@every
def test_gauss_newton_forms_of_each_image_and_direction(cases, name):
    c = cases[name]
    engine, _, objective, aims = c.arguments
    for batch, count in list(engine.chunks(c.x))[:1]:
        tape = record(engine, batch, count, objective, aims)
        for row, block in enumerate(first_blocks(engine)):
            name = c.first[row]
            v = np.random.default_rng(row).normal(size=(2, *c.naive.weights[name].shape))
            moved = tape.tangents(along(block, jnp.asarray(v, jnp.float32)))
            for index in range(2):
                close(
                    moved.gauss_newton_forms()[index], c.naive.gauss_newton(batch, {name: v[index]})
                )


@pytest.mark.parametrize("name", ["small", DEAR, "gelu"])
def test_products_by_what_layers_read(cases, name):
    c = cases[name]
    engine, _, objective, aims = c.arguments
    batch, count = list(engine.chunks(c.x))[1]  # two images, and two that only fill up
    tape = record(engine, batch, count, objective, aims, BATCH)
    sites = {block: engine.network.sites_of(engine.network.names[row])[0]
             for row, block in enumerate(c.first)}  # fmt: skip
    if name == "gelu":
        sites = {f"{block} 0" if block == "loop" else block: site for block, site in sites.items()}
    rng = np.random.default_rng(0)
    v = {block: rng.normal(size=tape.x(site).shape) for block, site in sites.items()}
    given = {sites[block]: jnp.asarray(v[block], jnp.float32)[None] for block in sites}
    found = tape.tangents(given, "inputs").hessian()
    x, labels = c.x[BATCH:], c.labels[BATCH:]
    real = {block: value[:count] for block, value in v.items()}
    with float64():

        def total(moved):
            return cross_entropy(c.naive.logits(x, moved=moved), labels).sum()

        zero = jax.tree.map(jnp.zeros_like, real)
        expected = jax.jvp(jax.grad(total), (zero,), (real,))[1]
    for block, site in sites.items():
        product = np.asarray(found[site][0])
        close(product[:count], expected[block])
        assert not product[count:].any()  # padding has no loss


# --- traces and eigenvalues --------------------------------------------------------------------


def exact_traces(c, found):
    """Layers, their traces, and the variance of one form: twice the squares off the diagonal."""
    trace, variance = np.zeros(len(c.first)), np.zeros(len(c.first))
    rows = []
    for row, block in zip(c.naive.rows, c.naive.weights, strict=True):
        if block in found:
            h = found[block]
            trace[row] += np.trace(h)
            variance[row] += 2 * (np.sum(h**2) - np.sum(np.diag(h) ** 2))
            rows.append(row)
    rows = list(dict.fromkeys(rows))
    return rows, trace[rows], variance[rows]


@pytest.mark.parametrize("name", [DEAR, "gelu"])
def test_one_hot_products_give_the_diagonal(cases, hessians, name):
    c = cases[name]
    row, block = len(c.first) - 1, c.first[-1]
    weight = c.naive.weights[block]
    diagonal = []
    for index in range(0, weight.size, 3):
        v = np.zeros(weight.size)
        v[index] = 1
        diagonal.append(hessian_products(*c.arguments, {row: v.reshape(weight.shape)})[row])
    found = [product.ravel()[3 * i] for i, product in enumerate(diagonal)]
    close(found, np.diag(hessians[name][block])[::3])


@pytest.mark.parametrize("name", [pytest.param("small", marks=pytest.mark.slow), DEAR, "gelu"])
def test_traces_meet_the_exact_ones_within_their_standard_errors(cases, hessians, name):
    c = cases[name]
    probes = 20 if name == "small" else 40
    found = hutchinson(*c.arguments, **HESSIAN, least=probes, most=probes)
    rows, trace, variance = exact_traces(c, hessians[name])
    expected = np.sqrt(variance / probes)
    assert (np.abs(found.trace[rows] - trace) <= 4 * expected + 1e-4 * np.abs(trace)).all()
    assert (found.error[rows] <= 2 * expected).all() and (found.error[rows] >= expected / 2).all()
    assert (found.probes == probes).all()


def test_joint_probes_are_unbiased_and_noisier(cases, hessians):
    c = cases["gelu"]
    probes = 300
    found = hutchinson(*c.arguments, **HESSIAN, probes="joint", least=probes, most=probes)
    _, trace, variance = exact_traces(c, hessians["gelu"])
    assert (np.abs(found.trace - trace) <= 4 * found.error).all()
    assert (found.error >= 0.9 * np.sqrt(variance / probes)).all()
    alone = hutchinson(*c.arguments, **HESSIAN, least=2, most=2)
    joint = hutchinson(*c.arguments, **HESSIAN, probes="joint", least=2, most=2)
    assert not np.allclose(alone.trace, joint.trace, rtol=1e-3)


@pytest.mark.parametrize("name", [pytest.param("small", marks=pytest.mark.slow), DEAR, "gelu"])
def test_probes_on_the_outputs_are_unbiased(cases, hessians, name):
    c = cases[name]
    exact = np.zeros(len(c.first))
    for row, block in zip(c.naive.rows, c.naive.weights, strict=True):
        if block in hessians[name]:
            exact[row] += c.naive.gauss_newton_trace(c.x, block)
    rows = np.flatnonzero(exact)
    found = hutchinson(*c.arguments, **GAUSS_NEWTON, probes="output", least=60, most=60)
    assert (np.abs(found.trace - exact) <= 4 * found.error + 1e-6)[rows].all()
    assert (found.error < 0.2 * exact)[rows].all()
    # The default, and each image's own signs whatever the batches are.
    if name == "small":  # another shape to compile
        return
    auto = hutchinson(*c.arguments, key=KEY, least=2, most=2)
    whole = Engine.build(c.engine.network.model, IMAGES, batch_size=IMAGES)
    again = hutchinson(whole, *c.arguments[1:], **GAUSS_NEWTON, probes="output", least=2, most=2)
    np.testing.assert_allclose(auto.trace, again.trace, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("small", [*range(9)]),  # ReLU alone
        ("mixer", [4, 5, 6]),  # query and key act through a softmax, and what lies before them too
        ("gelu", [2]),  # the last layer is linear
    ],
)
def test_gauss_newton_is_the_hessian_where_the_network_is_piecewise_linear(cases, name, same):
    c = cases[name]
    hessian, gauss_newton = (
        hutchinson(*c.arguments, key=KEY, curvature=curvature, probes="layer", least=2, most=2)
        for curvature in ("hessian", "gauss-newton")
    )
    other = [row for row in range(len(c.first)) if row not in same]
    np.testing.assert_allclose(hessian.trace[same], gauss_newton.trace[same], rtol=2e-4)
    assert (np.abs(hessian.trace - gauss_newton.trace) > 1e-3 * gauss_newton.trace)[other].all()
    assert (gauss_newton.trace >= 0).all()


@pytest.mark.parametrize(
    ("curvature", "probes"),
    [("hessian", "layer"), ("gauss-newton", "layer"), ("gauss-newton", "output")],
)
@pytest.mark.parametrize("name", [DEAR, "gelu"])
def test_traces_by_what_layers_read(cases, name, curvature, probes):
    c = cases[name]
    number = 60
    found = hutchinson(
        *c.arguments,
        key=KEY,
        of="inputs",
        curvature=curvature,
        probes=probes,
        least=number,
        most=number,
    )
    reads = [*c.naive.weights] if name == "mixer" else ["first", "loop 0", "loop 1", "last"]
    rows = c.naive.rows if name == "mixer" else (0, 1, 1, 2)
    graph = c.engine.network.graph
    operands = (graph.main[s.position].invars[1 - s.operand] for s in c.engine.network.sites)
    shapes = [var.aval.shape[1:] for var in operands]
    zero = {read: np.zeros((IMAGES, *shape)) for read, shape in zip(reads, shapes, strict=True)}
    expected, sizes = np.zeros(len(c.first)), np.zeros(len(c.first))
    with float64():
        x = np.asarray(c.x, np.float64)

        def slope(m):
            return jax.grad(lambda m: cross_entropy(c.naive.logits(x, moved=m), c.labels).mean())(m)

        @jax.jit
        def along_one(v):
            z, dz = jax.jvp(lambda m: c.naive.logits(x, moved=m), (zero,), (v,))
            return z, dz, jax.jvp(slope, (zero,), (v,))[1]

        for read, row, shape in zip(reads, rows, shapes, strict=True):
            sizes[row] += math.prod(shape)
            for index in np.ndindex(shape):
                # One entry in every image at once: images do not act on each other.
                v = {other: np.zeros_like(value) for other, value in zero.items()}
                v[read][:, *index] = 1
                z, dz, product = along_one(v)
                if curvature == "hessian":
                    expected[row] += float(np.asarray(product[read])[:, *index].sum())
                else:
                    expected[row] += gauss_newton_form(z, dz).mean()
    assert (np.abs(found.trace - expected) <= 4 * found.error + 1e-5).all()
    assert (found.error < 0.5 * np.abs(expected)).sum() >= 2
    np.testing.assert_array_equal(input_sizes(c.engine), sizes)


@pytest.mark.parametrize("name", [DEAR, "gelu"])
def test_top_eigenvalues_of_blocks(cases, hessians, name):
    c = cases[name]
    found = top_eigenvalues(*c.arguments, key=KEY, tolerance=1e-5, most=80)
    for row, block in enumerate(c.first):
        values = np.linalg.eigvalsh(hessians[name][block])
        top = values[np.argmax(np.abs(values))]
        assert found.value[row] == pytest.approx(top, rel=0.03), block
        assert abs(found.value[row]) <= abs(top) * (1 + 1e-4)


@pytest.mark.parametrize("name", [DEAR, "gelu"])
def test_the_size_of_batches_changes_nothing_but_rounding(cases, name):
    c = cases[name]
    _, *rest = c.arguments
    results = []
    for engine in (c.engine, Engine.build(c.engine.network.model, IMAGES, batch_size=IMAGES)):
        trace = hutchinson(engine, *rest, **HESSIAN, least=2, most=2)
        joint = hutchinson(engine, *rest, **HESSIAN, least=2, most=2, probes="joint")
        top = top_eigenvalues(engine, *rest, key=KEY, most=3)
        results.append(np.stack([trace.trace, joint.trace, top.value]))
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-6)


# --- other networks -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_torch_network_with_norms_gelu_and_pooling():
    torch = pytest.importorskip("torch")
    from proxyq.model.torch_import import from_torch

    nn = torch.nn
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.GELU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.GELU(),
        nn.Flatten(), nn.LayerNorm(45), nn.Linear(45, 4),
    ).eval()  # fmt: skip
    norm = module[1]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.2, 0.8, 1.5, -0.7, 1.0]))
        norm.running_var.uniform_(0.5, 1.5)
        norm.running_mean.normal_(0, 0.2)
    model = from_torch(module, (2, 6, 6))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 2, 6, 6)).astype(np.float32)
    labels = rng.integers(0, 4, 5)
    engine = Engine.build(model, 5, batch_size=3)
    aims = objectives.targets("data", labels)
    names = ["0", "4", "6", "10"]
    assert list(engine.network.names) == names

    module = module.double()
    scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()[:, None, None, None]
    plain = {n: p.detach() for n, p in module.named_parameters() if n[: n.index(".")] in names}
    weights = {n: p for n, p in plain.items() if n.endswith("weight")}
    inputs, aimed = torch.tensor(x, dtype=torch.float64), torch.tensor(labels)

    def loss(some):
        logits = torch.func.functional_call(module, some, (inputs,))
        return nn.functional.cross_entropy(logits, aimed)

    # The network's own weight times the batch norm's scale is what the engine sees: V / s and
    # H / s are the direction and the product in the module's terms.
    directions, given = {}, {}
    for row, name in enumerate(weights):
        v = torch.tensor(rng.normal(size=weights[name].shape))
        given[name] = v / scale if row == 0 else v
        where = engine.network.sites[row]
        columns = v.numpy().reshape(len(v), -1).T
        directions[row] = np.asarray(where.from_columns(columns, engine.weight(row).shape))

    def columns_of(row, product):
        return np.asarray(engine.network.sites[row].columns(jnp.asarray(product)))

    arguments = (engine, x, objectives.cross_entropy, aims, directions)
    joint, alone = hessian_products(*arguments, joint=True), hessian_products(*arguments)
    _, whole = torch.func.jvp(torch.func.grad(loss), (weights,), (given,))
    for row, name in enumerate(weights):
        zero = {other: torch.zeros_like(w) for other, w in weights.items()}
        _, own = torch.func.jvp(torch.func.grad(loss), (weights,), ({**zero, name: given[name]},))
        for found, expected in ((joint, whole), (alone, own)):
            truth = expected[name] / scale if row == 0 else expected[name]
            close(
                columns_of(row, found[row]), truth.detach().numpy().reshape(len(truth), -1).T, 5e-5
            )


def test_a_network_in_bfloat16_is_close_to_the_same_in_float64():
    def apply(p, x):
        h = jnp.tanh(x.astype(jnp.bfloat16) @ p["a"].astype(jnp.bfloat16))
        return (h @ p["b"].astype(jnp.bfloat16)).astype(jnp.float32)

    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(8, 6)), "b": rng.normal(size=(6, 4))}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    model = from_function(apply, params, (8,), name="half")
    x, labels = rng.normal(size=(6, 8)).astype(np.float32), rng.integers(0, 4, 6)
    naive = Naive(
        weights={name: value.astype(np.float64) for name, value in params.items()},
        rows=(0, 1),
        apply=lambda w, x, moved: jnp.tanh(x @ w["a"]) @ w["b"],
    )
    engine = Engine.build(model, 6, batch_size=4)
    arguments = (engine, x, objectives.cross_entropy, objectives.targets("data", labels))
    v = {row: rng.normal(size=value.shape) for row, value in enumerate(params.values())}
    for row, block in enumerate(params):
        expected = naive.products(cross_entropy, x, labels, {block: v[row]})[block]
        close(hessian_products(*arguments, {row: v[row]})[row], expected, 0.05)
    trace = hutchinson(*arguments, **HESSIAN, least=40, most=40)
    exact = [np.trace(naive.hessian(cross_entropy, x, labels, block)) for block in params]
    assert (np.abs(trace.trace - exact) <= 4 * trace.error + 0.05 * np.abs(exact)).all()


def test_a_layer_that_the_loss_does_not_see_has_no_curvature():
    def apply(p, x):
        return x @ p["seen"], x @ p["unseen"]

    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=(4, 3)).astype(np.float32) for k in ("seen", "unseen")}
    model = from_function(apply, params, (4,), name="two-heads")
    engine = Engine.build(model, 3)
    x = rng.normal(size=(3, 4)).astype(np.float32)
    arguments = (engine, x, objectives.cross_entropy, objectives.targets("predicted"))
    for options in (
        HESSIAN,
        {**HESSIAN, "of": "inputs"},
        {**HESSIAN, "probes": "joint"},
        GAUSS_NEWTON,
        {**GAUSS_NEWTON, "of": "inputs"},
        {**GAUSS_NEWTON, "probes": "layer"},
    ):
        found = hutchinson(*arguments, least=2, most=4, **options)
        assert found.trace[0] > 0 and found.trace[1] == 0
    found = top_eigenvalues(*arguments, key=KEY)
    assert found.value[0] > 0 and found.value[1] == 0


# --- when to stop ---------------------------------------------------------------------------


def test_probes_stop_as_soon_as_the_error_is_within_tolerance(cases):
    c = cases["mixer"]
    least, most, tolerance = 3, 24, 0.25
    arguments = {**HESSIAN, "least": least, "tolerance": tolerance}
    found = hutchinson(*c.arguments, most=most, **arguments)
    assert len(set(found.probes)) > 1 and least <= found.probes.min() < most
    sizes = np.zeros(len(c.first))
    np.add.at(sizes, list(c.naive.rows), [w.size for w in c.naive.weights.values()])
    # All that stopped early are close enough: to their own trace, or to a share of the largest.
    floor = 0.01 * max(np.abs(found.trace / sizes)) * sizes
    close_enough = found.error <= tolerance * np.maximum(np.abs(found.trace), floor)
    assert close_enough[found.probes < most].all()
    # And before its last probe a layer was not. The first draws are the same at every limit.
    for number in set(found.probes) - {least}:
        before = hutchinson(*c.arguments, most=number - 1, **arguments)
        for row in np.flatnonzero((found.probes == number) & (before.probes == number - 1)):
            assert before.error[row] > tolerance * np.abs(before.trace[row])


def test_limits_on_probes_hold():
    toy = quadratic(symmetric(6))
    assert hutchinson(*toy, **HESSIAN, tolerance=0.0, least=2, most=9).probes[0] == 9
    assert hutchinson(*toy, **HESSIAN, tolerance=100.0, least=5, most=9).probes[0] == 5
    assert top_eigenvalues(*toy, key=KEY, tolerance=0.0, most=7).iterations[0] == 7
    assert top_eigenvalues(*toy, key=KEY, tolerance=100.0, least=4).iterations[0] == 4
    # One draw has no standard error, so it never meets a tolerance.
    assert hutchinson(*toy, **HESSIAN, tolerance=1e-3, least=1, most=9).probes[0] == 9
    assert hutchinson(*toy, **HESSIAN, least=1, most=1).error[0] == np.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "biases"}, "`of` must be one of weights, inputs, got 'biases'"),
        ({"curvature": "fisher"}, "`curvature` must be one of"),
        ({"probes": "all"}, "`probes` must be one of"),
        ({"least": 0}, "`least` must be from 1"),
        ({"least": 9, "most": 8}, r"to `most` \(8\), got 9"),
        ({"probes": "joint", "curvature": "gauss-newton"}, "are for curvature='hessian'"),
        ({"probes": "output", "curvature": "gauss-newton"}, "of the cross-entropy"),
        ({"probes": "output", "curvature": "hessian"}, "are for curvature='gauss-newton'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        hutchinson(*quadratic(np.eye(2)), **{**HESSIAN, **options})


def test_a_loss_that_is_not_finite_names_the_image():
    engine, x, objective, aims = quadratic(np.eye(2))
    x = x.copy()
    x[3] = np.nan
    with pytest.raises(ProxyqError, match="the loss of image 3 is nan"):
        hutchinson(engine, x, objective, aims, **HESSIAN)


# --- killed and resumed ---------------------------------------------------------------------


class Killed(Exception):
    """Raised where a run is to end."""


def long_computations(c):
    """Functions of a checkpoint and of progress, each of which gives arrays."""
    engine, x, objective, aims = c.arguments

    def traces(of, curvature="hessian", probes="layer"):
        def run(**kept):
            found = hutchinson(
                engine, x, objective, aims, key=KEY, of=of, curvature=curvature, probes=probes,
                least=3, most=5, **kept,
            )  # fmt: skip
            return [found.trace, found.error, found.probes]

        return run

    def eigenvalues(**kept):
        found = top_eigenvalues(engine, x, objective, aims, key=KEY, most=4, **kept)
        return [found.value, found.change, found.iterations]

    def gradients(**kept):
        needs = tuple(GRADIENT_NEEDS)
        found = record_gradients(
            engine, x, needs, (2, 4), objective, aims, rounding=Rounding(), **kept
        )
        return [layer[need] for layer in found for need in needs]

    def sweep(progress, **kept):
        def measure(reference, logits, start):
            progress("measure", 0, 0)
            return kl_divergence(reference, logits)

        edits = {
            name: [{i: Edit(weight=engine.weight(i) * f) for i in engine.network.sites_of(name)}
                   for f in (0.5, 0.9)]
            for name in engine.network.names
        }  # fmt: skip
        return [single_layer_sweep(engine, x, edits, measure, **kept)]

    return {
        "traces": traces("weights"),
        "joint traces": traces("weights", probes="joint"),
        "traces from outputs": traces("weights", "gauss-newton", "output"),
        "traces of inputs": traces("inputs", "gauss-newton", "output"),
        "eigenvalues": eigenvalues,
        "gradients": gradients,
        "sweep": sweep,
    }


@pytest.mark.parametrize(
    "which",
    [
        "traces",
        "joint traces",
        "traces from outputs",
        "traces of inputs",
        "eigenvalues",
        "gradients",
        "sweep",
    ],
)
def test_a_run_that_was_killed_ends_in_the_same_bytes(cases, which, tmp_path):
    run = long_computations(cases["mixer"])[which]
    steps: list[int] = []
    whole = run(progress=lambda stage, done, total: steps.append(done))
    assert len(steps) > 1
    together = 2 if which == "sweep" else 1  # alternatives of a layer, kept together
    for number, kill_at in enumerate(dict.fromkeys([together + 1, len(steps)])):
        checkpoint = Checkpoint(tmp_path / str(number), every=0)
        left = kill_at

        def kill(stage, done, total):
            nonlocal left
            left -= 1
            if not left:
                raise Killed

        with pytest.raises(Killed):
            run(checkpoint=checkpoint, progress=kill)
        again: list[int] = []
        resumed = run(
            checkpoint=checkpoint,
            progress=lambda stage, done, total, again=again: again.append(done),
        )
        # What was saved before the kill is not computed again.
        assert len(again) == len(steps) - (kill_at - 1) // together * together
        for one, other in zip(whole, resumed, strict=True):
            one, other = np.asarray(one), np.asarray(other)
            assert one.dtype == other.dtype and one.tobytes() == other.tobytes()
