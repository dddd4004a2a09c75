"""Record what proxies need: weights, and reductions of the tensors around each layer.

One pass over the images serves every proxy that asks for the same setting. Large tensors
are reduced as soon as they appear, so memory holds one layer's tensors at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine.engine import Engine
from proxyq.engine.segments import NO_EDIT, Edit, State, run_site
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.elementwise import feature_of
from proxyq.model.graph import Var
from proxyq.model.layers import Layer, Site
from proxyq.progress import Progress, silent
from proxyq.quantize import Range, quantize_columns

NEEDS = {
    "weight": "the layer's weight, batch norm folded in",
    "input": "the tensor that the layer reads, as the graph lays it out",
    "output": "the layer's output before bias and activation, [images, positions, channels]",
    "feature": "what the layer hands on (option `feature`), [images, positions, channels]",
    "gram": "Gram matrix of the images' features, [images, images]",
    "pooled": "the feature after ReLU, averaged over positions, [images, channels]",
    "output-error": "mean squared change of the output at each bit-width over its variance",
}


@dataclass(frozen=True, kw_only=True)
class TapOptions:
    """How tensors are recorded.

    - `batch_norm`: normalise with `running` statistics, or with those of the `batch`.
    - `feature`: what a layer's feature is: its `post-activation` tensor (residual sum and
      activation included), or its own `output`.
    - `centre`: subtract each feature's mean over the images before the Gram matrix.
    """

    batch_norm: str = "running"
    feature: str = "post-activation"
    centre: bool = True

    def __post_init__(self) -> None:
        if self.feature not in ("post-activation", "output"):
            raise UsageError(
                f"`feature` must be 'post-activation' or 'output', got {self.feature!r}."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTap:
    """What was recorded of one layer; asking for more than was recorded is an error.

    `columns` is the weight as `[fan_in, channels]`, one column an output channel.
    """

    layer: Layer
    site: Site
    columns: Any
    weight: Any
    recorded: Mapping[str, Any]
    method: Range = "mse"

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    def __getattr__(self, name: str) -> Any:
        need = name.replace("_", "-")
        if need in NEEDS:
            recorded = object.__getattribute__(self, "recorded")
            if need in recorded:
                return recorded[need]
            raise ProxyqError(f"a proxy that reads `{name}` must say so: needs=({need!r},).")
        raise AttributeError(name)

    def quantized(self, bits: int) -> Any:
        """`columns` rounded to `bits`: symmetric, one grid an output channel."""
        return _quantize_columns(self.columns, bits, method=self.method)


_quantize_columns = jax.jit(quantize_columns, static_argnames="method")


@dataclass(frozen=True, kw_only=True, eq=False)
class Taps:
    """The taps of all layers, in the network's order, and the candidate bit-widths."""

    taps: tuple[LayerTap, ...]
    bits: tuple[int, ...]
    images: int = 0
    options: TapOptions = field(default_factory=TapOptions)

    def __iter__(self) -> Iterator[LayerTap]:
        return iter(self.taps)

    def __len__(self) -> int:
        return len(self.taps)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in order."""
        return tuple(tap.layer for tap in self.taps)

    def map(self, function: Callable[[LayerTap], Any]) -> np.ndarray:
        """`[layers]`: one number for each layer."""
        return np.asarray([np.asarray(function(tap)) for tap in self.taps], np.float64)

    def table(self, function: Callable[[LayerTap, int], Any]) -> np.ndarray:
        """`[layers, bits]`: one number for each layer and bit-width."""
        rows = [[np.asarray(function(tap, bits)) for bits in self.bits] for tap in self.taps]
        return np.asarray(rows, np.float64)


def collect(
    engine: Engine,
    inputs: Any,
    needs: Sequence[str],
    bits: Sequence[int],
    *,
    options: TapOptions | None = None,
    method: Range = "mse",
    progress: Progress = silent,
) -> Taps:
    """Record what `needs` names (see `NEEDS`) of every layer.

    **Arguments:**

    - `inputs`: the images, `[images, …]`, or `None` when only weights are needed.
    - `bits`: candidate bit-widths, for `output-error` and `LayerTap.quantized`.
    - `method`: how weight ranges are found.

    **Raises** `UsageError` for an unknown need, or when images are needed and missing.
    """
    options = options or TapOptions()
    for need in needs:
        if need not in NEEDS:
            raise UsageError(f"unknown need {need!r}: known are {', '.join(NEEDS)}.")
    network = engine.network
    first = {name: network.sites_of(name)[0] for name in network.names}
    recorded: dict[str, dict[str, Any]] = {name: {} for name in network.names}
    images = 0
    if set(needs) - {"weight"}:
        if inputs is None:
            raise UsageError("this proxy needs images: give calibration data.")
        images = len(jax.tree.leaves(inputs)[0])
        if options.batch_norm == "batch" and images > engine.batch_size:
            raise ProxyqError(
                f"statistics of the batch need all {images} images at once, but memory allows "
                f"{engine.batch_size}: give fewer images or more memory."
            )
        _record(engine, inputs, tuple(needs), tuple(bits), options, method, recorded, progress)
    taps = tuple(
        LayerTap(
            layer=layer,
            site=network.sites[first[layer.name]],
            columns=engine.columns(first[layer.name]),
            weight=engine.weight(first[layer.name]),
            recorded=recorded[layer.name],
            method=method,
        )
        for layer in network.layers
    )
    return Taps(taps=taps, bits=tuple(bits), images=images, options=options)


def _record(
    engine: Engine,
    inputs: Any,
    needs: tuple[str, ...],
    bits: tuple[int, ...],
    options: TapOptions,
    method: Range,
    recorded: dict[str, dict[str, Any]],
    progress: Progress,
) -> None:
    """Walk all chunks in step, segment by segment, reducing what each one makes."""
    network, graph = engine.network, engine.network.graph
    first = {network.sites_of(name)[0]: name for name in network.names}
    # Which layers' features or outputs are which variable.
    features: dict[Var, list[int]] = {}
    if set(needs) & {"feature", "gram", "pooled"}:
        for site in first:
            out = graph.main[network.sites[site].position].outvars[0]
            var = feature_of(graph, out) if options.feature == "post-activation" else out
            features.setdefault(var, []).append(site)
    states: list[State] = []
    counts: list[int] = []
    for batch, count in engine.chunks(inputs):
        states.append(engine.start(batch))
        counts.append(count)
    errors: dict[str, list[tuple[np.ndarray, float]]] = {}
    for index, site in enumerate(network.sites):
        eqn = graph.main[site.position]
        out, data = eqn.outvars[0], eqn.invars[1 - site.operand]
        made = {var for e in engine.segments[index + 1].eqns for var in e.outvars}
        capture = tuple(dict.fromkeys([out, *(var for var in features if var in made)]))
        measured = "output-error" in needs
        # Convolution and dot are linear: the output's change is that of the weight.
        deltas = _weight_changes(engine, index, bits, method) if measured else []
        captured: dict[Var, list[Any]] = {var: [] for var in capture}
        reads: list[Any] = []
        wrong, moments = np.zeros(len(bits)), np.zeros(3)
        for chunk, state in enumerate(states):
            count = counts[chunk]
            if "input" in needs and index in first:
                reads.append(state[data][:count] if count < engine.batch_size else state[data])
            states[chunk], values = engine.step(state, index, NO_EDIT, capture)
            for var, value in zip(capture, values, strict=True):
                captured[var].append(value)
            if measured:
                x = state[data] if data in state else engine.frontier[data]
                wrong += _squares(engine, index, x, deltas)[:, :count].sum(axis=1)
                moments += _moments(site.rows(captured[out][-1], engine.batch_size)[:count])
        if measured:
            number, total, square = moments
            variance = square / number - (total / number) ** 2
            errors.setdefault(site.layer, []).append((wrong / number, variance))
        if index in first:
            name = first[index]
            if "input" in needs:
                recorded[name]["input"] = jnp.concatenate(reads)
            if "output" in needs:
                parts = _columns(site, captured[out], counts, engine.batch_size)
                recorded[name]["output"] = parts
        for var, owners in features.items():
            if var in captured:
                for owner in owners:
                    site = network.sites[owner]
                    own = _feature(site, captured[var], counts, engine.batch_size, needs, options)
                    recorded[site.layer].update(own)
        progress("record", index + 1, len(network.sites))
    for name, parts in errors.items():
        # A tied weight acts at several places; each place counts alike.
        tiny = np.finfo(np.float64).tiny
        ratios = [wrong / max(variance, tiny) for wrong, variance in parts]
        recorded[name]["output-error"] = np.mean(ratios, axis=0)


def _columns(site: Site, parts: list[Any], counts: list[int], batch: int) -> Any:
    columns = [
        site.output_columns(part, batch)[:count] for part, count in zip(parts, counts, strict=True)
    ]
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns)


def _feature(
    site: Site,
    parts: list[Any],
    counts: list[int],
    batch: int,
    needs: tuple[str, ...],
    options: TapOptions,
) -> dict[str, Any]:
    """What the needs ask of one layer's feature."""
    own: dict[str, Any] = {}
    if "feature" in needs:
        own["feature"] = _columns(site, parts, counts, batch)
    if "gram" in needs:
        rows = [site.rows(part, batch)[:count] for part, count in zip(parts, counts, strict=True)]
        x = rows[0] if len(rows) == 1 else jnp.concatenate(rows)
        own["gram"] = np.asarray(_gram(x, options.centre), np.float64)
    if "pooled" in needs:
        pooled = [np.asarray(_pooled(site.output_columns(part, batch))) for part in parts]
        real = [part[:count] for part, count in zip(pooled, counts, strict=True)]
        own["pooled"] = np.concatenate(real).astype(np.float64)
    return own


