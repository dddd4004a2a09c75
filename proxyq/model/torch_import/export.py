"""`torch.export` to a `Program` that can be traced at any batch size."""

import contextlib
import copy
import io
import logging
import math
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from proxyq.errors import ProxyqError, first_line
from proxyq.model.torch_import.program import Different, Node, Program, Ref, merge
from proxyq.model.torch_import.require import import_torch

# Operators without a value that only check or only mark something.
_IGNORED = {
    "aten._assert_async",
    "aten._assert_scalar",
    "aten._assert_tensor_metadata",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
}

# Sizes to export at: odd, pairwise coprime, no probe so small that code treats it apart.
_PROBES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)

# What torch itself says while it exports; the user can do nothing about either.
_NOISE = (
    (FutureWarning, r".*(treespec|TreeSpec|LeafSpec).*"),
    (DeprecationWarning, r".*"),
    (UserWarning, r".*(deprecated|_maybe_guard_rel|was not a valid FQN|does not reference).*"),
    # What it thinks of the list in which a recurrent layer keeps its weights.
    (UserWarning, r"(?s).*_flat_weights.*"),
)


@contextlib.contextmanager
def _silent_logs() -> Iterator[None]:
    """Without torch's own log, which prints whole graphs when it cannot trace a module."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    children = [
        other
        for name, other in logging.root.manager.loggerDict.items()
        if name.startswith("torch.") and isinstance(other, logging.Logger)
    ]
    disabled = [(child, child.disabled) for child in children]
    try:
        for child in children:
            child.disabled = True
        yield
    finally:
        logger.setLevel(before)
        for child, was in disabled:
            child.disabled = was


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """What `torch.export` needs around it: no noise, and attention as operators of their own."""
    torch = import_torch()
    # The fused attention of inference is one opaque operator that hides its layers.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        with warnings.catch_warnings(), _silent_logs():
            for category, message in _NOISE:
                warnings.filterwarnings("ignore", message=message, category=category)
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def _unprinted_failure() -> Iterator[None]:
    """Without the graph that torch prints when an export fails; other ways are tried, and one
    sentence tells of the last failure. What is printed otherwise comes out afterwards."""
    held = io.StringIO()
    with contextlib.redirect_stderr(held):
        yield
    sys.stderr.write(held.getvalue())


class Unexportable(Exception):
    """`torch.export` could not trace the module."""


@contextlib.contextmanager
def evaluation_mode(module: Any) -> Iterator[None]:
    """`module` in evaluation mode inside, every submodule as it was afterwards."""
    flags = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, flag in flags:
            part.training = flag


def exportable_copy(module: Any) -> Any:
    """`module` itself, or a float32 copy on the CPU where it lives elsewhere."""
    torch = import_torch()
    tensors = [*module.parameters(), *module.buffers()]
    if all(
        tensor.device.type == "cpu"
        and (not tensor.is_floating_point() or tensor.dtype == torch.float32)
        for tensor in tensors
    ):
        return module
    return copy.deepcopy(module).to("cpu").float()


def any_batch_program(
    module: Any, inputs: tuple[tuple, dict[str, Any]], names: Mapping[int, str]
) -> tuple[Program, bool]:
    """The program of `module`, and whether it must be mapped over single examples.

    `inputs` are the positional and keyword arguments of `module.forward`, tensors with a
    leading batch axis, whose first example is repeated to the sizes tried here. `names`
    gives the parameter's name for the `id` of each of the module's tensors.

    Tried in this order:
    1. static exports at two coprime batch sizes, literals compared (`merge`): cheap, no
       symbolic shapes, and the model's Python may read `len(x)`;
    2. where the two graphs are not the same up to multiples of the batch: one export with
       a symbolic batch size;
    3. where the model cannot be exported at those sizes or symbolically: one example at a
       time, to be mapped with `jax.vmap` (the second result is then True).

    **Raises** `ProxyqError` when nothing works.
    """
    dimensions = {size for tensor in module.parameters() for size in tensor.shape}
    dimensions |= {size for part in inputs[0] for size in _sizes(part)}
    dimensions |= {size for part in inputs[1].values() for size in _sizes(part)}
    # A probe that equals a dimension of the model can take another branch by accident.
    probes = [probe for probe in _PROBES if probe not in dimensions]
    probes += [probe for probe in _PROBES if probe in dimensions]
    try:
        for batches in (probes[0:2], probes[2:4]):
            first, second = (export(module, _repeat(inputs, size), names) for size in batches)
            with contextlib.suppress(Different):
                return merge(first, second, (batches[0], batches[1])), False
        with contextlib.suppress(Unexportable):
            return export(module, _repeat(inputs, probes[0]), names, dynamic=True), False
    except Unexportable:
        pass
    try:
        return export(module, _repeat(inputs, 1), names), True
    except Unexportable as error:
        raise ProxyqError(
            f"torch.export cannot trace {type(module).__name__} ({error}): rewrite what depends "
            "on data in its forward, or check the input shape."
        ) from error


def export(
    module: Any,
    inputs: tuple[tuple, dict[str, Any]],
    names: Mapping[int, str],
    *,
    dynamic: bool = False,
) -> Program:
    """One `torch.export` of `module` (already in evaluation mode), decomposed with an
    empty table: functional, without aliases, layers kept whole.

    **Raises** `Unexportable` with torch's first line.
    """
    torch = import_torch()
    args, kwargs = inputs
    shapes = None
    if dynamic:
        shapes = torch.export.ShapesCollection()
        for leaf in torch.utils._pytree.tree_leaves(inputs):
            shapes[leaf] = {0: torch.export.Dim.DYNAMIC}
    try:
        with quiet_export(), _unprinted_failure():
            exported = torch.export.export(
                module, args, kwargs, dynamic_shapes=shapes, strict=False
            )
            exported = exported.run_decompositions({})
    except Exception as error:  # torch.export passes on whatever the forward raises
        raise Unexportable(first_line(error)) from error
    return _translate(exported, module, names, keywords=bool(kwargs))


def numpy_dtype(dtype: Any) -> np.dtype:
    """The dtype in which a torch dtype is computed here: 64 bits become 32."""
    torch = import_torch()
    known = {
        torch.float64: np.float32,
        torch.float32: np.float32,
        torch.float16: np.float16,
        torch.bfloat16: jnp.bfloat16,
        torch.int64: np.int32,
        torch.int32: np.int32,
        torch.int16: np.int16,
        torch.int8: np.int8,
        torch.uint8: np.uint8,
        torch.bool: np.bool_,
        torch.complex128: np.complex64,
        torch.complex64: np.complex64,
    }
    if dtype not in known:
        raise ProxyqError(f"the model uses {dtype}, which has no counterpart here.")
    return np.dtype(known[dtype])


def to_numpy(tensor: Any, *, weights: bool = False) -> np.ndarray:
    """A copy of `tensor` as a NumPy array of `numpy_dtype`; floats of weights as float32."""
    torch = import_torch()
    dtype = numpy_dtype(tensor.dtype)
    if weights and tensor.is_floating_point():
        dtype = np.dtype(np.float32)
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # NumPy knows no bfloat16
        return np.array(tensor.float().numpy(), dtype)
    array = tensor.numpy()
    if array.dtype == np.int64:
        limits = np.iinfo(np.int32)
        array = np.clip(array, limits.min, limits.max)
    with np.errstate(over="ignore"):  # the lowest float64 becomes -inf, as it is meant
        return np.array(array, dtype)


def _sizes(part: Any) -> Iterator[int]:
    for leaf in import_torch().utils._pytree.tree_leaves(part):
        yield from leaf.shape[1:]


def _repeat(inputs: tuple[tuple, dict[str, Any]], size: int) -> Any:
    """`inputs` with their first example `size` times."""
    tree_map = import_torch().utils._pytree.tree_map
    # A copy: an expanded tensor has strides that the exported graph would remember.
    return tree_map(lambda x: x[:1].expand(size, *x.shape[1:]).clone(), inputs)


def _translate(exported: Any, module: Any, names: Mapping[int, str], keywords: bool) -> Program:
    """The exported program as plain data."""
    torch = import_torch()
    pytree = torch.utils._pytree
    numbers: dict[Any, Any] = {}  # graph node -> Ref, or the literal that it stands for
    inputs: list[int] = []
    params: dict[int, str] = {}
    constants: dict[int, np.ndarray] = {}
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    kinds = torch.export.graph_signature.InputKind
    for value, node in enumerate(exported.graph.find_nodes(op="placeholder")):
        spec = specs[node.name]
        numbers[node] = Ref(value)
        if spec.kind == kinds.USER_INPUT:
            inputs.append(value)
        elif spec.kind == kinds.PARAMETER:
            params[value] = names[id(module.get_parameter(spec.target))]
        elif spec.kind == kinds.BUFFER:
            params[value] = names[id(module.get_buffer(spec.target))]
        elif spec.kind == kinds.CONSTANT_TENSOR:
            constants[value] = to_numpy(exported.constants[spec.target])
        else:
            raise ProxyqError(
                f"the model takes {spec.target!r}, a {spec.kind.name.lower()} that is no "
                "tensor: pass tensors only."
            )

    nodes: list[Node] = []
    counter = len(numbers)

    def literal(argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            return numbers[argument]
        if isinstance(argument, list | tuple):
            return type(argument)(literal(item) for item in argument)
        if isinstance(argument, Mapping):
            return {key: literal(item) for key, item in argument.items()}
        if isinstance(argument, slice):
            return slice(*(literal(x) for x in (argument.start, argument.stop, argument.step)))
        if isinstance(argument, torch.dtype):
            return numpy_dtype(argument)
        if isinstance(argument, torch.device | torch.layout | torch.memory_format):
            return None
        return argument

    def walk(graph_module: Any) -> Any:
        nonlocal counter
        result = None
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                target = graph_module
                for part in node.target.split("."):
                    target = getattr(target, part)
                if isinstance(target, torch.Tensor):
                    numbers[node] = Ref(counter)
                    constants[counter] = to_numpy(target)
                    counter += 1
                else:
                    numbers[node] = target
            elif node.op == "output":
                result = literal(node.args[0])
            elif node.op == "call_function":
                body = next((a for a in node.args if _is_graph(a, numbers)), None)
                if body is not None:  # `with torch.no_grad()`, `with autocast`: what is inside
                    inner = numbers[body]
                    outer = node.args[node.args.index(body) + 1 :]
                    holes = inner.graph.find_nodes(op="placeholder")
                    for hole, argument in zip(holes, outer, strict=True):
                        numbers[hole] = numbers[argument]
                    numbers[node] = walk(inner)
                    continue
                operator = _operator_name(node.target)
                if operator.rpartition(".")[0] in _IGNORED:
                    continue
                if operator == "operator.getitem" and not isinstance(numbers[node.args[0]], Ref):
                    numbers[node] = numbers[node.args[0]][node.args[1]]
                    continue
                kwargs = {
                    key: literal(item)
                    for key, item in node.kwargs.items()
                    if key not in {"device", "layout", "pin_memory", "memory_format"}
                }
                stack = node.meta.get("nn_module_stack") or {}
                path = next(reversed(stack.values()))[0] if stack else ""
                nodes.append(Node(counter, operator, literal(tuple(node.args)), kwargs, path))
                numbers[node] = Ref(counter)
                counter += 1
        return result

    results = walk(exported.graph_module)
    # State that the forward writes (counters, caches) comes first among the results.
    output_kind = torch.export.graph_signature.OutputKind.USER_OUTPUT
    outputs = [
        result
        for result, spec in zip(results, exported.graph_signature.output_specs, strict=True)
        if spec.kind == output_kind
    ]
    places = pytree.tree_unflatten(range(len(inputs)), exported.call_spec.in_spec)
    arguments, by_name = places
    order = pytree.tree_leaves([by_name[key] for key in sorted(by_name)] if keywords else arguments)
    program = Program(
        inputs=tuple(inputs),
        order=tuple(order),
        params=params,
        constants=constants,
        nodes=tuple(nodes),
        outputs=_plain(pytree.tree_unflatten(outputs, exported.call_spec.out_spec)),
    )
    return program.without_dead_nodes()


def _is_graph(argument: Any, numbers: Mapping[Any, Any]) -> bool:
    graph_module = import_torch().fx.GraphModule
    try:
        return isinstance(numbers.get(argument), graph_module)
    except TypeError:  # a list is no key
        return False


def _operator_name(target: Any) -> str:
    """`aten.conv2d.default`, `operator.getitem`, `math.ceil`, `torch.sym_max`."""
    torch = import_torch()
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    home = (getattr(target, "__module__", None) or "").lstrip("_")
    if target in (math.floor, math.ceil, math.trunc, math.sqrt):
        home = "math"
    return f"{home}.{getattr(target, '__name__', target)}"


def _plain(outputs: Any) -> Any:
    """Outputs as tuples, lists and ordered dictionaries, which JAX walks in the model's
    order; a class of the model's own is replaced by the one it derives from."""
    if isinstance(outputs, Mapping):
        return OrderedDict((key, _plain(item)) for key, item in outputs.items())
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return type(outputs)(*(_plain(item) for item in outputs))
    if isinstance(outputs, list | tuple):  # torch.return_types derive from tuple
        items = [_plain(item) for item in outputs]
        return items if isinstance(outputs, list) else tuple(items)
    return outputs
