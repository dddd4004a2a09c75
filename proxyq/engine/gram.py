"""Inner products of how far choices move the logits.

    d_a = change of the centred logits by choice a, over all images and outputs
    total[a, b] = <d_a, d_b>

Softmax does not see a constant that is added to all logits, so each change is taken without its
mean over the classes. Rescaled, it is also taken without its part along the prediction's own
logits, which makes the prediction more or less sure and no other. One batch of changes is held,
and one matrix.
"""

from collections.abc import Mapping

import numpy as np

from proxyq.engine.divergence import two_classes

_BLOCK = 1 << 20  # numbers


class Gram:
    """Sums `total`, float64 `[choices, choices]`, over batches: `add` each choice, then `close`."""

    def __init__(self, choices: int, *, rescaled: bool = False):
        self.total = np.zeros((choices, choices))
        self.rescaled = rescaled
        self._changes: np.ndarray | None = None

    def add(self, choice: int, reference: np.ndarray, logits: np.ndarray) -> None:
        """What a choice makes of a batch; logits `[images, …, classes]`."""
        reference, logits = two_classes(reference), two_classes(logits)
        change = np.asarray(logits, np.float64) - reference
        change -= change.mean(axis=-1, keepdims=True)
        if self.rescaled:
            z = np.asarray(reference, np.float64)
            z = z - z.mean(axis=-1, keepdims=True)
            size = np.sum(z * z, axis=-1, keepdims=True)
            # d - z (z'd / z'z)
            change -= z * (np.sum(z * change, axis=-1, keepdims=True) / np.maximum(size, 1e-300))
        self.put(choice, change)

    def put(self, choice: int, change: np.ndarray) -> None:
        """The same, with what it changes given."""
        if self._changes is None:
            self._changes = np.zeros((len(self.total), change.size), np.float32)
        self._changes[choice] = change.ravel()

    def close(self) -> None:
        """The batch is whole: every choice was added."""
        assert self._changes is not None
        # In float64, a block at a time: a copy of all would be twice as large again.
        columns = max(1, _BLOCK // len(self._changes))
        for start in range(0, self._changes.shape[1], columns):
            part = self._changes[:, start : start + columns].astype(np.float64)
            self.total += part @ part.T
        self._changes = None

    def correlation(self) -> np.ndarray:
        """`rho[a, b] = <d_a, d_b> / (|d_a| |d_b|)`; a choice that changes nothing has none."""
        norms = np.sqrt(np.maximum(np.diag(self.total), 0.0))
        with np.errstate(divide="ignore"):
            inverse = np.where(norms > 0, 1.0 / norms, 0.0)
        rho = self.total * np.outer(inverse, inverse)
        np.fill_diagonal(rho, 1.0)
        return rho

    def arrays(self) -> dict[str, np.ndarray]:
        """All that `restore` needs, for a checkpoint."""
        changes = {} if self._changes is None else {f"{self._name}_changes": self._changes}
        return {self._name: self.total, **changes}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from a checkpoint; one without a Gram matrix leaves all as it is."""
        if self._name in arrays:
            self.total = np.array(arrays[self._name])
            self._changes = None
            if f"{self._name}_changes" in arrays:
                self._changes = np.array(arrays[f"{self._name}_changes"])

    @property
    def _name(self) -> str:
        return "rescaled_gram" if self.rescaled else "gram"
