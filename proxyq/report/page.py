"""One HTML page about plans: all in one file, no script, nothing fetched.

`page` makes the text from records that are checked already. A section is there when what it
shows is. The same records give the same bytes.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import PurePath
from typing import Any, TypeGuard

import numpy as np

from proxyq.errors import ProxyqError
from proxyq.report import charts
from proxyq.report.charts import LayerScores, Placed, Shown, bits_class, width_text
from proxyq.report.markup import Markup, escaped, joined, percent, tag
from proxyq.report.svg import SHAPES, mark, number
from proxyq.report.tables import counted
from proxyq.search.allocate.budget import SHARE
from proxyq.search.allocate.plan import FLOAT_BITS, Plan
from proxyq.search.evaluation_file import (
    ClassMeasured,
    ClassPart,
    Difference,
    EvaluationFile,
    NetworkMeasured,
)
from proxyq.search.front_file import Front
from proxyq.search.scores_file import ScoreFile
from proxyq.version import __version__

PAIRS = 8
"""Pairs of layers that are named below a coupling map."""
_MEASURES = {
    "predicted": "predicted_kl",
    "measured": "kl_fitted",
    "held back": "kl",
    "rescaled": "rescaled",
}
CLASSES = 20
"""Classes that are shown; of more those whose accuracy changes most."""
_SIZES = {"KiB": 2**13, "MiB": 2**23, "GiB": 2**33, "KB": 8e3, "MB": 8e6, "GB": 8e9}


def page(
    plans: Sequence[Plan],
    *,
    names: Sequence[str],
    scores: ScoreFile | None = None,
    front: Front | None = None,
    evaluation: EvaluationFile | None = None,
    title: str | None = None,
) -> str:
    """The page as text. `names` are those of the plans, usually of their files.

    **Raises** `ProxyqError` where what is given is of different models, by the names and weights
    of their layers, or where the evaluation measured other plans.
    """
    shown = _shown(plans, names)
    _check_one_model(shown, scores, front)
    results = _results(shown, evaluation)
    measured = _measured(shown, names, evaluation, results)
    heading = title or " · ".join(dict.fromkeys(_model_name(one.plan) for one in shown))
    sections = [
        ("summary", "Summary", _summary(shown, measured, results)),
        ("budgets", "Budgets", _budgets(shown)),
        ("bits", "Bits per layer", _bits(shown)),
        ("scores", "Score per layer", _scores(shown, scores)),
        ("coupling", "Coupling map", _coupling(shown, scores)),
        ("front", "Pareto front", _front(front, shown, measured)),
        ("accuracy", "Accuracy", _accuracy(shown, measured, evaluation, results)),
        ("candidates", "Plans that were tried", _candidates(shown)),
        ("groups", "Groups", _groups(shown)),
        ("plan", "The plan" if len(shown) == 1 else "The plans", _layers(shown, scores)),
        ("provenance", "Provenance", _provenance(shown, scores, front)),
    ]
    there = [(key, head, body) for key, head, body in sections if body is not None]
    return _document(heading, _facts(shown), there)


def _document(heading: str, facts: str, sections: Sequence[tuple[str, str, Markup]]) -> str:
    style = (files("proxyq.report") / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    links = [tag("li", tag("a", head, href=f"#{key}")) for key, head, _ in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", heading),
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", heading),
            tag("p", facts, class_="soft"),
            tag("nav", tag("ul", *links), aria_label="Sections"),
        ),
        tag(
            "main",
            *(
                tag("section", tag("h2", head, id=f"{key}-head"), body, id=key,
                    aria_labelledby=f"{key}-head")
                for key, head, body in sections
            ),
        ),
        tag("footer", tag("p", f"Made by proxyq {__version__}.")),
    )  # fmt: skip
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


# -- what belongs together -------------------------------------------------------------


def _shown(plans: Sequence[Plan], names: Sequence[str]) -> list[Shown]:
    """Plans by the last part of their files' names, or the whole where that is not enough."""
    short = [PurePath(name).name for name in names]
    if len(set(short)) < len(short):
        short = list(names)
    keys = [_letter(index) if len(plans) > 1 else "" for index in range(len(plans))]
    return [
        Shown(plan=plan, name=name, key=key)
        for plan, name, key in zip(plans, short, keys, strict=True)
    ]


def _letter(index: int) -> str:
    return chr(65 + index) if index < 26 else str(index + 1)


