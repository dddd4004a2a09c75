"""Products of two activations: which there are, how they are rounded, and where that goes."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commandline import here
from networks import mixer, small_net
from test_reconstruct import run_pieces
from torch_networks import SmallTransformer, plan_of

import proxyq
from proxyq.api import allocate, pareto, quantize_model, score, search
from proxyq.api.evaluate import uniform_plan
from proxyq.auto import Judge
from proxyq.engine import Engine
from proxyq.engine.pieces import PieceEdits, block_pieces, layer_pieces
from proxyq.engine.ranges import activation_grids
from proxyq.errors import ProxyqError, UsageError
from proxyq.export.compressed_tensors import export_compressed_tensors
from proxyq.export.onnx import export_onnx
from proxyq.export.torchao import export_torchao
from proxyq.model.network import LAYERS_AT, network
from proxyq.model.schedule import schedule
from proxyq.model.torch_import import import_torchvision
from proxyq.ptq.packed import load_packed, save_packed
from proxyq.ptq.quantized import attention_grids, with_grids
from proxyq.report.tables import counted
from proxyq.search.allocate.plan import Plan, PlannedProduct

BITS = 4


def inputs_of(model, count=24, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *model.input_shape)).astype(np.float32)


def with_products(model, plan, bits):
    """The plan with all products of two activations at `bits`."""
    products = network(model, LAYERS_AT).attention
    own = {one.name: PlannedProduct(bits=bits, macs=one.macs) for one in products}
    return plan.model_copy(update={"attention": own})


# -- by hand ---------------------------------------------------------------------------


def mixer_by_hand(params: Mapping[str, np.ndarray], x: np.ndarray, rounded: Any) -> np.ndarray:
    """The network `mixer` in NumPy; `rounded(name, side, array)` is what each product reads."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = x.astype(np.float64) @ p["embed"]
    x = x + np.einsum("st,btd->bsd", p["tokens"], x)
    q, k, v = (np.einsum("btd,dhe->bthe", x, p[name]) for name in ("query", "key", "value"))
    scores = np.einsum("bshe,bthe->bhst", rounded("@scores", q), rounded("@scores", k))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = np.einsum("bhst,bthe->bshe", rounded("@values", weights), rounded("@values", v))
    x = x + np.einsum("bshe,hed->bsd", mixed, p["out"])
    x = np.maximum(x @ p["tied"], 0) @ p["tied"].T
    return (x * p["gain"]).mean(axis=1)


def asymmetric(x: np.ndarray, seen: np.ndarray, bits: int) -> np.ndarray:
    """The nearest of `2^bits` values over the range that was seen, zero among them."""
    low, high = min(seen.min(), 0.0), max(seen.max(), 0.0)
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale + zero), 0, 2**bits - 1) - zero) * scale


@pytest.mark.parametrize("bits", [3, 8])
def test_both_operands_are_rounded_as_by_hand(bits):
    model = mixer()
    x = inputs_of(model, 8)
    engine = Engine.build(model, 8, batch_size=8)
    names = dict.fromkeys((one.name for one in engine.network.attention), bits)
    grids = activation_grids(engine, {}, names, x, method="min-max")
    found = engine.logits(x, with_grids(engine.network, {}, grids))
    # The ranges are those of the float network.
    ranges: dict[str, list[np.ndarray]] = {}

    def seen(name: str, array: np.ndarray) -> np.ndarray:
        ranges.setdefault(name, []).append(array)
        return array

    exact = mixer_by_hand(model.params, x, seen)
    np.testing.assert_allclose(engine.logits(x), exact, rtol=1e-4, atol=1e-5)
    order = {name: iter(own) for name, own in ranges.items()}

    def rounded(name: str, array: np.ndarray) -> np.ndarray:
        return asymmetric(array, next(order[name]), bits)

    wanted = mixer_by_hand(model.params, x, rounded)
    # A number on the edge of two codes may go either way in float32: few do.
    wrong = np.abs(found - wanted) > 1e-4
    assert wrong.mean() < 0.02
    assert np.abs(wanted - exact).max() > 1e-3


