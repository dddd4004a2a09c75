"""Bounds on memory: fewer images at once give the same numbers, and what has no room is refused."""

import gc
import hashlib
import json
import os
import platform
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commandline import here
from networks import mixer, small_net
from test_reconstruct import images, plan_of

from proxyq.api import quantize_model
from proxyq.engine import Edit, Engine, backward, collect, compared, walk
from proxyq.engine import engine as engine_module
from proxyq.engine.memory import (
    amount,
    bytes_per_image,
    tape_bytes_per_image,
)
from proxyq.engine.pieces import block_pieces
from proxyq.engine.ranges import input_samples
from proxyq.engine.rounded import rounded_weight
from proxyq.engine.spill import Spill
from proxyq.engine.statistics import correct_statistics, float_moments
from proxyq.engine.walk import rounding_bytes_per_image
from proxyq.errors import ProxyqError, UsageError
from proxyq.files import digest_arrays
from proxyq.model.features import features
from proxyq.model.function_import import from_function
from proxyq.model.network import LAYERS_AT, network
from proxyq.ptq.reconstruct import Learning, held_bytes, step_bytes
from proxyq.quantize.integers import fit_columns


@pytest.mark.parametrize("make", [pytest.param(small_net, marks=pytest.mark.slow), mixer])
@pytest.mark.parametrize("need", ["gram", "codes"])
@pytest.mark.parametrize("room", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_images_compared_in_files_are_compared_alike(make, need, room, monkeypatch):
    """13 images in batches of one, two and three, the last not whole; a few columns at a time."""
    model, x = make(), images(make(), 13)
    engine = Engine.build(model, 13, batch_size=7)
    own = len(set(features(engine.network, "post-activation").values()))
    memory = room * least_for_comparing(engine) + 8 * 13**2 * (own + 2)
    ticks, tiles, here = [], [], compared._Features.columns

    def columns(self, var):
        for tile, count in here(self, var):
            tiles.append(count < self.widths[var])
            yield tile, count

    monkeypatch.setattr(compared._Features, "columns", columns)

    def matrices(bound, progress=lambda *_: None):
        taps = collect(engine, x, (need,), (4,), memory=bound, progress=progress)
        return [np.asarray(getattr(tap, need)) for tap in taps]

    whole = matrices(None)
    assert not tiles
    parts = matrices(memory, lambda stage, done, total: ticks.append((done, total)))
    assert any(tiles)
    for one, other in zip(whole, parts, strict=True):
        assert other.shape == (13, 13) and np.array_equal(other, other.T)
        scale = np.abs(one).max()
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * scale)
        if need == "codes":
            np.testing.assert_array_equal(other, one)
    # One pass.
    assert ticks[-1] == (-(-13 // room) * len(engine.network.sites),) * 2


def least_for_comparing(engine):
    """Of `memory`, for one image."""
    return 2 * compared._bytes_per_image(engine, "post-activation")


def test_what_cannot_be_compared_is_refused_with_what_it_takes():
    model = small_net()
    engine, x = Engine.build(model, 4, batch_size=4), images(model, 4)
    own = len(set(features(engine.network, "post-activation").values()))
    least = least_for_comparing(engine) + 8 * 4**2 * (own + 2)
    with pytest.raises(UsageError, match="4 images with each other layer by layer takes") as caught:
        collect(engine, x, ("gram",), (4,), memory=least - 1)
    assert f"give at least {amount(least)}, or fewer images (--samples)." in str(caught.value)
    collect(engine, x, ("gram",), (4,), memory=least)


@pytest.mark.slow
def test_orthogonality_under_a_bound_orders_layers_alike():
    words = ("score", "--proxy", "orthogonality", "--samples", "40", "--json", "--quiet")
    whole, bounded = (here(*words, *more) for more in ((), ("--memory", "400KB")))
    assert whole.code == bounded.code == 0, bounded.err
    found = [json.loads(one.out)["scores"][0]["values"] for one in (whole, bounded)]
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4)


@pytest.mark.slow
def test_outputs_times_choices_are_bounded():
    """A batch's logits for every choice, which are many for a vocabulary."""
    model = small_net()
    x, bits = images(model, 12), (2, 3, 4, 8)
    engine = Engine.build(model, 12, batch_size=12)
    needs = ("kl", "coupling")
    whole = collect(engine, x, needs, bits)
    choices, outputs = len(engine.network.names) * len(bits), 10
    per_image = 2 * bytes_per_image(engine.network.graph) + (4 * choices + 96) * outputs
    bounded = collect(engine, x, needs, bits, memory=5 * per_image)
    assert bounded.correlation is not None and whole.correlation is not None
    np.testing.assert_allclose(bounded.correlation, whole.correlation, rtol=1e-3, atol=1e-3)
    with pytest.raises(UsageError, match=f"give at least {amount(per_image)}, or fewer --bits"):
        collect(engine, x, needs, bits, memory=per_image - 1)


@pytest.mark.slow
def test_reconstruction_is_refused_where_there_is_no_room():
    model = small_net()
    x, learning = images(model, 32), Learning(steps=2, batch_size=8)
    engine = Engine.build(model, 32, batch_size=8)
    one = held_bytes(engine, block_pieces(engine.network), learning)
    step = step_bytes(engine, block_pieces(engine.network))
    weighed = Learning(steps=2, batch_size=8, weighting="image")
    assert held_bytes(engine, block_pieces(engine.network), weighed) > one

    def learn(memory):
        return quantize_model(
            model, plan_of(model, 3), x, reconstruction="block", learning=learning, memory=memory
        )

    with pytest.raises(UsageError, match=r"give at most 24 images \(--samples\)") as caught:
        learn(31 * one + step)
    assert amount(32 * one + step) in str(caught.value)
    assert amount(31 * one + step) in str(caught.value)
    with pytest.raises(UsageError, match="give a smaller batch_size"):
        learn(7 * one + step)
    learn(32 * one + step)


# -- what is alive, and what is not ------------------------------------------------------

WIDE = (16, 16, 8)


def wide_net():
    """Large activations, few weights and many more layers than fit into one batch's bound."""

    def apply(params, x):
        x = jax.nn.relu(conv(x, params["stem.weight"]))
        for name in ("one.weight", "two.weight", "three.weight"):
            x = x + jax.nn.relu(conv(x, params[name]))
        return jnp.mean(x, axis=(1, 2)) @ params["head.weight"]

    def conv(x, weight):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=numbers)

    rng = np.random.default_rng(0)
    shapes = {"stem.weight": (3, 3, 8, 24), "head.weight": (24, 10)}
    shapes |= {f"{name}.weight": (3, 3, 24, 24) for name in ("one", "two", "three")}
    params = {k: (rng.normal(size=v) / 8).astype(np.float32) for k, v in shapes.items()}
    return from_function(apply, params, WIDE, name="wide")