def _check_one_model(shown: Sequence[Shown], scores: ScoreFile | None, front: Front | None) -> None:
    first = shown[0]
    others: list[tuple[str, Mapping[str, Any]]] = [
        (f"the plan {one.name!r}", one.plan.layers) for one in shown[1:]
    ]
    others += [] if scores is None else [("the scores", scores.layers)]
    others += [] if front is None else [("the front", front.layers)]
    for what, layers in others:
        for name in [*first.plan.layers, *layers]:
            inside = [name in found for found in (first.plan.layers, layers)]
            if not all(inside):
                has, lacks = (what, "the plan") if inside[1] else ("the plan", what)
                if lacks == "the plan" or has == "the plan":
                    named = f"the plan {first.name!r}"
                    has, lacks = (named if one == "the plan" else one for one in (has, lacks))
                raise ProxyqError(
                    f"{what} and the plan {first.name!r} are of different models: {has} has a "
                    f"layer {name!r} and {lacks} has none; a report takes files of one model."
                )
            mine, its = first.plan.layers[name].weights, layers[name].weights
            if mine != its:
                raise ProxyqError(
                    f"{what} and the plan {first.name!r} are of different models: the layer "
                    f"{name!r} has {its:,} weights in the one and {mine:,} in the other; a report "
                    "takes files of one model."
                )


def _results(
    shown: Sequence[Shown], evaluation: EvaluationFile | None
) -> list[EvaluationFile | None]:
    """For each plan where its accuracy stands: the evaluation of all, else what it holds."""
    if evaluation is not None:
        return [evaluation] * len(shown)
    return [
        None
        if one.plan.measured is None
        else EvaluationFile.from_json(one.plan.measured, f"accuracy in the plan {one.name!r}")
        for one in shown
    ]


def _measured(
    shown: Sequence[Shown],
    names: Sequence[str],
    evaluation: EvaluationFile | None,
    results: Sequence[EvaluationFile | None],
) -> list[NetworkMeasured | None]:
    """Each plan's accuracy, where it was measured."""
    if evaluation is None:
        return [None if one is None else one.plans[0] for one in results]
    matched: list[NetworkMeasured | None] = []
    for index, (one, name) in enumerate(zip(shown, names, strict=True)):
        ways = (
            lambda file, name=name: file == name,
            lambda file, name=name: PurePath(file).name == PurePath(name).name,
            lambda file, index=index: file == f"plan {index + 1}",
        )
        alike = ([row for row in evaluation.plans if way(row.file)] for way in ways)
        match = next((rows[0] for rows in alike if len(rows) == 1), None)
        if match is not None and match.size_bits != one.plan.size_bits:
            raise ProxyqError(
                f"the evaluation is of another plan than {one.name!r}: it measured one of "
                f"{match.size_bits:,} bits by that name, and this one has "
                f"{one.plan.size_bits:,}; run `proxyq evaluate` again."
            )
        matched.append(match)
    return matched


def _model_name(plan: Plan) -> str:
    return str(plan.model.get("name") or "plan")


def _method(plan: Plan) -> str:
    return str(plan.method.get("recipe") or plan.method.get("proxy") or "")


def _facts(shown: Sequence[Shown]) -> str:
    plan = shown[0].plan
    weights = sum(one.weights for one in plan.layers.values())
    macs = sum(one.macs for one in plan.layers.values())
    facts = [f"{len(shown)} plans"] if len(shown) > 1 else []
    facts += [f"{len(plan.layers)} layer{'s' * (len(plan.layers) != 1)}", f"{weights:,} weights"]
    facts += [f"{macs:,} MACs"] if macs else []
    return " · ".join([*facts, f"{_size(weights * FLOAT_BITS)} in float32"])


def _size(bits: float) -> str:
    """Bits as KiB, or MiB where these are many."""
    kib = bits / 2**13
    return f"{kib:,.1f} KiB" if kib < 1024 else f"{kib / 1024:,.2f} MiB"


# -- pieces ----------------------------------------------------------------------------


def _how(text: str) -> Markup:
    return tag("p", text, class_="how")


def _badge(shown: Shown) -> Markup | None:
    return tag("span", shown.key, class_="badge") if shown.key else None


def _name(text: str) -> Markup:
    """A name, which may be broken after its dots and strokes where it is long."""
    parts = re.split(r"(?<=[._/])", text)
    return tag("span", joined(parts, tag("wbr")), class_="name")


def _titled(shown: Shown) -> Markup:
    return joined([_badge(shown), _name(shown.name)])


def _starred(text: str, star: bool) -> Markup:
    """A number that keeps its place in the column with a star and without."""
    return joined([text, tag("span", "*" if star else "", class_="star")])


def _chip(bits: int | None) -> Markup:
    return tag("span", width_text(bits), class_=f"chip {bits_class(bits)}")


Cell = Any
"""Text or `Markup`; a tuple of one such is a number, and stands to the right."""


