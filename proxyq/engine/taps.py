"""Record what proxies need: weights, and reductions of the tensors around each layer.

One pass over the images serves every proxy that asks for the same setting. Large tensors
are reduced as soon as they appear, so memory holds one layer's tensors at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine.engine import Engine
from proxyq.engine.segments import NO_EDIT, Edit, State
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.examples import Examples, locate, split_examples
from proxyq.model.features import features
from proxyq.model.graph import Var
from proxyq.model.layers import Layer, Site
from proxyq.progress import Progress, silent
from proxyq.quantize import Rounding, quantize_columns

NEEDS = {
    "weight": "the layer's weight, batch norm folded in",
    "input": "the tensor that the layer reads, [images, …]",
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

    `weight` is the weight at the layer's first use, batch norm folded in; `columns` the same
    as `[fan_in, channels]`, one column an output channel. `same_feature_as` is the first
    layer that hands on the same tensor, usually the layer itself.
    """

    layer: Layer
    engine: Engine
    site: int
    recorded: Mapping[str, Any]
    same_feature_as: str
    rounding: Rounding

    @property
    def weight(self) -> Any:
        """The weight as the graph lays it out."""
        return self.engine.weight(self.site)

    @cached_property
    def columns(self) -> Any:
        """The weight as `[fan_in, channels]`."""
        return self.engine.columns(self.site)

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
        return quantize_columns(self.columns, bits, self.rounding)


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
    rounding: Rounding | None = None,
    progress: Progress = silent,
) -> Taps:
    """Record what `needs` names (see `NEEDS`) of every layer.

    **Arguments:**

    - `inputs`: the images, `[images, …]`, or `None` when only weights are needed.
    - `bits`: candidate bit-widths, for `output-error` and `LayerTap.quantized`.
    - `rounding`: how weights are rounded.

    **Raises** `UsageError` for an unknown need, or when images are needed and missing.
    """
    options, rounding = options or TapOptions(), rounding or Rounding()
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
        _record(engine, inputs, tuple(needs), tuple(bits), options, rounding, recorded, progress)
    owner: dict[Var, str] = {}
    taps = tuple(
        LayerTap(
            layer=layer,
            engine=engine,
            site=first[layer.name],
            recorded=recorded[layer.name],
            same_feature_as=owner.setdefault(var, layer.name),
            rounding=rounding,
        )
        for layer, var in zip(
            network.layers, features(network, options.feature).values(), strict=True
        )
    )
    return Taps(taps=taps, bits=tuple(bits), images=images, options=options)


_WHOLE = frozenset({"gram", "feature", "input", "output"})


