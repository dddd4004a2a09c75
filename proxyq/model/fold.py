"""Fold batch norm and other per-channel factors into the weights before them.

A layer's output `y` followed by `(y - mean) * scale + shift`, all per channel and made of
parameters alone, equals the layer with weights `scale * W` and one added vector. That is
what runs on hardware, so bits are chosen for the folded weights.
"""

from typing import Any

import jax
import jax.numpy as jnp

from proxyq.model.graph import Graph, Var, bind, is_literal, trace_function
from proxyq.model.layers import Site

_AFFINE = frozenset({"add", "add_any", "sub", "mul", "div"})
_CONVERT = "convert_element_type"


def foldable(graph: Graph, sites: tuple[Site, ...]) -> tuple[int, ...]:
    """For each site, how many equations after it fold into its weight.

    Nothing folds into a table that is looked up as well: its grid is one for all uses.
    """
    tables = {site.layer for site in sites if site.lookup}
    return tuple(0 if site.layer in tables else len(_chain(graph, site)) for site in sites)


def fold(graph: Graph, sites: tuple[Site, ...], lengths: tuple[int, ...]) -> Graph:
    """The same function with the first `lengths` equations after each site inside its weight."""
    chains = {
        site.position: _chain(graph, site)[:length]
        for site, length in zip(sites, lengths, strict=True)
        if length
    }
    if not chains:
        return graph
    inside = {index for chain in chains.values() for index in chain}
    by_position = {site.position: site for site in sites}

    def run(params: list[Any], inputs: list[Any]) -> list[Any]:
        frontier = graph.run_prelude(dict(zip(graph.params, params, strict=True)))
        env = dict(frontier)
        env.update(zip(graph.inputs, inputs, strict=True))
        for index, eqn in enumerate(graph.main):
            if index in inside:
                continue  # its effect is in the weight and the vector added below
            values = [atom.val if is_literal(atom) else env[atom] for atom in eqn.invars]
            if index not in chains:
                env.update(zip(eqn.outvars, bind(eqn, values), strict=True))
                continue
            site = by_position[index]
            scale, shift = _affine(graph, site, chains[index], env)
            weight = values[site.operand]
            folded = site.from_columns(site.columns(weight) * scale, weight.shape)
            # A network that computes in bfloat16 normalises in float32 in between.
            values[site.operand] = folded.astype(weight.dtype)
            (out,) = bind(eqn, values)
            last = graph.main[chains[index][-1]].outvars[0]
            out = out.astype(jnp.promote_types(out.dtype, last.aval.dtype))
            out = out if isinstance(shift, float) else out + site.on_output(shift)
            env[last] = out.astype(last.aval.dtype)
        leaves = [atom.val if is_literal(atom) else env[atom] for atom in graph.outputs]
        return jax.tree.unflatten(graph.out_tree, leaves)

    params = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in graph.params.values()]
    inputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in graph.inputs]
    return trace_function(
        run, list(graph.params), params, inputs, graph.batch_size, lookups=graph.lookups
    )


def _chain(graph: Graph, site: Site) -> list[int]:
    """Indices of the per-channel equations after a site, up to the last factor."""
    chain = per_channel_equations(graph, site)
    factors = [graph.main[index].primitive.name in ("mul", "div") for index in chain]
    return chain[: max((i + 1 for i, factor in enumerate(factors) if factor), default=0)]


def per_channel_equations(graph: Graph, site: Site) -> list[int]:
    """Indices of the equations right after a site that scale or shift each channel.

    Between them may stand conversions from one floating type to another. After a lookup there
    are none, for its output has no axis for the rows of the table.
    """
    if site.lookup:
        return []
    var = graph.main[site.position].outvars[0]
    chain: list[int] = []
    while var not in graph.outputs and len(graph.consumers.get(var, ())) == 1:
        (index,) = graph.consumers[var]
        eqn = graph.main[index]
        name = eqn.primitive.name
        if name == _CONVERT and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            chain.append(index)
            var = eqn.outvars[0]
            continue
        if name not in _AFFINE or (name == "div" and eqn.invars[0] is not var):
            break
        other = eqn.invars[1] if eqn.invars[0] is var else eqn.invars[0]
        if other is var or not is_per_channel(graph, other, site):
            break
        chain.append(index)
        var = eqn.outvars[0]
    return chain


def is_per_channel(graph: Graph, atom: Any, site: Site) -> bool:
    """Whether an operand holds parameters and varies along the output channels alone."""
    if is_literal(atom) or graph.is_data(atom) or not graph.leaves[atom]:
        return False
    source, axes = broadcast_source(graph, atom)
    varying = {axis for axis, size in zip(axes, source.aval.shape, strict=True) if size != 1}
    return varying <= set(site.output_axes)


def broadcast_source(graph: Graph, var: Var) -> tuple[Var, list[int]]:
    """Look through the broadcasts that main holds: the array, and which axes it has."""
    axes = list(range(var.aval.ndim))
    while var in graph.producer:
        eqn = graph.main[graph.producer[var]]
        if eqn.primitive.name != "broadcast_in_dim":
            break
        axes = [axes[axis] for axis in eqn.params["broadcast_dimensions"]]
        var = eqn.invars[0]
    return var, axes


def _affine(graph: Graph, site: Site, chain: list[int], env: dict[Var, Any]) -> tuple[Any, Any]:
    """Scale and shift of the whole chain, as vectors over the output channels."""
    var = graph.main[site.position].outvars[0]
    scale: Any = 1.0
    shift: Any = 0.0
    for index in chain:
        eqn = graph.main[index]
        if eqn.primitive.name == _CONVERT:
            var = eqn.outvars[0]
            continue
        first = eqn.invars[0] is var
        value = channel_vector(graph, site, eqn.invars[1] if first else eqn.invars[0], env)
        # After each operation: y = scale * output + shift.
        match eqn.primitive.name:
            case "add" | "add_any":
                shift = shift + value
            case "sub" if first:
                shift = shift - value
            case "sub":
                scale, shift = -scale, value - shift
            case "mul":
                scale, shift = scale * value, shift * value
            case _:  # "div" with the layer's output on top
                scale, shift = scale / value, shift / value
        var = eqn.outvars[0]
    return scale, shift


def channel_vector(graph: Graph, site: Site, operand: Var, env: dict[Var, Any]) -> Any:
    """An operand that `is_per_channel`, as a vector over the output channels."""
    source, axes = broadcast_source(graph, operand)
    shape = [1] * site.output_ndim
    for axis, size in zip(axes, source.aval.shape, strict=True):
        shape[axis] = size
    value = env[source].reshape(shape)
    sizes = [1] * site.output_ndim
    for axis, size in zip(site.output_axes, site.channel_shape, strict=True):
        sizes[axis] = size
    return jnp.broadcast_to(value, sizes).reshape(-1)
