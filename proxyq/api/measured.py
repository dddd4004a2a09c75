"""Measured tables from their files, and the networks that they are of."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from proxyq.api.inputs import as_model
from proxyq.api.model_spec import ModelSpec
from proxyq.errors import UsageError
from proxyq.model.model import Model
from proxyq.model.network import with_embeddings
from proxyq.search.table_file import MeasuredTable
from proxyq.shelf import shelf

Table = MeasuredTable | str | os.PathLike[str]
LIBRARIES = ("torchvision:", "timm:")
"""Whose networks a table may name: nothing but their own code is run."""


def load_table(table: Table) -> MeasuredTable:
    """A table, from its file or by its name on the shelf."""
    if isinstance(table, MeasuredTable):
        return table
    if isinstance(table, str) and table == "digits":
        return MeasuredTable.load(shelf("search/tables") / "digits.json")
    return MeasuredTable.load(table)


def networks_of(
    tables: Sequence[MeasuredTable],
    *,
    models: Sequence[Any] | None,
    weights: str | Sequence[str] | None,
    loading: ModelSpec,
    code: Sequence[str],
) -> list[Model]:
    """The networks of tables, checked against them.

    Without `models` each is loaded by the name in its table and fed as it was measured, but for
    what `loading` says. Networks that are not of `LIBRARIES` are loaded only from a file that
    `code` names, by calling a function of it: a table is data, and does not decide whose code is
    run.

    **Raises** `UsageError` when one cannot be loaded, or is another than its table's.
    """
    if models is None:
        weights = weights if weights is None or isinstance(weights, str) else list(weights)
        files = for_each(weights, tables, "weights")
        models = [
            _spec(table, file, loading, code) for table, file in zip(tables, files, strict=True)
        ]
    elif weights is not None or code:
        raise UsageError(
            "`weights` and `code` go with names: leave them out where `models` are given."
        )
    if isinstance(models, (Model, ModelSpec, str)):
        models = [models]
    if len(models) != len(tables):
        raise UsageError(
            f"`models` must have one network for each of {len(tables)} tables, got {len(models)}."
        )
    found: list[Model] = []
    loaded: list[tuple[ModelSpec, Model]] = []
    for table, given in zip(tables, models, strict=True):
        model = next((one for spec, one in loaded if spec == given), None) or as_model(given)
        if isinstance(given, ModelSpec):
            loaded.append((given, model))
        digest = table.model.get("digest")
        if model.digest() != digest:
            raise UsageError(
                f"the table of {table.name!r} is of another network than {model.name!r}: its "
                f"weights have the digest {str(digest)[:12]}, those loaded "
                f"{model.digest()[:12]}; give its own (--weights)."
            )
        # Its layers are the table's, whatever was typed.
        found.append(with_embeddings(model, bool(table.model.get("embeddings"))))
    return found


def _spec(
    table: MeasuredTable, weights: str | None, loading: ModelSpec, code: Sequence[str]
) -> ModelSpec:
    name = table.model.get("spec")
    if not isinstance(name, str):
        raise UsageError(
            f"the table of {table.name!r} does not say how its network is loaded: give `models`."
        )
    if weights is not None:
        weights = weights.replace("{}", name.rpartition(":")[2])
    if name == "digits":  # the embedded network brings its weights along
        weights = None
    # As it was fed when it was measured, but for what is given.
    images = {} if table.images is None else table.images.model_dump()
    shape = images.pop("shape", None)
    return replace(
        loading,
        name=_trusted(table, name, code),
        weights=weights,
        input_shape=loading.input_shape or (None if shape is None else tuple(shape)),
        preprocessing={**images, **loading.preprocessing},
    )


def _trusted(table: MeasuredTable, name: str, code: Sequence[str]) -> str:
    """The name of a network of a library, or of a Python file that the user gave."""
    if name == "digits" or name.startswith(LIBRARIES):
        return name
    file, _, factory = name.rpartition(":")
    for given in code:
        if factory.isidentifier() and PurePath(given).name == PurePath(file).name:
            return f"{given}:{factory}"
    raise UsageError(
        f"the table of {table.name!r} is of the network {name!r}, whose Python code is run to load "
        "it: name the file if you trust it (--code FILE.py)."
    )


def for_each(given: Any, tables: Sequence[MeasuredTable], name: str) -> list[Any]:
    """One value for each table, from one for all or as many as there are."""
    if not isinstance(given, list):
        return [given] * len(tables)
    if len(given) == 1:
        return given * len(tables)
    if len(given) != len(tables):
        raise UsageError(
            f"`{name}` (--{name}) must be given once, or once for each of the {len(tables)} "
            f"tables and holdouts in their order, got {len(given)}."
        )
    return given
