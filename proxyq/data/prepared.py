"""Inputs of networks that read no images: tokens, sequences, several arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from proxyq.data.archive import Header, read_arrays
from proxyq.errors import MissingExtra, ProxyqError, UsageError, first_line, near
from proxyq.files import digest_arrays, read_bytes
from proxyq.model.model import Model

RANDOM_INPUTS = 256
LABELS = ("labels", "label", "y")
"""Names that labels may have in an archive."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Inputs of a model that reads no images: arrays with the examples first, as it takes them.

    Nothing is resized or normalised.
    """

    inputs: Any
    labels: np.ndarray | None = None
    name: str = "arrays"

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.inputs)[0])

    @property
    def identity(self) -> dict[str, Any]:
        """For provenance: name, number of examples and digest."""
        leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(self.inputs))}
        return {"name": self.name, "images": len(self), "digest": digest_arrays(leaves)}

    def subset(self, rows: Any) -> "Prepared":
        """Some of the examples, as `Data.subset` takes them."""
        return Prepared(
            inputs=jax.tree.map(lambda leaf: leaf[rows], self.inputs),
            labels=None if self.labels is None else self.labels[rows],
            name=self.name,
        )


def prepared(
    values: Any, labels: np.ndarray | None, model: Model, *, name: str = "arrays"
) -> Prepared:
    """Arrays as a model takes them, checked.

    **Raises** `UsageError` where structure, shapes, kinds or lengths differ from the model's.
    """
    inputs = jax.tree.map(np.asarray, values)
    if jax.tree.structure(inputs) != jax.tree.structure(model.inputs):
        raise UsageError(
            f"the inputs of {model.name!r} must be {_told(model.inputs)}, got {_told(inputs)}."
        )
    given = [leaf.shape[1:] for leaf in jax.tree.leaves(inputs)]
    wanted = [tuple(leaf.shape) for leaf in jax.tree.leaves(model.inputs)]
    if given != wanted:
        raise UsageError(
            f"the inputs of {model.name!r} must have the shape {wanted} for each example, got "
            f"{given}."
        )
    inputs = jax.tree.map(lambda x, like: _as_kind(x, like.dtype, name), inputs, model.inputs)
    lengths = {len(leaf) for leaf in jax.tree.leaves(inputs)}
    if labels is not None:
        lengths.add(len(labels))
    if len(lengths) != 1 or 0 in lengths:
        raise UsageError(f"inputs and labels must be equally many, got {sorted(lengths)}.")
    return Prepared(inputs=inputs, labels=labels, name=name)


def load_prepared(
    spec: str, model: Model, *, samples: int | None = None, seed: int = 0
) -> Prepared:
    """Inputs that `spec` names, for a model that reads no images.

    - `FILE.npz`: arrays under the names of the model's inputs (`input_ids`, `attention_mask`);
      for one or several unnamed inputs `arr_0`, `arr_1`, …, as `numpy.savez(file, a, b)` calls
      them. Labels, where there are any, are called `labels`.
    - `text:FILE`: a text a line, UTF-8, cut and padded to the model's length by its tokenizer.
    - `random`: normal numbers; tokens uniform over the vocabulary; `samples` of them, by `seed`.

    **Raises** `UsageError` or `ProxyqError`, one sentence each.
    """
    if spec == "random":
        return _random(model, samples or RANDOM_INPUTS, seed)
    if spec.startswith("text:"):
        return _text(Path(spec.removeprefix("text:")).expanduser(), spec, model)
    if spec.endswith(".npz"):
        return _archive(Path(spec).expanduser(), spec, model)
    raise UsageError(
        f"the network {model.name!r} takes {_told(model.inputs)}, which are no images, so its data "
        f"must be FILE.npz, text:FILE or random, got {spec!r}."
    )


def _told(inputs: Any) -> str:
    """What inputs a model takes, in words."""
    if isinstance(inputs, Mapping):
        return "the inputs " + ", ".join(f"{k} {tuple(np.shape(v))}" for k, v in inputs.items())
    leaves = jax.tree.leaves(inputs)
    shapes = ", ".join(str(tuple(np.shape(leaf))) for leaf in leaves)
    return f"{len(leaves)} input{'s' if len(leaves) > 1 else ''} of shape {shapes}"


def _as_kind(array: np.ndarray, wanted: Any, name: str) -> np.ndarray:
    """The array in the model's type, where nothing is lost."""
    if array.dtype == wanted:
        return array
    floats = np.issubdtype(wanted, np.floating)
    if array.dtype.kind not in ("biuf" if floats else "biu"):
        raise UsageError(f"the arrays of {name!r} must be {np.dtype(wanted)}, got {array.dtype}.")
    return array.astype(wanted)


