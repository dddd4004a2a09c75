"""What charts are made of: scales, axes, marks.

Charts are as wide as the page: what lies along x is a share of the width, written in percent,
and what lies along y is in pixels. So letters keep their size on a phone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from proxyq.report.markup import Markup, joined, percent, tag

SHAPES = ("circle", "square", "diamond", "triangle")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Scale:
    """Numbers from `low` to `high` as shares from 0 to 1, even or by their logarithms."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers on the scale, about `most` of them."""
        if not self.log:
            return _even_ticks(self.low, self.high, most)
        first, last = (
            math.ceil(math.log10(self.low) - 1e-9),
            math.floor(math.log10(self.high) + 1e-9),
        )
        if last - first >= 2:
            step = -(-(last - first + 1) // most)
            return [10.0**power for power in range(first, last + 1, step)]
        some = [d * 10.0**power for power in range(first - 1, last + 1) for d in (1, 2, 5)]
        inside = [one for one in some if self.low <= one * (1 + 1e-9) and one <= self.high]
        return inside if len(inside) > 1 else _even_ticks(self.low, self.high, most)


def _even_ticks(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(d * power for d in (1, 2, 2.5, 5, 10) if d * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def scale_of(values: Iterable[float], *, log: bool = False, zero: bool = False) -> Scale:
    """The scale on which all values lie, with a little room at the ends.

    `log`: by logarithms where what is positive spans more than a decade; what is not positive
    has no place there. `zero`: from zero on where the scale is even.
    """
    # Within these ends no sum, difference or step between ticks is infinite, or vanishes.
    found = [max(-1e300, min(1e300, float(value))) for value in values if math.isfinite(value)]
    found = [0.0 if abs(value) < 1e-290 else value for value in found] or [0.0]
    positive = [value for value in found if value > 0]
    if log and len(positive) * 2 > len(found) and max(positive) > 10 * min(positive):
        room = (max(positive) / min(positive)) ** 0.04
        return Scale(max(min(positive) / room, 1e-300), min(max(positive) * room, 1e300), True)
    low, high = min(found), max(found)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high == 0:
        return Scale(0.0, 1.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(
        low if zero and low == 0 else low - room, high if zero and high == 0 else high + room
    )


def number(value: float, form: str = ".4g") -> str:
    """A number as people write it: a true minus, powers of ten."""
    text = f"{value:{form}}"
    mantissa, _, power = text.partition("e")
    mantissa = mantissa.replace("-", "−")
    if not power:
        return mantissa
    power = str(int(power)).translate(_SUPERSCRIPTS)
    return f"10{power}" if mantissa == "1" else f"{mantissa}×10{power}"


def tick_text(value: float, scale: Scale) -> str:
    """A number at an axis; far from one, powers of ten on a logarithmic one."""
    power = math.log10(value) if scale.log else 0.0
    if abs(power) > 2.5 and abs(power - round(power)) < 1e-9:
        return f"10{str(round(power)).translate(_SUPERSCRIPTS)}"
    return number(value, ".3g")


def plot(
    *children: Any, height: float, label: str, class_: str = "plot", hidden: bool = False
) -> Markup:
    """A picture as wide as the page; `label` says in words what is to be seen."""
    attributes: dict[str, Any] = {"role": "img", "aria_label": label}
    if hidden:
        attributes = {"aria_hidden": "true"}
    return tag("svg", *children, class_=class_, height=height, width="100%", **attributes)


def y_axis(scale: Scale, top: float, bottom: float, ticks: Sequence[float] | None = None) -> Markup:
    """Lines across with their numbers to the left; `top`, `bottom`: the ends in pixels."""
    marks = []
    for value in scale.ticks() if ticks is None else ticks:
        y = bottom - scale(value) * (bottom - top)
        marks.append(tag("line", x1=0, x2="100%", y1=y, y2=y, class_="grid"))
        text = tick_text(value, scale)
        marks.append(tag("text", text, x=-8, y=y, dy="0.32em", class_="end"))
    return joined(marks)


def mark(shape: str, x: float, y: float, size: float, class_: str) -> Markup:
    """A mark at the share `x` of the width and `y` pixels; `size`: about its radius."""
    if shape == "circle":
        return tag("circle", cx=percent(x), cy=y, r=size, class_=class_)
    s = round(size, 2)
    paths = {
        "square": f"M{-s:g} {-s:g}h{2 * s:g}v{2 * s:g}h{-2 * s:g}z",
        "diamond": f"M0 {-1.4 * s:g}L{1.4 * s:g} 0L0 {1.4 * s:g}L{-1.4 * s:g} 0z",
        "triangle": f"M0 {-1.3 * s:g}L{1.25 * s:g} {s:g}L{-1.25 * s:g} {s:g}z",
    }
    return tag("svg", tag("path", d=paths[shape]), x=percent(x), y=y, class_=class_)


def title(text: str) -> Markup:
    """What is shown when a pointer rests on the element that this is in."""
    return tag("title", text)
