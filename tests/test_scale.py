"""The formulas of `benchmarks/scale.py` against what is counted on a small decoder."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxyq.engine import Engine, TapOptions, collect
from proxyq.engine import backward as backward_module
from proxyq.engine import gradients as gradients_module
from proxyq.engine import segments as segments_module
from proxyq.engine import walk as walk_module
from proxyq.engine.curvature import hutchinson
from proxyq.engine.memory import tape_bytes_per_image
from proxyq.engine.objectives import Targets, cross_entropy
from proxyq.model.function_import import from_function

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import scale

SMALL = scale.Decoder(
    blocks=2, width=8, mlp=12, heads=2, vocabulary=10, tokens=6, sequences=3, bytes=4
)
BITS = (2, 4)


def decoder(of: scale.Decoder):
    """The decoder of the formulas: no embedding, its head not searched."""
    rng, d, f = np.random.default_rng(0), of.width, of.mlp
    shapes = {"query": (d, d), "key": (d, d), "value": (d, d), "out": (d, d)}
    shapes |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
    params = {
        f"{block}.{name}": rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
        for block in range(of.blocks)
        for name, shape in shapes.items()
    }
    params["head"] = rng.normal(0, 1, (d, of.vocabulary)).astype(np.float32)

    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def apply(p, x):
        for block in range(of.blocks):
            w = {name: p[f"{block}.{name}"] for name in shapes}
            y = norm(x)
            q, k, v = (y @ w[name] for name in ("query", "key", "value"))
            q, k, v = (t.reshape(*t.shape[:2], of.heads, -1) for t in (q, k, v))
            mixed = jax.nn.softmax(jnp.einsum("bshe,bthe->bhst", q, k), axis=-1)
            x = x + jnp.einsum("bhst,bthe->bshe", mixed, v).reshape(x.shape) @ w["out"]
            y = norm(x)
            x = x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]
        return norm(x) @ p["head"]

    return from_function(apply, params, (of.tokens, d), frozen=("head",), name="decoder")


def macs_of(jaxpr):
    """Multiply-accumulates of the products that its results need."""
    needed, total = {var for var in jaxpr.outvars if not hasattr(var, "val")}, 0
    for eqn in reversed(jaxpr.eqns):
        if not needed & set(eqn.outvars):
            continue  # XLA leaves it out too
        needed |= {var for var in eqn.invars if not hasattr(var, "val")}
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += eqn.outvars[0].aval.size * int(np.prod([shape[i] for i in contracted]))
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += macs_of(inner)
    return total


@pytest.fixture
def counted(monkeypatch):
    """Multiply-accumulates of all programs that the engine runs from now on."""
    spent, compile_segment = [], segments_module._compile

    def watched(program):
        if isinstance(program, tuple):
            return tuple(map(watched, program))
        if getattr(program, "watched", False):
            return program

        def run(*args):
            spent.append(macs_of(jax.make_jaxpr(program)(*args).jaxpr))
            return program(*args)

        run.watched = True
        return run

    def remember(cache, key, program):
        return cache.setdefault(key, watched(program))

    monkeypatch.setattr(segments_module, "_compile", lambda *a: watched(compile_segment(*a)))

    for module, names in (
        (segments_module, ("_COMPILED", "_SITES")),
        (backward_module, ("_PROGRAMS",)),
        (gradients_module, ("_PER_IMAGE",)),
        (walk_module, ("_SUMS",)),
    ):
        monkeypatch.setattr(module, "remember", remember)
        for name in names:
            monkeypatch.setattr(module, name, {})
    return spent


@pytest.fixture(scope="module")
def case():
    model = decoder(SMALL)
    shape = (SMALL.sequences, *model.input_shape)
    return model, np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_layers_weights_and_a_pass(case, counted):
    model, x = case
    engine = Engine.build(model, len(x), batch_size=1)
    layers = engine.network.layers
    assert [layer.name.split(".")[1] for layer in layers[:7]] == list(scale.LAYERS)
    assert len(layers) == SMALL.layers
    assert sum(layer.weights for layer in layers) == SMALL.searched
    assert [layer.macs for layer in layers] == SMALL.layer_macs()
    engine.logits(x[:1])
    head, *segments = counted
    assert head == 0 and segments == SMALL.segments()
    assert sum(counted) == SMALL.forward
    wanted = SMALL.tokens * SMALL.width * SMALL.vocabulary
    assert SMALL.head == wanted == np.asarray(engine.logits(x[:1])).size * SMALL.width
    assert tape_bytes_per_image(engine.network) == scale.tape_bytes(SMALL)


@pytest.mark.parametrize(
    ("need", "wanted"),
    [
        ("coupling", scale.macs(SMALL, scale.sweep_runs(SMALL.layers, len(BITS)))),
        ("pairs", scale.macs(SMALL, scale.pair_runs(SMALL.layers, len(BITS)))),
        ("output-error", scale.output_error_macs(SMALL, len(BITS))),
    ],
)
def test_passes_over_the_images(case, counted, need, wanted):
    model, x = case
    engine = Engine.build(model, len(x), batch_size=1)
    collect(engine, x, (need,), BITS, options=TapOptions())
    assert sum(counted) == wanted * SMALL.sequences


def test_probes_of_the_curvature(case, counted):
    model, x = case
    engine = Engine.build(model, len(x), batch_size=1)
    aims, key = Targets(how="predicted"), jax.random.key(0)
    hutchinson(engine, x, cross_entropy, aims, key=key, least=2, most=2)
    assert sum(counted) == 2 * scale.probe_macs(SMALL) * SMALL.sequences


def test_gram_matrices(case):
    model, x = case
    engine = Engine.build(model, len(x), batch_size=1)
    taps = collect(engine, x, ("output",), BITS, options=TapOptions())
    p = sum(tap.output[0].size for tap in taps.taps)
    assert scale.gram_macs(SMALL) == len(x) ** 2 * p


def test_what_the_page_says():
    """The figures of docs/scale.md are those that the script prints."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "scale.md").read_text()
    table = scale.printed(scale.Decoder(), scale.Machine(), 4, 32)
    assert table in page
    assert scale.Decoder().layers == 224
