"""`hf:NAME_OR_FOLDER[@REVISION]`: a network of transformers, from the hub or from a folder."""

import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proxyq.errors import MissingExtra, ProxyqError, UsageError, kind_and_line
from proxyq.model.load.shared import fit_preprocessing, seeded
from proxyq.model.load.weights import load_into, read_torch
from proxyq.model.model import Model, Preprocessing
from proxyq.model.torch_import import from_torch, import_torchvision

TOKENS = 128
"""Length of token inputs where the user gives none."""


def load_hf(name: str, weights: Path | None, input_shape: tuple[int, ...] | None) -> Model:
    """The model of `name`, a repository of the hub or a folder with `config.json`.

    It is built as the class that its configuration names. Networks of text take `input_ids` and
    `attention_mask`, both `[batch, tokens]`; of those with an encoder and a decoder the encoder
    is taken. Networks of images take images.

    Files with code of their own are not run, and weights are read from safetensors alone.
    """
    transformers = _import_transformers()
    source, _, wanted = name.partition("@")
    revision = wanted if wanted not in ("", "none") else None
    pretrained = weights is None and wanted != "none"
    if not source:
        raise UsageError("`hf:` must name a repository or a folder, as in 'hf:FOLDER'.")
    options: dict[str, Any] = {"revision": revision} if revision else {}
    if Path(source).is_dir():
        options["local_files_only"] = True
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(source, **options)
            config.use_cache = False
            kind = _class_of(transformers, config)
            if pretrained:
                module = kind.from_pretrained(
                    source, config=config, use_safetensors=True, dtype="float32", **options
                )
            else:
                module = seeded(lambda: kind._from_config(config))
    except Exception as error:  # transformers and the hub's client raise what they like
        raise ProxyqError(
            f"the network {source!r} could not be loaded by transformers ({kind_and_line(error)}): "
            "name a folder with config.json and model.safetensors, as in 'hf:FOLDER', or write "
            f"'hf:{source}@none' for random weights."
        ) from error
    if getattr(config, "is_encoder_decoder", False) and hasattr(module, "get_encoder"):
        module = module.get_encoder()
    module = module.eval()
    if weights is not None:
        load_into(module, read_torch(weights), f"the file {str(weights)!r}")
    chosen = (revision or "default") if pretrained else (weights.name if weights else "random")
    identity = {"weights": chosen, "transformers": transformers.__version__}
    label = Path(source).name or source
    accepts = inspect.signature(module.forward).parameters
    if "input_ids" in accepts:
        return from_torch(
            module,
            _tokens(accepts, config, input_shape),
            name=label,
            identity={
                **identity,
                "tokenizer": source,
                "vocabulary": int(config.vocab_size),
            },
        )
    if "pixel_values" not in accepts:
        raise UsageError(
            f"{source!r} reads neither tokens nor images ({type(module).__name__}): write a "
            "factory of your own, as in 'file.py:factory'."
        )
    shape = input_shape or _image_shape(config, source)
    return from_torch(
        module,
        shape,
        name=label,
        preprocessing=fit_preprocessing(_preprocessing(transformers, source, options), shape),
        identity=identity,
    )


def _import_transformers() -> Any:
    import_torchvision()  # transformers imports it
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingExtra("transformers", "hf", "A model of transformers") from error
    return transformers


def _class_of(transformers: Any, config: Any) -> Any:
    """The class that a configuration names, or the bare network of its kind.

    The name stands in a file, so it chooses among networks and nothing else.
    """
    named = getattr(transformers, str((getattr(config, "architectures", None) or [""])[0]), None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    return transformers.AutoModel


def _tokens(accepts: Any, config: Any, input_shape: tuple[int, ...] | None) -> dict[str, Any]:
    """Example inputs, one text of ones."""
    import torch

    if input_shape is not None and len(input_shape) != 1:
        raise UsageError(
            f"`input_shape` of a network of text is its number of tokens, such as 128, got "
            f"{input_shape}."
        )
    limit = getattr(config, "max_position_embeddings", None) or TOKENS
    length = input_shape[0] if input_shape else min(TOKENS, int(limit))
    ids = torch.ones((1, length), dtype=torch.int64)
    names = ("input_ids", "attention_mask")
    return {name: ids.clone() for name in names if name in accepts}


def _image_shape(config: Any, source: str) -> tuple[int, ...]:
    size = getattr(config, "image_size", None)
    if size is None:
        raise UsageError(
            f"the input shape of {source!r} is unknown: give `--input-shape`, such as 3,224,224."
        )
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def _preprocessing(transformers: Any, source: str, options: dict[str, Any]) -> Preprocessing:
    """What the folder says of its images; nothing where it says nothing."""
    try:
        with _quiet():
            found = transformers.AutoImageProcessor.from_pretrained(source, **options)
        return Preprocessing(
            mean=tuple(float(x) for x in found.image_mean),
            std=tuple(float(x) for x in found.image_std),
        )
    except Exception:  # most folders made by hand have none
        return Preprocessing()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers tells its progress and what it misses; what matters comes as exceptions."""
    from transformers.utils import logging as own

    level, bars = own.get_verbosity(), own.is_progress_bar_enabled()
    own.set_verbosity_error()
    own.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        own.set_verbosity(level)
        if bars:
            own.enable_progress_bar()
