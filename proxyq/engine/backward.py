"""Derivatives, segment by segment: one tape of a batch, walked backwards and differentiated again.

A segment is a site `y = f(x, W)`, bilinear in data and weight (a lookup is linear in its table),
and the rest that follows it up to the next site. So derivatives come from small programs, which
equal segments share:

- backwards: `delta = dL/dy` through the rest, `dL/dx` and `dL/dW` by transposing the site;
- Hessian products, forward over reverse: the tangents of all of these along a direction.

Tangents that are zero are never computed: a direction in one layer's weight costs nothing
before that layer. The whole network is never compiled as one program.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine.engine import Engine
from proxyq.engine.objectives import Objective, Targets, curvature_probe, with_classes
from proxyq.engine.segments import NO_EDIT, Segment, State, remember, text_key
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.graph import Env, Equation, Var, evaluate, is_literal
from proxyq.model.lowering import run
from proxyq.model.model import logits_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Rest:
    """What follows a site up to the next one, as a function of the site's output `out`.

    `reads` are the floating-point state variables it reads, `others` those of other types,
    which have no derivative.
    """

    out: Var
    eqns: tuple[Equation, ...]
    constants: tuple[Var, ...]
    reads: tuple[Var, ...]
    others: tuple[Var, ...]
    writes: tuple[Var, ...]
    key: str

    def __call__(self, out: Any, reads: Any, constants: Any, others: Any) -> list[Any]:
        """The floating-point values that it writes."""
        env: Env = dict(zip(self.constants, constants, strict=True))
        env.update(zip(self.reads, reads, strict=True))
        env.update(zip(self.others, others, strict=True))
        env[self.out] = out
        evaluate(self.eqns, env, run)
        return [env[var] for var in self.writes]


def _is_float(var: Var) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.floating)


def _rest(segment: Segment) -> Rest:
    site, *eqns = segment.eqns
    used = {atom for eqn in eqns for atom in eqn.invars if not is_literal(atom)}
    reads = [var for var in segment.reads if var in used]
    floats = tuple(var for var in reads if _is_float(var))
    others = tuple(var for var in reads if not _is_float(var))
    constants = tuple(var for var in segment.constants if var in used)
    writes = tuple(var for var in segment.writes if _is_float(var))
    out = site.outvars[0]
    return Rest(
        out=out,
        eqns=tuple(eqns),
        constants=constants,
        reads=floats,
        others=others,
        writes=writes,
        key=text_key(eqns, (out, *constants, *floats, *others), writes),
    )


@lru_cache(maxsize=8)
def rests(engine: Engine) -> tuple[Rest, ...]:
    """The rest of every site's segment."""
    return tuple(_rest(segment) for segment in engine.segments[1:])


# -- programs ----------------------------------------------------------------------------

_PROGRAMS: dict[Any, Callable[..., Any]] = {}