def _table(
    heads: Sequence[Cell],
    rows: Iterable[Sequence[Cell]],
    *,
    foot: Sequence[Cell] | None = None,
    caption: str | None = None,
    label: str,
) -> Markup:
    """A table; the first cell of each row is its head."""

    def cell(kind: str, value: Cell, **attributes: Any) -> Markup:
        if isinstance(value, tuple):
            return tag(kind, value[0], class_="n", **attributes)
        return tag(kind, value, **attributes)

    def line(row: Sequence[Cell]) -> Markup:
        return tag("tr", cell("th", row[0], scope="row"), *(cell("td", one) for one in row[1:]))

    parts = [
        None if caption is None else tag("caption", caption),
        tag("thead", tag("tr", *(cell("th", head, scope="col") for head in heads))),
        tag("tbody", *map(line, rows)),
        None if foot is None else tag("tfoot", line(foot)),
    ]
    inner = tag("table", *parts, aria_label=None if caption else label)
    return tag("div", inner, class_="table", tabindex=0, role="group", aria_label=label)


def _definitions(facts: Mapping[str, Any], class_: str | None = None) -> Markup:
    pairs = (part for key, value in facts.items() for part in (tag("dt", key), tag("dd", value)))
    return tag("dl", *pairs, class_=class_)


def _swatches(widths: Iterable[int | None]) -> list[Markup]:
    found = []
    plain = {None if one is None else int(one) for one in widths}  # groups have no colour
    for width in sorted(plain, key=lambda one: FLOAT_BITS if one is None else one):
        box = tag("rect", width=11, height=11, rx=2, class_=bits_class(width))
        words = "float" if width is None else f"{width} bit"
        found.append(tag("li", _tiny(box), words))
    return found


def _tiny(*children: Markup) -> Markup:
    return tag("svg", *children, width=12, height=12, class_="tiny", aria_hidden="true")


# -- sections --------------------------------------------------------------------------


def _summary(
    shown: Sequence[Shown],
    measured: Sequence[NetworkMeasured | None],
    results: Sequence[EvaluationFile | None],
) -> Markup:
    cards = [
        _card(one, result, None if where is None else where.float_.top1)
        for one, result, where in zip(shown, measured, results, strict=True)
    ]
    how = (
        "Bits on average count the weights of layers that are not pinned. The size counts all "
        "weights, and scales where groups of weights have their own, but no biases. The gap is how "
        "far the cost can at most lie above the least possible one."
    )
    digests = {str(one.plan.model.get("digest")) for one in shown} - {"None"}
    note = None
    if len(digests) > 1:
        note = tag("p", "The plans were made for different weights of this network.", class_="note")
    return joined([_how(how), note, tag("div", *cards, class_="plans")])


def _card(shown: Shown, measured: NetworkMeasured | None, float_top1: float | None) -> Markup:
    plan = shown.plan
    weights = sum(one.weights for one in plan.layers.values())
    smaller = weights * FLOAT_BITS / plan.size_bits if plan.size_bits else 1.0
    figures = [
        (f"{plan.average_bits:.4g}", "bits on average"),
        (_size(plan.size_bits), f"{smaller:.3g} times smaller than float32"),
    ]
    if measured is not None:
        beside = "top-1" if float_top1 is None else f"top-1, float {float_top1:.2f} %"
        figures.append((f"{measured.top1:.2f} %", beside))
    facts: dict[str, Any] = {}
    if _method(plan):
        facts["method"] = _method(plan)
    beside = {one.activation_bits for one in plan.layers.values()}
    facts["activations"] = " or ".join(
        "float" if one is None else f"{one} bit" for one in sorted(beside, key=lambda b: b or 99)
    )
    if plan.attention:
        widths = sorted({one.bits for one in plan.attention.values() if one.bits is not None})
        facts["attention"] = " or ".join(f"{bits} bit" for bits in widths) or "float"
    solver = plan.solver
    if solver is not None:
        proven = {"optimal": "optimal, proven", "feasible": "feasible, not proven best"}
        facts["solver"] = f"{proven[solver.status]} ({solver.name})"
        facts["predicted cost"] = number(solver.objective)
        if solver.bound is not None:
            facts["bound"] = number(solver.bound)
        if solver.gap is not None:
            facts["gap"] = f"{number(round(100 * solver.gap, 6), '.3g')} %"
    if measured is not None and measured.kl is not None:
        facts["measured KL"] = f"{number(measured.kl)} nats, correction {measured.correction}"
    auto = _auto(plan)
    if auto is not None and _is_number(auto.get("kl")):
        facts["held-back KL"] = f"{number(auto['kl'])} nats"
    return tag(
        "article",
        tag("h3", _titled(shown)),
        tag(
            "div",
            *(tag("div", tag("b", big), tag("span", small)) for big, small in figures),
            class_="figures",
        ),
        _definitions(facts),
    )


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _budgets(shown: Sequence[Shown]) -> Markup | None:
    rows = []
    for one in shown:
        for budget in one.plan.budgets:
            unit = f" {budget.unit}" if budget.unit else ""
            share = budget.achieved / budget.asked if budget.asked > 0 else None
            over = budget.achieved > budget.asked
            used = "" if share is None or budget.unit == SHARE else f"{100 * share:.1f} %"
            row: list[Cell] = [_titled(one)] if len(shown) > 1 else []
            row += [budget.name, (f"{number(budget.asked, '.5g')}{unit}",)]
            row += [(f"{number(budget.achieved, '.5g')}{unit}",)]
            row += [(tag("span", used, class_="flag") if over else used,), _use(share, over)]
            rows.append([*row, tag("div", counted(budget, one.plan), class_="words")])
    if not rows:
        return None
    heads = [*(["plan"] if len(shown) > 1 else []), "budget", ("asked",), ("taken",), ("",)]
    how = "A budget is a hard limit: the plan takes at most what was asked for."
    return joined([_how(how), _table([*heads, "use", "counted"], rows, label="Budgets")])


