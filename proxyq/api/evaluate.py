"""`evaluate`: the measured accuracy of plans, beside the float network and a uniform plan."""

import glob
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
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
from proxyq.api.quantize import check_plan_fits, fitting_model, quantize_model, rounding_of
from proxyq.data import Data
from proxyq.engine import Engine
from proxyq.engine.divergence import kl_divergence
from proxyq.engine.rounded import sized_layers
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.layers import Layer
from proxyq.model.model import Model, logits_of
from proxyq.model.network import LAYERS_AT, network, with_embeddings
from proxyq.model.schedule import schedule
from proxyq.progress import Progress, silent
from proxyq.ptq.measure import class_top1, right
from proxyq.ptq.paired import Paired, compared
from proxyq.ptq.quantized import QuantizedModel
from proxyq.search.allocate import build_problem, solve
from proxyq.search.allocate.latency import load_latency
from proxyq.search.allocate.patterns import pinned_sizes
from proxyq.search.allocate.plan import Plan, PlannedLayer, scale_bits_of
from proxyq.search.allocate.products import Multiplied
from proxyq.search.allocate.usage import Latencies
from proxyq.widths import LEAST_GROUP, candidates, group_of, with_groups


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Accuracy of one network: top-1 in percent, KL to the float network in nats.

    - `activation_bits` are those of all searched layers, where they have one bit-width, and `width`
      those of their weights, with the group size of those that have their own.
    - `right`: bool `[images]`, which images it gets right, in the order of the data.
    - `images_per_second`: how fast it ran, as `Evaluation` says.
    """

    name: str
    top1: float
    size_bits: int
    average_bits: float
    right: np.ndarray = field(repr=False, compare=False)
    kl: float | None = None
    activation_bits: int | None = None
    width: int | None = None
    correction: str = "none"
    notes: Mapping[str, Any] | None = None
    images_per_second: float | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Plans beside the float network and the largest uniform one within the same budgets.

    All networks see the same images, so they are compared image by image (`proxyq.ptq.paired`).
    There are three families of comparisons, and Holm's adjustment is within each: against float,
    against uniform, and between plans.

    - `labels`: integers `[images]`, and `class_names` in their order, where the data tell.
    - `float_right`: bool `[images]`, which images the float network gets right.
    - `float_images_per_second`, and that of each network: the speed of this simulation on this
      machine, which computes with rounded numbers in floating point, not of a runtime. Over full
      batches after the first, which compiles; `None` where there are none.
    """

    images: int
    float_top1: float
    uniform: Measured | None
    plans: tuple[Measured, ...]
    labels: np.ndarray = field(repr=False, compare=False)
    float_right: np.ndarray = field(repr=False, compare=False)
    class_names: tuple[str, ...] | None = field(default=None, repr=False)
    float_images_per_second: float | None = field(default=None, compare=False)

    @property
    def quantized(self) -> tuple[Measured, ...]:
        """The uniform network, where there is one, and the plans."""
        return (*([] if self.uniform is None else [self.uniform]), *self.plans)

    @cached_property
    def versus_float(self) -> tuple[Paired, ...]:
        """Each of `quantized` against the float network, which is the first of each pair."""
        return compared([(self.float_right, one.right) for one in self.quantized])

    @cached_property
    def versus_uniform(self) -> tuple[Paired, ...]:
        """Each plan against the uniform network, the first of each pair; empty without one."""
        if self.uniform is None:
            return ()
        return compared([(self.uniform.right, one.right) for one in self.plans])

    @cached_property
    def between_plans(self) -> tuple[tuple[Measured, Measured, Paired], ...]:
        """Every two plans, in their order."""
        pairs = list(combinations(self.plans, 2))
        found = compared([(first.right, second.right) for first, second in pairs])
        return tuple((*pair, one) for pair, one in zip(pairs, found, strict=True))

    def summary(self) -> dict[str, Any]:
        """What a plan file keeps: the accuracies, and the plans against float and uniform.

        The same images give the same summary, however fast the machine is.
        """
        uniform = None
        rows = iter(self.versus_float)
        if self.uniform is not None:
            width = self.uniform.width
            bits = round(self.uniform.average_bits) if width is None else int(width)
            size = {} if width is None or not group_of(width) else {"group_size": group_of(width)}
            uniform = {"bits": bits, **size, **_record(self.uniform)}
            if self.uniform.activation_bits is not None:
                uniform["activation_bits"] = self.uniform.activation_bits
            del uniform["file"]
            uniform["versus_float"] = _comparison(next(rows), "float", "plan")
        plans = [
            {**_record(one), "versus_float": _comparison(row, "float", "plan")}
            for one, row in zip(self.plans, rows, strict=True)
        ]
        for plan, row in zip(plans, self.versus_uniform, strict=False):
            plan["versus_uniform"] = _comparison(row, "uniform", "plan")
        return {
            "float": {"top1": round(self.float_top1, 4), "n": self.images},
            "uniform": uniform,
            "plans": plans,
        }

    def to_json(self) -> dict[str, Any]:
        """The object that `evaluate --json` prints: the summary, and three keys more.

        - `comparisons`: every two plans, `first` and `second` by name. Differences everywhere are
          in points of top-1, of the second (the plan) less the first, with a 95 % interval.
        - `classes`: of each class that has images how many (`n`), top-1 in percent of `float` and
          of the others, with its difference from float in points; the plans in their order.
        - `images_per_second`: of `float`, `uniform` and the plans; `null` where all images fit
          one batch. This alone is not the same twice.
        """
        return {
            **self.summary(),
            "comparisons": [
                {"first": first.name, "second": second.name, **_comparison(one, "first", "second")}
                for first, second, one in self.between_plans
            ],
            "classes": self._classes(),
            "images_per_second": self._speeds(),
        }

    def _classes(self) -> list[dict[str, Any]]:
        labels, counts = np.unique(self.labels, return_counts=True)
        base = class_top1(self.float_right, self.labels)
        each = [class_top1(one.right, self.labels) for one in self.quantized]
        records = []
        for row, (label, count) in enumerate(zip(labels.tolist(), counts.tolist(), strict=True)):
            found = [
                {"top1": round(own[row], 4), "difference": round(own[row] - base[row], 4)}
                for own in (values.tolist() for values in each)
            ]
            records.append(
                {
                    "class": label,
                    "name": self._class_name(label),
                    "n": count,
                    "float": round(float(base[row]), 4),
                    "uniform": None if self.uniform is None else found.pop(0),
                    "plans": found,
                }
            )
        return records

    def _class_name(self, label: int) -> str | None:
        names = self.class_names or ()
        return names[label] if label < len(names) else None

    def _speeds(self) -> dict[str, Any] | None:
        if self.float_images_per_second is None:
            return None
        speeds = [round(one.images_per_second or 0.0, 1) for one in self.quantized]
        return {
            "float": round(self.float_images_per_second, 1),
            "uniform": None if self.uniform is None else speeds.pop(0),
            "plans": speeds,
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


def _comparison(one: Paired, first: str, second: str) -> dict[str, Any]:
    return {
        f"only_{first}": one.only_first,
        f"only_{second}": one.only_second,
        "difference": round(one.difference, 4),
        "interval": [round(end, 4) for end in one.interval],
        # Small ones lie many digits behind the point.
        "p_value": float(f"{one.p_value:.6g}"),
        "p_holm": float(f"{one.p_holm:.6g}"),
    }


def evaluate(
    model: Any,
    plans: Sequence[Plan | QuantizedModel],
    data: Any = None,
    eval_data: Any = None,
    *,
    names: Sequence[str] | None = None,
    correction: str | None = None,
    samples: int = DEFAULT_SAMPLES,
    seed: int | None = None,
    memory: int | None = None,
    latency: str | os.PathLike[str] | Latencies | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measured accuracy of plans, beside the float network and a uniform one.

    A plan is applied first, rounded to nearest; a `QuantizedModel`, such as `load_packed` gives,
    runs as it is. All are run on the same images and compared image by image: see `Evaluation`.
    `data` are the unlabelled images for the correction and the activation ranges; the
    correction is each plan's own unless given. `latency` is the table (or its file) that plans
    with a budget on latency were made with: without it they get no uniform rival. `names` stand
    for the plans in what is reported.

    **Raises** `UsageError` without plans or labels, or where `names` are not as many as plans;
    `ProxyqError` for a plan of another model.
    """
    if not plans:
        raise UsageError("`plans` must hold at least one plan.")
    if names is not None and len(names) != len(plans):
        raise UsageError(
            f"`names` must hold one name for each of the {len(plans)} plans, got {len(names)}: "
            "give as many, or leave them out."
        )
    check_correction(correction)
    if isinstance(latency, (str, os.PathLike)):
        latency = load_latency(latency)
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
        latency=latency,
        progress=progress,
    )


def measure(
    model: Model,
    plans: Sequence[Plan | QuantizedModel],
    inputs: Any,
    measured_on: Any,
    *,
    names: Sequence[str] | None = None,
    correction: str | None = None,
    memory: int | None = None,
    latency: Latencies | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """`evaluate`, from prepared calibration inputs and checked, labelled data."""
    whole = [_plan_of(one) for one in plans]
    models = []
    for one, plan in zip(plans, whole, strict=True):
        if isinstance(one, QuantizedModel):
            models.append(with_embeddings(model, one.model.embeddings))
            check_plan_fits(models[-1], plan)
        else:
            models.append(fitting_model(model, plan))
    given = list(names) if names else [f"plan {i + 1}" for i in range(len(plans))]
    uniform = uniform_plan(models[0], whole[0], latency)
    # A plan is run once, however often it is asked for; the uniform one may be among them.
    wanted = [*whole, *([] if uniform is None else [uniform])]
    ready = {i: one for i, one in enumerate(plans) if isinstance(one, QuantizedModel)}
    keys: list[Any] = [i if i in ready else _what_runs(plan) for i, plan in enumerate(wanted)]
    runs: dict[Any, QuantizedModel] = dict(ready)
    for key, plan in zip(keys, wanted, strict=True):
        if key not in runs:
            runs[key] = quantize_model(
                model, plan, inputs, correction=correction, memory=memory, progress=progress
            )
    # Plans with embeddings among their layers run on another graph of the same network.
    graphs = {one.embeddings: one for one in reversed(models)}
    engines = {
        own: Engine.build(one, len(measured_on), memory=memory) for own, one in graphs.items()
    }
    size = min(engine.batch_size for engine in engines.values())
    engines = {
        own: engine
        if engine.batch_size == size
        else Engine.build(graphs[own], size, batch_size=size)
        for own, engine in engines.items()
    }
    engine = engines[models[0].embeddings]
    networks = {None: {}, **{key: run.edits for key, run in runs.items()}}  # None: float
    of = {None: engine, **{key: engines[run.model.embeddings] for key, run in runs.items()}}
    hits: dict[Any, list[np.ndarray]] = {key: [] for key in networks}
    seconds, divergence = dict.fromkeys(networks, 0.0), dict.fromkeys(runs, 0.0)
    timed, total = 0, -(-len(measured_on) // engine.batch_size)
    # One pass over the images, which may be decoded on the way, serves all networks.
    batches = labelled_batches(measured_on, model, engine.batch_size)
    for done, (batch, labels) in enumerate(batches):
        batch = jax.tree.map(jnp.asarray, batch)
        began = time.perf_counter()
        starts = {own: one.start(batch) for own, one in engines.items()}
        jax.block_until_ready([list(start.values()) for start in starts.values()])
        shared = (time.perf_counter() - began) / len(starts)
        # Programs are compiled in the first batch, and the last may be filled up.
        warm = done > 0 and len(labels) == engine.batch_size
        timed += warm * engine.batch_size
        # What runs first finds caches cold, so the networks take turns.
        order = list(networks)
        first = done % len(order)
        outputs = {}
        for key in (*order[first:], *order[:first]):
            began = time.perf_counter()
            start = starts[of[key].network.model.embeddings]
            out = logits_of(of[key].resume(start, 0, networks[key]))
            outputs[key] = np.asarray(out)[: len(labels)]
            seconds[key] += warm * (shared + time.perf_counter() - began)
        for key, own in outputs.items():
            hits[key].append(right(own, labels))
        for key in runs:
            divergence[key] += float(kl_divergence(outputs[None], outputs[key]).sum())
        progress("evaluate", done + 1, total)
    number = len(measured_on)
    found = {key: np.concatenate(rows) for key, rows in hits.items()}
    speeds = {key: timed / spent if timed else None for key, spent in seconds.items()}
    results = [
        Measured(
            name=name,
            top1=_share(found[key]),
            size_bits=plan.size_bits,
            average_bits=plan.average_bits,
            right=found[key],
            kl=divergence[key] / number,
            activation_bits=_one_width(plan),
            width=_one_weight_width(plan),
            correction=runs[key].correction,
            notes=runs[key].notes,
            images_per_second=speeds[key],
        )
        for name, plan, key in zip([*given, "uniform"], wanted, keys, strict=False)
    ]
    return Evaluation(
        images=number,
        float_top1=_share(found[None]),
        uniform=None if uniform is None else results[-1],
        plans=tuple(results[: len(plans)]),
        labels=np.asarray(measured_on.labels),
        float_right=found[None],
        class_names=measured_on.class_names if isinstance(measured_on, Data) else None,
        float_images_per_second=speeds[None],
    )


def _share(right: np.ndarray) -> float:
    return 100.0 * int(right.sum()) / len(right)


def _plan_of(one: Plan | QuantizedModel) -> Plan:
    if isinstance(one, Plan):
        return one
    if one.plan is None:
        raise UsageError("a quantized model without its plan cannot be evaluated: pass the plan.")
    return one.plan


def _what_runs(plan: Plan) -> tuple[Any, ...]:
    """What of a plan decides the network that runs."""
    layers = ((n, p.width, p.activation_bits) for n, p in plan.layers.items())
    attention = ((n, p.bits) for n, p in plan.attention.items() if p.bits is not None)
    return (*layers, *attention, plan.method.get("correction"), rounding_of(plan))


def uniform_plan(model: Model, plan: Plan, latency: Latencies | None = None) -> Plan | None:
    """The plan with the largest one bit-width for all searched layers that fits its budgets.

    Pinned layers stay as they are. It has at most the plan's largest candidate; without
    budgets, no more bits on average than the plan. Activations keep the plan's bits where these
    were given, and have the weights' where they did in the plan. Where they were chosen beside
    the weights they get one bit-width too: of all pairs that fit, the one whose smaller width is
    largest, then with more activation bits, so W3A4 before W4A3 and W2A6. Where layers have groups
    of their own, each such width is tried with all of their sizes, the finest first, in the layers
    that can have it.

    `None` where nothing fits, or a budget cannot be counted (latency without its table).
    """
    found = network(model, LAYERS_AT)
    steps = schedule(found)
    products = {
        one.name: Multiplied(one.macs, own.bits if own is not None else None)
        for one in found.attention
        for own in (plan.attention.get(one.name),)
    }
    pins = [
        f"{glob.escape(name)}={layer.width}"
        for name, layer in plan.layers.items()
        if layer.pinned and layer.weight_bits is not None
    ]
    try:
        budgets = [budget.budget() for budget in plan.budgets]
    except ProxyqError:  # of a version to come
        return None
    if latency is None and any(budget.kind == "latency" for budget in budgets):
        return None
    sizes = _group_sizes(plan)
    sized = {
        size: {
            own.name: own
            for own in sized_layers(
                found, rounding_of(plan), () if size is None else (size,), pinned_sizes(pins)
            )
        }
        for size in sizes
    }
    for (width, beside), size in product(_uniform_pairs(plan), sizes):
        changed = {
            name: layer
            if layer.pinned or layer.weight_bits is None
            else layer.model_copy(
                update={"weight_bits": width}
                | ({} if sizes == [None] else _in_groups(sized[size][name], size))
                | ({} if beside is None or not layer.macs else {"activation_bits": beside})
            )
            for name, layer in plan.layers.items()
        }
        rival = plan.model_copy(update={"layers": changed, "solver": None})
        if size is not None and not budgets and rival.average_bits > plan.average_bits:
            continue
        bits, layers = candidates([width], [size]), list(sized[size].values())
        activations = {name: layer.activation_bits for name, layer in changed.items()}
        try:
            problem = build_problem(
                layers,
                np.zeros((len(layers), len(bits))),
                bits,
                budgets,
                pins=pins,
                activation_bits=activations,
                latency=latency,
                schedule=steps,
                attention=products,
            )
            solve(problem, "greedy")
        except ProxyqError:
            continue
        return rival
    return None


def _group_sizes(plan: Plan) -> list[int | None]:
    """The group sizes that a uniform plan may have, the finest first, one grid a channel last."""
    told = plan.method.get("group_sizes")
    sizes = {layer.group_size for layer in plan.layers.values()}
    for size in told if isinstance(told, list) else ():
        if type(size) is int and size >= LEAST_GROUP:
            sizes.add(size)
    return [*sorted(size for size in sizes if size is not None), None]


def _in_groups(layer: Layer, size: int | None) -> dict[str, Any]:
    """What a plan says of a layer's groups, where it has such of that size."""
    own = size if size in layer.group_scale_bits else None
    return {"group_size": own, "scale_bits": scale_bits_of(layer, own)}


_WIDTHS = (16, 8, 7, 6, 5, 4, 3, 2, 1)


def _searched(plan: Plan) -> list[PlannedLayer]:
    layers = plan.layers.values()
    return [layer for layer in layers if not layer.pinned and layer.weight_bits is not None]


def _reading(plan: Plan) -> list[PlannedLayer]:
    """The searched layers that multiply: those without MACs are embeddings and read indices."""
    searched = _searched(plan)
    return [layer for layer in searched if layer.macs] or searched


def _one_width(plan: Plan) -> int | None:
    widths = {layer.activation_bits for layer in _reading(plan)}
    return widths.pop() if len(widths) == 1 else None


def _one_weight_width(plan: Plan) -> int | None:
    widths = {layer.weight_bits for layer in _searched(plan)}
    sizes = {layer.group_size for layer in _searched(plan)} - {None}
    if len(widths) != 1 or len(sizes) > 1:
        return None
    bits = widths.pop()
    return None if bits is None else with_groups(bits, sizes.pop() if sizes else None)


def _uniform_pairs(plan: Plan) -> list[tuple[int, int | None]]:
    """Weight bits and activation bits (`None`: as they are) of uniform plans, the best first."""
    searched = _reading(plan)
    most = max(plan.method.get("bits", [16])) if plan.budgets else plan.average_bits
    widths = [width for width in _WIDTHS if width <= most + 1e-9]
    given = plan.method.get("activation_bits")
    beside = [layer.activation_bits for layer in searched]
    varies = len(set(beside)) > 1  # what plans tell that do not say how they came by them
    as_weights = all(layer.weight_bits == layer.activation_bits for layer in searched)
    if given == "weights" or (given is None and varies and as_weights):
        return [(width, width) for width in widths]
    if isinstance(given, int) or (not isinstance(given, list) and not varies):
        return [(width, None) for width in widths]
    known = [bits for bits in beside if bits is not None] or [16]
    most = sum(known) / len(known)
    if plan.budgets:
        most = max(given if isinstance(given, list) else known)
    beside = [width for width in _WIDTHS if width <= most + 1e-9]
    pairs = sorted(((min(w, a), a, w) for w in widths for a in beside), reverse=True)
    return [(w, a) for _, a, w in pairs]
