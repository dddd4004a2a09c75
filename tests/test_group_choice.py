"""Group sizes as candidates of each layer: bit-widths that bring their own groups."""

import copy
import itertools
import json

import numpy as np
import pytest
from commandline import here
from flax import nnx
from networks import small_net
from rich.console import Console
from torch_networks import SmallTransformer, plan_of, randomise, run_of, weight_of

import proxyq
from proxyq.api import allocate, evaluate, pareto, quantize_model, score, search, write_report
from proxyq.api.evaluate import uniform_plan
from proxyq.engine import Edit, Engine, collect
from proxyq.engine.divergence import kl_divergence
from proxyq.engine.rounded import sized_layers
from proxyq.errors import ProxyqError, UsageError
from proxyq.export.compressed_tensors import export_compressed_tensors, load_compressed_tensors
from proxyq.export.onnx import export_onnx
from proxyq.export.qwix import export_qwix, load_qwix, load_qwix_rules
from proxyq.export.torchao import export_torchao, load_torchao
from proxyq.model.network import network
from proxyq.model.torch_import import import_torchvision
from proxyq.proxies import PROXIES
from proxyq.proxies import score as score_all
from proxyq.ptq import unpack as reader
from proxyq.ptq.deploy import deployed_layers
from proxyq.ptq.packed import load_packed, save_packed
from proxyq.ptq.plan_edits import PlanEdits
from proxyq.quantize import GroupedBits, Rounding, quantize_columns
from proxyq.quantize.integers import groups_of
from proxyq.report.plots import draw_plan
from proxyq.report.tables import accuracy_table, layer_scores, plan_table
from proxyq.search.allocate import Problem, build_problem, solve
from proxyq.search.allocate.outliers import without_outliers
from proxyq.search.allocate.plan import Plan, PlannedBudget
from proxyq.search.front_file import Front
from proxyq.search.scores_file import ScoreFile
from proxyq.widths import by_size, candidates, check_group_sizes, parse, read, written

SIZES = (None, 16, 32)
WIDE = 256 * 48
"""Weights of the layer `one`."""


