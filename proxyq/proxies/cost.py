"""From scores to the costs that the allocation minimises."""

import numpy as np

from proxyq.engine import Taps
from proxyq.errors import UsageError, near
from proxyq.proxies.proxy import Scores

COSTS = {
    "linear-bits": "-importance * bits: maximise the bits that important layers get (OMPQ)",
    "times-dw2": "importance * |Q_b(W) - W|^2 (HAWQ V2, with the trace as importance)",
}


def as_cost(scores: Scores, cost: str = "auto", *, taps: Taps | None = None) -> np.ndarray:
    """Costs `[layers, bits]`: scores that have that shape as they are, importances mapped.

    `auto` is `linear-bits`; `times-dw2` needs the taps' weights.
    """
    if scores.shape == "layers bits":
        if cost != "auto":
            raise UsageError(
                f"the proxy {scores.proxy!r} gives a cost for each bit-width already: leave out "
                f"cost={cost!r}."
            )
        return scores.values
    if cost in ("auto", "linear-bits"):
        # cost_l(b) = -c_l b, shifted so that the cheapest bit-width of no layer is below 0
        bits = np.asarray(scores.bits, np.float64)
        return scores.values[:, None] * (bits.max() - bits)[None, :]
    if cost == "times-dw2":
        if taps is None:
            raise UsageError("cost='times-dw2' needs the taps with the layers' weights.")
        table = taps.table(lambda tap, b: ((tap.quantized(b) - tap.columns) ** 2).sum())
        return scores.values[:, None] * table
    raise UsageError(f"unknown cost {cost!r}: {near(cost, list(COSTS))}")
