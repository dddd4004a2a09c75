"""Products of two activations: what attention multiplies that is no layer.

The scores of attention, `Q K'`, and the sums of its values, `P V`, are dot products both of whose
operands depend on data. They have no weight, and so no bits of their own in the allocation, but
runtimes that compute in integers round both operands. A product is named after the layers that it
is computed from, up to where their names part: `blocks.0.attn@scores`, `blocks.0.attn@values`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from proxyq.model.graph import Equation, Graph, Var, is_literal
from proxyq.model.layers import Site

SCORES, VALUES, OTHER = "scores", "values", "product"
"""Kinds of products: of which another one is computed before the next layer, that other one, and
what stands alone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """A dot product of two tensors that depend on data.

    - `position`: index in `graph.main`; `site`: index of the last site before it, with whose
      segment it runs.
    - `operands`: what it multiplies, left and right. `macs`: multiply-accumulates for ONE example.
    """

    name: str
    position: int
    site: int
    operands: tuple[Var, Var]
    macs: int


def find_products(graph: Graph, sites: Sequence[Site]) -> tuple[Product, ...]:
    """All products of two activations after the first site, in execution order."""
    at = {site.position: index for index, site in enumerate(sites)}
    positions = [
        position
        for position, eqn in enumerate(graph.main)
        if position > sites[0].position and position not in at and is_product(graph, eqn)
    ]
    before = {position: _before(graph, position, at, set(positions)) for position in positions}
    names = _names(positions, before, sites)
    found = []
    for position in positions:
        eqn = graph.main[position]
        found.append(
            Product(
                name=names[position],
                position=position,
                site=max(index for place, index in at.items() if place < position),
                operands=(eqn.invars[0], eqn.invars[1]),
                macs=_macs(eqn) // graph.batch_size,
            )
        )
    return tuple(found)


def is_product(graph: Graph, eqn: Equation) -> bool:
    """Whether an equation multiplies two tensors of real numbers that depend on data.

    Whole numbers, such as masks, are as they are in every runtime: rounding would change them.
    """
    return eqn.primitive.name == "dot_general" and all(
        not is_literal(atom)
        and graph.is_data(atom)
        and jnp.issubdtype(atom.aval.dtype, jnp.floating)
        for atom in eqn.invars[:2]
    )


def _macs(eqn: Equation) -> int:
    """Multiply-accumulates of a whole batch: every output sums over what is contracted."""
    (left, _), _ = eqn.params["dimension_numbers"]
    summed = 1
    for axis in left:
        summed *= eqn.invars[0].aval.shape[axis]
    return eqn.outvars[0].aval.size * summed


def _before(
    graph: Graph, position: int, sites: Mapping[int, int], products: set[int]
) -> tuple[set[int], set[int]]:
    """The sites and the products that an equation's operands are computed from, by the shortest
    ways: what lies behind another site does not count."""
    found: tuple[set[int], set[int]] = (set(), set())
    seen, waiting = set(), [position]
    while waiting:
        for atom in graph.main[waiting.pop()].invars:
            place = None if is_literal(atom) else graph.producer.get(atom)
            if place is None or place in seen:
                continue
            seen.add(place)
            if place in sites:
                found[0].add(sites[place])
                continue
            if place in products:
                found[1].add(place)
            waiting.append(place)
    return found


def _names(
    positions: Sequence[int],
    before: Mapping[int, tuple[set[int], set[int]]],
    sites: Sequence[Site],
) -> dict[int, str]:
    """`PREFIX@KIND`, numbered from the second of a name on."""
    scores = {place for _, products in before.values() for place in products}
    names, taken = {}, Counter[str]()
    for position in positions:
        own, products = before[position]
        kind = VALUES if products else SCORES if position in scores else OTHER
        name = f"{_common([sites[i].layer for i in sorted(own)])}@{kind}"
        taken[name] += 1
        names[position] = name if taken[name] == 1 else f"{name}{taken[name]}"
    return names


def _common(layers: Sequence[str]) -> str:
    """The longest path that all names begin with; of one layer alone, what it stands in."""
    paths = [name.split(".")[:-1] for name in layers]
    common: list[Any] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
