"""Loops over layers, taken apart: one array for each step, under a name of its own.

`nn.scan`, `nnx.scan` and `jax.lax.scan` run one block many times, each time with the next slice
of stacked parameters. The graph unrolls such loops; here each stacked parameter becomes as many
parameters as there are steps (`blocks.dense.kernel` becomes `blocks.0.dense.kernel` and so on),
so that every step has layers of its own, with bits of their own. `whole_params` goes back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.errors import ProxyqError
from proxyq.model.graph import (
    MOST_STEPS,
    Equation,
    Var,
    bodies,
    call_body,
    has_layers,
    is_literal,
    is_pile,
    pile,
)
from proxyq.model.model import Apply, Model, Stack


class _Array(NamedTuple):
    """What a variable of a traced model holds, where that is a parameter and nothing else.

    One of several `names` (that of each step, inside a loop), or, `piled`, all of them along a
    new first axis. `axes`: the parameter's axis behind each axis of one.
    """

    names: tuple[str, ...]
    axes: tuple[int, ...]
    piled: bool = False


# The parameters that one loop over layers takes slices of, each with the axis that it scans.
_Loop = list[tuple[tuple[str, ...], int]]
_Known = dict[Var, _Array]


def taken_apart(model: Model, jaxpr: Any) -> Model:
    """The model with each parameter that a loop over layers scans as one for each step.

    - `jaxpr`: of `model.apply`, at any batch size but 2.

    **Raises** `ProxyqError` for a loop over the images of a batch.
    """
    if not any(_layer_loops(jaxpr)):
        return model
    if _layer_loops(jaxpr) != _layer_loops(_traced(model, 2)):
        raise ProxyqError(
            f"the model {model.name!r} runs its layers on one image of the batch after the other "
            "(`jax.lax.map`): use `jax.vmap`, or layers that take a batch."
        )
    while True:
        loops: list[_Loop] = []
        _walk(jaxpr, _parameters(model, jaxpr), loops)
        stacks = _named(loops, model.params)
        if not stacks:
            return model
        model = _split(model, stacks)
        jaxpr = _traced(model, 2)  # what is left are loops inside


def whole_params(params: Mapping[str, Any], stacks: Mapping[str, Stack]) -> dict[str, np.ndarray]:
    """A model's parameters with the names and shapes of its source: `Model.stacks` undone."""

    def together(parts: Sequence[Any], axis: int) -> Any:
        return np.stack([np.asarray(part) for part in parts], axis)

    return _joined(params, stacks, together)


def apart_params(params: Mapping[str, Any], stacks: Mapping[str, Stack]) -> dict[str, Any]:
    """The inverse of `whole_params`; names that are there in parts already stay."""
    found = dict(params)
    for name, stack in stacks.items():
        if name in found:
            value = np.asarray(found.pop(name))
            if stack.axis < value.ndim and value.shape[stack.axis] == len(stack.parts):
                found.update(zip(stack.parts, np.moveaxis(value, stack.axis, 0), strict=True))
            else:  # of another network: its shape is told under its own name
                found[name] = value
    return found


def _joined(
    params: Mapping[str, Any],
    stacks: Mapping[str, Stack],
    together: Callable[[Sequence[Any], int], Any],
) -> dict[str, Any]:
    found = dict(params)
    for name, stack in reversed(list(stacks.items())):
        found[name] = together([found.pop(part) for part in stack.parts], stack.axis)
    return found


def _traced(model: Model, batch_size: int) -> Any:
    return jax.make_jaxpr(model.apply)(dict(model.params), model.example(batch_size)).jaxpr


def _parameters(model: Model, jaxpr: Any) -> _Known:
    # A dictionary's leaves are traced in the order of its sorted keys.
    names = sorted(model.params)
    return {
        var: _Array((name,), tuple(range(len(var.aval.shape))))
        for name, var in zip(names, jaxpr.invars[: len(names)], strict=True)
    }


def _layer_loops(jaxpr: Any) -> list[int]:
    """The lengths of all loops over layers, loops inside others included."""
    found: list[int] = []
    for eqn in jaxpr.eqns:
        if has_layers(eqn):
            if eqn.primitive.name == "scan":
                found.append(eqn.params["length"])
            for body in bodies(eqn):
                found += _layer_loops(body)
    return found


