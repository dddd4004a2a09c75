"""What is differentiated or measured for each image: a function of the network's outputs.

Every objective maps logits `[images, …, classes]` to one number for each image, so that
the derivative of the sum holds each image's own. More axes (a prediction for each token) are
averaged over. A single logit is the log-odds of two classes, as if the logits were `(0, z)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.errors import ProxyqError, UsageError, near

LABELS = ("auto", "data", "predicted", "sampled", "probes")
Objective = Callable[[Any, Any], Any]
"""`(logits [images, …, classes], targets [images, …]) -> [images]`."""


def _per_image(values: Any) -> Any:
    return values.reshape(len(values), -1).mean(axis=1)


def _at(values: Any, targets: Any) -> Any:
    return jnp.take_along_axis(values, targets[..., None], axis=-1)[..., 0]


def cross_entropy(logits: Any, targets: Any) -> Any:
    """`-ln softmax(z)_y`, in nats."""
    return -_per_image(_at(jax.nn.log_softmax(logits.astype(jnp.float32)), targets))


def log_logit(logits: Any, targets: Any) -> Any:
    """`ln |z_y|`, whose derivative is `dz_y / z_y`: the relative change of the target's logit."""
    return _per_image(jnp.log(jnp.abs(_at(logits.astype(jnp.float32), targets))))


def logit_sum(logits: Any, targets: Any) -> Any:
    """`sum over classes of z`, the Jacobian's contraction with ones; targets are not used."""
    del targets
    return _per_image(jnp.sum(logits.astype(jnp.float32), axis=-1))


def curvature_probe(logits: Any, signs: Any) -> Any:
    """A function whose derivative by the logits is `L u`, where `L L' = d2CE/dz2`; `u` are signs.

    The Hessian of the cross-entropy is `diag(p) - p p' = L L'` with
    `L = diag(sqrt p) - p sqrt(p)'`. For random signs the gradients of this by anything are
    draws with the Gauss-Newton matrix as their second moment: `E[g g'] = J' L E[u u'] L' J`.
    Unlike gradients at sampled labels they are never rare and large. Of several predictions of
    an image, whose cross-entropies are averaged, each has its own signs.
    """
    p = jax.lax.stop_gradient(jax.nn.softmax(logits.astype(jnp.float32)))
    root = jnp.sqrt(p)
    # L u = sqrt(p) u - p (sqrt(p) . u)
    slope = root * signs - p * jnp.sum(root * signs, axis=-1, keepdims=True)
    each = jnp.sum(slope * logits, axis=-1).reshape(len(logits), -1)
    # The mean of T cross-entropies has the Hessian L L' / T.
    return jnp.sum(each, axis=1) / np.sqrt(each.shape[1])


OBJECTIVES: dict[str, Objective] = {
    "cross-entropy": cross_entropy,
    "log-logit": log_logit,
    "logit-sum": logit_sum,
}


def objective(name: str) -> Objective:
    """An objective by name; near misses otherwise."""
    if name not in OBJECTIVES:
        raise UsageError(f"unknown `loss` {name!r}: {near(name, list(OBJECTIVES))}")
    return OBJECTIVES[name]


def with_classes(logits: Any) -> Any:
    """Logits with an axis of at least two classes: a single logit z becomes `(0, z)`."""
    if logits.ndim == 1:
        logits = logits[:, None]
    if logits.shape[-1] > 1:
        return logits
    return jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """Which class counts as true, for every image.

    - `how`: `data` (given labels), `predicted` (the network's own answer), `sampled` (drawn
      from the network's distribution, which makes squared gradients the true Fisher
      information), or `probes` (random signs for `curvature_probe`, for the same with less
      variance).
    - `labels`: `[images]`, for `data`. `seed`: of what is drawn, for each image apart, so that
      it does not depend on the size of batches.
    """

    how: str
    labels: np.ndarray | None = None
    seed: int = 0

    def of(self, logits: Any, start: int, count: int) -> Any:
        """Targets `[batch, …]` of images `start … start + count`, filled up to the batch."""
        shape, classes = logits.shape[:-1], logits.shape[-1]
        if self.how == "predicted":
            return jnp.argmax(logits, axis=-1)
        rows = np.minimum(np.arange(start, start + shape[0]), start + count - 1)
        if self.how == "probes":
            rngs = (np.random.default_rng([self.seed, int(row)]) for row in rows)
            signs = [rng.integers(0, 2, logits.shape[1:]) for rng in rngs]
            return jnp.asarray(2.0 * np.stack(signs) - 1.0, jnp.float32)
        if self.how == "sampled":
            # One stream for each image: the same draw whatever the batches are.
            draws = [np.random.default_rng([self.seed, int(row)]).random(shape[1:]) for row in rows]
            z = np.asarray(logits, np.float64)
            weights = np.exp(z - z.max(axis=-1, keepdims=True))
            cumulated = np.cumsum(weights, axis=-1)
            cumulated /= cumulated[..., -1:]
            below = (cumulated < np.stack(draws)[..., None]).sum(axis=-1)
            return jnp.asarray(np.minimum(below, classes - 1), jnp.int32)
        assert self.labels is not None
        own = self.labels[rows]
        if own.shape != shape:
            raise ProxyqError(
                f"labels of shape {own.shape} do not fit predictions of shape {shape}: give one "
                "label for each prediction, or labels='predicted'."
            )
        if own.min() < 0 or own.max() >= classes:
            bad = own[(own < 0) | (own >= classes)].flat[0]
            raise ProxyqError(
                f"the label {bad} is not one of the model's {classes} classes: check the labels, "
                "or use labels='predicted'."
            )
        return jnp.asarray(own, jnp.int32)


def objective_for(name: str, aims: Targets) -> Objective:
    """The objective of this name at these targets; for `probes`, the function they belong to.

    **Raises** `UsageError` for probes of anything but the cross-entropy.
    """
    found = objective(name)
    if aims.how != "probes":
        return found
    if found is not cross_entropy:
        raise UsageError("labels='probes' are for loss='cross-entropy'.")
    return curvature_probe


def targets(how: str, labels: Any = None, seed: int = 0) -> Targets:
    """Targets from labels and the option `labels`; `auto` takes those of the data, if any.

    **Raises** `UsageError` for an unknown way, or `data` without labels.
    """
    if how not in LABELS:
        raise UsageError(f"`labels` must be one of {', '.join(LABELS)}, got {how!r}.")
    if how == "auto":
        how = "predicted" if labels is None else "data"
    if how != "data":
        return Targets(how=how, seed=seed)
    if labels is None:
        raise UsageError(
            "labels='data' needs labelled images, and these have no labels: use "
            "labels='predicted', or give images with labels."
        )
    return Targets(how=how, labels=np.asarray(labels))
