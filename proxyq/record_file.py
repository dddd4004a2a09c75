"""What the files of plans, scores, fronts and tables have in common: types of fields, how a file is
checked, and how what is wrong is told."""

import json
import sys
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from proxyq.errors import LONGEST, ProxyqError, shown
from proxyq.files import MOST_LEVELS, deeper_than
from proxyq.widths import check_group_size

R = TypeVar("R", bound=BaseModel)


def _bits(value: int | None) -> int | None:
    if value is not None and not (1 <= value <= 8 or value == 16):
        raise ValueError(f"a bit-width must be 1 to 8, 16 or null, got {value}")
    return value


def plain_json(value: dict[str, Any], levels: int = MOST_LEVELS) -> dict[str, Any]:
    """Free-form JSON: finite numbers, text keys, keys sorted at every one of at most `levels`."""
    if deeper_than(value, levels):
        raise ValueError(f"must be nested at most {levels} levels deep")
    try:
        text = json.dumps(value, allow_nan=False, sort_keys=True, ensure_ascii=False)
        text.encode()
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"must be plain JSON without NaN or infinity ({error})") from None


def _usable(value: int | float) -> int | float:
    """Whole numbers in a file may be longer than any that can be reckoned with."""
    if not abs(value) <= sys.float_info.max:
        raise ValueError("input should be a finite number")
    return value


def _group_size(value: int | None) -> int | None:
    return None if value is None else check_group_size(value)


Bits = Annotated[int | None, AfterValidator(_bits)]
GroupSize = Annotated[int | None, AfterValidator(_group_size)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Json = Annotated[dict[str, Any], AfterValidator(plain_json)]
# Not `allow_inf_nan`: of a long whole number, that check makes a float first, which fails.
Number = Annotated[int | float, AfterValidator(_usable)]


class Record(BaseModel):
    """What a file holds: nothing but the fields that are named, of just their types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def record_from(kind: type[R], data: Any, what: str, *, schema: str, holds: str, command: str) -> R:
    """A record from parsed JSON, whose field `schema` must be `schema`.

    `what` names the file, `holds` what should be in it, and `command` what writes such files.

    **Raises** `ProxyqError` naming the first wrong field.
    """
    family = schema.rpartition("/")[0] + "/"
    given = data.get("schema") if isinstance(data, dict) else None
    if isinstance(given, str) and given.startswith(family) and given != schema:
        raise ProxyqError(
            f"the {what} has the schema {shown(given)}, which this version does not read; it "
            f"reads {schema!r}: use the version of proxyq that wrote it."
        )
    if given != schema:
        raise ProxyqError(
            f"the {what} holds no {holds}: it must be a JSON object whose field 'schema' is "
            f"{schema!r}, got {shown(given)}; `proxyq {command}` writes such files."
        )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["loc"]:
            raise ProxyqError(f"the {what} has a bad field {first_problem(error)}.") from None
        message = problem["msg"].removeprefix("Value error, ")[: 2 * LONGEST]
        raise ProxyqError(f"the {what} is wrong: {message}.") from None


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error as `'layers.fc.weight_bits': what is wrong`."""
    problem = error.errors()[0]
    # Branches of unions and names of wrappers are no part of the path that people know; what
    # comes first is always a field.
    wrappers = ("int", "float", "constrained-int")
    path = ".".join(
        str(step) for at, step in enumerate(problem["loc"]) if not at or step not in wrappers
    )[:LONGEST]
    message = " ".join(problem["msg"].removeprefix("Value error, ").split())[: 2 * LONGEST]
    got = problem.get("input")
    if problem["type"] == "missing":
        return f"{path!r}: it is missing"
    if problem["type"] == "extra_forbidden":
        return f"{path!r}: no such field is known"
    if isinstance(got, (str, int, float, bool)) and "got" not in message:
        message += f", got {shown(got)}"
    return f"{path!r}: {message[:1].lower()}{message[1:]}"


def line(value: Any) -> str:
    """A value on one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
