"""Pictures of plans, fronts and rankings, drawn with matplotlib without a display.

ax = plot_plan(plan)
ax.figure.savefig("plan.png")
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proxyq.errors import UsageError
from proxyq.report.tables import layer_scores, short_names
from proxyq.search.allocate.plan import FLOAT_BITS, Plan
from proxyq.search.front_file import Front
from proxyq.search.table_file import MeasuredTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
NAME = 48
"""Characters of a layer's name; longer ones lose what they begin with alike, or their middle."""
WIDTH, MARGIN = 10.0, 1.0  # inches
# Few bits dark blue, many bits yellow: in order also without colour vision, and in grey.
COLOURS = {
    1: "#2a1a5e",
    2: "#3b3f8f",
    3: "#2f6fa3",
    4: "#2a9d9a",
    5: "#4fb47e",
    6: "#8fc45f",
    7: "#c6cf4e",
    8: "#f0c53b",
    16: "#f08a3b",
    FLOAT_BITS: "#9a9a9a",
}
GREY, INK = "#b8bec8", "#2b2f36"


def check_format(path: str | os.PathLike[str]) -> str:
    """The format that a file's suffix asks for; `UsageError` when it is none of ours."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(
            f"a plot is a file that ends in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got "
            f"{str(path)!r}."
        )
    return suffix[1:]


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> bytes:
    """The plan's picture as the bytes of a file named `path`: its suffix is the format."""
    kind = check_format(path)
    ax = plot_plan(plan)
    return _rendered(ax.figure, kind)


def _rendered(figure: Any, kind: str) -> bytes:
    """The same bytes for the same picture: no dates, no random identifiers."""
    from matplotlib import rc_context

    metadata: dict[str, Any] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "proxyq", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata[kind])
    return buffer.getvalue()


def plot_plan(plan: Plan, ax: "Axes | None" = None) -> "Axes":
    """Bits of every layer as bars, in network order from top to bottom.

    Without `ax` a figure of its own, with two more panels: the layers' sizes, and the
    proxy's scores where the plan holds them. With `ax` the bars alone, drawn there.

    **Returns** the axes of the bars; their `figure` is the picture.
    """
    if ax is not None:
        _bits(ax, plan, row=_row(len(plan.layers)))
        return ax
    scores, head = layer_scores(plan)
    figure, panels = _figure(plan, 3 if scores else 2)
    row = _row(len(plan.layers))
    _bits(panels[0], plan, row=row)
    _sizes(panels[1], plan)
    if scores:
        _scores(panels[2], plan, scores, head)
    _title(figure, plan)
    return panels[0]


def _row(layers: int) -> float:
    """Height of a layer's row in inches."""
    return 0.32 if layers <= 16 else 0.24 if layers <= 40 else 0.18 if layers <= 120 else 0.13


def _font(row: float) -> float:
    """The size of letters, in points, that fits a row."""
    return min(10.0, 72 * row * 0.62)


def _text_width(text: str, size: float) -> float:
    """The width in inches of `text` in letters of `size` points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72


def _figure(plan: Plan, panels: int) -> "tuple[Figure, list[Axes]]":
    """Panels side by side on one axis of layers, margins and names of fixed width in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = len(plan.layers)
    row = _row(layers)
    names = max(_text_width(name, _font(row)) for name in short_names(list(plan.layers), NAME))
    names += 0.15  # between name and bar
    above, below = MARGIN + 0.15, 0.6 * MARGIN
    height = above + layers * row + below
    figure = Figure(figsize=(WIDTH + max(0.0, names - 2.0), height))
    FigureCanvasAgg(figure)
    width = figure.get_figwidth()
    left, right = MARGIN * 0.6 + names, MARGIN * 0.6
    shares = (1.25, 1.0, 1.0)[:panels]
    between = 0.4
    free = width - left - right - between * (panels - 1)
    axes: list[Axes] = []
    x = left
    for share in shares:
        wide = free * share / sum(shares)
        box = (x / width, below / height, wide / width, layers * row / height)
        axes.append(figure.add_axes(box, sharey=axes[0] if axes else None))
        x += wide + between
    return figure, axes