class Net(nnx.Module):
    """A convolution, and channels of 256, 48 and 20 weights: groups of 16 or 32, of 16, of none."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.one = nnx.Linear(256, 48, rngs=rngs)
        self.two = nnx.Linear(48, 20, rngs=rngs)
        self.head = nnx.Linear(20, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x)).reshape(len(x), -1)
        return self.head(nnx.relu(self.two(nnx.relu(self.one(x)))))


def net():
    """`Net`, the weights of whose channels are larger for some inputs than for others."""
    model = proxyq.from_nnx(Net(nnx.Rngs(0)), (8, 8, 1))
    rng, params = np.random.default_rng(0), dict(model.params)
    for name in ("one.kernel", "two.kernel"):
        value = np.asarray(params[name])
        sizes = np.exp(rng.normal(0, 1.2, (len(value) // 16, 1, 1)))
        params[name] = (value.reshape(len(sizes), 16, -1) * sizes).reshape(value.shape).astype("f4")
    return model.replace(params=params)


MODEL = net()


def columns_by_layer():
    engine = Engine.build(MODEL, 2)
    found = engine.network
    return {name: np.asarray(engine.columns(found.sites_of(name)[0])) for name in found.names}


def naive_table(bits, sizes):
    """For each layer `{(bits, size): (squared error, bits that it takes)}`, of what it can have."""
    table = {}
    for name, columns in columns_by_layer().items():
        own = {}
        for b, size in itertools.product(bits, sizes):
            if size is not None and (name == "stem" or len(columns) % size):
                continue
            rounded = np.asarray(quantize_columns(columns, b, Rounding(group_size=size)))
            error = np.sum((rounded - columns).astype(np.float64) ** 2)
            scales = 0 if size is None else 16 * columns.size // size
            own[b, size] = (error, columns.size * b + scales)
        table[name] = own
    return table


def test_a_width_with_groups_is_a_number_of_its_own():
    own = GroupedBits(4, 64)
    assert (str(own), repr(own), f"{own} bit", int(own)) == ("4g64", "4g64", "4g64 bit", 4)
    assert own != 4 and own != 4 and own == GroupedBits(4, 64) != GroupedBits(4, 32)
    assert {4: "channel", own: "grouped"}[GroupedBits(4, 64)] == "grouped"
    assert len({4, own, GroupedBits(4, 32)}) == 3
    # It reckons and compares as four.
    assert (2**own, 4.0**-own, own * 3, own < 5, own <= 4) == (16, 4.0**-4, 12, True, True)
    assert np.asarray([own, 3]).tolist() == [4, 3] and json.dumps([own]) == "[4]"
    for again in (copy.copy(own), copy.deepcopy(own)):
        assert type(again) is GroupedBits and again == own
    for wrong in ((9, 64), (4, 7), (4, None), (4, True), (own, 2)):
        with pytest.raises(UsageError):
            GroupedBits(*wrong)


def test_candidates_are_in_order_of_what_they_take():
    found = candidates((4, 2), (64, 32))
    assert list(map(str, found)) == ["2", "2g64", "2g32", "4", "4g64", "4g32"]
    assert sorted(reversed(found), key=by_size) == list(found)
    assert read(json.loads(json.dumps(written(found)))) == found
    assert written(found) == [2, "2g64", "2g32", 4, "4g64", "4g32"]
    assert candidates((3, 2)) == (2, 3) and parse(" 4g64 ") == GroupedBits(4, 64)
    assert check_group_sizes((32, None, 10**400, 64)) == (None, 10**400, 64, 32)


def test_layers_tell_what_they_can_have():
    found = network(MODEL, 2)
    layers = {one.name: one for one in sized_layers(found, Rounding(), SIZES)}
    assert {name: dict(one.group_scale_bits) for name, one in layers.items()} == {
        "stem": {None: 0},
        "one": {None: 0, 16: WIDE, 32: WIDE // 2},
        "two": {None: 0, 16: 48 * 20},
        "head": {None: 0},
    }
    # Without `channel` it is left to layers that can have nothing else.
    layers = {one.name: one for one in sized_layers(found, Rounding(), (16, 32), held=(8,))}
    assert {name: set(one.group_scale_bits) for name, one in layers.items()} == {
        "stem": {None},
        "one": {16, 32, 8},
        "two": {16, 8},
        "head": {None},
    }
    assert sized_layers(found, Rounding()) == found.layers


@pytest.mark.parametrize("sizes", [SIZES, (16, 32), (None, 16)])
@pytest.mark.parametrize("amount", [2.7, 3.4, 4.3])
def test_the_answer_is_the_best_of_all(sizes, amount):
    bits = (2, 3, 4)
    plan = search(
        MODEL, proxy="weight-mse", bits=bits, group_size=sizes, budget=f"size={amount}bit"
    )
    table = naive_table(bits, sizes)
    for name, own in naive_table(bits, (None,)).items():
        table[name] = table[name] or own  # what nothing else fits
    room = amount * sum(len(c) * c.shape[1] for c in columns_by_layer().values())
    fitting = [
        (sum(error for error, _ in some), place)
        for place, some in enumerate(itertools.product(*(own.values() for own in table.values())))
        if sum(size for _, size in some) <= room
    ]
    least, place = min(fitting)
    best = list(itertools.product(*table.values()))[place]
    got = tuple((one.weight_bits, one.group_size) for one in plan.layers.values())
    assert got == best
    for (name, own), pair in zip(plan.layers.items(), got, strict=True):
        assert own.size_bits == table[name][pair][1]
    assert plan.solver is not None and plan.solver.status == "optimal"
    np.testing.assert_allclose(plan.solver.objective, least, rtol=1e-5)
    assert plan.size_bits <= room and plan.budgets[0].achieved == pytest.approx(plan.average_bits)


@pytest.mark.parametrize("solver", ["ilp", "dp", "greedy", "iqp", "exhaustive"])
def test_solvers_see_columns_alone(solver):
    scores = score(MODEL, proxies="sqnr", bits=(2, 3, 4), group_size=SIZES)
    plan = allocate(scores, "size=3.4bit", solver=solver)
    best = allocate(scores, "size=3.4bit")
    assert plan.size_bits <= 3.4 * sum(one.weights for one in plan.layers.values())
    if solver != "greedy":
        assert plan.layers == best.layers
    with pytest.raises(UsageError, match="bits and group sizes of 'one' are chosen apart"):
        allocate(scores, "size=3.4bit", solver="lp")


def test_pins_ties_and_candidates():
    given = {"proxy": "sqnr", "bits": (2, 3, 4), "group_size": (16, 32), "budget": "size=5bit"}
    held = {"pins": ["one=3", "two=8g16"], "candidates": ["h*=2,3"]}
    plan = search(MODEL, **given, **held)
    found = {name: str(one.width) for name, one in plan.layers.items()}
    # A pin is not bound by candidates, and names one grid a channel where it names no groups.
    assert (found["one"], found["two"]) == ("3", "8g16") and found["head"] in ("2", "3")
    assert plan.layers["two"].scale_bits == 48 * 20 and plan.layers["one"].scale_bits == 0
    plan = search(MODEL, **given, candidates=["one=2,3g32"])
    assert str(plan.layers["one"].width) in ("2g16", "2g32", "3g32")
    plan = search(MODEL, **given, candidates=["one=2"])
    assert str(plan.layers["one"].width) == "2g16"
    plan = search(MODEL, **given, ties=["re:one|two"])
    assert str(plan.layers["one"].width) == str(plan.layers["two"].width) == "4g16"
    with pytest.raises(UsageError, match="must share one bit-width but have none in common"):
        search(MODEL, **given, ties=["re:one|head"])
    with pytest.raises(UsageError, match="'head=8g16' names groups of 16 weights, which the layer"):
        search(MODEL, **given, pins=["head=8g16"])
    # A pin brings groups where there are no others.
    plan = search(MODEL, proxy="sqnr", bits=(2, 3, 4), budget="size=3bit", pins=["one=4g16"])
    assert {name: one.group_size for name, one in plan.layers.items() if one.group_size} == {
        "one": 16
    }
    assert plan.method["bits"] == [2, 3, 4] and "group_sizes" not in plan.method


def test_activations_beside_groups():
    rng, bits, beside = np.random.default_rng(0), candidates((2, 4), (16,)), (4, 8)
    layers = sized_layers(network(MODEL, 2), Rounding(), (None, 16))
    cost, activation_cost = rng.random((4, len(bits))), rng.random((4, len(beside)))
    problem = build_problem(
        layers, cost, bits, ["size=3.5bit", "bops=70%"],
        activation_bits=beside, activation_cost=activation_cost, pins=["two=4g16/8"],
    )  # fmt: skip
    assert [problem.shown(k) for k in range(8)] == [
        "2/4", "2/8", "2g16/4", "2g16/8", "4/4", "4/8", "4g16/4", "4g16/8"
    ]  # fmt: skip
    # Every column costs what its two parts do, and only weights take groups.
    np.testing.assert_allclose(problem.cost[1], np.add.outer(cost[1], activation_cost[1]).ravel())
    assert problem.allowed.sum(axis=1).tolist() == [4, 8, 1, 4]
    answer = solve(problem)
    assert answer.group_sizes is not None and answer.activation_bits is not None
    assert (answer.bits[2], answer.group_sizes[2], answer.activation_bits[2]) == (4, 16, 8)
    follow = search(
        MODEL, proxy="sqnr", bits=(2, 4), group_size=(None, 16), activation_bits="weights",
        budget="size=4bit",
    )  # fmt: skip
    assert all(one.activation_bits == one.weight_bits for one in follow.layers.values())


def test_scores_go_through_their_file(tmp_path):
    given = {"bits": (2, 3, 4), "group_size": SIZES}
    scores = score(MODEL, "digits", proxies=["sqnr", "snip", "params"], samples=32, **given)
    scores.save(tmp_path / "scores.json")
    back = ScoreFile.load(tmp_path / "scores.json")
    assert back.to_json() == scores.to_json() == (tmp_path / "scores.json").read_text()
    assert back.bits[:3] == [2, 2, 2] and back.group_sizes is not None
    assert back.group_sizes[:3] == [None, 32, 16]
    assert [dict(one.group_scale_bits) for one in back.network_layers()] == [
        dict(one.group_scale_bits) for one in sized_layers(network(MODEL, 2), Rounding(), SIZES)
    ]
    found = allocate(back, "size=3.4bit", proxy="sqnr")
    direct = search(MODEL, proxy="sqnr", budget="size=3.4bit", **given)
    assert (found.layers, found.method) == (direct.layers, direct.method)
    assert found.candidates == list(candidates(*given.values()))
    by_errors = allocate(back, "size=3.4bit", proxy="params", cost="times-dw2")
    assert any(one.group_size for one in by_errors.layers.values())
    # Files of one grid a channel have no word of groups.
    plain = score(MODEL, proxies="sqnr", bits=(2, 3, 4)).to_json()
    assert "group_size" in plain and "group_sizes" not in plain and "scale_bits" not in plain


def test_kept_scores_are_of_their_groups(tmp_path):
    given = {"proxies": "sqnr", "bits": (3, 4), "cache_dir": tmp_path}
    tables = [score(MODEL, group_size=size, **given).to_json() for size in (None, 16, SIZES)]
    assert len(set(tables)) == 3
    assert [score(MODEL, group_size=s, **given).to_json() for s in (None, 16, SIZES)] == tables
    found = score(MODEL, group_size=SIZES, **given).of()
    assert list(map(str, found.bits)) == ["3", "3g32", "3g16", "4", "4g32", "4g16"]


def test_sweeps_and_couplings_are_measured_over_all_columns():
    """By networks in which single layers are rounded, in NumPy's order of things."""
    bits = candidates((2, 3), (16,))
    x = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype("f4")
    engine = Engine.build(MODEL, len(x))
    taps = collect(engine, x, ("kl", "output-error", "pairs", "coupling"), bits)
    reference, names = engine.logits(x), engine.network.names

    def edits(name, k):
        site = engine.network.sites_of(name)[0]
        columns, size = engine.columns(site), getattr(bits[k], "group_size", None)
        if name in ("stem", "head"):
            size = None
        rounded = quantize_columns(columns, int(bits[k]), Rounding(group_size=size))
        shape = engine.weight(site).shape
        return {site: Edit(weight=engine.network.sites[site].from_columns(rounded, shape))}

    def kl(own):
        return kl_divergence(reference, engine.logits(x, own)).mean()

    expected = [[kl(edits(name, k)) for k in range(4)] for name in names]
    np.testing.assert_allclose([tap.kl for tap in taps], expected, rtol=1e-4, atol=1e-9)
    assert taps.pairs is not None and taps.correlation is not None
    both = kl(edits("one", 1) | edits("two", 3))
    row, column = 4 * names.index("one") + 1, 4 * names.index("two") + 3
    np.testing.assert_allclose(taps.pairs.pairs[row, column], both, rtol=1e-4)
    assert taps.correlation.shape == (16, 16)
    # Where a layer cannot have the groups, it is the same choice twice.
    for name in ("stem", "head"):
        np.testing.assert_array_equal(expected[names.index(name)][::2],
                                      expected[names.index(name)][1::2])  # fmt: skip
    assert expected[names.index("one")][0] != expected[names.index("one")][1]


