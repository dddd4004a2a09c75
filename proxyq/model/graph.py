"""`Graph`: a model traced to one list of equations, the only graph in the house.

A model is traced to a jaxpr, calls that contain layers are spliced in, loops of fixed length
over layers are unrolled, and the equations are split in two: the *prelude* depends on
parameters alone (batch-norm folding, position tables, weight standardisation) and runs once
per set of parameters; *main* depends on the inputs and runs per batch. This file and
`scanned` alone touch the internals of JAX.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from proxyq.errors import ProxyqError
from proxyq.model.model import Apply, Model

if TYPE_CHECKING:
    # JAX types these too loosely to check anything: abstract values without a shape, and
    # operands that may be literals wherever they are read. This is what proxyq uses of them.
    class Var:
        """A variable, or a literal with its value."""

        aval: Any
        val: Any

    class Equation:
        """Some outputs of one primitive."""

        primitive: Any
        params: dict[str, Any]
        invars: list[Var]
        outvars: list[Var]
else:
    Var = jex.Var
    Equation = jex.JaxprEqn
Env = dict[Var, Any]
Rule = Callable[[Equation, list[Any]], Sequence[Any] | None]

# The primitives that can hold a layer's weight.
LAYER_PRIMITIVES = frozenset({"conv_general_dilated", "dot_general"})
LOOKUP = "gather"
"""The primitive that looks up rows of a table."""

# Calls by primitive name, and under which parameter their body lies. JAX has renamed some
# of them between releases (`pjit` became `jit`), so both names stand here.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
# Those without derivatives of their own: a lookup inside comes out of them.
_PLAIN_CALLS = frozenset(_CALLS) - {name for name in _CALLS if name.startswith("custom")}
_DECIDED_BY_DATA = {
    "while": "whose number of steps its data decide: give the loop a fixed length (`nn.scan`, "
    "`jax.lax.scan`)",
    "cond": "whose branch its data decide: choose the branch in Python, or compute both",
}
MOST_STEPS = 256
"""Loops over layers with more steps than this are not unrolled."""


def is_literal(atom: Any) -> bool:
    """Whether an operand is a constant written into the equation."""
    return isinstance(atom, jex.Literal)


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """A traced model, for one batch size.

    - `prelude`, `main`: equations in execution order; see the module's first lines.
    - `params`: the variable of each parameter by name; `constants`: values that the
      function closed over.
    - `frontier`: the prelude's values (and parameters, constants) that main reads.
    - `leaves`: for each variable known before any input, the names of the parameters it
      depends on.
    - `lookups`: whether lookups are layers too, and so stand in main by themselves.
    - `producer`, `consumers`: the main equation that makes a variable; the indices of
      those that read it.
    """

    prelude: tuple[Equation, ...]
    main: tuple[Equation, ...]
    params: Mapping[str, Var]
    inputs: tuple[Var, ...]
    outputs: tuple[Any, ...]
    constants: Mapping[Var, Any]
    frontier: tuple[Var, ...]
    leaves: Mapping[Var, frozenset[str]]
    producer: Mapping[Var, int]
    consumers: Mapping[Var, tuple[int, ...]]
    out_tree: Any
    batch_size: int
    lookups: bool = False

    def is_data(self, atom: Any) -> bool:
        """Whether an operand depends on the network's inputs."""
        return not is_literal(atom) and atom not in self.leaves

    def run_prelude(self, params: Mapping[str, Any], rule: Rule | None = None) -> Env:
        """Values of all `frontier` variables, from parameters by name."""
        env: Env = dict(self.constants)
        env.update({var: params[name] for name, var in self.params.items()})
        evaluate(self.prelude, env, rule)
        return {var: env[var] for var in self.frontier}

    def run_main(self, frontier: Env, inputs: Any, rule: Rule | None = None) -> Any:
        """The network's outputs from the prelude's values and a batch."""
        env: Env = dict(frontier)
        env.update(zip(self.inputs, jax.tree.leaves(inputs), strict=True))
        evaluate(self.main, env, rule)
        return jax.tree.unflatten(self.out_tree, [read(env, atom) for atom in self.outputs])

    def __call__(self, params: Mapping[str, Any], inputs: Any, rule: Rule | None = None) -> Any:
        """The same outputs as the traced function."""
        return self.run_main(self.run_prelude(params), inputs, rule)