def _program(kind: str, key: str, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    found = _PROGRAMS.get((kind, key))
    return found or remember(_PROGRAMS, (kind, key), jax.jit(make()))


def _vjp_of_rest(rest: Rest) -> Callable[..., Any]:
    """`(out, reads, constants, others, cotangents) -> (delta, cotangents of reads)`."""

    def backward(out: Any, reads: Any, constants: Any, others: Any, cotangents: Any) -> Any:
        writes, pull = jax.vjp(lambda o, r: rest(o, r, constants, others), out, reads)
        given = [
            jnp.zeros_like(value) if cotangent is None else cotangent.astype(value.dtype)
            for value, cotangent in zip(writes, cotangents, strict=True)
        ]
        return pull(given)

    return backward


def _jvp(function: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    """Tangents of `function` along stacked tangents `[directions, …]`; `None` is zero."""
    leaves, tree = jax.tree.flatten(primals)
    given = tree.flatten_up_to(tangents)
    active = [i for i, tangent in enumerate(given) if tangent is not None]

    def along(some: list[Any]) -> Any:
        whole = list(leaves)
        for i, value in zip(active, some, strict=True):
            whole[i] = value
        return function(*jax.tree.unflatten(tree, whole))

    def one(some: list[Any]) -> Any:
        moved = [t.astype(leaves[i].dtype) for i, t in zip(active, some, strict=True)]
        return jax.jvp(along, ([leaves[i] for i in active],), (moved,))[1]

    return jax.vmap(one)([given[i] for i in active])


def _jvp_of_rest(rest: Rest) -> Callable[..., Any]:
    """`(out, reads, constants, others, their tangents) -> tangents of writes`."""

    def forward(out: Any, reads: Any, constants: Any, others: Any, tangents: Any) -> Any:
        return _jvp(lambda o, r: rest(o, r, constants, others), (out, reads), tangents)

    return forward


def _jvp_of_vjp(rest: Rest) -> Callable[..., Any]:
    """Tangents of `_vjp_of_rest`, along those of its output, reads and cotangents."""
    backward = _vjp_of_rest(rest)

    def forward(out: Any, reads: Any, constants: Any, others: Any, given: Any, moved: Any) -> Any:
        def function(out: Any, reads: Any, given: Any) -> Any:
            return backward(out, reads, constants, others, given)

        return _jvp(function, (out, reads, given), moved)

    return forward


def _site_call(eqn: Equation, operand: int, x: Any, weight: Any) -> Any:
    weight = weight.astype(eqn.invars[operand].aval.dtype)
    return run(eqn, [x, weight] if operand == 1 else [weight, x])[0]


def pull_weight(eqn: Equation, operand: int, x: Any, delta: Any) -> Any:
    """`dL/dW` of one site from what it reads and `dL/dy`: the transpose of `f(x, .)`."""
    aval = eqn.invars[operand].aval
    _, pull = jax.vjp(lambda w: _site_call(eqn, operand, x, w), jnp.zeros(aval.shape, aval.dtype))
    return pull(delta.astype(eqn.outvars[0].aval.dtype))[0]


def pull_input(eqn: Equation, operand: int, weight: Any, delta: Any) -> Any:
    """`dL/dx` of one site from its weight and `dL/dy`: the transpose of `f(., W)`."""
    aval = eqn.invars[1 - operand].aval
    _, pull = jax.vjp(
        lambda x: _site_call(eqn, operand, x, weight), jnp.zeros(aval.shape, aval.dtype)
    )
    return pull(delta.astype(eqn.outvars[0].aval.dtype))[0]


# -- one batch ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Tape:
    """A batch run forwards, with what its derivatives need.

    - `states`: the state before each site; `outs`: each site's output.
    - `cotangents`: `dL/dwrites` of each segment; `deltas`: `dL/dy` of each site, for the sum L
      of the objective over the real images. Filled by `backward`.
    """

    engine: Engine
    count: int
    states: tuple[State, ...]
    outs: tuple[Any, ...]
    logits: Any
    losses: np.ndarray
    slope: Any
    curve: Callable[[Any], Any]
    cotangents: dict[int, list[Any]] = field(default_factory=dict)
    deltas: dict[int, Any] = field(default_factory=dict)
    log_scales: dict[int, float] = field(default_factory=dict)

    def x(self, site: int) -> Any:
        """The data operand of a site."""
        data = self._data(site)
        return self.states[site][data] if data in self.states[site] else self.engine.frontier[data]

    def _data(self, site: int) -> Var:
        where = self.engine.network.sites[site]
        return self.engine.network.graph.main[where.position].invars[1 - where.operand]

    def _looks_up(self, site: int) -> bool:
        """Whether the data of a site are indices, which have no derivative."""
        return self.engine.network.sites[site].lookup

    @cached_property
    def _rests(self) -> tuple[Rest, ...]:
        return rests(self.engine)

    @property
    def _logits_var(self) -> Any:
        return next(iter(self.engine.network.graph.outputs))

    def _arguments(self, site: int) -> tuple[Any, ...]:
        rest, state = self._rests[site], self.states[site]
        frontier = self.engine.frontier
        return (
            self.outs[site],
            [state[var] for var in rest.reads],
            [frontier[var] for var in rest.constants],
            [state[var] for var in rest.others],
        )

    def backward(self) -> None:
        """Fill `deltas` and `cotangents`, from the last site to the first."""
        if self.deltas:
            return
        cotangent: dict[Var, Any] = {self._logits_var: self.slope}
        log_scale = 0.0
        for site in reversed(range(len(self._rests))):
            rest = self._rests[site]
            if self.log_scales:
                cotangent, log = _rescaled(cotangent)
                log_scale += log
                self.log_scales[site] += log_scale
            own = [cotangent.pop(var, None) for var in rest.writes]
            self.cotangents[site] = own
            if all(value is None for value in own):  # the objective does not depend on it
                self.deltas[site] = jnp.zeros_like(self.outs[site])
                continue
            program = _program("vjp", rest.key, lambda rest=rest: _vjp_of_rest(rest))
            delta, reads = program(*self._arguments(site), own)
            self.deltas[site] = delta
            for var, value in zip(rest.reads, reads, strict=True):
                _add(cotangent, var, value)
            if site and not self._looks_up(site):
                _add(cotangent, self._data(site), self.pull_input(site, delta))

    # -- a site is bilinear: y = f(x, W) -----------------------------------------------

    def push(self, site: int, x: Any, weight: Any) -> Any:
        """`f(x, W)`; a leading axis of `x` or `weight` is a stack."""
        return self._bilinear(_site_call, site, x, weight)

    def pull_input(self, site: int, delta: Any, weight: Any = None) -> Any:
        """`dL/dx`, the transpose of `f(., W)` at `delta`; either may be stacked."""
        weight = self.engine.weight(site) if weight is None else weight
        return self._bilinear(pull_input, site, weight, delta)

    def pull_weight(self, site: int, delta: Any, x: Any = None) -> Any:
        """`dL/dW`, the transpose of `f(x, .)` at `delta`; either may be stacked."""
        return self._bilinear(pull_weight, site, self.x(site) if x is None else x, delta)

    def _bilinear(self, function: Callable[..., Any], site: int, *values: Any) -> Any:
        where = self.engine.network.sites[site]
        eqn = self.engine.network.graph.main[where.position]
        data, weight, out = eqn.invars[1 - where.operand], eqn.invars[where.operand], eqn.outvars[0]
        plain = {_site_call: (data, weight), pull_input: (weight, out), pull_weight: (data, out)}
        axes = tuple(
            0 if value.ndim > var.aval.ndim else None
            for value, var in zip(values, plain[function], strict=True)
        )

        def make() -> Callable[..., Any]:
            call = partial(function, eqn, where.operand)
            return call if axes == (None, None) else jax.vmap(call, in_axes=axes)

        key = text_key([eqn], [data], eqn.outvars, where.operand)
        return _program(f"{function.__name__}{axes}", key, make)(*values)

    # -- products with second derivatives ------------------------------------------------

    def tangents(
        self, along: Mapping[int, Any], of: str = "weights", *, keep: bool = True
    ) -> "Tangents":
        """Push a stack of directions forwards: `along` maps sites to `[directions, …]`.

        Directions are changes `of` the sites' `weights`, of their `inputs` (each site's own
        reading of a tensor), or of their `outputs`. Without `keep` nothing is kept but the logits'
        tangents, which is enough for Gauss-Newton forms.
        """
        moved = Tangents(tape=self, along=along, of=of)
        known: dict[Var, Any] = {}
        for site in range(min(along), len(self._rests)):
            data, rest = self._data(site), self._rests[site]
            dx = known.get(data)
            own = along.get(site)
            if of == "inputs" and own is not None:
                dx = own if dx is None else dx + own
            dy = None if dx is None else self.push(site, dx, self.engine.weight(site))
            if of != "inputs" and own is not None:
                dy = _sum(dy, own if of == "outputs" else self.push(site, self.x(site), own))
            reads = [known.get(var) for var in rest.reads]
            if keep:
                moved.xs[site], moved.outs[site], moved.reads[site] = dx, dy, reads
            if dy is not None or any(value is not None for value in reads):
                program = _program("jvp", rest.key, lambda rest=rest: _jvp_of_rest(rest))
                writes = program(*self._arguments(site), (dy, reads))
                known.update(zip(rest.writes, writes, strict=True))
            keeps = self.engine.segments[site + 1].keeps
            for var in [v for v in known if v not in keeps and v not in rest.writes]:
                del known[var]
        moved.logits = known.get(self._logits_var)
        return moved


@dataclass(kw_only=True, eq=False)
class Tangents:
    """A tape's tangents along a stack of directions `[directions, …]`, and products from them."""

    tape: Tape
    along: Mapping[int, Any]
    of: str
    xs: dict[int, Any] = field(default_factory=dict)
    outs: dict[int, Any] = field(default_factory=dict)
    reads: dict[int, Any] = field(default_factory=dict)
    logits: Any = None

    def gauss_newton_forms(self) -> np.ndarray:
        """`v' G v = (J v)' (d2L/dz2) (J v)` for each direction and image: `[directions, batch]`."""
        tape = self.tape
        if self.logits is None:
            return np.zeros((len(next(iter(self.along.values()))), len(tape.losses)))
        curved = tape.curve(self.logits)
        product = (self.logits * curved).reshape(*self.logits.shape[:2], -1)
        return np.asarray(jnp.sum(product, axis=-1), np.float64)

    def hessian(self) -> dict[int, Any]:
        """`H v` at the sites of the directions, for the sum of the objective over the images.

        Products are with respect to what the directions change: weights, or inputs. A weight
        that several sites share gets each site's part.
        """
        tape = self.tape
        assert self.of != "outputs", "a change of an output has no second derivative here"
        tape.backward()
        lowest = min(self.along)
        products: dict[int, Any] = {}
        known: dict[Var, Any] = {}
        if self.logits is not None:
            known[tape._logits_var] = tape.curve(self.logits)
        for site in reversed(range(lowest, len(tape._rests))):
            rest = tape._rests[site]
            own = [known.pop(var, None) for var in rest.writes]
            dy, reads = self.outs[site], self.reads[site]
            delta = None
            if any(value is not None for value in (*own, dy, *reads)) and any(
                value is not None for value in tape.cotangents[site]
            ):
                delta, dreads = self._through_rest(site, own)
                for var, value in zip(rest.reads, dreads, strict=True):
                    _add(known, var, value)
            through = None
            if site > lowest or self.of == "inputs":
                through = self._on_input(site, delta)
                _add(known, tape._data(site), through)
            if site in self.along:
                product = through if self.of == "inputs" else self._on_weight(site, delta)
                products[site] = jnp.zeros_like(self.along[site]) if product is None else product
        return products

    def _on_input(self, site: int, delta: Any) -> Any:
        # d(dL/dx) = f'(., W) d delta + f'(., dW) delta
        if self.tape._looks_up(site):
            return None
        moved = None if self.of == "inputs" else self.along.get(site)
        product = None if delta is None else self.tape.pull_input(site, delta)
        if moved is None:
            return product
        return _sum(product, self.tape.pull_input(site, self.tape.deltas[site], moved))

    def _on_weight(self, site: int, delta: Any) -> Any:
        # d(dL/dW) = f'(x, .) d delta + f'(dx, .) delta
        tape, dx = self.tape, self.xs[site]
        product = None if delta is None else tape.pull_weight(site, delta)
        if dx is None:
            return product
        return _sum(product, tape.pull_weight(site, tape.deltas[site], dx))

    def _through_rest(self, site: int, cotangents: list[Any]) -> Any:
        rest = self.tape._rests[site]
        zeros = self.tape.cotangents[site]

        # What has no cotangent may still have a tangent of one.
        given = [
            jnp.zeros(var.aval.shape, var.aval.dtype) if have is None and want is not None else have
            for var, have, want in zip(rest.writes, zeros, cotangents, strict=True)
        ]
        d = (self.outs[site], self.reads[site], cotangents)
        program = _program("jvp of vjp", rest.key, lambda: _jvp_of_vjp(rest))
        return program(*self.tape._arguments(site), given, d)


def _add(table: dict[Var, Any], var: Var, value: Any) -> None:
    if value is not None:
        table[var] = _sum(table.get(var), value)


def _sum(first: Any, second: Any) -> Any:
    return second if first is None else first + second


@partial(jax.jit, static_argnums=0)
def _value_and_slope(objective: Objective, logits: Any, targets: Any, real: Any) -> Any:
    def total(z: Any) -> Any:
        each = objective(with_classes(z), targets)
        return jnp.sum(jnp.where(real, each, 0.0)), each

    slope, each = jax.grad(total, has_aux=True)(logits)
    return each, slope


@partial(jax.jit, static_argnums=0)
def _curvature(objective: Objective, logits: Any, targets: Any, real: Any, moved: Any) -> Any:
    def slope(z: Any) -> Any:
        return jax.grad(
            lambda z: jnp.sum(jnp.where(real, objective(with_classes(z), targets), 0.0))
        )(z)

    return jax.vmap(lambda dz: jax.jvp(slope, (logits,), (dz,))[1])(moved)


def _rescaled(values: Mapping[Var, Any]) -> tuple[dict[Var, Any], float]:
    """All tensors divided by their largest magnitude, and its logarithm."""
    most = max((float(jnp.max(jnp.abs(v))) for k, v in values.items() if _is_float(k)), default=0)
    if not 0 < most < np.inf:
        return dict(values), 0.0
    return {k: v / most if _is_float(k) else v for k, v in values.items()}, float(np.log(most))


def record(
    engine: Engine,
    batch: Any,
    count: int,
    objective: Objective,
    targets: Targets,
    start: int = 0,
    *,
    rescale: bool = False,
) -> Tape:
    """Run one batch forwards and keep it; `start` is the number of its first image.

    `rescale` divides the state before each site, and later the derivatives, by their largest
    magnitude: for a network that is homogeneous in its state (no biases, piecewise linear)
    nothing else changes, and nothing overflows.

    **Raises** `ProxyqError` when the objective is not finite, naming the image.
    """
    if targets.how == "probes" and objective is not curvature_probe:
        raise UsageError("labels='probes' are for squared gradients alone: use labels='sampled'.")
    if engine.network.batch_norm == "batch":
        raise ProxyqError(
            "derivatives are taken for each image apart, which statistics of the batch mix: use "
            "batch_norm='running'."
        )
    state = engine.start(batch)
    states, outs = [], []
    log_scale, log_scales = 0.0, {}
    for site in range(len(engine.network.sites)):
        if rescale:
            state, log = _rescaled(state)
            log_scale += log
            log_scales[site] = log_scale
        where = engine.network.sites[site]
        out = engine.network.graph.main[where.position].outvars[0]
        states.append(state)
        state, (y,) = engine.step(state, site, NO_EDIT, (out,))
        outs.append(y)
    logits = logits_of(engine.outputs(state))
    aims = targets.of(with_classes(logits), start, count)
    real = jnp.arange(engine.batch_size) < count
    losses, slope = _value_and_slope(objective, logits, aims, real)
    losses = np.asarray(losses, np.float64)[:count]
    if not np.isfinite(losses).all():
        bad = int(np.argmax(~np.isfinite(losses)))
        raise ProxyqError(
            f"the loss of image {start + bad} is {losses[bad]}: check the model's weights and "
            "the data."
        )
    return Tape(
        engine=engine,
        count=count,
        states=tuple(states),
        outs=tuple(outs),
        logits=logits,
        losses=losses,
        slope=slope,
        curve=partial(_curvature, objective, logits, aims, real),
        log_scales=log_scales,
    )
