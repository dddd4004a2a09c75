"""How good a quantized network is: its accuracy."""

import numpy as np


def right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`[images]`: is the largest logit at the label? Of logits that are not finite none is."""
    finite = np.isfinite(logits).all(axis=-1)
    return finite & (np.argmax(logits, axis=-1) == labels)


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest logit is at the label, in percent."""
    return 100.0 * float(np.mean(right(logits, labels)))
