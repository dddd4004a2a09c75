"""What people have becomes a `Model`, and images in the form that the model reads."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from proxyq.api.model_spec import ModelSpec
from proxyq.data import (
    Data,
    check_fits,
    check_labels,
    image_shape,
    load_data,
    model_batches,
    model_inputs,
    sample,
)
from proxyq.data.npz import channels_last
from proxyq.data.prepared import Prepared, load_prepared, prepared
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.load import load_model
from proxyq.model.model import Model, logits_of


def as_model(model: Any = None) -> Model:
    """A `Model` from what people have: a `Model` or `ModelSpec`, a specification such as
    `torchvision:resnet18`, or `None` for the embedded network.

    **Raises** `UsageError` for anything else, telling how to import a module.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, ModelSpec):
        loaded = model.load()
        loaded.check_finite()
        return loaded
    if model is None or isinstance(model, str):
        loaded = load_model(model)
        loaded.check_finite()
        return loaded
    raise UsageError(
        f"`model` must be a proxyq.Model or a specification in text, got {type(model).__name__}: "
        "bring a module in with proxyq.from_torch, from_nnx, from_linen or from_function."
    )


def as_data(data: Any, model: Model, *, split: str = "calibration") -> Data | Prepared | None:
    """Images, from a `Data`, a specification such as `images.npz`, or arrays.

    Arrays are `images` or `(images, labels)`, in either layout; for a model that reads no
    images they are its inputs as they are. `None` gives the embedded network its own images,
    and nothing to any other. `split` picks the part of a source that has several.
    """
    if data is None:
        return load_data("digits", split=split) if model.name == "digits" else None  # type: ignore[arg-type]
    if isinstance(data, (Data, Prepared)):
        return data
    if isinstance(data, str):
        if model.image_layout is None:
            return load_prepared(data, model)
        return load_data(data, split=split, shape=image_shape(model))  # type: ignore[arg-type]
    values, labels = data if isinstance(data, tuple) and len(data) == 2 else (data, None)
    labels = None if labels is None else np.asarray(labels)
    if model.image_layout is None:
        return prepared(values, labels, model)
    images = np.asarray(values)
    # The model's own layout decides only where the shape leaves it open.
    first, last = (images.shape[axis] in (1, 3, 4) for axis in (1, -1))
    layout = model.image_layout if images.ndim == 4 and first == last else None
    return Data(name="arrays", images=channels_last(images, layout, "arrays"), labels=labels)


def inputs_of(data: Data | Prepared, model: Model, samples: int, seed: int | None) -> Any:
    """Calibration inputs as the model reads them: the first `samples`, or a seeded draw."""
    return calibration_of(data, model, samples, seed)[0]


def calibration_of(
    data: Data | Prepared, model: Model, samples: int, seed: int | None
) -> tuple[Any, np.ndarray | None]:
    """`inputs_of`, with the labels of the same images where there are any."""
    if isinstance(data, Data):
        chosen = sample(data, samples, seed)
        return model_inputs(model, chosen), chosen.labels
    order = np.arange(len(data))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    chosen = data.subset(order[:samples])
    return chosen.inputs, chosen.labels


def as_eval_data(eval_data: Any, model: Model) -> Data | Prepared:
    """Labelled images to report accuracy on; the embedded network brings its own."""
    data = as_data(eval_data, model, split="test")
    if data is None:
        raise UsageError("accuracy needs labelled images: give `eval_data` (--eval-data).")
    if data.labels is None:
        raise UsageError(f"accuracy needs labels, and the data {data.name!r} has none.")
    if isinstance(data, Data):
        check_fits(data, model)
    logits = logits_of(jax.eval_shape(model.apply, model.params, model.example(1)))
    if len(logits.shape) != 2 or np.ndim(data.labels) != 1:
        raise ProxyqError(
            f"accuracy is measured for one label an image and outputs [images, classes], but "
            f"{model.name!r} gives {logits.shape} for one image."
        )
    if isinstance(data, Data):
        check_labels(data, logits.shape[-1])
    return data


def labelled_batches(
    data: Data | Prepared, model: Model, batch_size: int
) -> Iterator[tuple[Any, np.ndarray]]:
    """Inputs in batches of one size (the last is filled up), and the labels of the real ones."""
    if isinstance(data, Data):
        for batch in model_batches(model, data, batch_size):
            assert batch.labels is not None  # as_eval_data made sure
            yield batch.inputs, batch.labels[: batch.size]
        return
    assert data.labels is not None
    for start in range(0, len(data), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(data) - 1)
        yield data.subset(rows).inputs, data.labels[start : start + batch_size]
