"""Naming layers by pattern: shell globs, or `re:` and a regular expression."""

import fnmatch
import re
from collections.abc import Sequence

from proxyq.errors import UsageError, near
from proxyq.search.allocate.problem import check_bits


def matching(pattern: str, names: Sequence[str], option: str) -> tuple[int, ...]:
    """Indices of the layers that `pattern` matches, in layer order.

    `option` is how the error calls the option it came from. A glob must match the whole
    name, a regular expression too. A name itself always matches, whatever signs it holds.

    **Raises** `UsageError` when nothing matches or the expression is broken.
    """
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
        hint = near(pattern, list(names))
        if hint.startswith("known are") and len(names) > 6:
            hint = f"layers are {names[0]!r}, {names[1]!r}, … {names[-1]!r}."
        raise UsageError(f"the pattern {pattern!r} of {option} matches no layer: {hint}")
    return found


def split_bits(text: str, option: str) -> tuple[str, tuple[int, ...]]:
    """`PATTERN=2,4` to the pattern and its bit-widths; `UsageError` when it is not that."""
    pattern, equals, numbers = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"{option} must look like 'PATTERN=8', got {text!r}.")
    try:
        bits = [int(number) for number in numbers.split(",")]
    except ValueError:
        raise UsageError(
            f"{option} must end in bit-widths, like 'PATTERN=8', got {text!r}."
        ) from None
    return pattern.strip(), check_bits(bits, f"{option} {text!r}")
