"""The weight tensors that derivatives are taken of.

A block is one tensor of the graph with all sites that multiply by it, and usually one layer.
A layer whose weight is used in two shapes (an embedding, transposed for the output) has a
block for each: its second derivatives are those of the blocks, added.
"""

from typing import Any, NamedTuple

from proxyq.engine.engine import Engine
from proxyq.model.graph import Var


class Block(NamedTuple):
    """A weight tensor: the index of its layer, and its sites in execution order."""

    layer: int
    sites: tuple[int, ...]


def blocks(engine: Engine) -> tuple[Block, ...]:
    """All blocks, in the order of first use."""
    network = engine.network
    sites: dict[Var, list[int]] = {}
    for index, site in enumerate(network.sites):
        sites.setdefault(site.weight, []).append(index)
    names = network.names
    return tuple(
        Block(names.index(network.sites[own[0]].layer), tuple(own)) for own in sites.values()
    )


def first_blocks(engine: Engine) -> tuple[Block, ...]:
    """The block of each layer's first use, `[layers]`."""
    found: dict[int, Block] = {}
    for block in blocks(engine):
        found.setdefault(block.layer, block)
    return tuple(found[index] for index in range(len(engine.network.names)))


def along(block: Block, direction: Any) -> dict[int, Any]:
    """A change of the block's weight as a change at each of its sites."""
    return dict.fromkeys(block.sites, direction)


def summed(block: Block, products: dict[int, Any]) -> Any:
    """What the sites' parts of a derivative add up to."""
    total = products[block.sites[0]]
    for site in block.sites[1:]:
        total = total + products[site]
    return total