def _use(share: float | None, over: bool) -> Markup:
    if share is None:
        return joined([])
    bar = tag(
        "rect", width=percent(min(share, 1.0)), height=8, rx=2, class_="over" if over else "used"
    )
    track = tag("rect", width="100%", height=8, rx=2, class_="track")
    svg = tag(
        "svg",
        track,
        bar,
        width="100%",
        height=8,
        role="img",
        aria_label=f"{100 * share:.0f} % used",
    )
    return tag("div", svg, class_="use")


def _bits(shown: Sequence[Shown]) -> Markup:
    layers = shown[0].plan.layers
    widths = [bits for one in shown for bits in one.plan.bits().values()]
    beside = {layer.activation_bits for one in shown for layer in one.plan.layers.values()}
    highest = max([4, *(width for width in widths if width)])
    varied = any(
        len({layer.activation_bits for layer in one.plan.layers.values()}) > 1 for one in shown
    )
    if varied:
        highest = max(highest, *(width for width in beside if width))
    how = (
        "Layers stand in network order; a bar is as high as the layer's bits, the dashed line is "
        "the average. The bar above divides all weights by their bits."
    )
    keys = _swatches(widths)
    if varied:
        line = tag("line", x1=0, x2=12, y1=6, y2=6, class_="act")
        keys.append(tag("li", _tiny(line), "bits of the layer's input"))
    if any(layer.pinned for one in shown for layer in one.plan.layers.values()):
        keys.append(tag("li", _tiny(mark("diamond", 0.5, 6, 3, "pin")), "pinned"))
    rows: list[Markup] = []
    for one in shown:
        rows.append(tag("h3", _titled(one)) if one.key else tag("p", "all weights", class_="row"))
        rows += [charts.mix_bar(one), charts.bits_row(one, highest)]
    rows.append(tag("p", "share of all weights", class_="row"))
    rows += [charts.weights_row(layers), charts.names_row(list(layers))]
    inner = charts.scrolled(len(layers), "Bits per layer", *rows)
    return joined([_how(how), tag("ul", *keys, class_="key-list"), inner])


def _scores(shown: Sequence[Shown], file: ScoreFile | None) -> Markup | None:
    names = list(shown[0].plan.layers)
    tables = _plan_scores(shown) if file is None else _file_scores(shown, file)
    if not tables:
        return None
    costs = any(one.bits for one, _ in tables)
    how = "The higher, the more sensitive the layer is to rounding. "
    if costs:
        how += (
            "A cost stands for each bit-width, in its colour, and falls as bits are added; the "
            "marks with an outline are what the plans chose. "
        )
    how += "Where the numbers span more than a decade the axis is logarithmic."
    keys: list[Markup] = []
    if costs:
        keys += _swatches(width for one, _ in tables for width in one.bits)
        for place, one in enumerate(shown[: len(SHAPES)]):
            shape = mark(SHAPES[place], 0.5, 6, 4.5, "hollow chosen")
            keys.append(tag("li", _tiny(shape), f"chosen by {one.label}"))
        if len(shown) > len(SHAPES):
            keys.append(tag("li", f"(only the first {len(SHAPES)} plans are marked)"))
    rows: list[Markup] = []
    for one, plans in tables:
        what = "cost for each bit-width" if one.bits else "importance"
        rows.append(tag("h3", one.title, tag("span", f" · {what}", class_="soft")))
        rows.append(charts.score_row(one, names, plans))
    rows.append(charts.names_row(names))
    inner = charts.scrolled(len(names), "Score per layer", *rows)
    return joined([_how(how), tag("ul", *keys, class_="key-list") if keys else None, inner])


def _file_scores(
    shown: Sequence[Shown], file: ScoreFile
) -> list[tuple[LayerScores, Sequence[Shown]]]:
    found: list[tuple[LayerScores, Sequence[Shown]]] = []
    for name in file.proxies:
        scores = file.of(name)
        place = {layer.name: index for index, layer in enumerate(scores.layers)}
        rows = [place[layer] for layer in shown[0].plan.layers]
        per_bit = scores.shape == "layers bits"
        values = scores.values.reshape(len(rows), -1)[rows]
        bits = tuple(scores.bits) if per_bit else ()
        found.append((LayerScores(title=name, bits=bits, values=values), shown))
    return found


