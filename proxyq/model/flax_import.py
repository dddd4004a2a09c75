"""Flax modules, nnx and linen, as a `Model`: they are JAX already, only the names are ours."""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, linen, nnx
from flax.core import meta

from proxyq.errors import ProxyqError, UsageError, first_line, near
from proxyq.model.function_import import (
    Layout,
    finish_model,
    flatten_names,
    kind_of,
    path_name,
    qualified_name,
    split_arrays,
)
from proxyq.model.model import Apply, Model, Preprocessing, call_arguments


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
    modules share is one array, under the first of its paths. The stacked variables that a loop
    over layers (`nnx.scan`) runs through are one array for each step: `blocks.0.dense.kernel`.
    Parameters in bfloat16 are held in float32; what the module computes in bfloat16 stays so.

    - `input_shape`: of ONE example. A tuple of shapes: positional arguments; a dictionary:
      keyword arguments.
    - `apply_kwargs`: fixed keyword arguments of the call, such as `{"train": False}`.

    **Raises** `UsageError` for another kind of object, inputs that do not fit, or a call that
    runs batch norm or dropout as in training.
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
    training = nnx.clone(evaluation)
    _refuse_training(evaluation, _turn_off(module, kwargs))
    leaves, weights, apply = _nnx_function(evaluation, kwargs)
    arrays, constants = split_arrays(leaves)
    batch_statistics = None
    if _use_batch_statistics(training):
        _, _, batch_statistics = _nnx_function(training, kwargs)

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
        explain=_explaining(module, kwargs, bind(apply), arrays),
    )


def _nnx_function(
    module: nnx.Module, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], set[str], Callable[[Mapping[str, Any], Any], Any]]:
    """`(leaves by name, names of weights, function of leaves and inputs)` of a module."""
    definition, state = nnx.split(module)
    leaves: dict[str, Any] = {}
    weights: set[str] = set()
    random: dict[str, Any] = {}
    named, structure = _nnx_leaves(state)
    for leaf_name, (leaf, variable) in named.items():
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


def _nnx_leaves(state: Any) -> tuple[dict[str, tuple[Any, Any]], Any]:
    """Each leaf of a module's state with its variable, by name; and the state's structure."""
    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    variables: dict[tuple[Any, ...], Any] = {
        tuple(path): variable for path, variable in nnx.to_flat_state(state)
    }
    named: dict[str, tuple[Any, Any]] = {}
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
        if leaf_name in named:
            raise UsageError(
                f"two variables of the module have the same name {leaf_name!r}: rename one."
            )
        named[leaf_name] = leaf, variable
    return named, structure


def put_into_nnx(module: nnx.Module, params: Mapping[str, Any]) -> nnx.Module:
    """A copy of a module, in evaluation mode, that holds these parameters by name.

    **Raises** `ProxyqError` where the module has no array of a name, or one of another shape.
    """
    made = nnx.clone(module)
    made.eval()
    _, state = nnx.split(made)
    named, structure = _nnx_leaves(state)
    leaves = {name: leaf for name, (leaf, _) in named.items()}
    nnx.update(made, jax.tree.unflatten(structure, _replaced(leaves, params).values()))
    return made


