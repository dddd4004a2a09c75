"""Which layers share bits: siblings that runtimes fuse, ties by word, and what is untied."""

import json

import numpy as np
import pytest
from commandline import here
from test_recipes import PlainLayer

import proxyq
from proxyq.errors import UsageError
from proxyq.model.function_import import from_function
from proxyq.search.allocate.together import fused, together

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def block(at: str, x: str) -> list[PlainLayer]:
    reads = {"q_proj": x, "k_proj": x, "v_proj": x, "gate_proj": f"{x}+", "up_proj": f"{x}+"}
    return [PlainLayer(f"{at}.{n}", 64, 64, shares_input=reads.get(n)) for n in NAMES]


def test_siblings_are_told_by_name_and_by_what_they_read():
    layers = [*block("layers.0", "a"), *block("layers.1", "b")]
    assert fused(layers) == (
        ("layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"),
        ("layers.0.gate_proj", "layers.0.up_proj"),
        ("layers.1.q_proj", "layers.1.k_proj", "layers.1.v_proj"),
        ("layers.1.gate_proj", "layers.1.up_proj"),
    )
    # Attention across: the query reads another tensor than key and value.
    across = [
        PlainLayer("cross.query", 8, 8),
        PlainLayer("cross.key", 8, 8, shares_input="m"),
        PlainLayer("cross.value", 8, 8, shares_input="m"),
    ]
    assert fused(across) == (("cross.key", "cross.value"),)
    # Layers that merely read one tensor, or have such names, are free.
    innocent = [
        PlainLayer("conv1", 8, 8, shares_input="x"),
        PlainLayer("down", 8, 8, shares_input="x"),
        PlainLayer("a.q_proj", 8, 8, shares_input="x"),
        PlainLayer("b.k_proj", 8, 8, shares_input="x"),
        PlainLayer("w1", 8, 8),
        PlainLayer("w3", 8, 8),
    ]
    assert fused(innocent) == ()


def test_ties_by_word_and_unties():
    layers = [
        PlainLayer("a.q", 8, 8, shares_input="x"),
        PlainLayer("a.k", 8, 8, shares_input="x"),
        PlainLayer("b", 8, 8, group="b"),
        PlainLayer("c", 8, 8, group="b"),
    ]
    same = [("b", "c")]
    plain = together(layers, (), (), same)
    assert plain == ((), (("a.q", "a.k"),), ())
    assert together(layers, (), ("a.k",), same).shared == ()
    every = together(layers, ("same-sum", "same-input", "same-feature", "b"), ("a.*",), same)
    assert every.counted_once == (("b", "c"),)
    assert every.shared == (("a.q", "a.k"), ("b", "c")) and every.patterns == ("b",)
    with pytest.raises(UsageError, match="'z' of an untie matches no layer"):
        together(layers, (), ("z",), same)


def attention():
    rng = np.random.default_rng(0)
    names = [f"attn.{n}_proj.weight" for n in "qkvo"]
    params = {n: rng.normal(0, 0.3, (16, 16)).astype(np.float32) for n in names}
    params[names[0]] *= 30  # one sibling needs more
    params["head.weight"] = rng.normal(0, 0.3, (16, 4)).astype(np.float32)

    def apply(p, x):
        q, k, v = (x @ p[name] for name in names[:3])
        weights = np.float32(0.25) * q @ k.swapaxes(-1, -2)
        y = weights @ v @ p[names[3]]
        return y.mean(axis=1) @ p["head.weight"]

    return from_function(apply, params, (5, 16), name="attention")


def test_a_search_ties_siblings_unless_told_otherwise():
    model = attention()
    common = {"proxy": "weight-mse", "bits": (2, 4, 6, 8), "correction": "none"}
    tied = proxyq.search(model, budget="size=4bit", **common).bits()
    assert tied["attn.q_proj"] == tied["attn.k_proj"] == tied["attn.v_proj"]
    free = proxyq.search(model, budget="size=4bit", unties=["attn.*"], **common).bits()
    assert len({free[f"attn.{n}_proj"] for n in "qkv"}) > 1
    x = np.random.default_rng(1).normal(size=(8, 5, 16)).astype(np.float32)
    scores = proxyq.score(model, x, proxies=["weight-mse"], bits=(2, 4, 6, 8))
    assert proxyq.allocate(scores, "size=4bit").bits() == tied
    assert proxyq.allocate(scores, "size=4bit", unties=["attn.*"]).bits() == free


def test_inspect_shows_them():
    shown = json.loads(here("inspect", "--json").out)
    assert all(layer["fused"] is None for layer in shown["layers"].values())
    from proxyq.cli.inspect import network_json
    from proxyq.model.network import network
    from proxyq.report.tables import network_table

    found = network(attention(), 2)
    layers = network_json(found)["layers"]
    assert (
        layers["attn.k_proj"]["fused"] == "attn.q_proj" and layers["attn.o_proj"]["fused"] is None
    )
    assert "fused" in [column.header for column in network_table(found).columns]


def test_the_command_takes_unties():
    done = here("search", "--proxy", "sqnr", "--budget", "size=3bit", "--untie", "nothing")
    assert done.code == 2 and "'nothing' of an untie matches no layer" in done.err
    done = here(
        *("search", "--proxy", "sqnr", "--budget", "size=3bit", "--tie", "same-sum", "--json")
    )
    plan = json.loads(done.out)["layers"]
    bits = {}
    for layer in plan.values():
        if layer["group"]:
            bits.setdefault(layer["group"], set()).add(layer["weight_bits"])
    assert bits and all(len(own) == 1 for own in bits.values())