def read(env: Mapping[Var, Any], atom: Any) -> Any:
    """The value of an operand."""
    return atom.val if is_literal(atom) else env[atom]


def bind(eqn: Equation, values: Sequence[Any]) -> Sequence[Any]:
    """Run one equation as JAX would."""
    params = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(params, tuple):  # JAX before 0.10 returns (sub-functions, parameters)
        subfuns, params = params
        out = eqn.primitive.bind(*subfuns, *values, **params)
    else:
        out = eqn.primitive.bind(*values, **params)
    return out if eqn.primitive.multiple_results else [out]


def evaluate(eqns: Iterable[Equation], env: Env, rule: Rule | None = None) -> None:
    """Run equations in order, writing into `env`.

    `rule(equation, operand values)` may return the outputs itself, or `None` to have the
    equation run as it is: recording, replacing weights and faster lowerings are all rules.
    """
    for eqn in eqns:
        values = [read(env, atom) for atom in eqn.invars]
        outs = rule(eqn, values) if rule is not None else None
        if outs is None:
            outs = bind(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))


def bodies(eqn: Equation) -> list[Any]:
    """All jaxprs inside an equation's parameters."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if isinstance(inner, jex.Jaxpr):
                found.append(inner)
    return found


def primitives(eqn: Equation) -> set[str]:
    """Names of the primitives that an equation runs, those inside calls included."""
    inner = bodies(eqn)
    if not inner:
        return {eqn.primitive.name}
    return set().union(*(primitives(e) for body in inner for e in body.eqns), set())


def has_layers(eqn: Equation) -> bool:
    """Whether a call or a loop has a convolution or a dot product inside."""
    return bool(bodies(eqn)) and bool(primitives(eqn) & LAYER_PRIMITIVES)


def call_body(eqn: Equation) -> tuple[Any, Sequence[Any]] | None:
    """A call's body and the constants it closes over; `None` for what is no call."""
    name = eqn.primitive.name
    if name not in _CALLS:
        return None
    body = eqn.params[_CALLS[name]]
    return (body.jaxpr, body.consts) if isinstance(body, jex.ClosedJaxpr) else (body, ())


@dataclass(frozen=True, eq=False)
class _Pile:
    """Arrays that lie on top of each other along a new axis, until somebody asks for the whole.

    A loop over layers wants them one by one; so each step reads the very arrays that were put
    together, and knows their names.
    """

    parts: tuple[Any, ...]
    axis: int = 0

    def whole(self) -> Any:
        return jnp.stack([_whole(part) for part in self.parts], self.axis)

    def transposed(self, permutation: Sequence[int]) -> "_Pile":
        rest = [axis for axis in permutation if axis != self.axis]
        inner = [axis - (axis > self.axis) for axis in rest]
        moved = [lax.transpose(_whole(part), inner) for part in self.parts]
        return _Pile(tuple(moved), list(permutation).index(self.axis))

    def converted(self, params: Mapping[str, Any]) -> "_Pile":
        to = params["new_dtype"]
        parts = [lax.convert_element_type(_whole(part), to) for part in self.parts]
        return _Pile(tuple(parts), self.axis)


def _whole(value: Any) -> Any:
    return value.whole() if isinstance(value, _Pile) else value


def pile(parts: Sequence[Any]) -> Any:
    """Equal arrays on top of each other, along a new first axis; a graph keeps them apart."""
    return _traced_pile(*parts)


def proxyq_pile(*parts: Any) -> Any:
    """`pile`, under a name by which a traced call is known."""
    return jnp.stack(parts)


_traced_pile = jax.jit(proxyq_pile)


def is_pile(eqn: Equation) -> bool:
    """Whether an equation is what `pile` was traced to."""
    if eqn.primitive.name not in ("jit", "pjit") or eqn.params.get("name") != proxyq_pile.__name__:
        return False
    # Under `vmap` it puts other axes first.
    return eqn.outvars[0].aval.shape == (len(eqn.invars), *eqn.invars[0].aval.shape)


