"""Integers, deployed layers and the packed file: exact round trips, names, hostile files."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from commandline import here
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import mixer, small_net
from test_reconstruct import images, plan_of

from proxyq.api import quantize_model
from proxyq.errors import ProxyqError
from proxyq.model.function_import import from_function
from proxyq.ptq import unpack as reader
from proxyq.ptq.deploy import deployed_layers
from proxyq.ptq.packed import load_packed, save_packed
from proxyq.quantize import Rounding, quantize_columns
from proxyq.quantize.integers import Integers, to_integers

DRAWN = settings(max_examples=40, deadline=None)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("extra_code", ["negative", "either"])
def test_integers_have_the_values_of_fake_quantization(bits, extra_code):
    columns = np.random.default_rng(bits).normal(size=(30, 7)).astype(np.float32)
    rounding = Rounding(extra_code=extra_code)
    own = to_integers(columns, bits, rounding)
    assert own.codes.min() >= 0 and own.codes.max() <= 2**bits - 1
    np.testing.assert_array_equal(own.values(), quantize_columns(columns, bits, rounding))
    halves = own.zero * 2  # one bit has half a step for zero
    np.testing.assert_array_equal(halves, np.round(halves))


def test_integers_follow_an_affine_correction():
    rng = np.random.default_rng(0)
    own = to_integers(rng.normal(size=(40, 5)).astype(np.float32), 3)
    gain, shift = rng.uniform(0.5, 2, 5), rng.normal(size=5)
    wanted = own.values() * gain + shift
    moved = own.taking(wanted)
    np.testing.assert_array_equal(moved.codes, own.codes)
    np.testing.assert_allclose(moved.values(), wanted, atol=1e-5)
    scaled = own.taking(own.values() * gain)  # a zero point that need not move stays whole
    np.testing.assert_array_equal(scaled.zero, own.zero)
    same = Integers(np.full((4, 1), 3, np.uint16), np.ones((1, 1), "f4"), np.ones((1, 1), "f4"), 3)
    np.testing.assert_allclose(same.taking(np.full((4, 1), 5.0)).values(), 5.0)


@DRAWN
@given(st.integers(1, 16), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_packing_is_the_size_of_the_bits_and_comes_back(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint16)
    packed = reader.pack(codes, bits)
    assert packed.nbytes == -(-count * bits // 8)
    np.testing.assert_array_equal(reader.unpack(packed, bits, [count]), codes)
    # By hand: one long number, the first code in its lowest bits.
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    assert packed.tobytes() == number.to_bytes(packed.nbytes, "little")


def test_packing_in_parts():
    codes = np.random.default_rng(0).integers(0, 8, (1 << 20) + 13).astype(np.uint16)
    np.testing.assert_array_equal(reader.unpack(reader.pack(codes, 3), 3, codes.shape), codes)


@pytest.mark.parametrize("make", [small_net, mixer])
@pytest.mark.parametrize("correction", ["none", "weights", "statistics"])
def test_a_packed_network_comes_back(make, correction, tmp_path):
    model = make()
    x = images(model)
    made = quantize_model(model, plan_of(model, 3, 8), x, correction=correction)
    size = save_packed(made, tmp_path / "net.safetensors")
    assert size.total == (tmp_path / "net.safetensors").stat().st_size
    promised = sum(-(-own.codes.size * 3 // 8) for own in made.integers.values())
    assert size.codes <= promised + len(made.integers)
    back = load_packed(tmp_path / "net.safetensors", model)
    assert back.plan == made.plan == plan_of(model, 3, 8)
    for index, own in made.integers.items():
        for a, b in zip(own, back.integers[index], strict=True):
            np.testing.assert_array_equal(a, b)
    # Biases are added in another order, which may turn a rounding of an input.
    np.testing.assert_allclose(back.logits(x), made.logits(x), atol=2e-2)
    floats = quantize_model(model, plan_of(model, 3), x, correction=correction)
    save_packed(floats, tmp_path / "net.safetensors")
    back = load_packed(tmp_path / "net.safetensors", model)
    np.testing.assert_allclose(back.logits(x), floats.logits(x), rtol=1e-5, atol=1e-5)
    again = save_packed(floats, tmp_path / "again.safetensors")
    assert again.total == (tmp_path / "net.safetensors").stat().st_size
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "net.safetensors"
    ).read_bytes()


def test_the_loader_needs_numpy_alone(tmp_path):
    model = small_net()
    made = quantize_model(model, plan_of(model, 4), images(model), correction="statistics")
    save_packed(made, tmp_path / "net.safetensors")
    layers = {layer.name: layer for layer in deployed_layers(made)}
    code = (
        "import sys, importlib.util as u, numpy as np\n"
        f"s = u.spec_from_file_location('reader', {reader.__file__!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        f"w = m.load({str(tmp_path / 'net.safetensors')!r})\n"
        "assert not {'jax', 'proxyq', 'safetensors', 'scipy'} & set(sys.modules)\n"
        f"np.savez({str(tmp_path / 'out.npz')!r}, **w)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with np.load(tmp_path / "out.npz") as found:
        for layer in layers.values():
            np.testing.assert_array_equal(found[layer.parameter], layer.weight.values())
            assert found[layer.parameter].shape == model.params[layer.parameter].shape


def test_names_and_shapes_are_those_of_the_parameters():
    model = small_net()
    made = quantize_model(model, plan_of(model, 4), images(model), correction="statistics")
    layers = {layer.name: layer for layer in deployed_layers(made)}
    conv = layers["blocks.0.conv1"]
    assert conv.parameter == "blocks.0.conv1.kernel"
    assert conv.weight.scale.shape == (1, 1, 1, 8)  # HWIO: a scale for each output channel
    assert conv.bias_parameter is None and conv.bias is not None
    assert set(conv.absorbed) == {f"blocks.0.bn1.{n}" for n in ("bias", "mean", "scale", "var")}
    head = layers["head"]
    assert head.bias_parameter == "head.bias" and head.absorbed == ()
    # What is deployed, put into the equations by hand, is what runs: a folded convolution.
    network = quantize_model(model, plan_of(model, 4)).model
    assert network is model


def sliced():
    """A weight that is used in two slices, one that is computed, and one used twice."""
    rng = np.random.default_rng(0)
    params = {
        "qkv.weight": rng.normal(size=(12, 6)).astype(np.float32),
        "qkv.bias": rng.normal(size=12).astype(np.float32),
        "gain": rng.normal(size=(6, 6)).astype(np.float32),
        "mix.weight": rng.normal(size=(6, 6)).astype(np.float32),
        "twice.weight": rng.normal(size=(6, 6)).astype(np.float32),
    }

    def apply(p, x):
        q = x @ p["qkv.weight"][:6].T + p["qkv.bias"][:6]
        k = x @ p["qkv.weight"][6:].T + p["qkv.bias"][6:]
        y = jnp.tanh(q) * jnp.tanh(k)
        y = y @ (p["mix.weight"] @ p["gain"])
        y = jnp.tanh(y @ p["twice.weight"])
        return y @ p["twice.weight"]

    return from_function(apply, params, (6,), name="sliced")


def test_slices_computed_weights_and_weights_used_twice(tmp_path):
    model = sliced()
    x = images(model, 64)
    made = quantize_model(model, plan_of(model, 4), x)
    layers = {layer.name: layer for layer in deployed_layers(made)}
    qkv = layers["qkv"]
    assert qkv.weight.codes.shape == (12, 6) and qkv.weight.scale.shape == (12, 1)
    np.testing.assert_array_equal(qkv.bias, model.params["qkv.bias"])
    mixed = next(layer for layer in layers.values() if layer.computed)
    assert mixed.weight.codes.shape == (6, 6)
    assert "twice" in layers and "twice#2" not in layers
    save_packed(made, tmp_path / "net.safetensors")
    back = load_packed(tmp_path / "net.safetensors", model)
    np.testing.assert_allclose(back.logits(x), made.logits(x), rtol=1e-5, atol=1e-5)
    # Statistics restored give each use of a weight a gain of its own.
    made = quantize_model(model, plan_of(model, 4), x, correction="statistics")
    layers = {layer.name: layer for layer in deployed_layers(made)}
    assert layers["twice"].computed and layers["twice#2"].computed
    save_packed(made, tmp_path / "net.safetensors")
    back = load_packed(tmp_path / "net.safetensors", model)
    np.testing.assert_allclose(back.logits(x), made.logits(x), rtol=1e-4, atol=1e-4)


def test_another_model_is_refused(tmp_path):
    model = small_net()
    save_packed(quantize_model(model, plan_of(model, 4)), tmp_path / "net.safetensors")
    with pytest.raises(ProxyqError, match="of another model"):
        load_packed(tmp_path / "net.safetensors", mixer())
    with pytest.raises(ProxyqError, match="cannot read the packed network"):
        load_packed(tmp_path / "none.safetensors", model)


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    model = sliced()
    file = tmp_path_factory.mktemp("packed") / "net.safetensors"
    save_packed(quantize_model(model, plan_of(model, 4, 8), images(model)), file)
    return file.read_bytes()


@DRAWN
@given(st.data())
def test_damaged_files_give_one_sentence(content, tmp_path_factory, data):
    file = tmp_path_factory.mktemp("damaged") / "net.safetensors"
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))])
    for place in data.draw(st.lists(st.integers(0, max(len(damaged) - 1, 0)), max_size=4)):
        if damaged:
            damaged[place % len(damaged)] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(damaged))
    try:
        loaded = reader.load(file)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert all(isinstance(value, np.ndarray) for value in loaded.values())


def test_hostile_headers_are_refused(content, tmp_path):
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    header = json.loads(table["__metadata__"]["proxyq"])
    name = next(iter(header["layers"]))

    def refused(change, text):
        changed = json.loads(json.dumps(header))
        change(changed)
        own = {**table, "__metadata__": {"proxyq": json.dumps(changed)}}
        written = json.dumps(own).encode()
        file = tmp_path / "bad.safetensors"
        file.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])
        with pytest.raises(ValueError, match=text):
            reader.load(file)

    refused(lambda h: h["layers"][name].update(bits=99), "has 99 bits")
    refused(lambda h: h["layers"][name].update(shape=[10**9, 10**9]), "codes of its shape")
    refused(lambda h: h["layers"][name].update(weight="no"), "damaged")
    refused(lambda h: h.update(schema="proxyq/packed/9"), "this reads 'proxyq/packed/1'")


def test_the_command(tmp_path):
    plan = tmp_path / "plan.json"
    here("search", "--proxy", "sqnr", "--budget", "size=3bit", "--out", plan, "--quiet")
    folder = tmp_path / "out"
    done = here(
        *("quantize", plan, "--reconstruct", "bias", "--samples", 64),
        *("--eval-data", "digits", "--out", folder, "--json"),
    )
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["reconstruction"] == "bias" and record["accuracy"]["n"] == 400
    assert record["size"]["total"] == Path(record["file"]).stat().st_size
    assert abs(record["size"]["codes"] / record["plan_bytes"] - 1) < 0.02
    assert sorted(p.name for p in folder.iterdir()) == ["packed.safetensors", "plan.json"]
    packed = folder / "packed.safetensors"
    done = here("evaluate", plan, packed, "--correction", "none", "--json")
    assert done.code == 0, done.err
    both = json.loads(done.out)["plans"]
    assert [one["file"] for one in both] == [str(plan), str(packed)]
    assert both[1]["top1"] == record["accuracy"]["top1"]
    assert both[1]["size_bits"] == both[0]["size_bits"]
    text = here("quantize", plan, "--out", folder)
    assert text.code == 0 and "as the plan says" in text.out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--reconstruct", "best"], 2, "must be one of none, bias, adaround, block"),
        (["--reconstruct", "block", "--steps", "0"], 2, "`steps` of the learning must be"),
        (["--reconstruct", "bias", "--correction", "statistics"], 2, "means alone"),
        (["--steps", "20"], 2, "must go with a reconstruction that learns, 'adaround' or 'block'"),
        (["--reconstruct", "bias", "--steps", "20"], 2, "got 'bias': name one (--reconstruct)"),
        (["--activation-range", "widest"], 2, "min-max"),
        (["again.json"], 2, "name one plan to apply"),
    ],
)
def test_bad_arguments(arguments, code, says, tmp_path):
    plan = tmp_path / "plan.json"
    here(
        *("search", "--proxy", "sqnr", "--budget", "size=3bit", "--activation-bits", 8),
        *("--out", plan, "--quiet"),
    )
    folder = tmp_path / "out"
    done = here("quantize", plan, *arguments, "--out", folder)
    assert done.code == code and says in done.err and done.err.count("\n") == 1
    assert not folder.exists()
