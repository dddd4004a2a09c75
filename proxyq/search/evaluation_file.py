"""evaluation.json: what `proxyq evaluate --json` printed, read again.

The object carries no schema. What is not known here is left unread, so that a file of a later
version can still be shown.
"""

import os
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from proxyq.errors import LONGEST, ProxyqError
from proxyq.files import read_json
from proxyq.record_file import Bits, Count, GroupSize, Number, first_problem
from proxyq.widths import with_groups

Percent = Annotated[Number, Field(ge=0, le=100)]
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Difference(_Record):
    """Two networks on the same images: top-1 of the second less the first's, in points.

    `interval` are its ends; `p_holm` is `p_value` corrected for how many were compared.
    """

    difference: Number | None = None
    interval: Interval | None = None
    p_value: Number | None = None
    p_holm: Number | None = None


class VersusFloat(Difference):
    """The float network, then a plan; and the images that only one of them gets right."""

    only_float: Count | None = None
    only_plan: Count | None = None


class Comparison(Difference):
    """Two plans by name."""

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
    versus_uniform: Difference | None = None


class UniformMeasured(NetworkMeasured):
    """The plan of one bit-width for all layers, in groups of one size where it has such."""

    bits: Bits
    group_size: GroupSize = None

    @property
    def width(self) -> int | None:
        """`bits` with the group size: `GroupedBits` then."""
        return None if self.bits is None else with_groups(self.bits, self.group_size)


class PlanMeasured(NetworkMeasured):
    """A plan, by the file that it was read from."""

    file: str


class ClassPart(_Record):
    """A network on the images of one class: top-1 in percent, less float's in points."""

    top1: Percent
    difference: Number


class ClassMeasured(_Record):
    """One class: its `n` images, and all networks on them, the plans in their order."""

    class_: int | str = Field(alias="class")
    name: str | None = None
    n: Count
    float_: Percent = Field(alias="float")
    uniform: ClassPart | None = None
    plans: list[ClassPart]


class EvaluationFile(_Record):
    """Accuracy of plans beside the float network and a uniform plan, over all and by class."""

    float_: FloatMeasured = Field(alias="float")
    uniform: UniformMeasured | None = None
    plans: list[PlanMeasured] = Field(min_length=1)
    comparisons: list[Comparison] = []
    classes: list[ClassMeasured] = []

    @model_validator(mode="after")
    def _is_whole(self) -> "EvaluationFile":
        for one in self.classes:
            if len(one.plans) != len(self.plans):
                raise ValueError(
                    f"the class {one.class_!r} must hold {len(self.plans)} plans, as many as there "
                    f"are, got {len(one.plans)}"
                )
        return self

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
            problem = error.errors()[0]
            if not problem["loc"]:
                message = problem["msg"].removeprefix("Value error, ")[: 2 * LONGEST]
                raise ProxyqError(f"the {what} is wrong: {message}.") from None
            raise ProxyqError(f"the {what} has a bad field {first_problem(error)}.") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "EvaluationFile":
        """Read an evaluation; raises `ProxyqError` when it is missing, cut short or wrong."""
        return cls.from_json(read_json(path, "evaluation"), f"evaluation {str(path)!r}")
