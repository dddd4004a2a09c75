"""`load_model`: the model that a text names, as the command line takes it."""

import contextlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from proxyq.errors import MissingExtra, ProxyqError, UsageError, near
from proxyq.model.model import Model, Preprocessing

_FORMS = (
    "a model is named `digits`, `torchvision:NAME[@WEIGHTS]`, `timm:NAME[@WEIGHTS]` or "
    "`path/to/file.py:factory`"
)


def load_model(
    spec: str | None = None,
    *,
    weights: str | Path | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> Model:
    """The model that `spec` names, with its weights, ready to be searched.

    `spec` is one of

    - `None` or `"digits"`: the embedded digits network;
    - `"torchvision:NAME"`: that model of torchvision with the library's default pretrained
      weights, downloaded once into torch's cache and checked by their hash;
      `"torchvision:NAME@WEIGHTS"` with those of that name (`IMAGENET1K_V1`);
      `"torchvision:NAME@none"` with random weights, the same at every call. Preprocessing
      and input shape are those of the weights, with `@none` of the default weights;
    - `"timm:NAME"`, `"timm:NAME@TAG"`, `"timm:NAME@none"`: likewise from timm, whose tags
      are such as `a1_in1k`;
    - `"path/to/file.py:factory"`: what calling `factory` in that file returns without
      arguments: a `torch.nn.Module`, a `flax.nnx.Module`, a pair of a linen module and its
      variables, or a `proxyq.Model`. The file is run as Python: name only files you trust.

    `weights` is a file, `.safetensors` or `.pt`, `.pth`, `.th` (tensors only, nothing else
    is unpickled), that replaces the weights by name, so nothing is downloaded. In a torch
    file the tensors may lie under `state_dict`, and their names may all start with
    `module.`; `num_batches_tracked` may be missing.

    `input_shape` is the shape of one example without batch axis, as the model takes it
    (channels first in torch). Without it: what the pretrained weights prescribe, or an
    attribute `input_shape` of the module, its class or the factory.

    **Returns** the model. Its `identity` holds the spec, which weights, and the versions of
    the libraries it came from.

    **Raises** `UsageError` for names that do not exist (with near misses) and a missing
    input shape; `MissingExtra` when torch, torchvision or timm is needed and not installed;
    `ProxyqError` for weights that cannot be downloaded, do not fit or hold NaN, and for a
    file that fails.

    Example:

        model = load_model("torchvision:resnet18@none")
        model.input_shape   # (3, 224, 224)
    """
    if input_shape is not None:
        input_shape = tuple(int(size) for size in input_shape)
        if not input_shape or any(size < 1 for size in input_shape):
            raise UsageError(f"`input_shape` must hold positive sizes, got {input_shape}.")
    if weights is not None:
        weights = _weights_file(weights)
    if spec is None or spec == "digits":
        from proxyq.model.digits import load_digits

        model = _with_weights(load_digits(), weights)
        _check_shape(model, input_shape)
    else:
        library, _, name = spec.partition(":")
        if library == "torchvision":
            model = _torchvision(name, weights, input_shape)
        elif library == "timm":
            model = _timm(name, weights, input_shape)
        elif spec.rpartition(":")[0].endswith(".py") or spec.endswith(".py"):
            model = _file(spec, weights, input_shape)
        else:
            raise UsageError(f"there is no model {spec!r}: {_hint(spec)}")
    identity: dict[str, Any] = {**model.identity, "spec": spec or "digits"}
    if weights is not None:
        identity["weights"] = weights.name
    model = model.replace(identity=identity)
    model.check_finite()
    return model


def _hint(spec: str) -> str:
    """How models are named, and where a bare name most likely belongs."""
    from difflib import get_close_matches

    if get_close_matches(spec, ["digits"], cutoff=0.7):
        return "did you mean 'digits'?"
    if ":" not in spec and spec.replace("_", "").isalnum():
        return f"{_FORMS}; did you mean 'torchvision:{spec}'?"
    return f"{_FORMS}."


def _check_shape(model: Model, input_shape: tuple[int, ...] | None) -> None:
    """A finished model has its input shape; another one cannot be asked for."""
    if input_shape is not None and input_shape != model.input_shape:
        raise UsageError(
            f"`input_shape` is {input_shape}, but {model.name} takes {model.input_shape}: leave "
            "it out."
        )


# -- torchvision -----------------------------------------------------------------------


def _torchvision(name: str, weights: Path | None, input_shape: tuple[int, ...] | None) -> Model:
    from proxyq.model.torch_import import import_torchvision

    torchvision = import_torchvision()
    models = torchvision.models
    name, _, wanted = name.partition("@")
    known = [key for key in models.list_models() if not key.startswith("quantized_")]
    if name.removeprefix("quantized_") in known and name not in known:
        raise UsageError(
            f"torchvision's {name!r} is quantized already: name the float network, "
            f"'torchvision:{name.removeprefix('quantized_')}'."
        )
    if name not in known:
        raise UsageError(f"torchvision has no model {name!r}: {near(name, known)}")

    enum = models.get_model_weights(name)
    members = list(enum.__members__)
    if wanted in ("", "none"):
        entry = enum.DEFAULT if members else None
    elif wanted in members:
        entry = enum[wanted]
    else:
        raise UsageError(
            f"torchvision has no weights {wanted!r} of {name}: {near(wanted, [*members, 'none'])}"
        )
    if entry is None and wanted != "none" and weights is None:
        raise UsageError(
            f"torchvision has no pretrained weights of {name}: write 'torchvision:{name}@none' "
            "for random ones, or give `--weights`."
        )

    preprocessing, prescribed = _torchvision_transforms(entry)
    shape = _input_shape(input_shape, prescribed, f"torchvision:{name}")
    module = _seeded(lambda: models.get_model(name, **_torchvision_options(models, name, entry)))
    if weights is not None:
        _load_into(module, _read_torch(weights), f"the file {str(weights)!r}")
        chosen = weights.name
    elif wanted == "none" or entry is None:
        chosen = "random"
    else:
        chosen = entry.name
        _load_into(module, _download(entry.url, name), f"torchvision's {chosen}")
    return _torch_model(
        module,
        shape,
        name=name,
        preprocessing=_fitted(preprocessing, shape),
        identity={"weights": chosen, "torchvision": torchvision.__version__},
    )


def _torchvision_options(models: ModuleType, name: str, entry: Any) -> dict[str, Any]:
    """Arguments of the builder: the network that the pretrained weights belong to, without
    letting the builder fetch any, since it would unpickle more than tensors."""
    accepted = inspect.signature(models.get_model_builder(name)).parameters
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in accepted:
        options["weights_backbone"] = None
    if entry is not None and "categories" in entry.meta:
        options["num_classes"] = len(entry.meta["categories"])
    if "aux_loss" in accepted:
        options["aux_loss"] = True
    if name in ("googlenet", "inception_v3"):
        # Trained on inputs scaled in another way, which the network itself then undoes.
        options |= {"transform_input": True, "init_weights": True}
    return options


def _torchvision_transforms(
    entry: Any,
) -> tuple[Preprocessing, tuple[int, ...] | None]:
    """Preprocessing and input shape of an entry of torchvision's weights."""
    transforms = entry.transforms() if entry is not None else None
    kind = type(transforms).__name__
    if transforms is None or kind not in ("ImageClassification", "SemanticSegmentation"):
        return Preprocessing(), None
    resize = int(transforms.resize_size[0])
    crop = int(getattr(transforms, "crop_size", transforms.resize_size)[0])
    preprocessing = Preprocessing(
        mean=tuple(float(x) for x in transforms.mean),
        std=tuple(float(x) for x in transforms.std),
        resize=resize,
        size=(crop, crop),
    )
    return preprocessing, (len(preprocessing.mean), crop, crop)


def _download(url: str, name: str) -> Mapping[str, Any]:
    """The state dictionary behind `url`, from torch's cache or the network."""
    from proxyq.model.torch_import import import_torch

    torch = import_torch()
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        # torch announces the download on stdout, which belongs to results.
        with contextlib.redirect_stdout(sys.stderr):
            return torch.hub.load_state_dict_from_url(
                url,
                map_location="cpu",
                progress=sys.stderr.isatty(),
                check_hash=True,
                weights_only=True,
            )
    except Exception as error:  # URLError, OSError, RuntimeError, UnpicklingError, EOFError
        if file.is_file():
            raise ProxyqError(
                f"the cached weights {str(file)!r} cannot be read (damaged or cut short): delete "
                "the file and try again."
            ) from error
        raise ProxyqError(
            f"the weights of {name} could not be downloaded ({_reason(error)}): write "
            f"'torchvision:{name}@none' for random weights, or give a file with `--weights`."
        ) from error


# -- timm ------------------------------------------------------------------------------


def _timm(name: str, weights: Path | None, input_shape: tuple[int, ...] | None) -> Model:
    from proxyq.model.torch_import import import_torchvision

    import_torchvision()  # timm imports it
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise MissingExtra("timm", "timm", "A model of timm") from error

    name, _, wanted = name.partition("@")
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise UsageError(f"timm has no model {base!r}: {near(base, timm.list_models())}")
    if wanted not in ("", "none"):
        tag = wanted
    tags = [key.partition(".")[2] for key in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise UsageError(
            f"timm has no weights {tag!r} of {base}: {near(tag, [*filter(None, tags), 'none'])}"
        )
    full = f"{base}.{tag}" if tag else base
    pretrained = weights is None and wanted != "none"
    if pretrained and not timm.is_model_pretrained(full):
        raise UsageError(
            f"timm has no pretrained weights of {base}: write 'timm:{base}@none' for random "
            "ones, or give `--weights`."
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = _seeded(lambda: timm.create_model(full, pretrained=pretrained))
    except Exception as error:  # whatever the hub's client raises when it is offline
        if not pretrained:
            raise ProxyqError(f"timm cannot build {full} ({_reason(error)}).") from error
        raise ProxyqError(
            f"the weights of {full} could not be downloaded ({_reason(error)}): write "
            f"'timm:{base}@none' for random weights, or give a file with `--weights`."
        ) from error
    if weights is not None:
        _load_into(module, _read_torch(weights), f"the file {str(weights)!r}")

    config = timm.data.resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    preprocessing = Preprocessing(
        mean=tuple(float(x) for x in config["mean"]),
        std=tuple(float(x) for x in config["std"]),
        resize=math.floor(min(height, width) / float(config.get("crop_pct") or 1)),
        size=(height, width),
    )
    shape = _input_shape(input_shape, (channels, height, width), f"timm:{full}")
    if weights is not None:
        chosen = weights.name
    else:
        chosen = (tag or str(config.get("tag") or "default")) if pretrained else "random"
    return _torch_model(
        module,
        shape,
        name=base,
        preprocessing=_fitted(preprocessing, shape),
        identity={"weights": chosen, "timm": timm.__version__},
    )


# -- Python files ----------------------------------------------------------------------


def _file(spec: str, weights: Path | None, input_shape: tuple[int, ...] | None) -> Model:
    path_text, factory_name = (
        (spec, "") if spec.endswith(".py") else (spec.rpartition(":")[0], spec.rpartition(":")[2])
    )
    path = Path(path_text)
    if not path.is_file():
        raise UsageError(f"there is no file {path_text!r} to take the model from.")
    with _importable(path.resolve().parent):
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
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "torchvision"):
            raise MissingExtra(error.name, "torch", f"The file {str(path)!r}") from error
        if again and "operator torchvision::" in str(error):
            from proxyq.model.torch_import import import_torchvision

            import_torchvision()
            return _import_file(path, again=False)
        raise ProxyqError(f"{str(path)!r} could not be imported ({_reason(error)}).") from error
    return code


def _is_own(value: Any, code: ModuleType) -> bool:
    """Defined in that file rather than imported into it."""
    return getattr(value, "__module__", None) == code.__name__


def _call(factory: Any, name: str, path: str) -> Any:
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
        return _seeded(factory) if torch is not None else factory()
    except (Exception, SystemExit) as error:
        raise ProxyqError(f"{name!r} in {path!r} failed ({_reason(error)}).") from error


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
        _check_shape(made, input_shape)
        return _with_weights(made, weights)

    holder = made[0] if isinstance(made, tuple) and made else made
    declared = getattr(holder, "input_shape", None) or getattr(factory, "input_shape", None)
    source = f"{path}:{factory_name}"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(made, torch.nn.Module):
        if weights is not None:
            _load_into(made, _read_torch(weights), f"the file {str(weights)!r}")
        shape = _input_shape(input_shape, declared, source)
        return _torch_model(made, shape, name=factory_name)

    from flax import linen, nnx

    if isinstance(made, nnx.Module):
        from proxyq.model.flax_import import from_nnx

        shape = _input_shape(input_shape, declared, source)
        return _with_weights(from_nnx(made, input_shape=shape, name=factory_name), weights)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], linen.Module):
        from proxyq.model.flax_import import from_linen

        shape = _input_shape(input_shape, declared, source)
        model = from_linen(made[0], made[1], input_shape=shape, name=factory_name)
        return _with_weights(model, weights)
    if isinstance(made, linen.Module):
        raise UsageError(
            f"{factory_name!r} in {path!r} returned a linen module alone: return the pair of "
            "the module and its variables."
        )
    raise UsageError(
        f"{factory_name!r} in {path!r} must return a torch.nn.Module, a Flax module or a "
        f"proxyq.Model, got a {type(made).__name__}."
    )


