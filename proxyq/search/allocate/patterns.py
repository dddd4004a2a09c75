"""Naming layers by pattern: shell globs, `re:` and a regular expression, `@first`, `@last`."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from proxyq.errors import UsageError, near
from proxyq.search.allocate.problem import check_widths
from proxyq.widths import group_of, parse

# Positions: the first and the last layer in execution order, whatever they are called.
POSITIONS = {"@first": 0, "@last": -1}
FLOAT = "float"


def matching(pattern: str, names: Sequence[str], option: str) -> tuple[int, ...]:
    """Indices of the layers that `pattern` matches, in layer order.

    `option` is how the error calls the option it came from. A glob must match the whole
    name, a regular expression too. A name itself always matches, whatever signs it holds.
    `@first` and `@last` are the layers at the ends of `names`.

    **Raises** `UsageError` when nothing matches or the expression is broken.
    """
    if pattern in POSITIONS and pattern not in names:
        return (range(len(names))[POSITIONS[pattern]],)
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise UsageError(
                f"the pattern {pattern!r} of {option} is not a regular expression: {error}."
            ) from error
        found = tuple(i for i, name in enumerate(names) if expression.fullmatch(name))
    else:
        found = tuple(
            i
            for i, name in enumerate(names)
            if name == pattern or fnmatch.fnmatchcase(name, pattern)
        )
    if not found:
        hint = near(pattern, list(POSITIONS) if pattern.startswith("@") else list(names))
        if hint.startswith("known are") and len(names) > 6:
            hint = f"layers are {names[0]!r}, {names[1]!r}, … {names[-1]!r}."
        raise UsageError(f"the pattern {pattern!r} of {option} matches no layer: {hint}")
    return found


def overridden_pins(pins: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """Pins without effect, each with the later pin that holds its last layer otherwise.

    Where several pins match a layer the last one wins: one that is left with none, and wanted
    something else, contradicts the others.
    """
    held = [split_pin(pin) for pin in pins]
    owner = {i: k for k, one in enumerate(held) for i in matching(one.pattern, names, "a pin")}
    found = []
    for k, one in enumerate(held):
        layers = matching(one.pattern, names, "a pin")
        others = [owner[i] for i in layers if pins[owner[i]] != pins[k]]
        same = [other for other in others if _wish(held[other]) == _wish(one)]
        if len(others) == len(layers) and not same:
            found.append((pins[k], pins[others[-1]]))
    return found


def split_bits(text: str, option: str) -> tuple[str, tuple[int, ...]]:
    """`PATTERN=2,4` to the pattern and its bit-widths; `UsageError` when it is not that.

    `4g64` is four bits for weights in groups of 64.
    """
    pattern, equals, numbers = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"{option} must look like 'PATTERN=8', got {text!r}.")
    try:
        bits = [parse(number) for number in numbers.split(",")]
    except UsageError as error:
        raise UsageError(f"{option} {text!r} cannot be met: {error}") from None
    except ValueError:
        raise UsageError(
            f"{option} must end in bit-widths, like 'PATTERN=8', got {text!r}."
        ) from None
    return pattern.strip(), check_widths(bits, f"{option} {text!r}")


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a pin holds its layers at.

    `bits` bring the group size that a pin names. `activation_bits` is read where `both`: `None` is
    float then. Else activations stay open.
    """

    pattern: str
    bits: int
    activation_bits: int | None = None
    both: bool = False


def _wish(held: "Held") -> tuple[int, int | None, bool]:
    return held.bits, held.activation_bits, held.both


def split_pin(text: str) -> Held:
    """`PATTERN=8`, `PATTERN=8g64` or `PATTERN=8/4` (weights/activations, these also `float`)."""
    pattern, equals, wanted = text.rpartition("=")
    weight, slash, activation = wanted.partition("/") if equals else ("", "", "")
    pattern, bits = split_bits(f"{pattern}={weight}" if slash else text, "a pin")
    if len(bits) != 1 or "," in activation:
        raise UsageError(
            f"a pin names one bit-width, got {text!r}; give several as candidates instead."
        )
    if not slash:
        return Held(pattern=pattern, bits=bits[0])
    if activation.strip() == FLOAT:
        return Held(pattern=pattern, bits=bits[0], both=True)
    try:
        checked = check_widths([int(activation)], f"a pin {text!r}")
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"a pin must end in weight and activation bits, like 'PATTERN=8/4', got {text!r}."
        ) from None
    return Held(pattern=pattern, bits=bits[0], activation_bits=checked[0], both=True)


def pinned_sizes(pins: Sequence[str]) -> tuple[int, ...]:
    """The group sizes that pins name, each once."""
    sizes = (group_of(split_pin(pin).bits) for pin in pins)
    return tuple(dict.fromkeys(size for size in sizes if size is not None))
