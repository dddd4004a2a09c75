"""Layer statistics restored after rounding: per output channel, a scale and a shift.

Rounding to the least squared error shrinks a layer's output, and the shrinkage of all layers
adds up. A scale folds into the weights' scale, a shift into the bias, so neither costs anything
at run time.

- `correct_weights` needs no data: each channel's rounded weights get the mean and the norm of
  the float ones (Banner et al. 2019, arXiv:1810.05723, section 4.2).
- `correct_statistics` walks the layers in order, each fed by the corrected layers before it,
  and gives each output channel the mean and standard deviation that it has in the float network
  on unlabelled images (in the spirit of Nagel et al. 2019, arXiv:1906.04721, section 4.2, with
  the deviation matched too). A ratio is shrunk towards 1 by its standard error and clamped.
- `corrected_alternatives` does the same for single layers that stand in for another choice of
  bits, in a network that is otherwise float, or follows a plan.

The output of a lookup has no axis for the rows of its table, so statistics do nothing to it; where
the same table multiplies as well (a tied head), only means are restored there, for both must keep
one grid. `correct_weights` restores each row of a table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine.engine import Edits, Engine, at_least_float32
from proxyq.engine.memory import outputs_per_image
from proxyq.engine.segments import NO_EDIT, Edit
from proxyq.engine.spill import Spill
from proxyq.model.examples import Examples
from proxyq.model.layers import columns_of
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT, network
from proxyq.progress import Progress, silent

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


def _moments(output: Any, count: int, site: Any, batch: int) -> Moments:
    sums = _sums(output, site.feature_axes, site.examples, batch)
    first, second = (np.asarray(part, np.float64)[:count] for part in sums)
    return Moments(first=first, second=second, positions=output.size // sums[0].size)


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
            parts[index].append(_moments(output, count, site, engine.batch_size))
        leaf = jax.tree.leaves(engine.outputs(state))[0]
        logits.append(np.asarray(at_least_float32(leaf))[:count])
        progress("float statistics", done + 1, total)
    return [_joined(own) for own in parts], np.concatenate(logits)


def moments_bytes(moments: Sequence[Moments]) -> int:
    """What moments of all sites take."""
    return sum(own.first.nbytes + own.second.nbytes for own in moments)


def fitted_bytes(model: Model, images: int) -> int:
    """What is held of `images` while a network is fitted to the float one: moments of all sites,
    and its outputs, the float network's and the quantized one's."""
    found = network(model, LAYERS_AT)
    channels = sum(math.prod(site.channel_shape) for site in found.sites)
    return images * (16 * channels + 8 * outputs_per_image(found.graph))


def _joined(parts: Sequence[Moments]) -> Moments:
    return Moments(
        first=np.concatenate([m.first for m in parts]),
        second=np.concatenate([m.second for m in parts]),
        positions=parts[0].positions,
    )


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
    means_alone: bool = False,
    progress: Progress = silent,
) -> dict[int, Edit]:
    """Match each output channel's mean and deviation to the float network's, layer by layer.

    `reference` holds the float network's moments on the same `inputs`. States of all images are
    held at one cut at a time, in a file as far as the engine's memory has no room. Costs about
    two forward passes. With `means_alone` the weights stay as they are: bias correction (Nagel et
    al. 2019, arXiv:1906.04721, section 4.2).
    """
    network = engine.network
    corrected: dict[int, Edit] = {}
    with _Walk(engine, inputs, reference) as walk:
        for index in range(len(network.sites)):
            edit = edits.get(index)
            if edit is not None and edit.weight is not None:
                edit = walk.matched(
                    index, edit, reference[index], shrink=shrink, means_alone=means_alone
                )
            if edit is not None:
                corrected[index] = edit
            walk.step(index, edit or NO_EDIT)
            progress("correct", index + 1, len(network.sites))
    return corrected


def corrected_alternatives(
    engine: Engine,
    alternatives: Mapping[str, Sequence[Edits]],
    inputs: Any,
    reference: list[Moments],
    *,
    base: Edits | None = None,
    shrink: bool = True,
    progress: Progress = silent,
) -> dict[str, list[dict[int, Edit]]]:
    """Each layer's alternatives, matched to the float network's statistics one layer at a time.

    All layers before it are as in `base` (float where it says nothing), which stays as it is.
    A layer with several sites is matched at each of them in that network. Costs a forward pass
    and another one for each alternative.
    """
    network, base = engine.network, base or {}
    found = {name: [dict(edits) for edits in own] for name, own in alternatives.items()}
    with _Walk(engine, inputs, reference) as walk:
        for index, site in enumerate(network.sites):
            for edits in found.get(site.layer, ()):
                if index in edits:
                    edits[index] = walk.matched(
                        index, edits[index], reference[index], shrink=shrink
                    )
            walk.step(index, base.get(index, NO_EDIT))
            progress("correct alternatives", index + 1, len(network.sites))
    return found


class _Walk:
    """All images at one cut, moved on from site to site.

    Beside a batch and the `reference`, as many states are held as the engine's memory has room
    for; the others lie in a file.
    """

    def __init__(self, engine: Engine, inputs: Any, reference: Sequence[Moments]):
        self.engine = engine
        room = engine.room
        self.states = Spill(None if room is None else room - moments_bytes(reference))
        self.counts: list[int] = []
        for number, (part, count) in enumerate(engine.chunks(inputs)):
            self.states.put(number, engine.start(part))
            self.counts.append(count)

    def __enter__(self) -> "_Walk":
        return self

    def __exit__(self, *error: Any) -> None:
        self.states.__exit__(*error)

    def matched(
        self,
        index: int,
        edit: Edit,
        reference: Moments,
        *,
        shrink: bool,
        means_alone: bool = False,
    ) -> Edit:
        """The edit, with the statistics that the site has in the float network."""
        network = self.engine.network
        site = network.sites[index]
        if site.lookup:
            return edit
        means_alone = means_alone or network.looked_up(site.layer)
        parts = []
        for number, count in enumerate(self.counts):
            raw = self.engine.site_output(self.states.get(number), index, edit)
            parts.append(_moments(raw, count, site, self.engine.batch_size))
        rounded = _joined(parts)
        ratio, shift = match(reference, rounded, shrink=shrink)
        if means_alone:
            ratio, shift = np.ones_like(ratio), _mean(reference) - _mean(rounded)
        # What was added before goes through the ratio too: r (W x + o) + shift.
        if edit.offset is not None:
            shift = shift + ratio * np.asarray(edit.offset, np.float64)
        weight = self.engine.weight(index) if edit.weight is None else edit.weight
        columns = site.columns(weight) * jnp.asarray(ratio, jnp.float32)
        return edit._replace(
            weight=site.from_columns(columns, weight.shape), offset=jnp.asarray(shift, jnp.float32)
        )

    def step(self, index: int, edit: Edit) -> None:
        """Pass the site, under an edit."""
        for number in range(len(self.counts)):
            state, _ = self.engine.step(self.states.get(number), index, edit)
            self.states.put(number, state)


def _mean(moments: Moments) -> np.ndarray:
    return moments.mean_and_deviation()[0]


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
