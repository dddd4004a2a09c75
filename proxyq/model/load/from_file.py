"""`path/to/file.py:factory`: what a function in the user's own Python file returns."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from proxyq.errors import MissingExtra, ProxyqError, UsageError, kind_and_line, near
from proxyq.model.load.shared import check_shape, choose_shape, seeded
from proxyq.model.load.weights import load_into, read_torch, with_weights
from proxyq.model.model import Model


def load_file(spec: str, weights: Path | None, input_shape: tuple[int, ...] | None) -> Model:
    """The model of `spec`, `path/to/file.py:factory`."""
    path_text, factory_name = (
        (spec, "") if spec.endswith(".py") else (spec.rpartition(":")[0], spec.rpartition(":")[2])
    )
    path = Path(path_text)
    if not path.is_file():
        raise UsageError(f"there is no file {path_text!r} to take the model from.")
    with _staying(path_text), _importable(path.resolve().parent):
        code = _import_file(path)
        known = [
            key
            for key, value in vars(code).items()
            if callable(value) and not key.startswith("_") and _is_own(value, code)
        ]
        if not factory_name:
            raise UsageError(
                f"say which factory of {path_text!r} makes the model, as in "
                f"'{path_text}:{(known or ['factory'])[0]}'."
            )
        if not hasattr(code, factory_name):
            raise UsageError(
                f"{path_text!r} has no {factory_name!r}: "
                + (near(factory_name, known) if known else "it defines no function.")
            )
        factory = getattr(code, factory_name)
        made = _call(factory, factory_name, path_text)
        return _from_made(made, factory, factory_name, path_text, weights, input_shape)


@contextlib.contextmanager
def _staying(path: str) -> Iterator[None]:
    """The user's code may fail, in the network's own forward pass too, but not end proxyq."""
    try:
        yield
    except SystemExit as error:
        status = "" if error.code is None else repr(error.code)[:100]
        raise ProxyqError(
            f"the code of {path!r} called `sys.exit({status})` while its model was made: take "
            "the call out, or put it under `if __name__ == '__main__':`."
        ) from error


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules beside the user's file can be imported by it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _import_file(path: Path, *, again: bool = True) -> ModuleType:
    name = f"proxyq_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    code = importlib.util.module_from_spec(spec)
    sys.modules[name] = code  # dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(code)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):  # interrupted, or `sys.exit`
            raise
        if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "torchvision"):
            raise MissingExtra(error.name, "torch", f"The file {str(path)!r}") from error
        if again and _lacks_operators(error):
            from proxyq.model.torch_import import import_torchvision

            import_torchvision()
            return _import_file(path, again=False)
        raise ProxyqError(
            f"{str(path)!r} could not be imported ({kind_and_line(error)})."
        ) from error
    return code


def _is_own(value: Any, code: ModuleType) -> bool:
    """Defined in that file rather than imported into it."""
    return getattr(value, "__module__", None) == code.__name__


def _lacks_operators(error: BaseException | None) -> bool:
    """Whether torchvision failed for want of its operators, here or under what was imported."""
    while error is not None:
        if "operator torchvision::" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _call(factory: Any, name: str, path: str, *, again: bool = True) -> Any:
    """What the factory makes; a model that stands there ready is taken as it is."""
    torch = sys.modules.get("torch")
    ready = isinstance(factory, Model | tuple)
    if torch is not None and isinstance(factory, torch.nn.Module):
        ready = True
    if "flax" in sys.modules:
        from flax import nnx

        ready = ready or isinstance(factory, nnx.Module)
    if ready:
        return factory
    if not callable(factory):
        raise UsageError(f"{name!r} in {path!r} is no function but a {type(factory).__name__}.")
    try:
        return seeded(factory) if torch is not None else factory()
    except Exception as error:
        if again and _lacks_operators(error):
            from proxyq.model.torch_import import import_torchvision

            import_torchvision()
            return _call(factory, name, path, again=False)
        raise ProxyqError(f"{name!r} in {path!r} failed ({kind_and_line(error)}).") from error


def _from_made(
    made: Any,
    factory: Any,
    factory_name: str,
    path: str,
    weights: Path | None,
    input_shape: tuple[int, ...] | None,
) -> Model:
    """What a factory returned, as a `Model`."""
    if isinstance(made, Model):
        check_shape(made, input_shape)
        return with_weights(made, weights)

    holder = made[0] if isinstance(made, tuple) and made else made
    declared = getattr(holder, "input_shape", None) or getattr(factory, "input_shape", None)
    source = f"{path}:{factory_name}"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(made, torch.nn.Module):
        from proxyq.model.torch_import import from_torch

        if weights is not None:
            load_into(made, read_torch(weights), f"the file {str(weights)!r}")
        shape = choose_shape(input_shape, declared, source)
        return from_torch(made, shape, name=factory_name)

    from flax import linen, nnx

    if isinstance(made, nnx.Module):
        from proxyq.model.flax_import import from_nnx

        shape = choose_shape(input_shape, declared, source)
        return with_weights(from_nnx(made, input_shape=shape, name=factory_name), weights)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], linen.Module):
        from proxyq.model.flax_import import from_linen

        shape = choose_shape(input_shape, declared, source)
        model = from_linen(made[0], made[1], input_shape=shape, name=factory_name)
        return with_weights(model, weights)
    if isinstance(made, linen.Module):
        raise UsageError(
            f"{factory_name!r} in {path!r} returned a linen module alone: return the pair of "
            "the module and its variables."
        )
    raise UsageError(
        f"{factory_name!r} in {path!r} must return a torch.nn.Module, a Flax module or a "
        f"proxyq.Model, got a {type(made).__name__}."
    )