def test_auto_picks_a_mixed_plan():
    plan = search(
        MODEL, "digits", bits=(2, 3, 4), group_size=(None, 16), budget="size=3.4bit", samples=64
    )
    assert plan.average_bits <= 3.4 and plan.method["proxy"] == "auto"
    assert plan.method["group_sizes"] == [None, 16]
    assert any(one.group_size == 16 for one in plan.layers.values())
    assert all(one.group_size is None for name, one in plan.layers.items()
               if name in ("stem", "head"))  # fmt: skip
    report = plan.predicted["auto"]  # type: ignore[index]
    assert {"logit-coupling", "hessian-trace"} <= {one["proxy"] for one in report["candidates"]}


@pytest.fixture(scope="module")
def mixed():
    plan = search(
        MODEL, proxy="weight-mse", bits=(2, 3, 4), group_size=SIZES, budget="size=3.7bit",
        pins=["two=3g16", "one=4g32", "head=8"], correction="none",
    )  # fmt: skip
    inputs = np.random.default_rng(0).normal(size=(32, 8, 8, 1)).astype("f4")
    return plan, quantize_model(MODEL, plan, inputs), inputs


def naive_logits(plan, inputs):
    engine, edits = Engine.build(MODEL, len(inputs)), {}
    for name, one in plan.layers.items():
        site = engine.network.sites_of(name)[0]
        how = Rounding(group_size=one.group_size)
        rounded = quantize_columns(engine.columns(site), one.weight_bits, how)
        shape = engine.weight(site).shape
        edits[site] = Edit(weight=engine.network.sites[site].from_columns(rounded, shape))
    return engine.logits(inputs, edits)


