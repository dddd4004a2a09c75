"""Where a layer's weight and bias come from: which elements of which parameters.

A layer is searched, rounded and stored as the graph multiplies by it: transposed, batch norm
folded in. To go back to the network of its author by name, each element has to be found again in
the parameter that it came from, and each per-channel constant that follows the layer told apart
from what comes later.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.model.fold import (
    broadcast_source,
    channel_vector,
    is_per_channel,
    per_channel_equations,
)
from proxyq.model.graph import Equation, Graph, Var, evaluate, is_literal, needed_for, trace
from proxyq.model.layers import Site, find_sites
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT, Network

# Primitives that move elements, or leave some out, and change none.
_LAYOUT = frozenset(
    """
    broadcast_in_dim convert_element_type copy expand_dims reshape rev slice squeeze transpose
    """.split()
)


def parameter_indices(network: Network) -> dict[int, np.ndarray | None]:
    """For each site, where its weight's elements lie in the layer's parameter.

    An array of the weight's shape with flat indices into the parameter; `None` where the weight
    is computed (standardised, a product of two), so that no element is one of the parameter's.
    Factors that folding brings in, one a channel, are left out of account.
    """
    graph = trace(network.model, LAYERS_AT)
    sites, named = find_sites(graph, network.model.frozen, network.model.params)
    return {
        index: _indices(graph, site.weight, graph.params[named[site.layer]])
        for index, site in enumerate(sites)
    }


def _indices(graph: Graph, weight: Var, parameter: Var) -> np.ndarray | None:
    made_by = {var: eqn for eqn in graph.prelude for var in eqn.outvars}
    chain: list[Equation] = []
    var = weight
    while var is not parameter:
        eqn = made_by.get(var)
        if eqn is None or eqn.primitive.name not in _LAYOUT or is_literal(eqn.invars[0]):
            return None
        if eqn.primitive.name == "broadcast_in_dim":
            before, after = eqn.invars[0].aval, eqn.outvars[0].aval
            if before.size != after.size:
                return None
        chain.append(eqn)
        var = eqn.invars[0]
    size = int(np.prod(parameter.aval.shape))
    env = {parameter: jnp.arange(size).reshape(parameter.aval.shape)}

    def keep_whole(eqn: Equation, values: list[Any]) -> list[Any] | None:
        # Indices beyond 2^24 would be rounded as floats.
        return list(values[:1]) if eqn.primitive.name == "convert_element_type" else None

    evaluate(reversed(chain), env, keep_whole)
    return np.asarray(env[weight])


def trailing_bias(
    network: Network, site: Site, known: Mapping[Var, Any]
) -> tuple[np.ndarray | None, frozenset[str]]:
    """What is added to each channel right after a site, `[channels]`, and whose parameters it is.

    `known` are the prelude's values. `None` where nothing is added. In a network whose batch
    norm is folded, this is the bias that the folded layer has.
    """
    total: Any = None
    leaves: frozenset[str] = frozenset()
    for _, operand, sign in trailing_sums(network.graph, site):
        value = channel_vector(network.graph, site, operand, dict(known))
        value = sign * np.asarray(value, np.float32)
        total = value if total is None else total + value
        leaves |= network.graph.leaves[operand]
    return total, leaves


def trailing_sums(graph: Graph, site: Site) -> Iterator[tuple[int, Var, int]]:
    """The sums right after a site: index in main, what is added to each channel, and its sign.

    After a lookup there are none.
    """
    if site.lookup:
        return
    var = graph.main[site.position].outvars[0]
    while var not in graph.outputs and len(graph.consumers.get(var, ())) == 1:
        (index,) = graph.consumers[var]
        eqn = graph.main[index]
        if eqn.primitive.name == "convert_element_type":
            var = eqn.outvars[0]
            continue
        first = eqn.invars[0] is var
        if eqn.primitive.name not in ("add", "add_any", "sub") or len(eqn.invars) != 2:
            return
        other = eqn.invars[1] if first else eqn.invars[0]
        if other is var or (eqn.primitive.name == "sub" and not first):
            return
        if not is_per_channel(graph, other, site):
            return
        yield index, other, -1 if eqn.primitive.name == "sub" else 1
        var = eqn.outvars[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tail:
    """What follows a site in the network as its author wrote it, channel by channel.

    - `factor`: what folding multiplies the weight by, `[channels]`.
    - `parameter`: the last parameter that is added to the channels, one element to each; `None`
      where there is none. `where`: the flat index of each channel's element; `slope`: how the
      channel moves with it.
    """

    factor: np.ndarray
    parameter: str | None = None
    where: np.ndarray | None = None
    slope: np.ndarray | None = None


def tails(network: Network) -> dict[int, Tail]:
    """The `Tail` of each site."""
    graph = trace(network.model, LAYERS_AT)
    sites, _ = find_sites(graph, network.model.frozen, network.model.params)
    known = graph.run_prelude(network.model.params)
    return {
        index: _tail(graph, site, length, known, network.model)
        for index, (site, length) in enumerate(zip(sites, network.folded, strict=True))
    }


def _tail(graph: Graph, site: Site, folded: int, known: Mapping[Var, Any], model: Model) -> Tail:
    var = graph.main[site.position].outvars[0]
    factor = np.ones(int(np.prod(site.channel_shape)))
    inside = graph.leaves[site.weight]
    added: list[tuple[Var, np.ndarray]] = []
    for place, index in enumerate(per_channel_equations(graph, site)):
        eqn = graph.main[index]
        name, first = eqn.primitive.name, eqn.invars[0] is var
        if name == "convert_element_type":
            var = eqn.outvars[0]
            continue
        if place >= folded and not (name in ("add", "add_any") or (name == "sub" and first)):
            break
        operand = eqn.invars[1] if first else eqn.invars[0]
        value = np.asarray(channel_vector(graph, site, operand, dict(known)), np.float64)
        if name in ("mul", "div"):
            inside |= graph.leaves[operand]
        # y <- gain * y + sign * operand
        gain, sign = _step(name, first, value)
        factor = factor * gain
        added = [(one, slope * gain) for one, slope in added]
        if sign:
            added.append((operand, np.full_like(factor, sign)))
        var = eqn.outvars[0]
    for operand, slope in reversed(added):
        taken = _adding_parameter(graph, site, operand, inside, model)
        if taken is not None:
            parameter, where, own = taken
            return Tail(factor=factor, parameter=parameter, where=where, slope=slope * own)
    return Tail(factor=factor)


def _adding_parameter(
    graph: Graph, site: Site, operand: Var, factors: frozenset[str], model: Model
) -> tuple[str, np.ndarray, Any] | None:
    """A parameter with an element for each channel of an operand, where these elements lie, and
    how the operand moves with them; none that the factors depend on."""
    source, _ = broadcast_source(graph, operand)
    leaves = graph.leaves[source] - factors
    if len(graph.leaves[source]) == len(leaves) == 1:
        (parameter,) = leaves
        indices = _indices(graph, source, graph.params[parameter])
        if indices is not None:
            known = {source: jnp.asarray(indices)}
            where = np.asarray(channel_vector(graph, site, operand, known))
            if len(np.unique(where)) == len(where):
                return parameter, where, 1.0
    # Computed, as torch's batch norm is: bias - mean * scale.
    equations = needed_for(graph.prelude, [source])
    channels = int(np.prod(site.channel_shape))
    for parameter in sorted(leaves, key=lambda name: (name in model.frozen, name)):
        value = jnp.asarray(model.params[parameter])
        if value.size != channels:
            continue

        def moved(value: Any, parameter: str = parameter) -> Any:
            env = dict(graph.constants)
            env.update({var: model.params[name] for name, var in graph.params.items()})
            env[graph.params[parameter]] = value
            evaluate(equations, env)
            return channel_vector(graph, site, operand, env)

        _, slope = jax.jvp(moved, (value,), (jnp.ones_like(value),))
        return parameter, np.arange(channels), np.asarray(slope, np.float64)
    return None


def _step(name: str, first: bool, value: np.ndarray) -> tuple[Any, int]:
    """Gain and sign of `y <- gain * y + sign * value`, for one equation with `y` in it."""
    match name:
        case "mul":
            return value, 0
        case "div":
            return 1 / value, 0
        case "sub":
            return (1, -1) if first else (-1, 1)
        case _:
            return 1, 1
