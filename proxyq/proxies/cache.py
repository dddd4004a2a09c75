"""Scores that were computed before, kept on disk.

One safetensors file for each answer, named after the SHA-256 of all that it depends on: the
proxy with its options and the source of its function, bit-widths, rounding, seed, the model's
weights and graph, images and labels, the sources of the stages that compute, and versions.
Nothing is ever unpickled; what cannot be read is computed anew.
"""

import functools
import hashlib
import inspect
import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from proxyq.checkpoint import Checkpoint, tell_unwritable
from proxyq.devices import cores, current
from proxyq.engine.segments import text_key
from proxyq.errors import ProxyqError
from proxyq.files import digest_arrays, digest_json, write_atomic
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT, network
from proxyq.provenance import provenance
from proxyq.proxies.proxy import Proxy, Scores
from proxyq.quantize import Rounding
from proxyq.widths import read, written

SCHEMA = "proxyq/cached-scores/2"
_STAGES = ("psd.py", "widths.py", "model", "quantize", "engine", "proxies", "ptq")
_PRECISION = ("jax_enable_x64", "jax_default_matmul_precision")


class Cache:
    """Finished scores and checkpoints under one folder; without a folder it keeps nothing."""

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, every: float = 10.0):
        self.folder = None if folder is None else Path(folder)
        self.every = every

    @classmethod
    def of(cls, given: "str | os.PathLike[str] | Cache | None") -> "Cache":
        """A cache as callers give it: one that is there, its folder, or none."""
        return given if isinstance(given, Cache) else cls(given)

    def facts(
        self, model: Model, *, inputs: Any, labels: Any, rounding: Rounding, **settings: Any
    ) -> dict[str, Any]:
        """What all scores of one run depend on, as plain JSON; empty without a folder."""
        if self.folder is None:
            return {}
        leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(inputs))}
        if labels is not None:
            leaves["labels"] = np.asarray(labels)
        return {
            "schema": SCHEMA,
            "model": model.digest(),
            "parameters": list(model.params),
            "frozen": sorted(model.frozen),
            **({"embeddings": True} if model.embeddings else {}),
            "graph": graph_digest(model),
            "batch_graph": None
            if model.batch_statistics_apply is None
            else graph_digest(model, "batch"),
            "precision": [getattr(jax.config, name) for name in _PRECISION],
            "images": digest_arrays(leaves),
            "rounding": asdict(rounding),
            "code": code_digest(),
            "versions": provenance()["versions"],
            "device": jax.devices()[0].device_kind,
            "cores": len(cores()),  # sums are split over threads
            **settings,
        }

    def key(self, facts: Mapping[str, Any], proxy: Proxy, options: Mapping[str, Any]) -> str:
        """The name under which a proxy's scores are kept."""
        if self.folder is None:
            return ""
        own = {"proxy": proxy.name, "cost": proxy.cost, "options": proxy.check_options(options)}
        return digest_json({**facts, **own, "kernel": _source_digest(proxy.kernel)})

    def group_key(self, facts: Mapping[str, Any]) -> str:
        """The name of the checkpoint of taps that several proxies share."""
        return "" if self.folder is None else digest_json(facts)

    def checkpoint(self, key: str, *, batches: bool = True) -> Checkpoint:
        """Where an unfinished computation keeps how far it is.

        One that counts `batches` goes on with as many devices as it began with: a batch has other
        images on another number of them. What is finished is the same whatever they were.
        """
        if self.folder is None:
            return Checkpoint()
        split = current().label if batches else ""
        name = f"{key}-{split}" if split else key
        return Checkpoint(self.folder / "unfinished" / name, every=self.every, root=self.folder)

    def load(self, key: str, model: Model) -> Scores | None:
        """Scores that were kept, or `None`."""
        if self.folder is None:
            return None
        try:
            with safe_open(self._file(key), framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # A disk that lost a page would give wrong numbers, and nobody would know.
            if metadata["digest"] != digest_json([metadata["record"], digest_arrays(arrays)]):
                return None
            record = json.loads(metadata["record"])
            if record.pop("schema") != SCHEMA:
                return None
            layers = network(model, LAYERS_AT).layers
            return Scores(
                layers=layers,
                values=arrays["values"],
                activations=arrays.get("activations"),
                coupling=arrays.get("coupling"),
                bits=read(record.pop("bits")),
                activation_bits=tuple(record.pop("activation_bits")),
                **record,
            )
        except Exception:  # the reader of a damaged file raises many kinds
            return None

    def save(self, key: str, scores: Scores) -> None:
        """Keep scores; a cache that cannot be written is no reason to fail: it is logged, once."""
        if self.folder is None:
            return
        record = {
            "schema": SCHEMA,
            "proxy": scores.proxy,
            "bits": written(scores.bits),
            "activation_bits": list(scores.activation_bits),
            "cost": scores.cost,
            "options": dict(scores.options),
            "notes": dict(scores.notes),
            "seconds": scores.seconds,
        }
        arrays = {"values": np.asarray(scores.values, order="C")}
        for name in ("activations", "coupling"):
            if (own := getattr(scores, name)) is not None:
                arrays[name] = np.asarray(own, order="C")
        try:
            self._file(key).parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(record)
            digest = digest_json([text, digest_arrays(arrays)])
            write_atomic(self._file(key), save(arrays, {"record": text, "digest": digest}))
        except (OSError, ProxyqError) as error:
            tell_unwritable(self.folder, error)

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"


def graph_digest(model: Model, batch_norm: str = "running") -> str:
    """SHA-256 of a model's traced equations, whatever its weights."""
    graph = network(model, LAYERS_AT, batch_norm=batch_norm).graph
    known = [*graph.params.values(), *graph.constants]
    prelude = text_key(graph.prelude, known, graph.frontier)
    main = text_key(graph.main, [*graph.frontier, *graph.inputs], graph.outputs)
    constants = {str(i): np.asarray(value) for i, value in enumerate(graph.constants.values())}
    # Functions inside of equations have no text but where they lie in memory.
    plain = re.sub(r"function#\d+|0x[0-9a-f]+", "", prelude + "\n" + main)
    return digest_json([plain, digest_arrays(constants)])


@functools.cache
def code_digest() -> str:
    """SHA-256 of the sources of the stages that scores come from."""
    package = Path(__file__).resolve().parents[1]
    hasher = hashlib.sha256()
    for stage in _STAGES:
        place = package / stage
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            hasher.update(file.relative_to(package).as_posix().encode() + b"\0")
            hasher.update(file.read_bytes())
    return hasher.hexdigest()


def _source_digest(function: Any) -> str:
    """SHA-256 of the file that a kernel is written in, and of plain values that it closes over.

    What has no source, or closes over more than that, is like nothing else: a digest that never
    comes again, for no answer may stand for another.
    """
    cells = getattr(function, "__closure__", None) or ()
    held = [getattr(cell, "cell_contents", None) for cell in cells]
    try:
        source = Path(inspect.getsourcefile(function) or "").read_bytes()
    except (OSError, TypeError):
        return uuid.uuid4().hex
    if not all(isinstance(value, (int, float, str, bool, type(None))) for value in held):
        return uuid.uuid4().hex
    return digest_json([hashlib.sha256(source).hexdigest(), function.__qualname__, held])
