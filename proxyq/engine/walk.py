"""One forward pass over the images: reductions of the tensors around each layer.

Large tensors are reduced as soon as they appear, so memory holds one layer's tensors at a
time. One pass serves every need that asks for the same setting.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine.engine import Engine
from proxyq.engine.gradients import stride
from proxyq.engine.memory import amount, bytes_per_image_beside, images_beside_each_other
from proxyq.engine.rounded import weight_changes
from proxyq.engine.segments import NO_EDIT, Edit, State
from proxyq.errors import UsageError
from proxyq.model.examples import Examples, locate, split_examples
from proxyq.model.features import features
from proxyq.model.graph import Var
from proxyq.model.layers import Site
from proxyq.progress import Progress
from proxyq.quantize import Rounding

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
    two blocks of them at a time, in more passes. All else adds up over chunks, one after the
    other, and memory holds a single chunk.
    """
    compared = tuple(need for need in needs if need in _COMPARED)
    if compared and not _fit(engine, inputs, feature, memory):
        _record_blocks(
            engine, inputs, compared, recorded,
            feature=feature, centre=centre, memory=memory, progress=progress,
        )  # fmt: skip
        needs = tuple(need for need in needs if need not in _COMPARED)
        if not needs:
            return
    chunks = engine.chunks(inputs)
    walks = [list(chunks)] if set(needs) & _WHOLE else ([chunk] for chunk in chunks)
    total = len(engine.network.sites) * (
        1 if set(needs) & _WHOLE else -(-len(jax.tree.leaves(inputs)[0]) // engine.batch_size)
    )
    sums: dict[int, np.ndarray] = {}
    channel_sums: dict[int, np.ndarray] = {}
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


def _fit(engine: Engine, inputs: Any, feature: str, memory: int | None) -> bool:
    """Whether all images may be held at one layer."""
    own = features(engine.network, feature).values()
    images = len(jax.tree.leaves(inputs)[0])
    return images <= images_beside_each_other(engine.network, own, memory)


def _record_blocks(
    engine: Engine,
    inputs: Any,
    needs: tuple[str, ...],
    recorded: dict[str, dict[str, Any]],
    *,
    feature: str,
    centre: bool,
    memory: int | None,
    progress: Progress,
) -> None:
    """`gram` and `codes` of more images than may be held at once: a pair of blocks at a time.

    With B blocks, one pass for the means and B + 1 for the pairs. **Raises** `UsageError` where
    not even two images may be held.
    """
    own = features(engine.network, feature)
    images = len(jax.tree.leaves(inputs)[0])
    room = images_beside_each_other(engine.network, own.values(), memory) // 2
    if room < 1:
        least = 2 * bytes_per_image_beside(engine.network, own.values())
        raise UsageError(
            f"two images take {amount(least)} to be compared layer by layer, and `memory` "
            f"(--memory) allows {amount(memory or 0)}: give at least {amount(least)}."
        )
    if engine.network.batch_norm == "batch":
        least = images * bytes_per_image_beside(engine.network, own.values())
        raise UsageError(
            f"statistics of the batch need all {images} images at once, which takes "
            f"{amount(least)}, and `memory` (--memory) has no room for them: give that much, or "
            "fewer images."
        )
    engine = Engine.build(
        engine.network.model, images, batch_norm=engine.network.batch_norm, batch_size=room
    )
    # The features of the engine of this size are other variables.
    network, size = engine.network, engine.batch_size
    own = features(network, feature)
    places = {name: network.sites[network.sites_of(name)[0]] for name in network.names}
    blocks = -(-images // size)
    centred = centre and "gram" in needs
    steps = len(network.sites) * (blocks * centred + blocks * (blocks + 1) // 2)
    done = 0

    def walk(starts: tuple[int, ...]) -> Iterator[tuple[Var, list[Any]]]:
        """Each feature of the blocks, `[images, p]`, as it appears."""
        nonlocal done
        counts = [min(size, images - start) for start in starts]
        rows = [np.minimum(np.arange(s, s + size), images - 1) for s in starts]
        states = [engine.start(_taken(engine, inputs, one)) for one in rows]
        for index, _ in enumerate(network.sites):
            made = {var for eqn in engine.segments[index + 1].eqns for var in eqn.outvars}
            capture = tuple(dict.fromkeys(var for var in own.values() if var in made))
            parts = []
            for block, state in enumerate(states):
                states[block], values = engine.step(state, index, NO_EDIT, capture)
                parts.append(values)
            for place, var in enumerate(capture):
                where = next(places[name] for name, one in own.items() if one is var).examples
                yield (
                    var,
                    [
                        _rows(values[place], where, size)[:count]
                        for values, count in zip(parts, counts, strict=True)
                    ],
                )
            done += 1
            progress("record", done, steps)

    sums: dict[Var, np.ndarray] = {}
    if centred:
        for start in range(0, images, size):
            for var, (x,) in walk((start,)):
                sums[var] = sums.get(var, 0) + np.asarray(jnp.sum(x, axis=0), np.float64)
    means = {var: jnp.asarray(total / images, jnp.float32) for var, total in sums.items()}
    found = {(need, var): np.zeros((images, images)) for need in needs for var in own.values()}
    for one in range(0, images, size):
        for other in range(one, images, size):
            for var, parts in walk((one,) if other == one else (one, other)):
                for need in needs:
                    mean = means.get(var) if need == "gram" else None
                    product = np.asarray(_PRODUCTS[need](parts[0], parts[-1], mean), np.float64)
                    here = slice(one, one + len(product)), slice(other, other + product.shape[1])
                    found[need, var][here] = product
                    found[need, var][here[::-1]] = product.T
    for name, var in own.items():
        for need in needs:
            recorded[name][need] = found[need, var]


def _taken(engine: Engine, inputs: Any, rows: np.ndarray) -> Any:
    leaves, tree = jax.tree.flatten(inputs)
    types = (var.aval.dtype for var in engine.network.graph.inputs)
    arrays = [jnp.asarray(leaf[rows], kind) for leaf, kind in zip(leaves, types, strict=True)]
    return jax.tree.unflatten(tree, arrays)


def _rows(part: Any, where: Examples, batch: int) -> Any:
    return split_examples(part, where, batch).reshape(batch, -1)


@jax.jit
def _gram_block(x: Any, y: Any, mean: Any) -> Any:
    """`(X - m)(Y - m)'`, a part of the matrix of `_gram`."""
    if mean is not None:
        x, y = x - mean, y - mean
    return jnp.dot(x, y.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _agreement_block(x: Any, y: Any, mean: Any) -> Any:
    """A part of the matrix of `_agreement`."""
    del mean
    product = jnp.dot(_signs(x), _signs(y).T, precision=jax.lax.Precision.HIGHEST)
    return (product + x.shape[1]) / 2


_PRODUCTS = {"gram": _gram_block, "codes": _agreement_block}


def _errors_and_variances(sums: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """From counts, sums and squares of a site's output, its changes and its changed outputs."""
    number, first, square = sums[:3]
    wrong, changed, changed_square = (sums[3 + i * bits : 3 + (i + 1) * bits] for i in range(3))
    variance = square / number - (first / number) ** 2
    after = changed_square / number - (changed / number) ** 2
    error = wrong / number / max(variance, np.finfo(float).tiny)
    return error, np.maximum(np.append(variance, after), 0.0)


def _restored(sums: np.ndarray, means_alone: bool = False) -> np.ndarray:
    """Relative errors `[bits]` from `[channels, 3 + 3 bits]`: see `_channel_sums`.

    With y a channel's output, d its change, a = std y / std (y + d), all of them centred:

        E (a (y + d) - y)^2 = (a - 1)^2 E yy + 2 a (a - 1) E yd + a^2 E dd

    A channel that rounding leaves constant keeps its mean alone, which costs its variance. With
    `means_alone` a is 1.
    """
    count, y, yy = (sums[:, i, None] for i in range(3))
    d, dd, yd = np.split(sums[:, 3:], 3, axis=1)
    var, of_change = yy / count - (y / count) ** 2, dd / count - (d / count) ** 2
    with_change = yd / count - y * d / count**2
    after = var + 2 * with_change + of_change
    with np.errstate(divide="ignore", invalid="ignore"):
        # a - 1 = (var - after) / (std after (std y + std after)), without the difference of roots
        less = -(2 * with_change + of_change) / (np.sqrt(after) * (np.sqrt(var) + np.sqrt(after)))
        error = less**2 * var + 2 * (1 + less) * less * with_change + (1 + less) ** 2 * of_change
    error = np.where(after > 1e-12 * var, np.maximum(error, 0.0), np.maximum(var, 0.0))
    if means_alone:
        error = np.maximum(of_change, 0.0)
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
    measured = bool(set(needs) & _OF_ROUNDING)
    for index, site in enumerate(network.sites):
        eqn = graph.main[site.position]
        out, data = eqn.outvars[0], eqn.invars[1 - site.operand]
        made = {var for e in engine.segments[index + 1].eqns for var in e.outvars}
        own = [out] if measured or "output" in needs else []
        capture = tuple(dict.fromkeys([*own, *(var for var in owners if var in made)]))
        # Convolution and dot are linear: the output's change is that of the weight.
        deltas = weight_changes(engine, index, bits, rounding) if measured else []
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
                own_rows = site.rows(captured[out][-1], batch)[:count]
                moments = _moments(own_rows)
                changes = _changes(engine, index, state, deltas)
                wrong = [
                    _change_moments(site.rows(change, batch)[:count], own_rows)
                    for change in changes
                ]
                sums[index] = sums.get(index, 0) + np.append(moments, np.stack(wrong, axis=1))
                if "restored-error" in needs:
                    own_columns = site.output_columns(captured[out][-1], batch)[:count]
                    columns = [site.output_columns(one, batch)[:count] for one in changes]
                    found = _channel_sums(own_columns, columns)
                    channel_sums[index] = channel_sums.get(index, 0) + found
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
    code = _signs(x)
    return (jnp.dot(code, code.T, precision=jax.lax.Precision.HIGHEST) + x.shape[1]) / 2


def _signs(x: Any) -> Any:
    code = jnp.where(x > 0, 1.0, -1.0)  # agreements minus disagreements, in one product
    return jnp.where(jnp.isnan(x), jnp.nan, code)  # neither on nor off


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


@jax.jit
def _change_sums(change: Any, rows: Any) -> Any:
    change, rows = change.astype(jnp.float32), rows.astype(jnp.float32)
    after = rows + change
    return (
        jnp.sum(change * change, axis=1),
        jnp.sum(after, axis=1),
        jnp.sum(after * after, axis=1),
    )


def _change_moments(change: Any, rows: Any) -> np.ndarray:
    """Square of a change, sum and square of what it changes, in float64 over the images."""
    parts = _change_sums(change, rows)
    return np.array([np.sum(np.asarray(part, np.float64)) for part in parts])


@jax.jit
def _image_sums(y: Any) -> Any:
    y = y.astype(jnp.float32)
    return [jnp.sum(part, axis=1) for part in (y, y * y)]


@jax.jit
def _image_change_sums(y: Any, change: Any) -> Any:
    y, change = y.astype(jnp.float32), change.astype(jnp.float32)
    return [jnp.sum(part, axis=1) for part in (change, change * change, y * change)]


def _channel_sums(y: Any, changes: list[Any]) -> np.ndarray:
    """`[channels, 3 + 3 bits]`: count, y, y^2, then d, d^2 and y d of each change d.

    `y` and the changes are `[images, positions, channels]`; summed in float64 over the images.
    """

    def over_images(parts: list[Any]) -> list[np.ndarray]:
        return [np.sum(np.asarray(part, np.float64), axis=0) for part in parts]

    count = np.full(y.shape[-1], float(y.shape[0] * y.shape[1]))
    found = [over_images(_image_change_sums(y, change)) for change in changes]
    own = [count, *over_images(_image_sums(y))]
    return np.stack([*own, *(one[place] for place in range(3) for one in found)], axis=1)


def _changes(engine: Engine, index: int, state: State, deltas: list[Any]) -> list[Any]:
    """The change of a site's output, for each changed weight."""
    return [engine.site_output(state, index, Edit(weight=delta)) for delta in deltas]