def test_ranges_do_not_depend_on_the_batches():
    model = mixer()
    x = inputs_of(model, 9)
    for method in ("mse", "percentile", "moving-average"):
        found = []
        for size in (9, 2):
            engine = Engine.build(model, 9, batch_size=size)
            names = dict.fromkeys((one.name for one in engine.network.attention), 8)
            found.append(activation_grids(engine, {"out": 8}, names, x, method=method))
        one, other = (jax.tree.leaves(grids) for grids in found)
        np.testing.assert_allclose(one, other, rtol=1e-5)
        assert len(one) == 4 * 5  # the fields of five grids


# -- which there are -------------------------------------------------------------------


def test_products_are_named_after_the_layers_before_them():
    (scores, values) = network(mixer(), LAYERS_AT).attention
    assert (scores.name, values.name) == ("@scores", "@values")
    assert scores.macs == values.macs == 2 * 6 * 6 * 4
    model = proxyq.from_torch(SmallTransformer().eval(), (6, 16))
    names = [one.name for one in network(model, LAYERS_AT).attention]
    assert names == [f"attention.{i}@{kind}" for i in (0, 1) for kind in ("scores", "values")]
    assert network(small_net(), LAYERS_AT).attention == ()


def test_products_without_a_softmax_between():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(6, 6)).astype(np.float32) for name in ("a.one", "a.two")}

    def apply(p, x):
        one, two = x @ p["a.one"], x @ p["a.two"]
        outer = one[:, :, None] * two[:, None, :]  # no product of matrices
        return jnp.einsum("bi,bi->b", one, two)[:, None] + outer.mean(axis=1)

    from proxyq.model.function_import import from_function

    (found,) = network(from_function(apply, params, (6,)), LAYERS_AT).attention
    assert found.name == "a@product" and found.macs == 6


def test_products_of_whole_numbers_are_none():
    """Counts of a mask would not be counts any more on a grid of few bits."""
    rng = np.random.default_rng(0)
    params = {"one": rng.normal(size=(6, 6)).astype(np.float32)}

    def apply(p, x):
        x = x @ p["one"]
        mask = (x > 0).astype(jnp.int32)
        return x * jnp.einsum("bi,bi->b", mask, mask)[:, None]

    from proxyq.model.function_import import from_function

    assert network(from_function(apply, params, (6,)), LAYERS_AT).attention == ()


# -- the passes ------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [layer_pieces, block_pieces])
def test_pieces_round_them_too(cut):
    model = mixer()
    x = inputs_of(model, 4)
    engine = Engine.build(model, 4, batch_size=4)
    names = dict.fromkeys((one.name for one in engine.network.attention), BITS)
    grids = activation_grids(engine, {}, names, x)
    wanted = engine.logits(x, with_grids(engine.network, {}, grids))
    assert np.abs(wanted - engine.logits(x)).max() > 1e-3

    def of_piece(piece: Any, own: PieceEdits) -> PieceEdits:
        return own._replace(attention=[grids.attention.get(i) for i in piece.attention])

    found = run_pieces(engine, cut(engine.network), jnp.asarray(x), {}, of_piece)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_reconstruction_learns_with_them_rounded():
    model = mixer()
    x = inputs_of(model, 32)
    plan = with_products(model, plan_of(model, (3,)), BITS)
    how = proxyq.Learning(steps=60, batch_size=16)
    learned, plain = (
        quantize_model(model, one, x, reconstruction="block", learning=how)
        for one in (plan, plan.model_copy(update={"attention": {}}))
    )
    codes = [
        np.concatenate([own.integers[i].codes.ravel() for i in sorted(own.integers)])
        for own in (learned, plain)
    ]
    assert (codes[0] != codes[1]).any()  # the rounding of attention is part of the error
    nearest = quantize_model(model, plan, x)
    exact = Engine.build(model, 32).logits(x)
    errors = [np.mean((own.logits(x) - exact) ** 2) for own in (learned, nearest)]
    assert errors[0] < errors[1]