def _inline(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], lookups: bool = False
) -> list[Any]:
    env: Env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    evaluate(jaxpr.eqns, env, partial(_splice, lookups=lookups))
    return [read(env, atom) for atom in jaxpr.outvars]


def _splice(eqn: Equation, values: list[Any], *, lookups: bool) -> Sequence[Any] | None:
    """What takes the place of an equation; `None` where it stays as it is."""
    name = eqn.primitive.name
    if is_pile(eqn):
        return [_Pile(tuple(values))]
    # Splicing a call without a layer would lose custom derivatives (relu at 0) for nothing.
    if has_layers(eqn):
        if name == "scan" and eqn.params["length"]:
            return _unrolled(eqn, values, lookups)
        if name in _DECIDED_BY_DATA:
            raise ProxyqError(f"the model runs layers inside a `{name}`, {_DECIDED_BY_DATA[name]}.")
        body = call_body(eqn)
        if body is not None:
            return _inline(*body, values, lookups)
    # A loop that only looks up is left whole: its table stays float.
    elif lookups and name in _PLAIN_CALLS and LOOKUP in primitives(eqn):
        body = call_body(eqn)
        assert body is not None
        return _inline(*body, [_whole(value) for value in values], lookups)
    if not any(isinstance(value, _Pile) for value in values):
        return None
    if name == "transpose":
        return [values[0].transposed(eqn.params["permutation"])]
    if name == "convert_element_type":
        return [values[0].converted(eqn.params)]
    return bind(eqn, [_whole(value) for value in values])


def _unrolled(eqn: Equation, values: list[Any], lookups: bool) -> list[Any]:
    """A loop of fixed length, one step after the other."""
    params = eqn.params
    body, length = params["jaxpr"], params["length"]
    if length > MOST_STEPS:
        raise ProxyqError(
            f"the model runs layers in a loop of {length} steps, and proxyq unrolls at most "
            f"{MOST_STEPS}: shorten what it runs over (the sequence, for a recurrent network)."
        )
    first, state = params["num_consts"], params["num_carry"]
    constants, carry = values[:first], values[first : first + state]
    scanned = values[first + state :]
    made: dict[int, list[Any]] = {}
    for step in reversed(range(length)) if params["reverse"] else range(length):
        own = [_step_of(value, step) for value in scanned]
        out = _inline(body.jaxpr, body.consts, [*constants, *carry, *own], lookups)
        carry, made[step] = out[:state], out[state:]
    count = len(eqn.outvars) - state
    return [*carry, *(_Pile(tuple(made[i][k] for i in range(length))) for k in range(count))]


def _step_of(value: Any, step: int) -> Any:
    if isinstance(value, _Pile) and value.axis == 0:
        return value.parts[step]
    return lax.index_in_dim(_whole(value), step, keepdims=False)


def trace(model: Model, batch_size: int, *, apply: Apply | None = None) -> Graph:
    """Trace `model` (or `apply` in its place) at one batch size."""
    names = list(model.params)
    function = apply or model.apply

    def flat(params: list[Any], leaves: list[Any]) -> Any:
        inputs = jax.tree.unflatten(jax.tree.structure(model.inputs), leaves)
        return function(dict(zip(names, params, strict=True)), inputs)

    shapes = [jax.typeof(model.params[name]) for name in names]
    params = [jax.ShapeDtypeStruct(s.shape, s.dtype) for s in shapes]
    inputs = jax.tree.leaves(model.example(batch_size))
    return trace_function(flat, names, params, inputs, batch_size, lookups=model.embeddings)