def _archive(path: Path, spec: str, model: Model) -> Prepared:
    structure = jax.tree.structure(model.inputs)
    if isinstance(model.inputs, Mapping):
        names = list(model.inputs)
    else:
        names = [f"arr_{i}" for i in range(structure.num_leaves)]

    def choose(headers: Mapping[str, Header]) -> list[str]:
        label = [key for key in LABELS if key in headers][:1]
        others = [key for key in headers if key not in label]
        # One array is the one input, whatever it is called.
        if len(names) == len(others) == 1 and not isinstance(model.inputs, Mapping):
            names[:] = others
        for name in names:
            if name not in others:
                there = near(name, others)
                raise UsageError(f"{str(path)!r} holds no {name!r} for {model.name!r}: {there}")
        return [*names, *label]

    arrays = read_arrays(path, choose)
    values: Any = {name: arrays.pop(name) for name in names}
    if not isinstance(model.inputs, Mapping):
        values = jax.tree.unflatten(structure, list(values.values()))
    return prepared(values, next(iter(arrays.values()), None), model, name=spec)


def _text(path: Path, spec: str, model: Model) -> Prepared:
    tokenizer = model.identity.get("tokenizer")
    if tokenizer is None or not isinstance(model.inputs, Mapping):
        raise UsageError(
            f"the network {model.name!r} has no tokenizer to read {spec!r} with: name a model of "
            "transformers (hf:FOLDER), or store tokens in an .npz file."
        )
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingExtra("transformers", "hf", "Reading text") from error
    try:
        lines = read_bytes(path, "text file").decode().splitlines()
    except UnicodeDecodeError as error:
        raise ProxyqError(f"the text file {str(path)!r} is not UTF-8 ({error.reason}).") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UsageError(f"the text file {str(path)!r} holds no text.")
    try:
        read = AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:  # transformers and the hub's client raise what they like
        raise ProxyqError(
            f"the tokenizer of {tokenizer!r} could not be loaded ({first_line(error)}): store "
            "tokens in an .npz file instead."
        ) from error
    if read.pad_token is None:
        read.pad_token = read.eos_token  # masked, so any token does
    length = int(jax.tree.leaves(model.inputs)[0].shape[0])
    encoded = read(lines, padding="max_length", truncation=True, max_length=length)
    missing = [name for name in model.inputs if name not in encoded]
    if missing:
        raise UsageError(
            f"the tokenizer of {tokenizer!r} gives no {missing[0]!r}, which {model.name!r} takes: "
            "store its inputs in an .npz file."
        )
    return prepared({k: np.asarray(encoded[k]) for k in model.inputs}, None, model, name=spec)


def _random(model: Model, count: int, seed: int) -> Prepared:
    rng = np.random.default_rng(seed)
    vocabulary = model.identity.get("vocabulary")

    def draw(path: Any, leaf: Any) -> np.ndarray:
        shape = (count, *leaf.shape)
        if np.issubdtype(leaf.dtype, np.floating):
            return rng.standard_normal(shape).astype(leaf.dtype)
        if "mask" in jax.tree_util.keystr(path):
            return np.ones(shape, leaf.dtype)
        if vocabulary is None:
            raise UsageError(
                f"the tokens of {model.name!r} cannot be drawn, for its vocabulary is not known: "
                "give an .npz file."
            )
        return rng.integers(0, vocabulary, shape).astype(leaf.dtype)

    inputs = jax.tree_util.tree_map_with_path(draw, model.inputs)
    return Prepared(inputs=inputs, name="random")
