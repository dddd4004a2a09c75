"""Folders with a quantized torch module: `config.json` and `model.safetensors`.

`config.json` holds what the runtime reads, and under `proxyq` what it does not know of: how the
module that reads the weights differs from the one that the model was made from. Batch norms that
were folded became an `Identity`, layers got biases, and some round what they read.
"""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from proxyq.errors import ProxyqError, UsageError, reason, shown
from proxyq.export.torch_module import round_input
from proxyq.files import cannot_write, made_folder, read_bytes, read_json, write_atomic
from proxyq.model.torch_import import import_torch

WEIGHTS, CONFIG = "model.safetensors", "config.json"
Checked = TypeVar("Checked")


def structure(made: Any, module: Any) -> dict[str, Any]:
    """How a module with folded batch norms differs from the original: `folded` and `biases`."""
    torch = import_torch()
    before = dict(module.named_modules())
    folded = [
        name
        for name, one in made.named_modules()
        if isinstance(one, torch.nn.Identity) and not isinstance(before[name], torch.nn.Identity)
    ]
    own = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    biases = {
        name: list(value.shape)
        for name, value in made.named_parameters(remove_duplicate=False)
        if name not in own
    }
    return {"folded": folded, "biases": biases}


def restructured(module: Any, facts: Mapping[str, Any], folder: Path) -> Any:
    """A copy of a fresh module that the weights fit: float32, evaluation mode, on the CPU.

    **Raises** `ProxyqError` when a name is missing, `UsageError` when it is no module.
    """
    torch = import_torch()
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"`module` must be a torch.nn.Module, got {type(module).__name__}.")
    made = copy.deepcopy(module).eval().float().cpu()
    try:
        for name in facts["folded"]:
            owner, _, attribute = name.rpartition(".")
            made.get_submodule(name)
            setattr(made.get_submodule(owner), attribute, torch.nn.Identity())
        for name, shape in facts["biases"].items():
            owner, _, attribute = name.rpartition(".")
            # A bias is a vector, of no more channels than a layer can have.
            if not (isinstance(shape, list) and len(shape) == 1 and _is_width(shape[0])):
                raise ValueError(f"the shape of {name!r} is {shown(shape)}")
            bias = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
            setattr(made.get_submodule(owner), attribute, bias)
        for name, grid in facts["inputs"].items():
            round_input(made.get_submodule(name), grid)
    except AttributeError as error:
        raise _other(folder, reason(error)) from None
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        raise ProxyqError(
            f"the field 'proxyq' of {str(folder / CONFIG)!r} is wrong: {lacks}{reason(error)}."
        ) from None
    return made


def _is_width(size: Any) -> bool:
    return type(size) is int and 0 <= size < 1 << 24


def write_folder(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: dict[str, str],
    config: Mapping[str, Any],
    check: Callable[[Path], Checked],
) -> tuple[int, Checked]:
    """Write the two files; the bytes of the weights, and what `check` says of them.

    `check` gets a folder with the two files before they take their place: where it raises,
    whatever the folder held before is untouched.

    **Raises** `ProxyqError` when they cannot be written.
    """
    from safetensors.torch import save

    folder = Path(path)
    content = save({name: value.contiguous().clone() for name, value in tensors.items()}, metadata)
    with made_folder(folder):
        return len(content), _tried(folder, content, config, check)


def _tried(
    folder: Path, content: bytes, config: Mapping[str, Any], check: Callable[[Path], Checked]
) -> Checked:
    """Write the two files beside their places, let them be checked, and put them there."""
    try:
        trial = tempfile.TemporaryDirectory(dir=folder, prefix=".trial.")
    except OSError as error:
        raise cannot_write(folder, error) from None
    with trial as made:
        write_atomic(Path(made) / WEIGHTS, content)
        write_atomic(Path(made) / CONFIG, json.dumps(config, indent=2, allow_nan=False) + "\n")
        found = check(Path(made))
        for name in (WEIGHTS, CONFIG):
            try:
                os.replace(Path(made) / name, folder / name)
            except OSError as error:
                raise cannot_write(folder / name, error) from None
    return found


def read_config(folder: Path, schema: str) -> dict[str, Any]:
    """The parsed `config.json`, whose part `proxyq` has this schema.

    **Raises** `ProxyqError` when it is missing or of another kind.
    """
    config = read_json(folder / CONFIG, "configuration")
    facts = config.get("proxyq") if isinstance(config, dict) else None
    found = facts.get("schema") if isinstance(facts, dict) else None
    if found != schema:
        raise ProxyqError(
            f"{str(folder / CONFIG)!r} has no part 'proxyq' with the schema {schema!r}, got "
            f"{shown(found)}."
        )
    return config


def read_weights(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """All tensors of the folder by name, and the metadata of their file.

    **Raises** `ProxyqError` when the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    read_bytes(folder / WEIGHTS, "weights")  # one sentence where it is not there
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise ProxyqError(
            f"the weights {str(folder / WEIGHTS)!r} are damaged: {reason(error)}."
        ) from None


def put_state(module: Any, state: Mapping[str, Any], folder: Path) -> None:
    """Put tensors in the place of the module's own, all of them and no others.

    **Raises** `ProxyqError` naming the first that does not fit.
    """
    own = module.state_dict()
    for name in own:
        if name not in state:
            raise _other(folder, f"it has no {name!r}")
    for name, value in state.items():
        if name not in own:
            raise _other(folder, f"its {name!r} has no place in the module")
        if tuple(value.shape) != tuple(own[name].shape):
            raise _other(
                folder,
                f"its {name!r} has the shape {tuple(value.shape)} and the module's "
                f"{tuple(own[name].shape)}",
            )
    try:
        module.load_state_dict(dict(state), assign=True)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # of another type
        raise _other(folder, reason(error)) from None


def _other(folder: Path, why: str) -> ProxyqError:
    return ProxyqError(f"the network in {str(folder)!r} is of another module: {why.rstrip('.')}.")
