"""evaluation.json: what `proxyq evaluate --json` printed, read again.

The object carries no schema. What is not known here is left unread, so that a file of a later
version can still be shown.
"""

import os
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proxyq.errors import ProxyqError
from proxyq.files import read_json
from proxyq.search.allocate.plan import Bits, Count, Number, first_problem

Percent = Annotated[Number, Field(ge=0, le=100)]
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Difference(_Record):
    """Two networks on the same images: top-1 of one less the other's, in percentage points.

    `interval` are its ends; `p_holm` is `p_value` corrected for how many were compared.
    """

    difference: Number | None = None
    interval: Interval | None = None
    p_value: Number | None = None
    p_holm: Number | None = None


class VersusFloat(Difference):
    """A plan against the float network, and the images that only one of them gets right."""

    only_float: Count | None = None
    only_plan: Count | None = None


class Comparison(Difference):
    """The network named `first` against the one named `second`."""

    first: str
    second: str


class FloatMeasured(_Record):
    """The float network: top-1 in percent on `n` images."""

    top1: Percent
    n: Count


class NetworkMeasured(_Record):
    """A quantized network: top-1 in percent, size in bits, KL to the float network in nats."""

    top1: Percent
    size_bits: Count
    average_bits: Number
    kl: Number | None = None
    correction: str = "none"
    versus_float: VersusFloat | None = None


class UniformMeasured(NetworkMeasured):
    """The plan of one bit-width for all layers."""

    bits: Bits


class PlanMeasured(NetworkMeasured):
    """A plan, by the file that it was read from."""

    file: str


class EvaluationFile(_Record):
    """Accuracy of plans beside the float network and a uniform plan.

    `classes` is shown as it is: by class, whatever was measured.
    """

    float_: FloatMeasured = Field(alias="float")
    uniform: UniformMeasured | None = None
    plans: list[PlanMeasured] = Field(min_length=1)
    comparisons: list[Comparison] = []
    classes: Any = None

    @classmethod
    def from_json(cls, data: Any, what: str = "evaluation") -> "EvaluationFile":
        """An evaluation from parsed JSON; raises `ProxyqError` naming the first wrong field."""
        if not isinstance(data, dict) or "float" not in data or "plans" not in data:
            raise ProxyqError(
                f"the {what} holds no measured accuracy: it must be the JSON object that "
                "`proxyq evaluate --json` prints, with the fields 'float' and 'plans'."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ProxyqError(f"the {what} has a bad field {first_problem(error)}.") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "EvaluationFile":
        """Read an evaluation; raises `ProxyqError` when it is missing, cut short or wrong."""
        return cls.from_json(read_json(path, "evaluation"), f"evaluation {str(path)!r}")
