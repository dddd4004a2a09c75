"""Run a `Program` with JAX: one Python function per ATen operator."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from proxyq.errors import MissingOperators, ProxyqError
from proxyq.model.torch_import import aten
from proxyq.model.torch_import.program import Node, Program, Ref, fill, refs

Run = Callable[[Mapping[str, Any], Sequence[Any], int], Any]


def check_operators(program: Program, name: str) -> None:
    """Refuse, before anything is traced, what cannot be interpreted.

    **Raises** `MissingOperators` naming every unmapped operator with the torch module that
    first uses it, or `ProxyqError` for the first operator that draws random numbers or
    updates statistics although the module is in evaluation mode.
    """
    missing: dict[str, str] = {}
    for node in program.nodes:
        if aten.find(node.operator) is None:
            missing.setdefault(_short(node.operator), node.path or "the top level")
    missing |= {
        f"{operator} (its indices)": path for operator, path in _used_indices(program).items()
    }
    if missing:
        listed = ", ".join(f"{operator} (in {path})" for operator, path in missing.items())
        first = next(iter(missing)).removesuffix(" (its indices)")
        uses = Counter(_short(node.operator) for node in program.nodes)
        raise MissingOperators(
            f"{name} uses operators that have no JAX counterpart yet: {listed}; add them with "
            f"`proxyq.model.torch_import.register_aten({first!r})`.",
            {
                operator: (uses[operator.removesuffix(" (its indices)")], path)
                for operator, path in missing.items()
            },
        )
    for node in program.nodes:
        complaint = aten.complaint(node.operator, node.args, node.kwargs)
        if complaint is not None:
            raise ProxyqError(
                f"{name} {complaint} in evaluation mode (in {node.path or 'the top level'}): its "
                "outputs would not be a function of its inputs."
            )


def build(program: Program, *, batch_statistics: bool = False, axis_name: str | None = None) -> Run:
    """`run(params, inputs, batch)`: the outputs of `program`.

    `inputs` are the flattened user inputs, `batch` the size of their first axis. With
    `batch_statistics` every batch norm that would use running statistics takes those of
    the batch; under a `vmap` over single examples they are averaged over `axis_name`.
    """
    functions = [
        aten.batch_statistics(node.operator, axis_name)
        if batch_statistics and aten.uses_running_statistics(node.operator)
        else aten.find(node.operator)
        for node in program.nodes
    ]
    release = _last_uses(program.nodes, refs(program.outputs))
    nodes = list(zip(program.nodes, functions, release, strict=True))

    # The operators follow torch's rules of promotion, whatever JAX was told to allow.
    @jax.numpy_dtype_promotion("standard")
    @jax.numpy_rank_promotion("allow")
    def run(params: Mapping[str, Any], inputs: Sequence[Any], batch: int) -> Any:
        values: dict[int, Any] = dict(program.constants)
        values |= {value: params[name] for value, name in program.params.items()}
        values |= dict(zip(program.inputs, inputs, strict=True))
        for node, function, dead in nodes:
            args, kwargs = fill((node.args, dict(node.kwargs)), values, batch)
            try:
                assert function is not None  # check_operators came first
                values[node.value] = function(*args, **kwargs)
            except ProxyqError:
                raise
            except Exception as error:
                error.add_note(f"in {node.operator} of the torch module {node.path or '(root)'!r}")
                raise
            for value in dead:
                values.pop(value, None)
        return fill(program.outputs, values, batch)

    return run


def _last_uses(nodes: Sequence[Node], outputs: Iterable[int]) -> list[list[int]]:
    """For each node, the values that nothing after it reads, so that they can be freed."""
    seen = set(outputs)
    release = []
    for node in reversed(nodes):
        last = {value for value in refs((node.args, node.kwargs)) if value not in seen}
        seen |= last
        release.append(sorted(last))
    return release[::-1]


def _used_indices(program: Program) -> dict[str, str]:
    """Poolings whose indices are read; only their values can be computed."""
    pools = {
        node.value: node
        for node in program.nodes
        if _short(node.operator).startswith(("max_pool", "adaptive_max_pool"))
    }
    used = {}
    for node in program.nodes:
        if node.operator == "operator.getitem" and isinstance(node.args[0], Ref):
            pool = pools.get(node.args[0].value)
            if pool is not None and node.args[1] == 1:
                used[_short(pool.operator)] = pool.path or "the top level"
    return used


def _short(operator: str) -> str:
    """The name to print and to register: `max.dim`, or `library::name` outside ATen."""
    operator = operator.removesuffix(".default")
    if operator.startswith("aten."):
        return operator.removeprefix("aten.")
    return operator.replace(".", "::", 1)
