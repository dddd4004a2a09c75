"""How good a quantized network is: its accuracy."""

import numpy as np


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest logit is at the label, in percent."""
    return 100.0 * float(np.mean(np.argmax(logits, axis=-1) == labels))
