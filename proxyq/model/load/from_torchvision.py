"""`torchvision:NAME[@WEIGHTS]`: a network of torchvision with the weights of that name."""

import contextlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from proxyq.errors import ProxyqError, UsageError, kind_and_line, near
from proxyq.model.load.shared import choose_shape, fit_preprocessing, seeded
from proxyq.model.load.weights import load_into, read_torch
from proxyq.model.model import Model, Preprocessing
from proxyq.model.torch_import import from_torch, import_torch, import_torchvision


def load_torchvision(name: str, weights: Path | None, input_shape: tuple[int, ...] | None) -> Model:
    """The model of `name`, which may end in `@WEIGHTS`."""
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

    preprocessing, prescribed = _transforms(entry)
    shape = choose_shape(input_shape, prescribed, f"torchvision:{name}")
    module = seeded(lambda: models.get_model(name, **_options(models, name, entry)))
    if weights is not None:
        load_into(module, read_torch(weights), f"the file {str(weights)!r}")
        chosen = weights.name
    elif wanted == "none" or entry is None:
        chosen = "random"
    else:
        chosen = entry.name
        load_into(module, _download(entry.url, name), f"torchvision's {chosen}")
    return from_torch(
        module,
        shape,
        name=name,
        preprocessing=fit_preprocessing(preprocessing, shape),
        identity={"weights": chosen, "torchvision": torchvision.__version__},
    )


def _options(models: ModuleType, name: str, entry: Any) -> dict[str, Any]:
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


def _transforms(
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
            f"the weights of {name} could not be downloaded ({kind_and_line(error)}): write "
            f"'torchvision:{name}@none' for random weights, or give a file with `--weights`."
        ) from error
