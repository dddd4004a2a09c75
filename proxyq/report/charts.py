"""The charts of the page: bits, scores, couplings, fronts. Colours are in `page.css`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from proxyq.proxies import Scores
from proxyq.report.markup import Markup, percent, tag
from proxyq.report.svg import SHAPES, Scale, mark, number, plot, scale_of, title, y_axis
from proxyq.report.tables import short_names
from proxyq.search.allocate.plan import FLOAT_BITS, Plan, PlannedLayer
from proxyq.search.front_file import Front
from proxyq.widths import group_of

NAME = 26
"""Characters of a layer's name below a chart; the whole is in the tables."""
LABELS = 48
"""Names that fit below one another's letters; of more layers every second or third is named."""
CELLS = 40
"""Up to so many layers every cell of a coupling map is an element with words of its own."""
LEVELS = 10


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A plan on the page: what it is called, and its letter where there are several."""

    plan: Plan
    name: str
    key: str = ""

    @property
    def label(self) -> str:
        """`plan A`, or `the plan` where there is one."""
        return f"plan {self.key}" if self.key else "the plan"


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """Numbers of one proxy for layers, `[layers, bits]`, or `[layers, 1]` without `bits`."""

    title: str
    bits: tuple[int, ...]
    values: np.ndarray


def width_text(bits: int | None) -> str:
    """A bit-width as text."""
    return "float" if bits is None else str(bits)


def bits_class(bits: int | None) -> str:
    """The class that colours a bit-width."""
    return f"b{FLOAT_BITS if bits is None else int(bits)}"


def scrolled(layers: int, label: str, *children: Markup | None) -> Markup:
    """Charts over layers, one below the other; on narrow screens they can be scrolled."""
    wide = sum(layers > most for most in (16, 40, 90))
    stack = tag("div", *children, class_=f"stack w{wide}")
    return tag("div", stack, class_="scroll", tabindex=0, role="group", aria_label=label)


# -- bits ------------------------------------------------------------------------------


def bits_row(shown: Shown, highest: int) -> Markup:
    """A bar for each layer, as high as its bits, `highest` at most."""
    layers = list(shown.plan.layers.items())
    count, top, base = len(layers), 18.0, 120.0
    scale = Scale(0, highest)
    ticks = [highest]
    for width in sorted({one.weight_bits or highest for _, one in layers}, reverse=True):
        if ticks[-1] - width >= 0.11 * highest <= width:  # a line of text apart
            ticks.append(width)
    parts = [y_axis(scale, top, base, [*ticks, 0])]
    beside = {one.activation_bits for _, one in layers}
    for index, (name, one) in enumerate(layers):
        height = scale(one.weight_bits or highest) * (base - top)
        x, wide = index / count, 1 / count
        inner = [
            title(f"{name}: {layer_text(one)}"),
            _hit(index, count, base + 10),
            tag(
                "rect",
                x=percent(x + 0.12 * wide),
                width=percent(0.76 * wide),
                y=base - height,
                height=height,
                class_=bits_class(one.weight_bits),
            ),
        ]
        if count <= LABELS:
            text = "fl" if one.weight_bits is None else str(one.weight_bits)
            inner.append(
                tag("text", text, x=percent(x + wide / 2), y=base - height - 5, class_="mid ink")
            )
        if len(beside) > 1 and one.activation_bits is not None:
            y = base - scale(one.activation_bits) * (base - top)
            ends = {"x1": percent(x + 0.04 * wide), "x2": percent(x + 0.96 * wide)}
            inner.append(tag("line", y1=y, y2=y, class_="act", **ends))
        if one.pinned:
            inner.append(
                mark("diamond", x + wide / 2, base + 6, 2.4 if count > LABELS else 3, "pin")
            )
        parts.append(tag("g", *inner))
    average = shown.plan.average_bits
    if average <= highest:
        y = base - scale(average) * (base - top)
        parts.append(tag("line", x1=0, x2="100%", y1=y, y2=y, class_="average"))
    label = f"Bits of {count} layers in {shown.name}, {average:.4g} on average"
    return plot(*parts, height=base + 14, label=label)


def layer_text(layer: PlannedLayer) -> str:
    """What a plan does with a layer, in words."""
    parts = [f"{width_text(layer.weight_bits)}{' bit' if layer.weight_bits else ''}"]
    if layer.group_size is not None:
        parts.append(f"groups of {layer.group_size}")
    if layer.activation_bits is not None:
        parts.append(f"activations {layer.activation_bits} bit")
    parts.append(f"{layer.weights:,} weights")
    return ", ".join([*parts, *(["pinned"] if layer.pinned else [])])


def _hit(index: int, count: int, height: float) -> Markup:
    """The whole column of a layer, for the pointer; every second one faintly shaded."""
    return tag(
        "rect",
        x=percent(index / count),
        width=percent(1 / count),
        y=0,
        height=height,
        class_="hit odd" if index % 2 and count <= LABELS else "hit",
    )


def mix_bar(shown: Shown) -> Markup:
    """All weights in one bar, divided by their bits."""
    parts, x = [], 0.0
    total = sum(one.weights for one in shown.plan.layers.values()) or 1
    for width, layers, weights in bit_mix(shown.plan):
        share = weights / total
        words = f"{_bit_words(width)}: {layers} layer{'s' * (layers != 1)}"
        words += f", {100 * share:.1f} % of the weights"
        inner = [
            title(words),
            tag(
                "rect", x=percent(x), width=percent(share), y=0, height=20, class_=bits_class(width)
            ),
        ]
        if share >= 0.09:
            text = f"{_bit_words(width)} · {100 * share:.0f} %"
            place = {"x": percent(x + share / 2), "y": 14}
            inner.append(tag("text", text, class_=f"mid on-{bits_class(width)}", **place))
        parts.append(tag("g", *inner))
        x += share
    return plot(*parts, height=20, label=f"Share of the weights by bit-width in {shown.name}")


def bit_mix(plan: Plan) -> list[tuple[int | None, int, int]]:
    """Bit-width, how many layers, how many weights; ascending, float last."""
    layers = plan.layers.values()
    widths = {one.weight_bits for one in layers}
    found = []
    for width in sorted(widths, key=lambda one: FLOAT_BITS if one is None else one):
        having = [one for one in layers if one.weight_bits == width]
        found.append((width, len(having), sum(one.weights for one in having)))
    return found


def _bit_words(width: int | None) -> str:
    return "float" if width is None else f"{width} bit"


def weights_row(layers: Mapping[str, PlannedLayer]) -> Markup:
    """A bar for each layer, as high as its share of all weights."""
    total, count, base = sum(one.weights for one in layers.values()) or 1, len(layers), 52.0
    shares = [one.weights / total for one in layers.values()]
    scale = Scale(0, max(*shares, 1e-9) if count > 1 else max(shares[0], 1e-9))
    most = tag("text", f"{100 * max(shares):.0f} %", x=-8, y=10, dy="0.32em", class_="end")
    parts = [most, tag("line", x1=0, x2="100%", y1=base, y2=base, class_="grid")]
    for index, ((name, one), share) in enumerate(zip(layers.items(), shares, strict=True)):
        height = scale(share) * (base - 8)
        bar = tag(
            "rect",
            x=percent((index + 0.12) / count),
            width=percent(0.76 / count),
            y=base - height,
            height=height,
            class_="share",
        )
        text = title(f"{name}: {one.weights:,} weights, {100 * share:.2f} % of all")
        parts.append(tag("g", text, _hit(index, count, base), bar))
    return plot(*parts, height=base + 4, label="Share of all weights by layer")


def names_row(names: Sequence[str]) -> Markup:
    """The layers' names below the charts, from bottom to top."""
    count, step = len(names), -(-len(names) // LABELS)
    short = short_names(names, NAME)
    parts = []
    for index in range(0, count, step):
        text = tag("text", short[index], transform="rotate(-90)", dy="0.32em", class_="end")
        parts.append(tag("svg", title(names[index]), text, x=percent((index + 0.5) / count), y=2))
    longest = max(map(len, short))
    return plot(*parts, height=8 + 6.0 * longest, label="", hidden=True)


# -- scores ----------------------------------------------------------------------------


def score_row(scores: LayerScores, names: Sequence[str], plans: Sequence[Shown]) -> Markup:
    """Dots for each layer: a cost for each bit-width, or its importance.

    The choices of the first plans have marks of their own.
    """
    values, count = scores.values, len(names)
    scale = scale_of(values.ravel().tolist(), log=True, zero=True)
    top, base = 10.0, 150.0 if scores.bits else 110.0
    nowhere = base + 12  # for what is not positive, which a logarithm cannot show
    size = 3.4 if count <= 30 else 2.6 if count <= LABELS * 2 else 1.8
    below = bool(scale.log and (values <= 0).any())

    def height(value: float) -> float:
        if scale.log and value <= 0:
            return nowhere
        return base - scale(value) * (base - top)

    parts = [y_axis(scale, top, base)]
    if below:
        parts.append(tag("text", "≤ 0", x=-8, y=nowhere, dy="0.32em", class_="end"))
    zero = base - scale(0.0) * (base - top) if not scale.log else base
    for index, name in enumerate(names):
        x, row = (index + 0.5) / count, values[index]
        inner = [title(_score_words(name, scores.bits, row)), _hit(index, count, base)]
        heights = [height(float(value)) for value in row]
        ends = (min(heights), max(heights)) if scores.bits else (zero, heights[0])
        inner.append(
            tag("line", x1=percent(x), x2=percent(x), y1=ends[0], y2=ends[1], class_="stem")
        )
        for column, y in enumerate(heights):
            class_ = bits_class(scores.bits[column]) if scores.bits else "dot"
            inner.append(mark("circle", x, y, size, class_))
        for place, shown in enumerate(plans[: len(SHAPES)] if scores.bits else ()):
            chosen = shown.plan.layers[name].width
            if chosen in scores.bits:
                y = heights[scores.bits.index(chosen)]
                inner.append(_chosen(place, min(len(plans), len(SHAPES)), x, y, count, chosen))
        parts.append(tag("g", *inner))
    label = f"{scores.title} of {count} layers, from {values.min():.3g} to {values.max():.3g}"
    return plot(*parts, height=base + (22 if below else 8), label=label)


def _chosen(place: int, of: int, x: float, y: float, count: int, bits: int | None) -> Markup:
    """The mark of a plan's choice; those of several plans stand side by side."""
    x += 0.5 * (place - (of - 1) / 2) / of / count
    size = 5.4 if count <= 30 else 4.0 if count <= LABELS * 2 else 2.8
    return mark(SHAPES[place], x, y, size, f"chosen {bits_class(bits)}")


def _score_words(name: str, bits: Sequence[int], row: np.ndarray) -> str:
    if not bits:
        return f"{name}: {row[0]:.4g}"
    each = (f"{width} bit {value:.3g}" for width, value in zip(bits, row, strict=True))
    return f"{name}: {', '.join(each)}"


# -- couplings -------------------------------------------------------------------------


def coupling_at(scores: Scores, plan: Plan) -> np.ndarray:
    """The couplings of whole layers at a plan's bits, `[layers, layers]`, in the plan's order.

    Where the scores do not hold the bits of a layer, those at the nearest bit-width, in groups of
    the layer's size if there are such.
    """
    assert scores.coupling is not None
    beside = 0 if scores.activations is None else len(scores.activation_bits)
    each = len(scores.bits) + beside
    place = {layer.name: index for index, layer in enumerate(scores.layers)}
    rows = []
    for name, layer in plan.layers.items():
        wanted = FLOAT_BITS if layer.weight_bits is None else layer.weight_bits

        def far(k: int, wanted: int = wanted, size: int | None = layer.group_size) -> Any:
            return abs(scores.bits[k] - wanted), group_of(scores.bits[k]) != size, k

        rows.append(place[name] * each + min(range(len(scores.bits)), key=far))
    return scores.coupling[np.ix_(rows, rows)]


def normalised(matrix: np.ndarray) -> np.ndarray:
    """`G_ab / sqrt(G_aa G_bb)`: one on the diagonal, NaN where a diagonal is not positive."""
    root = np.sqrt(np.where(np.diag(matrix) > 0, np.diag(matrix), np.nan))
    return matrix / root[:, None] / root[None]


def coupling_map(matrix: np.ndarray, names: Sequence[str], label: str) -> Markup:
    """Squares of the normalised `matrix`, `[layers, layers]`: blue: alike, orange: opposite."""
    count = len(names)
    short = short_names(names, NAME)
    step = -(-count // LABELS)
    side = 560.0 if count <= CELLS else 640.0
    cell = side / count
    left, top = 30 + 6.3 * max(map(len, short)), 22.0
    levels = np.nan_to_num(np.rint(np.clip(matrix, -1, 1) * LEVELS)).astype(int)
    parts: list[Markup] = [
        tag("rect", x=left, y=top, width=side, height=side, class_="empty"),
    ]
    for index in range(0, count, step):
        middle = (index + 0.5) * cell
        name = f"{short[index]}  {index + 1}"
        parts.append(tag("text", name, x=left - 6, y=top + middle, dy="0.32em", class_="end"))
        if count <= LABELS or index % (2 * step) == 0:
            parts.append(tag("text", index + 1, x=left + middle, y=top - 6, class_="mid"))
    if count <= CELLS:
        parts += _cells(matrix, levels, names, left, top, cell)
    else:
        parts += _runs(levels, left, top, cell)
    width = left + side + 2
    return tag(
        "svg",
        *parts,
        class_="map",
        viewBox=f"0 0 {width:g} {top + side + 2:g}",
        role="img",
        aria_label=label,
    )


def _cells(
    matrix: np.ndarray,
    levels: np.ndarray,
    names: Sequence[str],
    left: float,
    top: float,
    cell: float,
) -> list[Markup]:
    found = []
    for row, first in enumerate(names):
        for column, second in enumerate(names):
            value = matrix[row, column]
            words = f"{first} with {second}: {number(value, '.2f') if value == value else 'none'}"
            box = {"x": left + column * cell, "y": top + row * cell, "width": cell, "height": cell}
            class_ = level_class(levels[row, column])
            found.append(tag("rect", title(words), class_=class_, **box))
    return found


def level_class(level: int) -> str:
    """The class that colours a coupling of `level` tenths."""
    return f"{'p' if level > 0 else 'n'}{abs(level)}" if level else "p0"


def _runs(levels: np.ndarray, left: float, top: float, cell: float) -> list[Markup]:
    """One path for each level: neighbours of one level in a row are one box."""
    paths: dict[int, list[str]] = {}
    for row, line in enumerate(levels.tolist()):
        start = 0
        for column in range(1, len(line) + 1):
            if column < len(line) and line[column] == line[start]:
                continue
            if line[start]:
                long = column - start
                paths.setdefault(line[start], []).append(f"M{start} {row}h{long}v1h-{long}z")
            start = column
    place = f"translate({left:g} {top:g}) scale({cell:.6g})"
    return [
        tag("path", d="".join(paths[level]), transform=place, class_=level_class(level))
        for level in sorted(paths)
    ]


def coupling_legend() -> Markup:
    """The colours from −1 to 1."""
    boxes = [
        tag("rect", x=10 * place, y=0, width=10, height=10, class_=level_class(place - LEVELS))
        for place in range(2 * LEVELS + 1)
    ]
    texts = [
        tag("text", "−1 opposite", x=0, y=24),
        tag("text", "0", x=105, y=24, class_="mid"),
        tag("text", "1 alike", x=210, y=24, class_="end"),
    ]
    return tag(
        "svg", *boxes, *texts, class_="legend", width=214, height=30, role="img",
        aria_label="Colours: orange is −1, opposite; blank is 0; blue is 1, alike",
    )  # fmt: skip


# -- fronts ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A plan on the axis of a front's budget, its cost where it is the front's cost."""

    shown: Shown
    amount: float
    cost: float | None
    top1: float | None


def front_costs(front: Front, plans: Sequence[Placed]) -> Markup:
    """Predicted cost against what the plans take of the budget; dominated points are hollow."""
    points = front.points
    costs = [one.cost for one in plans if one.cost is not None]
    bounds = [one.bound for one in points if one.bound is not None]
    y = scale_of([*(one.predicted for one in points), *costs, *bounds], log=True, zero=True)
    x = _amounts(front, plans)
    frame = _Frame(x, y)
    parts = frame.axes()
    best = sorted((one.achieved, one.predicted) for one in points if not one.dominated)
    parts += frame.path(best)
    for one in points:
        if one.bound is not None and one.bound < one.predicted and (y.log <= (one.bound > 0)):
            ends = {"y1": frame.y(one.predicted), "y2": frame.y(one.bound)}
            at = percent(frame.x(one.achieved))
            parts.append(tag("line", x1=at, x2=at, class_="stem", **ends))
    for index, one in enumerate(points, 1):
        words = f"point {index}: {_amount_words(front, one.achieved)}, cost {one.predicted:.4g}"
        words += ", dominated" if one.dominated else ""
        words += "" if one.status == "optimal" else f", bound {one.bound:.4g}" if one.bound else ""
        parts.append(frame.point(one.achieved, one.predicted, words, hollow=one.dominated))
    for one in plans:
        words = f"{one.shown.name}: {_amount_words(front, one.amount)}"
        if one.cost is None:
            parts += frame.upright(one.amount, f"{words}, by another cost", one.shown.key or "plan")
        else:
            words += f", cost {one.cost:.4g}"
            parts += frame.plan(one.amount, one.cost, words, one.shown.key)
    label = f"Predicted cost of {len(points)} plans against {front.budget.name}"
    return plot(*parts, height=frame.height, label=label)


def front_accuracy(front: Front, plans: Sequence[Placed], float_top1: float | None) -> Markup:
    """Measured top-1 against the budget, the float network's as a dashed line."""
    found = [(index, one) for index, one in enumerate(front.points, 1) if one.measured]
    values = [one.measured.top1 for _, one in found if one.measured is not None]
    values += [one.top1 for one in plans if one.top1 is not None]
    values += [] if float_top1 is None else [float_top1]
    frame = _Frame(_amounts(front, plans), scale_of(values))
    parts = frame.axes()
    if float_top1 is not None:
        y = frame.y(float_top1)
        parts.append(tag("line", x1=0, x2="100%", y1=y, y2=y, class_="average"))
        parts.append(tag("text", "float", x="100%", y=y - 5, class_="end"))
    parts += frame.path(
        sorted(
            (one.achieved, one.measured.top1)
            for _, one in found
            if one.measured is not None and not one.measured.top1_dominated
        )
    )
    for index, one in found:
        assert one.measured is not None
        hollow = one.measured.top1_dominated
        words = f"point {index}: {_amount_words(front, one.achieved)}, {one.measured.top1:.2f} %"
        words += ", dominated" if hollow else ""
        parts.append(frame.point(one.achieved, one.measured.top1, words, hollow=hollow))
    for one in plans:
        if one.top1 is not None:
            words = f"{one.shown.name}: {_amount_words(front, one.amount)}, {one.top1:.2f} %"
            parts += frame.plan(one.amount, one.top1, words, one.shown.key)
    label = f"Measured top-1 of {len(found)} plans against {front.budget.name}"
    return plot(*parts, height=frame.height, label=label)


def _amounts(front: Front, plans: Sequence[Placed]) -> Scale:
    return scale_of([*(one.achieved for one in front.points), *(one.amount for one in plans)])


def _amount_words(front: Front, amount: float) -> str:
    return f"{front.budget.name} {amount:.4g} {front.budget.unit}".rstrip()


class _Frame:
    """Axes of a chart of points, and what is drawn in them."""

    top, base, height = 14.0, 240.0, 266.0

    def __init__(self, x: Scale, y: Scale) -> None:
        self._x, self._y = x, y

    def x(self, value: float) -> float:
        return self._x(value)

    def y(self, value: float) -> float:
        if self._y.log and value <= 0:
            return self.base
        return self.base - self._y(value) * (self.base - self.top)

    def axes(self) -> list[Markup]:
        parts = [y_axis(self._y, self.top, self.base)]
        parts.append(tag("line", x1=0, x2="100%", y1=self.base, y2=self.base, class_="axis"))
        for value in self._x.ticks():
            at = percent(self.x(value))
            parts.append(tag("line", x1=at, x2=at, y1=self.base, y2=self.base + 5, class_="axis"))
            parts.append(tag("text", number(value), x=at, y=self.base + 20, class_="mid"))
        return parts

    def path(self, points: Sequence[tuple[float, float]]) -> list[Markup]:
        return [
            tag(
                "line",
                x1=percent(self.x(a)),
                y1=self.y(b),
                x2=percent(self.x(c)),
                y2=self.y(d),
                class_="path",
            )
            for (a, b), (c, d) in pairwise(points)
        ]

    def point(self, x: float, y: float, words: str, *, hollow: bool) -> Markup:
        dot = mark("circle", self.x(x), self.y(y), 4.5, "point hollow" if hollow else "point")
        return tag("g", title(words), dot)

    def plan(self, x: float, y: float, words: str, key: str) -> list[Markup]:
        at, height = self.x(x), self.y(y)
        shown = [title(words), mark("diamond", at, height, 6, "plan")]
        if key:
            # Letters stand off the line, which falls (or rises) from left to right.
            place = {"x": percent(at), "dx": 11, "y": height - 7}
            shown.append(tag("text", key, class_="key", **place))
        return [tag("g", *shown)]

    def upright(self, x: float, words: str, key: str) -> list[Markup]:
        at = percent(self.x(x))
        line = tag("line", x1=at, x2=at, y1=self.top, y2=self.base, class_="upright")
        return [
            tag("g", title(words), line, tag("text", key, x=at, y=self.top - 3, class_="mid key"))
        ]