@pytest.fixture
def most_alive(monkeypatch):
    """`(what runs) -> bytes`: the most that JAX's arrays take whenever a program is called."""

    def measured(run):
        gc.collect()
        before, most = alive(), 0

        def watched(function):
            def call(*args, **more):
                nonlocal most
                found = function(*args, **more)
                most = max(most, alive())
                return found

            return call

        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "call", watched(engine_module.call))
            patch.setattr(engine_module, "call_site", watched(engine_module.call_site))
            patch.setattr(walk, "_over_images", watched(walk._over_images))
            patch.setattr(backward, "_program", watched_program(backward._program, watched))
            run()
        return most - before

    def alive():
        return sum(array.nbytes for array in jax.live_arrays())

    def watched_program(make, watched):
        return lambda *args: watched(make(*args))

    return measured


@pytest.mark.parametrize(
    "need",
    [
        "output-error",
        "kl",
        *(
            pytest.param(need, marks=pytest.mark.slow)
            for need in (
                "restored-error",
                "gram",
                "coupling",
                "pairs",
                "gradient-squares",
                "tangents",
            )
        ),
    ],
)
def test_what_is_alive_stays_within_the_bound(most_alive, need):
    """Beyond what two images take, with weights at as many bit-widths."""
    model, bits = wide_net(), (2, 3, 4, 5, 6, 8)
    x = np.random.default_rng(1).normal(size=(24, *WIDE)).astype(np.float32)
    found = network(model, LAYERS_AT)
    taped = need in ("gradient-squares", "tangents")
    least = tape_bytes_per_image(found) if taped else 2 * bytes_per_image(found.graph)

    def taken(images, memory):
        engine = Engine.build(model, images, memory=memory)
        return most_alive(lambda: collect(engine, x[:images], (need,), bits, memory=memory))

    two = taken(2, None)
    memory = 3 * least
    assert taken(24, memory) - two <= memory
    assert taken(24, 1 << 40) - two > memory  # all at once take more: the bound is needed


