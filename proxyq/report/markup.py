"""HTML and SVG from Python: all text is escaped unless it was made here.

tag("td", "<b>", class_="name")  # <td class="name">&lt;b&gt;</td>
"""

import html
import re
from collections.abc import Iterable
from typing import Any

VOID = frozenset({"meta", "wbr"})
# Neither HTML nor UTF-8 can hold these; JSON's text can.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escaped(text: Any) -> Markup:
    """Text as HTML shows it, also between quotes; `Markup` as it is."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(_FORBIDDEN.sub("\ufffd", str(text))))


def joined(parts: Iterable[Any], between: str = "") -> Markup:
    """Parts one after the other, escaped where they are plain text; `None` is left out."""
    return Markup(between.join(escaped(part) for part in parts if part is not None))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. Attributes: `class_` is class, `aria_label` aria-label; `None` is left out.

    Numbers are written with two decimals at most.
    """
    head = name
    for key, value in attributes.items():
        if value is not None:
            key = key.rstrip("_").replace("_", "-")
            head += f' {key}="{escaped(_short(value))}"'
    inner = joined(children)
    return Markup(f"<{head}>" if name in VOID else f"<{head}>{inner}</{name}>")


def _short(value: Any) -> Any:
    return f"{round(value, 2):g}" if isinstance(value, float) else value


def percent(share: float) -> str:
    """A share as an SVG length, of the width of what it is in."""
    return f"{round(100 * share, 3):g}%"
