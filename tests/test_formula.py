"""Formulas as data: their text, their values against a naive evaluator, their files."""

import copy
import json
import math
import os
import subprocess
import sys
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyq.engine import NEEDS
from proxyq.errors import MissingExtra, ProxyqError, UsageError
from proxyq.proxies.formula import (
    OPERATIONS,
    STATISTICS,
    Formula,
    Node,
    Statistics,
    available_formulas,
    canonical,
    constant,
    evaluate,
    grow,
    load_formula,
    parse_formula,
    print_formula,
    rooted,
    to_latex,
    totals,
)
from proxyq.proxies.formula.file import MAX_BYTES
from proxyq.proxies.formula.grammar import MAX_DEPTH
from proxyq.proxies.formula.latex import plain_latex

BITS = (2, 3, 4)
SHAPES = ((27, 4), (36, 8), (72, 5), (1, 3), (40, 1))
SEEDS = st.integers(0, 2**32 - 1)


def drawn_layers(seed=0, shapes=SHAPES):
    """Arrays for each layer, like those of a network: some zeros, scales that differ."""
    rng = np.random.default_rng(seed)
    layers = {}
    for index, shape in enumerate(shapes):
        scale = 10.0 ** rng.uniform(-2, 1)
        w = rng.normal(size=shape) * scale
        w[rng.random(shape) < 0.1] = 0.0
        a = np.maximum(rng.normal(size=50 + index), 0)
        steps = [np.abs(w).max() / 2.0 ** (b - 1) for b in BITS]
        layers[f"layer{index}"] = {
            "W": w,
            "G": rng.normal(size=shape) * 1e-3,
            "F": rng.normal(size=shape) ** 2 * 1e-5,
            "V": np.abs(rng.normal(size=shape)) * 1e3,
            "H": rng.normal(size=shape),
            "D": np.stack([np.round(w / step) * step - w for step in steps]),
            "A": a,
            "E": np.stack([np.round(a * 2**b) / 2**b - a for b in BITS]),
            "O": rng.random(len(BITS)),
            "R": rng.random(len(BITS)) * 1e-3,
            "macs": 100.0 * (index + 1),
        }
    return layers


def naive(node, layer, index, real=np.float64):
    """The value of a node for one layer and the bit-width of an index, entry by entry."""

    def of(x):
        x = np.asarray(x, real)
        match node.name:
            case "log":
                return np.where(x <= 0, real(0), np.log(np.where(x <= 0, real(1), x + real(1e-9))))
            case "abslog":
                return np.where(x == 0, real(0), np.log(np.where(x == 0, real(1), abs(x))))
            case "abs":
                return abs(x)
            case "square":
                return x**2
            case "exp":
                return np.exp(np.minimum(x, real(80)))
            case "sqrt":
                return np.sqrt(np.where(x < 0, real(0), x))
            case "relu":
                return np.where(x < 0, real(0), x)
            case "invert":
                return real(1) / np.where(x < 0, x - real(1e-9), x + real(1e-9))
            case "sigmoid":
                return real(1) / (real(1) + np.exp(-x))
            case "neg":
                return -x
            case "normalise":
                s = x.std()
                return np.zeros_like(x) if s <= 1e-12 * abs(x.mean()) else (x - x.mean()) / s
            case "minmax":
                return (x - x.min()) / (x.max() - x.min() + real(1e-9))
            case "softmax":
                powers = np.exp(x - x.max(axis=-1, keepdims=True))
                return powers / powers.sum(axis=-1, keepdims=True)
            case "logsoftmax":
                below = x - x.max(axis=-1, keepdims=True)
                return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))
            case "mean":
                return x.mean()
            case "sum":
                return x.sum()
            case "l1":
                return abs(x).mean()
            case "norm":
                return np.sqrt((x**2).sum())
            case "std":
                return real(0) if x.std() <= 1e-12 * abs(x.mean()) else x.std()
            case "max":
                return x.max()
        raise AssertionError(node.name)

    if node.name == "constant":
        return real(node.value)
    if node.name == "bits":
        return real(BITS[index])
    if node.name == "weights":
        return real(layer["W"].size)
    if node.name in ("D", "E", "O", "R"):
        return np.asarray(layer[node.name][index], real)
    if node.name in STATISTICS:
        return np.asarray(layer[node.name], real)
    values = [naive(arg, layer, index, real) for arg in node.args]
    match node.name:
        case "add":
            return values[0] + values[1]
        case "sub":
            return values[0] - values[1]
        case "mul":
            return values[0] * values[1]
        case "div":
            b = values[1]
            return values[0] / np.where(b < 0, b - real(1e-9), b + real(1e-9))
    return of(values[0])


