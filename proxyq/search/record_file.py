"""What the JSON files of scores, fronts and tables have in common: how one is checked."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from proxyq.errors import LONGEST, ProxyqError, shown
from proxyq.search.allocate.plan import first_problem

R = TypeVar("R", bound=BaseModel)


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
