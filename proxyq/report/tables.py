"""Tables for the terminal: rich renderables of at most 88 columns, and lines of text.

Nothing here prints. Give the tables to a `rich.console.Console`.
"""

import inspect
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from proxyq.search.allocate.budget import PICOSECONDS, SHARE
from proxyq.search.allocate.plan import FLOAT_BITS, Plan, PlannedBudget, PlannedLayer
from proxyq.search.allocate.text import elided, wrapped

if TYPE_CHECKING:
    from proxyq.model.network import Network
    from proxyq.proxies import Proxy
    from proxyq.search.front_file import Front, FrontPoint
    from proxyq.search.recipes import Recipe
    from proxyq.search.scores_file import ScoreFile
    from proxyq.search.table_file import MeasuredTable

WIDTH = 88
BAR = 8
"""Characters of the bar of bits: one for each bit up to 8."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its head, a cell for each row, what stands below; numbers to the right."""

    head: str
    cells: Sequence[str | Text]
    foot: str = ""
    right: bool = True

    @property
    def width(self) -> int:
        """Characters of the widest cell."""
        return max(len(cell) for cell in (*self.head.split("\n"), self.foot, *self.cells))


def short_names(names: Sequence[str], width: int) -> list[str]:
    """Names of at most `width`: what long ones begin with alike goes first, then the middle."""
    long = [name for name in names if len(name) > width]
    common = _common_start(long) if len(long) > 1 else ""
    short = [
        f"…{name[len(common) :]}" if common and name.startswith(common) else name for name in names
    ]
    return [elided(name, width) for name in short]


def _common_start(names: Sequence[str]) -> str:
    """The leading parts, each with its dot, that all names share."""
    low, high = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[: low[:same].rfind(".") + 1]


def _empty(**options: Any) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
        footer_style="bold",
        caption_justify="left",
        **options,
    )


def _named(first: Column, columns: Sequence[Column], caption: str | None = None) -> Table:
    """A table whose `first` column holds names, their middles left out where they are long."""
    room = WIDTH - sum(column.width + 2 for column in columns)
    width = max(12, min(first.width, room))
    names = short_names([str(name) for name in first.cells], width)
    columns = [replace(first, cells=names, right=False), *columns]
    table = _empty(show_footer=any(column.foot for column in columns), caption=caption)
    for column in columns:
        right = "right" if column.right else "left"
        table.add_column(column.head, footer=column.foot, justify=right, no_wrap=True)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table


# -- plans -----------------------------------------------------------------------------


def plan_table(plan: Plan, kinds: Mapping[str, str] | None = None) -> Table:
    """A line for each layer, in network order: kind, bits, weights, size, score.

    `kinds` are the kinds of the layers by name, which a plan file does not hold.
    """
    layers = list(plan.layers.values())
    scores, head = layer_scores(plan)
    columns = []
    if kinds is not None:
        cells = [kinds.get(name, "") for name in plan.layers]
        columns.append(Column(head="kind", cells=cells, right=False))
    wide = max(2, *(len(str(one.width)) for one in layers if one.width is not None), 0)
    bits = [_bits(layer, wide) for layer in layers]
    columns.append(Column(head="bits", cells=bits, foot=f"{plan.average_bits:.4g}", right=False))
    if any(layer.activation_bits is not None for layer in layers):
        columns.append(Column(head="act.", cells=[_width(one.activation_bits) for one in layers]))
    weights = sum(layer.weights for layer in layers)
    columns += [
        Column(head="weights", cells=[f"{one.weights:,}" for one in layers], foot=f"{weights:,}"),
        Column(
            head="KiB", cells=[_kib(one.size_bits) for one in layers], foot=_kib(plan.size_bits)
        ),
    ]
    if scores:
        cells = [f"{scores[name]:.3g}" if name in scores else "" for name in plan.layers]
        columns.append(Column(head=head, cells=cells))
    first = Column(head="layer", cells=list(plan.layers), foot=_layers(len(layers)))
    return _named(first, columns, "* pinned" if any(one.pinned for one in layers) else None)


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count != 1 else ''}"


def _kib(bits: int | None) -> str:
    return "" if bits is None else f"{bits / 8192:,.1f}"


def layer_scores(plan: Plan) -> tuple[dict[str, float], str]:
    """The proxy's number for each layer, and what it is.

    Of a cost for each bit-width that of the bits chosen, else the importance; none when the
    plan holds no scores.
    """
    found = (plan.predicted or {}).get("scores") or {}
    axis = plan.candidates
    numbers: dict[str, float] = {}
    head = "score"
    for name, layer in plan.layers.items():
        value = found.get(name)
        if isinstance(value, list):
            head = "cost"
            if len(value) == len(axis) and layer.width in axis:
                numbers[name] = float(value[axis.index(layer.width)])
        elif value is not None:
            numbers[name] = float(value)
    return numbers, head