def test_a_mixed_plan_is_what_runs_and_what_is_packed(mixed, tmp_path):
    plan, quantized, inputs = mixed
    sizes = {site.layer: groups_of(quantized.integers[i]) for i, site in
             enumerate(network(MODEL, 2).sites)}  # fmt: skip
    assert {name: own and own.size for name, own in sizes.items()} == {
        "stem": None, "one": 32, "two": 16, "head": None
    }  # fmt: skip
    expected = naive_logits(plan, inputs)
    np.testing.assert_allclose(quantized.logits(inputs), expected, atol=1e-5)
    engine = Engine.build(MODEL, len(inputs))
    choices = [(one.width, None) for one in plan.layers.values()]
    edits = PlanEdits(engine, inputs)(choices)
    np.testing.assert_allclose(engine.logits(inputs, edits), expected, atol=1e-5)
    size = save_packed(quantized, tmp_path / "packed.safetensors")
    assert abs(size.codes * 8 - plan.size_bits) < 8 * len(plan.layers)
    back = load_packed(tmp_path / "packed.safetensors", MODEL)
    np.testing.assert_allclose(back.logits(inputs), expected, atol=1e-5)
    assert back.plan is not None and back.plan.layers == plan.layers
    arrays = reader.load(tmp_path / "packed.safetensors")
    for layer in deployed_layers(quantized):
        np.testing.assert_array_equal(arrays[layer.parameter], layer.weight.values())