def naive_table(node, layers, real=np.float64):
    """`[layers, bits]`, or `[layers]`."""
    with np.errstate(all="ignore"):
        table = [
            [float(np.mean(naive(node, layer, i, real))) for i in range(len(BITS))]
            for layer in layers.values()
        ]
    return np.asarray(table) if node.depends_on_bits else np.asarray(table)[:, 0]


def one(formula, statistics):
    (found,) = evaluate([formula], statistics)
    return found


LAYERS = drawn_layers()
WHOLE = Statistics.build(LAYERS, BITS, entries=None)


# Trees


def test_every_leaf_needs_what_the_engine_records():
    for statistic in STATISTICS.values():
        assert set(statistic.needs) <= set(NEEDS)
    node = parse_formula("sum(square(D) * mean(square(G))) * max(A)")
    assert node.needs() == ("gradient", "weight", "sample")
    assert node.leaves == ("G", "D", "A")
    assert node.depends_on_bits and not node.args[1].depends_on_bits
    assert (node.size, node.depth) == (10, 6)


def test_equal_trees_are_equal_and_cannot_be_changed():
    one_, other = (parse_formula("mean(W * 2)") for _ in range(2))
    assert one_ == other and hash(one_) == hash(other) and one_ != parse_formula("mean(2 * W)")
    with pytest.raises(AttributeError):
        one_.name = "sum"  # type: ignore[misc]
    assert copy.deepcopy(one_) == one_ and one_.__reduce__() == (Node, (one_.name, one_.args, 0.0))
    assert constant(-0.0) == constant(0) and math.copysign(1, constant(-0.0).value) == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Node("sqroot", (Node("W"),)), "did you mean 'sqrt'"),
        (lambda: Node("add", (Node("W"),)), "takes 2 arguments, got 1"),
        (lambda: Node("W", (Node("W"),)), "takes no arguments"),
        (lambda: Node("mean", (Node("bits"),)), "'mean' must have entries"),
        (lambda: Node("softmax", (constant(1),)), "'softmax' must have entries"),
        (lambda: Node("mul", (Node("W"), Node("A"))), "entries of weight and of activation"),
        (lambda: Node("W", (), 2.0), "only a constant has a value"),
        (lambda: Node("neg", [Node("W")]), "must be a tuple of nodes"),  # type: ignore[arg-type]
        (lambda: constant(float("nan")), "finite number"),
        (lambda: constant(float("-inf")), "finite number"),
        (lambda: constant(10**400), "finite number"),
        (lambda: constant("2"), "must be a number"),  # type: ignore[arg-type]
        (lambda: constant(True), "must be a number"),
    ],
)
def test_wrong_trees_get_one_sentence(make, says):
    with pytest.raises(UsageError, match=says):
        make()


def test_trees_are_limited():
    node = Node("W")
    for _ in range(MAX_DEPTH - 1):
        node = Node("neg", (node,))
    assert node.depth == MAX_DEPTH and parse_formula(print_formula(node)) == node
    assert canonical(node) in (node, parse_formula("-mean(W)"))
    assert np.allclose(one(node, WHOLE), -naive_table(Node("W"), LAYERS), rtol=1e-12)
    assert plain_latex(node).count("-") == MAX_DEPTH - 1
    with pytest.raises(UsageError, match="60 levels deep"):
        Node("neg", (node,))
    wide = Node("W")
    for _ in range(7):
        wide = Node("add", (wide, wide))
    with pytest.raises(UsageError, match="500 nodes"):
        Node("add", (Node("add", (wide, wide)), wide))


