"""The library calls behind the commands: one function for each.

`search` walks the whole road (model, data, proxy, allocation, plan, accuracy); `evaluate`
measures plans; `inspect` shows what a model is made of.
"""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
from proxyq.engine import Engine
from proxyq.errors import ProxyqError, UsageError, near
from proxyq.model.features import layers_by_feature
from proxyq.model.load import load_model
from proxyq.model.model import Model, logits_of
from proxyq.model.network import Network, network
from proxyq.progress import Progress, silent
from proxyq.provenance import provenance
from proxyq.proxies import PROXIES, Proxy, Scores, as_cost
from proxyq.ptq.correct import CORRECTIONS, correct
from proxyq.ptq.measure import kl_divergence
from proxyq.ptq.quantized import QuantizedModel, input_grids, round_weights, with_input_grids
from proxyq.quantize import check_bits
from proxyq.search.allocate import SOLVERS, build_problem, solve
from proxyq.search.allocate.plan import Plan, plan_from
from proxyq.search.recipes import Recipe, load_recipe

DEFAULT_BITS = (2, 3, 4, 8)
DEFAULT_BUDGET = "size=4bit"
DEFAULT_PROXY = "output-error"
DEFAULT_SAMPLES = 256


def as_model(model: Any = None, **load_options: Any) -> Model:
    """A `Model` from what people have: a `Model`, a specification such as
    `torchvision:resnet18`, or `None` for the embedded network.

    **Raises** `UsageError` for anything else, telling how to import a module.
    """
    if isinstance(model, Model):
        return model
    if model is None or isinstance(model, str):
        loaded = load_model(model, **load_options)
        loaded.check_finite()
        return loaded
    raise UsageError(
        f"`model` must be a proxyq.Model or a specification in text, got {type(model).__name__}: "
        "bring a module in with proxyq.from_torch, from_nnx, from_linen or from_function."
    )


def as_data(data: Any, model: Model, *, split: str = "calibration") -> Data | None:
    """A `Data` from a `Data`, a specification such as `images.npz`, or arrays.

    Arrays are `images` or `(images, labels)`. `None` gives the embedded network its own
    images, and nothing to any other. `split` picks the part of a source that has several.
    """
    if data is None:
        return load_data("digits", split=split) if model.name == "digits" else None  # type: ignore[arg-type]
    if isinstance(data, Data):
        return data
    if isinstance(data, str):
        return load_data(data, split=split, shape=image_shape(model))  # type: ignore[arg-type]
    images, labels = data if isinstance(data, tuple) else (data, None)
    images = np.asarray(images)
    # The model's own layout decides only where the shape leaves it open.
    first, last = (images.shape[axis] in (1, 3, 4) for axis in (1, -1))
    layout = model.image_layout if images.ndim == 4 and first == last else None
    images = channels_last(images, layout, "arrays")
    return Data(name="arrays", images=images, labels=labels)