@pytest.mark.parametrize("how", ["bias", pytest.param("adaround", marks=pytest.mark.slow)])
def test_reconstruction_keeps_each_layers_groups(mixed, how):
    from proxyq.ptq.reconstruct import Learning

    plan, quantized, inputs = mixed
    learning = Learning(steps=4, batch_size=16) if how == "adaround" else None
    made = quantize_model(MODEL, plan, inputs, reconstruction=how, learning=learning)
    for index, own in made.integers.items():
        before, after = groups_of(quantized.integers[index]), groups_of(own)
        assert (after and after.size) == (before and before.size)
        assert own.bits == quantized.integers[index].bits


def test_a_plan_is_the_file_that_it_was(mixed):
    plan = mixed[0]
    again = Plan.from_json(json.loads(plan.to_json()))
    assert again == plan and again.to_json() == plan.to_json()
    assert plan.widths()["two"] == GroupedBits(3, 16) and plan.bits()["two"] == 3
    text = str(plan)
    assert " 3g16* " in text and " 4g32* " in text
    record = json.loads(plan.to_json())["layers"]
    assert record["two"]["group_size"] == 16 and record["two"]["scale_bits"] == 48 * 20
    assert "group_size" not in record["head"] and "scale_bits" not in record["head"]
    plain = search(MODEL, proxy="sqnr", bits=(2, 3, 4), budget="size=3bit")
    assert '"one": {"weight_bits": 3, "activation_bits": null, "weights": 12288, "macs": 12288, ' \
        '"group": null, "pinned": false}' in plain.to_json()  # fmt: skip
    for name in ("group_sizes", "scale_bits"):
        assert name not in plain.to_json()


def test_pages_and_tables_tell_the_groups(mixed, tmp_path):
    plan = mixed[0]
    scores = score(MODEL, proxies="weight-mse", bits=(2, 3, 4), group_size=SIZES)
    found, head = layer_scores(plan)
    record = scores.record().values
    # Of the candidates in order: 2, 2g32, 2g16, 3, 3g32, 3g16, 4, ...; nobody measured 8 bits.
    assert head == "cost" and "head" not in found
    assert found["two"] == record["two"][5] and found["one"] == record["one"][7]
    page = write_report(plan, tmp_path / "page.html", scores=scores).read_text()
    assert 'class="chip b3">3g16</span>' in page and "groups of 16" in page
    assert "2, 2g32, 2g16, 3" in page
    console = Console(width=100)
    with console.capture() as shown:
        console.print(plan_table(plan))
    assert "4g32*████" in shown.get() and "   8*████" in shown.get()
    assert b"3g16" in draw_plan(plan, "plan.svg")


def test_the_uniform_rival_has_groups_too(mixed):
    plan = mixed[0].model_copy(
        update={"budgets": [PlannedBudget(name="size", asked=4.4, achieved=4.0, unit="bit")]}
    )
    rival = uniform_plan(MODEL, plan)
    assert rival is not None
    found = {name: str(one.width) for name, one in rival.layers.items()}
    # Pinned layers stay; only the stem is free here, and has no groups.
    assert found == {"stem": "4", "one": "4g32", "two": "3g16", "head": "8"}
    free = search(MODEL, proxy="sqnr", bits=(2, 3, 4), group_size=SIZES, budget="size=3.55bit")
    rival = uniform_plan(MODEL, free)
    assert rival is not None
    found = {name: str(one.width) for name, one in rival.layers.items()}
    assert found == {"stem": "3", "one": "3g32", "two": "3", "head": "3"}
    assert rival.average_bits <= 3.55
    found = evaluate(MODEL, [free], "digits", "digits:test", correction="none", samples=16)
    told = found.summary()["uniform"]
    assert (told["bits"], told["group_size"]) == (3, 32)
    (name, *_) = accuracy_table(found.to_json()).columns[0]._cells[1:2]
    assert str(name) == "uniform 3g32 bit"