# Text


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("sum(square(D)*mean(square(G)))", "sum(square(D) * mean(square(G)))"),
        ("((W))+ (G-H)", "W + (G - H)"),
        ("(W + G) - H", "W + G - H"),
        ("W - G - H", "W - G - H"),
        ("(W + G) * H / V", "(W + G) * H / V"),
        ("W / (G * H)", "W / (G * H)"),
        ("add(W, mul(G, neg(H)))", "W + G * -H"),
        ("-(W + G)", "-(W + G)"),
        ("- W * G", "-W * G"),
        ("--W", "--W"),
        ("-2", "-2"),
        ("-(2)", "neg(2)"),
        ("neg(-2)", "neg(-2)"),
        ("3 - -2.50", "3 - -2.5"),
        ("1e-9 + .5 + 2.", "1e-09 + 0.5 + 2"),
        ("bits\t*\nmacs", "bits * macs"),
    ],
)
def test_text_prints_and_parses_to_itself(text, printed):
    node = parse_formula(text)
    assert print_formula(node) == str(node) == printed
    assert parse_formula(printed) == node


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "character 1: it is empty"),
        ("  ", "it is empty"),
        ("W +", "character 4: expected a name, a number or '\\(', got the end"),
        ("mean(W", "character 7: expected '\\)', got the end"),
        ("mean(W))", "character 8: expected an operator or the end, got '\\)'"),
        ("mean W", "character 1: 'mean' must be followed by '\\('"),
        ("W(2)", "'W' is a statistic and takes no arguments"),
        ("meen(W)", "character 1: unknown operation 'meen': did you mean 'mean'"),
        ("mean(w)", "character 6: unknown statistic 'w': did you mean 'W'"),
        ("mean(W, G)", "'mean' takes 1 argument, got 2"),
        ("mean()", "got '\\)'"),
        ("W * A", "character 3: 'mul' must have arguments that go together"),
        ("mean(mean(W))", "character 1: 'mean' must have entries"),
        ("nan", "unknown statistic 'nan'"),
        ("mean(W) + inf", "character 11: unknown statistic 'inf'"),
        ("constant", "unknown statistic 'constant'"),
        ("1e999", "character 1: a number must be finite, got 1e999"),
        ("1e31", "finite number"),
        ("1" * 33, "at most 32 characters"),
        ("W ; G", "character 3: unexpected ';'"),
        ("W ** 2", "character 4: expected a name"),
        ("__import__('os')", "unexpected"),
        ("W\u00b2", "unexpected"),
        ("(" * 5000 + "W" + ")" * 4999, "60 levels deep"),
        ("-" * 9000 + "W", "60 levels deep"),
        ("neg(" * 2000 + "W" + ")" * 1999, "60 levels deep"),
        ("W" + " + W" * 2400, "60 levels deep"),
        ("mean(W)" + " + (1 + (2 + 3))" * 600, "60 levels deep"),
        ("W" * 9999, "unknown statistic"),
        ("W" * 10_001, "at most 10000 characters, got 10001"),
    ],
)
def test_wrong_text_gets_one_sentence_with_the_place(text, says):
    with pytest.raises(UsageError, match=says) as caught:
        parse_formula(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_too_many_nodes_are_refused_before_they_are_joined():
    balanced = "W"
    for _ in range(8):
        balanced = f"({balanced} + {balanced})"
    with pytest.raises(UsageError, match="500 nodes"):
        parse_formula(balanced)
    with pytest.raises(UsageError, match="must be text, got int"):
        parse_formula(3)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=60),
        st.lists(
            st.sampled_from([*OPERATIONS, *STATISTICS, *"+-*/(),", "2", "0.5", " ", "1e5", "("]),
            max_size=25,
        ).map(" ".join),
    )
)
def test_any_text_is_a_formula_or_one_sentence(text):
    try:
        node = parse_formula(text)
    except ProxyqError as error:
        assert str(error).endswith((".", "?")) and "\n" not in str(error)
        return
    printed = print_formula(node)
    assert parse_formula(printed) == node and print_formula(parse_formula(printed)) == printed


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_random_trees_survive_text(seed):
    node = grow(Random(seed), least=2, most=8)
    assert parse_formula(print_formula(node)) == node


# Values


