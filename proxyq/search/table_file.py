"""table.json: plans of one network, and what each was measured to do.

The file is JSON with the tag `"schema": "proxyq/table/1"`, one plan a line. The same run writes
the same bytes.
"""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from proxyq.errors import ProxyqError, shown
from proxyq.files import read_json, write_atomic
from proxyq.quantize import Rounding
from proxyq.record_file import Count, Json, Number, Record, line, record_from

SCHEMA = "proxyq/table/1"
FLOAT_BITS = 32
Width = Annotated[int, Field(ge=1, le=16)]
Side = Annotated[int, Field(ge=1)]
Positive = Annotated[Number, Field(gt=0)]


class TableLayer(Record):
    """A layer's name, weights, and MACs for one image."""

    name: str
    weights: Count
    macs: Count


class TablePlan(Record):
    """A plan that was run: top-1 in percent, mean cross-entropy and KL to float in nats.

    `rescaled` is KL up to the scale of each image's logits. What is not finite is `null`.
    """

    bits: list[Width]
    top1: Number
    loss: Number | None
    kl: Number | None
    rescaled: Number | None
    size_bits: Count
    bops: Count


class FloatNetwork(Record):
    """The float network on the same images."""

    top1: Number
    loss: Number
    images: Count


class TableImages(Record):
    """What the network reads: the shape of an image as it takes it, and the preprocessing.

    See `proxyq.Preprocessing`.
    """

    shape: list[Side] = Field(min_length=3, max_length=3)
    mean: list[Number] = Field(min_length=1)
    std: list[Positive] = Field(min_length=1)
    resize: Side | None
    size: list[Side] | None = Field(min_length=2, max_length=2)


class MeasuredTable(Record):
    """Measured plans of one network.

    - `model`: name, digest and origin; `images`: how to feed it, `None` where it reads none.
    - `method`: the bits that were drawn from, how and by which seed; rounding, correction,
      activation bits, calibration images.
    - `layers`: in the order of every plan's `bits`.
    """

    schema_: Literal["proxyq/table/1"] = Field(SCHEMA, alias="schema")
    model: Json = {}
    images: TableImages | None = None
    method: Json = {}
    float_: FloatNetwork = Field(alias="float")
    layers: list[TableLayer] = Field(min_length=1)
    plans: list[TablePlan] = Field(min_length=1)
    provenance: Json = {}

    @model_validator(mode="after")
    def _is_whole(self) -> "MeasuredTable":
        for index, plan in enumerate(self.plans, 1):
            if len(plan.bits) != len(self.layers):
                raise ValueError(
                    f"plan {index} has bits for {len(plan.bits)} layers, the table has "
                    f"{len(self.layers)}"
                )
        return self

    @model_validator(mode="after")
    def _says_how(self) -> "MeasuredTable":
        correction = self.method.get("correction", "none")
        if not isinstance(correction, str):
            raise ValueError(f"'method.correction' must be text, got {shown(correction)}")
        _ = self.rounding
        return self

    @cached_property
    def rounding(self) -> Rounding:
        """That of the plans' weights."""
        given = self.method.get("rounding") or {}
        try:
            return Rounding(**given)
        except (TypeError, ProxyqError):
            raise ValueError(
                f"'method.rounding' must hold the fields of a rounding, got {shown(given)}"
            ) from None

    @property
    def name(self) -> str:
        """The network's name."""
        return str(self.model.get("name", "network"))

    @cached_property
    def bits(self) -> np.ndarray:
        """`[plans, layers]`."""
        return np.array([plan.bits for plan in self.plans])

    def column(self, name: str) -> np.ndarray:
        """`top1`, `loss`, `kl`, `rescaled`, `size_bits` or `bops` of all plans; NaN for null."""
        values = [getattr(plan, name) for plan in self.plans]
        return np.array([np.nan if value is None else value for value in values], np.float64)

    @property
    def average_bits(self) -> np.ndarray:
        """Average bits per weight of all plans."""
        return self.column("size_bits") / sum(layer.weights for layer in self.layers)

    def to_json(self) -> str:
        """The text of the file."""
        data = self.model_dump(mode="json", by_alias=True)
        parts = []
        for key, value in data.items():
            if key in ("layers", "plans"):
                text = "[\n" + ",\n".join(f"    {line(one)}" for one in value) + "\n  ]"
            else:
                text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
                text = text.replace("\n", "\n  ")
            parts.append(f"  {line(key)}: {text}")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @classmethod
    def from_json(cls, data: Any, what: str = "file") -> "MeasuredTable":
        """A table from parsed JSON; raises `ProxyqError` naming the first wrong field."""
        return record_from(cls, data, what, schema=SCHEMA, holds="table", command="table")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MeasuredTable":
        """Read a table; raises `ProxyqError` when it is missing, cut short or wrong."""
        return cls.from_json(read_json(path, "table"), f"file {str(path)!r}")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table, wholly or not at all."""
        return write_atomic(path, self.to_json())

    def __repr__(self) -> str:
        return f"<MeasuredTable: {len(self.plans)} plans of {self.name}>"
