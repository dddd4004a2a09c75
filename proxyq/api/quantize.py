"""`quantize_model`: a plan applied to a model; `pack`: the same, from data to a packed file."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.api.inputs import as_data, as_eval_data, as_model, inputs_of, labelled_batches
from proxyq.api.method import DEFAULT_SAMPLES
from proxyq.devices import several
from proxyq.engine import Edit, Engine
from proxyq.engine.memory import less
from proxyq.engine.ranges import ActivationGrids, ActivationRange, activation_grids
from proxyq.engine.rounded import sized_layers
from proxyq.engine.statistics import correct_statistics, fitted_bytes, float_moments
from proxyq.errors import ProxyqError, UsageError, near
from proxyq.files import check_folder, digest_json, write_together
from proxyq.model.model import Model, logits_of
from proxyq.model.network import LAYERS_AT, network, with_embeddings
from proxyq.progress import Progress, silent
from proxyq.proxies import Cache
from proxyq.ptq.correct import correct
from proxyq.ptq.measure import right
from proxyq.ptq.packed import PackedSize, packed_bytes
from proxyq.ptq.quantized import QuantizedModel, integer_weights, with_grids, with_weights
from proxyq.ptq.reconstruct import Learning, Level, learning_facts, reconstruct
from proxyq.quantize import Rounding
from proxyq.quantize.integers import Integers
from proxyq.search.allocate.plan import Plan
from proxyq.widths import written

RECONSTRUCTIONS: dict[str, Level | None] = {
    "none": None,
    "bias": None,
    "adaround": "layer",
    "block": "block",
}
"""What `reconstruct` may be, and at which level rounding is learned."""


def quantize_model(
    model: Model,
    plan: Plan,
    inputs: Any = None,
    *,
    correction: str | None = None,
    reconstruction: str = "none",
    learning: Learning | None = None,
    activation_range: ActivationRange = "mse",
    seed: int = 0,
    memory: int | None = None,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> QuantizedModel:
    """The model with a plan applied: weights rounded, statistics corrected, inputs rounded.

    **Arguments:**

    - `inputs`: prepared calibration images `[images, …]`.
    - `correction`: of layer statistics; the plan's own unless given.
    - `reconstruction`: how weights are rounded. `none` takes the nearest code; `bias` does too and
      corrects each channel's mean alone; `adaround` and `block` learn the rounding, layer by
      layer or block by block, with gains and shifts of the channels, which takes the place of a
      correction unless one is asked for.
    - `learning`: the settings of these two, refused beside the others; `seed`: of the order of
      their batches.
    - `memory`: bound on the activations held at once; learning holds those between two layers or
      blocks of all images, and where there is no room for them is refused.
    - `activation_range`: how inputs of layers get their ranges, where the plan rounds them.
    - `cache`: keeps how far the learning is.

    **Raises** `ProxyqError` when the plan is for another model, `UsageError` when images are
    missing for what is asked.
    """
    if reconstruction not in RECONSTRUCTIONS:
        raise UsageError(
            f"`reconstruction` must be one of {', '.join(RECONSTRUCTIONS)}, got {reconstruction!r}."
        )
    level = RECONSTRUCTIONS[reconstruction]
    if learning is not None and level is None:
        learned = " or ".join(repr(name) for name, at in RECONSTRUCTIONS.items() if at is not None)
        raise UsageError(
            f"`learning` (--steps) must go with a reconstruction that learns, {learned}, got "
            f"{reconstruction!r}: name one (--reconstruct), or leave it out."
        )
    widths = {name: b for name, b in plan.widths().items() if b is not None}
    activations = {
        name: layer.activation_bits
        for name, layer in plan.layers.items()
        if layer.activation_bits is not None
    }
    products = {name: own.bits for name, own in plan.attention.items() if own.bits is not None}
    model = fitting_model(model, plan)
    wanted = correction or str(plan.method.get("correction", "none"))
    if reconstruction != "none":
        if inputs is None:
            raise UsageError(
                f"reconstruction={reconstruction!r} needs calibration images: give `data` (--data)."
            )
        if reconstruction == "bias" and correction not in (None, "none"):
            raise UsageError(
                f"reconstruction='bias' corrects means alone: leave correction={correction!r} out."
            )
        wanted = correction or "none"
    images = LAYERS_AT if inputs is None else len(jax.tree.leaves(inputs)[0])
    left = memory
    if wanted in ("auto", "statistics") or reconstruction == "bias":
        what = f"correcting statistics on {images} images"
        left = less(memory, fitted_bytes(model, images), what)
    engine = Engine.build(model, images, memory=left)
    integers = integer_weights(engine, widths, rounding_of(plan))
    grids = ActivationGrids()
    if activations or products:
        if inputs is None:
            raise UsageError("activation ranges need calibration images: give `data` (--data).")
        grids = activation_grids(engine, activations, products, inputs, method=activation_range)
    offsets: dict[int, np.ndarray | None] = {}
    if level is not None:
        learning = learning or Learning()
        own = Engine.build(model, images, batch_size=min(learning.batch_size, images))
        kept = cache or Cache()
        facts = kept.facts(
            model,
            inputs=inputs,
            labels=None,
            rounding=rounding_of(plan),
            level=level,
            learning=learning_facts(learning),
            seed=seed,
            bits=dict(zip(widths, written(widths.values()), strict=True)),
            activations=activations,
            range=activation_range,
            **({"attention": products} if products else {}),
        )
        checkpoint = kept.checkpoint(digest_json(facts))
        learned = reconstruct(
            own,
            integers,
            inputs,
            level=level,
            grids=grids,
            learning=learning,
            key=jax.random.key(seed),
            memory=memory,
            checkpoint=checkpoint,
            progress=progress,
        )
        integers = {index: found.integers for index, found in learned.items()}
        offsets = {index: found.offset for index, found in learned.items()}
    edits = with_weights(engine, integers)
    edits = {i: e._replace(offset=_or_none(offsets.get(i))) for i, e in edits.items()}
    edits = with_grids(engine.network, edits, grids)
    if reconstruction == "bias":
        moments, _ = float_moments(engine, inputs, progress=progress)
        edits, used, notes = (
            correct_statistics(engine, edits, inputs, moments, means_alone=True, progress=progress),
            "none",
            {},
        )
    else:
        edits, used, notes = correct(engine, edits, inputs, wanted, progress=progress)  # type: ignore[arg-type]
        if used != "none":
            integers = {i: _taken(engine, i, own, edits[i]) for i, own in integers.items()}
            edits = with_weights(engine, integers, edits)
    if level is not None:
        checkpoint.clear()
    return QuantizedModel(
        model=model,
        bits={name: int(b) for name, b in widths.items()},
        edits=edits,
        integers=integers,
        activation_bits=activations,
        attention_bits=products,
        correction=used,
        reconstruction="nearest" if reconstruction == "none" else reconstruction,
        notes=notes,
        plan=plan,
    )


def _or_none(offset: np.ndarray | None) -> Any:
    return None if offset is None else jnp.asarray(offset)


def _taken(engine: Engine, index: int, own: Integers, edit: Edit) -> Integers:
    """The same codes, on the grid that the correction has moved them to."""
    return own.taking(np.asarray(engine.network.sites[index].columns(edit.weight)))


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What `pack` made: the network, its packed `file`, and the file's `size` in bytes.

    `plan_bytes` is what the plan promised for the weights that it rounds. `accuracy` is there
    where labelled images were given: `top1` and `float` in percent, on `n` images.
    """

    model: QuantizedModel
    file: Path
    size: PackedSize
    plan_bytes: int
    accuracy: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The object that `quantize --json` prints."""
        return {
            "file": str(self.file),
            "size": {**asdict(self.size), "total": self.size.total},
            "plan_bytes": self.plan_bytes,
            "reconstruction": self.model.reconstruction,
            "correction": self.model.correction,
            "accuracy": None if self.accuracy is None else dict(self.accuracy),
        }


def pack(
    model: Any,
    plan: Plan,
    data: Any = None,
    *,
    out: str | os.PathLike[str],
    correction: str | None = None,
    reconstruction: str = "none",
    learning: Learning | None = None,
    activation_range: ActivationRange = "mse",
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    memory: int | None = None,
    cache_dir: str | os.PathLike[str] | Cache | None = None,
    eval_data: Any = None,
    progress: Progress = silent,
) -> Packed:
    """Apply a plan for good: a packed network, `packed.safetensors`, and its plan in a folder.

    `data` are unlabelled calibration images, `samples` of them; with `eval_data`, labelled
    images, its accuracy is measured too. All else as for `quantize_model`.

    **Raises** as `quantize_model`, and `ProxyqError` when the folder cannot be written.
    """
    check_folder(out)
    model = as_model(model)
    measured_on = None if eval_data is None else as_eval_data(eval_data, model)
    calibration = as_data(data, model)
    inputs = None if calibration is None else inputs_of(calibration, model, samples, None)
    made = quantize_model(
        model,
        plan,
        inputs,
        correction=correction,
        reconstruction=reconstruction,
        learning=learning,
        activation_range=activation_range,
        seed=seed,
        memory=memory,
        cache=Cache.of(cache_dir),
        progress=progress,
    )
    folder = Path(out)
    facts: dict[str, Any] = {"seed": seed, "activation_range": activation_range}
    if calibration is not None:
        facts["data"] = calibration.identity
        facts["samples"] = len(jax.tree.leaves(inputs)[0])
    if RECONSTRUCTIONS[reconstruction] is not None:
        facts["learning"] = learning_facts(learning or Learning())
    if (devices := several()) is not None:
        facts["devices"] = devices
    content, size = packed_bytes(made, facts)
    files = {folder / "packed.safetensors": content, folder / "plan.json": plan.to_json()}
    write_together(files, folder=folder)
    quantized = (layer for layer in plan.layers.values() if layer.weight_bits is not None)
    return Packed(
        model=made,
        file=folder / "packed.safetensors",
        size=size,
        plan_bytes=-(-sum(own.size_bits for own in quantized) // 8),
        accuracy=None if measured_on is None else _accuracy(made, measured_on, memory),
    )


def _accuracy(made: QuantizedModel, data: Any, memory: int | None) -> dict[str, float]:
    """Top-1 of the quantized network and the float one, in one pass."""
    engine = Engine.build(made.model, len(data), memory=memory)
    hits = np.zeros(2, int)
    for batch, labels in labelled_batches(data, made.model, engine.batch_size):
        start = engine.start(jax.tree.map(jnp.asarray, batch))
        for place, edits in enumerate((made.edits, {})):
            logits = np.asarray(logits_of(engine.resume(start, 0, edits)))[: len(labels)]
            hits[place] += int(right(logits, labels).sum())
    top1, exact = (round(100.0 * int(own) / len(data), 4) for own in hits)
    return {"top1": top1, "float": exact, "n": len(data)}


def rounding_of(plan: Plan) -> Rounding:
    """The rounding that the plan was searched for."""
    record = plan.method.get("rounding") or {}
    known = {field.name for field in fields(Rounding)}
    if not isinstance(record, dict) or set(record) - known:
        raise ProxyqError(
            f"the plan's field 'method.rounding' may hold {', '.join(sorted(known))}, got "
            f"{record!r}."
        )
    try:
        return Rounding(**record)
    except UsageError as error:
        raise ProxyqError(f"the plan has a bad field 'method.rounding': {error}") from None


def fitting_model(model: Model, plan: Plan) -> Model:
    """The model as the plan knows it: with embeddings among its layers, or without.

    The plan's record of its model tells; a plan without one is told by its layers' names.

    **Raises** `ProxyqError` for a plan of another model.
    """
    embeddings = bool(plan.model.get("embeddings"))
    if "digest" not in plan.model and not embeddings:
        embeddings = model.embeddings
        names = set(plan.layers)
        if names != set(network(model, LAYERS_AT).names):
            other = with_embeddings(model, not embeddings)
            embeddings ^= names == set(network(other, LAYERS_AT).names)
    model = with_embeddings(model, embeddings)
    check_plan_fits(model, plan)
    return model


def check_plan_fits(model: Model, plan: Plan) -> None:
    """Refuse a plan whose layers, or products of two activations, are not the model's, or whose
    layers have groups that these cannot have."""
    traced = network(model, LAYERS_AT)
    products = [product.name for product in traced.attention]
    for name in plan.attention:
        if name not in products:
            raise ProxyqError(
                f"the plan is for another model: it names the product {name!r}, which "
                f"{model.name!r} does not have; "
                + (near(name, products) if products else "that has none of two activations.")
            )
    sizes = {layer.group_size: None for layer in plan.layers.values() if layer.group_size}
    layers = sized_layers(traced, held=[size for size in sizes if size])
    found = {layer.name: layer for layer in layers}
    for name, layer in plan.layers.items():
        if name not in found:
            raise ProxyqError(
                f"the plan is for another model: it names the layer {name!r}, which "
                f"{model.name!r} does not have; {near(name, list(found))}"
            )
        if found[name].weights != layer.weights:
            raise ProxyqError(
                f"the plan is for another model: its layer {name!r} has {layer.weights:,} "
                f"weights, and that of {model.name!r} has {found[name].weights:,}."
            )
        size = layer.group_size
        if size is not None and layer.scale_bits != found[name].group_scale_bits.get(size):
            scales = found[name].group_scale_bits.get(size)
            why = f"take {scales:,} bits" if scales else "cannot be there"
            raise ProxyqError(
                f"the plan's layer {name!r} has groups of {size} weights whose scales take "
                f"{layer.scale_bits:,} bits, and in {model.name!r} they {why}: search again."
            )
    missing = [name for name in found if name not in plan.layers]
    if missing:
        raise ProxyqError(
            f"the plan is for another model: it says nothing of the layer {missing[0]!r} of "
            f"{model.name!r}."
        )
