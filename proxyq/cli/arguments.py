"""Text of options to values: numbers, sizes, shapes, `KEY=VALUE`."""

import re
from collections.abc import Iterable
from typing import Any

from proxyq.errors import UsageError


def numbers(text: str, option: str, *, kind: type = int) -> tuple[Any, ...]:
    """`3,224,224` to numbers; `x` between them does as well for whole ones."""
    parts = re.split(r"[,x]" if kind is int else ",", text.strip().strip("()[]"))
    try:
        values = tuple(kind(part) for part in parts)
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{option} must be {what} with commas between, got {text!r}.") from None
    if any(value != value or abs(value) == float("inf") for value in values):
        raise UsageError(f"{option} must be finite numbers, got {text!r}.")
    return values


def positive_numbers(text: str, option: str, *, most: int | None = None) -> tuple[int, ...]:
    """Whole numbers of at least 1, as many as `most`."""
    values = numbers(text, option)
    if any(value < 1 for value in values) or (most is not None and len(values) > most):
        some = "" if most is None else f"at most {most} "
        raise UsageError(f"{option} must be {some}whole numbers of at least 1, got {text!r}.")
    return values


def activation_bits(text: str | None) -> int | tuple[int, ...] | str | None:
    """`8`, `4,8`, `weights` or `float`."""
    if text in (None, "weights", "float"):
        return text
    try:
        values = numbers(text, "--activation-bits")
    except UsageError:
        raise UsageError(
            "--activation-bits must be a bit-width, several with commas between, 'weights' or "
            f"'float', got {text!r}."
        ) from None
    return values[0] if len(values) == 1 else values


def attention_bits(text: str | None) -> int | str | None:
    """`8` or `float`."""
    if text in (None, "float"):
        return text
    try:
        (value,) = numbers(text, "--attention-bits")
    except (UsageError, ValueError):
        raise UsageError(
            f"--attention-bits must be one bit-width or 'float', got {text!r}."
        ) from None
    return value


def group_sizes(text: str | None) -> int | tuple[int | None, ...] | None:
    """`64`, or several with `channel` among them: `channel,64`."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    try:
        sizes = tuple(None if part == "channel" else int(part) for part in parts)
    except ValueError:
        raise UsageError(
            "--group-size must be a whole number such as 64, or several to choose from, such as "
            f"channel,64, got {text!r}."
        ) from None
    return sizes[0] if len(sizes) == 1 else sizes


def key_values(texts: Iterable[str] | None, option: str) -> dict[str, Any]:
    """`KEY=VALUE` texts to a dictionary; values that look like numbers or truths are those."""
    found: dict[str, Any] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(f"{option} must look like KEY=VALUE, got {text!r}.")
        if key in found:
            raise UsageError(f"{option} gives {key!r} twice.")
        found[key] = _value(value.strip())
    return found


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def byte_count(text: str, option: str) -> int:
    """`4GiB`, `512MB` or a number of bytes."""
    from proxyq.search.allocate.budget import BYTES

    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): count for unit, count in BYTES.items()}
    unit = match[2].lower() if match else ""
    if match is None or (unit and unit not in units) or not float(match[1]) > 0:
        raise UsageError(f"{option} must be an amount such as 4GiB or 512MB, got {text!r}.")
    return int(float(match[1]) * units.get(unit, 1))