def inspect(model: Any = None) -> Network:
    """The model's layers: kinds, weights, MACs, output shapes, groups."""
    return network(as_model(model), 1)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a search does, from `--proxy` or `--recipe` with its options."""

    proxy: Proxy
    options: Mapping[str, Any]
    cost: str
    bits: tuple[int, ...]
    activation_bits: int | None
    correction: str
    samples: int
    solver: str
    solver_options: Mapping[str, Any]
    pins: tuple[str, ...]
    ties: tuple[str, ...]
    tie_features: bool
    recipe: str | None


def method_of(
    proxy: str | Proxy | None = None,
    recipe: str | Recipe | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    bits: Sequence[int] | None = None,
    activation_bits: int | None = None,
    correction: str | None = None,
    samples: int | None = None,
    solver: str | None = None,
    pins: Sequence[str] = (),
    ties: Sequence[str] = (),
) -> Method:
    """The method that a proxy or a recipe stands for; what is given explicitly wins.

    **Raises** `UsageError` for unknown names, both at once, or impossible values.
    """
    if proxy is not None and recipe is not None:
        raise UsageError("give a proxy or a recipe, not both: a recipe brings its proxy.")
    if correction is not None and correction not in CORRECTIONS:
        raise UsageError(
            f"`correction` must be one of {', '.join(CORRECTIONS)}, got {correction!r}."
        )
    if samples is not None and samples < 1:
        raise UsageError(f"`samples` must be at least 1, got {samples}.")
    if solver not in (None, "auto"):
        SOLVERS.get(solver)
    if activation_bits is not None:
        check_bits(activation_bits, "activation_bits")
    if bits is not None and not bits:
        raise UsageError("`bits` must name at least one bit-width, got none.")
    for width in bits or ():
        check_bits(width)
    if recipe is None:
        chosen = proxy if isinstance(proxy, Proxy) else PROXIES.get(proxy or DEFAULT_PROXY)
        return Method(
            proxy=chosen,
            options=chosen.check_options(options or {}),
            cost="auto",
            bits=tuple(sorted(set(bits or DEFAULT_BITS))),
            activation_bits=activation_bits,
            correction=correction or "auto",
            samples=samples or DEFAULT_SAMPLES,
            solver=solver or "auto",
            solver_options={},
            pins=tuple(pins),
            ties=tuple(ties),
            tie_features=False,
            recipe=None,
        )
    found = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chosen = PROXIES.get(found.proxy)
    same_solver = solver is None or solver == found.solver
    return Method(
        proxy=chosen,
        options=chosen.check_options({**found.options, **(options or {})}),
        cost=found.cost,
        bits=tuple(sorted(set(bits or found.bits))),
        activation_bits=found.activation_bits if activation_bits is None else activation_bits,
        correction=correction or found.correction,
        samples=samples or found.samples,
        solver=solver or found.solver,
        solver_options=found.solver_options() if same_solver else {},
        pins=(*found.pins, *pins),
        ties=(*found.tie_patterns, *ties),
        tie_features=found.ties_features,
        recipe=found.name,
    )


def search(
    model: Any = None,
    data: Any = None,
    *,
    proxy: str | Proxy | None = None,
    recipe: str | Recipe | None = None,
    budget: str | Sequence[str] = DEFAULT_BUDGET,
    bits: Sequence[int] | None = None,
    activation_bits: int | None = None,
    correction: str | None = None,
    samples: int | None = None,
    pins: Sequence[str] = (),
    ties: Sequence[str] = (),
    candidates: Sequence[str] = (),
    solver: str | None = None,
    time_limit: float = 60.0,
    options: Mapping[str, Any] | None = None,
    seed: int | None = None,
    memory: int | None = None,
    evaluate: bool = False,
    eval_data: Any = None,
    progress: Progress = silent,
) -> Plan:
    """A bit-width for every layer of a model, within hard budgets.

    **Arguments:**

    - `model`: a `Model`, a specification (`torchvision:resnet18`), or `None` for the embedded
      network. `data`: calibration images, as `as_data` takes them; labels are not read.
    - `proxy` or `recipe`: what measures sensitivity; `options` are the proxy's.
    - `budget`: one or several, such as `size=3bit`, `size=1.5MiB`, `bops=75G`; all hold.
    - `bits`: candidate bit-widths. `pins` (`'PATTERN=8'`), `ties` (`'PATTERN'`) and
      `candidates` (`'PATTERN=2,4'`) bind layers by shell patterns, or `re:` expressions.
    - `activation_bits`: bits of every layer's input; `None` leaves activations float.
    - `correction`: `auto`, `none`, `weights` or `statistics`, when the plan is run.
    - `samples`: how many calibration images; `seed`: draw them at random from this seed
      instead of taking the first, and seed what is random in the proxy.
    - `evaluate`, `eval_data`: run the plan quantized, and measure it beside float and uniform.

    **Returns** a `Plan`; its `predicted` part holds the scores, `measured` the accuracy.

    **Raises** `UsageError` for wrong arguments, `InfeasibleError` when no plan fits.
    """
    method = method_of(
        proxy,
        recipe,
        options=options,
        bits=bits,
        activation_bits=activation_bits,
        correction=correction,
        samples=samples,
        solver=solver,
        pins=pins,
        ties=ties,
    )
    model = as_model(model)
    found = network(model, 1)
    measured = evaluate or eval_data is not None
    needs_data = method.proxy.needs_images or (measured and _runs_on_images(method))
    calibration = as_data(data, model) if needs_data else None
    if calibration is None and needs_data:
        raise UsageError(
            f"calibration images are needed by {method.proxy.name!r} or by "
            f"correction={method.correction!r}: give `data` (--data)."
        )
    # What cannot be solved (or not by this solver) and images that do not fit are told before
    # minutes of measuring.
    layers = found.layers
    shared = layers_by_feature(found) if method.tie_features else ()
    binding = {
        "pins": method.pins,
        "ties": method.ties,
        "shared": shared,
        "candidates": candidates,
        "activation_bits": method.activation_bits,
    }
    blank = np.zeros((len(layers), len(method.bits)))
    blank_problem = build_problem(layers, blank, method.bits, budget, **binding)
    first = "greedy" if method.solver == "auto" else method.solver
    solve(blank_problem, first, time_limit=time_limit, **method.solver_options)
    labelled = as_eval_data(eval_data, model) if measured else None

    inputs = None if calibration is None else inputs_of(calibration, model, method.samples, seed)
    scores = method.proxy(
        model,
        inputs if method.proxy.needs_images else None,
        bits=method.bits,
        key=jax.random.key(seed or 0),
        memory=memory,
        progress=progress,
        **method.options,
    )
    cost = as_cost(scores, method.cost)
    for _, *others in shared:
        # What is measured once counts once.
        cost = np.where(np.isin(found.names, others)[:, None], 0.0, cost)
    problem = build_problem(layers, cost, method.bits, budget, **binding)
    answer = solve(problem, method.solver, time_limit=time_limit, **method.solver_options)
    plan = plan_from(
        answer,
        layers,
        model={"name": model.name, "digest": model.digest(), **model.identity},
        method={
            "proxy": method.proxy.name,
            "recipe": method.recipe,
            "options": dict(scores.options),
            "cost": method.cost,
            "bits": list(method.bits),
            "correction": method.correction,
            "samples": 0 if inputs is None else len(jax.tree.leaves(inputs)[0]),
        },
        activation_bits=method.activation_bits,
        provenance=provenance(
            seed=seed, data=None if calibration is None else calibration.identity
        ),
        predicted={"scores": _by_layer(scores)},
    )
    if labelled is None:
        return plan
    result = _measure(model, [plan], inputs, labelled, memory=memory, progress=progress)
    record = plan.model_dump(by_alias=True)
    return Plan.model_validate({**record, "measured": result.to_json()})


def _runs_on_images(method: Method) -> bool:
    return method.correction in ("auto", "statistics") or method.activation_bits is not None


def _by_layer(scores: Scores) -> dict[str, Any]:
    return {
        layer.name: np.asarray(v).tolist()
        for layer, v in zip(scores.layers, scores.values, strict=True)
    }


def inputs_of(data: Data, model: Model, samples: int, seed: int | None) -> np.ndarray:
    """Calibration images as the model reads them: the first `samples`, or a seeded draw."""
    chosen = sample(data, samples, seed)
    return model_inputs(model, chosen)


def as_eval_data(eval_data: Any, model: Model) -> Data:
    """Labelled images to report accuracy on; the embedded network brings its own."""
    data = as_data(eval_data, model, split="test")
    if data is None:
        raise UsageError("accuracy needs labelled images: give `eval_data` (--eval-data).")
    if data.labels is None:
        raise UsageError(f"accuracy needs labels, and the data {data.name!r} has none.")
    check_fits(data, model)
    outputs = jax.eval_shape(model.apply, model.params, model.example(1))
    check_labels(data, logits_of(outputs).shape[-1])
    return data


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Accuracy of one network: top-1 in percent, KL to the float network in nats."""

    name: str
    top1: float
    size_bits: int
    average_bits: float
    kl: float | None = None
    correction: str = "none"
    notes: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Plans beside the float network and the best uniform one of no more bits."""

    images: int
    float_top1: float
    uniform: Measured | None
    plans: tuple[Measured, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that `evaluate --json` prints."""
        uniform = None
        if self.uniform is not None:
            uniform = {"bits": round(self.uniform.average_bits), **_record(self.uniform)}
            del uniform["file"]
        return {
            "float": {"top1": round(self.float_top1, 4), "n": self.images},
            "uniform": uniform,
            "plans": [_record(one) for one in self.plans],
        }


