"""Found by evolution: what correction leaves of the output error, more of it where inputs are many.

With O_l(b) the cost of `output-error`, R_l(b) that of `restored-error`, and e_l(b) = Q_b(x) - x the
rounding error of a sample of what the layer reads, on an asymmetric grid of b bits,

    cost_l(b) = (R_l(b) + |ln|e_l(b)||) R_l(b) ln(macs_l) sqrt(O_l(b))

with the Euclidean norm over the sample, and ln 0 = 0. How we read it: R sqrt(O) is the error, of
order 3/2; the norm is far larger than R, and grows with the share of inputs that are not zero,
whose rounding error is exactly zero; ln(macs) gives a little more to layers that are used at many
positions. The evolution was only told which plans are good.

The same as `formula:evolved-3` with all entries of the sample (`proxies/evolved/evolved-3.json`
tells its origin). For networks whose statistics are restored, as `restored-error` is; no labels,
no gradients, one forward pass and one more for each bit-width. An embedding has no MACs, so the
formula says nothing of it.

Ours, found by `benchmarks/discovery.py` (`docs/evolved_proxies.md`).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from proxyq.engine import Taps
from proxyq.engine.ranges import fit_input_grid
from proxyq.proxies.proxy import register
from proxyq.quantize import fake_quantize


@register(
    needs=("sample", "output-error", "restored-error"),
    shape="layers bits",
    passes="1 forward + 1 per bit-width",
    reference="ours, evolved",
    lookups=False,  # ln(macs) of none
)
def evolved(taps: Taps, *, key: Any) -> np.ndarray:
    """Output error before and after correction, more of it for many inputs and many positions."""
    del key
    table = np.zeros((len(taps), len(taps.bits)))
    for row, tap in zip(table, taps, strict=True):
        sample = np.asarray(tap.sample, np.float32)
        for place, bits in enumerate(taps.bits):
            grid = fit_input_grid(sample, bits)
            error = np.asarray(fake_quantize(jnp.asarray(sample), grid), np.float64) - sample
            # |ln|e||, ln 0 = 0
            inputs = np.linalg.norm(np.log(np.abs(error[error != 0])))
            restored, output = tap.restored_error[place], tap.output_error[place]
            # (R + |ln|e||) R ln(macs) sqrt(O)
            row[place] = (restored + inputs) * restored * np.log(tap.layer.macs) * np.sqrt(output)
    return table
