"""Zen-score, layer by layer (Lin et al., ICCV 2021, arXiv:2102.01063).

How far a layer's output moves when the network's input does: with `x` and `e` standard normal,

    score_l = E |y_l(x + a e) - y_l(x)| / a,   a = 0.01

The paper takes the logarithm for the last feature of a network with fresh weights and batch
norm, and adds the logarithms of the batch deviations that batch norm divides out. Here the
network is the trained one, whose norms are folded into its weights with running statistics, so
that nothing is divided out; every layer has its own score, and it is left without the
logarithm, for an importance must not be negative.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine import NO_EDIT, Engine, Taps
from proxyq.errors import UsageError
from proxyq.proxies.proxy import register


@register(
    needs=("engine",),
    shape="layers",
    passes="2 forward on noise",
    reference="Zen-NAS: Lin et al. 2021, arXiv:2102.01063",
    cost_class="forward",
    random=True,
    fixed={"labels": "predicted"},
)
def zen(taps: Taps, *, key: Any, images: int = 32, step: float = 0.01) -> np.ndarray:
    """How far the output moves when noise of the input does."""
    if images < 1 or not 0 < step < 1:
        raise UsageError(
            "`images` of zen must be at least 1 and `step` between 0 and 1, got "
            f"{images} and {step}."
        )
    model = taps.engine.network.model
    engine = Engine.build(model, images, memory=taps.memory)
    moved = np.zeros(len(engine.network.sites))
    keys = jax.random.split(key)
    shapes = model.example(images)
    first, second = (jax.tree.map(lambda leaf, k=k: _normal(k, leaf), shapes) for k in keys)
    shifted = jax.tree.map(lambda x, e: x + step * e if _is_float(x) else x, first, second)
    for (plain, count), (other, _) in zip(
        engine.chunks(first), engine.chunks(shifted), strict=True
    ):
        states = [engine.start(plain), engine.start(other)]
        for index, site in enumerate(engine.network.sites):
            out = engine.network.graph.main[site.position].outvars[0]
            outs = []
            for which in (0, 1):
                states[which], (y,) = engine.step(states[which], index, NO_EDIT, (out,))
                outs.append(site.rows(y, engine.batch_size)[:count])
            # |y(x + a e) - y(x)| of each image
            moved[index] += float(jnp.sum(jnp.linalg.norm(outs[1] - outs[0], axis=1)))
    return np.array([moved[tap.site] / (images * step) for tap in taps])


def _is_float(x: Any) -> bool:
    return np.issubdtype(np.asarray(x).dtype, np.floating)


def _normal(key: Any, leaf: Any) -> np.ndarray:
    if not np.issubdtype(leaf.dtype, np.floating):
        return np.zeros(leaf.shape, leaf.dtype)
    return np.asarray(jax.random.normal(key, leaf.shape), leaf.dtype)
