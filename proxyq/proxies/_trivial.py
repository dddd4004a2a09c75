"""Trivial baselines. A proxy that does not beat them measures nothing."""

from typing import Any

import jax
import numpy as np

from proxyq.engine import Taps
from proxyq.proxies.proxy import register


@register(needs=(), shape="layers", passes="none", reference="baseline", baseline=True)
def params(taps: Taps, *, key: Any) -> np.ndarray:
    """The number of weights: large layers get more bits."""
    del key
    return taps.map(lambda tap: tap.layer.weights)


@register(needs=(), shape="layers", passes="none", reference="baseline", baseline=True)
def macs(taps: Taps, *, key: Any) -> np.ndarray:
    """The number of multiply-accumulates: busy layers get more bits."""
    del key
    return taps.map(lambda tap: tap.layer.macs)


@register(
    needs=(), shape="layers bits", passes="none", reference="baseline", baseline=True, groups=False
)
def uniform(taps: Taps, *, key: Any) -> np.ndarray:
    """All weights alike: the optimum under a size budget is one bit-width for all layers.

    Rounding noise falls by four with each bit, so the cost is `weights * 4^-b`, whose
    constrained minimum has equal bits wherever the budget allows.
    """
    del key
    return taps.table(lambda tap, bits: tap.layer.weights * 4.0**-bits)


@register(needs=(), shape="layers", passes="none", reference="baseline", baseline=True, random=True)
def random(taps: Taps, *, key: Any) -> np.ndarray:
    """Independent uniform draws from the key."""
    return np.asarray(jax.random.uniform(key, (len(taps),)))
