"""scores.json: what the choice of bits needs of a network, so that it needs no network.

The file is JSON with the tag `"schema": "proxyq/scores/1"`: the layers, the scores of one or
several proxies, the rounding errors of the weights, and how they came about. No seconds are in
it, and floats are written with all their digits, so the same run writes the same bytes and
what is read back is what was measured.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, ValidationError, model_validator

from proxyq.errors import ProxyqError, UsageError, near, shown
from proxyq.files import read_json, write_atomic
from proxyq.model.layers import Layer
from proxyq.model.live import Step, Tensor
from proxyq.proxies import COSTS, Scores
from proxyq.proxies.cost import WeightErrors
from proxyq.proxies.proxy import MOST
from proxyq.quantize import Rounding
from proxyq.record_file import Count, GroupSize, Json, Record, first_problem, record_from
from proxyq.search.allocate.plan import PlannedProduct, without_scales
from proxyq.search.allocate.problem import check_widths
from proxyq.search.allocate.products import Attention
from proxyq.widths import CHANNEL, check_group_size, groups_of_all, with_groups

SCHEMA = "proxyq/scores/1"
WIDTH = 240
"""Longest line of the file, unless a list takes more."""


def _widths(value: list[int]) -> list[int]:
    return list(check_widths(value, "the file", distinct=False))


def _size_of(text: str) -> int | None:
    """`channel` or `64`."""
    if text == CHANNEL:
        return None
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise ValueError(f"a group size must be a whole number or {CHANNEL!r}, got {shown(text)}")
    return check_group_size(int(text))


def _scales(value: dict[str, int]) -> dict[str, int]:
    for text in value:
        _size_of(text)
    return value


def _activations(value: Any) -> Any:
    if isinstance(value, list) or (isinstance(value, int) and not isinstance(value, bool)):
        check_widths(value if isinstance(value, list) else [value], "`activation_bits`")
    elif value not in (None, "weights"):
        raise ValueError(
            f"must be a bit-width, a list of them, 'weights' or null, got {shown(value)}"
        )
    return value


def _cost(value: str | None) -> str | None:
    if value is not None and value not in COSTS:
        raise ValueError(f"unknown cost {shown(value)}: {near(value, list(COSTS))}")
    return value


def _rounding(value: dict[str, Any]) -> dict[str, Any]:
    try:
        return asdict(Rounding(**value))
    except TypeError:
        raise ValueError(f"must hold the fields of a rounding, got {shown(value)}") from None


def _is_number(value: Any, *, least: float = -MOST) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Compared first: an integer may be longer than what a float can be asked for.
    return plain and least <= value <= MOST and math.isfinite(value)


class ScoredLayer(Record):
    """One layer, as `proxyq.model.layers.Layer`."""

    kind: str
    parameter: str
    weights: Count
    macs: Count
    channels: Count
    output_shape: list[Count]
    group: str | None = None
    shares_input: str | None = None
    scale_bits: Count = 0
    group_scale_bits: Annotated[dict[str, Count], AfterValidator(_scales)] = {}

    def layer(self, name: str) -> Layer:
        """The layer as the allocation and the reports know it."""
        scales = {_size_of(text): count for text, count in self.group_scale_bits.items()}
        own = {"output_shape": tuple(self.output_shape), "group_scale_bits": scales}
        return Layer(name=name, **{**dict(self), **own})


class LiveTensor(Record):
    """A tensor of one image, as `proxyq.model.live.Tensor`."""

    # Below these ends all sums of bits stay exact in 64 bits.
    elements: Annotated[int, Field(ge=0, lt=2**40)]
    bits: Annotated[int, Field(ge=1, le=128)]
    readers: list[str]
    products: list[str] = []


class ScheduledStep(Record):
    """What is live while a layer runs, as `proxyq.model.live.Step`."""

    layer: str | None
    tensors: list[LiveTensor]


class ProxyScores(Record):
    """What one proxy answers: a number (`layers`) or one a bit-width (`layers bits`) by layer.

    - `cost`: how an importance becomes costs unless asked otherwise; null for costs.
    - `images`: whether calibration images were read.
    - `activations`: by layer, a cost for each of the activation bits to choose from.
    - `coupling`: of a pairwise proxy, the rows of its symmetric matrix, each from the diagonal
      on; the choices are every layer's `bits`, then its `activation_bits` to choose from.
    """

    proxy: str = Field(min_length=1)
    shape: Literal["layers", "layers bits"]
    cost: Annotated[str | None, AfterValidator(_cost)] = None
    images: bool
    options: Json = {}
    values: dict[str, Any]
    activations: dict[str, Any] | None = None
    coupling: list[list[Any]] | None = None
    notes: Json = {}


class StoredErrors(Record):
    """`|Q_b(W) - W|^2` for each bit-width and `|W|^2`, by layer."""

    squared: dict[str, Any]
    energy: dict[str, Any]


class ScoreFile(Record):
    """Scores of a network's layers by one or several proxies; see the module's text.

    - `bits`, `activation_bits`: what may be chosen from, the latter as `search` takes it.
    - `group_sizes`: the group size that goes with each of `bits` (null: one grid a channel), where
      there are several to choose from; `group_scale_bits` of the layers tell which they can have.
    - `same_feature`: sets of layers that hand on one tensor.
    - `attention`: the products of two activations, with the bits that budgets count them at; files
      of networks without, and of older versions, have none.
    - `schedule`: which tensors are live when; files of older versions have none.
    - `samples`: how many calibration images there were.
    """

    schema_: Literal["proxyq/scores/1"] = Field(SCHEMA, alias="schema")
    model: Json = {}
    bits: Annotated[list[int], AfterValidator(_widths)]
    group_sizes: list[GroupSize] | None = None
    activation_bits: Annotated[Any, AfterValidator(_activations)] = None
    layers: dict[str, ScoredLayer] = Field(min_length=1)
    same_feature: list[list[str]] = []
    attention: dict[str, PlannedProduct] = {}
    schedule: list[ScheduledStep] | None = Field(None, min_length=1)
    scores: list[ProxyScores] = Field(min_length=1)
    weight_errors: StoredErrors | None = None
    rounding: Annotated[dict[str, Any], AfterValidator(_rounding)]
    samples: Count = 0
    seed: int | None = None
    provenance: Json = {}

    @model_validator(mode="after")
    def _is_whole(self) -> "ScoreFile":
        if self.group_sizes is not None and len(self.group_sizes) != len(self.bits):
            raise ValueError(
                f"'group_sizes' must have an entry for each of the {len(self.bits)} entries of "
                f"'bits', got {len(self.group_sizes)}"
            )
        check_widths(self.widths, "the file")
        found = [one.proxy for one in self.scores]
        if len(set(found)) < len(found):
            raise ValueError("'scores' holds a proxy twice")
        for name in {name for names in self.same_feature for name in names}:
            if name not in self.layers:
                raise ValueError(f"'same_feature' names the layer {name!r}, which is not there")
        for step in self.schedule or ():
            for name in (step.layer, *(name for one in step.tensors for name in one.readers)):
                if name is not None and name not in self.layers:
                    raise ValueError(f"'schedule' names the layer {name!r}, which is not there")
            for name in (name for one in step.tensors for name in one.products):
                if name not in self.attention:
                    raise ValueError(f"'schedule' names the product {name!r}, which is not there")
        beside = self.activation_bits if isinstance(self.activation_bits, list) else []
        for one in self.scores:
            where, per_bit = f"the scores of {one.proxy!r}", one.shape == "layers bits"
            self._check(one.values, len(self.bits) if per_bit else None, where, signed=per_bit)
            if one.activations is not None:
                self._check(one.activations, len(beside), f"{where} (activations)", signed=True)
            if one.coupling is not None:
                kinds = len(self.bits) + (0 if one.activations is None else len(beside))
                self._check_coupling(one.coupling, len(self.layers) * kinds, where)
            if not per_bit and one.cost is None:
                raise ValueError(f"{where} need a 'cost', for they are no costs yet")
            if not per_bit and self.weight_errors is None:
                raise ValueError(f"{where} need 'weight_errors', which is missing")
        if self.weight_errors is not None:
            self._check(self.weight_errors.squared, len(self.bits), "'weight_errors.squared'")
            self._check(self.weight_errors.energy, None, "'weight_errors.energy'")
        return self

    def _check(
        self, table: Mapping[str, Any], columns: int | None, what: str, *, signed: bool = False
    ) -> None:
        """Every layer must have a number, or as many as there are `columns`."""
        for name in table:
            if name not in self.layers:
                raise ValueError(f"{what} name the layer {name!r}, which is not there")
        least = -MOST if signed else 0.0
        words = "finite number" if signed else "finite number of at least 0"
        for name in self.layers:
            if name not in table:
                raise ValueError(f"{what} say nothing of the layer {name!r}")
            value = table[name]
            if columns is None and not _is_number(value, least=least):
                raise ValueError(
                    f"{what} must be a {words} for the layer {name!r}, got {shown(value)}"
                )
            if columns is not None and not (
                isinstance(value, list)
                and len(value) == columns
                and all(_is_number(one, least=least) for one in value)
            ):
                raise ValueError(
                    f"{what} must be {columns} {words.replace('number', 'numbers')} for the "
                    f"layer {name!r}, got {shown(value)}"
                )

    def _check_coupling(self, rows: list[list[Any]], choices: int, what: str) -> None:
        if [len(row) for row in rows] != list(range(choices, 0, -1)):
            raise ValueError(
                f"{what} must have a 'coupling' of {choices} rows, each from the diagonal on"
            )
        for number, row in enumerate(rows):
            if not all(map(_is_number, row)):
                raise ValueError(
                    f"{what}: 'coupling' must hold finite numbers, and row {number} does not"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """`bits` with the group sizes that go with them: `GroupedBits` there."""
        return tuple(map(with_groups, self.bits, self.group_sizes or [None] * len(self.bits)))

    @property
    def proxies(self) -> tuple[str, ...]:
        """Whose scores there are."""
        return tuple(one.proxy for one in self.scores)

    def network_layers(self) -> tuple[Layer, ...]:
        """The layers as the allocation and the reports know them."""
        return tuple(layer.layer(name) for name, layer in self.layers.items())

    def steps(self) -> tuple[Step, ...] | None:
        """Which tensors are live when, for budgets on memory; `None` where the file is older."""
        if self.schedule is None:
            return None
        return tuple(
            Step(
                layer=step.layer,
                tensors=tuple(
                    Tensor(
                        elements=one.elements,
                        bits=one.bits,
                        readers=tuple(one.readers),
                        products=tuple(one.products),
                    )
                    for one in step.tensors
                ),
            )
            for step in self.schedule
        )

    def record(self, proxy: str | None = None) -> ProxyScores:
        """What is kept of a proxy; its name may be left out where there is one only.

        **Raises** `UsageError` naming those that there are.
        """
        known = ", ".join(self.proxies)
        if proxy is None and len(self.scores) > 1:
            raise UsageError(
                f"the scores are of several proxies: name one of {known} as `proxy` (--proxy)."
            )
        if proxy is None:
            return self.scores[0]
        for one in self.scores:
            if one.proxy == proxy:
                return one
        raise UsageError(f"there are no scores of {proxy!r}: {near(proxy, list(self.proxies))}")

    def of(self, proxy: str | None = None) -> Scores:
        """A proxy's scores; which one may be left out where there is one only."""
        one, layers = self.record(proxy), self.network_layers()
        beside = self.activation_bits if isinstance(self.activation_bits, list) else ()
        return Scores(
            proxy=one.proxy,
            layers=layers,
            bits=self.widths,
            values=_array(one.values, self.layers),
            cost=one.cost or "linear-bits",
            activations=None if one.activations is None else _array(one.activations, self.layers),
            activation_bits=tuple(beside),
            coupling=None if one.coupling is None else _symmetric(one.coupling),
            options=dict(one.options),
            notes=dict(one.notes),
        )

    def errors(self) -> WeightErrors | None:
        """The rounding errors of the weights; `None` where no score needs them."""
        if self.weight_errors is None:
            return None
        return WeightErrors(
            squared=_array(self.weight_errors.squared, self.layers),
            energy=_array(self.weight_errors.energy, self.layers),
        )

    def to_json(self) -> str:
        """The text of the file: stable, a line per layer."""
        data = self.model_dump(mode="json", by_alias=True)
        for optional in ("schedule", "group_sizes"):
            if data[optional] is None:
                del data[optional]
        without_scales(data["layers"])
        if not self.attention:
            del data["attention"]
        for step in data.get("schedule") or ():
            for tensor in step["tensors"]:
                if not tensor["products"]:
                    del tensor["products"]
        return _text(data, "") + "\n"

    @classmethod
    def from_json(cls, data: Any, what: str = "file") -> "ScoreFile":
        """Scores from parsed JSON; raises `ProxyqError` naming the first wrong field."""
        return record_from(cls, data, what, schema=SCHEMA, holds="scores", command="score")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ScoreFile":
        """Read scores; raises `ProxyqError` when they are missing, cut short or wrong."""
        return cls.from_json(read_json(path, "scores"), f"file {str(path)!r}")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the scores, wholly or not at all."""
        return write_atomic(path, self.to_json())

    def __repr__(self) -> str:
        return f"<ScoreFile: {len(self.layers)} layers, {', '.join(self.proxies)}>"

    def __str__(self) -> str:
        """A table for each proxy, the most sensitive layer first."""
        return "\n\n".join(f"{name}\n{self.of(name)}" for name in self.proxies)


def score_file(
    scores: Sequence[Scores],
    *,
    images: Sequence[bool],
    model: Mapping[str, Any],
    same_feature: Sequence[Sequence[str]],
    schedule: Sequence[Step],
    attention: Attention,
    activation_bits: Any,
    errors: WeightErrors | None,
    rounding: Rounding,
    samples: int,
    seed: int | None,
    provenance: Mapping[str, Any],
) -> ScoreFile:
    """The file of `scores`, all of the same layers and bit-widths; `images` as they were read.

    **Raises** `ProxyqError` when a proxy's options or notes are no plain JSON.
    """
    layers = scores[0].layers
    names = [layer.name for layer in layers]

    def by_layer(table: np.ndarray) -> dict[str, Any]:
        return dict(zip(names, np.asarray(table, np.float64).tolist(), strict=True))

    records = []
    for one, read in zip(scores, images, strict=True):
        try:
            records.append(
                ProxyScores(
                    proxy=one.proxy,
                    shape=one.shape,
                    cost=one.cost if one.shape == "layers" else None,
                    images=read,
                    options=dict(one.options),
                    values=by_layer(one.values),
                    activations=None if one.activations is None else by_layer(one.activations),
                    coupling=None
                    if one.coupling is None
                    else [row[i:].tolist() for i, row in enumerate(one.coupling)],
                    notes=dict(one.notes),
                )
            )
        except ValidationError as error:
            raise ProxyqError(
                f"the answer of the proxy {one.proxy!r} cannot be written: {first_problem(error)}."
            ) from None
    return ScoreFile(
        schema=SCHEMA,
        model=dict(model),
        bits=[int(b) for b in scores[0].bits],
        group_sizes=None if (sizes := groups_of_all(scores[0].bits)) is None else list(sizes),
        activation_bits=list(activation_bits)
        if isinstance(activation_bits, tuple)
        else activation_bits,
        layers={
            layer.name: ScoredLayer(
                kind=layer.kind,
                parameter=layer.parameter,
                weights=int(layer.weights),
                macs=int(layer.macs),
                channels=int(layer.channels),
                output_shape=[int(side) for side in layer.output_shape],
                group=layer.group,
                shares_input=layer.shares_input,
                scale_bits=int(layer.scale_bits),
                group_scale_bits={
                    CHANNEL if size is None else str(size): count
                    for size, count in layer.group_scale_bits.items()
                },
            )
            for layer in layers
        },
        same_feature=[list(together) for together in same_feature],
        attention={
            name: PlannedProduct(bits=own.bits, macs=own.macs) for name, own in attention.items()
        },
        schedule=[_scheduled(step) for step in schedule],
        scores=records,
        weight_errors=None
        if errors is None
        else StoredErrors(squared=by_layer(errors.squared), energy=by_layer(errors.energy)),
        rounding=asdict(rounding),
        samples=samples,
        seed=seed,
        provenance=dict(provenance),
    )


def _scheduled(step: Step) -> ScheduledStep:
    tensors = [
        LiveTensor(
            elements=one.elements,
            bits=one.bits,
            readers=list(one.readers),
            products=list(one.products),
        )
        for one in step.tensors
    ]
    return ScheduledStep(layer=step.layer, tensors=tensors)


def _symmetric(rows: Sequence[Sequence[float]]) -> np.ndarray:
    matrix = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        matrix[i, i:] = matrix[i:, i] = row
    return matrix


def _array(table: Mapping[str, Any], names: Mapping[str, Any]) -> np.ndarray:
    return np.asarray([table[name] for name in names], np.float64)


def _text(value: Any, indent: str) -> str:
    """JSON in as few lines as fit; lists of plain values always on one."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(indent) + len(line) <= WIDTH or not isinstance(value, (dict, list)) or not value:
        return line
    deeper = indent + "  "
    if isinstance(value, list):
        if not any(isinstance(item, (dict, list)) for item in value):
            return line
        items = [f"{deeper}{_text(item, deeper)}" for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    items = [
        f"{deeper}{json.dumps(key, ensure_ascii=False)}: {_text(item, deeper)}"
        for key, item in value.items()
    ]
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"