def _prepare(ax: "Axes", plan: Plan, title: str) -> None:
    count = len(plan.layers)
    ax.set_ylim(count - 0.5, -0.5)
    ax.set_title(title, fontsize=10, color=INK, loc="left", pad=6)
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.tick_params(axis="x", labelsize=9, colors=INK, length=3)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(GREY)
    ax.grid(axis="x", color="#e6e9ee", linewidth=0.8)
    ax.set_axisbelow(True)
    for index in range(0, count, 2):  # stripes lead the eye from the names to the last panel
        ax.axhspan(index - 0.5, index + 0.5, color="#f6f7f9", linewidth=0, zorder=0)


def _colours(plan: Plan) -> list[str]:
    return [COLOURS[layer.weight_bits or FLOAT_BITS] for layer in plan.layers.values()]


def _bits(ax: "Axes", plan: Plan, *, row: float) -> None:
    layers = list(plan.layers.values())
    # A float layer's bar would dwarf all others: it ends where 8 bits do, and says `float`.
    widest = max([8, *(layer.weight_bits or 0 for layer in layers)])
    lengths = [layer.weight_bits or widest for layer in layers]
    _prepare(ax, plan, f"bits of the weights, {plan.average_bits:.3g} on average")
    ax.barh(range(len(layers)), lengths, height=0.72, color=_colours(plan), zorder=2)
    font = _font(row)
    for index, (layer, length) in enumerate(zip(layers, lengths, strict=True)):
        text = "float" if layer.width is None else str(layer.width)
        text += "  pinned" if layer.pinned else ""
        ax.text(length + 0.012 * widest, index, text, va="center", fontsize=font * 0.92, color=INK)
    ax.set_xlim(0, widest * (1.28 if any(layer.pinned for layer in layers) else 1.1))
    ax.set_xticks(range(0, widest + 1, 2))
    ax.set_yticks(range(len(layers)))
    ax.set_yticklabels(
        short_names(list(plan.layers), NAME), fontsize=font, color=INK, parse_math=False
    )
    ax.tick_params(axis="y", labelleft=True, pad=4)
    if plan.average_bits <= widest:
        ax.axvline(plan.average_bits, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)


def _sizes(ax: "Axes", plan: Plan) -> None:
    """Size of every layer with the plan's bits."""
    layers = list(plan.layers.values())
    sizes = [layer.size_bits / 8192 for layer in layers]
    unit, divisor = ("MiB", 1024.0) if max(sizes) >= 1024 else ("KiB", 1.0)
    _prepare(ax, plan, f"size, {unit}")
    rows = range(len(layers))
    ax.barh(rows, [size / divisor for size in sizes], height=0.72, color=_colours(plan), zorder=2)
    ax.set_xlim(0, max(max(sizes) / divisor * 1.05, 1e-9))


def _scores(ax: "Axes", plan: Plan, scores: dict[str, float], head: str) -> None:
    """A dot for each layer, on a logarithmic axis where the scores span more than a decade.

    Of a cost for each bit-width the others are drawn too, faint, in the colours of their bits.
    """
    others = _other_scores(plan) if head == "cost" else []
    rows = [index for index, name in enumerate(plan.layers) if name in scores]
    values = [scores[name] for name in plan.layers if name in scores]
    everything = values + [value for _, value, _ in others]
    _prepare(ax, plan, "cost, at other bits faint" if head == "cost" else "score")
    if min(everything) > 0 and max(everything) > 10 * min(everything):
        ax.set_xscale("log")
        ax.tick_params(axis="x", which="minor", length=0)
    else:
        low, high = min(0.0, *everything), max(0.0, *everything)
        ax.set_xlim(low - 0.03 * (high - low or 1), high + 0.06 * (high - low or 1))
        ax.hlines(rows, 0, values, color=GREY, linewidth=1.2, zorder=2)
    if others:
        places, amounts, widths = zip(*others, strict=True)
        faint = [COLOURS.get(width, GREY) for width in widths]
        ax.scatter(amounts, places, s=14, c=faint, alpha=0.35, linewidths=0, zorder=2)
    colours = _colours(plan)
    ax.scatter(values, rows, s=30, c=[colours[index] for index in rows], zorder=3)


def _other_scores(plan: Plan) -> list[tuple[int, float, int]]:
    """Row, cost and bit-width of what was not chosen."""
    found = (plan.predicted or {}).get("scores") or {}
    axis = plan.candidates
    return [
        (row, float(value), width)
        for row, (name, layer) in enumerate(plan.layers.items())
        if isinstance(found.get(name), list) and len(found[name]) == len(axis)
        for width, value in zip(axis, found[name], strict=True)
        if width != layer.width
    ]