def _walk(jaxpr: Any, known: _Known, loops: list[_Loop]) -> None:
    """Follow parameters to the loops that scan them; `known` learns where each one lies."""
    for eqn in jaxpr.eqns:
        found = [None if is_literal(atom) else known.get(atom) for atom in eqn.invars]
        if not any(found):
            continue
        first = found[0]
        name = eqn.primitive.name
        if is_pile(eqn):
            if all(one is not None and len(one.names) == 1 for one in found):
                names = tuple(one.names[0] for one in found if one is not None)
                assert first is not None
                known[eqn.outvars[0]] = _Array(names, first.axes, piled=True)
        elif name == "scan" and has_layers(eqn):
            _walk_loop(eqn, found, loops)
        elif name == "transpose" and first is not None and not first.piled:
            axes = tuple(first.axes[axis] for axis in eqn.params["permutation"])
            known[eqn.outvars[0]] = first._replace(axes=axes)
        elif name in ("convert_element_type", "copy") and first is not None:
            known[eqn.outvars[0]] = first
        else:
            call = call_body(eqn)
            if call is not None and len(call[0].invars) == len(found):
                own = _given(call[0].invars, found)
                _walk(call[0], own, loops)
                outs = [None if is_literal(atom) else own.get(atom) for atom in call[0].outvars]
                known.update(_given(eqn.outvars, outs))


def _walk_loop(eqn: Equation, found: Sequence[_Array | None], loops: list[_Loop]) -> None:
    body, fixed = eqn.params["jaxpr"].jaxpr, eqn.params["num_consts"]
    start = fixed + eqn.params["num_carry"]
    loop: _Loop = []
    own = _given(body.invars[:fixed], found[:fixed])
    for var, one in zip(body.invars[start:], found[start:], strict=True):
        if one is not None and one.piled:
            own[var] = one._replace(piled=False)
        elif one is not None:
            loop.append((one.names, one.axes[0]))
    if loop and 0 < eqn.params["length"] <= MOST_STEPS:
        loops.append(loop)
    _walk(body, own, loops)


def _given(variables: Sequence[Var], found: Sequence[_Array | None]) -> _Known:
    pairs = zip(variables, found, strict=True)
    return {var: one for var, one in pairs if one is not None and not is_literal(var)}


def _named(loops: Sequence[_Loop], params: Mapping[str, Any]) -> dict[str, Stack]:
    """How each scanned parameter is taken apart; where two loops share one, by the first."""
    stacks: dict[str, Stack] = {}
    for loop in loops:
        for own in _by_step(loop):
            place = _block([name for name, _ in own], list(params))
            for name, axis in own:
                steps = range(np.shape(params[name])[axis])
                parts = tuple(_with_step(name, place, step) for step in steps)
                if any(part in params for part in parts):
                    parts = tuple(f"{name}[{step}]" for step in steps)
                stacks.setdefault(name, Stack(parts=parts, axis=axis))
    return stacks


def _by_step(loop: _Loop) -> Iterator[list[tuple[str, int]]]:
    """The parameters of a loop at each step of the loops around it."""
    for step in range(max(len(names) for names, _ in loop)):
        yield [(names[min(step, len(names) - 1)], axis) for names, axis in loop]


def _block(names: Sequence[str], known: Sequence[str]) -> int:
    """How many parts of the names are the block's own: a step's number follows them."""
    owners = [name.split(".")[:-1] for name in names]
    block: list[str] = []
    for level in zip(*owners, strict=False):  # as far as the shortest goes
        if len(set(level)) > 1:
            break
        block.append(level[0])
    # A block of one layer: the number belongs to the block, not to the layer in it.
    if len(block) > 1 and all(owner == block for owner in owners):
        outer = ".".join(block[:-1]) + "."
        if all(name in names for name in known if name.startswith(outer)):
            block = block[:-1]
    return len(block)


def _with_step(name: str, place: int, step: int) -> str:
    parts = name.split(".")
    if len(parts) == 1:  # an array alone: `kernels.0`
        return f"{name}.{step}"
    return ".".join([*parts[:place], str(step), *parts[place:]])


def _split(model: Model, stacks: Mapping[str, Stack]) -> Model:
    params: dict[str, Any] = {}
    frozen: set[str] = set()
    for name, value in model.params.items():
        stack = stacks.get(name)
        if stack is None:
            own = {name: value}
        else:
            own = dict(zip(stack.parts, jnp.moveaxis(value, stack.axis, 0), strict=True))
        params.update(own)
        frozen |= own.keys() if name in model.frozen else set()

    def together(parts: Sequence[Any], axis: int) -> Any:
        return jnp.moveaxis(pile(parts), 0, axis)

    def joining(function: Apply) -> Apply:
        def apply(params: Mapping[str, Any], inputs: Any) -> Any:
            return function(_joined(params, stacks, together), inputs)

        return apply

    batch = model.batch_statistics_apply
    return model.replace(
        apply=joining(model.apply),
        params=params,
        frozen=frozenset(frozen),
        batch_statistics_apply=None if batch is None else joining(batch),
        stacks={**model.stacks, **stacks},
    )
