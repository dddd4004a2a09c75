"""Correction of layer statistics after rounding.

Rounding to the least squared error shrinks a layer's output, and the shrinkage of all layers
adds up. Restoring each output channel's mean and deviation is worth more than any choice of
bits, and costs nothing at run time: a scale folds into the weights' scale, a shift into the
bias.

- `weights` needs no data: each channel's rounded weights get the mean and the norm of the
  float ones (Banner et al. 2019, arXiv:1810.05723, section 4.2).
- `statistics` walks the layers in order, each fed by the corrected layers before it, and gives
  each output channel the mean and standard deviation that it has in the float network on
  unlabelled images (in the spirit of Nagel et al. 2019, arXiv:1906.04721, section 4.2, with
  the deviation matched too). A ratio is shrunk towards 1 by its standard error and clamped.
- `auto` fits on most of the images and keeps what brings the outputs on the others closest to
  the float network's, which may be nothing: a transformer with heavy-tailed channels and few
  images is better left alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine import Edit, Edits, Engine
from proxyq.engine.divergence import kl_divergence
from proxyq.errors import UsageError
from proxyq.model.examples import Examples
from proxyq.model.layers import columns_of
from proxyq.progress import Progress, silent

Correction = Literal["auto", "none", "weights", "statistics"]
CORRECTIONS = ("auto", "none", "weights", "statistics")
CLAMP = 4.0
"""Ratios of deviations stay within [1/4, 4]: beyond, the channel is broken, not shrunk."""
GROUPS = 16
"""Groups of images for the jackknife that gives the standard error of a ratio."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Sums over positions for each image and channel: `first`, `second` `[images, channels]`.

    `positions` is how many values each sum has.
    """

    first: np.ndarray
    second: np.ndarray
    positions: int

    def take(self, rows: Any) -> "Moments":
        """The moments of some of the images."""
        return Moments(first=self.first[rows], second=self.second[rows], positions=self.positions)

    def mean_and_deviation(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over images and positions, `[channels]`."""
        count = len(self.first) * self.positions
        mean = self.first.sum(axis=0) / count
        return mean, np.sqrt(np.maximum(self.second.sum(axis=0) / count - mean**2, 0.0))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _sums(
    output: Any, channel_axes: tuple[int, ...], examples: Examples, batch: int
) -> tuple[Any, Any]:
    columns = columns_of(output, channel_axes, examples, batch).astype(jnp.float32)
    return jnp.sum(columns, axis=1), jnp.sum(columns * columns, axis=1)


def _moments(parts: list[Any], counts: list[int], site: Any, batch: int) -> Moments:
    sums = [_sums(part, site.output_axes, site.examples, batch) for part in parts]
    pairs = list(zip(sums, counts, strict=True))
    size = parts[0].size // (batch * sums[0][0].shape[1])
    first = [np.asarray(one, np.float64)[:count] for (one, _), count in pairs]
    second = [np.asarray(two, np.float64)[:count] for (_, two), count in pairs]
    return Moments(first=np.concatenate(first), second=np.concatenate(second), positions=size)


