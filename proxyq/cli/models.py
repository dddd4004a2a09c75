"""`proxyq models`, and how a model comes from what was typed."""

from typing import Any

from proxyq.cli import options as o
from proxyq.cli.arguments import numbers, positive_numbers
from proxyq.cli.output import print_json, print_text, say
from proxyq.cli.runtime import working
from proxyq.errors import ProxyqError, UsageError


def load(spec: str | None, **options: Any) -> Any:
    """The `Model` of a command, its preprocessing as the options say (see `named`)."""
    return named(spec, **options).load()


def named(
    spec: str | None,
    *,
    weights: str | None = None,
    input_shape: str | None = None,
    embeddings: bool | None = None,
    mean: str | None = None,
    std: str | None = None,
    size: str | None = None,
    resize: int | None = None,
) -> Any:
    """The `ModelSpec` of a command."""
    from proxyq.api.model_spec import ModelSpec

    shape = None if input_shape is None else positive_numbers(input_shape, "--input-shape")
    changes: dict[str, Any] = {}
    if mean is not None:
        changes["mean"] = numbers(mean, "--mean", kind=float)
    if std is not None:
        changes["std"] = numbers(std, "--std", kind=float)
    if any(not deviation > 0 for deviation in changes.get("std", ())):
        raise UsageError(f"--std must be positive in every channel, got {std!r}.")
    if size is not None:
        sides = positive_numbers(size, "--size", most=2)
        changes["size"] = (sides[0], sides[-1])
        changes["resize"] = max(sides)
    if resize is not None:
        changes["resize"] = resize
    return ModelSpec(
        name=spec,
        weights=weights,
        input_shape=shape,
        embeddings=bool(embeddings),
        preprocessing=changes,
    )


def models(
    seed: o.UnusedNumber = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.UnusedFolder = None,
    no_cache: o.UnusedFlag = False,
    device: o.UnusedDevice = None,
) -> None:
    """List the models that can be named."""
    notes: list[str] = []
    with working(computes=False, no_cache=True, quiet=quiet):
        found = ["digits", *_torchvision(notes), *_timm(notes)]
    if json:
        print_json(found)
    else:
        print_text("\n".join([*found, "path/to/file.py:factory"]))
    for note in notes:
        say(note, quiet=quiet)


def _torchvision(notes: list[str]) -> list[str]:
    from proxyq.model.torch_import import import_torchvision

    try:
        shelf = import_torchvision().models
    except ProxyqError as error:
        notes.append(f"no torchvision models: {error}")
        return []
    return [
        f"torchvision:{name}"
        for name in shelf.list_models(module=shelf)
        if not name.startswith("quantized_")
    ]


def _timm(notes: list[str]) -> list[str]:
    try:
        import timm
    except ImportError:
        notes.append("no timm models: run `pip install 'proxyq[timm]'`.")
        return []
    return [f"timm:{name}" for name in timm.list_models()]