def test_the_fast_evaluator_agrees_with_the_naive_one():
    """Where the naive one agrees with itself in more digits: a logarithm of a rounding error has
    no digits to agree in."""
    rng = Random(7)
    trees = [grow(rng, least=2, most=7) for _ in range(500)]
    trees += [
        Node(name, (leaf,)) for name in OPERATIONS for leaf in [Node("W")] if OPERATIONS[name] == 1
    ]
    trees += [grow(rng, type=kind) for kind in ("weight", "activation") for _ in range(20)]
    compared = 0
    for tree, found in zip(trees, evaluate(trees, WHOLE), strict=True):
        plain = naive_table(tree, LAYERS)
        exact = naive_table(tree, LAYERS, np.longdouble)
        if not np.isfinite(plain).all():
            assert found is None or not np.isfinite(exact).all(), tree
            continue
        if not np.allclose(plain, exact, rtol=1e-9, atol=0):
            continue
        assert found is not None, tree
        assert found.shape == plain.shape and found.dtype == np.float64
        np.testing.assert_allclose(found, plain, rtol=1e-7, atol=1e-12, err_msg=str(tree))
        compared += 1
    assert compared > 0.85 * len(trees)


def test_each_operation_on_what_could_break_it():
    edges = np.array([0.0, -0.0, 1e-9, -1e-9, 1e-300, -1e-300, 1e150, -1e150, 1.0, -1.0, 700, -700])
    values = {
        **{f"edge{i}": {"W": np.full((1, 1), x), "macs": 3} for i, x in enumerate(edges)},
        "zeros": {"W": np.zeros((2, 3)), "macs": 1},
        "same": {"W": np.full((7, 3), 0.1), "macs": 2},
    }
    statistics = Statistics.build(values, BITS, entries=None)
    for name in OPERATIONS:
        args = (Node("W"),) if OPERATIONS[name] == 1 else (Node("W"), Node("W"))
        tree = rooted(Node(name, args))
        with np.errstate(all="ignore"):
            plain = [float(naive(tree, layer, 0)) for layer in values.values()]
        found = one(tree, statistics)
        assert found is not None, name
        np.testing.assert_allclose(found, plain, rtol=1e-9, atol=1e-300, err_msg=name)
    # Equal entries have no spread, however their mean is rounded.
    assert one(parse_formula("std(W)"), statistics)[-1] == 0
    assert one(parse_formula("max(normalise(W))"), statistics)[-1] == 0
    # The sign of a zero changes nothing.
    assert one(parse_formula("invert(0 * macs)"), statistics)[0] == pytest.approx(1e9)
    assert one(parse_formula("invert(0 * -macs)"), statistics)[0] == pytest.approx(1e9)


def test_what_is_not_finite_is_invalid():
    big = Statistics.build({"a": {"W": np.full((2, 2), 1e200)}}, BITS)
    found = evaluate([parse_formula(t) for t in ("sum(square(W))", "sum(W)", "bits")], big)
    assert found[0] is None and found[1].tolist() == [4e200] and found[2].tolist() == [[2, 3, 4]]


def test_shapes_of_numbers_and_of_one_layer():
    single = Statistics.build({"a": LAYERS["layer0"]}, BITS, entries=None)
    for statistics, layers in ((single, 1), (WHOLE, len(LAYERS))):
        for text in ("2", "bits", "weights * 2", "sum(W * bits)", "mean(bits * macs * E)"):
            found = one(parse_formula(text), statistics)
            shape = (layers, 3) if parse_formula(text).depends_on_bits else (layers,)
            assert found is not None and found.shape == shape
            plain = naive_table(parse_formula(text), dict(list(LAYERS.items())[:layers]))
            np.testing.assert_allclose(found, plain, rtol=1e-12)


def test_emq_with_no_operation_on_twice_the_same_leaf():
    w = np.array([layer["W"].mean() for layer in LAYERS.values()])
    np.testing.assert_allclose(one(parse_formula("W + W"), WHOLE), 2 * w, rtol=1e-12)
    squares, products = evaluate([parse_formula("square(W)"), parse_formula("W * W")], WHOLE)
    assert np.array_equal(squares, products)


