"""Flax modules, nnx and linen, as a `Model`: they are JAX already, only the names are ours."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.core import meta

from proxyq.errors import UsageError
from proxyq.model.function_import import (
    Layout,
    finish_model,
    flatten_names,
    kind_of,
    path_name,
    qualified_name,
    split_arrays,
)
from proxyq.model.model import Apply, Model, Preprocessing


def from_nnx(
    module: nnx.Module,
    input_shape: Any,
    *,
    name: str | None = None,
    image_layout: Layout | None = "NHWC",
    preprocessing: Preprocessing | None = None,
    dtype: Any = jnp.float32,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> Model:
    """A Flax nnx module, in evaluation mode, as a `Model`; the module itself stays as it is.

    Names are the attribute path joined with dots (`blocks.0.conv1.kernel`). Every
    `nnx.Param` is a weight; other variables (batch-norm statistics, caches) and bare arrays
    are `frozen`. Random state stays inside the function. A variable that several
    modules share is one array, under the first of its paths.

    - `input_shape`: of ONE example. A tuple of shapes: positional arguments; a dictionary:
      keyword arguments.
    - `apply_kwargs`: fixed keyword arguments of the call, such as `{"train": False}`.

    **Raises** `UsageError` for another kind of object or inputs that do not fit.
    """
    if isinstance(module, type) and issubclass(module, nnx.Module):
        raise UsageError(
            f"`module` must be an instance of nnx.Module, got {kind_of(module)}: call it."
        )
    if isinstance(module, linen.Module):
        raise UsageError(
            f"{kind_of(module)} is a linen module: use `from_linen` with its variables."
        )
    if not isinstance(module, nnx.Module):
        raise UsageError(f"`module` must be a flax.nnx.Module, got {kind_of(module)}.")
    kwargs = _checked_kwargs(apply_kwargs)

    evaluation = nnx.clone(module)
    evaluation.eval()
    leaves, weights, apply = _nnx_function(evaluation, kwargs)
    arrays, constants = split_arrays(leaves)
    batch_statistics = None
    if _use_batch_statistics(evaluation):
        _, _, batch_statistics = _nnx_function(evaluation, kwargs)

    def bind(function: Callable[[Mapping[str, Any], Any], Any]) -> Apply:
        def bound(params: Mapping[str, Any], inputs: Any) -> Any:
            return function({**constants, **{name: params[name] for name in arrays}}, inputs)

        return bound

    return finish_model(
        name=name or type(module).__name__,
        apply=bind(apply),
        arrays=arrays,
        frozen=[key for key in arrays if key not in weights],
        input_shape=input_shape,
        dtype=dtype,
        image_layout=image_layout,
        preprocessing=preprocessing,
        batch_statistics_apply=bind(batch_statistics) if batch_statistics else None,
        identity={"source": "flax.nnx", "class": qualified_name(module)},
        source=module,
        hint=", or give fixed arguments in `apply_kwargs`",
    )


def _nnx_function(
    module: nnx.Module, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], set[str], Callable[[Mapping[str, Any], Any], Any]]:
    """`(leaves by name, names of weights, function of leaves and inputs)` of a module."""
    definition, state = nnx.split(module)
    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    variables: dict[tuple[Any, ...], Any] = {
        tuple(path): variable for path, variable in nnx.to_flat_state(state)
    }
    leaves: dict[str, Any] = {}
    weights: set[str] = set()
    random: dict[str, Any] = {}
    for path, leaf in paths:
        # A variable is a pytree node of its own; what follows it in the path is the
        # attribute that holds its value, and then the place in a value that is a tree.
        keys = [getattr(key, "key", getattr(key, "idx", None)) for key in path]
        length = next((n for n in range(len(keys), 0, -1) if tuple(keys[:n]) in variables), None)
        if length is None:
            leaf_name, variable = path_name(path), None
        else:
            variable = variables[tuple(keys[:length])]
            inside = path[length + 1 :] if isinstance(variable, nnx.Variable) else path[length:]
            leaf_name = path_name((*path[:length], *inside))
        if leaf_name in leaves:
            raise UsageError(
                f"two variables of the module have the same name {leaf_name!r}: rename one."
            )
        leaves[leaf_name] = leaf
        if isinstance(variable, nnx.Param):
            weights.add(leaf_name)
        elif isinstance(variable, nnx.RngState):
            random[leaf_name] = leaf
    order = tuple(leaves)

    def function(values: Mapping[str, Any], inputs: Any) -> Any:
        values = {**values, **random}
        filled = jax.tree.unflatten(structure, [values[key] for key in order])
        # Merging makes new variables, so that what the module writes is dropped with them.
        return _call(nnx.merge(definition, filled), inputs, kwargs)

    return {key: leaves[key] for key in order if key not in random}, weights, function


def _use_batch_statistics(module: nnx.Module) -> bool:
    """Make every batch norm in `module` normalise by its batch; whether there was any."""
    found = False
    for _, part in nnx.iter_graph(module):
        if isinstance(part, nnx.BatchNorm):
            # A flag alone would lose against `self.bn(x, use_running_average=...)`.
            part.__class__ = _batch_statistics_class(type(part))
            found = True
    return found


def _batch_statistics_class(base: type) -> type:
    def call(self: Any, x: Any, use_running_average: bool | None = None, **kwargs: Any) -> Any:
        return base.__call__(self, x, use_running_average=False, **kwargs)

    return type(base)(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})


def from_linen(
    module: linen.Module,
    variables: Mapping[str, Any],
    input_shape: Any,
    *,
    name: str | None = None,
    image_layout: Layout | None = "NHWC",
    preprocessing: Preprocessing | None = None,
    dtype: Any = jnp.float32,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> Model:
    """A Flax linen module with its variables as a `Model`.

    Names are those of the variables without their collection (`Conv_0.kernel`); the
    collection `params` holds the weights, all others (`batch_stats`) are `frozen` and keep
    their collection as a prefix only where a name would clash.

    - `variables`: what `module.init` returned or training made of it.
    - `input_shape`: of ONE example. A tuple of shapes: positional arguments; a dictionary:
      keyword arguments.
    - `apply_kwargs`: fixed arguments of `module.apply`, such as `{"train": False}`,
      `{"deterministic": True}` or `{"method": "encode"}`.

    **Raises** `UsageError` for another kind of object, missing `params`, or inputs that do
    not fit.
    """
    if not isinstance(module, linen.Module):
        raise UsageError(f"`module` must be a flax.linen.Module, got {kind_of(module)}.")
    if not isinstance(variables, Mapping) or "params" not in variables:
        keys = sorted(variables) if isinstance(variables, Mapping) else kind_of(variables)
        raise UsageError(
            "`variables` must be a dictionary with the collection 'params', as `module.init` "
            f"returns it, got {keys}."
        )
    kwargs = _checked_kwargs(apply_kwargs)
    if "mutable" in kwargs or "capture_intermediates" in kwargs:
        raise UsageError(
            "`apply_kwargs` must not hold 'mutable' or 'capture_intermediates': the model "
            "returns its outputs alone."
        )

    leaves: dict[str, Any] = {}
    weights: set[str] = set()
    rebuilders: dict[str, tuple[dict[str, str], Callable[[Mapping[str, Any]], Any]]] = {}
    # Boxes carry sharding notes around an array; the network computes the same without.
    plain = meta.unbox(dict(variables))
    for collection in sorted(plain, key=lambda key: (key != "params", key)):
        inner, rebuild = flatten_names(plain[collection])
        names = {key: key if key not in leaves else f"{collection}.{key}" for key in inner}
        rebuilders[collection] = names, rebuild
        leaves.update({names[key]: leaf for key, leaf in inner.items()})
        if collection == "params":
            weights.update(names.values())
    arrays, constants = split_arrays(leaves)

    def collections(params: Mapping[str, Any]) -> dict[str, Any]:
        values = {**constants, **{key: params[key] for key in arrays}}
        return {
            collection: rebuild({key: values[full] for key, full in names.items()})
            for collection, (names, rebuild) in rebuilders.items()
        }

    def run(params: Mapping[str, Any], inputs: Any, **options: Any) -> Any:
        args, keywords = _arguments(inputs)
        return module.apply(collections(params), *args, **keywords, **kwargs, **options)

    def apply(params: Mapping[str, Any], inputs: Any) -> Any:
        return run(params, inputs)

    def batch_statistics(params: Mapping[str, Any], inputs: Any) -> Any:
        with linen.intercept_methods(_normalise_by_batch):
            return run(params, inputs, mutable=["batch_stats"])[0]

    return finish_model(
        name=name or module.name or type(module).__name__,
        apply=apply,
        arrays=arrays,
        frozen=[key for key in arrays if key not in weights],
        input_shape=input_shape,
        dtype=dtype,
        image_layout=image_layout,
        preprocessing=preprocessing,
        batch_statistics_apply=batch_statistics if "batch_stats" in plain else None,
        identity={"source": "flax.linen", "class": qualified_name(module)},
        source=(module, variables),
        hint=", or give fixed arguments in `apply_kwargs`, such as {'train': False}",
    )


def _normalise_by_batch(
    next_method: Callable[..., Any], args: Any, kwargs: dict[str, Any], context: Any
) -> Any:
    """Interceptor: batch norm takes the statistics of the batch, whatever it was told."""
    module = context.module
    if not isinstance(module, linen.BatchNorm) or context.method_name != "__call__":
        return next_method(*args, **kwargs)
    # The flag may come by position, after the inputs, or from the constructor, which linen
    # refuses beside one in the call; the instance is bound to this very application.
    told = module.use_running_average
    object.__setattr__(module, "use_running_average", None)
    try:
        return next_method(*args[:1], **{**kwargs, "use_running_average": False})
    finally:
        object.__setattr__(module, "use_running_average", told)


def _call(module: Callable[..., Any], inputs: Any, kwargs: Mapping[str, Any]) -> Any:
    args, keywords = _arguments(inputs)
    return module(*args, **keywords, **kwargs)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A pytree of inputs as the arguments of a module's call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def _checked_kwargs(apply_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    if apply_kwargs is not None and not isinstance(apply_kwargs, Mapping):
        raise UsageError(
            f"`apply_kwargs` must be a dictionary of fixed arguments, got {kind_of(apply_kwargs)}."
        )
    return dict(apply_kwargs or {})
