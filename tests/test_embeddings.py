"""Tables that are looked up as layers: which are found, and what is rounded, scored and stored."""

import json
import runpy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commandline import here
from flax import nnx

import proxyq
from proxyq.api import export_model, quantize_model
from proxyq.api.evaluate import measure
from proxyq.data.prepared import prepared
from proxyq.engine import Engine, collect
from proxyq.engine.statistics import correct_weights
from proxyq.errors import ProxyqError
from proxyq.export.parameters import to_nnx, to_params
from proxyq.model.explain import kept_float, looked_up_float
from proxyq.model.function_import import from_function
from proxyq.model.graph import trace
from proxyq.model.network import network
from proxyq.proxies import PROXIES
from proxyq.ptq.correct import correct
from proxyq.ptq.deploy import deployed_layers
from proxyq.ptq.packed import load_packed, save_packed
from proxyq.ptq.quantized import round_weights
from proxyq.ptq.reconstruct import Learning
from proxyq.quantize import quantize_columns
from proxyq.search.allocate.plan import Plan, PlannedLayer

WORDS, TOKENS, WIDTH = 13, 5, 6
IDS = np.random.default_rng(0).integers(0, WORDS, (24, TOKENS)).astype(np.int32)
# None is 0: the row of that word is zero, and its logit has no logarithm where the head is tied.
LABELS = np.random.default_rng(1).integers(1, WORDS, 24)

# A file that names a model on the command line, of torch alone.
FACTORY = f"""
import torch
from torch import nn


class Words(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.table = nn.Embedding({WORDS}, {WIDTH}, padding_idx=0)
        self.places = nn.Embedding({TOKENS}, {WIDTH})
        self.first = nn.Linear({WIDTH}, 8)
        self.second = nn.Linear(8, {WIDTH})
        self.head = nn.Linear({WIDTH}, {WORDS}, bias=not tied)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids) + self.places(torch.arange({TOKENS}))
        return self.head(self.second(torch.relu(self.first(x))).mean(1))


def words(tied=False):
    import proxyq

    torch.manual_seed(3)
    return proxyq.from_torch(Words(tied).eval(), torch.zeros((1, {TOKENS}), dtype=torch.int64))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The network with a head of its own and with a tied one, both without embeddings."""
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("factory") / "words.py"
    path.write_text(FACTORY)
    code = runpy.run_path(str(path))
    return {tied: code["words"](tied) for tied in (False, True)}


def with_tables(model):
    return model.replace(embeddings=True)


def plan_of(model, *bits, activation_bits=None):
    """A plan whose layers take the widths in turn, with no record of its model but where the names
    of its layers would not tell."""
    layers = {
        layer.name: PlannedLayer(
            weight_bits=bits[i % len(bits)],
            activation_bits=activation_bits if layer.reads_numbers else None,
            weights=layer.weights,
            macs=layer.macs,
        )
        for i, layer in enumerate(network(model, 2).layers)
    }
    tied = any(layer.kind == "tied-embedding" for layer in network(model, 2).layers)
    return Plan(schema="proxyq/plan/1", layers=layers, model={"embeddings": True} if tied else {})


def rounded_rows(array, bits):
    """Each row of a matrix on a grid of its own, one row after the other."""
    rows = [np.asarray(quantize_columns(jnp.asarray(row)[:, None], bits))[:, 0] for row in array]
    return np.stack(rows)