def put_into_linen(variables: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a linen module with these parameters by name; boxes stay around them.

    **Raises** `ProxyqError` where there is no array of a name, or one of another shape.
    """
    leaves, rebuilders = _linen_leaves(meta.unbox(dict(variables)))
    values = _replaced(leaves, params)
    return meta.replace_boxed(dict(variables), _linen_tree(rebuilders, values))


def _replaced(leaves: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in params.items():
        if name not in leaves:
            raise ProxyqError(
                f"the module has no parameter {name!r}: it is not the one that the model was made "
                f"from; {near(name, list(leaves))}"
            )
        if np.shape(leaves[name]) != np.shape(value):
            raise ProxyqError(
                f"the parameter {name!r} has the shape {np.shape(leaves[name])} in the module and "
                f"{np.shape(value)} in the quantized network."
            )
    return {
        # Of the type that the module has: a model holds all floats as float32.
        name: jnp.asarray(params[name], jax.dtypes.canonicalize_dtype(leaf.dtype))
        if name in params
        else leaf
        for name, leaf in leaves.items()
    }


def _refuse_training(module: nnx.Module, flags: str) -> None:
    """Make parts of `module` that are told in a call to work as in training refuse to."""
    for _, part in nnx.iter_graph(module):
        for kind, flag, does in _IN_TRAINING:
            if isinstance(part, kind):
                part.__class__ = _refusing_class(type(part), flag, does, flags)


_IN_TRAINING = (
    (nnx.BatchNorm, "use_running_average", "batch norm takes the statistics of the batch"),
    (nnx.Dropout, "deterministic", "dropout draws random numbers"),
    (nnx.MultiHeadAttention, "deterministic", "the dropout of attention draws random numbers"),
)


@lru_cache(maxsize=256)
def _refusing_class(base: type, flag: str, does: str, flags: str) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        positional = args[1:2] if flag == "use_running_average" else ()
        rate = getattr(self, "rate", getattr(self, "dropout_rate", None))
        # `module.eval()` does not reach what is said in the call.
        if rate != 0 and kwargs.get(flag, *positional or (None,)) is False:
            raise UsageError(
                f"the module runs in training mode: its call says {flag}=False, so that {does}; "
                f"{flags}."
            )
        return base.__call__(self, *args, **kwargs)

    return type(base)(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})


# What a call may take to run as in training, and its value in evaluation.
_FLAGS = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
    "inference": True,
}


def _turn_off(module: Any, kwargs: Mapping[str, Any]) -> str:
    """What to do about a module that runs in training mode, by what its call takes."""
    method = kwargs.get("method", "__call__")
    function = getattr(type(module), method, None) if isinstance(method, str) else method
    try:
        known = inspect.signature(function).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        known = {}
    own = {name: value for name, value in _FLAGS.items() if name in known and name not in kwargs}
    such = f", such as {own}" if own else ""
    return f"give fixed arguments in `apply_kwargs`{such}"


def _explaining(
    module: Any, kwargs: Mapping[str, Any], apply: Apply, params: Mapping[str, Any]
) -> Callable[[Exception, Any], str | None]:
    """`explain` of `finish_model` for Flax: why the module does not run, and what to do."""

    def runs(inputs: Any) -> bool:
        try:
            jax.eval_shape(apply, dict(params), inputs)
        except Exception:
            return False
        return True

    def explain(error: Exception, inputs: Any) -> str | None:
        text, flags = str(error), _turn_off(module, kwargs)
        if isinstance(error, errors.ScopeCollectionNotFound | errors.ScopeVariableNotFoundError):
            found = re.search(r'collection "(\w+)"', text)
            if found:
                return (
                    f"needs the collection {found[1]!r}, which `variables` lacks: give all that "
                    "`module.init` returned or training made of it, not 'params' alone."
                )
        if isinstance(error, errors.ModifyScopeVariableError):
            found = re.search(r'collection "(\w+)"', text)
            return (
                f"runs in training mode (it updates {found[1] if found else 'its variables'!r}): "
                f"{flags}."
            )
        if isinstance(error, errors.InvalidRngError):
            found = re.search(r'PRNG for "(\w+)"', text)
            stream = found[1] if found else "dropout"
            return (
                f"asks for random numbers of the stream {stream!r}, as in training: {flags}, or "
                f"a key as {{'rngs': {{{stream!r}: jax.random.key(0)}}}} where they belong to it."
            )
        missing = re.search(r"missing \d+ required \S+ arguments?: '(\w+)'", text)
        if isinstance(error, TypeError) and missing and missing[1] in _FLAGS:
            return f"is called without {missing[1]!r}: {flags}."
        shape = inputs.shape if isinstance(inputs, jax.ShapeDtypeStruct) else ()
        if len(shape) == 4 and shape[1] in (1, 3, 4):
            moved = (*shape[2:], shape[1])
            if runs(jax.ShapeDtypeStruct((shape[0], *moved), inputs.dtype)):
                return (
                    "reads images with channels last, as Flax does: give "
                    f"input_shape={moved}, not {shape[1:]}."
                )
        shapes = jax.tree.map(lambda x: x.shape[1:], inputs)
        return (
            f"does not run on a batch of inputs of shape {shapes} ({first_line(error)}): check "
            f"`input_shape`, or {flags}."
        )

    return explain


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
    their collection as a prefix only where a name would clash. The stacked variables that a loop
    over layers (`nn.scan`) runs through are one array for each step: `blocks.0.dense.kernel`.
    Parameters in bfloat16 are held in float32; what the module computes in bfloat16 stays so.

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

    # Boxes carry sharding notes around an array; the network computes the same without.
    plain = meta.unbox(dict(variables))
    leaves, rebuilders = _linen_leaves(plain)
    weights = set(rebuilders["params"][0].values())
    arrays, constants = split_arrays(leaves)

    def collections(params: Mapping[str, Any]) -> dict[str, Any]:
        values = {**constants, **{key: params[key] for key in arrays}}
        return _linen_tree(rebuilders, values)

    def run(params: Mapping[str, Any], inputs: Any, **options: Any) -> Any:
        args, keywords = call_arguments(inputs)
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
        explain=_explaining(module, kwargs, apply, arrays),
    )


_Rebuilders = dict[str, tuple[dict[str, str], Callable[[Mapping[str, Any]], Any]]]


def _linen_leaves(plain: Mapping[str, Any]) -> tuple[dict[str, Any], _Rebuilders]:
    """The arrays of all collections by name, and for each collection its own names and the
    function that puts them back."""
    leaves: dict[str, Any] = {}
    rebuilders: _Rebuilders = {}
    for collection in sorted(plain, key=lambda key: (key != "params", key)):
        inner, rebuild = flatten_names(plain[collection])
        names = {key: key if key not in leaves else f"{collection}.{key}" for key in inner}
        rebuilders[collection] = names, rebuild
        leaves.update({names[key]: leaf for key, leaf in inner.items()})
    return leaves, rebuilders


def _linen_tree(rebuilders: _Rebuilders, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        collection: rebuild({key: values[full] for key, full in names.items()})
        for collection, (names, rebuild) in rebuilders.items()
    }


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
    args, keywords = call_arguments(inputs)
    return module(*args, **keywords, **kwargs)


def _checked_kwargs(apply_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    if apply_kwargs is not None and not isinstance(apply_kwargs, Mapping):
        raise UsageError(
            f"`apply_kwargs` must be a dictionary of fixed arguments, got {kind_of(apply_kwargs)}."
        )
    return dict(apply_kwargs or {})
