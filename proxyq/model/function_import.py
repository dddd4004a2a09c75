"""Plain JAX functions as a `Model`, and what every JAX importer shares."""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from proxyq.errors import ProxyqError, UsageError, first_line, near
from proxyq.model.model import Apply, Model, Preprocessing
from proxyq.model.scanned import taken_apart

Layout = Literal["NCHW", "NHWC"]


def from_function(
    apply: Callable[[Any, Any], Any],
    params: Any,
    input_shape: Any,
    *,
    name: str | None = None,
    image_layout: Layout | None = "NHWC",
    preprocessing: Preprocessing | None = None,
    dtype: Any = jnp.float32,
    frozen: Iterable[str] = (),
    batch_statistics_apply: Callable[[Any, Any], Any] | None = None,
) -> Model:
    """The function `apply(params, inputs)` as a `Model`.

    - `params`: any pytree of arrays: dictionaries, lists, tuples, dataclasses (registered
      with JAX or not). The path to a leaf, joined with dots, is its name:
      `blocks.0.weight`. Leaves that are no arrays (a Python number, a function) are
      constants. Floating arrays become float32; all others are state, never quantized.
    - `input_shape`: shape of ONE example, without the batch axis; or, for several inputs,
      a tuple, list or dictionary of shapes, in the structure that `apply` takes. A
      `jax.ShapeDtypeStruct` stands for a shape with its own type (token ids).
    - `image_layout`: of an input with three axes; anything else is no image.
    - `frozen`: names or shell wildcards of arrays that are state (`*.running_mean`).
    - `batch_statistics_apply`: the same function with batch norm in training mode.

    Inputs and outputs have the batch as first axis. A function for one example comes in as
    `jax.vmap(apply, in_axes=(None, 0))`.

    **Raises** `UsageError` where an argument has the wrong type or `apply` does not run.
    """
    if not callable(apply):
        raise UsageError(f"`apply` must be a function (params, inputs), got {kind_of(apply)}.")
    leaves, rebuild = flatten_names(params)
    arrays, constants = split_arrays(leaves)
    if not arrays:
        raise UsageError("`params` holds no arrays: give the trained parameters as a pytree.")

    def bind(function: Callable[[Any, Any], Any]) -> Apply:
        def bound(params: Mapping[str, Any], inputs: Any) -> Any:
            return function(
                rebuild({**constants, **{name: params[name] for name in arrays}}), inputs
            )

        return bound

    label = name or getattr(apply, "__name__", type(apply).__name__)
    return finish_model(
        name=label,
        apply=bind(apply),
        arrays=arrays,
        frozen=_matching(frozen, list(arrays)),
        input_shape=input_shape,
        dtype=dtype,
        image_layout=image_layout,
        preprocessing=preprocessing,
        batch_statistics_apply=bind(batch_statistics_apply) if batch_statistics_apply else None,
        identity={"source": "jax function", "function": qualified_name(apply)},
    )


class _Node(NamedTuple):
    """A dataclass instance that JAX takes for a leaf, with its own leaves inside."""

    value: Any
    rebuild: Callable[[Mapping[str, Any]], Any]
    names: tuple[str, ...]


def flatten_names(tree: Any) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]:
    """The leaves of a pytree by dotted path, and the function that puts them back.

    Dataclasses that are not registered with JAX are walked field by field. A tree that is
    a single leaf gets the name `weight`.

    **Raises** `UsageError` when two paths read the same (`{"a.b": …, "a": {"b": …}}`).
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves: dict[str, Any] = {}
    slots: list[str | _Node] = []

    def put(name: str, leaf: Any) -> None:
        if name in leaves:
            raise UsageError(
                f"two parameters have the same name {name!r}: rename one key of the pytree."
            )
        leaves[name] = leaf

    for path, leaf in paths:
        prefix = path_name(path)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) and not is_array(leaf):
            fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
            inner, rebuild_inner = flatten_names(fields)
            for key, value in inner.items():
                put(f"{prefix}.{key}" if prefix else key, value)
            names = tuple(f"{prefix}.{key}" if prefix else key for key in inner)
            slots.append(_Node(leaf, _dataclass_rebuilder(leaf, rebuild_inner, prefix), names))
        else:
            put(prefix or "weight", leaf)
            slots.append(prefix or "weight")

    def rebuild(values: Mapping[str, Any]) -> Any:
        filled = [
            slot.rebuild({name: values[name] for name in slot.names})
            if isinstance(slot, _Node)
            else values[slot]
            for slot in slots
        ]
        return jax.tree.unflatten(structure, filled)

    return leaves, rebuild


def _dataclass_rebuilder(
    original: Any, rebuild_fields: Callable[[Mapping[str, Any]], Any], prefix: str
) -> Callable[[Mapping[str, Any]], Any]:
    """Puts new leaves into a shallow copy of `original`, frozen or not."""
    import copy

    cut = len(prefix) + 1 if prefix else 0

    def rebuild(values: Mapping[str, Any]) -> Any:
        # A copy, not the constructor: `__post_init__` may check or convert its arguments.
        new = copy.copy(original)
        fields = rebuild_fields({name[cut:]: value for name, value in values.items()})
        for key, value in fields.items():
            object.__setattr__(new, key, value)
        return new

    return rebuild


def path_name(path: Iterable[Any]) -> str:
    """A JAX key path as text, its parts joined with dots: `blocks.0.kernel`."""
    return ".".join(str(_part(key)) for key in path)


def _part(key: Any) -> Any:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array of numbers: no random key, no Python scalar."""
    return (
        isinstance(leaf, np.ndarray | np.generic | jax.Array)
        and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        and np.dtype(leaf.dtype).kind not in "OSUMm"
    )


