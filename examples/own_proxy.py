"""A proxy of one's own in one file, ranked against others on a measured table.

The number: Spearman's rank correlation between what it predicts and what was measured.
"""

from typing import Any

import numpy as np

import proxyq
from proxyq.engine import Taps
from proxyq.proxies import make_proxy


def _worst_channel(taps: Taps, *, key: Any, power: float = 1.0) -> np.ndarray:
    """Relative rounding error of the output channel that suffers most."""
    del key

    def cost(tap: Any, bits: int) -> float:
        # |Q_b(w_c) - w_c|^2 / |w_c|^2, the largest over output channels c
        weights = np.asarray(tap.columns, np.float64)
        error = np.asarray(tap.quantized(bits), np.float64) - weights
        energy = np.maximum((weights**2).sum(axis=0), 1e-12)
        return float(((error**2).sum(axis=0) / energy).max() ** power)

    return taps.table(cost)


worst_channel = make_proxy(
    _worst_channel,
    name="worst-channel",
    needs=("weight",),  # what is recorded for it; no image is read for the weights alone
    shape="layers bits",  # a cost for each bit-width
    passes="none",
    reference="this file",
)

# It is a proxy like any other: `search` takes it, and so do `score`, `pareto` and `rank`.
plan = proxyq.search(proxy=worst_channel, budget="size=3bit")
print(plan)

# A table of random plans of the embedded network, each measured, comes with proxyq. The rank of
# predicted costs against measured accuracy tells what a proxy is worth.
result = proxyq.rank(
    table="digits", proxies=[worst_channel, "sqnr", "restored-error"], in_the_loop=False
)
print(f"\n{'cost':<16} Spearman   95 % interval")
for row in result.rows:
    found = row.ranking.correlations["spearman"]
    print(f"{row.name:<16} {found.value:8.3f}   {found.low:.3f} to {found.high:.3f}")

own = result["worst-channel"].ranking.correlations["spearman"]
print(f"\nSpearman of worst-channel: {own.value:.3f}")