def _width(bits: int | None) -> str:
    return "float" if bits is None else str(bits)


def _bits(layer: PlannedLayer, wide: int) -> Text:
    """`4 ████`: the number, with the group size if it has its own, and a bar of as many blocks."""
    if layer.weight_bits is None:
        return Text("float")
    star = "*" if layer.pinned else " "
    text = Text(f"{layer.width!s:>{wide}}{star}")
    text.append("█" * min(layer.weight_bits, BAR), style=_COLOURS[min(layer.weight_bits, BAR)])
    return text


_COLOURS = {
    **dict.fromkeys((1, 2), "blue"),
    **dict.fromkeys((3, 4), "cyan"),
    **dict.fromkeys((5, 6), "green"),
    **dict.fromkeys((7, 8), "yellow"),
}


def plan_summary(plan: Plan) -> str:
    """What was searched, how good the answer is, what each budget asked and what it counts."""
    how = plan.method.get("recipe") or plan.method.get("proxy")
    parts = [str(plan.model.get("name", "plan"))]
    parts += [str(how)] if how else []
    parts += [f"{len(plan.layers)} layers", f"{plan.average_bits:.4g} bits on average"]
    lines = wrapped(parts)
    solver = plan.solver
    if solver is not None:
        proven = {"optimal": "optimal, proven", "feasible": "feasible, not proven best"}
        parts = [proven[solver.status], f"solver {solver.name}", f"cost {solver.objective:.4g}"]
        parts += [] if solver.bound is None else [f"bound {solver.bound:.4g}"]
        # What is below is rounding of the solver, not a gap.
        parts += [] if solver.gap is None else [f"gap {round(100 * solver.gap, 6):.3g} %"]
        parts += [] if solver.seconds is None else [f"{solver.seconds:.2f} s"]
        lines += wrapped(parts)
    for budget in plan.budgets:
        lines += _budget_lines(budget, plan)
    lines += [f"note: {note}" for note in (solver.notes if solver else ())]
    return "\n".join(lines)


def _budget_lines(budget: PlannedBudget, plan: Plan) -> list[str]:
    unit = budget.unit if budget.unit in ("", *"kMGT") else f" {budget.unit}"
    first = f"{budget.name}: {budget.achieved:.5g} of {budget.asked:.5g}{unit}"
    if budget.unit != SHARE and budget.asked:
        first += f" ({100 * budget.achieved / budget.asked:.1f} %)"
    return [first, f"  counted: {counted(budget, plan)}"]


def counted(budget: PlannedBudget, plan: Plan) -> str:
    """What goes into a budget, in words; of a share what its ends are, on a line before."""
    what = _what_counts(budget, plan)
    if budget.unit != SHARE or budget.low is None or budget.high is None:
        return what
    least, most = (_raw(budget.name, amount) for amount in (budget.low, budget.high))
    return f"the way from {least} (0 %) to {most} (100 %)\n  of {what}"


def _what_counts(budget: PlannedBudget, plan: Plan) -> str:
    layers = len(plan.layers)
    pinned = sum(layer.pinned for layer in plan.layers.values())
    grouped = any(layer.scale_bits for layer in plan.layers.values())
    grouping = "and scales of groups " if grouped else ""
    without = "not scales of channels" if grouped else "not scales"
    if budget.name == "size" and budget.unit == "bit":
        searched = layers - pinned
        return (
            f"weights {grouping}of the {searched} searched layers; {without}, biases, pinned layers"
        )
    everything = f"all {_layers(layers)}" + (f" ({pinned} pinned)" if pinned else "")
    if budget.name == "size":
        return f"weights {grouping}of {everything}; {without}, biases"
    if budget.name == "bops":
        beside = f", and {len(plan.attention)} products of activations" if plan.attention else ""
        return f"MACs × weight bits × activation bits (float: 32), {everything}{beside}"
    if budget.name == "activation-memory":
        return "the peak of live activations, one image; what no layer reads is float"
    if budget.name == "latency":
        return f"by the latency table: {everything}, and the rest of the network"
    return f"MACs × weight bits, {everything}"


def _raw(name: str, amount: int) -> str:
    """A raw amount of a budget (bits, operations, picoseconds) as people read it."""
    if name in ("size", "activation-memory"):
        return f"{_kib(amount)} KiB"
    if name == "latency":
        return f"{amount / PICOSECONDS['ms']:.4g} ms"
    return _count(amount)