def _title(figure: "Figure", plan: Plan) -> None:
    how = plan.method.get("recipe") or plan.method.get("proxy")
    name = str(plan.model.get("name", "plan"))
    title = " · ".join([name, *([str(how)] if how else [])])
    facts = [
        f"{b.name} {b.achieved:.4g} of {b.asked:.4g} {b.unit}".rstrip() for b in plan.budgets
    ] or [f"{plan.average_bits:.4g} bits on average"]
    widths = {layer.activation_bits for layer in plan.layers.values()}
    if widths != {None}:
        shown = sorted("float" if w is None else str(w) for w in widths)
        facts.append(f"activations {' or '.join(shown)} bit")
    if plan.solver is not None:
        facts.append(f"{plan.solver.status} ({plan.solver.name})")
    _headline(figure, title, " · ".join(facts))


def _headline(figure: "Figure", title: str, facts: str) -> None:
    height = figure.get_figheight()
    x = MARGIN * 0.6 / figure.get_figwidth()
    plain: dict[str, Any] = {"parse_math": False}  # a dollar sign is a dollar sign
    figure.text(x, 1 - 0.42 / height, title, fontsize=14, weight="bold", color=INK, **plain)
    figure.text(x, 1 - 0.66 / height, facts, fontsize=9.5, color="#5b6270", **plain)


# -- fronts ----------------------------------------------------------------------------


def draw_front(front: Front, path: str | os.PathLike[str]) -> bytes:
    """The front's picture as the bytes of a file named `path`: its suffix is the format."""
    kind = check_format(path)
    return _rendered(plot_front(front).figure, kind)


def plot_front(front: Front, ax: "Axes | None" = None) -> "Axes":
    """Predicted cost against what the plans take of the budget; dominated points are hollow.

    Where a proof is open, a line goes down to the bound. Without `ax` a figure of its own, with
    a second panel for the accuracy where it was measured; with `ax` the costs alone.

    **Returns** the axes of the costs; their `figure` is the picture.
    """
    if ax is not None:
        _costs(ax, front)
        return ax
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 1 if front.measured is None else 2
    figure = Figure(figsize=(1.6 + 4.2 * panels, 4.4))
    FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.8 / width, right=1 - 0.35 / width, bottom=0.6 / height, top=1 - 1.2 / height
    )
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _costs(axes[0], front)
    if front.measured is not None:
        _accuracy(axes[1], front)
    how = [str(front.model.get("name", "front")), str(front.method.get("proxy") or "")]
    proven = sum(one.status == "optimal" for one in front.points)
    facts = [f"{len(front.points)} plans", f"{proven} proven optimal ({front.points[0].solver})"]
    others = front.plan(0).budgets[1:]
    facts += [f"{b.name} at most {b.asked:.4g} {b.unit}".rstrip() for b in others]
    _headline(figure, " · ".join(filter(None, how)), " · ".join(facts))
    return axes[0]


# -- rankings --------------------------------------------------------------------------

MOST_PANELS = 24