@partial(jax.jit, static_argnames="centre")
def _gram(x: Any, centre: bool) -> Any:
    """`X X'` of features `[images, p]`; centring X first loses no digits to large means."""
    if centre:
        x = x - jnp.mean(x, axis=0)
    return jnp.dot(x, x.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _pooled(feature: Any) -> Any:
    return jnp.mean(jax.nn.relu(feature), axis=1)


@jax.jit
def _row_moments(rows: Any) -> Any:
    # Sums over one image stay small; images are added in float64 by the caller.
    return jnp.sum(rows, axis=1), jnp.sum(rows * rows, axis=1)


def _moments(rows: Any) -> np.ndarray:
    """Count, sum and sum of squares, accumulated in float64 over the images."""
    total, square = _row_moments(rows)
    sums = (np.sum(np.asarray(part, np.float64)) for part in (total, square))
    return np.array([rows.size, *sums])


def _weight_changes(engine: Engine, index: int, bits: tuple[int, ...], method: Range) -> list[Any]:
    site, columns = engine.network.sites[index], engine.columns(index)
    shape = engine.weight(index).shape
    return [
        site.from_columns(_quantize_columns(columns, b, method=method) - columns, shape)
        for b in bits
    ]


_SITES: dict[Any, Any] = {}


def _squares(engine: Engine, index: int, x: Any, deltas: list[Any]) -> np.ndarray:
    """`[bits, images]`: squared change of a site's output, for each changed weight."""
    site = engine.network.sites[index]
    eqn = engine.network.graph.main[site.position]
    data = eqn.invars[1 - site.operand]
    images = engine.batch_size
    params = str(sorted((name, str(value)) for name, value in eqn.params.items()))
    key = (eqn.primitive.name, params, data.aval.str_short(), site.operand, images)
    if key not in _SITES:

        def squares(x: Any, delta: Any) -> Any:
            change = site.rows(run_site(site, eqn, {data: x}, delta, Edit()), images)
            return jnp.sum(change * change, axis=1)

        _SITES[key] = jax.jit(squares)
    return np.stack([np.asarray(_SITES[key](x, delta), np.float64) for delta in deltas])
