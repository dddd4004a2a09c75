"""The nearest positive semidefinite matrix."""

import numpy as np


def nearest_psd(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """A symmetric matrix without its negative eigenvalues, and the share of mass that went.

    The nearest positive semidefinite one in Frobenius norm (Higham 1988); the share is the sum
    of the magnitudes of the negative eigenvalues in that of all. A matrix that is positive
    semidefinite up to rounding is handed back as it is.
    """
    values, vectors = np.linalg.eigh(matrix)
    total = np.abs(values).sum()
    negative = values < -1e-12 * np.abs(values).max(initial=0.0)
    if not negative.any():
        return matrix, 0.0
    # G = V max(D, 0) V'
    kept = (vectors * np.where(negative, 0.0, values)) @ vectors.T
    return (kept + kept.T) / 2, float(-values[negative].sum() / total)
