"""What an exporter tells of what it wrote."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A quantized network as a runtime's file or folder.

    - `raised`: layers that the runtime cannot hold at the width that was asked for: `(asked,
      stored)` bits; 32 is float.
    - `size_bits`: bits of all layers' weights at the widths that are stored, and `planned_bits`
      at those of the plan; scales and biases not counted.
    - `notes`: what a user should know, a sentence each.
    """

    path: Path
    raised: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    size_bits: int = 0
    planned_bits: int = 0
    notes: tuple[str, ...] = ()
