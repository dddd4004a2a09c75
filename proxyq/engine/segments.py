"""Cut a network before each layer and run it segment by segment.

With `S` sites there are `S + 1` segments: the head before the first site, then one that
begins with each site. A segment is a jitted function of the values that it reads; segments
with equal equations (the blocks of a ResNet) share one compiled function, in this and in
every later engine, so a second call compiles nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from proxyq.model.graph import Env, Equation, Var, evaluate, is_literal, read
from proxyq.model.lowering import run
from proxyq.model.network import Network
from proxyq.quantize import Grid, fake_quantize


class Edit(NamedTuple):
    """What replaces a site's own weight and input; `None` leaves it alone.

    - `weight`: the new weight, of the same shape as the old.
    - `offset`: a vector `[channels]` added to the site's output.
    - `input_grid`: the grid that the site's data operand is rounded to.
    """

    weight: Any = None
    offset: Any = None
    input_grid: Grid | None = None


NO_EDIT = Edit()


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """A run of main equations; `site` is the index of the site that it begins with.

    - `constants`: frontier variables read; `reads`: state variables read; `writes`: what
      later segments (or the outputs) read. All in a fixed order.
    - `keeps`: state variables that are still needed afterwards.
    """

    site: int | None
    eqns: tuple[Equation, ...]
    constants: tuple[Var, ...]
    reads: tuple[Var, ...]
    writes: tuple[Var, ...]
    keeps: frozenset[Var]
    key: str


State = Mapping[Var, Any]


def cut(network: Network) -> tuple[Segment, ...]:
    """All segments of a network, in order."""
    graph, sites = network.graph, network.sites
    cuts = [0, *(site.position for site in sites), len(graph.main)]
    frontier = set(graph.frontier)
    # Backwards: what is still needed after each segment.
    needed = {a for a in graph.outputs if not is_literal(a) and a not in frontier}
    segments: list[Segment] = []
    for index in range(len(cuts) - 2, -1, -1):
        eqns = graph.main[cuts[index] : cuts[index + 1]]
        made = {var for eqn in eqns for var in eqn.outvars}
        writes = tuple(var for eqn in eqns for var in eqn.outvars if var in needed)
        operands = dict.fromkeys(a for eqn in eqns for a in eqn.invars if not is_literal(a))
        constants = [var for var in operands if var in frontier]
        reads = tuple(var for var in operands if var not in frontier and var not in made)
        site = index - 1 if index else None
        if site is not None:  # a site's weight comes as an argument of its own
            weight = sites[site].weight
            again = any(weight in eqn.invars for eqn in eqns[1:])
            constants = [var for var in constants if var is not weight or again]
        keeps = frozenset(needed - made)
        segments.append(
            Segment(
                site=site,
                eqns=eqns,
                constants=tuple(constants),
                reads=reads,
                writes=writes,
                keeps=keeps,
                key=_key(eqns, (*constants, *reads), writes, _operand(network, site)),
            )
        )
        needed = set(keeps) | set(reads)
    return tuple(reversed(segments))


def _operand(network: Network, site: int | None) -> int | None:
    return None if site is None else network.sites[site].operand


_COMPILED: dict[Any, Any] = {}


def call(
    network: Network,
    segment: Segment,
    edit: Edit,
    weight: Any,
    constants: Sequence[Any],
    state: Sequence[Any],
    capture: tuple[Var, ...] = (),
    stacked: tuple[bool, ...] | None = None,
) -> tuple[list[Any], list[Any]]:
    """Run one segment; returns the values it writes and those captured.

    `stacked` tells which of `state` carry a leading axis of alternatives; the outputs then
    carry it too.
    """
    positions = _positions(segment)
    wanted = tuple(positions[var] for var in capture)
    key = (segment.key, wanted, stacked)
    function = _COMPILED.get(key)
    if function is None:
        function = _compile(network, segment, capture, stacked)
        _COMPILED[key] = function
    return function(edit._replace(weight=None), weight, tuple(constants), tuple(state))


def _compile(network: Network, segment: Segment, capture: tuple[Var, ...], stacked: Any) -> Any:
    site = None if segment.site is None else network.sites[segment.site]

    def function(edit: Edit, weight: Any, constants: Any, state: Any) -> Any:
        env: Env = dict(zip(segment.constants, constants, strict=True))
        env.update(zip(segment.reads, state, strict=True))
        eqns = segment.eqns
        if site is not None:
            env[eqns[0].outvars[0]] = run_site(site, eqns[0], env, weight, edit)
            eqns = eqns[1:]
        evaluate(eqns, env, run)
        return [env[var] for var in segment.writes], [read(env, var) for var in capture]

    if stacked is not None:
        axes = tuple(0 if flag else None for flag in stacked)
        function = jax.vmap(function, in_axes=(None, None, None, axes))
    return jax.jit(function)


_SITES: dict[str, Any] = {}


def call_site(network: Network, index: int, x: Any, weight: Any, edit: Edit) -> Any:
    """One site alone, jitted once for all equal sites."""
    site = network.sites[index]
    eqn = network.graph.main[site.position]
    data = eqn.invars[1 - site.operand]
    key = _key([eqn], [data], eqn.outvars, site.operand)
    if key not in _SITES:
        _SITES[key] = jax.jit(lambda x, weight, edit: run_site(site, eqn, {data: x}, weight, edit))
    return _SITES[key](x, weight, edit._replace(weight=None))


def run_site(site: Any, eqn: Equation, env: Mapping[Var, Any], weight: Any, edit: Edit) -> Any:
    """A site's output under an edit: `f(Q(x), W) + offset`."""
    data = eqn.invars[1 - site.operand]
    x = read(env, data)
    if edit.input_grid is not None:
        x = fake_quantize(x, edit.input_grid)
    values = [x, weight] if site.operand == 1 else [weight, x]
    (out,) = run(eqn, values)
    return out if edit.offset is None else out + site.on_output(edit.offset)


