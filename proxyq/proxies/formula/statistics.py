"""What formulas read of all layers of a network, in flat arrays with the places of the layers.

Of a large layer some entries stand for all: positions of the fan-in at a fixed stride, each with
all its output channels, from a start that the seed draws. Sums are scaled by how many were left
out, which makes `sum` (and the square of `norm`) an unbiased estimate; `max` is that of the
entries kept.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from proxyq.errors import UsageError
from proxyq.proxies.formula.grammar import STATISTICS

ENTRIES = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class Segments:
    """Which entries of a flat array belong together: those of each layer, and of each row.

    - `counts`, `[layers]`: entries of each layer; `scale`, `[layers]`: entries of the whole layer
      over those kept.
    - `row_counts`, `[rows]`: entries of each row; a softmax goes over a row.
    """

    counts: np.ndarray
    scale: np.ndarray
    row_counts: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each layer begins, `[layers]`."""
        return np.cumsum(self.counts) - self.counts

    @cached_property
    def row_starts(self) -> np.ndarray:
        """Where each row begins, `[rows]`."""
        return np.cumsum(self.row_counts) - self.row_counts

    @cached_property
    def size(self) -> int:
        """All entries."""
        return int(self.counts.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """What formulas read, of all layers of a network; make one with `build`.

    - `leaves`: `[entries]` by name, and `[bits, entries]` for those that depend on bits; of type
      `layer`, `[layers]` and `[bits, layers]`, and `[bits, 1]` for `bits`.
    - `segments`: how entries lie, of the types `weight` and `activation`.
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    leaves: Mapping[str, np.ndarray]
    segments: Mapping[str, Segments]

    @classmethod
    def build(
        cls,
        layers: Mapping[str, Mapping[str, Any]],
        bits: Sequence[int],
        *,
        entries: int | None = ENTRIES,
        seed: int = 0,
    ) -> "Statistics":
        """Statistics from arrays for each layer, by name of layer and leaf.

        - `W`, `G`, `F`, `V`, `H`: `[fan_in, channels]`; `D`: `[bits, fan_in, channels]`.
        - `A`: `[values]`; `E`: `[bits, values]`; `activations`: of how many values `A` is a
          sample (all, unless told).
        - `O`, `R`: `[bits]`.
        - `weights`, `macs`: numbers; `weights` is counted where a weight is given.
        - `entries`: how many of a layer are kept at most, though always one row of channels;
          `None` keeps all. `seed` draws where the kept ones begin.

        **Raises** `UsageError` naming layer and leaf for what is missing in one layer, has the
        wrong shape, or is not finite.
        """
        if not layers or not bits:
            raise UsageError("statistics must have at least one layer and one bit-width.")
        if entries is not None and entries < 1:
            raise UsageError(f"`entries` must be at least 1, or None for all, got {entries}.")
        names = _given(layers)
        rng = np.random.default_rng(seed)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        kept: dict[str, list[_Kept]] = {"weight": [], "activation": []}
        for layer, given in layers.items():
            phase = float(rng.random())  # drawn for each layer, whatever it holds
            for name in (name for name in names if STATISTICS[name].type == "layer"):
                parts[name].append(_of_layer(given[name], name, layer, len(bits)))
            for kind, found in kept.items():
                own = [name for name in names if STATISTICS[name].type == kind]
                if own:
                    found.append(_kept(layer, given, own, kind, len(bits), entries, phase))
                    for name, values in found[-1].values.items():
                        parts[name].append(values)
        leaves = {name: np.concatenate(found, axis=-1) for name, found in parts.items()}
        if "weights" not in leaves and kept["weight"]:
            leaves["weights"] = np.asarray([one.whole for one in kept["weight"]])
        leaves["bits"] = np.asarray(bits, np.float64)[:, None]
        segments = {
            kind: Segments(
                counts=np.asarray([sum(one.rows) for one in found]),
                scale=np.asarray([one.whole / sum(one.rows) for one in found]),
                row_counts=np.asarray([count for one in found for count in one.rows]),
            )
            for kind, found in kept.items()
            if found
        }
        return cls(layers=tuple(layers), bits=tuple(bits), leaves=leaves, segments=segments)


def _given(layers: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The leaves that layers are given, in the order of `STATISTICS`: all have the same."""
    first, *others = layers
    for name in layers[first]:
        if name == "bits" or (name not in STATISTICS and name != "activations"):
            raise UsageError(
                f"layer {first!r} must be given statistics of "
                f"{', '.join(n for n in STATISTICS if n != 'bits')}, got {name!r}."
            )
    for other in others:
        for name in (*layers[first], *layers[other]):
            if (name in layers[first]) != (name in layers[other]):
                lacks = other if name in layers[first] else first
                raise UsageError(f"layer {lacks!r} has no {name!r}, which another layer has.")
    return tuple(name for name in STATISTICS if name in layers[first])


class _Kept(NamedTuple):
    """What is kept of a layer: flat values by leaf, entries by row, and how many there are."""

    values: dict[str, np.ndarray]
    rows: list[int]
    whole: float


def _kept(
    layer: str,
    given: Mapping[str, Any],
    own: Sequence[str],
    kind: str,
    bits: int,
    entries: int | None,
    phase: float,
) -> _Kept:
    """The same entries of all a layer's statistics of one type."""
    arrays = {name: _array(given[name], f"{name!r} of layer {layer!r}") for name in own}
    shape = _shape(arrays, own, kind, bits, layer)
    rows, columns = shape if kind == "weight" else (shape[0], 1)
    picked = _rows(rows, columns, entries, phase)
    values = {}
    for name, array in arrays.items():
        lead = (bits,) if STATISTICS[name].bits else ()
        values[name] = array.reshape(*lead, rows, columns)[..., picked, :].reshape(*lead, -1)
    if kind == "weight":
        return _Kept(values, [columns] * len(picked), float(rows * columns))
    whole = _number(given.get("activations", rows), f"'activations' of layer {layer!r}")
    if whole < rows:
        raise UsageError(
            f"'activations' of layer {layer!r} must be at least the {rows} values that are given, "
            f"got {whole:g}."
        )
    return _Kept(values, [len(picked)], whole)


def _array(value: Any, what: str) -> np.ndarray:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"{what} must be numbers, got {type(value).__name__}.") from None
    if not array.size or not np.isfinite(array).all():
        raise UsageError(f"{what} must be finite numbers, at least one: check the model.")
    return array


