"""How far a quantized network is from the float one: accuracy, and divergence of outputs."""

import numpy as np

from proxyq.errors import ProxyqError


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest logit is at the label, in percent."""
    return 100.0 * float(np.mean(np.argmax(logits, axis=-1) == labels))


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
    if reference.shape != logits.shape:
        raise ProxyqError(f"logits differ in shape: {reference.shape} and {logits.shape}.")
    if reference.ndim == 1 or reference.shape[-1] == 1:
        # One logit is the log-odds of two classes: softmax of (z, 0) is (sigmoid(z), 1 - ...).
        reference, logits = (
            np.stack([z.reshape(len(z), -1), np.zeros((len(z), z[0].size))], axis=-1)
            for z in (reference, logits)
        )
    p, q = log_softmax(reference, temperature), log_softmax(logits, temperature)
    # KL = sum_k p_k (ln p_k - ln q_k)
    each = np.sum(np.exp(p) * (p - q), axis=-1)
    return each.reshape(len(each), -1).mean(axis=1)