def _plan_scores(shown: Sequence[Shown]) -> list[tuple[LayerScores, Sequence[Shown]]]:
    """The scores that plans hold themselves; what they hold else is passed over."""
    found: list[tuple[LayerScores, Sequence[Shown]]] = []
    for one in shown:
        table = (one.plan.predicted or {}).get("scores")
        bits = one.plan.candidates
        layers = one.plan.layers
        if not isinstance(table, dict) or any(name not in table for name in layers):
            continue
        rows = [table[name] if isinstance(table[name], list) else [table[name]] for name in layers]
        per_bit = isinstance(next(iter(table.values())), list)
        axis = tuple(bits) if per_bit else ()
        if any(len(row) != (len(axis) or 1) for row in rows):
            continue
        if not all(_is_number(value) for row in rows for value in row):
            continue
        if not all(isinstance(width, int) for width in axis):
            continue
        name = f"{_method(one.plan) or 'scores'} ({one.name})"
        values = np.asarray(rows, np.float64)
        found.append((LayerScores(title=name, bits=axis, values=values), [one]))
    return found


def _coupling(shown: Sequence[Shown], file: ScoreFile | None) -> Markup | None:
    if file is None:
        return None
    first = shown[0]
    names = list(first.plan.layers)
    maps: list[Markup] = []
    for proxy in file.proxies if len(names) > 1 else ():
        scores = file.of(proxy)
        if scores.coupling is None:
            continue
        matrix = charts.coupling_at(scores, first.plan)
        alike = charts.normalised(matrix)
        label = f"Coupling of {len(names)} layers by {proxy}"
        drawn = charts.coupling_map(alike, names, label)
        maps.append(tag("h3", proxy))
        maps.append(charts.coupling_legend())
        maps.append(tag("div", drawn, class_="scroll", tabindex=0, role="group", aria_label=label))
        maps.append(_pairs(matrix, alike, names))
    if not maps:
        return None
    how = (
        "How much the errors of two layers add up when both are rounded: the coupling G_ab at the "
        f"bits of {first.label}, divided by the root of G_aa G_bb, so that the diagonal is 1. At 1 "
        "two layers move the outputs alike and are dearer together than alone, at −1 they cancel, "
        "at 0 their costs just add."
    )
    return joined([_how(how), *maps])


def _pairs(matrix: np.ndarray, alike: np.ndarray, names: Sequence[str]) -> Markup:
    """The pairs of layers that change the cost most."""
    rows, columns = np.triu_indices(len(names), 1)
    values = 2 * matrix[rows, columns]
    order = np.argsort(-np.abs(values), kind="stable")[:PAIRS]
    found = []
    for k in order.tolist():
        one, other = int(rows[k]), int(columns[k])
        share = float(alike[one, other])
        shown = "" if np.isnan(share) else number(share, ".2f")
        found.append(
            [_name(names[one]), _name(names[other]), (shown,), (number(float(values[k]), ".3g"),)]
        )
    heads = ["layer", "with", ("normalised",), ("adds to the cost",)]
    caption = "The pairs that change the cost most"
    return _table(heads, found, caption=caption, label=caption)


def _front(
    front: Front | None, shown: Sequence[Shown], measured: Sequence[NetworkMeasured | None]
) -> Markup | None:
    if front is None:
        return None
    placed = [
        Placed(shown=one, amount=amount, cost=cost, top1=None if result is None else result.top1)
        for one, result in zip(shown, measured, strict=True)
        if (amount := _amount(front, one.plan)) is not None
        for cost in [_front_cost(front, one.plan)]
    ]
    unit = f", {front.budget.unit}" if front.budget.unit else ""
    proxy = front.method.get("proxy")
    how = (
        f"What each amount of {front.budget.name} costs at least, by "
        f"{proxy or 'one set of scores'}: the lower, the better. The line joins what no other "
        "point beats; hollow points are "
        "dominated: another takes no more and is no worse. Diamonds are the plans of this page."
    )
    if any(one.cost is None for one in placed):
        how += " A dotted upright is a plan made by other costs, which cannot be compared."
    below = tag("p", f"{front.budget.name}{unit}", class_="unit")
    panels = [tag("div", tag("h3", "Predicted cost"), charts.front_costs(front, placed), below)]
    float_top1 = None
    if any(point.measured for point in front.points):
        record = (front.measured or {}).get("float")
        top1 = record.get("top1") if isinstance(record, dict) else None
        float_top1 = float(top1) if _is_number(top1) else None
        drawn = charts.front_accuracy(front, placed, float_top1)
        panels.append(tag("div", tag("h3", "Measured top-1, %"), drawn, below))
    notes = [tag("p", note, class_="note") for note in front.notes]
    table = tag("details", tag("summary", "All points"), _points(front), open="open")
    return joined([_how(how), *notes, tag("div", *panels, class_="charts"), table])