# -- parts they share ------------------------------------------------------------------


def _torch_model(
    module: Any,
    shape: tuple[int, ...],
    *,
    name: str,
    preprocessing: Preprocessing | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Model:
    from proxyq.model.torch_import import from_torch

    return from_torch(module, shape, name=name, preprocessing=preprocessing, identity=identity)


def _input_shape(asked: tuple[int, ...] | None, prescribed: Any, source: str) -> tuple[int, ...]:
    """The shape that was asked for, else the prescribed one."""
    if asked is not None:
        return asked
    if prescribed is None:
        raise UsageError(
            f"the input shape of {source} is unknown: give `--input-shape`, such as 3,224,224, "
            "or set an attribute `input_shape` on the module."
        )
    return tuple(int(size) for size in prescribed)


def _fitted(preprocessing: Preprocessing, shape: tuple[int, ...]) -> Preprocessing:
    """The preprocessing for images of another size: the resizing scaled with the crop."""
    if preprocessing.size is None or len(shape) != 3 or preprocessing.size == shape[1:]:
        return preprocessing
    assert preprocessing.resize is not None  # both or none are given
    ratio = preprocessing.resize / min(preprocessing.size)
    return Preprocessing(
        mean=preprocessing.mean,
        std=preprocessing.std,
        resize=round(ratio * min(shape[1:])),
        size=(shape[1], shape[2]),
    )


def _seeded(build: Callable[[], Any]) -> Any:
    """`build()` with torch's generator at seed 0, and as it was afterwards."""
    from proxyq.model.torch_import import import_torch

    torch = import_torch()
    # fork_rng would also visit GPUs; the generator of the CPU is the one that initialises.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build()


def _weights_file(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth", ".th"):
        raise UsageError(
            f"the weights {str(path)!r} must be a .safetensors, .pt, .pth or .th file."
        )
    if not path.is_file():
        raise UsageError(f"there is no weights file {str(path)!r}.")
    return path


def _read_torch(path: Path) -> Mapping[str, Any]:
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
            f"the weights {str(path)!r} cannot be read ({_reason(error)}): the file may be "
            "damaged or cut short."
        ) from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping) or not any(torch.is_tensor(v) for v in loaded.values()):
        raise ProxyqError(f"{str(path)!r} holds no tensors by name: save `module.state_dict()`.")
    for prefix in ("module.", "_orig_mod."):  # of DataParallel and of torch.compile
        if all(str(key).startswith(prefix) for key in loaded):
            loaded = {key.removeprefix(prefix): value for key, value in loaded.items()}
    return loaded