def test_statistics_are_corrected_with_them_rounded():
    model = mixer()
    x = inputs_of(model, 32)
    plan = with_products(model, plan_of(model, (4,)), 3)
    found = quantize_model(model, plan, x, correction="statistics")
    products = network(model, LAYERS_AT).attention
    assert set(attention_grids(products, found.edits)) == {0, 1}
    float_products = quantize_model(
        model, plan.model_copy(update={"attention": {}}), x, correction="statistics"
    )
    last = max(found.edits)
    assert not np.allclose(found.edits[last].offset, float_products.edits[last].offset)


# -- budgets ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_bops_count_them(bits):
    model = mixer()
    plan = search(
        model, proxy="weight-mse", budget="bops=1G", activation_bits=8, attention_bits=bits,
        correction="none",
    )  # fmt: skip
    (budget,) = plan.budgets
    layers = sum(one.macs * one.weight_bits * one.activation_bits for one in plan.layers.values())
    products = sum(one.macs for one in network(model, LAYERS_AT).attention)
    assert budget.achieved * 1e9 == pytest.approx(layers + products * (bits or 32) ** 2)
    # What a budget counts stands in the plan, rounded or not.
    assert {one.bits for one in plan.attention.values()} == {bits}
    assert sum(one.macs for one in plan.attention.values()) == products
    assert counted(budget, plan).endswith("all 7 layers, and 2 products of activations")


def test_memory_counts_what_they_read():
    """The peak by its definition, against what the plan says of itself."""
    model = mixer()
    found = network(model, LAYERS_AT)
    plan = search(
        model, proxy="weight-mse", budget="activation-memory=1MiB", activation_bits=4,
        attention_bits=6, correction="none",
    )  # fmt: skip
    steps = schedule(found)
    read = {name for step in steps for tensor in step.tensors for name in tensor.products}
    assert read == {"@scores"}  # the others live and die within the step of one layer
    peak = 0
    for step in steps:
        taken = 0
        for tensor in step.tensors:
            widths = [4 for _ in tensor.readers] + [6 for _ in tensor.products]
            taken += tensor.elements * max(widths, default=tensor.bits)
        peak = max(peak, taken)
    (budget,) = plan.budgets
    assert budget.achieved * 8 * 2**20 == pytest.approx(peak)


def test_scores_hold_them_for_allocate(tmp_path):
    model = mixer()
    file = score(model, proxies="weight-mse", activation_bits=8, attention_bits=8)
    assert {one.bits for one in file.attention.values()} == {8}
    file.save(tmp_path / "scores.json")
    again = type(file).load(tmp_path / "scores.json")
    assert again == file and again.to_json() == file.to_json()
    plan = allocate(again, "bops=1M")
    alone = search(model, proxy="weight-mse", budget="bops=1M", activation_bits=8, attention_bits=8)
    assert plan.bits() == alone.bits() and plan.attention == alone.attention
    assert plan.budgets == alone.budgets
    for asked, bits in (("float", None), (4, 4)):
        found = allocate(again, "bops=1M", attention_bits=asked).attention
        assert {one.bits for one in found.values()} == {bits}
    assert allocate(again, "size=4bit", attention_bits="float").attention == {}
    assert "attention" not in json.loads(score(small_net(), proxies="weight-mse").to_json())


def test_fronts_and_uniform_plans_keep_them(tmp_path):
    model = mixer()
    front = pareto(
        model, proxy="weight-mse", budget="size=3bit..5bit", points=3, activation_bits=8,
        attention_bits=8, correction="none",
    )  # fmt: skip
    front.save(tmp_path / "front.json")
    for plan in type(front).load(tmp_path / "front.json").plans:
        assert {one.bits for one in plan.attention.values()} == {8}
    plan = front.plans[0]
    uniform = uniform_plan(model, plan)
    assert uniform is not None and uniform.attention == plan.attention


def test_auto_measures_plans_with_them_rounded():
    model = mixer()
    x = inputs_of(model, 48)
    found = [Judge(model, x[:32], x[32:], attention_bits=bits) for bits in (None, 3)]
    plan = [(4, None)] * len(found[0].names)
    losses = [judge.measure(plan).held_back.kl for judge in found]
    assert losses[0] < losses[1]
    plan = search(model, x, budget="size=4bit", attention_bits=8, effort="low", samples=32)
    assert plan.method["proxy"] == "auto" and plan.method["attention_bits"] == 8
    assert {one.bits for one in plan.attention.values()} == {8}


