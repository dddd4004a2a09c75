"""Weights files: reading them without unpickling code, and placing them by name."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proxyq.errors import ProxyqError, UsageError, kind_and_line
from proxyq.model.model import Model
from proxyq.model.scanned import apart_params


def weights_file(path: str | Path) -> Path:
    """`path`, if there is a weights file."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth", ".th"):
        raise UsageError(
            f"the weights {str(path)!r} must be a .safetensors, .pt, .pth or .th file."
        )
    if not path.is_file():
        raise UsageError(f"there is no weights file {str(path)!r}.")
    return path


def read_torch(path: Path) -> Mapping[str, Any]:
    """Names to torch tensors from a weights file, without wrappers and common prefixes."""
    from proxyq.model.torch_import import import_torch

    torch = import_torch()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the two readers raise many kinds for a damaged file
        if "weights only" in str(error).lower():
            raise ProxyqError(
                f"{str(path)!r} holds more than tensors, which is not unpickled: save "
                "`module.state_dict()` alone."
            ) from error
        raise ProxyqError(
            f"the weights {str(path)!r} cannot be read ({kind_and_line(error)}): the file may be "
            "damaged or cut short."
        ) from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping) or not any(torch.is_tensor(v) for v in loaded.values()):
        raise ProxyqError(f"{str(path)!r} holds no tensors by name: save `module.state_dict()`.")
    if not all(isinstance(key, str) for key in loaded):
        loaded = {str(key): value for key, value in loaded.items()}
    for prefix in ("module.", "_orig_mod."):  # of DataParallel and of torch.compile
        if all(key.startswith(prefix) for key in loaded):
            loaded = {key.removeprefix(prefix): value for key, value in loaded.items()}
    return loaded


def load_into(module: Any, tensors: Mapping[str, Any], source: str) -> None:
    """Load `tensors` into a torch module; names and shapes must agree."""
    own = module.state_dict()
    tensors = _new_names(tensors, own)
    for key in own:
        if key in tensors and not hasattr(tensors[key], "shape"):
            raise _no_tensor(source, key, tensors[key])
        if key in tensors and own[key].shape != tensors[key].shape:
            raise ProxyqError(
                f"{source} does not fit {type(module).__name__}: {key!r} has the shape "
                f"{tuple(tensors[key].shape)} instead of {tuple(own[key].shape)}."
            )
    # The module may rename old keys itself, so its own answer counts.
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False)
    except Exception as error:  # tensors of kinds that cannot be copied: sparse, of a device
        raise ProxyqError(
            f"{source} does not fit {type(module).__name__} ({kind_and_line(error)})."
        ) from error
    loaded = {own[key].data_ptr() for key in own if key not in missing and own[key].numel()}
    missing = [
        key
        for key in missing
        if not key.endswith("num_batches_tracked") and own[key].data_ptr() not in loaded
    ]
    _check_names(missing, list(unexpected), source, type(module).__name__)


def _new_names(tensors: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """DenseNets were saved when a name could hold a dot: `norm.1.weight` is `norm1.weight`."""
    pattern = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)")
    renamed = {}
    for key, value in tensors.items():
        match = pattern.fullmatch(key)
        new = match[1] + match[2] if match else key
        renamed[new if new in own else key] = value
    # A plain dictionary would lose the versions by which modules recognise old files.
    return tensors if list(renamed) == list(tensors) else renamed


def with_weights(model: Model, weights: Path | None) -> Model:
    """A finished model with its arrays replaced by those of a file, by name."""
    if weights is None:
        return model
    if weights.suffix == ".safetensors":
        from safetensors.numpy import load_file

        try:
            arrays: dict[str, np.ndarray] = load_file(weights)
        except Exception as error:
            raise ProxyqError(
                f"the weights {str(weights)!r} cannot be read ({kind_and_line(error)}): the file "
                "may be damaged or cut short."
            ) from error
    else:
        from proxyq.model.torch_import.export import to_numpy

        arrays = {}
        for key, tensor in read_torch(weights).items():
            if key not in model.params:
                arrays[key] = np.zeros(0)  # told below, whatever it is
                continue
            try:
                arrays[key] = to_numpy(tensor)
            except Exception as error:  # a number, a sparse tensor, one without values
                raise _no_tensor(f"the file {str(weights)!r}", key, tensor) from error
    source = f"the file {str(weights)!r}"
    arrays = apart_params(arrays, model.stacks)
    missing = [key for key in model.params if key not in arrays]
    unexpected = [key for key in arrays if key not in model.params]
    _check_names(missing, unexpected, source, model.name)
    params = {}
    for key, old in model.params.items():
        if tuple(arrays[key].shape) != tuple(np.shape(old)):
            raise ProxyqError(
                f"{source} does not fit {model.name}: {key!r} has the shape "
                f"{tuple(arrays[key].shape)} instead of {tuple(np.shape(old))}."
            )
        if np.asarray(arrays[key]).dtype.kind == "c":
            raise ProxyqError(f"{source} holds complex numbers under {key!r}: give real ones.")
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told later
            params[key] = np.asarray(arrays[key]).astype(np.asarray(old).dtype)
    return model.replace(params=params)


def _no_tensor(source: str, key: str, value: Any) -> ProxyqError:
    return ProxyqError(
        f"{source} holds no plain tensor under {key!r}, but a {type(value).__name__}: save "
        "`module.state_dict()`."
    )


def _check_names(missing: list[str], unexpected: list[str], source: str, target: str) -> None:
    complaints = []
    for names, words in ((missing, "lacks"), (unexpected, "holds")):
        if names:
            some = ", ".join(repr(key) for key in names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            tail = ", which it does not have" if words == "holds" else ""
            complaints.append(f"{words} {some}{more}{tail}")
    if complaints:
        raise ProxyqError(f"{source} does not fit {target}: it {' and '.join(complaints)}.")