def _amount(front: Front, plan: Plan) -> float | None:
    """What a plan takes of a front's budget, counted as the front counts it."""
    name, unit = front.budget.name, front.budget.unit
    if name == "size" and (unit == "bit" or unit in _SIZES):
        pinned = {key for key, layer in front.layers.items() if layer.pinned}
        free = [layer for key, layer in plan.layers.items() if key not in pinned]
        counts = (free or list(plan.layers.values())) if unit == "bit" else plan.layers.values()
        weights = sum(layer.weights for layer in counts)
        bits = sum(layer.size_bits for layer in counts)
        return bits / _SIZES.get(unit, weights or 1)
    for budget in plan.budgets:
        ends = (budget.low, budget.high) == (front.budget.low, front.budget.high)
        if (budget.name, budget.unit) == (name, unit) and ends:
            return float(budget.achieved)
    return None


def _front_cost(front: Front, plan: Plan) -> float | None:
    """A plan's cost, where it is the front's."""
    what = ("proxy", "recipe", "cost", "options")
    same = all(plan.method.get(key) == front.method.get(key) for key in what)
    return float(plan.solver.objective) if same and plan.solver is not None else None


def _points(front: Front) -> Markup:
    unit = f", {front.budget.unit}" if front.budget.unit else ""
    there = any(point.measured for point in front.points)
    heads: list[Cell] = ["point", (f"asked{unit}",), ("taken",), ("size",), ("cost",), ("gap",)]
    heads += [("top-1 %",), ("KL, nats",)] if there else []
    rows = []
    for index, one in enumerate(front.points, 1):
        first, last = one.asked[0], one.asked[-1]
        asked = f"{first:.4g}" if first == last else f"{first:.4g} to {last:.4g}"
        cost = _starred(number(one.predicted), one.dominated)
        gap = "" if one.gap is None else f"{number(round(100 * one.gap, 6), '.2g')} %"
        row: list[Cell] = [str(index), (asked,), (f"{one.achieved:.5g}",)]
        row += [(_size(one.size_bits),), (cost,), (gap,)]
        if there:
            found = one.measured
            row += [("",), ("",)] if found is None else [
                (_starred(f"{found.top1:.2f}", found.top1_dominated),),
                (_starred(number(found.kl), found.kl_dominated),),
            ]  # fmt: skip
        rows.append(row)
    return _table(heads, rows, label="Points of the front", caption="* dominated")


# -- accuracy --------------------------------------------------------------------------


def _accuracy(
    shown: Sequence[Shown],
    measured: Sequence[NetworkMeasured | None],
    evaluation: EvaluationFile | None,
    results: Sequence[EvaluationFile | None],
) -> Markup | None:
    # Records are known by their identity: two plans may well measure alike.
    labels = {id(result): _titled(one) for one, result in zip(shown, measured, strict=True)}
    if evaluation is not None:
        tables = [_measured_table(evaluation, labels)]
    else:
        tables = [_measured_table(one, labels) for one in results if one is not None]
    if not tables:
        return None
    how = (
        "Top-1 of the quantized networks as they run, corrected as said, beside the float network "
        "and the largest uniform bit-width within the same budgets. KL is the divergence of the "
        "outputs from the float network's."
    )
    return joined([_how(how), *tables])


def _measured_table(found: EvaluationFile, labels: Mapping[int, Markup]) -> Markup:
    """Float, uniform and plans; then what was compared, and classes."""
    records: list[tuple[Markup, NetworkMeasured]] = []
    if found.uniform is not None:
        records.append((escaped(f"uniform {width_text(found.uniform.width)} bit"), found.uniform))
    records += [(labels.get(id(one), escaped(one.file)), one) for one in found.plans]
    versus = any(one.versus_float is not None for _, one in records)
    heads: list[Cell] = ["network", ("top-1 %",)]
    heads += [("against float",), ("interval",), ("p",), ("p, Holm",)] if versus else []
    heads += [("bits",), ("size",), ("KL, nats",), "correction"]
    blank: list[Cell] = [("",)] * 4 if versus else []
    top1 = f"{found.float_.top1:.2f}"
    rows: list[list[Cell]] = [["float", (top1,), *blank, (str(FLOAT_BITS),), ("",), ("",), ""]]
    for label, one in records:
        beside: list[Cell] = []
        if versus:
            beside = blank if one.versus_float is None else _difference(one.versus_float)
        rows.append(
            [
                label,
                (f"{one.top1:.2f}",),
                *beside,
                (f"{one.average_bits:.4g}",),
                (_size(one.size_bits),),
                ("" if one.kl is None else number(one.kl),),
                one.correction,
            ]
        )
    caption = f"On {found.float_.n:,} images"
    if versus:
        caption += (
            "; differences are in points, with 95 % interval; p by McNemar's exact test, "
            "then adjusted by Holm"
        )
    parts = [_table(heads, rows, caption=caption, label="Accuracy"), _only(records)]
    pairs = [
        [label, "uniform", *_difference(one.versus_uniform)]
        for label, one in records
        if one.versus_uniform is not None
    ]
    pairs += [[_name(one.second), _name(one.first), *_difference(one)] for one in found.comparisons]
    if pairs:
        heads = ["network", "against", ("difference",), ("interval",), ("p",), ("p, Holm",)]
        head = "Against uniform bits and each other"
        parts += [tag("h3", head), _table(heads, pairs, label=head)]
    if found.classes:
        parts += [tag("h3", "By class"), _classes(found, [label for label, _ in records])]
    return joined(parts)