# -- accuracy --------------------------------------------------------------------------


SHOWN_PAIRS = 15
SHOWN_CLASSES = 3


def accuracy_table(measured: Mapping[str, Any], names: Sequence[str] | None = None) -> Table:
    """Float, uniform and plans, one below the other; `measured` is what `evaluate` reports.

    `names` stand for the plans, `plan` when there is one. How each differs from float stands
    beside it; plan files of earlier versions do not hold that.
    """
    plans = measured.get("plans") or []
    uniform = measured.get("uniform")
    rows = [("float", {"top1": measured["float"]["top1"], "average_bits": FLOAT_BITS})]
    if uniform:
        rows.append((_uniform_name(uniform), uniform))
    rows += list(zip(_plan_names(plans, names), plans, strict=True))
    records = [record for _, record in rows]
    columns = [
        Column(head="top-1 %", cells=[f"{one['top1']:.2f}" for one in records]),
        Column(head="bits", cells=[f"{one['average_bits']:.4g}" for one in records]),
        Column(head="KiB", cells=[_kib(one.get("size_bits")) for one in records]),
        Column(head="KL, nats", cells=[_divergence(one) for one in records]),
    ]
    caption = f"on {measured['float']['n']:,} images"
    corrections = [one.get("correction", "") for one in records]
    paired = [one.get("versus_float") for one in records]
    if any(paired):
        columns += _paired_columns(paired)
        caption += (
            "; points: top-1 less float's, with 95 % interval; p: McNemar's exact test, adjusted "
            "by Holm"
        )
    if any(paired) and len(set(corrections[1:])) == 1:
        caption += f"; correction: {corrections[1]}"
    else:
        columns.append(Column(head="correction", cells=corrections, right=False))
    return _named(Column(head="network", cells=[name for name, _ in rows]), columns, caption)


def _uniform_name(uniform: Mapping[str, Any]) -> str:
    size = uniform.get("group_size")
    return f"uniform {uniform['bits']}{f'g{size}' if size else ''} bit"


def _plan_names(plans: Sequence[Mapping[str, Any]], names: Sequence[str] | None) -> list[str]:
    if names is None:
        names = ["plan"] if len(plans) == 1 else [str(plan.get("file")) for plan in plans]
    # Files of one folder are told apart by their names alone.
    alike = len({os.path.dirname(name) for name in names}) == 1
    return [os.path.basename(name) if alike else name for name in names]


def _paired_columns(comparisons: Sequence[Mapping[str, Any] | None]) -> list[Column]:
    """Difference, its interval and Holm's p-value; empty where there is no comparison."""
    points, intervals, p_values = [], [], []
    for one in comparisons:
        low, high = one["interval"] if one else (0.0, 0.0)
        points.append(f"{one['difference']:+.2f}" if one else "")
        intervals.append(f"{low:+.2f} {high:+.2f}" if one else "")
        p_values.append(_p_value(one["p_holm"]) if one else "")
    return [
        Column(head="points", cells=points),
        Column(head="95 %", cells=intervals),
        Column(head="p", cells=p_values),
    ]


def _p_value(p: float) -> str:
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def comparison_table(
    measured: Mapping[str, Any], names: Sequence[str] | None = None
) -> Table | None:
    """Plans against uniform and against each other; those of least p where there are many."""
    plans = measured["plans"]
    names = _plan_names(plans, names)
    rows = []
    if measured["uniform"]:
        first = _uniform_name(measured["uniform"])
        for name, plan in zip(names, plans, strict=True):
            one = plan["versus_uniform"]
            rows.append((first, name, {"only_first": one["only_uniform"], **one}))
    pairs = combinations(names, 2)
    rows += [(*pair, one) for pair, one in zip(pairs, measured["comparisons"], strict=True)]
    if not rows:
        return None
    least = sorted(range(len(rows)), key=lambda i: rows[i][2]["p_holm"])[:SHOWN_PAIRS]
    shown = [rows[i] for i in sorted(least)]
    caption = "only: images that it alone gets right; points: second less first, 95 % interval"
    if len(shown) < len(rows):
        caption += f"; {len(rows) - len(shown)} more, less distinct, by --json"
    records = [one for *_, one in shown]
    columns = [
        Column(head="only\nfirst", cells=[str(one["only_first"]) for one in records]),
        Column(
            head="only\nsecond",
            cells=[str(one.get("only_second", one.get("only_plan"))) for one in records],
        ),
        *_paired_columns(records),
    ]
    room = (WIDTH - sum(column.width + 2 for column in columns)) // 2 - 2
    firsts, seconds = ([elided(row[side], room) for row in shown] for side in (0, 1))
    columns.insert(0, Column(head="second", cells=seconds, right=False))
    return _named(Column(head="first", cells=firsts), columns, caption)


