"""What the sources of models share: the input shape, preprocessing, seeds."""

from collections.abc import Callable
from typing import Any

from proxyq.errors import UsageError
from proxyq.model.model import Model, Preprocessing


def check_shape(model: Model, input_shape: tuple[int, ...] | None) -> None:
    """A finished model has its input shape; another one cannot be asked for."""
    if input_shape is not None and input_shape != model.input_shape:
        raise UsageError(
            f"`input_shape` is {input_shape}, but {model.name} takes {model.input_shape}: leave "
            "it out."
        )


def choose_shape(asked: tuple[int, ...] | None, prescribed: Any, source: str) -> tuple[int, ...]:
    """The shape that was asked for, else the prescribed one."""
    if asked is not None:
        return asked
    if prescribed is None:
        raise UsageError(
            f"the input shape of {source} is unknown: give `--input-shape`, such as 3,224,224, "
            "or set an attribute `input_shape` on the module."
        )
    return tuple(int(size) for size in prescribed)


def fit_preprocessing(preprocessing: Preprocessing, shape: tuple[int, ...]) -> Preprocessing:
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


def seeded(build: Callable[[], Any]) -> Any:
    """`build()` with torch's generator at seed 0, and as it was afterwards."""
    from proxyq.model.torch_import import import_torch

    torch = import_torch()
    # fork_rng would also visit GPUs; the generator of the CPU is the one that initialises.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build()