# -- files -----------------------------------------------------------------------------


def test_the_packed_file_holds_their_grids(tmp_path):
    model = mixer()
    x = inputs_of(model)
    plan = with_products(model, plan_of(model, (4, 8), 8), 8)
    made = quantize_model(model, plan, x)
    save_packed(made, tmp_path / "net.safetensors")
    again = load_packed(tmp_path / "net.safetensors", model)
    np.testing.assert_array_equal(again.logits(x), made.logits(x))
    assert again.attention_bits == made.attention_bits == {"@scores": 8, "@values": 8}
    content = (tmp_path / "net.safetensors").read_bytes()
    for old, new, told in (
        (b'"@scores\\"', b'"@scored\\"', "@scored"),
        (b'\\"operands\\"', b'\\"operandz\\"', "operands"),
        (b'{\\"scale\\": 0.', b'{\\"scale\\":-0.', "without a step"),
    ):
        assert old in content
        (tmp_path / "bad.safetensors").write_bytes(content.replace(old, new))
        with pytest.raises(ProxyqError, match=told):
            load_packed(tmp_path / "bad.safetensors", model)


def test_plans_without_them_are_the_same_bytes():
    plan = plan_of(mixer(), (4,))
    assert "attention" not in plan.to_json()
    wider = with_products(mixer(), plan, 8)
    assert Plan.from_json(json.loads(wider.to_json())) == wider


def test_a_plan_of_another_network_is_refused():
    model = mixer()
    plan = with_products(model, plan_of(model, (4,)), 8)
    renamed = {"@score": plan.attention["@scores"]}
    with pytest.raises(ProxyqError, match="names the product '@score'"):
        quantize_model(model, plan.model_copy(update={"attention": renamed}), inputs_of(model))


def test_bits_of_nothing_are_refused():
    with pytest.raises(UsageError, match="has none: leave it out"):
        search(small_net(), proxy="weight-mse", attention_bits=8)
    with pytest.raises(UsageError, match="a bit-width or 'float'"):
        search(mixer(), proxy="weight-mse", attention_bits="all")
    with pytest.raises(UsageError, match="`attention_bits` must be 1 to 8 or 16, got 9"):
        score(mixer(), proxies="weight-mse", attention_bits=9)
    file = score(small_net(), proxies="weight-mse")
    with pytest.raises(UsageError, match="leave it out"):
        allocate(file, "size=4bit", attention_bits=8)


