"""One forward pass over the images: reductions of the tensors around each layer.

Large tensors are reduced as soon as they appear, so memory holds one layer's tensors at a
time. One pass serves every need that asks for the same setting.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine.compared import matrices_bytes, record_compared, signs
from proxyq.engine.engine import Engine, at_least_float32
from proxyq.engine.gradients import stride
from proxyq.engine.memory import (
    evenly,
    images_beside_each_other,
    too_little,
)
from proxyq.engine.rounded import site_width
from proxyq.engine.segments import NO_EDIT, State, remember, run_site, text_key
from proxyq.errors import ProxyqError
from proxyq.model.examples import Examples, locate, split_examples
from proxyq.model.features import features
from proxyq.model.graph import Var
from proxyq.model.layers import Site
from proxyq.progress import Progress
from proxyq.quantize import Grid, Rounding, fake_quantize
from proxyq.quantize.integers import fit_columns

FORWARD_NEEDS = {
    "input": "the tensor that the layer reads, [images, …]",
    "output": "the layer's output before bias and activation, [images, positions, channels]",
    "feature": "what the layer hands on (option `feature`), [images, positions, channels]",
    "sample": "some values of the feature, at a fixed stride, [values]",
    "gram": "Gram matrix of the images' features, [images, images]",
    "codes": "how many units agree, on or off, between images' features, [images, images]",
    "pooled": "the feature after ReLU, averaged over positions, [images, channels]",
    "output-error": "mean squared change of the output at each bit-width over its variance",
    "restored-error": "the same with each output channel's mean and deviation restored",
    "output-variance": "variance of the output: in float, then at each bit-width, [1 + bits]",
}
_COMPARED = frozenset({"gram", "codes"})
_WHOLE = _COMPARED | {"feature", "input", "output"}
_OF_FEATURES = frozenset({"feature", "gram", "pooled", "codes", "sample"})
_OF_ROUNDING = frozenset({"output-error", "output-variance", "restored-error"})
_SAMPLED = 4096


def record_forward(
    engine: Engine,
    inputs: Any,
    needs: tuple[str, ...],
    bits: tuple[int, ...],
    rounding: Rounding,
    recorded: dict[str, dict[str, Any]],
    *,
    feature: str,
    centre: bool,
    memory: int | None = None,
    progress: Progress,
) -> None:
    """Walk the network segment by segment, reducing what each one makes into `recorded`.

    What relates images to each other (a Gram matrix) needs all of them at one layer, so all
    chunks walk in step and their states are held together; where `memory` has no room for that,
    in files. All else adds up over chunks, one after the other, and memory holds a single chunk.
    """
    compared = tuple(need for need in needs if need in _COMPARED)
    rest = tuple(need for need in needs if need not in _COMPARED)
    if compared and not _fit(engine, inputs, len(compared), feature, memory):
        record_compared(
            engine, inputs, compared, recorded,
            feature=feature, centre=centre, memory=memory, progress=progress,
        )  # fmt: skip
        needs = rest
    elif memory is not None and compared and rest:  # the two would have room one by one only
        for some in (compared, rest):
            record_forward(
                engine, inputs, some, bits, rounding, recorded,
                feature=feature, centre=centre, memory=memory, progress=progress,
            )  # fmt: skip
        return
    if not needs:
        return
    if "restored-error" in needs:
        _check_deviations(engine, inputs)
    if memory is not None:
        _check_whole(engine, inputs, needs, feature, memory)
        if set(needs) & _OF_ROUNDING:
            engine = _small_enough(engine, inputs, memory, restored="restored-error" in needs)
    chunks = engine.chunks(inputs)
    walks = [list(chunks)] if set(needs) & _WHOLE else ([chunk] for chunk in chunks)
    total = len(engine.network.sites) * (
        1 if set(needs) & _WHOLE else -(-len(jax.tree.leaves(inputs)[0]) // engine.batch_size)
    )
    sums: dict[int, np.ndarray] = {}
    channel_sums: dict[int, np.ndarray] = {}
    grids: dict[int, list[Grid]] = {}  # fitted once: that takes longer than many a batch
    parts: dict[tuple[str, str], list[np.ndarray]] = {}
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress("record", done, total)

    for walk in walks:
        _walk(
            engine,
            walk,
            needs,
            bits,
            rounding,
            recorded,
            sums,
            channel_sums,
            grids,
            parts,
            tick,
            feature=feature,
            centre=centre,
        )
    for (name, need), own in parts.items():
        recorded[name][need] = np.concatenate(own).astype(np.float64)
    if set(needs) & _OF_ROUNDING:
        for name in engine.network.names:
            found = [
                _errors_and_variances(sums[site], len(bits))
                for site in engine.network.sites_of(name)
            ]
            # A tied weight acts at several places; each place counts alike.
            recorded[name]["output-error"] = np.mean([error for error, _ in found], axis=0)
            recorded[name]["output-variance"] = np.mean([var for _, var in found], axis=0)
            if "restored-error" in needs:
                # Nothing is restored after a lookup, and means alone where the same table
                # multiplies.
                tied = engine.network.looked_up(name)
                restored = [
                    error if engine.network.sites[i].lookup else _restored(channel_sums[i], tied)
                    for i, (error, _) in zip(engine.network.sites_of(name), found, strict=True)
                ]
                recorded[name]["restored-error"] = np.mean(restored, axis=0)


def _fit(engine: Engine, inputs: Any, needs: int, feature: str, memory: int | None) -> bool:
    """Whether all images may be held at one layer, beside the matrices of all layers."""
    own = features(engine.network, feature).values()
    images = len(jax.tree.leaves(inputs)[0])
    left = None if memory is None else memory - matrices_bytes(engine, images, needs, feature)
    return images <= images_beside_each_other(engine.network, own, left)


def _check_deviations(engine: Engine, inputs: Any) -> None:
    """Refuse to restore the deviation of a channel from a single value, which has none."""
    if len(jax.tree.leaves(inputs)[0]) > 1:
        return
    graph = engine.network.graph
    for site in engine.network.sites:
        values = graph.main[site.position].outvars[0].aval.size // graph.batch_size
        if not site.lookup and values == math.prod(site.channel_shape):
            raise ProxyqError(
                "what is left when statistics are restored ('restored-error') needs their "
                f"deviation, and the layer {site.layer!r} gives one value of each channel for one "
                "image: give two images or more (--samples)."
            )


def _check_whole(
    engine: Engine, inputs: Any, needs: tuple[str, ...], feature: str, memory: int
) -> None:
    """Refuse tensors of all images and layers that `memory` has no room for.

    What nobody reduces is kept as it is, and once more while batches are put together.
    """
    network, graph = engine.network, engine.network.graph
    images, size = len(jax.tree.leaves(inputs)[0]), 0
    for name in network.names:
        site = network.sites[network.sites_of(name)[0]]
        eqn = graph.main[site.position]
        found = {"input": eqn.invars[1 - site.operand], "output": eqn.outvars[0]}
        if "feature" in needs:
            found["feature"] = features(network, feature)[name]
        size += sum(_bytes([var]) for need, var in found.items() if need in needs)
    least = 2 * images * size // graph.batch_size
    if least > memory:
        asked = ", ".join(need for need in needs if need in _WHOLE - _COMPARED)
        what = f"keeping tensors of all layers and images (needs {asked})"
        raise too_little(what, least, memory, ", or fewer images")


def _small_enough(engine: Engine, inputs: Any, memory: int, *, restored: bool) -> Engine:
    """The engine, or one whose batches leave room for measuring what rounding does to them."""
    per_image = rounding_bytes_per_image(engine, restored=restored)
    if per_image > memory:
        raise too_little("comparing a layer's outputs for one image", per_image, memory)
    images = len(jax.tree.leaves(inputs)[0])
    if engine.network.batch_norm == "batch":  # all at once, or not at all
        if images * per_image > memory:
            what = f"statistics of the batch need all {images} images at once, which"
            raise too_little(what, images * per_image, memory, ", or fewer images")
        return engine
    return engine.with_at_most(evenly(images, memory // per_image, engine.placement.images))


def rounding_bytes_per_image(engine: Engine, *, restored: bool) -> float:
    """What one image takes while the outputs of a site are compared, where it is most.

    The states before and after it; what it reads, as XLA lays it out for the site; and its output,
    the change of it and what is reduced of both: five times the output, with the moments of each
    channel (`restored`) six times.
    """
    graph, most = engine.network.graph, 0
    for site, segment in zip(engine.network.sites, engine.segments[1:], strict=True):
        eqn = graph.main[site.position]
        data = eqn.invars[1 - site.operand]
        states = _bytes({*segment.reads, *segment.keeps}) + _bytes({*segment.writes})
        states += _bytes(segment.keeps)
        output = (6 if restored else 5) * _bytes(eqn.outvars)
        most = max(most, states + _bytes([data]) + output)
    return most / graph.batch_size


def _bytes(some: Iterable[Var]) -> int:
    return sum(var.aval.size * var.aval.dtype.itemsize for var in some)


def _errors_and_variances(sums: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """From counts, sums and squares of a site's output, its changes and its changed outputs."""
    number, first, square = sums[:3]
    wrong, changed, changed_square = (sums[3 + i * bits : 3 + (i + 1) * bits] for i in range(3))
    variance = square / number - (first / number) ** 2
    after = changed_square / number - (changed / number) ** 2
    error = wrong / number / max(variance, np.finfo(float).tiny)
    return error, np.maximum(np.append(variance, after), 0.0)


