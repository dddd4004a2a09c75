"""`load_model`: the model that a text names, as the command line takes it."""

from pathlib import Path
from typing import Any

from proxyq.errors import UsageError
from proxyq.model.load.shared import check_shape
from proxyq.model.load.weights import weights_file, with_weights
from proxyq.model.model import Model

_FORMS = (
    "a model is named `digits`, `torchvision:NAME[@WEIGHTS]`, `timm:NAME[@WEIGHTS]`, "
    "`hf:FOLDER[@none]`, `hf:NAME[@REVISION]` or `path/to/file.py:factory`"
)


def load_model(
    spec: str | None = None,
    *,
    weights: str | Path | None = None,
    input_shape: tuple[int, ...] | None = None,
    embeddings: bool = False,
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
    - `"hf:FOLDER"`, `"hf:NAME"`, `"hf:NAME@REVISION"`, `"hf:NAME@none"`: from transformers;
      `input_shape` of a network of text is its number of tokens, 128 by default;
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

    `embeddings` takes tables whose rows the data look up as layers too (`Model.embeddings`); a
    factory may have said so of its model already.

    **Returns** the model. Its `identity` holds the spec, which weights, and the versions of
    the libraries it came from.

    **Raises** `UsageError` for names that do not exist (with near misses) and a missing
    input shape; `MissingExtra` when torch, torchvision, timm or transformers is needed and not
    installed;
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
        weights = weights_file(weights)
    if spec is None or spec == "digits":
        from proxyq.model.digits import load_digits

        model = with_weights(load_digits(), weights)
        check_shape(model, input_shape)
    else:
        library, _, name = spec.partition(":")
        if library == "torchvision":
            from proxyq.model.load.from_torchvision import load_torchvision

            model = load_torchvision(name, weights, input_shape)
        elif library == "timm":
            from proxyq.model.load.from_timm import load_timm

            model = load_timm(name, weights, input_shape)
        elif library == "hf":
            from proxyq.model.load.from_hf import load_hf

            model = load_hf(name, weights, input_shape)
        elif spec.rpartition(":")[0].endswith(".py") or spec.endswith(".py"):
            from proxyq.model.load.from_file import load_file

            model = load_file(spec, weights, input_shape)
        else:
            raise UsageError(f"there is no model {spec!r}: {_hint(spec)}")
    identity: dict[str, Any] = {**model.identity, "spec": spec or "digits"}
    if weights is not None:
        identity["weights"] = weights.name
    model = model.replace(identity=identity, embeddings=embeddings or model.embeddings)
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
