"""Formula files, and the shelf that holds those published and found: `proxies/`.

The file is JSON with the tag `"schema": "proxyq/formula/1"`. The formula itself is text of
`text.py`, which is parsed and never run. Written twice from the same formula it is the same bytes.
"""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from proxyq.errors import ProxyqError, UsageError, near, shown
from proxyq.files import read_json, write_atomic
from proxyq.proxies.formula.grammar import Node, rooted
from proxyq.proxies.formula.text import parse_formula
from proxyq.record_file import Record, plain_json
from proxyq.shelf import shelf

SCHEMA = "proxyq/formula/1"
SHELVES = ("published", "evolved")
MAX_BYTES = 1_000_000
MAX_LEVELS = 20


def _formula(text: str) -> str:
    parse_formula(text)
    return text


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be text that UTF-8 can write") from None
    return text


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return plain_json(value, MAX_LEVELS)


class Formula(Record):
    """A formula with its name, and how its numbers are to be read.

    - `total`: whether a plan's score is the `sum` or the `mean` of its layers' numbers.
    - `direction`: a `cost` is the higher the more is lost; an `importance` is the higher the more
      bits the layer deserves, and where it depends on bits, the higher the better the plan.
    - `origin`: where it comes from, as free JSON: the source, or seed and fitness of a search.
    """

    schema_: Literal["proxyq/formula/1"] = Field(SCHEMA, alias="schema")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$")]
    formula: Annotated[str, AfterValidator(_formula)]
    total: Literal["sum", "mean"] = "sum"
    direction: Literal["cost", "importance"]
    origin: Annotated[dict[str, Any], AfterValidator(_plain)] = Field(default_factory=dict)
    note: Annotated[str, AfterValidator(_text)] = ""

    @cached_property
    def node(self) -> Node:
        """The tree, its root of type `layer`."""
        return rooted(parse_formula(self.formula))

    def to_json(self) -> str:
        """The text of the file."""
        data = self.model_dump(mode="json", by_alias=True)
        return json.dumps(data, ensure_ascii=False, allow_nan=False, indent=2) + "\n"

    @classmethod
    def from_json(cls, data: Any, what: str = "file") -> "Formula":
        """A formula from parsed JSON; raises `ProxyqError` naming the first wrong field."""
        schema = data.get("schema") if isinstance(data, dict) else None
        if isinstance(schema, str) and schema.startswith("proxyq/formula/") and schema != SCHEMA:
            raise ProxyqError(
                f"the {what} has the schema {schema[:80]!r}, which this version does not read; it "
                f"reads {SCHEMA!r}: use the version of proxyq that wrote it."
            )
        if schema != SCHEMA:
            raise ProxyqError(
                f"the {what} holds no formula: it must be a JSON object whose field 'schema' is "
                f"{SCHEMA!r}, got {shown(schema)}."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ProxyqError(f"the {what} has a bad field {_first_problem(error)}.") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Formula":
        """Read a formula; raises `ProxyqError` when it is missing, too long, cut short or wrong."""
        path = Path(path)
        try:
            size = path.stat().st_size if path.is_file() or not path.exists() else None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ProxyqError(f"cannot read the formula {str(path)!r} ({reason}).") from None
        if size is None:
            raise ProxyqError(f"cannot read the formula {str(path)!r} (it is no regular file).")
        if size > MAX_BYTES:
            raise ProxyqError(
                f"the formula {str(path)!r} must have at most {MAX_BYTES} bytes, got {size}: give "
                "a file that proxyq wrote."
            )
        return cls.from_json(read_json(path, "formula"), f"file {str(path)!r}")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the formula, wholly or not at all."""
        return write_atomic(path, self.to_json())


def available_formulas() -> dict[str, Path]:
    """The formulas on the shelf by name: those published, then those found, each sorted."""
    root = shelf("proxies")
    files = [file for part in SHELVES for file in sorted((root / part).glob("*.json"))]
    found: dict[str, Path] = {}
    for file in files:
        found.setdefault(file.stem, file)
    return found


def load_formula(path_or_name: str | os.PathLike[str]) -> Formula:
    """A formula from the shelf by name, or from a file (a path, or a name ending in `.json`).

    **Raises** `UsageError` for an unknown name, with near misses; `ProxyqError` for a file that
    cannot be read or has a wrong field, which it names.
    """
    text = os.fspath(path_or_name)
    if text.endswith(".json") or os.sep in text:
        return Formula.load(text)
    known = available_formulas()
    if text not in known:
        raise UsageError(f"unknown formula {text[:80]!r}: {near(text[:80], list(known))}")
    return Formula.load(known[text])


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    path = ".".join(map(str, problem["loc"]))[:80]
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    if problem["type"] == "missing":
        return f"{path!r}: it is missing"
    if problem["type"] == "extra_forbidden":
        return f"{path!r}: no such field is known"
    got = problem.get("input")
    if (
        isinstance(got, (str, int, float, bool))
        and "got" not in message
        and path not in ("formula", "note")
    ):
        message += f", got {shown(got)}"
    return f"{path!r}: {message[:1].lower()}{message[1:]}"