def _restored(sums: np.ndarray, means_alone: bool = False) -> np.ndarray:
    """Relative errors `[bits]` from `[channels, 3 + 3 bits]`: see `_rounded_sums`.

    With y a channel's output, d its change, a = std y / std (y + d), all of them centred:

        E (a (y + d) - y)^2 = (a - 1)^2 E yy + 2 a (a - 1) E yd + a^2 E dd <= 4 E yy

    A channel that rounding leaves constant keeps its mean alone, which costs its variance. With
    `means_alone` a is 1.
    """
    count, y, yy = (sums[:, i, None] for i in range(3))
    d, dd, yd = np.split(sums[:, 3:], 3, axis=1)
    # What is constant has a variance of either sign in rounded sums.
    var = np.maximum(yy / count - (y / count) ** 2, 0.0)
    of_change = np.maximum(dd / count - (d / count) ** 2, 0.0)
    with_change = yd / count - y * d / count**2
    after = np.maximum(var + 2 * with_change + of_change, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # a - 1 = (var - after) / (std after (std y + std after)), without the difference of roots
        less = -(2 * with_change + of_change) / (np.sqrt(after) * (np.sqrt(var) + np.sqrt(after)))
        error = less**2 * var + 2 * (1 + less) * less * with_change + (1 + less) ** 2 * of_change
    error = np.where(after > 1e-12 * var, np.clip(error, 0.0, 4 * var), var)
    if means_alone:
        error = of_change
    total = yy.sum() / count.sum() - (y.sum() / count.sum()) ** 2
    return error.mean(axis=0) / max(float(total), np.finfo(float).tiny)


def _walk(
    engine: Engine,
    chunks: list[tuple[Any, int]],
    needs: tuple[str, ...],
    bits: tuple[int, ...],
    rounding: Rounding,
    recorded: dict[str, dict[str, Any]],
    sums: dict[int, np.ndarray],
    channel_sums: dict[int, np.ndarray],
    grids: dict[int, list[Grid]],
    parts: dict[tuple[str, str], list[np.ndarray]],
    tick: Callable[[], None],
    *,
    feature: str,
    centre: bool,
) -> None:
    network, graph, batch = engine.network, engine.network.graph, engine.batch_size
    first = {network.sites_of(name)[0]: name for name in network.names}
    owners: dict[Var, list[int]] = {}  # which layers' feature a variable is
    if set(needs) & _OF_FEATURES:
        for name, var in features(network, feature).items():
            owners.setdefault(var, []).append(network.sites_of(name)[0])
    states: list[State] = [engine.start(inputs) for inputs, _ in chunks]
    counts = [count for _, count in chunks]
    places = locate(graph)
    measured, restored = bool(set(needs) & _OF_ROUNDING), "restored-error" in needs
    for index, site in enumerate(network.sites):
        eqn = graph.main[site.position]
        out, data = eqn.outvars[0], eqn.invars[1 - site.operand]
        made = {var for e in engine.segments[index + 1].eqns for var in e.outvars}
        own = [out] if measured or "output" in needs else []
        capture = tuple(dict.fromkeys([*own, *(var for var in owners if var in made)]))
        if measured and index not in grids:
            columns, ways = engine.columns(index), (site_width(site, b, rounding) for b in bits)
            grids[index] = [fit_columns(columns, width, how) for width, how in ways]
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
                x = state[data] if data in state else engine.frontier[data]
                found = _rounded_sums(
                    engine, index, x, captured[out][-1], grids[index], count, restored=restored
                )
                for table, added in zip((sums, channel_sums), found, strict=False):
                    table[index] = table.get(index, 0) + added
        if index in first:
            own = recorded[first[index]]
            if "input" in needs:
                own["input"] = jnp.concatenate(reads)
            if "output" in needs:
                own["output"] = _columns(site, captured[out], counts, batch)
        for var in owners.keys() & captured.keys():
            for owner in owners[var]:
                own = recorded[network.sites[owner].layer]
                part = _feature(network.sites[owner], captured[var], counts, batch, needs, centre)
                for need in {"pooled", "sample"} & part.keys():
                    parts.setdefault((network.sites[owner].layer, need), []).append(part.pop(need))
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
    centre: bool,
) -> dict[str, Any]:
    """What the needs ask of one layer's feature."""
    own: dict[str, Any] = {}
    if "feature" in needs:
        own["feature"] = _columns(site, parts, counts, batch)
    if "gram" in needs:
        where, whole = site.examples, tuple(counts)
        own["gram"] = np.asarray(_gram(parts, whole, where, batch, centre), np.float64)
    if "codes" in needs:
        where, whole = site.examples, tuple(counts)
        own["codes"] = np.asarray(_agreement(parts, whole, where, batch), np.float64)
    if "sample" in needs:
        columns = [site.output_columns(part, batch) for part in parts]
        rows = [part[:count].ravel() for part, count in zip(columns, counts, strict=True)]
        own["sample"] = np.concatenate([row[:: stride(len(row), _SAMPLED)] for row in rows])
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