def _number(value: Any, what: str) -> float:
    array = _array(value, what)
    if array.size != 1:
        raise UsageError(f"{what} must be one number, got the shape {array.shape}.")
    return float(array.item())


def _of_layer(value: Any, name: str, layer: str, bits: int) -> np.ndarray:
    """A statistic of type `layer`: `[1]`, or `[bits, 1]` where it depends on bits."""
    what = f"{name!r} of layer {layer!r}"
    if not STATISTICS[name].bits:
        return np.asarray([_number(value, what)])
    array = _array(value, what)
    if array.shape != (bits,):
        raise UsageError(
            f"{what} must be one number for each of {bits} bit-widths, got the shape {array.shape}."
        )
    return array[:, None]


def _shape(
    arrays: Mapping[str, np.ndarray], own: Sequence[str], kind: str, bits: int, layer: str
) -> tuple[int, ...]:
    """The shape that all statistics of a type have in common, without bits."""
    first: tuple[int, ...] | None = None
    for name in own:
        shape, wanted = arrays[name].shape, 2 if kind == "weight" else 1
        if STATISTICS[name].bits:
            lead, shape = shape[:1], shape[1:]
            if lead != (bits,):
                raise UsageError(
                    f"{name!r} of layer {layer!r} must have one array for each of {bits} "
                    f"bit-widths, got the shape {arrays[name].shape}."
                )
        if len(shape) != wanted or (first is not None and shape != first):
            form = first or ("[fan_in, channels]" if kind == "weight" else "[values]")
            raise UsageError(
                f"{name!r} of layer {layer!r} must have the shape {form}, got {shape}."
            )
        first = shape
    assert first is not None
    return first


def _rows(rows: int, columns: int, entries: int | None, phase: float) -> np.ndarray:
    """Which rows are kept: at a stride that shares no factor with their number, in order.

    Such a stride meets every row once before it meets one again, and goes through all positions
    of a kernel. With a start that is as likely to be any row, so is each row to be kept.
    """
    keep = rows if entries is None else min(rows, max(1, entries // columns))
    if keep == rows:
        return np.arange(rows)
    stride = max(1, rows // keep)
    while math.gcd(stride, rows) > 1:
        stride += 1
    return np.sort((int(phase * rows) + stride * np.arange(keep)) % rows)
