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


_NEWTON = 60
_LARGEST = 64.0


def rescaled_divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """`min over s >= 0 of KL(softmax(reference) || softmax(s logits))` for each image: `[images]`.

    What is left of KL when each prediction may be as sure of itself as it likes: how far its
    order and spacing of the classes is off. Rounding shrinks logits, the more so the deeper the
    network, and that alone changes no answer, though it may be most of KL. `s` is found to the
    last digit that matters, within 0 and 64. Further axes are averaged over.
    """
    if reference.shape != logits.shape:
        raise ProxyqError(f"logits differ in shape: {reference.shape} and {logits.shape}.")
    log_p = log_softmax(two_classes(reference))
    log_p = log_p.reshape(-1, log_p.shape[-1])
    z = two_classes(np.asarray(logits, np.float64)).reshape(log_p.shape)
    z = z - z.mean(axis=-1, keepdims=True)
    p = np.exp(log_p)
    aim = np.sum(p * z, axis=-1)
    low, high = np.zeros(len(z)), np.full(len(z), _LARGEST)
    scale = np.ones(len(z))
    rows = np.arange(len(z))  # not yet found
    for _ in range(_NEWTON):
        own = z[rows]
        q = np.exp(log_softmax(scale[rows, None] * own))
        mean = np.sum(q * own, axis=-1)
        # dKL/ds = q'z - p'z, which rises with s: d2KL/ds2 = var_q z
        slope = mean - aim[rows]
        curve = np.sum(q * own**2, axis=-1) - mean**2
        above = slope >= 0
        high[rows] = np.where(above, scale[rows], high[rows])
        low[rows] = np.where(above, low[rows], scale[rows])
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.where(curve > 0, slope / curve, np.inf)
        new = scale[rows] - step
        inside = (new > low[rows]) & (new < high[rows])
        new = np.where(inside, new, (low[rows] + high[rows]) / 2)
        moved = np.abs(new - scale[rows]) > 1e-9 * scale[rows]
        scale[rows] = new
        rows = rows[moved]
        if not len(rows):
            break
    each = np.sum(p * (log_p - log_softmax(scale[:, None] * z)), axis=-1)
    return each.reshape(len(reference), -1).mean(axis=1)


def cross_entropy_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """`-ln softmax(z)_y` for each image, in nats; more predictions an image are averaged."""
    z = two_classes(logits)
    each = -np.take_along_axis(log_softmax(z), np.asarray(targets)[..., None], axis=-1)[..., 0]
    return each.reshape(len(each), -1).mean(axis=1)


def two_classes(logits: np.ndarray) -> np.ndarray:
    """Logits with at least two classes: a single logit z, the log-odds, becomes `(0, z)`."""
    z = logits[:, None] if logits.ndim == 1 else logits
    return z if z.shape[-1] > 1 else np.concatenate([np.zeros_like(z), z], axis=-1)
