"""How good a quantized network is: its accuracy."""

import numpy as np


def right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`[images]`: is the largest logit at the label? Of logits that are not finite none is."""
    finite = np.isfinite(logits).all(axis=-1)
    return finite & (np.argmax(logits, axis=-1) == labels)


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest logit is at the label, in percent."""
    return 100.0 * float(np.mean(right(logits, labels)))


def class_top1(right: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Top-1 of each class that has images, in percent: `[classes]`, in the order of the labels.

    - `right`: bool `[images]`; `labels`: integers `[images]`.
    """
    _, place, images = np.unique(labels, return_inverse=True, return_counts=True)
    return 100.0 * np.bincount(place, weights=right) / images