def class_table(measured: Mapping[str, Any], names: Sequence[str] | None = None) -> Table | None:
    """Of each plan the classes that lose most and those that gain most against float."""
    classes = measured["classes"]
    shown: list[list[str]] = []
    for index, name in enumerate(_plan_names(measured["plans"], names)):
        changes = [one["plans"][index]["difference"] for one in classes]
        sides = []
        for sign in (-1, 1):
            moved = [place for place, change in enumerate(changes) if sign * change > 0]
            moved.sort(key=lambda place: -abs(changes[place]))
            sides.append([_class_cells(classes[i], changes[i]) for i in moved[:SHOWN_CLASSES]])
        for row, (loses, gains) in enumerate(zip_longest(*sides, fillvalue=("", "", ""))):
            shown.append(["" if row else name, *loses, *gains])
    if not shown:
        return None
    least, most = (end(one["n"] for one in classes) for end in (min, max))
    images = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    heads = ("loses most", "float %", "points", "gains most", "float %", "points")
    columns = [
        Column(head=head, cells=[row[1 + at] for row in shown], right=at % 3 > 0)
        for at, head in enumerate(heads)
    ]
    caption = f"classes against float; {images} images a class"
    return _named(Column(head="network", cells=[row[0] for row in shown]), columns, caption)


def _class_cells(one: Mapping[str, Any], change: float) -> tuple[str, str, str]:
    name = str(one["class"]) if one["name"] is None else one["name"]
    return elided(name, 16), f"{one['float']:.1f}", f"{change:+.1f}"


def speed_line(measured: Mapping[str, Any]) -> str | None:
    """How fast the networks ran, and what that is not."""
    speeds = measured["images_per_second"]
    if speeds is None:
        return None
    uniform = [] if speeds["uniform"] is None else [speeds["uniform"]]
    least, most = (f"{end([*uniform, *speeds['plans']]):,.0f}" for end in (min, max))
    quantized = least if least == most else f"{least} to {most}"
    line = (
        f"images per second: float {speeds['float']:,.0f}, quantized {quantized}; the speed of "
        "this simulation on this machine, not of a runtime"
    )
    return textwrap.fill(line, WIDTH)


def _divergence(record: Mapping[str, Any]) -> str:
    kl = record.get("kl")
    return "" if kl is None else f"{kl:.4g}"


def measured_table(table: "MeasuredTable") -> Table:
    """How the plans of a table are spread."""
    method, average = table.method, table.average_bits
    rows = {
        "top-1 %": table.column("top1"),
        "loss, nats": table.column("loss"),
        "KL, nats": table.column("kl"),
        "KL rescaled": table.column("rescaled"),
        "average bits": average,
    }
    shares = (0, 25, 50, 75, 100)
    heads = ("least", "25 %", "median", "75 %", "most")
    spread = [np.nanpercentile(values, shares) for values in rows.values()]
    columns = [
        Column(head=head, cells=[f"{values[i]:.4g}" for values in spread])
        for i, head in enumerate(heads)
    ]
    beside = method.get("activation_bits")
    caption = (
        f"{len(table.plans):,} plans of {table.name} on {table.float_.images:,} images; float "
        f"{table.float_.top1:.2f} %; correction {method.get('correction')}, activations "
        f"{'float' if beside is None else f'{beside} bit'}"
    )
    return _named(Column(head="measured", cells=list(rows)), columns, caption)


def ranking_table(result: Mapping[str, Any]) -> Table:
    """Proxies, the best first: rank correlation with accuracy, and what their choice loses."""
    rows = result["rows"]

    def cells(name: str) -> list[str]:
        return [_coefficient(row["correlations"][name]["value"]) for row in rows]

    spearman = [row["correlations"]["spearman"] for row in rows]
    intervals = [
        "" if one["low"] is None else f"{one['low']:.2f} {one['high']:.2f}" for one in spearman
    ]
    columns = [
        Column(head="Spearman", cells=cells("spearman")),
        Column(head="95 %", cells=intervals),
        Column(head="Kendall", cells=cells("kendall")),
        Column(head="@20 %", cells=cells("spearman@20")),
        Column(head="@50 %", cells=cells("spearman@50")),
        Column(head="| size", cells=cells("spearman given size")),
        Column(head="regret", cells=[f"{row['mean_regret']:.2f}" for row in rows]),
    ]
    table = result["table"]
    lines = [
        f"{table['plans']:,} plans of {table['model'].get('name', 'network')}, correction "
        f"{table['method'].get('correction')}; @: among the plans that it likes best; | size: "
        "given the size; regret: top-1 lost by its choice within a size; * trivial"
    ]
    lines += [f"left out {name}: {why}" for name, why in result["left_out"].items()]
    names = [row["name"] + (" *" if row["trivial"] else "") for row in rows]
    return _named(Column(head="cost", cells=names), columns, "\n".join(lines))