def _record(
    engine: Engine,
    inputs: Any,
    needs: tuple[str, ...],
    bits: tuple[int, ...],
    options: TapOptions,
    rounding: Rounding,
    recorded: dict[str, dict[str, Any]],
    progress: Progress,
) -> None:
    """Walk the network segment by segment, reducing what each one makes.

    What relates images to each other (a Gram matrix) needs all of them at one layer, so all
    chunks walk in step and their states are held together; all else adds up over chunks,
    one after the other, and memory holds a single chunk.
    """
    chunks = engine.chunks(inputs)
    walks = [list(chunks)] if set(needs) & _WHOLE else ([chunk] for chunk in chunks)
    total = len(engine.network.sites) * (
        1 if set(needs) & _WHOLE else -(-len(jax.tree.leaves(inputs)[0]) // engine.batch_size)
    )
    sums: dict[int, np.ndarray] = {}
    pooled: dict[str, list[np.ndarray]] = {}
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress("record", done, total)

    for walk in walks:
        _walk(engine, walk, needs, bits, options, rounding, recorded, sums, pooled, tick)
    for name, parts in pooled.items():
        recorded[name]["pooled"] = np.concatenate(parts).astype(np.float64)
    if "output-error" in needs:
        for name in engine.network.names:
            ratios = []
            for site in engine.network.sites_of(name):
                number, first, square, *wrong = sums[site]
                variance = square / number - (first / number) ** 2
                ratios.append(np.array(wrong) / number / max(variance, np.finfo(float).tiny))
            # A tied weight acts at several places; each place counts alike.
            recorded[name]["output-error"] = np.mean(ratios, axis=0)


def _walk(
    engine: Engine,
    chunks: list[tuple[Any, int]],
    needs: tuple[str, ...],
    bits: tuple[int, ...],
    options: TapOptions,
    rounding: Rounding,
    recorded: dict[str, dict[str, Any]],
    sums: dict[int, np.ndarray],
    pooled: dict[str, list[np.ndarray]],
    tick: Callable[[], None],
) -> None:
    network, graph, batch = engine.network, engine.network.graph, engine.batch_size
    first = {network.sites_of(name)[0]: name for name in network.names}
    owners: dict[Var, list[int]] = {}  # which layers' feature a variable is
    if set(needs) & {"feature", "gram", "pooled"}:
        for name, var in features(network, options.feature).items():
            owners.setdefault(var, []).append(network.sites_of(name)[0])
    states: list[State] = [engine.start(inputs) for inputs, _ in chunks]
    counts = [count for _, count in chunks]
    places = locate(graph)
    measured = "output-error" in needs
    for index, site in enumerate(network.sites):
        eqn = graph.main[site.position]
        out, data = eqn.outvars[0], eqn.invars[1 - site.operand]
        made = {var for e in engine.segments[index + 1].eqns for var in e.outvars}
        own = [out] if measured or "output" in needs else []
        capture = tuple(dict.fromkeys([*own, *(var for var in owners if var in made)]))
        # Convolution and dot are linear: the output's change is that of the weight.
        deltas = _weight_changes(engine, index, bits, rounding) if measured else []
        captured: dict[Var, list[Any]] = {var: [] for var in capture}
        reads: list[Any] = []
        for chunk, (state, count) in enumerate(zip(states, counts, strict=True)):
            if "input" in needs and index in first:
                x = state[data] if data in state else engine.frontier[data]
                reads.append(_by_image(x, places.get(data, site.examples), batch)[:count])
            states[chunk], values = engine.step(state, index, NO_EDIT, capture)
            for var, value in zip(capture, values, strict=True):
                captured[var].append(value)
            if measured:
                wrong = _squares(engine, index, state, deltas)[:, :count].sum(axis=1)
                moments = _moments(site.rows(captured[out][-1], batch)[:count])
                sums[index] = sums.get(index, 0) + np.concatenate([moments, wrong])
        if index in first:
            own = recorded[first[index]]
            if "input" in needs:
                own["input"] = jnp.concatenate(reads)
            if "output" in needs:
                own["output"] = _columns(site, captured[out], counts, batch)
        for var in owners.keys() & captured.keys():
            for owner in owners[var]:
                own = recorded[network.sites[owner].layer]
                part = _feature(network.sites[owner], captured[var], counts, batch, needs, options)
                if "pooled" in part:
                    pooled.setdefault(network.sites[owner].layer, []).append(part.pop("pooled"))
                own.update(part)
        tick()


def _by_image(x: Any, where: Examples, batch: int) -> Any:
    split = split_examples(x, where, batch)
    folded = where.axis + 1  # what else lay on the images' axis; nothing, mostly
    return jnp.squeeze(split, folded) if split.shape[folded] == 1 else split


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
        where, whole = site.examples, tuple(counts)
        own["gram"] = np.asarray(_gram(parts, whole, where, batch, options.centre), np.float64)
    if "pooled" in needs:
        pooled = [np.asarray(_pooled(site.output_columns(part, batch))) for part in parts]
        real = [part[:count] for part, count in zip(pooled, counts, strict=True)]
        own["pooled"] = np.concatenate(real)
    return own


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _gram(
    parts: list[Any], counts: tuple[int, ...], where: Examples, batch: int, centre: bool
) -> Any:
    """`X X'` of features `[images, p]`; centring X first loses no digits to large means."""
    rows = [split_examples(part, where, batch).reshape(batch, -1) for part in parts]
    x = jnp.concatenate([row[:count] for row, count in zip(rows, counts, strict=True)])
    if centre:
        x = x - jnp.mean(x, axis=0)
    return jnp.dot(x, x.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _pooled(feature: Any) -> Any:
    return jnp.mean(jax.nn.relu(feature), axis=1)


@jax.jit
def _row_moments(rows: Any) -> Any:
    # Sums over one image stay small; images are added in float64 by the caller.
    rows = rows.astype(jnp.float32)
    return jnp.sum(rows, axis=1), jnp.sum(rows * rows, axis=1)


def _moments(rows: Any) -> np.ndarray:
    """Count, sum and sum of squares, accumulated in float64 over the images."""
    total, square = _row_moments(rows)
    sums = (np.sum(np.asarray(part, np.float64)) for part in (total, square))
    return np.array([rows.size, *sums])


def _weight_changes(engine: Engine, index: int, bits: tuple[int, ...], how: Rounding) -> list[Any]:
    site, columns = engine.network.sites[index], engine.columns(index)
    shape = engine.weight(index).shape
    return [site.from_columns(quantize_columns(columns, b, how) - columns, shape) for b in bits]


def _squares(engine: Engine, index: int, state: State, deltas: list[Any]) -> np.ndarray:
    """`[bits, images]`: squared change of a site's output, for each changed weight."""
    site, batch = engine.network.sites[index], engine.batch_size
    changes = (engine.site_output(state, index, Edit(weight=delta)) for delta in deltas)
    return np.stack([np.asarray(_row_moments(site.rows(c, batch))[1], np.float64) for c in changes])