@pytest.mark.parametrize("make", [small_net, mixer, wide_net])
@pytest.mark.parametrize("restored", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rounding_takes_what_is_planned_for_it(make, restored):
    """States, output and the scratch space of XLA, which tells of its own."""
    engine = Engine.build(make(), 4, batch_size=4)
    graph, bound = engine.network.graph, 4 * rounding_bytes_per_image(engine, restored=restored)
    for index, (site, segment) in enumerate(
        zip(engine.network.sites, engine.segments[1:], strict=True)
    ):
        eqn = graph.main[site.position]
        data, out = eqn.invars[1 - site.operand], eqn.outvars[0]
        x, y = (jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in (data, out))
        weight, grid = engine.weight(index), fit_columns(engine.columns(index), 4)
        _, changed = walk._sum_programs(engine, index, restored)
        scratch = changed.lower(x, weight, grid, y).compile().memory_analysis().temp_size_in_bytes
        held = sum(
            var.aval.size * var.aval.dtype.itemsize
            for var in (*segment.reads, *segment.keeps, *segment.writes, *segment.keeps, out)
        )
        assert held + scratch <= bound + 4 * weight.nbytes, site.layer


def test_states_that_have_no_room_come_back_from_a_file():
    rng = np.random.default_rng(0)
    states: list[Any] = [
        {
            "a": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32),
            "b": jnp.asarray(rng.normal(size=(2, 3 + number)), jnp.bfloat16),
            "c": jnp.arange(4 - number) > 1,
        }
        for number in range(4)
    ]
    with Spill(room=200) as spill:
        for turn in range(2):  # each is replaced by one of another size
            for number in range(4):
                spill.put(number, states[(number + turn) % 4])
            assert spill.taken <= 200 and len(spill) == 4
        for number in range(4):
            back: Any = spill.get(number)
            for name, value in states[(number + 1) % 4].items():
                assert back[name].dtype == value.dtype
                np.testing.assert_array_equal(back[name], value)


