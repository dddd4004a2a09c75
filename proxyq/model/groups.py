"""Groups of layers that belong together: they feed one residual sum, or read one tensor.

Where activations are quantized, the terms of a residual sum must lie on one grid, and a
tensor that several layers read is quantized once. Weights used twice are no group: they are
one layer already.
"""

from dataclasses import replace
from typing import Any

from proxyq.model.elementwise import data_operands, is_elementwise
from proxyq.model.graph import Graph, is_literal
from proxyq.model.layers import Layer, Site

# Operations that move or drop elements but invent none: a grid survives them.
_MOVES = frozenset(
    """
    broadcast_in_dim concatenate copy dynamic_slice expand_dims gather pad reduce_max
    reduce_window_max reshape rev slice squeeze transpose
    """.split()
)


def grouped(graph: Graph, sites: tuple[Site, ...], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The layers with `group` and `shares_input` filled in."""
    sums = _residual_groups(graph, sites)
    inputs = _input_groups(graph, sites)
    return tuple(
        replace(layer, group=sums.get(layer.name), shares_input=inputs.get(layer.name))
        for layer in layers
    )


def _residual_groups(graph: Graph, sites: tuple[Site, ...]) -> dict[str, str]:
    at = {site.position: site.layer for site in sites}
    names = list(dict.fromkeys(at.values()))
    rank = {name: index for index, name in enumerate(names)}
    parent = list(range(len(names)))

    def find(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    # For each variable, the layers whose outputs its elements are sums of.
    sources: dict[Any, frozenset[str]] = {}
    for index, eqn in enumerate(graph.main):
        operands = data_operands(graph, eqn)
        found: frozenset[str] = frozenset()
        if index in at:
            found = frozenset({at[index]})
        elif len(operands) == 1 and (is_elementwise(eqn) or eqn.primitive.name in _MOVES):
            found = sources.get(operands[0], frozenset())
        elif eqn.primitive.name in ("add", "add_any") and len(operands) == 2:
            left, right = (sources.get(var, frozenset()) for var in operands)
            if operands[0].aval.shape == operands[1].aval.shape:
                found = left | right
                for name in found:  # the earliest layer is the root, and names the group
                    first, second = sorted((find(rank[name]), find(min(rank[n] for n in found))))
                    parent[second] = first
        for var in eqn.outvars:
            sources[var] = found
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(names[find(rank[name])], []).append(name)
    return {name: root for root, group in members.items() if len(group) > 1 for name in group}


def _input_groups(graph: Graph, sites: tuple[Site, ...]) -> dict[str, str]:
    readers: dict[Any, list[str]] = {}
    for site in sites:
        data = graph.main[site.position].invars[1 - site.operand]
        if not is_literal(data) and not site.lookup:
            readers.setdefault(_shared(graph, data), []).append(site.layer)
    groups = {}
    for names in readers.values():
        distinct = list(dict.fromkeys(names))
        if len(distinct) > 1:
            groups.update({name: groups.get(name, distinct[0]) for name in distinct})
    return groups


def _shared(graph: Graph, var: Any) -> Any:
    """The tensor itself, also behind a conversion of its type, which every reader does anew."""
    while True:
        var = origin(graph, var)
        if var not in graph.producer:
            return var
        eqn = graph.main[graph.producer[var]]
        if eqn.primitive.name != "convert_element_type":
            return var
        var = eqn.invars[0]


def origin(graph: Graph, var: Any) -> Any:
    """The tensor itself, behind reshapes and transposes."""
    while var in graph.producer:
        eqn = graph.main[graph.producer[var]]
        if eqn.primitive.name not in ("reshape", "transpose", "copy", "squeeze", "expand_dims"):
            break
        var = eqn.invars[0]
    return var
