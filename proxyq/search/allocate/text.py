"""Text for terminals: what plans and assignments print, 88 columns wide."""

from collections.abc import Sequence

WIDTH = 88


def wrapped(parts: Sequence[str]) -> list[str]:
    """Parts joined by ` · `, on as many lines as they need."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]} · {part}"
        lines = [*lines[:-1], longer] if len(longer) <= WIDTH else [*lines, part]
    return lines


def elided(name: str, width: int) -> str:
    """`name`, its middle left out where it is longer than `width`."""
    if len(name) <= width:
        return name
    head = (width - 1) // 2
    return f"{name[:head]}…{name[head + 1 - width :]}"
