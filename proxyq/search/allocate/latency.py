"""Latency tables: what each layer takes at each pair of bit-widths, measured by whoever asks.

The file is JSON with the tag `"schema": "proxyq/latency/1"`:

    {"schema": "proxyq/latency/1", "device": "T4, batch 8", "other_seconds": 1e-4,
     "layers": {"conv1": [{"weight_bits": 4, "activation_bits": 4, "seconds": 2.1e-4}, ...]}}

`activation_bits` null means float activations; `other_seconds` is what the network takes beside
its layers, at any bits. Seconds are taken as the decimals that the file holds and become
whole picoseconds, rounded up, so that no budget is granted more than was measured.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from proxyq.errors import ProxyqError, shown
from proxyq.files import read_json
from proxyq.record_file import Bits, Number, first_problem
from proxyq.search.allocate.budget import PICOSECONDS
from proxyq.search.allocate.problem import check_widths

SCHEMA = "proxyq/latency/1"
Seconds = Annotated[Number, Field(ge=0, lt=1e6)]


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Whole picoseconds by layer and (weight bits, activation bits); `None` is float.

    `other` is what the network takes beside its layers; `name` is how messages call the table.
    """

    name: str
    layers: Mapping[str, Mapping[tuple[int, int | None], int]]
    other: int = 0
    device: str = ""

    def of(self, layer: str, bits: int, activation_bits: int | None) -> int | None:
        """Picoseconds of a layer, `None` where they were not measured."""
        return self.layers.get(layer, {}).get((bits, activation_bits))


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Measured(_Record):
    weight_bits: Annotated[int, AfterValidator(lambda b: check_widths([b], "the table")[0])]
    activation_bits: Bits = None
    seconds: Seconds


class _File(_Record):
    schema_: Literal["proxyq/latency/1"] = Field(alias="schema")
    device: str = ""
    other_seconds: Seconds = 0
    layers: dict[str, list[_Measured]] = Field(min_length=1)


def load_latency(path: str | os.PathLike[str]) -> LatencyTable:
    """Read a latency table.

    **Raises** `ProxyqError` when it is missing, cut short, wrong, or says a thing twice.
    """
    name = str(path)
    data = read_json(path, "latency table")
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise ProxyqError(
            f"{name!r} is no latency table: its field 'schema' must be {SCHEMA!r}, got "
            f"{shown(found)}."
        )
    try:
        file = _File.model_validate(data)
    except ValidationError as error:
        raise ProxyqError(
            f"the latency table {name!r} has a bad field {first_problem(error)}."
        ) from None
    layers: dict[str, dict[tuple[int, int | None], int]] = {}
    for layer, rows in file.layers.items():
        times = layers.setdefault(layer, {})
        for row in rows:
            key = (row.weight_bits, row.activation_bits)
            if key in times:
                raise ProxyqError(
                    f"the latency table {name!r} gives layer {layer!r} at {key[0]} weight bits and "
                    f"{key[1] or 'float'} activation bits twice."
                )
            times[key] = _picoseconds(row.seconds)
    return LatencyTable(
        name=name, layers=layers, other=_picoseconds(file.other_seconds), device=file.device
    )


def _picoseconds(seconds: float) -> int:
    # The shortest decimal of a float is what was written, up to 17 digits.
    return math.ceil(Fraction(repr(seconds)) * PICOSECONDS["s"])