def trace_function(
    function: Callable[[list[Any], list[Any]], Any],
    names: Sequence[str],
    params: Sequence[Any],
    inputs: Sequence[Any],
    batch_size: int,
    *,
    lookups: bool = False,
) -> Graph:
    """Trace `function(params, inputs)`, both flat lists, and split it; see `Graph`."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(list(params), list(inputs))
    spliced = jax.make_jaxpr(
        lambda *args: [_whole(out) for out in _inline(closed.jaxpr, closed.consts, args, lookups)]
    )(*params, *inputs)
    jaxpr: Any = spliced.jaxpr
    param_vars = jaxpr.invars[: len(names)]
    input_vars = tuple(jaxpr.invars[len(names) :])
    constants = dict(zip(jaxpr.constvars, spliced.consts, strict=True))

    # Dead code: keep what an output needs, backwards.
    needed = {atom for atom in jaxpr.outvars if not is_literal(atom)}
    live: list[Equation] = []
    for eqn in reversed(jaxpr.eqns):
        if any(var in needed for var in eqn.outvars):
            live.append(eqn)
            needed.update(atom for atom in eqn.invars if not is_literal(atom))
    live.reverse()

    # What depends on an input is main; all else is prelude, with its set of parameters.
    leaves: dict[Var, frozenset[str]] = {var: frozenset() for var in constants}
    leaves.update({var: frozenset({name}) for name, var in zip(names, param_vars, strict=True)})
    prelude: list[Equation] = []
    main: list[Equation] = []
    for eqn in live:
        operands = [atom for atom in eqn.invars if not is_literal(atom)]
        if all(var in leaves for var in operands):
            depends = frozenset().union(*(leaves[var] for var in operands))
            leaves.update({var: depends for var in eqn.outvars})
            prelude.append(eqn)
        else:
            main.append(eqn)

    # A parameter repeated along the batch (a class token, an old-style broadcast) would be
    # held at full size: such growing broadcasts are cheaper inside main.
    # A weight stays in the prelude even so: that is where its layer looks for it.
    holders = {*LAYER_PRIMITIVES, LOOKUP} if lookups else LAYER_PRIMITIVES
    weights = {
        atom
        for eqn in main
        if eqn.primitive.name in holders
        for atom in eqn.invars
        if not is_literal(atom)
    }
    made_by = {var: eqn for eqn in prelude for var in eqn.outvars if var not in weights}
    sunk: dict[int, Equation] = {}
    queue = [atom for eqn in main for atom in eqn.invars if not is_literal(atom)]
    queue += [atom for atom in jaxpr.outvars if not is_literal(atom)]
    while queue:
        eqn = made_by.get(queue.pop())
        if eqn is not None and id(eqn) not in sunk and _grows(eqn):
            sunk[id(eqn)] = eqn
            queue += [atom for atom in eqn.invars if not is_literal(atom)]
    if sunk:
        main = [eqn for eqn in prelude if id(eqn) in sunk] + main

    made_in_main = {var for eqn in main for var in eqn.outvars}
    reads = [atom for eqn in main for atom in eqn.invars if not is_literal(atom)]
    reads += [atom for atom in jaxpr.outvars if not is_literal(atom)]
    frontier = dict.fromkeys(var for var in reads if var in leaves and var not in made_in_main)
    consumers: dict[Var, list[int]] = {}
    for index, eqn in enumerate(main):
        for atom in dict.fromkeys(a for a in eqn.invars if not is_literal(a)):
            consumers.setdefault(atom, []).append(index)
    return Graph(
        prelude=needed_for(prelude, frontier),
        main=tuple(main),
        params=dict(zip(names, param_vars, strict=True)),
        inputs=input_vars,
        outputs=tuple(jaxpr.outvars),
        constants=constants,
        frontier=tuple(frontier),
        leaves=leaves,
        producer={var: index for index, eqn in enumerate(main) for var in eqn.outvars},
        consumers={var: tuple(indices) for var, indices in consumers.items()},
        out_tree=jax.tree.structure(shape),
        batch_size=batch_size,
        lookups=lookups,
    )


def _grows(eqn: Equation) -> bool:
    """Whether an equation only repeats its operand."""
    if eqn.primitive.name != "broadcast_in_dim" or is_literal(eqn.invars[0]):
        return False
    return eqn.outvars[0].aval.size > eqn.invars[0].aval.size


def needed_for(eqns: Sequence[Equation], wanted: Iterable[Var]) -> tuple[Equation, ...]:
    """Those of the equations that it takes to compute the variables."""
    needed = set(wanted)
    kept = []
    for eqn in reversed(eqns):
        if any(var in needed for var in eqn.outvars):
            kept.append(eqn)
            needed.update(atom for atom in eqn.invars if not is_literal(atom))
    return tuple(reversed(kept))
