"""Learned rounding: pieces of a network, its objective against brute force, and going on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import mixer, small_net

from proxyq.api import quantize_model
from proxyq.checkpoint import Checkpoint
from proxyq.engine import Engine
from proxyq.engine.pieces import PieceEdits, block_pieces, layer_pieces
from proxyq.engine.segments import Edit
from proxyq.errors import UsageError
from proxyq.model.function_import import from_function
from proxyq.model.graph import is_literal
from proxyq.model.model import logits_of
from proxyq.ptq.quantized import integer_weights, with_weights
from proxyq.ptq.reconstruct import Learning, _fisher, reconstruct
from proxyq.search.allocate.plan import Plan, PlannedLayer


def images(model, count=32, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *model.input_shape)).astype(np.float32)


def run_pieces(engine, pieces, batch, edits, changed=lambda piece, own: own):
    state = dict(zip(engine.network.graph.inputs, jax.tree.leaves(batch), strict=True))
    for piece in pieces:
        own = PieceEdits([edits.get(i, Edit(weight=engine.weight(i))) for i in piece.sites])
        constants = [engine.frontier[var] for var in piece.constants]
        written = piece(changed(piece, own), constants, [state[var] for var in piece.reads])
        state = {var: state[var] for var in piece.keeps} | dict(
            zip(piece.writes, written, strict=True)
        )
    known = {**engine.frontier, **state}
    outputs = [a.val if is_literal(a) else known[a] for a in engine.network.graph.outputs]
    return logits_of(jax.tree.unflatten(engine.network.graph.out_tree, outputs))


@pytest.mark.parametrize("make", [small_net, mixer])
@pytest.mark.parametrize("cut", [layer_pieces, block_pieces])
def test_pieces_in_a_row_are_the_network(make, cut):
    model = make()
    engine = Engine.build(model, 4, batch_size=4)
    edits = with_weights(engine, integer_weights(engine, dict.fromkeys(engine.network.names, 3)))
    batch = jnp.asarray(images(model, 4))
    pieces = cut(engine.network)
    sites = [i for piece in pieces for i in piece.sites]
    assert sites == list(range(len(engine.network.sites)))
    for own in ({}, edits):
        wanted = engine.logits(np.asarray(batch), own)
        found = run_pieces(engine, pieces, batch, own)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_blocks_are_what_lies_between_single_tensors():
    network = Engine.build(small_net(), 2, batch_size=2).network
    named = [tuple(network.sites[i].layer for i in p.sites) for p in block_pieces(network)]
    first, second = (
        tuple(name for name in network.names if name.startswith(f"blocks.{i}.")) for i in (0, 1)
    )
    assert named == [("stem",), first, second, ("head",)]
    assert all(len(p.writes) == 1 for p in block_pieces(network))


def linear(seed=0, fan_in=6, channels=2):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(fan_in, channels)).astype(np.float32)
    return from_function(lambda params, x: x @ params["w"], {"w": weight}, (fan_in,), name="linear")


@pytest.mark.parametrize("level", ["layer", "block"])
def test_one_layer_against_all_roundings(level):
    """Of all 2^6 roundings of each channel, the learned one is nearly the best."""
    model = linear()
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(6, 6))  # correlated inputs, for which rounding to nearest is bad
    x = (rng.normal(size=(128, 6)) @ mixing).astype(np.float32)
    engine = Engine.build(model, 128, batch_size=32)
    start = integer_weights(engine, {"w": 2})
    learned = reconstruct(
        engine,
        start,
        x,
        level=level,
        learning=Learning(steps=1500, affine_rate=0.0),
        key=jax.random.key(0),
    )[0]
    exact = np.asarray(engine.columns(0), np.float64)
    own = start[0]
    below = np.clip(np.floor(exact / own.scale + own.zero), 0, 2)

    def errors(codes):
        return (((x @ ((codes - own.zero) * own.scale - exact)) ** 2).mean(axis=0)).astype(float)

    best = np.full(2, np.inf)
    for up in itertools.product((0, 1), repeat=6):
        best = np.minimum(best, errors(below + np.array(up)[:, None]))
    found, nearest = errors(learned.integers.codes), errors(own.codes)
    assert set(np.unique(learned.integers.codes - below)) <= {0, 1}
    assert (found < 1.15 * best + 1e-9).all() and found.sum() < 0.7 * nearest.sum()
    np.testing.assert_array_equal(learned.integers.scale, own.scale)
    np.testing.assert_array_equal(learned.offset, 0)


def test_fisher_information_is_that_of_drawn_labels():
    """Against the derivative of the log-likelihood, image by image, through the whole network."""
    model = small_net()
    engine = Engine.build(model, 4, batch_size=4)
    pieces = block_pieces(engine.network)
    batch = jnp.asarray(images(model, 4))
    key = jax.random.key(3)
    state = dict(zip(engine.network.graph.inputs, [batch], strict=True))
    edits = {i: Edit(weight=engine.weight(i)) for i in range(len(engine.network.sites))}

    def after(count, state):
        for piece in pieces[:count]:
            own = PieceEdits([edits[i] for i in piece.sites])
            constants = [engine.frontier[var] for var in piece.constants]
            written = piece(own, constants, [state[var] for var in piece.reads])
            state = dict(zip(piece.writes, written, strict=True))
        return state

    half = after(2, state)
    (found,) = _fisher(engine, pieces[1], pieces[2:], [half], key)
    (var,) = pieces[1].writes

    def logits(z):
        state = {var: z}
        for piece in pieces[2:]:
            own = PieceEdits([edits[i] for i in piece.sites])
            constants = [engine.frontier[v] for v in piece.constants]
            written = piece(own, constants, [state[v] for v in piece.reads])
            state = dict(zip(piece.writes, written, strict=True))
        return next(iter(state.values()))

    drawn = jax.random.categorical(jax.random.fold_in(key, 0), logits(half[var]), axis=-1)

    def likelihood(z):
        return jnp.sum(jax.nn.log_softmax(logits(z))[jnp.arange(4), drawn])

    wanted = jax.grad(likelihood)(half[var]) ** 2
    np.testing.assert_allclose(found[0], wanted / wanted.mean(), rtol=1e-4, atol=1e-6)


def learn(model, x, **more):
    engine = Engine.build(model, len(x), batch_size=8)
    start = integer_weights(engine, dict.fromkeys(engine.network.names, 2))
    how = Learning(steps=more.pop("steps", 60), batch_size=8, **more.pop("learning", {}))
    found = reconstruct(engine, start, x, learning=how, key=jax.random.key(0), **more)
    return engine, start, found


def test_learned_rounding_beats_nearest_and_is_reproducible():
    model = small_net()
    x, held = images(model), images(model, 64, seed=9)
    engine, start, found = learn(model, x)
    exact = engine.logits(held)

    def error(integers, offsets=None):
        edits = with_weights(engine, integers)
        if offsets is not None:
            edits = {i: e._replace(offset=jnp.asarray(offsets[i])) for i, e in edits.items()}
        return ((engine.logits(held, edits) - exact) ** 2).mean()

    learned = error(
        {i: r.integers for i, r in found.items()}, {i: r.offset for i, r in found.items()}
    )
    assert learned < 0.7 * error(start)
    _, _, again = learn(model, x)
    for i, own in found.items():
        np.testing.assert_array_equal(own.integers.codes, again[i].integers.codes)
        np.testing.assert_array_equal(own.offset, again[i].offset)


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path):
    model = small_net()
    x = images(model)
    _, _, whole = learn(model, x, steps=10)

    class Killed(BaseException):
        pass

    def kill(stage, done, total):
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        learn(model, x, steps=10, checkpoint=Checkpoint(tmp_path), progress=kill)
    assert len(list(tmp_path.iterdir())) == 2
    _, _, resumed = learn(model, x, steps=10, checkpoint=Checkpoint(tmp_path))
    for i, own in whole.items():
        for a, b in zip(own.integers, resumed[i].integers, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(own.offset, resumed[i].offset)


@pytest.mark.slow
def test_a_tied_weight_has_one_rounding():
    model = mixer()
    engine, _, found = learn(model, images(model), steps=10, level="layer")
    by_weight = {}
    for i, own in found.items():
        by_weight.setdefault(engine.network.sites[i].weight, []).append(own.integers)
    for own in by_weight.values():
        for other in own[1:]:
            np.testing.assert_array_equal(own[0].codes, other.codes)
            np.testing.assert_array_equal(own[0].scale, other.scale)


def plan_of(model, bits, activation_bits=None, correction="none"):
    network = Engine.build(model, 2, batch_size=2).network
    layers = {
        layer.name: PlannedLayer(
            weight_bits=bits,
            activation_bits=activation_bits,
            weights=layer.weights,
            macs=layer.macs,
        )
        for layer in network.layers
    }
    return Plan(layers=layers, method={"correction": correction})


def test_bias_correction_restores_means_alone():
    model = small_net()
    x = images(model, 64)
    made = quantize_model(model, plan_of(model, 3), x, reconstruction="bias")
    engine = Engine.build(model, 64)
    nearest = integer_weights(engine, dict.fromkeys(engine.network.names, 3))
    for i, own in made.integers.items():
        np.testing.assert_array_equal(own.values(), nearest[i].values())
    plain = engine.logits(x, with_weights(engine, nearest)).mean(axis=0)
    exact, corrected = engine.logits(x).mean(axis=0), made.logits(x).mean(axis=0)
    np.testing.assert_allclose(corrected, exact, atol=1e-4)
    assert np.abs(plain - exact).max() > 10 * np.abs(corrected - exact).max()


@pytest.mark.slow
def test_a_correction_keeps_what_was_added_before():
    """Statistics restored after learning: the mean is right although shifts were there already."""
    model = small_net()
    x = images(model, 64)
    made = quantize_model(
        model,
        plan_of(model, 3),
        x,
        reconstruction="block",
        learning=Learning(steps=20, batch_size=16),
        correction="statistics",
    )
    exact, found = (
        part.mean(axis=0) for part in (Engine.build(model, 64).logits(x), made.logits(x))
    )
    np.testing.assert_allclose(found, exact, atol=2e-3)
    for i, own in made.integers.items():
        columns = Engine.build(model, 64).network.sites[i].columns(made.edits[i].weight)
        np.testing.assert_array_equal(np.asarray(columns), own.values())


def test_bad_settings_are_refused_in_one_sentence():
    model = small_net()
    x = images(model)
    with pytest.raises(UsageError, match="`steps` of the learning must be at least 1, got 0"):
        Learning(steps=0)
    with pytest.raises(UsageError, match="`weighting` must be one of none, image, mean"):
        Learning(weighting="all")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="one batch of 32 images, got 8"):
        engine = Engine.build(model, 32, batch_size=32)
        reconstruct(engine, {}, x[:8], key=jax.random.key(0))
    with pytest.raises(UsageError, match="`reconstruction` must be one of none, bias"):
        quantize_model(model, plan_of(model, 3), x, reconstruction="best")
    with pytest.raises(UsageError, match="needs calibration images"):
        quantize_model(model, plan_of(model, 3), reconstruction="block")
    with pytest.raises(UsageError, match="means alone"):
        quantize_model(model, plan_of(model, 3), x, reconstruction="bias", correction="statistics")
