"""`evaluate`: the measured accuracy of plans, beside the float network and a uniform plan."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.api.inputs import (
    as_data,
    as_eval_data,
    as_model,
    inputs_of,
    labelled_batches,
)
from proxyq.api.method import DEFAULT_SAMPLES, check_correction
from proxyq.api.quantize import check_plan_fits, quantize_model, rounding_of
from proxyq.engine import Engine
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.model import Model, logits_of
from proxyq.model.network import LAYERS_AT, network
from proxyq.progress import Progress, silent
from proxyq.ptq.measure import kl_divergence
from proxyq.ptq.quantized import QuantizedModel
from proxyq.search.allocate import build_problem, solve
from proxyq.search.allocate.plan import Plan


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
    """Plans beside the float network and the largest uniform one within the same budgets."""

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
    check_correction(correction)
    model = as_model(model)
    calibration = as_data(data, model)
    inputs = None if calibration is None else inputs_of(calibration, model, samples, seed)
    measured_on = as_eval_data(eval_data, model)
    return measure(
        model,
        plans,
        inputs,
        measured_on,
        names=names,
        correction=correction,
        memory=memory,
        progress=progress,
    )


def measure(
    model: Model,
    plans: Sequence[Plan],
    inputs: Any,
    measured_on: Any,
    *,
    names: Sequence[str] | None = None,
    correction: str | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """`evaluate`, from prepared calibration inputs and checked, labelled data."""
    for plan in plans:
        check_plan_fits(model, plan)
    given = list(names) if names else [f"plan {i + 1}" for i in range(len(plans))]
    uniform = uniform_plan(model, plans[0])
    # A plan is run once, however often it is asked for; the uniform one may be among them.
    wanted = [*plans, *([] if uniform is None else [uniform])]
    keys = [_what_runs(plan) for plan in wanted]
    runs: dict[Any, QuantizedModel] = {}
    for key, plan in zip(keys, wanted, strict=True):
        if key not in runs:
            runs[key] = quantize_model(
                model, plan, inputs, correction=correction, memory=memory, progress=progress
            )
    engine = Engine.build(model, len(measured_on), memory=memory)
    right, divergence = dict.fromkeys([None, *runs], 0), dict.fromkeys(runs, 0.0)
    total = -(-len(measured_on) // engine.batch_size)
    # One pass over the images, which may be decoded on the way, serves all networks.
    batches = labelled_batches(measured_on, model, engine.batch_size)
    for done, (batch, labels) in enumerate(batches):
        start = engine.start(jax.tree.map(jnp.asarray, batch))

        def logits(edits: Any, start: Any = start, count: int = len(labels)) -> np.ndarray:
            return np.asarray(logits_of(engine.resume(start, 0, edits)))[:count]

        reference = logits({})
        right[None] += int((reference.argmax(axis=-1) == labels).sum())
        for key, run in runs.items():
            own = logits(run.edits)
            right[key] += int((own.argmax(axis=-1) == labels).sum())
            divergence[key] += float(kl_divergence(reference, own).sum())
        progress("evaluate", done + 1, total)
    number = len(measured_on)
    results = [
        Measured(
            name=name,
            top1=100.0 * right[key] / number,
            size_bits=plan.size_bits,
            average_bits=plan.average_bits,
            kl=divergence[key] / number,
            correction=runs[key].correction,
            notes=runs[key].notes,
        )
        for name, plan, key in zip([*given, "uniform"], wanted, keys, strict=False)
    ]
    return Evaluation(
        images=number,
        float_top1=100.0 * right[None] / number,
        uniform=None if uniform is None else results[-1],
        plans=tuple(results[: len(plans)]),
    )


def _what_runs(plan: Plan) -> tuple[Any, ...]:
    """What of a plan decides the network that runs."""
    layers = ((n, p.weight_bits, p.activation_bits) for n, p in plan.layers.items())
    return (*layers, plan.method.get("correction"), rounding_of(plan))


def uniform_plan(model: Model, plan: Plan) -> Plan | None:
    """The plan with the largest one bit-width for all searched layers that fits its budgets.

    Pinned layers stay as they are. It has at most the plan's largest candidate; without
    budgets, no more bits on average than the plan.
    """
    layers = network(model, LAYERS_AT).layers
    pins = [
        f"{glob.escape(name)}={layer.weight_bits}"
        for name, layer in plan.layers.items()
        if layer.pinned and layer.weight_bits is not None
    ]
    budgets = [f"{b.name}={b.asked}{b.unit}" for b in plan.budgets]
    activations = {name: layer.activation_bits for name, layer in plan.layers.items()}
    for width in (16, 8, 7, 6, 5, 4, 3, 2, 1):
        most = max(plan.method.get("bits", [16])) if budgets else plan.average_bits
        if width > most + 1e-9:
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
