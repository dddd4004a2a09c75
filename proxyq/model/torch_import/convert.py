"""`from_torch`: a `torch.nn.Module` as a `Model`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.errors import ProxyqError, UsageError
from proxyq.model.model import Model, Preprocessing, call_arguments
from proxyq.model.torch_import.export import (
    any_batch_program,
    evaluation_mode,
    exportable_copy,
    numpy_dtype,
    to_numpy,
)
from proxyq.model.torch_import.interpreter import Run, build, check_operators
from proxyq.model.torch_import.program import Program
from proxyq.model.torch_import.require import import_torch

_EXAMPLES = "examples"  # the name of vmap's axis where a model is mapped over examples


def from_torch(
    module: Any,
    example_shape: Any = (3, 224, 224),
    *,
    name: str | None = None,
    preprocessing: Preprocessing | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Model:
    """A `torch.nn.Module` as a `Model` that can be traced at any batch size.

    The module is exported in evaluation mode with `torch.export` and its ATen operators
    are run with JAX; the module itself is left as it was. Parameters and buffers are
    copied under their names in `named_parameters()` and `named_buffers()`, floats as
    float32, 64-bit integers as int32; tied weights are one array, under the first name.
    Buffers are the model's `frozen` names. Tensors that the forward makes or holds as
    plain attributes become constants without a name.

    **Arguments:**

    - `example_shape`: shape of one image-like float32 input, no batch axis; or example
      inputs with a leading batch axis (only their first example is used): a tensor, a
      tuple of tensors for `forward(*inputs)`, or a dictionary for `forward(**inputs)`.
      The model then takes the same structure of arrays.
    - `name`: default the name of the module's class.
    - `preprocessing`: what was done to the images the module was trained on.
    - `identity`: provenance to which the versions of torch and the class are added.

    **Returns** the model. Its `batch_statistics_apply` normalises with the mean and the
    biased variance of the batch wherever evaluation uses running statistics; where nothing
    does, it computes what `apply` computes.

    **Raises** `ProxyqError` when torch cannot export the module, or uses operators that
    are not mapped (all are named; add them with `register_aten`); `UsageError` for
    example inputs that do not fit; `MissingExtra` without torch.

    Example:

        model = from_torch(torchvision.models.resnet18(), (3, 224, 224))
        logits = jax.jit(model.apply)(model.params, images)   # (batch, 1000)
    """
    torch = import_torch()
    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"`module` must be a torch.nn.Module, got {type(module).__name__}: pass an instance."
        )
    name = name or type(module).__name__
    arguments, example = _example_inputs(example_shape)
    exportable = exportable_copy(module)
    with evaluation_mode(exportable):
        program, single = any_batch_program(exportable, arguments, _first_names(exportable))
    check_operators(program, name)
    params, frozen = read_parameters(module)
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(tuple(x.shape[1:]), numpy_dtype(x.dtype)), example
    )
    leaves = jax.tree.leaves(inputs)
    model = Model(
        name=name,
        apply=_apply(program, inputs, single, batch_statistics=False),
        params=params,
        inputs=inputs,
        frozen=frozen,
        image_layout="NCHW" if len(leaves) == 1 and len(leaves[0].shape) == 3 else None,
        preprocessing=preprocessing or Preprocessing(),
        batch_statistics_apply=_apply(program, inputs, single, batch_statistics=True),
        identity={
            "source": "torch",
            "class": f"{type(module).__module__}.{type(module).__qualname__}",
            "torch": str(torch.__version__),
            **(identity or {}),
        },
        source=module,
    )
    _check_outputs(model)
    if single:
        with evaluation_mode(exportable):
            _check_independence(model, exportable, example)
    return model


def read_parameters(module: Any) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """All parameters and buffers of `module` by name, and the names of the buffers.

    Floats are float32, 64-bit integers int32. A tensor with several names has the first
    of them; `num_batches_tracked`, which only training reads, is left out.
    """
    params = {key: to_numpy(tensor, weights=True) for key, tensor in module.named_parameters()}
    buffers = {
        key: to_numpy(tensor, weights=True)
        for key, tensor in module.named_buffers()
        if key.rpartition(".")[2] != "num_batches_tracked"
    }
    return params | buffers, frozenset(buffers)


def _first_names(module: Any) -> dict[int, str]:
    """The name of each tensor of `module` by its `id`, the first where it has several."""
    names: dict[int, str] = {}
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        names.setdefault(id(tensor), key)
    return names


def _example_inputs(example: Any) -> tuple[tuple[tuple, dict[str, Any]], Any]:
    """Positional and keyword arguments for the forward, and their structure as the model
    takes it, of torch tensors with a batch axis."""
    torch = import_torch()
    if isinstance(example, list | tuple | torch.Size) and all(
        isinstance(size, int | np.integer) and not isinstance(size, bool) for size in example
    ):
        if any(size < 1 for size in example):
            raise UsageError(f"`example_shape` must hold positive sizes, got {tuple(example)}.")
        tensor = torch.zeros(1, *(int(size) for size in example))
        return ((tensor,), {}), tensor

    def tensor_of(leaf: Any) -> Any:
        try:
            tensor = torch.as_tensor(np.asarray(leaf) if not torch.is_tensor(leaf) else leaf)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"the example inputs must be arrays, got a {type(leaf).__name__}."
            ) from error
        if tensor.ndim == 0 or len(tensor) == 0:
            raise UsageError(
                "every example input must have a leading batch axis with at least one example, "
                f"got the shape {tuple(tensor.shape)}."
            )
        tensor = tensor.detach().cpu()
        return tensor.float() if tensor.is_floating_point() else tensor

    example = jax.tree.map(tensor_of, example)
    return call_arguments(example), example


def _apply(program: Program, inputs: Any, single: bool, *, batch_statistics: bool) -> Any:
    """The pure function `apply(params, inputs)` of a program."""
    run: Run = build(
        program,
        batch_statistics=batch_statistics,
        axis_name=_EXAMPLES if single and batch_statistics else None,
    )
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(inputs)]
    structure = jax.tree.structure(inputs)

    def apply(params: Mapping[str, Any], inputs: Any) -> Any:
        if jax.tree.structure(inputs) != structure:
            raise UsageError(
                f"the inputs must have the structure {structure}, got {jax.tree.structure(inputs)}."
            )
        # asarray narrows 64-bit arrays silently, as everything here is narrowed.
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
        batch = leaves[0].shape[0] if leaves[0].ndim else 0
        for leaf, shape in zip(leaves, shapes, strict=True):
            if tuple(leaf.shape) != (batch, *shape):
                expected = ", ".join(["batch", *map(str, shape)])
                raise UsageError(
                    f"the model takes inputs of shape ({expected}), got {tuple(leaf.shape)}."
                )
        arguments: list[Any] = [None] * len(leaves)
        for leaf, place in zip(leaves, program.order, strict=True):
            arguments[place] = leaf
        if not single:
            return run(params, arguments, batch)

        def one(*example: Any) -> Any:
            outputs = run(params, [x[None] for x in example], 1)
            return jax.tree.map(lambda y: y[0], outputs)

        return jax.vmap(one, axis_name=_EXAMPLES)(*arguments)

    return apply


def _check_outputs(model: Model) -> None:
    """The batch must be the first axis of every output (traced, not computed)."""
    outputs = jax.eval_shape(model.apply, model.params, model.example(3))
    for leaf in jax.tree.leaves(outputs):
        if not leaf.shape or leaf.shape[0] != 3:
            raise ProxyqError(
                f"{model.name} returns an output of shape {tuple(leaf.shape)} for a batch of 3: "
                "every output must have the batch as its first axis."
            )


def _check_independence(model: Model, module: Any, example: Any) -> None:
    """A model that is mapped over single examples must not let them see each other.

    Compared with torch on a batch of five, random where the inputs are floats; a module
    that takes no such batch cannot mix examples.
    """
    torch = import_torch()
    generator = torch.Generator().manual_seed(0)

    def batch_of(leaf: Any) -> Any:
        repeated = leaf[:1].expand(5, *leaf.shape[1:]).clone()
        if not leaf.is_floating_point():
            return repeated
        return repeated + torch.randn(repeated.shape, generator=generator)

    inputs = jax.tree.map(batch_of, example)
    args, kwargs = call_arguments(inputs)
    try:
        with torch.no_grad():
            outputs = module(*args, **kwargs)
    except Exception:  # whatever the module raises at a batch size that it does not take
        return
    expected = [to_numpy(x) for x in torch.utils._pytree.tree_leaves(outputs) if torch.is_tensor(x)]
    found = jax.tree.leaves(model(jax.tree.map(to_numpy, inputs)))
    for a, b in zip(found, expected, strict=True):
        scale = float(np.abs(np.nan_to_num(b)).max(initial=0.0))
        if np.shape(a) != b.shape or not np.allclose(
            a, b, rtol=1e-3, atol=1e-3 * scale, equal_nan=True
        ):
            raise ProxyqError(
                f"the outputs of {model.name} for one example depend on the others in its batch, "
                "in a way that torch.export cannot express for every batch size: rewrite what "
                "reads the batch size in its forward."
            )