def split_arrays(leaves: Mapping[str, Any]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """`(arrays, constants)`: copies of the arrays, floating ones as float32, and the rest.

    **Raises** `UsageError` for leaves without values (abstract arrays, tracers).
    """
    arrays: dict[str, jax.Array] = {}
    constants: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, Tracer):
            raise UsageError(
                f"the parameter {name!r} is being traced: load the model outside `jax.jit`, "
                "`jax.grad` and `jax.vmap`."
            )
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise UsageError(
                f"the parameter {name!r} has a shape but no values: initialise the model or "
                "load its weights first."
            )
        if is_array(leaf):
            # A copy: training may go on with the original, or donate its buffer.
            arrays[name] = jnp.array(leaf, dtype=jnp.float32 if _is_float(leaf) else None)
        else:
            constants[name] = leaf
    return arrays, constants


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def input_structs(input_shape: Any, dtype: Any = jnp.float32) -> Any:
    """`input_shape` as a pytree of `jax.ShapeDtypeStruct`, one example each.

    **Raises** `UsageError` when it is no shape, or has an axis that is not positive.
    """
    if isinstance(input_shape, jax.ShapeDtypeStruct):
        return input_shape
    if _is_shape(input_shape):
        shape = tuple(int(size) for size in input_shape)
        if any(size < 1 for size in shape):
            raise UsageError(
                f"`input_shape` must be positive and without the batch axis, got {shape}."
            )
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    if isinstance(input_shape, Mapping) and input_shape:
        return {key: input_structs(shape, dtype) for key, shape in input_shape.items()}
    if isinstance(input_shape, list | tuple) and input_shape:
        return tuple(input_structs(shape, dtype) for shape in input_shape)
    raise UsageError(
        "`input_shape` must be the shape of one example, such as (32, 32, 3), or a tuple or "
        f"dictionary of shapes, got {input_shape!r}."
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(size, int | np.integer) and not isinstance(size, bool) for size in value
    )


def finish_model(
    *,
    name: str,
    apply: Apply,
    arrays: dict[str, jax.Array],
    frozen: Iterable[str],
    input_shape: Any,
    dtype: Any,
    image_layout: Layout | None,
    preprocessing: Preprocessing | None,
    batch_statistics_apply: Apply | None,
    identity: Mapping[str, Any],
    source: Any = None,
    explain: Callable[[Exception, Any], str | None] = lambda error, inputs: None,
) -> Model:
    """Check everything that can be checked without running the network, and build a `Model`.

    `explain(error, inputs)` may say why the function does not run on such inputs, and what to do.
    """
    if image_layout not in (None, "NHWC", "NCHW"):
        raise UsageError(f"`image_layout` must be 'NHWC', 'NCHW' or None, got {image_layout!r}.")
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise UsageError(
            f"`preprocessing` must be a proxyq `Preprocessing`, got {kind_of(preprocessing)}."
        )
    inputs = input_structs(input_shape, dtype)
    first = jax.tree.leaves(inputs)[0]
    is_image = len(first.shape) == 3 and jnp.issubdtype(first.dtype, jnp.floating)
    state = {key for key, value in arrays.items() if not _is_float(value)}
    model = Model(
        name=name,
        apply=apply,
        params=arrays,
        inputs=inputs,
        frozen=frozenset(frozen) | state,
        image_layout=image_layout if is_image else None,
        preprocessing=preprocessing or Preprocessing(),
        batch_statistics_apply=batch_statistics_apply,
        identity=dict(identity),
        source=source,
    )
    return taken_apart(model, _check_runs(model, explain))


def _check_runs(model: Model, explain: Callable[[Exception, Any], str | None]) -> Any:
    """Trace `apply` at a batch size that is unlikely to be any other size in the network."""
    batch_size = 7
    traced: list[Any] = []
    for apply in (model.apply, model.batch_statistics_apply):
        if apply is None:
            continue
        example = model.example(batch_size)
        try:
            jaxpr, outputs = jax.make_jaxpr(apply, return_shape=True)(dict(model.params), example)
        except ProxyqError:
            raise
        except Exception as error:
            told = explain(error, example)
            if told is not None:
                raise UsageError(f"the model {model.name!r} {told}") from error
            shapes = jax.tree.map(lambda x: x.shape, model.inputs)
            raise UsageError(
                f"the model {model.name!r} does not run on a batch of inputs of shape {shapes} "
                f"({first_line(error)}): check `input_shape`."
            ) from error
        traced.append(jaxpr.jaxpr)
        leaves = jax.tree.leaves(outputs)
        if not leaves:
            raise UsageError(f"the model {model.name!r} returns no array.")
        for leaf in leaves:
            if leaf.ndim == 0 or leaf.shape[0] != batch_size:
                raise UsageError(
                    f"every output of the model {model.name!r} must have the batch as its first "
                    f"axis, got shape {tuple(leaf.shape)} for a batch of {batch_size}: for a "
                    "function of one example use `jax.vmap`."
                )
    return traced[0]


def _matching(patterns: Iterable[str], names: list[str]) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise UsageError(f"`frozen` names no array {pattern!r}: {near(pattern, names)}")
        found.update(matches)
    return found


def kind_of(value: Any) -> str:
    """The type of a value as a reader knows it: `torch.nn.modules.conv.Conv2d`."""
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    module = type(value).__module__
    return type(value).__name__ if module == "builtins" else f"{module}.{type(value).__name__}"


def qualified_name(value: Any) -> str:
    """`module.name` of a function or of an object's class."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '?')}.{named.__qualname__}"