@pytest.fixture(scope="module")
def exported():
    """A transformer whose layers have groups of 16, 12, 8 and none, and its plan applied."""
    import torch

    torch.manual_seed(0)
    module = randomise(SmallTransformer(32)).eval()
    model = proxyq.from_torch(module, (6, 32))
    sizes = {"attention.0": 16, "gate_proj": 8, "up_proj": 16, "down_proj": 12, "head": 8}
    own = {one.name: one for one in sized_layers(network(model, 2), held=(8, 12, 16))}
    layers = {}
    for name, layer in plan_of(model, (4,)).layers.items():
        size = next((size for start, size in sizes.items() if name.startswith(start)), None)
        scales = own[name].group_scale_bits[size]
        layers[name] = layer.model_copy(update={"group_size": size, "scale_bits": scales})
    plan = Plan(layers=layers)
    inputs = np.random.default_rng(0).normal(size=(16, 6, 32)).astype("f4")
    return model, module, plan, quantize_model(model, plan, inputs, correction="none"), inputs


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize("form", ["onnx", "torchao", "compressed-tensors"])
def test_runtimes_have_each_layers_groups(exported, tmp_path, form):
    import_torchvision()  # compressed-tensors imports it, and needs help with it
    pytest.importorskip({"onnx": "onnxruntime"}.get(form, form.replace("-", "_")))
    _, module, plan, quantized, inputs = exported
    path = tmp_path / ("network.onnx" if form == "onnx" else "folder")
    write = {"onnx": export_onnx, "torchao": export_torchao}.get(form, export_compressed_tensors)
    done = write(quantized, path, plan=plan, inputs=inputs, module=module)
    assert done.planned_bits == plan.size_bits
    wanted = sorted(one.group_size or 0 for one in plan.layers.values())
    if form == "onnx":
        import onnx
        import onnxruntime

        # By default it rounds what meets blocks of 16 to 8 bits.
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: inputs})[0]
        np.testing.assert_allclose(found, quantized.logits(inputs), atol=1e-5)
        nodes = [n for n in onnx.load(path).graph.node if n.op_type == "DequantizeLinear"]
        blocks = [sum(a.i for a in n.attribute if a.name == "block_size") for n in nodes]
        assert sorted(blocks) == wanted
        return
    assert done.difference is not None and done.difference < 1e-5
    back = (load_torchao if form == "torchao" else load_compressed_tensors)(path, module)
    np.testing.assert_allclose(run_of(back)(inputs), quantized.logits(inputs), atol=1e-5)
    for layer in deployed_layers(quantized):
        weight = weight_of(back, layer)
        values = weight.dequantize() if form == "torchao" else weight.detach()
        np.testing.assert_array_equal(values.numpy(), layer.weight.values())
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    if form == "torchao":
        blocks = {
            layer.name: weight_of(back, layer).block_size[1] for layer in deployed_layers(quantized)
        }
        for name, one in plan.layers.items():
            fan_in = 24 if name.startswith("down_proj") else 32
            assert blocks[name] == (one.group_size or fan_in)
        return
    groups = config["config_groups"].values()
    assert {one["weights"]["group_size"]: len(one["targets"]) for one in groups} == {
        None: 4, 8: 3, 12: 2, 16: 6,
    }  # fmt: skip


def test_what_runtimes_fuse_needs_equal_groups(exported, tmp_path):
    model, module, plan, _, inputs = exported
    layers = dict(plan.layers)
    name = "attention.0.k_proj"
    layers[name] = layers[name].model_copy(update={"group_size": None, "scale_bits": 0})
    apart = quantize_model(model, Plan(layers=layers), inputs, correction="none")
    with pytest.raises(ProxyqError, match=r"q_proj 4g16, .*k_proj 4, .* needs equal bits and gro"):
        export_compressed_tensors(apart, tmp_path / "folder", module=module)
    # By default a search gives such layers one column.
    found = search(model, proxy="sqnr", bits=(3, 4), group_size=(None, 8, 16), budget="size=4bit")
    for i in range(2):
        widths = {str(found.layers[f"attention.{i}.{n}_proj"].width) for n in "qkv"}
        assert len(widths) == 1