def test_plans_are_sums_or_means_of_their_layers():
    values = one(parse_formula("bits * mean(abs(W))"), WHOLE)
    choices = np.array([[0, 1, 2, 1, 0], [2, 2, 2, 2, 2]])
    plain = [sum(values[i, c] for i, c in enumerate(plan)) for plan in choices]
    np.testing.assert_allclose(totals(values, choices, "sum"), plain, rtol=1e-12)
    np.testing.assert_allclose(totals(values, choices, "mean"), np.divide(plain, 5), rtol=1e-12)
    assert totals(values[:, 0], choices, "sum").tolist() == [values[:, 0].sum()] * 2
    for wrong in ((choices, "max"), (choices[0], "sum"), (choices[:, :2], "sum")):
        with pytest.raises(UsageError):
            totals(values, *wrong)


def test_memory_bounds_what_is_kept_and_changes_nothing():
    rng = Random(3)
    trees = [grow(rng, least=3, most=7) for _ in range(60)]
    plenty = evaluate(trees, WHOLE)
    for memory in (0, 20_000):
        for found, other in zip(plenty, evaluate(trees, WHOLE, memory=memory), strict=True):
            assert (found is None) == (other is None)
            if found is not None:
                assert np.array_equal(found, other)


def test_alone_or_among_others_a_formula_has_the_same_bytes():
    rng = Random(4)
    trees = [grow(rng) for _ in range(50)]
    for tree, found in zip(trees, evaluate(trees, WHOLE), strict=True):
        again = one(tree, WHOLE)
        assert (again is None) == (found is None)
        if found is not None:
            assert again.tobytes() == found.tobytes()


def test_missing_statistics_are_named():
    statistics = Statistics.build({"a": {"W": np.ones((2, 2))}}, BITS)
    with pytest.raises(UsageError, match="reads 'G', which these statistics do not have"):
        evaluate([parse_formula("mean(W * G)")], statistics)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({}, "at least one layer"),
        ({"a": {"W": np.ones((2, 2))}, "b": {}}, "layer 'b' has no 'W'"),
        ({"a": {"W": np.ones(3)}}, r"'W' of layer 'a' must have the shape \[fan_in, channels\]"),
        ({"a": {"W": np.ones((2, 2)), "G": np.ones((4, 1))}}, "'G' of layer 'a'"),
        ({"a": {"D": np.ones((2, 2, 2))}}, "one array for each of 3 bit-widths"),
        ({"a": {"W": np.array([[np.nan]])}}, "'W' of layer 'a' must be finite"),
        ({"a": {"W": np.zeros((0, 3))}}, "at least one"),
        ({"a": {"X": np.ones((2, 2))}}, "got 'X'"),
        ({"a": {"bits": 2}}, "got 'bits'"),
        ({"a": {"macs": [1, 2]}}, "'macs' of layer 'a' must be one number"),
        ({"a": {"macs": "many"}}, "'macs' of layer 'a' must be numbers, got str"),
        ({"a": {"A": np.ones(9), "activations": 3}}, "at least the 9 values"),
    ],
)
def test_wrong_statistics_get_one_sentence(layers, says):
    with pytest.raises(UsageError, match=says):
        Statistics.build(layers, BITS)


# Some entries for all


