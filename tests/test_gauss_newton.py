"""The Gauss-Newton couplings against derivatives of the whole network, and finite steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxyq.checkpoint import Checkpoint
from proxyq.engine import Edit, Engine
from proxyq.engine.alternatives import choices
from proxyq.engine.divergence import kl_divergence
from proxyq.engine.gauss_newton import gauss_newton as couplings
from proxyq.errors import UsageError
from proxyq.model.function_import import from_function
from proxyq.proxies import gauss_newton
from proxyq.quantize import quantize_columns

BITS = (2, 3, 5)


def apply(params, x):
    """A residual step whose weight is used twice, then a head."""
    h = jax.nn.relu(x @ params["stem.weight"] + params["bias"])
    h = h + jnp.tanh(h @ params["twice.weight"])
    h = h + jax.nn.relu(h @ params["twice.weight"] - 0.1)
    return h @ params["head.weight"]


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)
    shapes = {"stem.weight": (5, 8), "twice.weight": (8, 8), "head.weight": (8, 4), "bias": (8,)}
    params = {k: rng.normal(0, 0.6, s).astype(np.float32) for k, s in shapes.items()}
    model = from_function(apply, params, (5,), name="twice")
    return model, params, rng.normal(size=(12, 5)).astype(np.float32)


def naive(params, x, bits, temperature=1.0):
    """`[choices, choices]` by `jax.jvp` of the whole network and an explicit Hessian."""
    tangents = []
    for name in ("stem.weight", "twice.weight", "head.weight"):
        for b in bits:
            moved = {k: jnp.zeros_like(v) for k, v in params.items()}
            moved[name] = quantize_columns(params[name], b) - params[name]
            tangents.append(jax.jvp(lambda p: apply(p, x), (params,), (moved,))[1])
    u = np.asarray(tangents, np.float64) / temperature
    p = np.asarray(jax.nn.softmax(apply(params, x) / temperature), np.float64)
    hessian = np.stack([np.diag(row) - np.outer(row, row) for row in p])
    return 0.5 * np.einsum("ank,nkl,bnl->ab", u, hessian, u) / len(x)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_the_curvature_along_the_choices(network, temperature):
    model, params, x = network
    scores = gauss_newton(model, x, bits=BITS, temperature=temperature)
    exact = naive(params, x, BITS, temperature)
    np.testing.assert_allclose(scores.coupling, exact, rtol=1e-4, atol=1e-6 * exact.max())
    np.testing.assert_allclose(scores.values.ravel(), np.diag(exact), rtol=1e-4)
    assert np.linalg.eigvalsh(scores.coupling).min() > -1e-9 * exact.max()


def test_batches_do_not_matter(network):
    model, _, x = network
    engine = Engine.build(model, len(x), batch_size=5, tape=True)
    found = couplings(engine, x, choices(engine, x, BITS))
    whole = gauss_newton(model, x, bits=BITS).coupling
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("correction", ["none", "weights", "statistics"])
def test_small_steps_of_corrected_layers_cost_what_is_predicted(network, correction):
    """KL of a hundredth of each step, alone and together, is a ten-thousandth of the curvature."""
    model, _, x = network
    engine = Engine.build(model, len(x), tape=True)
    own = choices(engine, x, BITS, correction=correction)
    part = 0.01

    def shortened(site, edit):
        weight = np.asarray(engine.weight(site), np.float64)
        step = part * (np.asarray(edit.weight, np.float64) - weight)
        offset = None if edit.offset is None else part * edit.offset
        return Edit(weight=jnp.asarray(weight + step, jnp.float32), offset=offset)

    matrix = gauss_newton(model, x, bits=BITS, correction=correction).coupling
    reference, rng = engine.logits(x), np.random.default_rng(0)
    for _ in range(5):
        plan = rng.integers(0, len(BITS), 3)
        edits = {
            site: shortened(site, edit)
            for name, k in zip(engine.network.names, plan, strict=True)
            for site, edit in own[name][k].items()
        }
        rows = np.arange(3) * len(BITS) + plan
        predicted = part**2 * matrix[np.ix_(rows, rows)].sum()
        true = kl_divergence(reference, engine.logits(x, edits)).mean()
        assert true == pytest.approx(predicted, rel=0.05)


def test_rounded_inputs_are_choices_too(network):
    model, _, x = network
    scores = gauss_newton(model, x, bits=(9,), activation_bits=(9,))
    engine = Engine.build(model, len(x))
    own = choices(engine, x, (9,), (9,))
    reference = engine.logits(x)
    for row, name in enumerate(engine.network.names):
        for column, edits in enumerate(own[name]):
            if name == "twice" and column:
                continue  # what its second use reads moves, and is rounded to other points
            true = kl_divergence(reference, engine.logits(x, edits)).mean()
            predicted = scores.coupling[2 * row + column, 2 * row + column]
            assert true == pytest.approx(predicted, rel=0.1)
    assert scores.activations.shape == (3, 1) and (scores.activations > 0).all()


def test_a_killed_run_goes_on_to_the_same_bytes(network, tmp_path):
    model, _, x = network
    engine = Engine.build(model, len(x), batch_size=5, tape=True)
    own = choices(engine, x, BITS)

    class Killed(Exception):
        pass

    def run(checkpoint=None, stop=None):
        seen = []

        def progress(stage, done, total):
            seen.append(done)
            assert (stage, total) == ("tangents", 9)
            if len(seen) == stop:
                raise Killed

        return couplings(engine, x, own, checkpoint=checkpoint, progress=progress), seen

    whole, _ = run()
    for stop in (2, 4, 8):
        kept = Checkpoint(tmp_path / str(stop), every=0)
        with pytest.raises(Killed):
            run(kept, stop)
        again, left = run(kept)
        assert again.tobytes() == whole.tobytes()
        assert left[0] == stop


def test_every_layer_has_its_choices(network):
    model, _, x = network
    engine = Engine.build(model, len(x), tape=True)
    own = choices(engine, x, BITS)
    own.pop("head")
    with pytest.raises(UsageError, match="must hold every layer"):
        couplings(engine, x, own)
