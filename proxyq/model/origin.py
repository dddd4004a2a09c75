"""Where a layer's weight and bias come from: which elements of which parameters.

A layer is searched, rounded and stored as the graph multiplies by it: transposed, batch norm
folded in. To go back to the network of its author by name, each element has to be found again in
the parameter that it came from, and each per-channel constant that follows the layer told apart
from what comes later.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from proxyq.model.fold import channel_vector, is_per_channel
from proxyq.model.graph import Equation, Graph, Var, evaluate, is_literal, trace
from proxyq.model.layers import Site, find_sites
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
    graph = network.graph
    var = graph.main[site.position].outvars[0]
    total: Any = None
    leaves: frozenset[str] = frozenset()
    while var not in graph.outputs and len(graph.consumers.get(var, ())) == 1:
        (index,) = graph.consumers[var]
        eqn = graph.main[index]
        first = eqn.invars[0] is var
        if eqn.primitive.name not in ("add", "add_any", "sub") or len(eqn.invars) != 2:
            break
        other = eqn.invars[1] if first else eqn.invars[0]
        if other is var or (eqn.primitive.name == "sub" and not first):
            break
        if not is_per_channel(graph, other, site):
            break
        value = np.asarray(channel_vector(graph, site, other, dict(known)), np.float32)
        value = -value if eqn.primitive.name == "sub" else value
        total = value if total is None else total + value
        leaves |= graph.leaves[other]
        var = eqn.outvars[0]
    return total, leaves
