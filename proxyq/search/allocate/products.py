"""Products of two activations as budgets count them: operations and memory, without a choice."""

from collections.abc import Mapping
from typing import NamedTuple


class Multiplied(NamedTuple):
    """Multiply-accumulates for one example, and the bits of both operands; `None` is float."""

    macs: int
    bits: int | None


Attention = Mapping[str, Multiplied]
"""The products of a network by name, such as those of attention."""