def draw_ranking(
    costs: Mapping[str, np.ndarray], table: MeasuredTable, path: str | os.PathLike[str]
) -> bytes:
    """Predicted cost of every plan against its accuracy, a panel for each of the first costs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = check_format(path)
    shown = list(costs.items())[:MOST_PANELS]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(0.9 + 2.6 * columns, 1.5 + 2.2 * rows))
    FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.7 / width,
        right=1 - 0.2 / width,
        bottom=0.5 / height,
        top=1 - 1.1 / height,
        hspace=0.45,
        wspace=0.25,
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    accuracy = table.column("top1")
    for ax in axes.ravel()[len(shown) :]:
        ax.set_visible(False)
    for ax, (name, cost) in zip(axes.ravel(), shown, strict=False):
        ax.set_title(name, fontsize=9, color=INK, loc="left", pad=4)
        if cost.min() > 0 and cost.max() > 30 * cost.min():
            ax.set_xscale("log")
        ax.scatter(cost, accuracy, s=12, c=COLOURS[3], alpha=0.7, linewidths=0)
        ax.tick_params(labelsize=7, colors=INK, length=3)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    left_out = len(costs) - len(shown)
    facts = [f"{len(accuracy)} plans", "top-1 in percent against predicted cost"]
    if left_out:
        facts.append(f"{left_out} further costs not shown")
    _headline(figure, table.name, " · ".join(facts))
    return _rendered(figure, kind)


def _costs(ax: "Axes", front: Front) -> None:
    points = front.points
    values = [float(one.predicted) for one in points]
    _prepare_front(ax, front, "predicted cost")
    for one, value in zip(points, values, strict=True):
        if one.bound is not None and value - one.bound > 1e-6 * abs(value):
            ax.plot([one.achieved] * 2, [one.bound, value], color=GREY, linewidth=1.2, zorder=2)
    if min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
    _curve(ax, [one.achieved for one in points], values, [one.dominated for one in points])


def _accuracy(ax: "Axes", front: Front) -> None:
    """Top-1 of every plan, and of the float network as a dashed line."""
    found = [(one.achieved, one.measured) for one in front.points if one.measured is not None]
    level = float((front.measured or {})["float"]["top1"])
    _prepare_front(ax, front, f"top-1, %; dashed: float, {level:.2f}")
    ax.axhline(level, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    _curve(
        ax,
        [achieved for achieved, _ in found],
        [float(one.top1) for _, one in found],
        [one.top1_dominated for _, one in found],
    )


def _curve(
    ax: "Axes", amounts: Sequence[float], values: Sequence[float], hollow: Sequence[bool]
) -> None:
    """Points, joined where they are not dominated; those that are, hollow."""
    colour = COLOURS[3]
    pairs = list(zip(amounts, values, hollow, strict=True))
    best = sorted((amount, value) for amount, value, beaten in pairs if not beaten)
    ax.plot(*zip(*best, strict=True), color=colour, linewidth=1.4, zorder=3)
    for beaten in (False, True):
        chosen = [(amount, value) for amount, value, other in pairs if other == beaten]
        if chosen:
            face = "white" if beaten else colour
            ax.scatter(*zip(*chosen, strict=True), s=34, c=face, edgecolors=colour, zorder=4)


def _prepare_front(ax: "Axes", front: Front, title: str) -> None:
    ax.set_title(title, fontsize=10, color=INK, loc="left", pad=6)
    what = ", ".join(filter(None, (front.budget.name, front.budget.unit)))
    ax.set_xlabel(what, fontsize=9, color=INK)
    ax.tick_params(labelsize=9, colors=INK, length=3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        ax.spines[side].set_color(GREY)
    ax.grid(color="#e6e9ee", linewidth=0.8)
    ax.set_axisbelow(True)


# -- evolutions ------------------------------------------------------------------------


def draw_evolution(result: Mapping[str, Any], path: str | os.PathLike[str]) -> bytes:
    """Fitness and length against formulas measured; held-back and held-out means of the formula
    that was written as dashed lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = check_format(path)
    rows = [row for row in result["logbook"] if row["population_best"] is not None]
    figure = Figure(figsize=(WIDTH, 4.4))
    FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.8 / width, right=1 - 0.35 / width, bottom=0.6 / height, top=1 - 1.2 / height
    )
    fitness, size = figure.subplots(1, 2, squeeze=False)[0]
    measured = [row["evaluations"] for row in rows]
    for ax, title, lines in (
        (fitness, "rank correlation", (("best", "best"), ("mean", "mean of those that live"))),
        (size, "nodes", (("best_size", "best"), ("mean_size", "mean of those that live"))),
    ):
        ax.set_title(title, fontsize=10, color=INK, loc="left", pad=6)
        ax.set_xlabel("formulas measured", fontsize=9, color=INK)
        ax.tick_params(labelsize=9, colors=INK, length=3)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        ax.grid(color="#e6e9ee", linewidth=0.8)
        ax.set_axisbelow(True)
        for (key, label), colour in zip(lines, (COLOURS[3], GREY), strict=True):
            ax.plot(measured, [row[key] for row in rows], color=colour, linewidth=1.6, label=label)
    chosen = result["entries"][result["chosen"]]
    for key, label, style in (
        ("validation_by_table", "written, plans held back", (0, (4, 3))),
        ("holdout_by_table", "written, tables held out", (0, (1, 2))),
    ):
        values = chosen[key]
        if values and None not in values:
            level = sum(values) / len(values)
            fitness.axhline(level, color=INK, linewidth=1, linestyle=style, label=label)
    fitness.legend(fontsize=8, frameon=False, loc="lower right")
    names = ", ".join(str(table["model"].get("name")) for table in result["tables"])
    settings = result["settings"]
    facts = [
        f"{settings['method']}, {settings['structure']}",
        f"seed {settings['seed']}",
        f"{measured[-1]:,} formulas",
    ]
    _headline(figure, f"evolution on {names}", " · ".join(facts))
    return _rendered(figure, kind)