def float_moments(
    engine: Engine, inputs: Any, *, progress: Progress = silent
) -> tuple[list[Moments], np.ndarray]:
    """Moments of every site's output in the float network, and its logits.

    One pass, batch after batch; measured once, they serve every plan.
    """
    network = engine.network
    parts: list[list[Moments]] = [[] for _ in network.sites]
    logits = []
    total = -(-len(jax.tree.leaves(inputs)[0]) // engine.batch_size)
    for done, (batch, count) in enumerate(engine.chunks(inputs)):
        state = engine.start(batch)
        for index, site in enumerate(network.sites):
            out = network.graph.main[site.position].outvars[0]
            state, (output,) = engine.step(state, index, capture=(out,))
            parts[index].append(_moments([output], [count], site, engine.batch_size))
        leaf = jax.tree.leaves(engine.outputs(state))[0]
        logits.append(np.asarray(leaf)[:count])
        progress("float statistics", done + 1, total)
    joined = [
        Moments(
            first=np.concatenate([m.first for m in own]),
            second=np.concatenate([m.second for m in own]),
            positions=own[0].positions,
        )
        for own in parts
    ]
    return joined, np.concatenate(logits)


def correct_weights(engine: Engine, edits: Edits) -> dict[int, Edit]:
    """Give each channel's rounded weights the mean and norm of the float ones; no data."""
    corrected = {}
    for index, edit in edits.items():
        if edit.weight is None:
            corrected[index] = edit
            continue
        site = engine.network.sites[index]
        columns = _restore(engine.columns(index), site.columns(edit.weight))
        weight = site.from_columns(columns, edit.weight.shape)
        corrected[index] = edit._replace(weight=weight)
    return corrected


@jax.jit
def _restore(exact: Any, rounded: Any) -> Any:
    mean, centre = exact.mean(axis=0), rounded.mean(axis=0)
    # W <- (Q - mean Q) |W - mean W| / |Q - mean Q| + mean W, per output channel
    wanted = jnp.linalg.norm(exact - mean, axis=0)
    have = jnp.linalg.norm(rounded - centre, axis=0)
    ratio = jnp.where(have > 0, wanted / jnp.where(have > 0, have, 1), 1)
    return (rounded - centre) * jnp.clip(ratio, 1 / CLAMP, CLAMP) + mean


def correct_statistics(
    engine: Engine,
    edits: Edits,
    inputs: Any,
    reference: list[Moments],
    *,
    shrink: bool = True,
    progress: Progress = silent,
) -> dict[int, Edit]:
    """Match each output channel's mean and deviation to the float network's, layer by layer.

    `reference` holds the float network's moments on the same `inputs`. States of all images
    are held at one cut at a time. Costs about two forward passes.
    """
    network, batch = engine.network, engine.batch_size
    chunks = list(engine.chunks(inputs))
    counts = [count for _, count in chunks]
    states = [engine.start(part) for part, _ in chunks]
    corrected: dict[int, Edit] = {}
    for index, site in enumerate(network.sites):
        edit = edits.get(index)
        if edit is not None and edit.weight is not None:
            raw = [engine.site_output(state, index, edit) for state in states]
            rounded = _moments(raw, counts, site, batch)
            ratio, shift = match(reference[index], rounded, shrink=shrink)
            columns = site.columns(edit.weight) * jnp.asarray(ratio, jnp.float32)
            edit = edit._replace(
                weight=site.from_columns(columns, edit.weight.shape),
                offset=jnp.asarray(shift, jnp.float32),
            )
        if edit is not None:
            corrected[index] = edit
        states = [engine.step(state, index, edit or Edit())[0] for state in states]
        progress("correct", index + 1, len(network.sites))
    return corrected


def match(
    reference: Moments, rounded: Moments, *, shrink: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Ratio and shift, `[channels]` each, that carry one set of moments to another.

    `ratio = s_f / s_q`, shrunk and clamped; `shift = m_f - ratio m_q`. Both sets must be of
    the same images, since the standard error is that of the paired ratio.
    """

    def log_ratio(f: Moments, q: Moments) -> np.ndarray:
        deviation_f, deviation_q = f.mean_and_deviation()[1], q.mean_and_deviation()[1]
        alive = (deviation_f > 0) & (deviation_q > 0)
        safe_q, safe_f = np.where(alive, deviation_q, 1.0), np.where(alive, deviation_f, 1.0)
        return np.log(safe_f / safe_q)

    theta = log_ratio(reference, rounded)
    if shrink:
        error = _jackknife(log_ratio, reference, rounded)
        # James-Stein for one number: theta <- theta * theta^2 / (theta^2 + se^2)
        theta = theta * theta**2 / np.maximum(theta**2 + error**2, np.finfo(float).tiny)
    ratio = np.exp(np.clip(theta, -np.log(CLAMP), np.log(CLAMP)))
    mean_f, mean_q = reference.mean_and_deviation()[0], rounded.mean_and_deviation()[0]
    return ratio, mean_f - ratio * mean_q


def _jackknife(statistic: Any, f: Moments, q: Moments) -> np.ndarray:
    """Standard error of `statistic(f, q)`, leaving out one group of images at a time."""
    images = len(f.first)
    groups = min(GROUPS, images)
    if groups < 2:
        return np.zeros(f.first.shape[1])
    member = np.arange(images) % groups
    values = np.stack([statistic(f.take(member != g), q.take(member != g)) for g in range(groups)])
    # se^2 = (G - 1) / G sum_g (theta_(g) - mean)^2
    return np.sqrt((groups - 1) / groups * ((values - values.mean(axis=0)) ** 2).sum(axis=0))


def correct(
    engine: Engine,
    edits: Edits,
    inputs: Any,
    correction: Correction = "auto",
    *,
    progress: Progress = silent,
) -> tuple[dict[int, Edit], str, Mapping[str, Any]]:
    """Apply a correction; returns the edits, what was used, and what was measured for it.

    `auto` fits on three quarters of the images and compares `none`, `weights` and
    `statistics` by KL to the float network on the last quarter; the winner is fitted again on
    all of them.

    **Raises** `UsageError` for an unknown correction, or when images are needed and missing.
    """
    if correction not in CORRECTIONS:
        raise UsageError(
            f"`correction` must be one of {', '.join(CORRECTIONS)}, got {correction!r}."
        )
    if correction == "none":
        return dict(edits), "none", {}
    if correction == "weights":
        return correct_weights(engine, edits), "weights", {}
    images = 0 if inputs is None else len(jax.tree.leaves(inputs)[0])
    least = 8 if correction == "auto" else 1
    if images < least:
        raise UsageError(
            f"correction={correction!r} needs calibration images, at least {least}, got {images}: "
            "give more, or choose correction='weights' or 'none'."
        )
    moments, logits = float_moments(engine, inputs, progress=progress)
    if correction == "statistics":
        fitted = correct_statistics(engine, edits, inputs, moments, progress=progress)
        return fitted, "statistics", {}
    # A fixed shuffle: data sets often alternate classes, and every fourth image then misses some.
    held = np.random.default_rng(0).permutation(images) % 4 == 3
    fit, check = (jax.tree.map(lambda x, rows=rows: x[rows], inputs) for rows in (~held, held))
    candidates = {
        "none": dict(edits),
        "weights": correct_weights(engine, edits),
        "statistics": correct_statistics(
            engine, edits, fit, [m.take(~held) for m in moments], progress=progress
        ),
    }
    kl = {
        name: float(kl_divergence(logits[held], engine.logits(check, candidate)).mean())
        for name, candidate in candidates.items()
    }
    best = min(kl, key=kl.__getitem__)
    chosen = candidates[best]
    if best == "statistics":
        chosen = correct_statistics(engine, edits, inputs, moments, progress=progress)
    return chosen, best, {"held_back_kl": kl, "held_back_images": int(held.sum())}