def _record(one: Measured) -> dict[str, Any]:
    record = {
        "file": one.name,
        "top1": round(one.top1, 4),
        "size_bits": one.size_bits,
        "average_bits": round(one.average_bits, 6),
        "kl": None if one.kl is None else round(one.kl, 6),
        "correction": one.correction,
    }
    if one.notes:
        record["notes"] = dict(one.notes)
    return record


def evaluate(
    model: Any,
    plans: Sequence[Plan],
    data: Any = None,
    eval_data: Any = None,
    *,
    names: Sequence[str] | None = None,
    correction: str | None = None,
    samples: int = DEFAULT_SAMPLES,
    seed: int | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measured accuracy of plans, beside the float network and a uniform one.

    `data` are the unlabelled images for the correction and the activation ranges; the
    correction is each plan's own unless given.
    """
    if not plans:
        raise UsageError("`plans` must hold at least one plan.")
    if correction is not None and correction not in CORRECTIONS:
        raise UsageError(
            f"`correction` must be one of {', '.join(CORRECTIONS)}, got {correction!r}."
        )
    model = as_model(model)
    calibration = as_data(data, model)
    inputs = None if calibration is None else inputs_of(calibration, model, samples, seed)
    measured_on = as_eval_data(eval_data, model)
    return _measure(
        model,
        plans,
        inputs,
        measured_on,
        names=names,
        correction=correction,
        memory=memory,
        progress=progress,
    )


def quantize_model(
    model: Model,
    plan: Plan,
    inputs: Any = None,
    *,
    correction: str | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> QuantizedModel:
    """The model with a plan applied: weights rounded, statistics corrected, inputs rounded.

    `inputs` are prepared calibration images `[images, …]`; `correction` is the plan's own
    unless given. **Raises** `ProxyqError` when the plan is for another model.
    """
    widths = {name: b for name, b in plan.bits().items() if b is not None}
    activations = {
        name: layer.activation_bits
        for name, layer in plan.layers.items()
        if layer.activation_bits is not None
    }
    check_plan_fits(model, plan)
    images = 1 if inputs is None else len(jax.tree.leaves(inputs)[0])
    engine = Engine.build(model, images, memory=memory)
    edits = round_weights(engine, widths)
    if activations:
        if inputs is None:
            raise UsageError("activation ranges need calibration images: give `data` (--data).")
        edits = with_input_grids(edits, input_grids(engine, activations, inputs))
    wanted = correction or str(plan.method.get("correction", "none"))
    edits, used, notes = correct(engine, edits, inputs, wanted, progress=progress)  # type: ignore[arg-type]
    return QuantizedModel(model=model, bits=widths, edits=edits, correction=used, notes=notes)


def check_plan_fits(model: Model, plan: Plan) -> None:
    """Refuse a plan whose layers are not the model's."""
    found = {layer.name: layer for layer in network(model, 1).layers}
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
    missing = [name for name in found if name not in plan.layers]
    if missing:
        raise ProxyqError(
            f"the plan is for another model: it says nothing of the layer {missing[0]!r} of "
            f"{model.name!r}."
        )


def _measure(
    model: Model,
    plans: Sequence[Plan],
    inputs: Any,
    measured_on: Data,
    *,
    names: Sequence[str] | None = None,
    correction: str | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> Evaluation:
    for plan in plans:
        check_plan_fits(model, plan)
    uniform = _uniform(plans[0])
    given = names or [f"plan {i + 1}" for i in range(len(plans))]
    candidates = [*zip(given, plans, strict=True)]
    if uniform is not None:
        candidates.append(("uniform", uniform))
    runs = [
        quantize_model(model, plan, inputs, correction=correction, memory=memory, progress=progress)
        for _, plan in candidates
    ]
    engine = Engine.build(model, len(measured_on), memory=EVAL_MEMORY if memory is None else memory)
    right = np.zeros(1 + len(runs))
    divergence = np.zeros(len(runs))
    total = -(-len(measured_on) // engine.batch_size)
    # One pass over the images, which may be decoded on the way, serves all networks.
    for done, batch in enumerate(model_batches(model, measured_on, engine.batch_size)):
        labels, count = batch.labels[: batch.size], batch.size
        start = engine.start(jax.tree.map(jnp.asarray, batch.inputs))
        reference = np.asarray(logits_of(engine.resume(start, 0, {})))[:count]
        right[0] += (reference.argmax(axis=-1) == labels).sum()
        for index, run in enumerate(runs):
            logits = np.asarray(logits_of(engine.resume(start, 0, run.edits)))[:count]
            right[1 + index] += (logits.argmax(axis=-1) == labels).sum()
            divergence[index] += kl_divergence(reference, logits).sum()
        progress("evaluate", done + 1, total)
    number = len(measured_on)
    results = [
        Measured(
            name=name,
            top1=100.0 * float(right[1 + index]) / number,
            size_bits=plan.size_bits,
            average_bits=plan.average_bits,
            kl=float(divergence[index]) / number,
            correction=run.correction,
            notes=run.notes,
        )
        for index, ((name, plan), run) in enumerate(zip(candidates, runs, strict=True))
    ]
    return Evaluation(
        images=number,
        float_top1=100.0 * float(right[0]) / number,
        uniform=None if uniform is None else results[-1],
        plans=tuple(results[: len(plans)]),
    )


EVAL_MEMORY = 1 << 28
"""Bytes of activations while accuracy is measured: small batches stay in the caches."""


def _uniform(plan: Plan) -> Plan | None:
    """The plan with the largest one bit-width for all searched layers that fits its budgets.

    Pinned layers stay as they are. Without budgets, no more bits on average than the plan.
    """
    layers = [
        SimpleNamespace(name=name, weights=layer.weights, macs=layer.macs, group=None)
        for name, layer in plan.layers.items()
    ]
    pins = [
        f"{glob.escape(name)}={layer.weight_bits}"
        for name, layer in plan.layers.items()
        if layer.pinned and layer.weight_bits is not None
    ]
    budgets = [f"{b.name}={b.asked}{b.unit}" for b in plan.budgets]
    activations = {name: layer.activation_bits for name, layer in plan.layers.items()}
    for width in (8, 7, 6, 5, 4, 3, 2, 1):
        if not budgets and width > plan.average_bits + 1e-9:
            continue
        try:
            cost = np.zeros((len(layers), 1))
            problem = build_problem(
                layers, cost, [width], budgets, pins=pins, activation_bits=activations
            )
            solve(problem, "greedy")
        except ProxyqError:
            continue
        changed = {
            name: layer
            if layer.pinned or layer.weight_bits is None
            else layer.model_copy(update={"weight_bits": width})
            for name, layer in plan.layers.items()
        }
        return plan.model_copy(update={"layers": changed, "solver": None})
    return None