def naive_words(params, ids, *, tied, weights=None):
    """The module by hand, with some of its weights replaced."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()} | (weights or {})
    x = np.stack([[p["table.weight"][i] for i in row] for row in ids]) + p["places.weight"]
    x = np.maximum(x @ p["first.weight"].T + p["first.bias"], 0)
    x = (x @ p["second.weight"].T + p["second.bias"]).mean(axis=1)
    return x @ p["table.weight"].T if tied else x @ p["head.weight"].T + p["head.bias"]


# -- which are layers ------------------------------------------------------------------------


def test_without_the_flag_nothing_is_new(models):
    for tied, model in models.items():
        names = ["first", "second", *(["table"] if tied else ["head"])]
        found = network(model, 2)
        assert list(found.names) == names
        assert {layer.kind for layer in found.layers} == {"linear"}
        assert not any(site.lookup for site in found.sites)
        # The graph is the one that was always traced: the lookup lies inside a call.
        assert "gather" not in {eqn.primitive.name for eqn in trace(model, 2).main}
        plan = proxyq.search(model, proxy="sqnr", budget="size=3bit")
        assert "embeddings" not in plan.model and list(plan.layers) == names
        assert looked_up_float(found) == ("table.weight",)


def test_a_table_is_a_layer_with_a_grid_for_each_row(models):
    found = network(with_tables(models[False]), 3)
    table, first, *_ = found.layers
    assert (table.name, table.kind, table.parameter) == ("table", "embedding", "table.weight")
    assert (table.weights, table.macs, table.channels) == (WORDS * WIDTH, 0, WORDS)
    assert table.output_shape == (TOKENS, WIDTH) and table.shares_input is None
    assert first.kind == "linear" and not table.reads_numbers and first.reads_numbers
    (site,) = (found.sites[i] for i in found.sites_of("table"))
    assert site.lookup and site.channel_axes == (0,) and site.output_axes == ()
    assert all(one.apart for one in found.sites)  # the images of a batch are told apart
    # Positions by number are no lookup: their table is added, and stays float.
    why = {one.parameter: one.why for one in kept_float(found)}
    assert why["places.weight"] == "rows at fixed places, added to data"
    assert "table.weight" not in why and looked_up_float(found) == ()


def test_a_tied_table_is_one_layer_with_two_sites(models):
    found = network(with_tables(models[True]), 2)
    table = found.layer("table")
    assert table.kind == "tied-embedding" and table.weights == WORDS * WIDTH
    assert table.macs == WORDS * WIDTH and table.reads_numbers
    lookup, product = (found.sites[i] for i in found.sites_of("table"))
    assert lookup.lookup and not product.lookup
    engine = Engine.build(with_tables(models[True]), 2)
    np.testing.assert_array_equal(*(engine.columns(i) for i in found.sites_of("table")))


@pytest.mark.parametrize("how", ["clip", "fill", "index", "wrapped", "columns"])
def test_forms_of_lookups(how):
    key = jax.random.key(0)
    params = {"table": jax.random.normal(key, (WORDS, WIDTH)), "w": jnp.ones((WIDTH, 3))}

    def apply(p, ids):
        match how:
            case "index":
                x = p["table"][ids]
            case "wrapped":
                x = jax.checkpoint(lambda t, i: jnp.take(t, i, axis=0))(2 * p["table"], ids)
            case "columns":
                x = jnp.moveaxis(jnp.take(p["table"].T, ids, axis=1), 0, -1)
            case _:
                x = jnp.take(p["table"], ids, axis=0, mode=how)
        return x.mean(1) @ p["w"]

    model = from_function(apply, params, (TOKENS,), dtype=jnp.int32)
    model = model.replace(embeddings=True)
    found = network(model, 4)
    assert [layer.kind for layer in found.layers] == ["embedding", "linear"]
    assert all(site.apart for site in found.sites)
    made = quantize_model(model, plan_of(model, 3, 8), IDS, correction="none")
    exact = {name: np.asarray(value) for name, value in params.items()}
    exact["table"] = rounded_rows(exact["table"] * (2 if how == "wrapped" else 1), 3)
    wanted = exact["table"][IDS].mean(1) @ rounded_rows(exact["w"].T, 8).T
    np.testing.assert_allclose(made.logits(IDS), wanted, atol=1e-5)


def test_what_is_no_lookup_of_whole_rows_stays_float():
    params = {"t": jnp.ones((4, 6)), "bias": jnp.ones(4), "w": jnp.ones((3, 2))}

    def apply(p, ids):
        parts = jax.vmap(lambda i: jax.lax.dynamic_slice(p["t"], (i, 0), (1, 3))[0])(ids[:, 0])
        return (parts + p["bias"][ids[:, :1]]) @ p["w"]

    model = from_function(apply, params, (2,), dtype=jnp.int32).replace(embeddings=True)
    assert network(model, 2).names == ("w",)


# -- what is rounded -------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_rounded_rows(models, tied):
    model = models[tied]
    made = quantize_model(model, plan_of(with_tables(model), 3, 4, 2, 5), IDS, correction="none")
    assert made.model.embeddings  # the plan said so
    params = model.params
    bits = made.bits
    weights = {
        f"{name}.weight": rounded_rows(params[f"{name}.weight"], bits[name]) for name in bits
    }
    wanted = naive_words(params, IDS, tied=tied, weights=weights)
    np.testing.assert_allclose(made.logits(IDS), wanted, atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(model.apply(model.params, IDS)), naive_words(params, IDS, tied=tied), atol=1e-5
    )


def test_indices_are_never_rounded(models):
    model = with_tables(models[False])
    plan = proxyq.search(model, IDS, proxy="sqnr", budget="bops=20k", activation_bits=4)
    assert plan.layers["table"].activation_bits is None and plan.model["embeddings"] is True
    assert plan.layers["head"].activation_bits == 4
    used = sum(4 * one.macs * (one.weight_bits or 32) for one in plan.layers.values())
    (budget,) = plan.budgets
    assert budget.achieved == pytest.approx(used / 1000) and used <= 20_000
    # Free bit operations: the table takes all the bits that there are.
    assert plan.layers["table"].weight_bits == 8
    made = quantize_model(model, plan, IDS)
    own = network(model, 2)
    for index, edit in made.edits.items():
        assert (edit.input_grid is None) == own.sites[index].lookup
    # Candidates of activation bits: nothing changes with them.
    scores = PROXIES.get("kl-delta")(model, IDS, bits=(3,), activation_bits=(2, 4))
    assert not scores.activations[0].any() and scores.activations[1:].all()


def test_size_counts_the_table(models):
    model = with_tables(models[False])
    plan = proxyq.search(model, proxy="sqnr", budget="size=3bit")
    assert plan.size_bits == sum(one.weights * one.weight_bits for one in plan.layers.values())
    assert plan.layers["table"].weights == WORDS * WIDTH
    assert plan.size_bits <= 3 * (2 * WORDS * WIDTH + 2 * 8 * WIDTH)


@pytest.mark.parametrize("tied", [False, True])
def test_statistics_leave_the_grid_of_a_table(models, tied):
    model = with_tables(models[tied])
    engine = Engine.build(model, len(IDS))
    edits = round_weights(engine, dict.fromkeys(engine.network.names, 3))
    fixed, used, _ = correct(engine, edits, IDS, "statistics")
    assert used == "statistics"
    for index in engine.network.sites_of("table"):
        np.testing.assert_array_equal(fixed[index].weight, edits[index].weight)
    lookup, *product = engine.network.sites_of("table")
    assert fixed[lookup].offset is None
    assert all(np.any(fixed[i].offset) for i in product)  # a shift alone
    # Rows have means and norms, which need no data.
    rows = correct_weights(engine, edits)[lookup].weight
    exact = np.asarray(engine.weight(lookup))
    np.testing.assert_allclose(rows.mean(axis=1), exact.mean(axis=1), atol=1e-6)


LEARNING = Learning(steps=6, batch_size=8)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"correction": "statistics"},
        pytest.param({"correction": "weights"}, marks=pytest.mark.slow),
        pytest.param({"reconstruction": "adaround"}, marks=pytest.mark.slow),
        pytest.param({"reconstruction": "block"}, marks=pytest.mark.slow),
    ],
    ids=lambda how: next(iter(how.values())),
)
def test_plan_to_packed_file_and_back(models, tied, how, tmp_path):
    model = models[tied]
    beside = 8 if how == {"correction": "weights"} else None
    plan = plan_of(with_tables(model), 3, 4, 2, 5, activation_bits=beside)
    learning = LEARNING if "reconstruction" in how else None
    made = quantize_model(model, plan, IDS, learning=learning, **how)
    size = save_packed(made, tmp_path / "net.safetensors")
    # One table, however often it is used, and no more bytes than the plan promised.
    promised = sum(-(-one.weights * one.weight_bits // 8) for one in plan.layers.values())
    assert size.codes == promised
    back = load_packed(tmp_path / "net.safetensors", model)
    assert back.model.embeddings and back.plan == plan
    for index, own in made.integers.items():
        for a, b in zip(own, back.integers[index], strict=True):
            np.testing.assert_array_equal(a, b)
    # Biases are added in another order.
    exactly = {} if how == {"correction": "weights"} else {"atol": 1e-6}
    np.testing.assert_allclose(back.logits(IDS), made.logits(IDS), **({"rtol": 0} | exactly))
    (table,) = (layer for layer in deployed_layers(made) if layer.parameter == "table.weight")
    assert table.weight.codes.shape == (WORDS, WIDTH) and not table.computed
    assert table.weight.scale.shape == (WORDS, 1) and (table.inputs is not None) == (
        tied and beside is not None
    )
    nearest = quantize_model(model, plan, IDS, correction="none")
    for index in network(made.model, 2).sites_of("table"):
        np.testing.assert_array_equal(made.integers[index].codes, nearest.integers[index].codes)


def test_evaluation_of_plans_with_and_without(models):
    model = models[False]
    plans = [plan_of(model, 4), plan_of(with_tables(model), 4)]
    data = prepared(IDS, LABELS, model)
    found = measure(model, plans, IDS, data, correction="none")
    for plan, one in zip(plans, found.plans, strict=True):
        logits = quantize_model(model, plan, IDS, correction="none").logits(IDS)
        assert one.top1 == pytest.approx(100 * np.mean(logits.argmax(-1) == LABELS))
        assert one.size_bits == plan.size_bits
    assert found.plans[0].kl != found.plans[1].kl


def test_a_plan_decides_over_the_model(models):
    model = models[True]
    plan = proxyq.search(with_tables(model), proxy="sqnr", budget="size=3bit")
    without = proxyq.search(model, proxy="sqnr", budget="size=3bit")
    assert set(plan.layers) == set(without.layers)  # names alone would not tell
    assert quantize_model(model, plan, correction="none").model.embeddings
    assert not quantize_model(with_tables(model), without, correction="none").model.embeddings
    other = plan_of(with_tables(models[False]), 4)
    with pytest.raises(ProxyqError, match="for another model"):
        quantize_model(model, other, correction="none")


# -- scores ----------------------------------------------------------------------------------

REFUSING = {"evolved", "jacobian-covariance", "limpq", "activation-mse"}


def test_proxies_that_cannot_score_a_table_say_so(models):
    model = with_tables(models[False])
    for name in REFUSING:
        with pytest.raises(ProxyqError, match=f"{name!r} cannot score tables .* 'table': leave"):
            PROXIES.get(name)(model, IDS, labels=LABELS)
    with pytest.raises(ProxyqError, match=r"'formula:.*' cannot score tables"):
        PROXIES.get("formula:evolved-3")(model, IDS)
    file = proxyq.score(model, IDS, proxies=["sqnr", "macs", "output-error"])
    assert file.model["embeddings"] is True and file.layers["table"].kind == "embedding"
    plan = proxyq.allocate(file, "size=3bit", proxy="sqnr")
    assert plan.model["embeddings"] is True


@pytest.mark.parametrize("tied", [False, True])
def test_errors_of_outputs_are_those_of_rows(models, tied):
    model = with_tables(models[tied])
    engine = Engine.build(model, len(IDS))
    bits = (2, 4)
    taps = collect(engine, IDS, ("output-error", "restored-error"), bits)
    table = np.asarray(model.params["table.weight"], np.float64)
    seen = table[IDS]
    tap = taps.taps[0]
    own = [np.mean((rounded_rows(table, b)[IDS] - seen) ** 2) / seen.var() for b in bits]
    if not tied:
        np.testing.assert_allclose(tap.output_error, own, rtol=1e-5)
        # Statistics restore nothing of a lookup.
        np.testing.assert_array_equal(tap.restored_error, tap.output_error)
        return
    # The head's own part, whose means alone are restored, counts as much.
    x = naive_words(model.params, IDS, tied=True, weights={"table.weight": table})
    head = np.linalg.lstsq(table, x.T, rcond=None)[0].T
    change = [head @ (rounded_rows(table, b) - table).T for b in bits]
    plain = [np.mean(d**2) / x.var() for d in change]
    restored = [d.var(axis=0).mean() / x.var() for d in change]
    np.testing.assert_allclose(tap.output_error, np.mean([own, plain], axis=0), rtol=1e-4)
    np.testing.assert_allclose(tap.restored_error, np.mean([own, restored], axis=0), rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_tables(models, tied):
    model = with_tables(models[tied])
    engine = Engine.build(model, len(IDS), tape=True)
    needs = ("gradient", "gradient-squares", "first-order")
    taps = collect(engine, IDS, needs, (3,), labels=LABELS)

    def loss(table, ids, label):
        logits = model.apply({**model.params, "table.weight": table}, ids[None])[0]
        return -jax.nn.log_softmax(logits)[label]

    table = model.params["table.weight"]
    each = jax.vmap(jax.grad(loss), (None, 0, 0))(table, jnp.asarray(IDS), jnp.asarray(LABELS))
    each = np.asarray(each, np.float64)
    tap = taps.taps[0]
    np.testing.assert_allclose(tap.gradient, each.mean(axis=0).T, atol=1e-6)
    np.testing.assert_allclose(tap.gradient_squares, (each**2).mean(axis=0).T, atol=1e-6)
    change = rounded_rows(table, 3) - np.asarray(table)
    wanted = (each * change).sum(axis=(1, 2))
    np.testing.assert_allclose(tap.first_order[0], wanted, atol=1e-5)


def test_a_sweep_measures_the_table(models):
    model = with_tables(models[True])
    scores = PROXIES.get("logit-mse")(model, IDS, bits=(2, 4))
    exact = naive_words(model.params, IDS, tied=True)
    table = model.params["table.weight"]
    for column, bits in enumerate((2, 4)):
        weights = {"table.weight": rounded_rows(table, bits)}
        moved = naive_words(model.params, IDS, tied=True, weights=weights)
        np.testing.assert_allclose(
            scores.values[0, column], np.mean((moved - exact) ** 2), rtol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_every_proxy_scores_a_table_or_refuses(models, tied):
    model = with_tables(models[tied])
    for proxy in PROXIES:
        if proxy.name in REFUSING:
            continue
        if proxy.name == "zen":  # noise of indices is none, with or without tables
            with pytest.raises(ProxyqError, match="'zen' gives 0 for every layer"):
                proxy(model, IDS)
            continue
        beside = (4, 8) if proxy.activations else ()
        scores = proxy(model, IDS, labels=LABELS, activation_bits=beside)
        assert np.isfinite(scores.values).all()
        if proxy.activations and not tied:
            np.testing.assert_allclose(scores.activations[0], 0, atol=1e-12)


# -- other programs --------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_onnx_looks_up_what_it_dequantizes(models, tied, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from proxyq.export.onnx import run_onnx

    plan = plan_of(with_tables(models[tied]), 3, 4, 8, 5)
    made = quantize_model(models[tied], plan, IDS, correction="none")
    data = prepared(IDS, None, models[tied])
    out = tmp_path / "net.onnx"
    done = export_model(
        models[tied], plan, data, to="onnx", out=out, correction="none", strict=False
    )
    assert done.raised["table"] == (3, 4)
    theirs = run_onnx(out.read_bytes(), IDS, optimized=False)
    np.testing.assert_allclose(theirs, made.logits(IDS), atol=1e-5)
    graph = onnx.load(out).graph
    (table,) = (one for one in graph.initializer if one.name == "table.weight")
    assert list(table.dims) == [WORDS, WIDTH] and table.data_type == onnx.TensorProto.INT4
    (lookup,) = (one for one in graph.node if one.op_type == "Gather")
    (maker,) = (one for one in graph.node if lookup.input[0] in one.output)
    assert maker.op_type == "DequantizeLinear"
    axis = next((one.i for one in maker.attribute if one.name == "axis"), 1)
    assert axis == 0


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_formats_without_tables_leave_them_float_and_say_so(models, tied, tmp_path):
    from proxyq.model.torch_import import import_torchvision

    import_torchvision()  # transformers asks for it
    pytest.importorskip("compressed_tensors")
    model = models[tied]
    plan = proxyq.search(with_tables(model), proxy="sqnr", budget="size=4bit", bits=(4,))
    data = prepared(IDS, None, model)
    to = {"to": "compressed-tensors", "out": tmp_path / "net", "correction": "none"}
    with pytest.raises(ProxyqError, match=r"'table' \(4 bits as float\)"):
        export_model(model, plan, data, strict=True, **to)
    done = export_model(model, plan, data, **to)
    assert done.raised == {"table": (4, 32)} and done.difference < 1e-5
    assert any("more than the plan's budget of 4 bit" in note for note in done.notes)
    assert any("no tables that are looked up" in note for note in done.notes)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_torchao_looks_up_its_integers(models, tied, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchao")
    from proxyq.export.torchao import load_torchao

    plan = plan_of(with_tables(models[tied]), 3, 4, 8, 5)
    made = quantize_model(models[tied], plan, IDS, correction="none")
    data = prepared(IDS, None, models[tied])
    out = tmp_path / "net"
    done = export_model(models[tied], plan, data, to="torchao", out=out, correction="none")
    assert not done.raised
    back = load_torchao(out, models[tied].source)
    assert "IntxUnpackedToInt8Tensor" in type(back.table.weight).__name__
    with torch.no_grad():
        theirs = back(torch.from_numpy(IDS)).numpy()
    np.testing.assert_allclose(theirs, made.logits(IDS), atol=1e-5)


@pytest.mark.slow
def test_onnx_of_a_tied_head_alone(models, tmp_path):
    pytest.importorskip("onnxruntime")
    from proxyq.export.onnx import run_onnx

    model = models[True]
    plan = proxyq.search(model, proxy="sqnr", budget="size=4bit", bits=(4,))
    made = quantize_model(model, plan, correction="none")
    out = tmp_path / "net.onnx"
    export_model(model, plan, prepared(IDS, None, model), to="onnx", out=out, correction="none")
    theirs = run_onnx(out.read_bytes(), IDS, optimized=False)
    np.testing.assert_allclose(theirs, made.logits(IDS), atol=1e-5)


class FlaxWords(nnx.Module):
    def __init__(self, tied, rngs):
        self.table = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = None if tied else nnx.Linear(WIDTH, WORDS, rngs=rngs)

    def __call__(self, ids):
        x = nnx.relu(self.first(self.table(ids))).mean(1)
        return self.table.attend(x) if self.head is None else self.head(x)


@pytest.mark.parametrize("tied", [False, True])
def test_flax_modules_and_back(tied):
    module = FlaxWords(tied, nnx.Rngs(0))
    model = proxyq.from_nnx(module, (TOKENS,), dtype=jnp.int32)
    found = network(with_tables(model), 2)
    assert found.layers[0].kind == ("tied-embedding" if tied else "embedding")
    assert found.layers[0].name == "table"
    made = quantize_model(model, plan_of(with_tables(model), 3, 8), IDS, correction="none")
    wanted = made.logits(IDS)
    np.testing.assert_allclose(model.apply(to_params(made), IDS), wanted, atol=1e-6)
    np.testing.assert_allclose(np.asarray(to_nnx(made, module)(IDS)), wanted, atol=1e-6)
    table = to_params(made)["table.embedding"]
    np.testing.assert_allclose(table, rounded_rows(model.params["table.embedding"], 3), rtol=1e-6)


@pytest.mark.slow
def test_qwix_leaves_tables_float(tmp_path):
    pytest.importorskip("qwix")
    model = proxyq.from_nnx(FlaxWords(False, nnx.Rngs(0)), (TOKENS,), dtype=jnp.int32)
    plan = plan_of(with_tables(model), 4)
    data = prepared(IDS, None, model)
    done = export_model(model, plan, data, to="qwix", out=tmp_path / "q", correction="none")
    assert done.raised == {"table": (4, 32)} and done.difference < 1e-5


# -- networks of transformers ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_heads_of_transformers_share_their_table(kind, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from proxyq.model.torch_import import import_torchvision

    import_torchvision()
    import transformers

    torch.manual_seed(1)
    settings = {"vocab_size": 19}
    if kind.startswith("GPT2"):
        settings |= {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "n_inner": 32}
        config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **settings)
    else:
        settings |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.BertConfig(
            intermediate_size=32, max_position_embeddings=32, **settings
        )
    getattr(transformers, kind)(config).save_pretrained(tmp_path / "net")
    load = {"spec": f"hf:{tmp_path / 'net'}", "input_shape": (7,)}
    plain, model = proxyq.load_model(**load), proxyq.load_model(**load, embeddings=True)
    (table,) = (one for one in network(model, 2).layers if one.kind == "tied-embedding")
    assert table.name in network(plain, 2).names  # its head is a layer anyway
    ids = np.random.default_rng(0).integers(0, 19, (24, 7)).astype(np.int32)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    inputs = {name: inputs[name] for name in model.inputs}
    plan = proxyq.search(model, inputs, proxy="output-error", budget="size=4bit")
    made = quantize_model(plain, plan, inputs, correction="none")
    # By hand: the rounded table in both places, and every other layer's rounded weight.
    params = to_params(made)
    table_bits = plan.layers[table.name].weight_bits
    np.testing.assert_allclose(
        params[table.parameter], rounded_rows(model.params[table.parameter], table_bits), rtol=1e-6
    )
    wanted = jax.tree.leaves(model.apply(params, inputs))[0]
    np.testing.assert_allclose(made.logits(inputs), np.asarray(wanted), atol=1e-5)
    save_packed(made, tmp_path / "net.safetensors")
    back = load_packed(tmp_path / "net.safetensors", plain)
    np.testing.assert_array_equal(back.logits(inputs), made.logits(inputs))
    if pytest.importorskip("onnxruntime"):
        data = prepared(inputs, None, plain)
        done = export_model(
            plain, plan, data, to="onnx", out=tmp_path / "net.onnx", correction="statistics"
        )
        assert done.difference is not None


# -- the command line ------------------------------------------------------------------------


@pytest.mark.slow
def test_commands_take_the_flag_and_plans_bring_it(tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "nets.py"
    file.write_text(FACTORY)
    module = f"{file}:words"
    np.savez(tmp_path / "data.npz", arr_0=IDS, labels=LABELS)
    data = ("--data", tmp_path / "data.npz", "--quiet")
    told = here("inspect", module, "--embeddings", "--json", "--quiet")
    assert told.code == 0, told.err
    assert json.loads(told.out)["layers"]["table"]["kind"] == "embedding"
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    done = here(
        *("search", module, "--embeddings", "--proxy", "sqnr", "--budget", "size=4bit"),
        *("--out", plan, *data),
    )
    assert done.code == 0, done.err
    record = json.loads(plan.read_text())
    assert record["model"]["embeddings"] is True and "table" in record["layers"]
    done = here("quantize", module, plan, *data, "--correction", "none", "--out", out)
    assert done.code == 0, done.err
    done = here(
        *("evaluate", module, plan, out / "packed.safetensors", *data, "--json"),
        *("--correction", "none", "--eval-data", tmp_path / "data.npz"),
    )
    assert done.code == 0, done.err
    plans = json.loads(done.out)["plans"]
    assert plans[0]["top1"] == plans[1]["top1"] and plans[0]["size_bits"] == plans[1]["size_bits"]
    told = here("inspect", module, "--explain", "--quiet")
    assert "1 table is looked up in floating point: --embeddings" in " ".join(told.out.split())


def test_a_network_without_tables_is_the_same_with_the_flag():
    done = here("inspect", "--embeddings", "--json", "--quiet")
    assert done.code == 0 and done.out == here("inspect", "--json", "--quiet").out
    assert proxyq.load_model("digits", embeddings=True).embeddings
    plain = proxyq.load_model("digits")
    found = [network(one, 2).names for one in (plain, replace(plain, embeddings=True))]
    assert not plain.embeddings and found[0] == found[1]