def _load_into(module: Any, tensors: Mapping[str, Any], source: str) -> None:
    """Load `tensors` into a torch module; names and shapes must agree."""
    own = module.state_dict()
    tensors = _new_names(tensors, own)
    for key in own:
        if key in tensors and own[key].shape != tensors[key].shape:
            raise ProxyqError(
                f"{source} does not fit {type(module).__name__}: {key!r} has the shape "
                f"{tuple(tensors[key].shape)} instead of {tuple(own[key].shape)}."
            )
    # The module may rename old keys itself, so its own answer counts.
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    loaded = {own[key].data_ptr() for key in own if key not in missing and own[key].numel()}
    missing = [
        key
        for key in missing
        if not key.endswith("num_batches_tracked") and own[key].data_ptr() not in loaded
    ]
    _check_names(missing, list(unexpected), source, type(module).__name__)


def _new_names(tensors: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """DenseNets were saved when a name could hold a dot: `norm.1.weight` is `norm1.weight`."""
    import re

    pattern = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)")
    renamed = {}
    for key, value in tensors.items():
        match = pattern.fullmatch(key)
        new = match[1] + match[2] if match else key
        renamed[new if new in own else key] = value
    # A plain dictionary would lose the versions by which modules recognise old files.
    return tensors if list(renamed) == list(tensors) else renamed


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


def _with_weights(model: Model, weights: Path | None) -> Model:
    """A finished model with its arrays replaced by those of a file, by name."""
    if weights is None:
        return model
    if weights.suffix == ".safetensors":
        from safetensors.numpy import load_file

        try:
            arrays: dict[str, np.ndarray] = load_file(weights)
        except Exception as error:
            raise ProxyqError(
                f"the weights {str(weights)!r} cannot be read ({_reason(error)}): the file may "
                "be damaged or cut short."
            ) from error
    else:
        from proxyq.model.torch_import.export import to_numpy

        arrays = {key: to_numpy(tensor) for key, tensor in _read_torch(weights).items()}
    source = f"the file {str(weights)!r}"
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
        params[key] = np.asarray(arrays[key]).astype(np.asarray(old).dtype)
    return model.replace(params=params)


def _reason(error: BaseException) -> str:
    """An error's kind and first line, for use inside a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text.rstrip(".:")