def test_a_disk_without_room_is_told(monkeypatch):
    class Full:
        def seek(self, place):
            del place

        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    with (
        pytest.raises(ProxyqError, match=r"\(No space left on device\): allow more memory"),
        Spill(room=0) as spill,
    ):
        state: Any = {"a": jnp.zeros(3)}
        spill.put(0, state)
    engine = Engine.build(small_net(), 2, batch_size=2)
    var = next(iter(features(engine.network, "post-activation").values()))
    with (
        pytest.raises(ProxyqError, match=r"\(No space left on device\): allow more memory"),
        compared._Features(2, (var,), 2, tile=1) as rows,
    ):
        rows.put(var, 0, np.zeros((2, var.aval.size // 2), np.float32))


def test_statistics_are_corrected_alike_from_a_file():
    model = small_net()
    x = images(model, 24)
    per_image = 2 * bytes_per_image(network(model, LAYERS_AT).graph)
    found = []
    for memory in (None, 5 * per_image):
        engine = Engine.build(model, 24, memory=memory, batch_size=4)
        assert (memory is None) == (engine.room is None)
        moments, _ = float_moments(engine, x)
        edits = {i: Edit(weight=rounded_weight(engine, i, 3)) for i in range(len(moments))}
        found.append(correct_statistics(engine, edits, x, moments))
    for index, own in found[0].items():
        np.testing.assert_array_equal(found[1][index].weight, own.weight)
        np.testing.assert_array_equal(found[1][index].offset, own.offset)


def test_samples_of_inputs_hold_no_tensors_and_fit(monkeypatch):
    monkeypatch.setattr("proxyq.engine.ranges._LEAST_SAMPLES", 64)
    model = small_net()
    x = images(model, 24)
    plenty = input_samples(Engine.build(model, 24, batch_size=4), x, ("stem",))
    engine = Engine.build(model, 24, memory=2 * 10**5, batch_size=4)
    few = input_samples(engine, x, engine.network.names)
    assert engine.room is not None and few.keys() > plenty.keys()
    (own,) = plenty.values()
    assert sum(one.nbytes for one in few.values()) <= engine.room
    assert own.base is None and own.min() == x.min() and own.max() == x.max()


def test_a_digest_of_images_makes_no_copy_of_them():
    x = np.arange(1 << 20, dtype=np.float32).reshape(4, 64, -1)
    tracemalloc.start()
    found = digest_arrays({"images": x, "labels": jnp.zeros((0, 2), jnp.bfloat16)})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < x.nbytes / 2
    wanted = f"images\0<f4\0{x.shape}\0".encode() + x.tobytes()
    labels = f"labels\0{np.asarray(jnp.zeros(0, jnp.bfloat16)).dtype.str}\0(0, 2)\0"
    assert found == hashlib.sha256(wanted + labels.encode()).hexdigest()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("score --proxy output-error --memory 10KB", "one image in the network 'digits' takes"),
        ("score --proxy fisher --memory 30KB", "derivatives of one image"),
        ("search --memory 300KB", "comparing plans on"),
    ],
)
def test_too_little_memory_is_refused_in_a_sentence(words, told):
    done = here(*words.split(), "--quiet")
    assert done.code == 2 and done.err.startswith("proxyq: error: ") and done.err.count("\n") == 1
    assert told in done.err and "give at least" in done.err


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/statm").exists(),
    reason="only there blocks are kept, and seen to be",
)
@pytest.mark.parametrize("given_back", [False, True])
def test_large_blocks_are_given_back_when_they_are_free(given_back):
    """A block below another one that stays, after one that made the C library keep such."""
    code = (
        "import ctypes, resource, sys, proxyq\n"
        "if sys.argv[1] == 'True': proxyq.give_back_large_blocks()\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n"
        "libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p,"
        " ctypes.c_int, ctypes.c_size_t]\n"
        "pages = lambda: int(open('/proc/self/statm').read().split()[1])\n"
        "libc.free(libc.malloc(16 << 20))\n"
        "before = pages()\n"
        "block, above = libc.malloc(1 << 19), libc.malloc(1 << 12)\n"
        "libc.memset(block, 1, 1 << 19); libc.memset(above, 1, 1 << 12); libc.free(block)\n"
        "print((pages() - before) * resource.getpagesize())"
    )
    words = [sys.executable, "-c", code, str(given_back)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 1 << 18) == given_back


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no peak")
def test_a_process_stays_within_its_bound():
    """Resident memory of processes: what 96 images add to what four take."""

    def peak(images, *more):
        code = (
            "import test_memory as t; from proxyq.proxies import PROXIES; import numpy as np;"
            "from proxyq.devices import give_back_large_blocks; give_back_large_blocks();"
            "model = t.big_net(); rng = np.random.default_rng(0);"
            f"x = rng.normal(size=({images}, 96, 96, 8)).astype('f4');"
            f"PROXIES.get('output-error')(model, x, bits=(2, 4, 8){''.join(more)});"
            "print(open('/proc/self/status').read())"
        )
        here = Path(__file__).parent
        found = os.pathsep.join((str(here.parent), str(here)))
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": found},
            capture_output=True,
            text=True,
            check=True,
        )
        # What `wait4` tells begins with what the parent had when it forked, and this one is large.
        (line,) = (one for one in done.stdout.splitlines() if one.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    own = 92 * 96 * 96 * 8 * 4
    memory = 96 << 20
    alone = peak(4)
    assert peak(96, f", memory={memory}") - alone - own <= memory
    assert peak(96, ", memory=1 << 40") - alone - own > 2 * memory


def big_net():
    """`wide_net` on images of 96 x 96."""
    small = wide_net()
    return from_function(small.apply, dict(small.params), (96, 96, 8), name="big")
