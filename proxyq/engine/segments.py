"""Cut a network before each layer and run it segment by segment.

With `S` sites there are `S + 1` segments: the head before the first site, then one that
begins with each site. A segment is a jitted function of the values that it reads; segments
with equal equations (the blocks of a ResNet) share one compiled function, in this and in
every later engine, so a second call compiles nothing.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from proxyq.model.graph import Env, Equation, Rule, Var, evaluate, is_literal, read
from proxyq.model.lowering import run
from proxyq.model.network import Network
from proxyq.quantize import Grid, fake_quantize


class Edit(NamedTuple):
    """What replaces a site's own weight and input; `None` leaves it alone.

    - `weight`: the new weight, of the same shape as the old.
    - `offset`: a vector `[channels]` added to the site's output.
    - `input_grid`: the grid that the site's data operand is rounded to.
    - `attention`: for each product of two activations between this site and the next, in order,
      the grids that its operands are rounded to; `()` leaves all of them alone.
    """

    weight: Any = None
    offset: Any = None
    input_grid: Grid | None = None
    attention: tuple[tuple[Grid, Grid] | None, ...] = ()


NO_EDIT = Edit()


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """A run of main equations; `site` is the index of the site that it begins with.

    - `constants`: frontier variables read; `reads`: state variables read; `writes`: what
      later segments (or the outputs) read. All in a fixed order.
    - `attention`: where in `eqns` the products of two activations are.
    - `keeps`: state variables that are still needed afterwards.
    """

    site: int | None
    eqns: tuple[Equation, ...]
    constants: tuple[Var, ...]
    reads: tuple[Var, ...]
    writes: tuple[Var, ...]
    attention: tuple[int, ...]
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
        attention = tuple(
            p.position - cuts[index]
            for p in network.attention
            if site is not None and p.site == site
        )
        key = text_key(eqns, (*constants, *reads), writes, _operand(network, site))
        segments.append(
            Segment(
                site=site,
                eqns=eqns,
                constants=tuple(constants),
                reads=reads,
                writes=writes,
                attention=attention,
                keeps=keeps,
                key=f"{attention}{key}" if attention else key,
            )
        )
        needed = set(keeps) | set(reads)
    return tuple(reversed(segments))


def _operand(network: Network, site: int | None) -> int | None:
    return None if site is None else network.sites[site].operand


_COMPILED: dict[Any, Any] = {}
_MOST_PROGRAMS = 2048


def remember(cache: dict[Any, Any], key: Any, program: Any) -> Any:
    """Keep a program, and no more than so many: the oldest goes."""
    if len(cache) >= _MOST_PROGRAMS:
        del cache[next(iter(cache))]
    return cache.setdefault(key, program)


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
        remember(_COMPILED, key, function)
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
        products = [segment.eqns[place] for place in segment.attention]
        evaluate(eqns, env, rounding_products(products, edit.attention))
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
    key = text_key([eqn], [data], eqn.outvars, site.operand)
    program = _SITES.get(key)
    if program is None:

        def alone(x: Any, weight: Any, edit: Edit) -> Any:
            return run_site(site, eqn, {data: x}, weight, edit)

        program = remember(_SITES, key, jax.jit(alone))
    return program(x, weight, edit._replace(weight=None))


def run_site(site: Any, eqn: Equation, env: Mapping[Var, Any], weight: Any, edit: Edit) -> Any:
    """A site's output under an edit: `f(Q(x), W) + offset`."""
    data = eqn.invars[1 - site.operand]
    x = read(env, data)
    if edit.input_grid is not None:
        x = fake_quantize(x, edit.input_grid).astype(x.dtype)
    # Edits are float32; a network that computes in bfloat16 goes on in bfloat16.
    weight = weight.astype(eqn.invars[site.operand].aval.dtype)
    values = [x, weight] if site.operand == 1 else [weight, x]
    (out,) = run(eqn, values)
    return out if edit.offset is None else out + site.on_output(edit.offset).astype(out.dtype)


def rounding_products(
    products: Sequence[Equation], grids: Sequence[tuple[Grid, Grid] | None]
) -> Rule:
    """How equations run where both operands of some are rounded, those without grids left alone."""
    pairs = zip(products, grids, strict=True) if grids else ()
    known = {id(eqn): own for eqn, own in pairs if own is not None}

    def rule(eqn: Equation, values: Sequence[Any]) -> Sequence[Any]:
        own = known.get(id(eqn))
        if own is not None:
            values = [
                fake_quantize(x, grid).astype(x.dtype) for x, grid in zip(values, own, strict=True)
            ]
        return run(eqn, values)

    return rule


def _positions(segment: Segment) -> dict[Var, int]:
    """A number for each variable of a segment that equal segments agree on."""
    made = (var for eqn in segment.eqns for var in eqn.outvars)
    return {var: i for i, var in enumerate((*segment.constants, *segment.reads, *made))}


# Their rules for derivatives are closures made anew at each use; where they are written down
# tells which is which.
_CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})


def text_key(
    eqns: Sequence[Equation],
    arguments: Sequence[Any],
    writes: Sequence[Any],
    operand: int | None = None,
) -> str:
    """Text that equal segments share: equations up to the names of variables."""
    number: dict[Any, int] = {var: index for index, var in enumerate(arguments)}

    def name(atom: Any) -> str:
        if is_literal(atom):
            return f"={atom.val!r}:{atom.aval.str_short()}"
        # What has no number is the site's own weight.
        return str(number[atom]) if atom in number else f"w:{atom.aval.str_short()}"

    lines = [f"{operand} " + " ".join(v.aval.str_short() for v in arguments)]
    for eqn in eqns:
        operands = " ".join(name(atom) for atom in eqn.invars)
        custom = eqn.primitive.name in _CUSTOM_RULES
        params = " ".join(f"{k}={_text(v, custom)}" for k, v in sorted(eqn.params.items()))
        for var in eqn.outvars:
            number[var] = len(number)
        outs = " ".join(v.aval.str_short() for v in eqn.outvars)
        lines.append(f"{outs} = {eqn.primitive.name}[{params}] {operands}")
    return "\n".join([*lines, " ".join(name(atom) for atom in writes)])


def _text(value: Any, custom_rule: bool) -> str:
    """A parameter as text that differs where what it does differs."""
    source = ""
    if custom_rule:
        source = getattr(getattr(value, "debug_info", None), "func_src_info", None) or ""
    body = getattr(value, "jaxpr", value)
    if hasattr(body, "eqns"):
        inside = text_key(body.eqns, [*body.constvars, *body.invars], body.outvars, None)
        constants = ",".join(_text(c, False) for c in getattr(value, "consts", ()))
        return "{" + inside + "|" + constants + "|" + source + "}"
    if source or (custom_rule and callable(value)):
        # Rules made by one function may differ in what they close over.
        cells = getattr(getattr(value, "f", value), "__closure__", None) or ()
        held = (getattr(cell, "cell_contents", None) for cell in cells)
        return source + repr([v for v in held if isinstance(v, (bool, int, float, str))])
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(_text(item, custom_rule) for item in value) + ")"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        array = np.asarray(value)
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return f"{array.dtype}{array.shape}{digest}"
    if callable(value) and not isinstance(value, type):
        # The program that is kept under this key holds the function, so its id stays its own.
        return f"function#{id(value)}"
    return repr(value)


def compiled_count() -> int:
    """How many XLA programs the segments have made so far (for tests and benchmarks)."""
    return sum(function._cache_size() for function in _COMPILED.values())