def test_whole_rows_are_kept_and_the_same_seed_keeps_the_same():
    w = np.arange(360 * 16, dtype=float).reshape(360, 16)
    layers = {
        "a": {"W": w, "G": -w, "A": np.arange(1000.0)},
        "b": {"W": w[:3], "G": w[:3], "A": w[0]},
    }
    statistics = Statistics.build(layers, BITS, entries=128, seed=5)
    kept = statistics.leaves["W"][:128].reshape(8, 16)
    assert np.array_equal(kept, w[(kept[:, 0] // 16).astype(int)])
    assert len(np.unique(kept[:, 0])) == 8
    assert np.array_equal(statistics.leaves["G"][:128], -statistics.leaves["W"][:128])
    assert np.array_equal(statistics.leaves["W"][128:], w[:3].ravel())  # small: whole
    assert statistics.segments["activation"].counts.tolist() == [128, 16]
    assert statistics.leaves["weights"].tolist() == [5760, 48]
    again = Statistics.build(layers, BITS, entries=128, seed=5)
    other = Statistics.build(layers, BITS, entries=128, seed=6)
    for name, leaf in statistics.leaves.items():
        assert leaf.tobytes() == again.leaves[name].tobytes()
    assert not np.array_equal(statistics.leaves["W"], other.leaves["W"])
    # All positions of a 3 x 3 kernel are met.
    assert len(np.unique((kept[:, 0] // 16) % 9)) >= 7
    # One row at least, however long.
    few = Statistics.build(layers, BITS, entries=1)
    assert few.segments["weight"].counts.tolist() == [16, 16]


def test_sums_of_some_entries_are_unbiased():
    layers = {"a": {"W": np.random.default_rng(0).lognormal(size=(90, 4))}}
    formulas = [parse_formula("sum(W)"), parse_formula("square(norm(W))"), parse_formula("mean(W)")]
    found = np.array(
        [
            evaluate(formulas, Statistics.build(layers, BITS, entries=40, seed=s))
            for s in range(2000)
        ]
    )[..., 0]
    exact = np.array(evaluate(formulas, Statistics.build(layers, BITS, entries=None)))[:, 0]
    error = found.std(axis=0) / math.sqrt(len(found))
    assert (found.std(axis=0) > 0).all()
    assert (np.abs(found.mean(axis=0) - exact) < 4 * error).all()


def test_a_sample_of_activations_stands_for_all():
    layers = {"a": {"A": np.ones(10), "activations": 400}}
    assert one(parse_formula("sum(A)"), Statistics.build(layers, BITS))[0] == 400


# Canonical form


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("W", "mean(W)"),
        ("mean(G * W)", "mean(G * W)"),
        ("mean(W * G)", "mean(G * W)"),
        ("sum(W + W)", "sum(2 * W)"),
        ("sum(W * W)", "sum(square(W))"),
        ("sum(--W)", "sum(W)"),
        ("sum(abs(abs(W)))", "sum(abs(W))"),
        ("mean(abs(-W))", "l1(W)"),
        ("l1(square(W))", "mean(square(W))"),
        ("sum(W + 0)", "sum(W)"),
        ("sum(1 * W)", "sum(W)"),
        ("sum(W * -1)", "-sum(W)"),
        ("sum(0 - W)", "-sum(W)"),
        ("sum(-W * -G)", "sum(G * W)"),
        ("sum(square(W - G))", "sum(square(G - W))"),
        ("sum(W - 2)", "sum(-2 + W)"),
        ("sum(W * 2 * -3)", "sum(-3 * (2 * W))"),
        ("bits * (2 + 3)", "5 * bits"),
        ("sum(W) / 1", "sum(W) / 1"),
        ("sum(W - W)", "sum(W - W)"),
        ("sum(sqrt(relu(W)))", "sum(sqrt(W))"),
        ("exp(200) * exp(200)", "square(exp(200))"),  # too large a number to be written out
        ("exp(2) * 0 + relu(-3)", "0"),
    ],
)
def test_canonical_forms(text, form):
    found = canonical(parse_formula(text))
    assert print_formula(found) == form
    assert canonical(found) == found


@settings(max_examples=400, deadline=None)
@given(SEEDS)
def test_the_canonical_form_keeps_values(seed):
    rng = Random(seed)
    node = grow(rng, least=3, most=8, leaves=[*rng.sample(list(STATISTICS), 4), "W"])
    form = canonical(node)
    assert form.type == "layer" and canonical(form) == form
    assert form.size <= rooted(node).size
    plain, found = evaluate([node, form], WHOLE)
    assert (plain is None) == (found is None), (str(node), str(form))
    if plain is None or found is None:
        return
    if any(part.name == "constant" for part in node.walk()):
        # Numbers that are folded are rounded, and a difference of them may have no digits left.
        exact = naive_table(node, LAYERS, np.longdouble)
        if not np.allclose(plain, exact, rtol=1e-9, atol=0):
            return
    np.testing.assert_allclose(found, plain, rtol=1e-9, err_msg=f"{node} -> {form}")


# LaTeX


def test_latex_by_sympy_and_by_ourselves():
    pytest.importorskip("sympy")
    node = parse_formula("bits * mean(softmax(abslog(V)) * sqrt(relu(W))) - 0.5 / l1(D)")
    text = to_latex(node)
    assert r"\operatorname{softmax}" in text and r"\sqrt" in text and r"\Delta_{W}" in text
    assert text.count("{") == text.count("}") and "\n" not in text
    assert plain_latex(node).count("{") == plain_latex(node).count("}")
    assert plain_latex(parse_formula("macs * -1e-9")) == r"m \cdot \left(-1 \cdot 10^{-9}\right)"
    # Nothing is simplified away.
    assert to_latex(parse_formula("macs - macs")) != "0"


def test_latex_without_time_or_sympy_still_answers(monkeypatch):
    pytest.importorskip("sympy")
    import threading

    import sympy

    node = parse_formula("sum(square(W))")
    stuck = threading.Event()
    monkeypatch.setattr(sympy, "latex", lambda *args, **options: stuck.wait(20))
    assert to_latex(node, seconds=0.05) == plain_latex(node)
    stuck.set()

    def broken(*args, **options):
        raise RecursionError

    monkeypatch.setattr(sympy, "latex", broken)
    assert to_latex(node) == plain_latex(node)
    monkeypatch.setitem(sys.modules, "sympy", None)
    with pytest.raises(MissingExtra, match=r"pip install 'proxyq\[formula\]'"):
        to_latex(node)
    with pytest.raises(UsageError, match="positive"):
        to_latex(node, seconds=0)


# Random trees


def test_random_trees_keep_their_bounds():
    rng = Random(1)
    for _ in range(300):
        least = rng.randint(2, 5)
        node = grow(rng, least=least, most=least + 2, leaves=("W", "D", "bits"), nodes=25)
        assert node.type == "layer" and node.size <= 25 and node.depth <= least + 2
        assert set(node.leaves) <= {"W", "D", "bits"}
    assert {grow(rng, type="weight").type, grow(rng, type="activation").type} == {
        "weight",
        "activation",
    }
    only = grow(rng, leaves=("G",), constants=False)
    assert set(only.leaves) == {"G"} and not any(n.name == "constant" for n in only.walk())
    assert grow(rng, nodes=2).size == 2
    for wrong in (
        {"least": 1},
        {"least": 5, "most": 4},
        {"leaves": ("bits",)},
        {"leaves": ("Q",)},
        {"leaves": ("W",), "type": "activation"},
        {"nodes": 1},
    ):
        with pytest.raises(UsageError):
            grow(rng, **wrong)


def test_the_same_seed_grows_the_same_whatever_the_hash_seed():
    code = (
        "from random import Random\n"
        "from proxyq.proxies.formula import canonical, grow\n"
        "rng = Random(11)\n"
        "for _ in range(40):\n"
        "    tree = grow(rng)\n"
        "    print(tree, canonical(tree), tree.needs())\n"
    )
    texts = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 40


# Files


PLAIN = {
    "schema": "proxyq/formula/1",
    "name": "mine",
    "formula": "sum(square(D))",
    "direction": "cost",
}


def test_files_come_back_as_they_were(tmp_path):
    formula = Formula.from_json(
        {
            **PLAIN,
            "total": "mean",
            "origin": {"seed": 3, "fitness": {"b": 0.5, "a": 1}},
            "note": "é",
        }
    )
    path = formula.save(tmp_path / "mine.json")
    again = load_formula(path)
    assert again == formula and again.to_json() == path.read_text()
    assert again.node == parse_formula("sum(square(D))")
    assert list(again.origin["fitness"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("{", "not valid JSON"),
        ("[]", "holds no formula"),
        ("3", "holds no formula"),
        ("", "not valid JSON"),
        ("1" * 5000, "too many digits"),
        (b"\xff\xfe", "not UTF-8"),
        ({**PLAIN, "schema": "proxyq/formula/9"}, "which this version does not read"),
        ({**PLAIN, "schema": "proxyq/plan/1"}, "holds no formula"),
        ({**PLAIN, "schema": {"a": 1}}, "got a dict"),
        ({**PLAIN, "formula": "sum(W"}, "'formula': the formula is wrong at character 6"),
        ({**PLAIN, "formula": "summ(W)"}, "did you mean 'sum'"),
        ({**PLAIN, "formula": "sum(W) * NaN"}, "unknown statistic 'NaN'"),
        ({**PLAIN, "formula": "(" * 9000}, "60 levels deep"),
        ({**PLAIN, "formula": "W" * 20_000}, "at most 10000 characters"),
        ({**PLAIN, "formula": ["sum", "W"]}, "'formula': input should be a valid string"),
        ({**PLAIN, "name": "../up"}, "bad field 'name'"),
        ({**PLAIN, "name": "x" * 500}, "bad field 'name'"),
        ({**PLAIN, "name": 3}, "bad field 'name'"),
        ({**PLAIN, "total": "max"}, "bad field 'total'"),
        ({**PLAIN, "direction": None}, "bad field 'direction'"),
        ({**PLAIN, "extra": 1}, "'extra': no such field"),
        ({k: v for k, v in PLAIN.items() if k != "direction"}, "'direction': it is missing"),
        ({**PLAIN, "origin": {"fitness": float("nan")}}, "without NaN"),
        ({**PLAIN, "origin": {"fitness": float("inf")}}, "without NaN"),
        ({**PLAIN, "origin": [1]}, "bad field 'origin'"),
        ({**PLAIN, "note": "\ud800"}, "text that UTF-8 cannot write"),
        ({**PLAIN, "origin": {"a": "\ud800"}}, "text that UTF-8 cannot write"),
    ],
)
def test_hostile_files_get_one_sentence(tmp_path, content, says):
    path = tmp_path / "bad.json"
    data = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ProxyqError, match=says) as caught:
        load_formula(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(path))


def test_deep_origins_large_and_irregular_files_are_refused(tmp_path):
    path = tmp_path / "deep.json"
    for levels, says in ((11, "nested at most 20 levels"), (400, "nested too deeply: 50 levels")):
        deep: dict = {}
        for _ in range(levels):
            deep = {"a": [deep]}
        path.write_text(json.dumps({**PLAIN, "origin": deep}))
        with pytest.raises(ProxyqError, match=says):
            load_formula(path)
    path.write_bytes(b" " * 10_000_000)
    with pytest.raises(ProxyqError, match=f"at most {MAX_BYTES} bytes, got 10000000"):
        load_formula(path)
    for wrong in (tmp_path, "/dev/zero", tmp_path / "none.json", "a\0b.json"):
        with pytest.raises(ProxyqError, match="cannot read the formula"):
            Formula.load(wrong)
    with pytest.raises(UsageError, match=r"unknown formula 'snap': did you mean 'snip'"):
        load_formula("snap")


def direct(name, layer, index):
    """Published formulas as plain functions of arrays."""
    w, g, v = layer["W"], layer["G"], layer["V"]
    if name == "emq":
        logs = np.log(np.where(v == 0, 1, np.abs(v)))
        parts = np.exp(logs - logs.max(1, keepdims=True))
        parts /= parts.sum(1, keepdims=True)
        return BITS[index] * np.mean(parts * np.sqrt(np.maximum(w, 0)))
    return {
        "snip": np.abs(g * w).sum(),
        "synflow": np.abs(w * v).sum(),
        "weight-mse": (layer["D"][index] ** 2).sum(),
        "fisher": 0.5 * (layer["F"] * layer["D"][index] ** 2).sum(),
    }[name]


@pytest.mark.parametrize("name", ["emq", "snip", "synflow", "weight-mse", "fisher"])
def test_published_formulas_are_those_of_their_sources(name):
    assert available_formulas()[name].parent.name == "published"
    formula = load_formula(name)
    assert formula.name == name and formula.origin["source"]
    assert canonical(formula.node) is not None
    found = one(formula.node, WHOLE)
    wanted = [[direct(name, layer, i) for i in range(len(BITS))] for layer in LAYERS.values()]
    table = found if found.ndim == 2 else np.repeat(found[:, None], len(BITS), axis=1)
    np.testing.assert_allclose(table, wanted, rtol=1e-12)


def test_all_on_the_shelf_can_be_read():
    for name, path in available_formulas().items():
        formula = load_formula(name)
        assert formula.name == name == path.stem
        assert one(formula.node, WHOLE) is not None
        assert Formula.from_json(json.loads(formula.to_json())) == formula
