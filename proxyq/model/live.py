"""Tensors that are live while a network runs, as plain data: what memory is counted from."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An activation of ONE image: `elements`, and `bits` of each in the float network.

    `readers` are the layers that read it as their data, in network order, and `products` the
    products of two activations (`Network.attention`) that do.
    """

    elements: int
    bits: int
    readers: tuple[str, ...] = ()
    products: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Step:
    """A layer's turn, and the tensors that are live in it; `layer` is `None` for the head."""

    layer: str | None
    tensors: tuple[Tensor, ...]

    @property
    def float_bits(self) -> int:
        """What is live in the float network, in bits for one image."""
        return sum(tensor.elements * tensor.bits for tensor in self.tensors)


def float_peak(steps: Sequence[Step]) -> Step:
    """The step at which the float network holds most; the first of equals."""
    return max(steps, key=lambda step: step.float_bits)
