"""The errors that proxyq raises on purpose: one clear sentence each, and an exit code."""

from typing import Any

LONGEST = 200
"""Signs of a stranger's text that a sentence holds."""


class ProxyqError(Exception):
    """Something could not be done; the message is one sentence with a remedy.

    The command line prints the message alone, without a traceback, and exits with
    `exit_code`.
    """

    exit_code = 1


class UsageError(ProxyqError, ValueError):
    """An argument is wrong: which one, what it must be, and what it was."""

    exit_code = 2


class MissingExtra(ProxyqError, ImportError):
    """An optional package is not installed; the message holds the install line."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: "
            f"run `pip install 'proxyq[{extra}]'`."
        )


class MissingOperators(ProxyqError):
    """A model uses operators that the bridge cannot run.

    `operators` maps each to how often it is used and the module that uses it first.
    """

    def __init__(self, message: str, operators: "dict[str, tuple[int, str]]"):
        super().__init__(message)
        self.operators = operators


def near(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """`did you mean …?` for a mistyped name, or the list of what there is."""
    import difflib

    # Upper for lower case is the nearest there can be, though no sign may be the same.
    close = [one for one in known if one.lower() == name.lower()] or difflib.get_close_matches(
        name, known, n=3, cutoff=0.5
    )
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    return "known are " + ", ".join(sorted(known)) + "."


def shown(value: Any) -> str:
    """A value from a file as it stands in a sentence: short, on one line."""
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) > 10**30:
        return "a long number"
    return repr(value[:80] if isinstance(value, (str, bytes)) else value)[:LONGEST]


def reason(error: BaseException) -> str:
    """What an error of another library says, as it stands within a sentence: short, one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= LONGEST else text[:LONGEST] + " …").rstrip(".")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, where the others tell of its inner life."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[0].split()) if lines else type(error).__name__
    return (text if len(text) <= LONGEST else text[:LONGEST] + " …").rstrip(".:")


def kind_and_line(error: BaseException) -> str:
    """`KeyError: 'width'`: an error's kind too, where the first line may be a bare word."""
    line, kind = first_line(error), type(error).__name__
    return line if line == kind else f"{kind}: {line}"
