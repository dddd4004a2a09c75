"""Outliers of a table of sensitivities: entries that make fewer bits look better than more.

A layer's sensitivity should fall as its bits rise. LIMPQ (Tang et al. 2022, arXiv:2203.08368)
learns it for all bit-widths jointly, and where that leaves

    s[l, b'] < s[l, b]    (b' the next lower bit-width than b)

its code gives the entry at b' the penalty 1e8, so that b' is never chosen. All comparisons
are made on the table as it was measured. Where ours differs: the choice is removed from the
problem (a penalty far above all costs eats up a solver's tolerance), and the next lower
bit-width is the next lower candidate, not b - 1, with groups of weights of the same size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from proxyq.errors import UsageError
from proxyq.search.allocate.problem import check_widths
from proxyq.widths import group_of


def without_outliers(values: Any, bits: Sequence[int]) -> np.ndarray:
    """Which entries of `values` `[layers, bits]` stay: a bool mask for `build_problem(allowed=)`.

    `bits` are in the order of the columns, whatever it is. The highest bit-width always stays.
    """
    bits = check_widths(bits)
    table = np.asarray(values, np.float64)
    if table.ndim != 2 or table.shape[1] != len(bits):
        raise UsageError(
            f"a table of sensitivities must have the shape [layers, {len(bits)}], got "
            f"{list(table.shape)}."
        )
    kept = np.ones(table.shape, bool)
    for size in dict.fromkeys(map(group_of, bits)):
        alike = [k for k, b in enumerate(bits) if group_of(b) == size]
        order = sorted(alike, key=lambda k: bits[k])
        # erased where s[l, b'] < s[l, b]
        kept[:, order[:-1]] = ~(table[:, order[:-1]] < table[:, order[1:]])
    return kept