@pytest.mark.filterwarnings("ignore:The 'm.iter_modules:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
def test_rules_of_qwix_have_each_layers_groups(tmp_path):
    pytest.importorskip("qwix")
    rngs = nnx.Rngs(0)
    module = nnx.Sequential(
        nnx.Linear(32, 24, rngs=rngs), nnx.relu, nnx.Linear(24, 32, rngs=rngs), nnx.relu,
        nnx.Linear(32, 5, rngs=rngs),
    )  # fmt: skip
    model = proxyq.from_nnx(module, (32,))
    plan = search(model, proxy="sqnr", bits=(4,), group_size=(None, 8, 16), budget="size=8bit",
                  pins=["@first=4g16", "@last=4"], correction="none")  # fmt: skip
    inputs = np.random.default_rng(0).normal(size=(16, 32)).astype("f4")
    quantized = quantize_model(model, plan, inputs)
    done = export_qwix(quantized, tmp_path, module=module, plan=plan, inputs=inputs)
    assert [rule.tile_size for rule in load_qwix_rules(tmp_path)] == [16, 8, None]
    assert done.difference is not None and done.difference < 1e-6
    back = load_qwix(tmp_path, module, inputs)
    np.testing.assert_allclose(back(inputs), quantized.logits(inputs), atol=1e-6)


def test_outliers_are_told_among_groups_of_one_size():
    bits = candidates((2, 4), (16,))
    # Plain 4 looks worse than plain 2; with groups all is well.
    kept = without_outliers([[1.0, 5.0, 2.0, 3.0]], bits)
    assert kept.tolist() == [[False, True, True, True]]


def test_problems_have_columns_of_three_parts():
    cost = np.zeros((1, 3))
    problem = Problem(layers=("a",), bits=(4, 4, 4), cost=cost, group_sizes=(None, 64, 64),
                      activation_bits=(8, 8, None))  # fmt: skip
    assert [problem.shown(k) for k in range(3)] == ["4/8", "4g64/8", "4g64/float"]
    with pytest.raises(UsageError, match="weights at 4g64 bits are given twice"):
        Problem(layers=("a",), bits=(4, 4, 4), cost=cost, group_sizes=(None, 64, 64))
    with pytest.raises(UsageError, match="`group_sizes` must have an entry for each of the 3"):
        Problem(layers=("a",), bits=(2, 3, 4), cost=cost, group_sizes=(None, 64))
    with pytest.raises(UsageError, match="`group_size` must be a whole number of at least 8"):
        Problem(layers=("a",), bits=(2, 3, 4), cost=cost, group_sizes=(None, 64, 2))
    # Layers that say nothing of groups have none.
    layers = network(MODEL, 2).layers
    problem = build_problem(layers, np.zeros((4, 4)), candidates((2, 4), (16,)), "size=4bit")
    assert problem.allowed.tolist() == [[True, False, True, False]] * 4
    assert {problem.shown(k) for k in solve(problem).choice} <= {"2", "4"}


def test_fronts_tell_the_groups_of_each_point(tmp_path):
    front = pareto(MODEL, proxy="sqnr", bits=(2, 3, 4), group_size=SIZES,
                   budget="size=2.5bit..4.5bit", points=9)  # fmt: skip
    front.save(tmp_path / "front.json")
    back = Front.load(tmp_path / "front.json")
    assert back.to_json() == front.to_json()
    plans = back.plans
    assert len({tuple(plan.widths().items()) for plan in plans}) == len(plans) > 5
    for plan, point in zip(plans, back.points, strict=True):
        assert plan.size_bits == point.size_bits
        assert plan.average_bits == pytest.approx(point.achieved)
    assert any(one.group_size for plan in plans for one in plan.layers.values())
    wrong = json.loads(front.to_json())
    wrong["points"][0]["group_sizes"]["one"] = 37
    with pytest.raises(ProxyqError, match="must divide the weights of the layer 'one', 12288"):
        Front.from_json(wrong)
    del wrong["points"][0]["group_sizes"]
    with pytest.raises(ProxyqError, match="must hold both 'group_sizes' and 'scale_bits'"):
        Front.from_json(wrong)
    single = pareto(MODEL, proxy="sqnr", bits=(2, 4), budget="size=2bit..4bit", points=3)
    assert "group_sizes" not in single.to_json()


def test_groups_that_no_layer_can_have_are_not_measured():
    plan = search(small_net(), proxy="sqnr", bits=(2, 4), group_size=(None, 64), budget="size=3bit")
    plain = search(small_net(), proxy="sqnr", bits=(2, 4), budget="size=3bit")
    assert (plan.layers, plan.method) == (plain.layers, plain.method)


@pytest.mark.parametrize("given", [(64,), [None], 64])
def test_one_size_is_no_choice(given):
    sizes = {"bits": (2, 3, 4), "proxy": "sqnr", "budget": "size=4bit"}
    plan = search(MODEL, group_size=given, **sizes)
    one = given if isinstance(given, int) else given[0]
    again = search(MODEL, group_size=one, **sizes)
    assert (plan.layers, plan.method) == (again.layers, again.method)
    assert plan.method["rounding"]["group_size"] == one


def test_what_cannot_tell_groups_is_refused():
    given = {"bits": (2, 4), "group_size": (None, 16), "budget": "size=3bit"}
    for proxy in ("uniform", "limpq", "activation-mse"):
        with pytest.raises(ProxyqError, match=f"{proxy!r} cannot tell groups of weights from"):
            search(MODEL, "digits", proxy=proxy, samples=16, **given)
    for options in ({"cost": "linear-bits"}, {"cost": "exponential"}, {}):
        with pytest.raises(UsageError, match=r"cannot tell groups of weights .* times-dw2"):
            search(MODEL, "digits", proxy="params", samples=16, **options, **given)
        with pytest.raises(UsageError, match="cannot tell groups of weights"):
            pareto(MODEL, proxy="params", **options, **{**given, "budget": "size=2bit..4bit"})
    scores = score(MODEL, proxies="params", **{k: given[k] for k in ("bits", "group_size")})
    with pytest.raises(UsageError, match=r"cannot tell groups of weights .* times-dw2"):
        allocate(scores, "size=3bit")
    # A stranger's proxy that does arithmetic on bits says nothing of groups either.
    blind = score(MODEL, proxies="sqnr", **{k: given[k] for k in ("bits", "group_size")})
    (record,) = blind.scores
    same = {name: [row[0], row[0], row[2], row[2]] for name, row in record.values.items()}
    blind = blind.model_copy(update={"scores": [record.model_copy(update={"values": same})]})
    with pytest.raises(ProxyqError, match="'sqnr' cannot tell groups of weights from"):
        allocate(blind, "size=3bit")
    requests = [(PROXIES.get(name), {}) for name in ("uniform", "sqnr")]
    left_out: list[str] = []

    def failed(proxy, error):
        left_out.append(proxy.name)

    (found,) = score_all(MODEL, requests, bits=candidates((2,), (16,)), failed=failed)
    assert (found.proxy, left_out) == ("sqnr", ["uniform"])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((), "must name at least one size"),
        ((64, 64), "names 64 twice"),
        ((None, None), "names 'channel' twice"),
        ((None, 7), "must be a whole number of at least 8"),
        ((None, "64"), "must be a whole number of at least 8"),
        ("channel,64", "must be a whole number of at least 8"),
    ],
)
def test_sizes_that_are_no_choice(given, told):
    with pytest.raises(UsageError, match=told):
        search(MODEL, proxy="sqnr", group_size=given, budget="size=4bit")


