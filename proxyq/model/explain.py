"""Why a parameter is no layer's weight: what stays float in any plan, and what becomes of it."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend import core as jex

from proxyq.model.graph import is_literal
from proxyq.model.network import Network

_SUMS = frozenset({"add", "add_any", "sub", "concatenate"})
_SCALES = frozenset({"mul", "div", "integer_pow", "rsqrt", "sqrt"})
_PICKS = frozenset({"gather", "slice", "dynamic_slice"})
LOOKED_UP = "rows looked up by tokens"
ADDED, FIXED_ROWS = "added to data", "rows at fixed places, added to data"
_MOVES = frozenset(
    "broadcast_in_dim convert_element_type copy reshape slice squeeze transpose".split()
)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A parameter that no plan gives bits: its name, how many numbers it has, and why."""

    parameter: str
    weights: int
    why: str


def kept_float(network: Network) -> tuple[Kept, ...]:
    """The parameters that are no layer's weight, in the model's order.

    `why` is one of: folded into a layer; a bias or position added to data; rows of a table at fixed
    places, added to data (positions by number, which no data choose); a scale of data; rows looked
    up by tokens (an embedding, where these are no layers); experts that tokens are routed to; the
    weight of an operation that is no product; not used.
    """
    graph, weights = network.graph, {layer.parameter for layer in network.layers}
    folded: dict[str, str] = {}
    for site in network.sites:
        for leaf in graph.leaves[site.weight]:
            folded.setdefault(leaf, site.layer)
    roles = _roles(network)
    found = []
    for name, value in network.model.params.items():
        if name in weights:
            continue
        if name in folded:
            why = f"folded into {folded[name]}"
        else:
            why = roles.get(name, "not used by the output")
        found.append(Kept(parameter=name, weights=int(np.size(value)), why=why))
    return tuple(found)


def _roles(network: Network) -> dict[str, str]:
    """What main does with each parameter that it reads, by its first use."""
    graph, at = network.graph, {site.position for site in network.sites}
    roles: dict[str, str] = {}
    picked = _picked(network)
    for index, eqn in enumerate(graph.main):
        name, inside = eqn.primitive.name, _primitives(eqn)
        if index in at:
            continue
        if "gather" in inside:
            role = LOOKED_UP
        elif name.startswith("ragged_dot"):
            role = "experts that tokens are routed to"
        elif name in _SUMS:
            role = ADDED
        elif name in _SCALES:
            role = "a scale of data"
        elif name in _MOVES:
            continue
        else:
            role = f"used by {name}"
        for atom in eqn.invars:
            if not is_literal(atom):
                for leaf in graph.leaves.get(atom, ()):
                    fixed = role == ADDED and leaf in picked
                    roles.setdefault(leaf, FIXED_ROWS if fixed else role)
    return roles


def _picked(network: Network) -> set[str]:
    """The tables of which rows are taken that parameters and constants alone choose."""
    graph, picked = network.graph, set()
    tables = {var for var in graph.params.values() if len(var.aval.shape) > 1}
    for eqn in graph.prelude:
        table = eqn.invars[0]
        if not is_literal(table) and table in tables and _primitives(eqn) & _PICKS:
            picked |= graph.leaves[table] - network.model.frozen
    return picked


def looked_up_float(network: Network) -> tuple[str, ...]:
    """The parameters whose rows data look up in floating point, layers' weights among them."""
    roles = _roles(network)
    return tuple(name for name in network.model.params if roles.get(name) == LOOKED_UP)


def _primitives(eqn: Any) -> set[str]:
    """Names of an equation's primitive and of all in the functions that it calls."""
    found = {eqn.primitive.name}
    for inner in jex.jaxprs_in_params(eqn.params):
        for one in inner.eqns:
            found |= _primitives(one)
    return found


def summary(kept: tuple[Kept, ...]) -> dict[str, tuple[int, int]]:
    """For each reason, how many parameters and how many numbers; folded ones are one reason."""
    count: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for one in kept:
        why = "folded into layers" if one.why.startswith("folded into ") else one.why
        count[why] += 1
        numbers[why] += one.weights
    return {why: (count[why], numbers[why]) for why, _ in numbers.most_common()}
