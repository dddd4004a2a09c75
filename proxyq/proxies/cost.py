"""From scores to the costs that the allocation minimises."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from proxyq.engine import Engine, Taps
from proxyq.engine.rounded import weight_changes
from proxyq.errors import ProxyqError, UsageError, near
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT
from proxyq.proxies.proxy import Scores
from proxyq.quantize import Rounding
from proxyq.widths import groups_of_all

COSTS = {
    "linear-bits": "-importance * bits: the most bits to the important layers (OMPQ, EMQ)",
    "times-dw2": "importance * |Q_b(W) - W|^2 (HAWQ: the importance is a curvature)",
    "times-relative-dw2": "importance * |Q_b(W) - W|^2 / |W|^2: whatever the weights' scale",
    "times-relative-dw": "importance * |Q_b(W) - W| / |W|: a first-order change",
    "exponential": "importance * 4^-bits: rounding noise falls by four with each bit",
}
OF_BITS = ("linear-bits", "exponential")
NEED_ERRORS = ("times-dw2", "times-relative-dw2", "times-relative-dw")


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightErrors:
    """Rounding errors `squared [layers, bits] = |Q_b(W) - W|^2` and `energy [layers] = |W|^2`."""

    squared: np.ndarray
    energy: np.ndarray


def weight_errors(
    of: Taps | Model, bits: tuple[int, ...] | None = None, rounding: Rounding | None = None
) -> WeightErrors:
    """The rounding errors of all layers, at the first use of each weight."""
    if isinstance(of, Taps):
        engine, bits, rounding = of.engine, of.bits, of.taps[0].rounding
    else:
        engine = Engine.build(of, LAYERS_AT)
    assert bits is not None
    network = engine.network
    squared, energy = np.zeros((len(network.names), len(bits))), np.zeros(len(network.names))
    for row, name in enumerate(network.names):
        site = network.sites_of(name)[0]
        changes = weight_changes(engine, site, bits, rounding)
        squared[row] = [float(jnp.sum(change * change)) for change in changes]
        energy[row] = float(jnp.sum(engine.columns(site).astype(jnp.float32) ** 2))
    return WeightErrors(squared=squared, energy=energy)


def check_cost(cost: str) -> str:
    """Refuse a mapping that does not exist; `auto` is the proxy's own."""
    if cost != "auto" and cost not in COSTS:
        raise UsageError(f"unknown cost {cost!r}: {near(cost, ['auto', *COSTS])}")
    return cost


def check_cost_of_groups(name: str, bits: Sequence[int]) -> None:
    """Refuse a mapping that is of bits alone, where group sizes are to be chosen too."""
    if name in OF_BITS and groups_of_all(bits):
        raise UsageError(
            f"cost={name!r} (--cost) goes by bits alone and cannot tell groups of weights from "
            f"whole channels: use one of {', '.join(NEED_ERRORS)}, or give one group size "
            "(--group-size 64)."
        )


def cost_name(scores: Scores, cost: str = "auto") -> str:
    """The mapping that `cost` stands for, or `given` for scores that are costs already."""
    if scores.shape == "layers":
        return check_cost(scores.cost if cost == "auto" else cost)
    if check_cost(cost) != "auto":
        raise UsageError(
            f"the proxy {scores.proxy!r} gives a cost for each bit-width already: leave out "
            f"cost={cost!r}."
        )
    return "given"


def as_cost(
    scores: Scores, cost: str = "auto", *, errors: WeightErrors | None = None
) -> np.ndarray:
    """Costs `[layers, bits]`: scores that have that shape as they are, importances mapped.

    `auto` is the mapping that the proxy's record names; what contains `dw` needs `errors`.

    **Raises** `ProxyqError` naming layer and proxy when a cost overflows.
    """
    name = cost_name(scores, cost)
    if name == "given":
        return scores.values
    check_cost_of_groups(name, scores.bits)
    bits = np.asarray(scores.bits, np.float64)
    importance = scores.values[:, None]
    if name == "linear-bits":
        # cost_l(b) = -c_l b, shifted so that the most bits cost nothing
        return importance * (bits.max() - bits)[None, :]
    if name == "exponential":
        # cost_l(b) = c_l 4^-b
        return importance * 4.0 ** -bits[None, :]
    if errors is None:
        raise UsageError(f"cost={name!r} needs `errors`, the rounding errors of the weights.")
    table = errors.squared
    if name != "times-dw2":
        energy = np.maximum(errors.energy, np.finfo(np.float64).tiny)
        table = table / energy[:, None]  # of a layer of zeros nothing is lost: 0 / tiny
    if name == "times-relative-dw":
        table = np.sqrt(table)
    with np.errstate(over="ignore", invalid="ignore"):
        found = importance * table
    if not np.isfinite(found).all():
        layer = scores.layers[int(np.argwhere(~np.isfinite(found))[0, 0])].name
        raise ProxyqError(
            f"the proxy {scores.proxy!r} with cost={name!r} overflows for layer {layer!r}: check "
            "the model's weights, or choose another cost."
        )
    return found
