"""`timm:NAME[@WEIGHTS]`: a network of timm with the weights of that tag."""

import contextlib
import math
import sys
from pathlib import Path

from proxyq.errors import MissingExtra, ProxyqError, UsageError, kind_and_line, near
from proxyq.model.load.shared import choose_shape, fit_preprocessing, seeded
from proxyq.model.load.weights import load_into, read_torch
from proxyq.model.model import Model, Preprocessing
from proxyq.model.torch_import import from_torch, import_torchvision


def load_timm(name: str, weights: Path | None, input_shape: tuple[int, ...] | None) -> Model:
    """The model of `name`, which may end in `@TAG`."""
    import_torchvision()  # timm imports it
    try:
        import timm
        from timm.data.config import resolve_model_data_config
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
            module = seeded(lambda: timm.create_model(full, pretrained=pretrained))
    except Exception as error:  # whatever the hub's client raises when it is offline
        if not pretrained:
            raise ProxyqError(f"timm cannot build {full} ({kind_and_line(error)}).") from error
        raise ProxyqError(
            f"the weights of {full} could not be downloaded ({kind_and_line(error)}): write "
            f"'timm:{base}@none' for random weights, or give a file with `--weights`."
        ) from error
    if weights is not None:
        load_into(module, read_torch(weights), f"the file {str(weights)!r}")

    config = resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    preprocessing = Preprocessing(
        mean=tuple(float(x) for x in config["mean"]),
        std=tuple(float(x) for x in config["std"]),
        resize=math.floor(min(height, width) / float(config.get("crop_pct") or 1)),
        size=(height, width),
    )
    shape = choose_shape(input_shape, (channels, height, width), f"timm:{full}")
    if weights is not None:
        chosen = weights.name
    else:
        chosen = (tag or str(config.get("tag") or "default")) if pretrained else "random"
    return from_torch(
        module,
        shape,
        name=base,
        preprocessing=fit_preprocessing(preprocessing, shape),
        identity={"weights": chosen, "timm": timm.__version__},
    )
