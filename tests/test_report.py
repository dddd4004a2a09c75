"""Tables and pictures of plans."""

from typing import Any

import pytest
from rich.console import Console

from proxyq.api import inspect
from proxyq.errors import UsageError
from proxyq.proxies import PROXIES
from proxyq.report.plots import check_format, draw_plan, plot_plan
from proxyq.report.tables import (
    accuracy_table,
    class_table,
    comparison_table,
    counted,
    layer_scores,
    network_table,
    plan_summary,
    plan_table,
    proxies_table,
    recipes_table,
    short_names,
    speed_line,
)
from proxyq.search.allocate.plan import SCHEMA, Plan
from proxyq.search.recipes import available_recipes, load_recipe


def shown(table: Any) -> list[str]:
    """A table as the lines of a file."""
    console = Console(width=88, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def make_plan(layers: int = 6, name: str = "layer{}.conv", **changes: Any) -> Plan:
    """A plan of 2, 3, 4 and 8 bits in turn, the first layer pinned to 8."""
    bits = [2, 3, 4, 8]
    planned = {
        name.format(i): {
            "weight_bits": bits[i % 4] if i else 8,
            "activation_bits": None,
            "weights": 1024 * (i + 1),
            "macs": 4096 * (i + 1),
            "group": None,
            "pinned": i == 0,
        }
        for i in range(layers)
    }
    record = {
        "schema": SCHEMA,
        "model": {"name": "net"},
        "method": {"proxy": "output-error", "bits": bits},
        "layers": planned,
        "budgets": [{"name": "size", "asked": 4, "achieved": 3.5, "unit": "bit"}],
        "solver": {
            "name": "ilp",
            "status": "feasible",
            "objective": 0.25,
            "bound": 0.24,
            "gap": 0.04,
            "seconds": 1.5,
            "notes": ["stopped early."],
        },
        "predicted": {"scores": {one: [0.4, 0.3, 0.2, 0.001] for one in planned}},
    }
    return Plan.from_json({**record, **changes})


# -- tables ----------------------------------------------------------------------------


def test_plan_table():
    plan = make_plan()
    lines = shown(plan_table(plan, {name: "conv" for name in plan.layers}))
    assert lines[0].split() == ["layer", "kind", "bits", "weights", "KiB", "cost"]
    assert lines[2].split() == ["layer0.conv", "conv", "8*████████", "1,024", "1.0", "0.001"]
    assert lines[3].split() == ["layer1.conv", "conv", "3", "███", "2,048", "0.8", "0.3"]
    total = 1024 * (8 + 2 * 3 + 3 * 4 + 4 * 8 + 5 * 2 + 6 * 3) / 8192
    assert lines[-2].split() == ["6", "layers", "3.9", "21,504", f"{total:.1f}"]
    assert lines[-1] == "* pinned"


def test_plan_table_without_what_a_plan_may_lack():
    plan = make_plan(predicted=None, solver=None, budgets=[])
    lines = shown(plan_table(plan))
    assert lines[0].split() == ["layer", "bits", "weights", "KiB"]
    assert plan_summary(plan) == "net · output-error · 6 layers · 3.9 bits on average"


def test_float_layers_and_activations():
    plan = make_plan(2)
    first, second = plan.layers.values()
    changed = {
        "a": first.model_copy(update={"weight_bits": None, "pinned": False}),
        "b": second.model_copy(update={"activation_bits": 8}),
    }
    lines = shown(plan_table(plan.model_copy(update={"layers": changed, "predicted": None})))
    assert lines[2].split() == ["a", "float", "float", "1,024", "4.0"]
    assert lines[3].split() == ["b", "3", "███", "8", "2,048", "0.8"]


def widened(plan: Plan, weights: int) -> Plan:
    """The plan with long numbers in every column."""
    layers = {
        name: layer.model_copy(update={"activation_bits": 8, "weights": weights})
        for name, layer in plan.layers.items()
    }
    return plan.model_copy(update={"layers": layers})


def test_tables_fit_in_88_columns():
    for name in ("encoder.layers.block_{}.attention.self.output.dense", "x" * 99 + "{}"):
        plan = widened(make_plan(12, name), 10**10)
        table = plan_table(plan, {key: "transposed-conv" for key in plan.layers})
        assert max(map(len, shown(table))) <= 88


def test_long_names_stay_apart():
    plan = widened(make_plan(12, "encoder.layers.block_{}.attention.self.output.dense"), 10**6)
    lines = shown(plan_table(plan, {key: "linear" for key in plan.layers}))
    assert len({line.split()[0] for line in lines[2:14]}) == 12


def test_short_names():
    assert short_names(["a.b", "a.c"], 10) == ["a.b", "a.c"]
    names = ["model.encoder.layer1.weight", "model.encoder.layer22.weight", "head"]
    assert short_names(names, 16) == ["…layer1.weight", "…layer22.weight", "head"]
    assert short_names(["abcdefghijklmnop"], 7) == ["abc…nop"]


def test_scores():
    plan = make_plan(3)
    assert layer_scores(plan) == (
        {"layer0.conv": 0.001, "layer1.conv": 0.3, "layer2.conv": 0.2},
        "cost",
    )
    plain = plan.model_copy(update={"predicted": {"scores": {"layer1.conv": 7}}})
    assert layer_scores(plain) == ({"layer1.conv": 7.0}, "score")
    assert layer_scores(plan.model_copy(update={"predicted": None})) == ({}, "score")
    # A pin outside the candidates has no predicted cost.
    odd = plan.layers["layer0.conv"].model_copy(update={"weight_bits": 6})
    changed = plan.model_copy(update={"layers": {**plan.layers, "layer0.conv": odd}})
    assert "layer0.conv" not in layer_scores(changed)[0]


def test_summary():
    lines = plan_summary(make_plan()).splitlines()
    assert lines[0] == "net · output-error · 6 layers · 3.9 bits on average"
    assert lines[1] == (
        "feasible, not proven best · solver ilp · cost 0.25 · bound 0.24 · gap 4 % · 1.50 s"
    )
    assert lines[2] == "size: 3.5 of 4 bit (87.5 %)"
    assert lines[3].endswith("weights of the 5 searched layers; not scales, biases, pinned layers")
    assert lines[4] == "note: stopped early."


@pytest.mark.parametrize(
    ("name", "low", "high", "ends"),
    [
        ("size", 8192, 81920, "the way from 1.0 KiB (0 %) to 10.0 KiB (100 %)"),
        ("bops", 10**9, 4 * 10**9, "the way from 1 G (0 %) to 4 G (100 %)"),
        ("latency", 10**9, 25 * 10**8, "the way from 1 ms (0 %) to 2.5 ms (100 %)"),
    ],
)
def test_shares_tell_what_their_ends_are(name: str, low: int, high: int, ends: str):
    share = {"name": name, "asked": 50, "achieved": 49.5, "unit": "%", "low": low, "high": high}
    lines = plan_summary(make_plan(budgets=[share])).splitlines()
    assert lines[2] == f"{name}: 49.5 of 50 %"
    assert lines[3] == f"  counted: {ends}"
    assert lines[4].startswith("  of ") and "all 6 layers (1 pinned)" in lines[4]


def test_rounding_of_the_solver_is_no_gap():
    plan = make_plan()
    assert plan.solver is not None
    solver = plan.solver.model_copy(update={"gap": 2e-16})
    assert " gap 0 % " in plan_summary(plan.model_copy(update={"solver": solver}))


@pytest.mark.parametrize(
    ("name", "unit", "text"),
    [
        ("size", "bit", "weights of the 5 searched layers; not scales, biases, pinned layers"),
        ("size", "MiB", "weights of all 6 layers (1 pinned); not scales, biases"),
        ("bops", "G", "MACs × weight bits × activation bits (float: 32), all 6 layers (1 pinned)"),
        ("macs-bits", "M", "MACs × weight bits, all 6 layers (1 pinned)"),
        (
            "latency",
            "ms",
            "by the latency table: all 6 layers (1 pinned), and the rest of the network",
        ),
    ],
)
def test_what_budgets_count(name: str, unit: str, text: str):
    budget = {"name": name, "asked": 4, "achieved": 3.5, "unit": unit}
    plan = make_plan(budgets=[budget])
    assert counted(plan.budgets[0], plan) == text
    assert all(len(line) <= 88 for line in plan_summary(plan).splitlines())


def test_accuracy_table():
    row = {"average_bits": 3.0, "size_bits": 81920, "kl": 0.0123, "correction": "statistics"}
    measured = {
        "float": {"top1": 91.5, "n": 10000},
        "uniform": {"bits": 3, "top1": 80.25, **row},
        "plans": [{"file": "a.json", "top1": 88.0, **row}, {"file": "b.json", "top1": 1.0, **row}],
    }
    lines = shown(accuracy_table(measured))
    assert lines[2].split() == ["float", "91.50", "32"]
    assert lines[3].split() == ["uniform", "3", "bit", "80.25", "3", "10.0", "0.0123", "statistics"]
    assert [line.split()[0] for line in lines[4:6]] == ["a.json", "b.json"]
    assert lines[-1].strip() == "on 10,000 images"
    lines = shown(accuracy_table({**measured, "uniform": None, "plans": measured["plans"][:1]}))
    assert [line.split()[0] for line in lines[2:4]] == ["float", "plan"]


def paired(first: str, second: str, p: float = 0.2) -> dict[str, Any]:
    counts = {f"only_{first}": 12, f"only_{second}": 3}
    return {**counts, "difference": -2.25, "interval": [-4.0, 0.125], "p_value": p / 2, "p_holm": p}


def test_comparisons_of_many_plans():
    names = [f"folder/a-long-name-of-a-plan-{number}.json" for number in range(8)]
    row = {"average_bits": 3.0, "size_bits": 81920, "kl": 0.0123, "correction": "statistics"}
    row |= {"top1": 80.25, "versus_float": paired("float", "plan", 1e-9)}
    pairs = [paired("first", "second", p=1 / (1 + number)) for number in range(28)]
    measured = {
        "float": {"top1": 91.5, "n": 10000},
        "uniform": {"bits": 3, **row},
        "plans": [
            {"file": name, **row, "versus_uniform": paired("uniform", "plan")} for name in names
        ],
        "comparisons": pairs,
    }
    lines = shown(accuracy_table(measured))
    assert max(map(len, lines)) <= 88
    assert lines[3].split()[-4:] == ["-2.25", "-4.00", "+0.12", "<0.0001"]
    assert "folder" not in "".join(lines) and "correction: statistics" in " ".join(lines)
    lines = shown(comparison_table(measured))
    assert max(map(len, lines)) <= 88
    assert len([line for line in lines if line.split()[-1:] and "-2.25" in line]) == 15
    assert lines[-1].endswith("by --json") and "21 more" in " ".join(lines)
    alone = {**measured, "plans": measured["plans"][:1], "uniform": None, "comparisons": []}
    assert comparison_table(alone) is None


def test_classes_that_change_most():
    changes = {"ant": -5.0, "bee": 2.5, "cow": 0.0, "dog": -7.5, "elk": -1.0, "fox": -2.0}
    classes = [
        {"class": i, "name": n, "n": 40 + i, "float": 90.0, "plans": [{"difference": change}]}
        for i, (n, change) in enumerate(changes.items())
    ]
    measured = {"plans": [{"file": "a.json"}], "classes": classes}
    lines = shown(class_table(measured))
    assert lines[2].split() == ["plan", "dog", "90.0", "-7.5", "bee", "90.0", "+2.5"]
    assert [line.split()[0] for line in lines[3:5]] == ["ant", "fox"]
    assert lines[-1].strip() == "classes against float; 40 to 45 images a class"
    unnamed = [{**one, "name": None} for one in classes]
    assert shown(class_table({**measured, "classes": unnamed}))[2].split()[1] == "3"
    assert class_table({**measured, "classes": classes[2:3]}) is None


def test_speed_line():
    speeds = {"float": 1234.5, "uniform": 900.0, "plans": [850.2, 910.0]}
    line = speed_line({"images_per_second": speeds})
    assert line is not None and "float 1,234, quantized 850 to 910;" in line
    assert speed_line({"images_per_second": None}) is None


def test_listings():
    lines = shown(network_table(inspect()))
    assert lines[-2].split() == ["12", "layers", "35,600", "811", "k"]
    assert lines[-1].strip().startswith("float activations: at most 12.0 KiB at once")
    assert max(map(len, lines)) <= 88
    text = "\n".join(shown(proxies_table(PROXIES)))
    assert "orthogonality" in text and "curvature" in text
    assert "OMPQ" in "\n".join(shown(recipes_table(map(load_recipe, available_recipes()))))


# -- pictures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_pictures_are_the_same_bytes_every_time(suffix: str, start: bytes):
    plan = make_plan()
    picture = draw_plan(plan, f"plan.{suffix}")
    assert picture.startswith(start)
    assert draw_plan(plan, f"plan.{suffix.upper()}") == picture


@pytest.mark.parametrize("name", ["plan.bmp", "plan", "png", "plan.png.gz"])
def test_other_formats_are_refused(name: str):
    with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
        check_format(name)


def test_what_a_picture_shows():
    plan = make_plan(6)
    ax = plot_plan(plan)
    bars = [bar.get_width() for bar in ax.patches if bar.get_height() == pytest.approx(0.72)]
    assert bars == [8, 3, 4, 8, 2, 3]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(plan.layers)
    assert ax.get_ylim() == (5.5, -0.5)  # the first layer on top
    assert len(ax.figure.axes) == 3
    assert ax.figure.axes[2].get_xscale() == "log"
    texts = [text.get_text() for text in ax.figure.texts]
    assert texts == ["net · output-error", "size 3.5 of 4 bit · feasible (ilp)"]


def test_pictures_of_unusual_plans():
    plan = make_plan(3)
    floats = {
        name: layer.model_copy(update={"weight_bits": None, "pinned": False})
        for name, layer in plan.layers.items()
    }
    for changes in (
        {"layers": floats},
        {"predicted": None, "solver": None, "budgets": [], "method": {}, "model": {}},
        {"predicted": {"scores": dict.fromkeys(plan.layers, 0.0)}},
        {"predicted": {"scores": dict.fromkeys(plan.layers, -1.5)}},
    ):
        assert draw_plan(plan.model_copy(update=changes), "plan.png").startswith(b"\x89PNG")
    assert len(plot_plan(plan.model_copy(update={"predicted": None})).figure.axes) == 2


def test_pictures_grow_with_the_layers_and_their_names():
    small, large = (plot_plan(make_plan(n)).figure for n in (4, 150))
    assert small.get_figwidth() == large.get_figwidth()
    assert small.get_figheight() < 5 and 15 < large.get_figheight() < 30
    wide = plot_plan(make_plan(4, "encoder.layers.block_{}.attention.self.output.dense")).figure
    assert wide.get_figwidth() > small.get_figwidth()


def test_names_do_not_leave_the_picture():
    for layers, name in (
        (4, "W" * 80 + "{}"),
        (60, "encoder.block_{}.attention.output.dense"),
        (2, "a{}"),
    ):
        ax = plot_plan(make_plan(layers, name))
        figure = ax.figure
        renderer = figure.canvas.get_renderer()
        for label in ax.get_yticklabels():
            box = label.get_window_extent(renderer)
            assert box.x0 > 0.25 * figure.dpi, (name, box.x0 / figure.dpi)


def test_bars_into_axes_of_ones_own():
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    assert plot_plan(make_plan(), ax) is ax
    assert len(ax.figure.axes) == 1
