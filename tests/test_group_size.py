"""Groups of weights with grids of their own: the numbers, what they take, and where they go."""

import json

import ml_dtypes
import numpy as np
import pytest
from commandline import here
from networks import mixer, small_net
from torch_networks import SmallTransformer, plan_of, run_of, weight_of

import proxyq
from proxyq.api import quantize_model
from proxyq.engine import Engine, collect
from proxyq.engine.rounded import site_rounding, sized_layers
from proxyq.errors import ProxyqError, UsageError
from proxyq.export.compressed_tensors import export_compressed_tensors, load_compressed_tensors
from proxyq.export.onnx import export_onnx
from proxyq.export.torchao import export_torchao, load_torchao
from proxyq.model.network import network
from proxyq.model.torch_import import import_torchvision
from proxyq.ptq import unpack as reader
from proxyq.ptq.deploy import deployed_layers
from proxyq.ptq.packed import load_packed, save_packed
from proxyq.quantize import Rounding, quantize_columns
from proxyq.quantize.integers import Integers, groups_of, to_integers
from proxyq.search.allocate.plan import Plan, PlannedBudget

SHAPE = (6, 16)
BITS = (4, 3, 8, 2)
BY_EIGHTS = Rounding(group_size=8)


def drawn(fan_in=48, channels=5, seed=0):
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(size=(fan_in // 8, 1, channels)))
    return (rng.normal(size=(fan_in // 8, 8, channels)) * sizes).reshape(fan_in, -1).astype("f4")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_every_group_is_rounded_alone(bits):
    """One group at a time, in NumPy."""
    columns, how = drawn(), Rounding(method="absmax", group_size=8)
    found = np.asarray(quantize_columns(columns, bits, how))
    top = 0.5 if bits == 1 else 2 ** (bits - 1) - 1
    for start in range(0, len(columns), 8):
        for channel in range(columns.shape[1]):
            own = columns[start : start + 8, channel]
            exact = np.abs(own).max() / np.float32(top)
            # The next bfloat16 number, unless it is one: up is away from zero.
            scale = exact.astype(ml_dtypes.bfloat16)
            if scale.astype("f4") < exact:
                scale = np.nextafter(scale, ml_dtypes.bfloat16(np.inf))
            scale = scale.astype("f4")
            if bits == 1:
                expected = np.where(own / scale - 0.5 > -0.5, 0.5, -0.5) * scale
            else:
                expected = np.clip(np.round(own / scale), -top - 1, top) * scale
            np.testing.assert_array_equal(found[start : start + 8, channel], expected)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("extra_code", ["negative", "either"])
def test_integers_have_the_values_of_fake_quantization(bits, extra_code):
    columns, how = drawn(), Rounding(extra_code=extra_code, group_size=16)
    own = to_integers(columns, bits, how)
    np.testing.assert_array_equal(own.values(), quantize_columns(columns, bits, how))
    groups = groups_of(own)
    assert groups is not None
    assert (groups.axis, groups.size, groups.values.shape) == (0, 16, (3, 5))
    np.testing.assert_array_equal(groups.whole(), own.scale)
    assert groups_of(to_integers(columns, bits)) is None
    # What a correction leaves is a grid of bfloat16 scales too.
    gain = np.linspace(0.8, 1.3, 5)
    moved = own.taking(own.values() * gain)
    np.testing.assert_allclose(moved.values(), own.values() * gain, rtol=2**-8, atol=1e-7)
    np.testing.assert_array_equal(moved.scale, moved.scale.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(moved.zero, own.zero)


def test_output_channels_that_are_alike_are_no_groups():
    scale = np.repeat(np.float32([0.1, 0.3]), 4)[:, None]
    own = Integers(np.ones((8, 6), np.uint16), scale, np.float32([[2]]), 2)
    assert groups_of(own) is None


def test_groups_hold_where_a_matrix_has_whole_ones():
    found = network(mixer(), 2)
    sizes = {
        site.layer: site_rounding(site, Rounding(group_size=8)).group_size for site in found.sites
    }
    # Eight weights a channel are one group; four, six, or two axes of them are none.
    assert sizes and not any(sizes.values())
    convolutions = [site for site in network(small_net(), 2).sites if site.summed_axis is None]
    assert convolutions
    assert not any(site_rounding(site, BY_EIGHTS).group_size for site in convolutions)
    layers = network(transformer()[0], 2)
    grouped = {one.name: one.scale_bits for one in sized_layers(layers, BY_EIGHTS)}
    assert grouped == {one.name: 16 * one.weights // 8 for one in layers.layers}
    assert sized_layers(layers, Rounding()) == layers.layers
    by_sixteens = {
        one.name: one.scale_bits for one in sized_layers(layers, Rounding(group_size=12))
    }
    assert {name.split(".")[0] for name, bits in by_sixteens.items() if bits} == {"down_proj"}


@pytest.mark.parametrize("need", ["output-error", "logit-mse"])
def test_measuring_rounds_as_running_does(need):
    """Convolutions have no groups, whatever their fan-in; a transformer's layers have."""
    bits = (3, 4)

    def measured(model, rounding):
        x = np.random.default_rng(1).normal(size=(4, *model.input_shape)).astype("f4")
        engine = Engine.build(model, 4)
        taps = collect(engine, x, (need,), bits, rounding=rounding)
        return np.array([tap.recorded[need] for tap in taps]), engine, x

    model = small_net()
    with_groups, engine, _ = measured(model, BY_EIGHTS)
    convolutions = [s.layer for s in engine.network.sites if s.summed_axis is None]
    rows = [engine.network.names.index(name) for name in convolutions]
    np.testing.assert_allclose(with_groups[rows], measured(model, Rounding())[0][rows], rtol=1e-6)
    found, engine, x = measured(transformer()[0], BY_EIGHTS)
    site = engine.network.sites[-1]
    columns = np.asarray(engine.columns(len(engine.network.sites) - 1))
    change = np.asarray(quantize_columns(columns, 3, BY_EIGHTS)) - columns
    # The last layer's input is what the network before it hands on.
    state = engine.start(x)
    for index in range(len(engine.network.sites) - 1):
        state, _ = engine.step(state, index)
    read = np.asarray(state[engine.network.graph.main[site.position].invars[1 - site.operand]])
    wrong, right = read @ change, read @ columns
    expected = np.square(wrong).mean() / (right.var() if need == "output-error" else 1)
    np.testing.assert_allclose(found[-1, 0], expected, rtol=1e-3)


@pytest.mark.parametrize("size", [0, 7, -8, 16.0, True, "32"])
def test_sizes_that_are_none(size):
    with pytest.raises(UsageError, match="`group_size` must be a whole number of at least 8"):
        Rounding(group_size=size)


def transformer():
    import torch
    from torch_networks import randomise

    torch.manual_seed(0)
    module = randomise(SmallTransformer()).eval()
    return proxyq.from_torch(module, SHAPE), module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A network, its plan with groups of eight, and it quantized by it."""
    model, module = transformer()
    plan = plan_of(model, BITS)
    layers = {one.name: one for one in sized_layers(network(model, 2), BY_EIGHTS)}
    plan = plan.model_copy(
        update={
            "layers": {
                name: one.model_copy(update={"scale_bits": layers[name].scale_bits})
                for name, one in plan.layers.items()
            },
            "method": {"rounding": {"group_size": 8}, "correction": "none"},
        }
    )
    inputs = np.random.default_rng(0).normal(size=(16, *SHAPE)).astype("f4")
    return model, module, plan, quantize_model(model, plan, inputs), inputs


def test_groups_round_weights_better(made):
    model, _, plan, quantized, inputs = made
    by_channel = quantize_model(model, plan.model_copy(update={"method": {}}), inputs)
    engine = Engine.build(model, 2, batch_size=2)

    def error(own, index):
        return np.square(own.integers[index].values() - np.asarray(engine.columns(index))).sum()

    pairs = np.array([(error(quantized, i), error(by_channel, i)) for i in quantized.integers])
    # Of 8 bits, two groups gain hardly more than a bfloat16 scale loses.
    assert (pairs[:, 0] < 1.2 * pairs[:, 1]).all()
    assert pairs[:, 0].sum() < 0.9 * pairs[:, 1].sum()


@pytest.mark.parametrize("correction", ["none", "weights", "statistics"])
def test_a_packed_network_comes_back(made, tmp_path, correction):
    model, _, plan, _, inputs = made
    quantized = quantize_model(model, plan, inputs, correction=correction)
    size = save_packed(quantized, tmp_path / "packed.safetensors")
    # What the plan counts is what codes and scales of groups take, but for the last byte of each.
    assert abs(size.codes * 8 - plan.size_bits) < 8 * len(plan.layers)
    back = load_packed(tmp_path / "packed.safetensors", model)
    # A bias is stored whole, and what the network adds by itself is taken off it again.
    np.testing.assert_allclose(back.logits(inputs), quantized.logits(inputs), atol=1e-6)
    for index, own in quantized.integers.items():
        for ours, theirs in zip(own[:3], back.integers[index][:3], strict=True):
            np.testing.assert_array_equal(
                np.broadcast_to(ours, own.codes.shape), np.broadcast_to(theirs, own.codes.shape)
            )
    arrays = reader.load(tmp_path / "packed.safetensors")
    for layer in deployed_layers(quantized):
        np.testing.assert_array_equal(arrays[layer.parameter], layer.weight.values())


def test_records_of_groups_that_do_not_fit(made, tmp_path):
    save_packed(made[3], tmp_path / "good.safetensors")
    content = (tmp_path / "good.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    table, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header = json.loads(table["__metadata__"]["proxyq"])
    first = next(one for one in header["layers"].values() if "groups" in one)
    wrong = [(2, 8), (1, 5), (1, 4), (-1, 8), (1, True), (1, 1), ("1", 8)]
    for groups in ({"axis": 1}, [], *({"axis": axis, "size": size} for axis, size in wrong)):
        first["groups"] = groups
        table["__metadata__"]["proxyq"] = json.dumps(header)
        text = json.dumps(table).encode()
        changed = len(text).to_bytes(8, "little") + text + data
        (tmp_path / "bad.safetensors").write_bytes(changed)
        with pytest.raises(ProxyqError, match="damaged"):
            load_packed(tmp_path / "bad.safetensors", made[0])


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize("form", ["onnx", "torchao", "compressed-tensors"])
def test_runtimes_have_the_same_groups(made, tmp_path, form):
    import_torchvision()  # compressed-tensors imports it, and needs help with it
    pytest.importorskip({"onnx": "onnxruntime"}.get(form, form.replace("-", "_")))
    model, module, plan, quantized, inputs = made
    if form == "compressed-tensors":  # it fuses what reads one tensor, which takes equal bits
        layers = {
            name: one.model_copy(update={"weight_bits": 4 if "attention" in name else 3})
            for name, one in plan.layers.items()
        }
        plan = plan.model_copy(update={"layers": layers})
        quantized = quantize_model(model, plan, inputs)
    budget = PlannedBudget(name="size", asked=plan.size_bits / 8192, achieved=0, unit="KiB")
    tight = plan.model_copy(update={"budgets": [budget]})
    path = tmp_path / ("network.onnx" if form == "onnx" else "folder")
    write = {"onnx": export_onnx, "torchao": export_torchao}.get(form, export_compressed_tensors)
    done = write(quantized, path, plan=tight, inputs=inputs, module=module)
    assert done.difference is not None and done.difference < 1e-5
    # Scales of 32 bits are more than the plan counted, and that is told.
    assert done.planned_bits == plan.size_bits < done.size_bits
    assert any("more than the plan's budget" in note for note in done.notes)
    if form == "onnx":
        import onnx

        nodes = [n for n in onnx.load(path).graph.node if n.op_type == "DequantizeLinear"]
        blocks = [a.i for n in nodes for a in n.attribute if a.name == "block_size"]
        assert blocks == [8] * len(plan.layers)
        return
    load = load_torchao if form == "torchao" else load_compressed_tensors
    back = load(path, module)
    np.testing.assert_allclose(run_of(back)(inputs), quantized.logits(inputs), atol=1e-5)
    for layer in deployed_layers(quantized):
        weight = weight_of(back, layer)
        values = weight.dequantize() if form == "torchao" else weight.detach()
        np.testing.assert_array_equal(values.numpy(), layer.weight.values())
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    if form == "compressed-tensors":
        kinds = [one["weights"] for one in config["config_groups"].values()]
        assert {(one["strategy"], one["group_size"]) for one in kinds} == {("group", 8)}
    else:
        text = json.dumps(config)
        assert text.count('"group_size": 8') >= len(plan.layers) and "PerAxis" not in text


def test_from_the_command_line(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32),\n"
        "        torch.nn.ReLU(), torch.nn.Linear(32, 10))\n"
    )
    model = [f"{tmp_path}/net.py:build", "--input-shape", "1,8,8"]
    plan = str(tmp_path / "plan.json")
    common = [*model, "--data", "digits", "--proxy", "sqnr", "--samples", "32"]
    grouped = ["--group-size", "16", "--budget", "size=4bit", "--bits", "2,3,4,8"]
    assert here("search", *common, *grouped, "--out", plan).code == 0
    found = Plan.load(plan)
    assert {name: one.scale_bits for name, one in found.layers.items()} == {
        "1": 16 * 64 * 32 // 16,
        "3": 16 * 32 * 10 // 16,
    }
    # The scales take a bit of every weight, so the codes have three.
    assert found.average_bits <= 4
    assert sum(n.weights * n.weight_bits for n in found.layers.values()) <= 3 * (64 * 32 + 320)
    assert Plan.load(plan).to_json() == found.to_json()
    scores = str(tmp_path / "scores.json")
    assert here("score", *common, *grouped[:2], "--bits", "2,3,4,8", "--out", scores).code == 0
    again = str(tmp_path / "again.json")
    assert here("allocate", scores, "--budget", "size=4bit", "--out", again).code == 0
    assert Plan.load(again).layers == found.layers
    out = str(tmp_path / "packed")
    made = here("quantize", plan, *model, "--out", out, "--json", "--correction", "none")
    assert made.code == 0, made
    facts = json.loads(made.out)
    assert abs(facts["size"]["codes"] - facts["plan_bytes"]) <= 2
    wrong = here("search", *common, "--group-size", "3")
    assert wrong.code == 2 and "`group_size` must be" in wrong.err


@pytest.mark.filterwarnings("ignore:The 'm.iter_modules:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
def test_groups_are_tiles_of_qwix(tmp_path):
    pytest.importorskip("qwix")
    from flax import nnx

    from proxyq.export.qwix import export_qwix, load_qwix, load_qwix_rules

    rngs = nnx.Rngs(0)
    module = nnx.Sequential(nnx.Linear(32, 24, rngs=rngs), nnx.relu, nnx.Linear(24, 5, rngs=rngs))
    model = proxyq.from_nnx(module, (32,))
    plan = plan_of(model, (4, 8)).model_copy(update={"method": {"rounding": {"group_size": 16}}})
    inputs = np.random.default_rng(0).normal(size=(16, 32)).astype("f4")
    quantized = quantize_model(model, plan, inputs, correction="none")
    done = export_qwix(quantized, tmp_path, module=module, plan=plan, inputs=inputs)
    # 24 is no whole number of groups of 16.
    assert [rule.tile_size for rule in load_qwix_rules(tmp_path)] == [16, None]
    assert done.difference is not None and done.difference < 1e-6
    back = load_qwix(tmp_path, module, inputs)
    np.testing.assert_allclose(back(inputs), quantized.logits(inputs), atol=1e-6)
    kernel = back.layers[0].kernel.array
    assert kernel.scale.shape == (2, 24)
    codes = quantized.integers[0].codes.astype(int) - 8
    np.testing.assert_array_equal(np.asarray(kernel.qvalue[...], int), codes)


@pytest.mark.parametrize("tied", [False, True])
def test_tables_that_are_looked_up_have_groups_too(tied, tmp_path):
    import torch

    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(20, 32)
            self.head = torch.nn.Linear(32, 20)
            if tied:
                self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids).mean(1))

    torch.manual_seed(0)
    module = Words().eval()
    model = proxyq.from_torch(module, torch.zeros((1, 5), dtype=torch.int64))
    model = model.replace(embeddings=True)
    found = network(model, 2)
    # A tied table is one layer, whose groups are counted once.
    layers = sized_layers(found, BY_EIGHTS)
    assert [one.scale_bits for one in layers] == [16 * 20 * 32 // 8] * (1 if tied else 2)
    plan = plan_of(model, (4,)).model_copy(
        update={"method": {"rounding": {"group_size": 8}}, "model": {"embeddings": True}}
    )
    ids = np.random.default_rng(0).integers(0, 20, (16, 5)).astype(np.int32)
    quantized = quantize_model(model, plan, ids, correction="none")
    table = np.asarray(model.params["table.weight"])
    head = np.asarray(model.params["table.weight" if tied else "head.weight"])
    table, head = (np.asarray(quantize_columns(w.T, 4, BY_EIGHTS)).T for w in (table, head))
    expected = table[ids].mean(1) @ head.T + np.asarray(model.params["head.bias"])
    np.testing.assert_allclose(quantized.logits(ids), expected, atol=1e-5)
    save_packed(quantized, tmp_path / "packed.safetensors")
    np.testing.assert_array_equal(
        reader.load(tmp_path / "packed.safetensors")["table.weight"], table
    )
    back = load_packed(tmp_path / "packed.safetensors", model)
    np.testing.assert_array_equal(back.logits(ids), quantized.logits(ids))
    pytest.importorskip("onnxruntime")
    done = export_onnx(quantized, tmp_path / "words.onnx", plan=plan, inputs=ids, module=module)
    assert done.difference is not None and done.difference < 1e-6