def changed(plan, name, **update):
    record = json.loads(plan.to_json())
    record["layers"][name] |= update
    return record


def test_plans_whose_groups_do_not_fit(mixed):
    plan = mixed[0]
    for update in (
        {"group_size": 7},
        {"group_size": 36},
        {"group_size": True},
        {"group_size": "8"},
    ):
        with pytest.raises(ProxyqError, match=r"bad field 'layers\.one"):
            Plan.from_json(changed(plan, "one", **update))
    for name, update, told in (
        ("one", {"scale_bits": 8}, "take 8 bits, and in .* they take 6,144 bits"),
        ("stem", {"group_size": 9, "scale_bits": 64}, "groups of 9 weights .* cannot be there"),
    ):
        wrong = Plan.from_json(changed(plan, name, **update))
        with pytest.raises(ProxyqError, match=told):
            quantize_model(MODEL, wrong)


def test_scores_whose_groups_do_not_fit():
    record = json.loads(score(MODEL, proxies="sqnr", bits=(2, 4), group_size=SIZES).to_json())
    wrong = (
        ({"group_sizes": [None]}, "'group_sizes' must have an entry for each of the 6"),
        ({"group_sizes": None}, "names the bit-width 2 twice"),
        ({"group_sizes": [None, 16, 16, None, 32, 16]}, "names the bit-width 2g16 twice"),
        ({"group_sizes": [None, 2, 16, None, 32, 16]}, "at least 8"),
        ({"group_sizes": [None, "32", 16, None, 32, 16]}, "group_sizes"),
    )
    for update, told in wrong:
        with pytest.raises(ProxyqError, match=told):
            ScoreFile.from_json({**record, **update})
    for scales in ({"x": 1}, {"16": -1}, {"16": 1.5}, {"4": 1}, {"09": 1}, [], {"9" * 40: 1}):
        bad = json.loads(json.dumps(record))
        bad["layers"]["one"]["group_scale_bits"] = scales
        with pytest.raises(ProxyqError, match=r"layers\.one"):
            ScoreFile.from_json(bad)


def test_from_the_command_line(tmp_path):
    common = ["--proxy", "weight-mse", "--bits", "2,4"]
    plan = tmp_path / "plan.json"
    done = here("search", *common, "--group-size", "channel,16", "--budget", "size=3bit",
                "--out", plan)  # fmt: skip
    assert done.code == 0, done
    for text, told in (
        ("channel,x", "--group-size must be a whole number such as 64, or several"),
        ("", "--group-size must be a whole number such as 64, or several"),
        ("channel,3", "`group_size` must be a whole number of at least 8"),
        ("16,16", "`group_size` names 16 twice"),
    ):
        wrong = here("search", *common, "--group-size", text)
        assert wrong.code == 2 and told in wrong.err, wrong
    table = ["table", "--plans", "2", "--out", tmp_path / "table.json"]
    wrong = here(*table, "--group-size", "channel,16")
    assert wrong.code == 2 and "of a table must be one size" in wrong.err
    assert not (tmp_path / "table.json").exists()