def _positions(segment: Segment) -> dict[Var, int]:
    """A number for each variable of a segment that equal segments agree on."""
    made = (var for eqn in segment.eqns for var in eqn.outvars)
    return {var: i for i, var in enumerate((*segment.constants, *segment.reads, *made))}


def _key(
    eqns: Sequence[Equation], arguments: Sequence[Var], writes: Sequence[Var], operand: int | None
) -> str:
    """Text that equal segments share: equations up to the names of variables.

    Forward runs alone use it, so custom derivative rules (which have no text) may be left
    out: two functions with equal bodies compute equal values.
    """
    number: dict[Any, int] = {var: index for index, var in enumerate(arguments)}
    lines = [f"{operand} " + " ".join(v.aval.str_short() for v in arguments)]
    for eqn in eqns:
        operands = []
        for atom in eqn.invars:
            if is_literal(atom):
                operands.append(f"={atom.val!r}:{atom.aval.str_short()}")
            elif atom in number:
                operands.append(str(number[atom]))
            else:  # the site's own weight
                operands.append(f"w:{atom.aval.str_short()}")
        params = " ".join(f"{name}={_text(value)}" for name, value in sorted(eqn.params.items()))
        for var in eqn.outvars:
            number[var] = len(number)
        outs = " ".join(v.aval.str_short() for v in eqn.outvars)
        lines.append(f"{outs} = {eqn.primitive.name}[{params}] {' '.join(operands)}")
    return "\n".join([*lines, " ".join(str(number[var]) for var in writes)])


def _text(value: Any) -> str:
    inner = getattr(value, "jaxpr", value)
    if hasattr(inner, "eqns"):
        # Constants inside a call have no text: such a body is equal to itself alone.
        constants = getattr(value, "consts", ())
        return f"{inner}#{id(value)}" if len(constants) else str(inner)
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(_text(item) for item in value) + ")"
    if callable(value) and not isinstance(value, type):
        return ""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"array#{id(value)}" if len(value.shape) else repr(value)
    return repr(value)


def compiled_count() -> int:
    """How many XLA programs the segments have made so far (for tests and benchmarks)."""
    return sum(function._cache_size() for function in _COMPILED.values())