def _coefficient(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def candidates_table(report: Mapping[str, Any]) -> Table:
    """The plans that `auto` measured, predicted next to measured; the best first."""
    records = report["candidates"]
    columns = [
        Column(head="predicted KL", cells=[_nats(one["predicted_kl"]) for one in records]),
        Column(head="measured", cells=[_nats(one["kl_fitted"]) for one in records]),
        Column(head="held back", cells=[_nats(one["kl"]) for one in records]),
        Column(head="rescaled", cells=[_nats(one["rescaled"]) for one in records]),
        Column(head="gap", cells=[f"{round(100 * one['gap'], 6):.3g} %" for one in records]),
    ]
    refined = report.get("refined")
    lines = [
        f"KL to float, nats: on the {report['fitted_images']:,} images of the scores, and on "
        f"{report['held_back_images']:,} held back; ranked by the latter, wrecked plans by what is "
        "left of it up to the scale of each image's logits (rescaled)",
        *_corrections(report),
    ]
    if refined:
        lines.append(_refined(refined, report))
    lines += [f"note: {note}" for note in report.get("notes", ())]
    names = Column(head="candidate", cells=[one["proxy"] for one in records])
    return _named(names, columns, "\n".join(lines))


def refinement(report: Mapping[str, Any]) -> str:
    """What refining a single proxy's plan changed."""
    return "\n".join([_refined(report, report), *_corrections(report)])


def _refined(refined: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    before = refined["before"]
    start = f" the plan of {refined['from']}" if "from" in refined else ""
    return (
        f"refined{start}: {refined['changes']} layers changed in {refined['rounds']} "
        f"round{'s' * (refined['rounds'] != 1)} ({refined['tried']} plans tried), held back "
        f"rescaled {_nats(before['rescaled'])} to {_nats(after['rescaled'])}, "
        f"KL {_nats(before['kl'])} to {_nats(after['kl'])}"
    )


def _corrections(report: Mapping[str, Any]) -> list[str]:
    """Held-back divergence of a plan under each correction, and which is used."""
    found = report["corrections"]
    if len(found) < 2:
        return []
    each = ", ".join(f"{name} {_nats(one['rescaled'])}" for name, one in found.items())
    return [f"correction: {report['correction']} (of one plan: {each})"]


def _nats(kl: float | None) -> str:
    return "" if kl is None else f"{kl:.4g}"


# -- fronts ----------------------------------------------------------------------------


def front_table(front: "Front") -> Table:
    """A line for each point: the budgets asked, what the plan takes, its cost, its accuracy."""
    points = front.points
    unit = f", {front.budget.unit}" if front.budget.unit else ""
    columns = [
        Column(head=f"asked{unit}", cells=[_asked(one) for one in points]),
        Column(head="achieved", cells=[f"{one.achieved:.5g}" for one in points]),
        Column(head="bits", cells=[f"{one.average_bits:.4g}" for one in points]),
        Column(head="KiB", cells=[_kib(one.size_bits) for one in points]),
        Column(head="predicted", cells=[_starred(one.predicted, one.dominated) for one in points]),
        Column(head="gap %", cells=[f"{round(100 * (one.gap or 0), 6):.2g}" for one in points]),
    ]
    found = [one.measured for one in points if one.measured is not None]
    caption = []
    if any(one.dominated for one in points) or any(
        one.top1_dominated or one.kl_dominated for one in found
    ):
        caption.append("* dominated: another point takes no more and is no worse")
    if found and front.measured is not None:
        columns += [
            Column(
                head="top-1 %",
                cells=[_starred(one.top1, one.top1_dominated, ".2f") for one in found],
            ),
            Column(head="KL, nats", cells=[_starred(one.kl, one.kl_dominated) for one in found]),
        ]
        measured = front.measured["float"]
        caption.append(f"float: {measured['top1']:.2f} % on {measured['n']:,} images")
    if front.budget.name == "size" and front.budget.unit == "bit":
        del columns[2]  # the same again
    numbers = [str(number) for number in range(1, len(points) + 1)]
    return _named(Column(head="point", cells=numbers), columns, "\n".join(caption) or None)


def _asked(point: "FrontPoint") -> str:
    first, last = point.asked[0], point.asked[-1]
    return f"{first:.4g}" if first == last else f"{first:.4g} to {last:.4g}"


def _starred(value: float, dominated: bool, form: str = ".4g") -> str:
    return f"{value:{form}}{'*' if dominated else ' '}"


def front_summary(front: "Front") -> str:
    """Whose scores, how good the answers are, what the budgets count, what was left out."""
    points, plan = front.points, front.plan(0)
    parts = [str(front.model.get("name", "front")), str(front.method.get("proxy", "scores"))]
    parts += [f"{len(front.layers)} layers", f"{front.budget.points} budgets"]
    lines = wrapped([*parts, f"{len(points)} plans"])
    proven = sum(one.status == "optimal" for one in points)
    seconds = sum(one.seconds or 0.0 for one in points)
    share = "all" if proven == len(points) else f"{proven} of {len(points)}"
    lines += wrapped([f"{share} optimal, proven", f"solver {points[0].solver}", f"{seconds:.2f} s"])
    changing, *others = plan.budgets
    lines.append(f"{changing.name}: {front.budget.first:g} to {front.budget.last:g}")
    lines[-1] += f" {changing.unit}".rstrip()
    lines.append(f"  counted: {counted(changing, plan)}")
    for other in others:
        lines.append(f"{other.name}: at most {other.asked:.5g} {other.unit}".rstrip())
        lines.append(f"  counted: {counted(other, plan)}")
    notes = dict.fromkeys(note for one in points for note in one.notes)
    return "\n".join([*lines, *(f"note: {note}" for note in (*front.notes, *notes))])


# -- models and shelves ----------------------------------------------------------------


def network_table(network: "Network") -> Table:
    """A line for each layer: kind, weights, MACs, output shape, group; totals below."""
    from proxyq.model.live import float_peak
    from proxyq.model.schedule import schedule
    from proxyq.search.allocate.together import fused

    layers = network.layers
    weights, macs = (sum(getattr(layer, what) for layer in layers) for what in ("weights", "macs"))
    shapes = ["×".join(map(str, layer.output_shape)) for layer in layers]
    groups = [elided(layer.group or "", 22) for layer in layers]
    columns = [
        Column(head="kind", cells=[layer.kind for layer in layers], right=False),
        Column(head="weights", cells=[f"{one.weights:,}" for one in layers], foot=f"{weights:,}"),
        Column(head="MACs", cells=[_count(layer.macs) for layer in layers], foot=_count(macs)),
        Column(head="output", cells=shapes),
        Column(head="group", cells=groups, right=False),
    ]
    siblings = {name: own[0] for own in fused(layers) for name in own}
    if siblings:
        cells = [elided(siblings.get(layer.name, ""), 22) for layer in layers]
        columns.append(Column(head="fused", cells=cells, right=False))
    names = [layer.name for layer in layers]
    peak = float_peak(schedule(network))
    where = "the input" if peak.layer is None else peak.layer
    caption = f"float activations: at most {_kib(peak.float_bits)} KiB at once, in {where}"
    return _named(Column(head="layer", cells=names, foot=_layers(len(layers))), columns, caption)


def kept_table(network: "Network") -> Table:
    """What stays float in any plan, and why: a line for each reason."""
    from proxyq.model.explain import kept_float, looked_up_float, summary

    found = summary(kept_float(network))
    columns = [
        Column(head="tensors", cells=[str(count) for count, _ in found.values()]),
        Column(head="numbers", cells=[f"{numbers:,}" for _, numbers in found.values()]),
    ]
    products = len(network.attention)
    captions = (
        [f"{products} products of two activations: --attention-bits rounds them"]
        if products
        else []
    )
    if not network.model.embeddings and (tables := looked_up_float(network)):
        one = len(tables) == 1
        captions.append(
            f"{len(tables)} table{' is' if one else 's are'} looked up in floating point: "
            f"--embeddings gives {'it' if one else 'them'} bits"
        )
    caption = "\n".join(captions) or None
    return _named(Column(head="stays float", cells=list(found), right=False), columns, caption)


def operators_table(operators: Mapping[str, tuple[int, str]]) -> Table:
    """A line for each operator that the bridge lacks."""
    columns = [
        Column(head="uses", cells=[str(uses) for uses, _ in operators.values()]),
        Column(head="first in", cells=[path for _, path in operators.values()], right=False),
    ]
    return _named(Column(head="missing operator", cells=list(operators), right=False), columns)


def _count(number: int) -> str:
    """`1.81 G`, `231 k`."""
    for power, sign in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= power:
            return f"{number / power:.3g} {sign}"
    return str(number)


def proxies_table(proxies: Iterable["Proxy"]) -> Table:
    """A few lines for each proxy: cost class, passes, needs, what it measures."""
    proxies = list(proxies)
    directions = {proxy.direction for proxy in proxies}
    # What holds for all is said once.
    alike = directions.pop() if len(directions) == 1 else None
    table = _empty(caption=None if alike is None else f"of all: {alike}")
    table.add_column("proxy", no_wrap=True)
    table.add_column("cost", no_wrap=True)
    table.add_column("passes", max_width=15)
    table.add_column("needs", max_width=16)
    if alike is None:
        table.add_column("direction", max_width=12)
    table.add_column("what it measures", ratio=1)
    for proxy in proxies:
        cells = [proxy.name, proxy.cost_class, proxy.passes, ", ".join(proxy.needs)]
        cells += [proxy.direction] if alike is None else []
        table.add_row(*cells, proxy.summary)
    return table


def proxy_text(proxy: "Proxy") -> str:
    """All there is to say of a proxy, and what its module says of itself."""
    from proxyq.proxies import COST_CLASSES, COSTS

    per_bit = proxy.shape == "layers bits"
    gives = "a cost for each layer and bit-width" if per_bit else "an importance for each layer"
    facts = {
        "gives": f"{gives}; {proxy.direction}",
        "activations": "costs of rounding what layers read, too" if proxy.activations else "",
        "cost": "" if per_bit else f"{proxy.cost}: {COSTS.get(proxy.cost, 'no such mapping')}",
        "needs": ", ".join(proxy.needs),
        "passes": proxy.passes,
        "class": f"{proxy.cost_class}: {COST_CLASSES.get(proxy.cost_class, 'no such class')}",
        "options": ", ".join(f"{key}={_option(value)}" for key, value in proxy.options.items()),
        "fixed": ", ".join(f"{key}={_option(value)}" for key, value in proxy.fixed.items()),
        "reference": proxy.reference,
    }
    lines = [proxy.name, *textwrap.wrap(proxy.summary, WIDTH), ""]
    for name, text in facts.items():
        if text:
            lines += textwrap.wrap(
                text,
                WIDTH,
                initial_indent=f"{name:<12}",
                subsequent_indent=" " * 12,
                break_on_hyphens=False,
            )
    return "\n".join([*lines, "", *map(_folded, proxy_docs(proxy).split("\n\n"))])


def proxy_docs(proxy: "Proxy") -> str:
    """What the module of a proxy says of itself."""
    module = inspect.getmodule(inspect.unwrap(proxy.kernel))
    return inspect.cleandoc(getattr(module, "__doc__", None) or "")


def _folded(block: str) -> str:
    """A paragraph at the width of the terminal; formulas and lists as they are."""
    if any(line.startswith((" ", "- ")) for line in block.splitlines()):
        return f"{block}\n"
    return textwrap.fill(block, WIDTH, break_on_hyphens=False) + "\n"


def _option(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- scores ----------------------------------------------------------------------------


def scores_tables(file: "ScoreFile") -> list[Table | str]:
    """A proxy's numbers and ranks; of several proxies the ranks, in as many tables as it takes.

    Last what the ranks mean.
    """
    names = list(file.layers)
    ranks = {name: [str(rank) for rank in _ranks(file, name)] for name in file.proxies}
    first = Column(head="layer", cells=names)
    caption = "rank 1: the most sensitive layer"
    if any(one.shape == "layers bits" for one in file.scores):
        caption += f"; of costs at {min(file.bits)} bits"
    if len(file.scores) > 1:
        columns = [
            Column(head=name.replace("-", "-\n"), cells=ranks[name]) for name in file.proxies
        ]
        room = WIDTH - max(12, min(28, first.width)) - 2
        return [*(_named(first, some) for some in _rows(columns, room)), caption]
    scores = file.of()
    table = scores.values.reshape(len(names), -1)
    heads = ["score"] if scores.shape == "layers" else [f"{bits} bit" for bits in scores.bits]
    columns = [
        Column(head=head, cells=[f"{value:.4g}" for value in table[:, column]])
        for column, head in enumerate(heads)
    ]
    columns.append(Column(head="rank", cells=ranks[scores.proxy]))
    return [_named(first, columns), f"{scores.proxy}; {caption}"]


def _ranks(file: "ScoreFile", proxy: str) -> list[int]:
    """1 for the most sensitive layer; equal scores have equal ranks."""
    scores = file.of(proxy)
    column = scores.bits.index(min(scores.bits)) if scores.shape == "layers bits" else 0
    values = scores.values.reshape(len(scores.layers), -1)[:, column]
    return [1 + int(np.sum(values > value)) for value in values]


def _rows(columns: Sequence[Column], room: int) -> list[list[Column]]:
    """Columns side by side as long as they fit."""
    rows: list[list[Column]] = [[]]
    for column in columns:
        if rows[-1] and sum(one.width + 2 for one in (*rows[-1], column)) > room:
            rows.append([])
        rows[-1].append(column)
    return rows


def recipes_table(recipes: Iterable["Recipe"]) -> Table:
    """A line or two for each recipe: title and reference."""
    table = _empty()
    table.add_column("recipe", no_wrap=True)
    table.add_column("proxy", no_wrap=True)
    table.add_column("bits", no_wrap=True)
    table.add_column("method", ratio=1)
    for recipe in recipes:
        bits = ",".join(map(str, recipe.bits))
        table.add_row(recipe.name, recipe.proxy, bits, recipe.title or recipe.reference)
    return table


def evolution_table(result: Mapping[str, Any]) -> list[Table | str]:
    """The hall of fame: each formula's length and rank correlations; the one written has a star."""
    entries, back, held = result["entries"], result["validation_share"], result["holdouts"]

    size = result["comparison"]
    shown = entries if size is None else [*entries, size]

    def column(head: str, key: str) -> Column:
        means = [
            None if None in entry[key] else sum(entry[key]) / len(entry[key]) for entry in shown
        ]
        return Column(head=head, cells=[_coefficient(mean) for mean in means])

    columns = [
        Column(head="nodes", cells=[str(entry["size"]) for entry in shown]),
        Column(head="fitness", cells=[_coefficient(entry["fitness"]) for entry in shown]),
    ]
    if back:
        columns.append(column("held back", "validation_by_table"))
    if held:
        columns.append(column("held out", "holdout_by_table"))
    tables = ", ".join(str(table["model"].get("name")) for table in result["tables"])
    lines = [
        f"{result['logbook'][-1]['evaluations']:,} formulas on {tables}; fitness: mean rank "
        "correlation with accuracy"
        + (f"; held back: on {100 * back:.0f} % of each table's plans" if back else "")
        + (f"; held out: on {', '.join(str(t['model'].get('name')) for t in held)}" if held else "")
        + "; * written"
    ]
    width = WIDTH - 4 - sum(one.width + 2 for one in columns)
    names = [
        elided(entry["formula"], width - 2) + (" *" if place == result["chosen"] else "")
        for place, entry in enumerate(entries)
    ]
    if size is not None:
        names.append("the size alone")
    table = _named(Column(head="formula", cells=names, right=False), columns, "\n".join(lines))
    return [table, entries[result["chosen"]]["formula"]]


# -- the installation ------------------------------------------------------------------


def doctor_blocks(record: Mapping[str, Any]) -> list[Table | str]:
    """What `doctor` found (its JSON object): packages, the machine, and what was tried."""
    table = _empty()
    table.add_column("package", no_wrap=True)
    table.add_column("version", no_wrap=True)
    table.add_column("", ratio=1)
    table.add_row("proxyq", record["proxyq"], f"Python {record['python']}")
    for one in record["packages"]:
        if one["problem"] is not None:
            state = "BROKEN"
        elif one["note"] is not None:
            state = "see below"
        else:
            state = "" if one["version"] is not None else f"missing: {one['install']}"
        table.add_row(one["name"], one["version"] or "-", state)

    lines = [f"platform: {record['platform']}"]
    for device in record["devices"]:
        size = _gib(device["memory_bytes"])
        kind = "" if device["kind"] == device["platform"] else f", {device['kind']}"
        lines.append(f"device: {device['platform']}{kind}{size and f', {size}'}")
    memory = record["memory"]
    if memory["total"] is not None:
        free = _gib(memory["available"])
        lines.append(f"memory: {_gib(memory['total'])}{free and f', {free} available'}")
    cache = record["cache"]
    if cache is None:
        lines.append("cache: none is used")
    else:
        how = "writable" if cache["writable"] else "NOT writable: commands run without it"
        lines.append(
            f"cache: {cache['folder']}, {cache['bytes'] / 2**20:,.1f} MiB in {cache['files']:,} "
            f"files, {how}"
        )
    return [table, "\n".join(lines), "\n".join(map(_tried, record["checks"]))]


def _tried(check: Mapping[str, Any]) -> str:
    if not check["ok"]:
        return f"{check['name']}: FAILS"
    facts = ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}"
        if isinstance(value, float) and name == "parity_error"
        else f"{name.replace('_', ' ')} {value}"
        for name, value in check.items()
        if name not in ("name", "ok", "seconds")
    )
    return "\n".join(wrapped([f"{check['name']}: works", facts, f"{check['seconds']:.1f} s"]))


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.1f} GiB"