def _difference(one: Difference) -> list[Cell]:
    signed = "" if one.difference is None else number(one.difference, "+.2f")
    ends = "" if one.interval is None else " to ".join(number(end, "+.2f") for end in one.interval)
    return [(signed,), (ends,), (_chance(one.p_value),), (_chance(one.p_holm),)]


def _chance(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _only(records: Sequence[tuple[Markup, NetworkMeasured]]) -> Markup | None:
    """Images that only one of float network and plan gets right."""
    found = [
        joined([label, f" {one.versus_float.only_float:,} and {one.versus_float.only_plan:,}"])
        for label, one in records
        if one.versus_float is not None
        and one.versus_float.only_float is not None
        and one.versus_float.only_plan is not None
    ]
    if not found:
        return None
    text = "Images that only the float network gets right, and only the plan: "
    return tag("p", text, joined(found, "; "), ".", class_="how")


def _classes(found: EvaluationFile, labels: Sequence[Markup]) -> Markup:
    """Top-1 by class and its change from float; of many classes those that change most."""

    def parts(one: ClassMeasured) -> list[ClassPart | None]:
        return [*([one.uniform] if found.uniform is not None else []), *one.plans]

    def change(one: ClassMeasured) -> float:
        return max((abs(part.difference) for part in parts(one) if part is not None), default=0.0)

    caption = "Top-1 in percent, and its change from float in points"
    classes = list(found.classes)
    if len(classes) > CLASSES:
        classes = sorted(classes, key=change, reverse=True)[:CLASSES]
        caption += f"; the {CLASSES} of {len(found.classes):,} classes that change most"
    rows: list[list[Cell]] = []
    for one in classes:
        cells = [
            ("",) if part is None else (f"{part.top1:.1f} ({number(part.difference, '+.1f')})",)
            for part in parts(one)
        ]
        name = str(one.class_) if one.name is None else one.name
        rows.append([name, (f"{one.n:,}",), (f"{one.float_:.1f}",), *cells])
    heads = ["class", ("images",), ("float",), *((label,) for label in labels)]
    return _table(heads, rows, caption=caption, label="Accuracy by class")


def _candidates(shown: Sequence[Shown]) -> Markup | None:
    """What `auto` tried for each plan, predicted beside measured."""
    tables: list[Markup] = []
    for one in shown:
        auto = _auto(one.plan)
        found = auto.get("candidates") if auto is not None else None
        if auto is None or not isinstance(found, list):
            continue
        records = [record for record in found if isinstance(record, dict)]
        columns = {
            head: key
            for head, key in _MEASURES.items()
            if any(_is_number(record.get(key)) for record in records)
        }
        rows = [
            [
                _text(record.get("proxy")),
                *((number(v) if _is_number(v := record.get(k)) else "",) for k in columns.values()),
                "kept" if record.get("proxy") == auto.get("chosen") else "",
            ]
            for record in records
        ]
        heads = ["proposed by", *((head,) for head in columns), ""]
        if rows:
            tables += [tag("h3", _titled(one))] if one.key else []
            tables.append(_table(heads, rows, label=f"Plans tried for {one.name}"))
    if not tables:
        return None
    how = (
        "Plans that were run before one was kept, by their KL to the float network in nats: as "
        "predicted, as measured on the images of the scores and on images held back. Rescaled is "
        "what is left up to the scale of each image's logits. The least stands first."
    )
    return joined([_how(how), *tables])


def _auto(plan: Plan) -> Mapping[str, Any] | None:
    found = (plan.predicted or {}).get("auto")
    return found if isinstance(found, dict) else None


# -- layers ----------------------------------------------------------------------------


def _groups(shown: Sequence[Shown]) -> Markup | None:
    layers = shown[0].plan.layers
    groups: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if layer.group is not None:
            groups.setdefault(layer.group, []).append(name)
    several = {group: names for group, names in groups.items() if len(names) > 1}
    if not several:
        return None
    heads: list[Cell] = ["group", "layers"]
    heads += [f"bits, {one.key}" if one.key else "bits" for one in shown]
    rows = []
    for group, names in several.items():
        row: list[Cell] = [
            _name(group),
            tag("div", joined(map(_name, names), ", "), class_="words"),
        ]
        for one in shown:
            bits = [one.plan.layers[name].width for name in names]
            shapes = joined([_chip(width) for width in bits], " ")
            flag = tag("span", "differ", class_="flag") if len(set(bits)) > 1 else None
            row.append(tag("span", shapes, " ", flag, class_="whole"))
        rows.append(row)
    how = (
        "Layers of a group end in one residual sum. Where activations are quantized the terms of "
        "the sum lie on one grid; weights may differ, unless the layers are tied."
    )
    return joined([_how(how), _table(heads, rows, label="Groups")])


def _layers(shown: Sequence[Shown], scores: ScoreFile | None) -> Markup:
    layers = shown[0].plan.layers
    beside = [any(one.activation_bits for one in s.plan.layers.values()) for s in shown]
    heads: list[Cell] = ["layer", *(["kind"] if scores is not None else [])]
    heads += [("weights",), ("MACs",)]
    for one, act in zip(shown, beside, strict=True):
        key = f" {one.key}" if one.key else ""
        heads += [f"bits{key}", *([(f"activations{key}",)] if act else []), (f"KiB{key}",)]
        heads += [(f"share{key}",)]
    rows = []
    for name, layer in layers.items():
        row: list[Cell] = [_name(name)]
        row += [scores.layers[name].kind] if scores is not None else []
        row += [(f"{layer.weights:,}",), (f"{layer.macs:,}",)]
        for one, act in zip(shown, beside, strict=True):
            own = one.plan.layers[name]
            pinned = tag("span", " pinned", class_="soft") if own.pinned else None
            row.append(tag("span", _chip(own.width), pinned, class_="whole"))
            row += [(width_text(own.activation_bits),)] if act else []
            row.append((f"{own.size_bits / 8192:,.1f}",))
            row.append((f"{100 * own.size_bits / (one.plan.size_bits or 1):.1f} %",))
        rows.append(row)
    foot: list[Cell] = [f"{len(layers)} layers", *([""] if scores is not None else [])]
    foot += [(f"{sum(one.weights for one in layers.values()):,}",)]
    foot += [(f"{sum(one.macs for one in layers.values()):,}",)]
    for one, act in zip(shown, beside, strict=True):
        foot += [f"{one.plan.average_bits:.4g}", *([("",)] if act else [])]
        foot += [(f"{one.plan.size_bits / 8192:,.1f}",), ("",)]
    how = "Share is the layer's part of the plan's size; the last line is the whole."
    return joined([_how(how), _table(heads, rows, foot=foot, label="Layers and their bits")])


# -- provenance ------------------------------------------------------------------------


def _provenance(
    shown: Sequence[Shown], scores: ScoreFile | None, front: Front | None
) -> Markup | None:
    """How everything came about: what all plans share first, then what each has of its own."""
    found = [(_titled(one), _origin(one.plan)) for one in shown]
    if scores is not None:
        record = {
            "model": scores.model,
            "proxies": ", ".join(scores.proxies),
            "bits": scores.widths,
            "activation_bits": scores.activation_bits,
            "rounding": scores.rounding,
            "samples": scores.samples,
            "seed": scores.seed,
            **scores.provenance,
        }
        found.append((Markup("Scores"), _flat(record)))
    if front is not None:
        found.append((Markup("Front"), _flat({"model": front.model, "method": front.method,
                                              **front.provenance})))  # fmt: skip
    first, others = found[0][1], [facts for _, facts in found[1:]]
    shared = {
        key: value
        for key, value in first.items()
        if others and all(facts.get(key) == value for facts in others)
    }
    parts: list[Markup] = []
    if shared:
        parts += [tag("h3", "All of them"), _definitions(shared, "facts")]
    for head, facts in found:
        own = {key: value for key, value in facts.items() if key not in shared}
        if own:
            parts += [tag("h3", head), _definitions(own, "facts")]
    if not parts:
        return None
    how = "What made these files: the same facts, and the same versions, give the same plans."
    return joined([_how(how), *parts])


def _origin(plan: Plan) -> dict[str, str]:
    record: dict[str, Any] = {"model": plan.model, "method": plan.method, **plan.provenance}
    if plan.solver is not None:
        record["solver"] = {
            "name": plan.solver.name,
            "seconds": plan.solver.seconds,
            "notes": plan.solver.notes,
        }
    return _flat(record)


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested records as `versions.jax: 0.7`; what is empty is left out."""
    facts: dict[str, str] = {}
    for key, one in value.items():
        if isinstance(one, Mapping):
            facts.update(_flat(one, f"{before}{key}."))
        elif one is not None and one != []:
            facts[f"{before}{key}"] = _text(one)
    return facts


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return number(value, ".6g") if isinstance(value, float) else str(value)