@partial(jax.jit, static_argnums=(1, 2, 3))
def _agreement(parts: list[Any], counts: tuple[int, ...], where: Examples, batch: int) -> Any:
    """`C C' + (1 - C)(1 - C)'` of the on-off codes `C = (feature > 0)`: units that agree."""
    rows = [split_examples(part, where, batch).reshape(batch, -1) for part in parts]
    x = jnp.concatenate([row[:count] for row, count in zip(rows, counts, strict=True)])
    code = signs(x)
    return (jnp.dot(code, code.T, precision=jax.lax.Precision.HIGHEST) + x.shape[1]) / 2


@jax.jit
def _pooled(feature: Any) -> Any:
    return jnp.mean(jax.nn.relu(feature), axis=1)


_SUMS: dict[Any, Any] = {}


def _rounded_sums(
    engine: Engine,
    index: int,
    x: Any,
    y: Any,
    grids: list[Grid],
    count: int,
    *,
    restored: bool,
) -> list[np.ndarray]:
    """What rounding a site's weight does to its output, for the first `count` images of a batch.

    One bit-width at a time, so that one change of the output lives, whatever their number:

    - `[3 + 3 bits]`: count, sum and sum of squares of the output; then for the bit-widths the
      squares of the change, the sums and the squares of what it changes;
    - with `restored`, `[channels, 3 + 3 bits]`: the count, y and y^2, then d, d^2 and y d of
      each change d.
    """
    own, changed = _sum_programs(engine, index, restored)
    weight = engine.weight(index)
    first = _over_images(own(y), count)
    parts = [_over_images(changed(x, weight, grid, y), count) for grid in grids]
    positions, channels = y.size // engine.batch_size, len(first["y"]) if restored else 1
    rows = [part[name] for name in ("wrong", "after", "after squared") for part in parts]
    found = [np.array([count * positions, first["all"], first["all squared"], *rows])]
    if restored:
        columns = [part[name] for name in ("d", "d squared", "y d") for part in parts]
        each = np.full(channels, float(count * positions // channels))
        found.append(np.stack([each, first["y"], first["y squared"], *columns], axis=1))
    return found


def _over_images(sums: dict[str, Any], count: int) -> dict[str, Any]:
    # Sums over one image stay small; images are added in float64.
    return {
        name: np.sum(np.asarray(part, np.float64)[:count], axis=0) for name, part in sums.items()
    }


def _sum_programs(engine: Engine, index: int, restored: bool) -> tuple[Any, Any]:
    """Sums of each image's output, and of its change; jitted once for all equal sites."""
    network, batch = engine.network, engine.batch_size
    site = network.sites[index]
    eqn = network.graph.main[site.position]
    data = eqn.invars[1 - site.operand]
    text = text_key([eqn], [data], eqn.outvars, site.operand)
    key = (text, site.channel_axes, site.output_axes, site.examples, batch, restored)
    programs = _SUMS.get(key)
    if programs is not None:
        return programs

    # By axes of the tensor as it lies: flat rows would be a copy of it.
    last = [axis + 1 for axis in site.output_axes]

    def all_of(tensor: Any) -> Any:
        return jnp.sum(tensor, axis=tuple(range(1, tensor.ndim)))

    def by_channel(tensor: Any) -> Any:
        rest = tuple(axis for axis in range(1, tensor.ndim) if axis not in last)
        return jnp.sum(tensor, axis=rest).reshape(batch, -1)

    def split(output: Any) -> Any:
        return split_examples(output, site.examples, batch).astype(jnp.float32)

    @jax.jit
    def own(y: Any) -> dict[str, Any]:
        y = split(y)
        sums = {"all": all_of(y), "all squared": all_of(y * y)}
        return sums | ({"y": by_channel(y), "y squared": by_channel(y * y)} if restored else {})

    @jax.jit
    def changed(x: Any, weight: Any, grid: Grid, y: Any) -> dict[str, Any]:
        columns = at_least_float32(site.columns(weight))
        wrong = site.from_columns(fake_quantize(columns, grid) - columns, weight.shape)
        # Convolution and dot are linear: the output's change is that of the weight.
        d, y = split(run_site(site, eqn, {data: x}, wrong, NO_EDIT)), split(y)
        after = y + d
        sums = {"wrong": d * d, "after": after, "after squared": after * after}
        found = {name: all_of(part) for name, part in sums.items()}
        if restored:
            found |= {"d": by_channel(d), "d squared": by_channel(d * d), "y d": by_channel(y * d)}
        return found

    return remember(_SUMS, key, (own, changed))
