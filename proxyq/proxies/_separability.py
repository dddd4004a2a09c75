"""Class separability by TF-IDF (CSMPQ: Wang et al., ICIC 2023, arXiv:2212.10220).

Channels are words and images documents: a channel that fires strongly on few images tells
them apart. With `A [channels, images]`, a layer's feature after ReLU and global average
pooling, `S_c` the images where channel `c` reaches its mean and `s_c` their number,

    tf_cn   = kappa A_cn / sum_c' A_c'n
    tfbar_c = sum over n in S_c of tf_cn / s_c
    idf_c   = ln(N / (s_c + 1))
    g       = mean over c of tfbar_c idf_c

The formulas follow the authors' code (the paper's text was not at hand). No labels are used.
`form="raw"` gives g itself, as in their training runs; `form="exp"` gives `exp(-beta g)`, as
in their post-training runs, which DEcreases with separability. `kappa="log"` weighs wide
layers up by `ln(e C)`, with a balance coefficient of 1; their scripts leave it at 1.
"""

from typing import Any

import numpy as np

from proxyq.engine import Taps
from proxyq.errors import UsageError
from proxyq.proxies.proxy import register


@register(
    needs=("pooled",),
    shape="layers",
    passes="1 forward",
    reference="CSMPQ: Wang et al. 2023, arXiv:2212.10220",
)
def separability(
    taps: Taps, *, key: Any, form: str = "raw", beta: float = 3.3, kappa: str = "one"
) -> np.ndarray:
    """Layers whose channels tell images apart, by TF-IDF (CSMPQ)."""
    del key
    if form not in ("raw", "exp"):
        raise UsageError(f"`form` of separability must be 'raw' or 'exp', got {form!r}.")
    g = taps.map(lambda tap: tf_idf(tap.pooled.T, kappa=kappa))
    return g if form == "raw" else np.exp(-beta * g)


def tf_idf(activations: np.ndarray, *, kappa: str = "one") -> float:
    """The layer score g, from `activations [channels, images]`, all at least zero."""
    if kappa not in ("one", "log"):
        raise UsageError(f"`kappa` of separability must be 'one' or 'log', got {kappa!r}.")
    channels, images = activations.shape
    weight = np.log(np.e * channels) if kappa == "log" else 1.0
    totals = activations.sum(axis=0)
    # tf_cn = kappa A_cn / sum_c' A_c'n; an image that excites nothing has tf 0
    tf = weight * activations / np.where(totals > 0, totals, 1.0)
    # S_c = images at or above the channel's mean
    above = activations >= activations.mean(axis=1, keepdims=True)
    count = above.sum(axis=1)
    # tfbar_c = mean of tf over S_c
    mean_tf = (tf * above).sum(axis=1) / np.maximum(count, 1)
    # idf_c = ln(N / (s_c + 1))
    idf = np.log(images / (count + 1.0))
    return float(np.mean(mean_tf * idf))