def test_the_command_line(tmp_path):
    (tmp_path / "net.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r})\n"
        "from networks import mixer\n"
    )
    name = f"{tmp_path / 'net.py'}:mixer"
    np.savez(tmp_path / "x.npz", x=inputs_of(mixer()))
    done = here(
        "search", name, "--proxy", "weight-mse", "--attention-bits", "8", "--out",
        tmp_path / "plan.json", "--data", tmp_path / "x.npz",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert {one.bits for one in Plan.load(tmp_path / "plan.json").attention.values()} == {8}
    done = here(
        "quantize", name, tmp_path / "plan.json", "--data", tmp_path / "x.npz", "--out",
        tmp_path / "packed",
    )  # fmt: skip
    assert done.code == 0, done.err
    made = load_packed(tmp_path / "packed" / "packed.safetensors", mixer())
    assert set(made.attention_bits.values()) == {8}


# -- runtimes --------------------------------------------------------------------------

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402


class Encoder(nn.Module):
    """Attention written in four ways, over (N, 5, 8)."""

    input_shape = (5, 8)

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.start = nn.Linear(8, 8)
        self.qkv = nn.Linear(8, 24)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.tanh(self.start(x))
        if self.kind == "module":
            return self.head((x + self.mha(x, x, x, need_weights=False)[0]).mean(1))
        batch = x.shape[0]
        q, k, v = self.qkv(x).reshape(batch, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.kind == "fused":
            mask = torch.ones(5, 5, dtype=torch.bool).tril(-1)  # the first row attends to nothing
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif self.kind == "plain":
            y = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
        else:  # the second operand's axes come first in the answer
            weights = torch.softmax(torch.einsum("bhie,bhje->bhji", q, k), -2)
            y = torch.einsum("bhji,bhje->bhie", weights, v)
        return self.head(x.mean(1) + y.transpose(1, 2).reshape(batch, 5, 8).mean(1))


def encoder(kind: str):
    torch.manual_seed(0)
    module = Encoder(kind).eval()
    return module, proxyq.from_torch(module, Encoder.input_shape)


@pytest.mark.parametrize(
    ("kind", "bits"), [("module", 8), ("fused", 4), ("plain", 8), ("einsum", 8)]
)
def test_onnx_rounds_both_operands(kind, bits, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    _, model = encoder(kind)
    x = inputs_of(model, 16)
    plan = with_products(model, plan_of(model, (8,)), bits)
    made = quantize_model(model, plan, x)
    # The exporter runs the file operator by operator, and refuses other outputs than ours.
    export_onnx(made, tmp_path / "net.onnx", plan=plan, inputs=x)
    graph = onnx.load(tmp_path / "net.onnx").graph
    rounded = [node.name for node in graph.node if node.op_type == "QuantizeLinear"]
    products = [one.name for one in network(model, LAYERS_AT).attention]
    assert {name.split(".QuantizeLinear")[0] for name in rounded} == {
        f"{name}.{side}" for name in products for side in ("left", "right")
    }
    assert not any(node.op_type == "Attention" for node in graph.node)
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param  # the batch is free


def test_two_bits_meet_rounded_inputs_in_onnx(tmp_path):
    """ONNX Runtime's own fusion of the two takes no INT2; the file must run as it is loaded."""
    pytest.importorskip("onnxruntime")
    _, model = encoder("plain")
    x = inputs_of(model, 16)
    made = quantize_model(model, plan_of(model, (2,), 8), x)
    found = export_onnx(made, tmp_path / "net.onnx", inputs=x)
    assert found.difference is not None and not any(
        "not with its default" in n for n in found.notes
    )
    assert set(found.raised.values()) == {(2, 4)}


def test_onnx_refuses_products_that_it_cannot_find(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    _, model = encoder("plain")
    x = inputs_of(model, 16)
    made = quantize_model(model, with_products(model, plan_of(model, (8,)), 8), x)
    monkeypatch.setattr("proxyq.export.onnx._nodes_of_two_activations", lambda graph: [])
    with pytest.raises(ProxyqError, match="cannot be told apart among the 0"):
        export_onnx(made, tmp_path / "net.onnx", inputs=x)
    assert not (tmp_path / "net.onnx").exists()


def test_to_torch_refuses_products_that_no_hook_reaches():
    module, model = encoder("plain")
    x = inputs_of(model, 16)
    made = quantize_model(model, with_products(model, plan_of(model, (8,)), 8), x)
    with pytest.raises(ProxyqError, match=r"the 2 products .*round_inputs=False"):
        proxyq.to_torch(made, module)
    found = proxyq.to_torch(made, module, round_inputs=False)(torch.from_numpy(x))
    alone = quantize_model(model, plan_of(model, (8,)), x).logits(x)
    np.testing.assert_allclose(found.detach(), alone, atol=1e-4)


@pytest.mark.parametrize("write", [export_torchao, export_compressed_tensors])
def test_other_formats_say_that_they_leave_them_float(write, tmp_path):
    import_torchvision()  # which compressed-tensors needs beside a CPU-only torch
    pytest.importorskip("torchao" if write is export_torchao else "compressed_tensors")
    module, model = encoder("plain")
    x = inputs_of(model, 16)
    made = quantize_model(model, with_products(model, plan_of(model, (8,)), 8), x)
    told = write(made, tmp_path / "out", module=module, inputs=x).notes
    assert any("2 of them stay float" in note for note in told)
    with pytest.raises(ProxyqError, match="leave --strict out"):
        write(made, tmp_path / "other", module=module, inputs=x, strict=True)
