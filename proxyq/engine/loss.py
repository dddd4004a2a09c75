"""One order of plans, from the ruined to the nearly whole, by unlabelled images alone.

Of a network that is nearly whole, KL to the float network tells best how accurate it is. Of a
wrecked one it does not: how sure such a network is of its answers, which is most of its KL, says
nothing of them, and KL up to the scale of each prediction's logits does. So plans beyond `WRECKED`
are ordered by the latter, all others by KL, and come first. Measured by
`benchmarks/loss_ranking.py`.
"""

import math
from typing import NamedTuple

import numpy as np

from proxyq.engine.divergence import kl_divergence, rescaled_divergence

WRECKED = 0.25
"""Nats of rescaled divergence."""


class Loss(NamedTuple):
    """How far a network is from the float one, in nats; `<` says that it is closer.

    - `rescaled`: mean KL up to the scale of each prediction's logits.
    - `kl`: mean KL as it is.
    """

    rescaled: float
    kl: float

    @property
    def wrecked(self) -> bool:
        """Whether KL says little of the network's answers."""
        return self.rescaled > WRECKED

    @property
    def order(self) -> tuple[float, float]:
        """What losses are compared by, the less the better."""
        return (self.rescaled if self.wrecked else 0.0, self.kl)

    def __lt__(self, other: "Loss") -> bool:  # type: ignore[override]
        return self.order < other.order

    def __le__(self, other: "Loss") -> bool:  # type: ignore[override]
        return self.order <= other.order

    def __gt__(self, other: "Loss") -> bool:  # type: ignore[override]
        return self.order > other.order

    def __ge__(self, other: "Loss") -> bool:  # type: ignore[override]
        return self.order >= other.order


_BLOCK = 1 << 20  # logits

BROKEN = Loss(math.inf, math.inf)
"""Of a network whose outputs are not finite: worse than all others."""


def loss_of(reference: np.ndarray, logits: np.ndarray) -> Loss:
    """The loss of a network's logits against those of the float one, on the same images."""
    if not np.isfinite(logits).all():
        return BROKEN
    # In float64, which a whole vocabulary for each token of all texts has no room for.
    size = max(1, _BLOCK // max(1, logits[0].size))
    blocks = [slice(start, start + size) for start in range(0, len(logits), size)]
    rescaled = [rescaled_divergence(reference[one], logits[one]) for one in blocks]
    kl = [kl_divergence(reference[one], logits[one]) for one in blocks]
    return Loss(float(np.concatenate(rescaled).mean()), float(np.concatenate(kl).mean()))
