"""How far apart two networks' outputs are, in float64 on the host."""

from collections.abc import Callable

import numpy as np

from proxyq.errors import ProxyqError


def log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities along the last axis, in float64."""
    z = np.asarray(logits, np.float64) / temperature
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kl_divergence(
    reference: np.ndarray, logits: np.ndarray, *, temperature: float = 1.0
) -> np.ndarray:
    """`KL(softmax(reference / T) || softmax(logits / T))` for each image, in nats: `[images]`.

    Outputs with more axes (one prediction a token) are averaged over them.
    """
    return divergence_from(reference, temperature)(logits)


def divergence_from(
    reference: np.ndarray, temperature: float = 1.0
) -> Callable[[np.ndarray], np.ndarray]:
    """`kl_divergence` from one set of logits to any number of others."""
    log_p = log_softmax(two_classes(reference), temperature)
    p = np.exp(log_p)

    def divergence(logits: np.ndarray) -> np.ndarray:
        if reference.shape != logits.shape:
            raise ProxyqError(f"logits differ in shape: {reference.shape} and {logits.shape}.")
        log_q = log_softmax(two_classes(logits), temperature)
        # KL = sum_k p_k (ln p_k - ln q_k)
        each = np.sum(p * (log_p - log_q), axis=-1)
        return each.reshape(len(each), -1).mean(axis=1)

    return divergence


def cross_entropy_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """`-ln softmax(z)_y` for each image, in nats; more predictions an image are averaged."""
    z = two_classes(logits)
    each = -np.take_along_axis(log_softmax(z), np.asarray(targets)[..., None], axis=-1)[..., 0]
    return each.reshape(len(each), -1).mean(axis=1)


def two_classes(logits: np.ndarray) -> np.ndarray:
    """Logits with at least two classes: a single logit z, the log-odds, becomes `(0, z)`."""
    z = logits[:, None] if logits.ndim == 1 else logits
    return z if z.shape[-1] > 1 else np.concatenate([np.zeros_like(z), z], axis=-1)
