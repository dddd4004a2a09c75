"""Random plans, for tables of measured accuracy.

- `uniform`: every layer's bits alike likely and independent. The sizes of such plans lie close
  together, the more so the more layers there are.
- `size`: spread over all sizes. For a target `t`, evenly drawn between the least and the most
  average bits, bits have the probabilities `p(b) ~ exp(lambda b)`, with `lambda` such that the
  expected average is `t`; so no layer is told from another, but plans are from small to large.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from proxyq.errors import UsageError

DRAWS = ("uniform", "size")
_TRIES = 100


def draw_plans(
    layers: int, bits: Sequence[int], number: int, *, how: str = "uniform", seed: int = 0
) -> list[tuple[int, ...]]:
    """`number` different plans, each the bits of `layers` layers.

    **Raises** `UsageError` for an unknown way, or when there are not that many plans.
    """
    if how not in DRAWS:
        raise UsageError(f"`draw` must be one of {', '.join(DRAWS)}, got {how!r}.")
    if number < 1:
        raise UsageError(f"`plans` must be at least 1, got {number}.")
    widths = np.array(sorted(set(bits)))
    if layers * np.log(len(widths)) < np.log(number) - 1e-9:
        raise UsageError(
            f"`plans` must be at most {len(widths) ** layers}, since there are no more plans of "
            f"{layers} layers with {len(widths)} bit-widths, got {number}."
        )
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {}
    tries = 0
    while len(found) < number:
        tries += 1
        spread = how == "size" and tries <= _TRIES * number  # the ends of the range hold few plans
        p = _tilted(widths, rng.uniform(widths[0], widths[-1])) if spread else None
        found[tuple(int(b) for b in rng.choice(widths, size=layers, p=p))] = None
    return list(found)


def _tilted(widths: np.ndarray, average: float) -> np.ndarray:
    """Probabilities `p(b) ~ exp(lambda b)` with the given average."""
    if len(widths) == 1:
        return np.ones(1)

    def p(tilt: float) -> np.ndarray:
        weight = np.exp(tilt * (widths - widths[-1 if tilt > 0 else 0]))
        return weight / weight.sum()

    # A tilt of 50 leaves one width alone, to the last digit.
    low, high = (p(tilt) @ widths for tilt in (-50.0, 50.0))
    if not low < average < high:
        return p(-50.0 if average <= low else 50.0)
    from scipy.optimize import brentq

    tilt: Any = brentq(lambda tilt: p(tilt) @ widths - average, -50.0, 50.0)
    return p(tilt)
