"""`search`: from a model to a plan."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from proxyq.api.evaluate import measure
from proxyq.api.inputs import Prepared, as_data, as_eval_data, as_model, calibration_of
from proxyq.api.method import AUTO, Method, method_of
from proxyq.api.program import program
from proxyq.auto import HELD_BACK, Judge, check_effort, choose, halves, improve
from proxyq.data import Data
from proxyq.devices import several
from proxyq.engine.rounded import sized_layers
from proxyq.errors import UsageError
from proxyq.model.features import layers_by_feature
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT, network
from proxyq.model.schedule import schedule
from proxyq.progress import Progress, silent
from proxyq.provenance import provenance
from proxyq.proxies import Cache, Proxy, Scores, score
from proxyq.proxies.cost import NEED_ERRORS, cost_name, weight_errors
from proxyq.search.allocate import SOLVERS, Problem, solve
from proxyq.search.allocate.latency import LatencyTable, load_latency
from proxyq.search.allocate.plan import Plan, plan_from
from proxyq.search.allocate.together import together
from proxyq.search.recipes import Recipe

DEFAULT_BUDGET = "size=4bit"
LEAST = 8
"""Calibration images without which no plan is measured."""


def search(
    model: Any = None,
    data: Any = None,
    *,
    proxy: str | Proxy | None = None,
    recipe: str | Recipe | None = None,
    budget: str | Sequence[str] | None = None,
    bits: Sequence[int] | None = None,
    activation_bits: int | str | Sequence[int] | None = None,
    extra_code: str | None = None,
    group_size: int | None = None,
    correction: str | None = None,
    samples: int | None = None,
    pins: Sequence[str] = (),
    ties: Sequence[str] = (),
    unties: Sequence[str] = (),
    candidates: Sequence[str] = (),
    solver: str | None = None,
    time_limit: float = 60.0,
    options: Mapping[str, Any] | None = None,
    cost: str | None = None,
    latency: str | LatencyTable | None = None,
    cache_dir: str | os.PathLike[str] | Cache | None = None,
    seed: int | None = None,
    memory: int | None = None,
    effort: str = "medium",
    time_budget: float | None = None,
    refine: float = 0.0,
    evaluate: bool = False,
    eval_data: Any = None,
    progress: Progress = silent,
) -> Plan:
    """A bit-width for every layer of a model, within hard budgets.

    **Arguments:**

    - `model`: a `Model`, a specification (`torchvision:resnet18`), or `None` for the embedded
      network. `data`: calibration images, as `as_data` takes them; only
      proxies of the loss read their labels (option `labels`).
    - `proxy` or `recipe`: what measures sensitivity; `options` are the proxy's; `cost`: how
      an importance becomes a cost for each bit-width (`proxyq.proxies.COSTS`). Without either,
      or `"auto"`: several costs propose a plan each, all plans are run on held-back images, and
      the best is kept (`proxyq.auto`).
    - `effort`: of `auto`: `low` (a few forward passes), `medium` (a sweep over single layers) or
      `high` (refined, checked on more images); `time_budget`: seconds that it may take, about.
    - `refine`: seconds to improve the plan by exchanges whose effect is measured.
    - `budget`: one or several, such as `size=3bit`, `size=1.5MiB`, `bops=75G`; all hold.
      Without any, 4 bits on average, or halfway where no candidate has more than 4.
    - `bits`: candidate bit-widths. `pins` (`'PATTERN=8'`), `ties` (`'PATTERN'`) and
      `candidates` (`'PATTERN=2,4'`) bind layers by shell patterns, or `re:` expressions. A tie may
      also be `same-feature` (layers that hand on one tensor, which count once), `same-input`
      (that read one) or `same-sum` (that are added up). Layers that runtimes fuse (query, key and
      value; gate and up) share bits unless `unties` matches them.
    - `activation_bits`: bits of every layer's input; several to choose from, by a proxy that
      measures activations too; `"weights"`, as many as the layer's weights; or `"float"`. `None`
      is the recipe's, else float.
    - `extra_code`: on which side of zero a weight grid has its odd code: `negative` (two's
      complement, the default) or `either`, whichever rounds a channel better.
    - `group_size`: so many weights of an output channel share a grid (32, 64, 128), in layers that
      multiply by a matrix; budgets on size count the scales. `None` is one grid a channel.
    - `correction`: `auto`, `none`, `weights` or `statistics`, when the plan is run.
    - `samples`: how many calibration images; `seed`: draw them at random from this seed
      instead of taking the first, and seed what is random in the proxy.
    - `latency`: a table of what layers take (or its file), for budgets on latency.
    - `cache_dir`: where finished scores are kept and long ones go on after a kill.
    - `evaluate`, `eval_data`: run the plan quantized, and measure it beside float and uniform.

    **Returns** a `Plan`; its `predicted` part holds the scores, `measured` the accuracy.

    **Raises** `UsageError` for wrong arguments, `InfeasibleError` when no plan fits.
    """
    method = method_of(
        proxy,
        recipe,
        options=options,
        cost=cost,
        bits=bits,
        activation_bits=activation_bits,
        extra_code=extra_code,
        group_size=group_size,
        correction=correction,
        samples=samples,
        solver=solver,
        pins=pins,
        ties=ties,
        unties=unties,
    )
    check_effort(effort)
    _check_seconds(time_budget, refine)
    if method.proxy is not None and time_budget is not None:
        raise UsageError(
            f"`time_budget` is for 'auto', and {method.name!r} is one proxy: leave it out, or give "
            "`time_limit` for the solver."
        )
    model = as_model(model)
    if budget is None:
        low, high = min(method.bits), max(method.bits)
        budget = DEFAULT_BUDGET if high > 4 or low == high else f"size={(low + high) / 2:g}bit"
    elif not isinstance(budget, str) and not isinstance(budget, Sequence):
        raise UsageError(f"`budget` must be text such as 'size=3bit', got {budget!r}.")
    found = network(model, LAYERS_AT)
    measured = evaluate or eval_data is not None
    needs_data = method.needs_images or refine > 0 or (measured and _runs_on_images(method))
    calibration = as_data(data, model) if needs_data else None
    if calibration is None and needs_data:
        raise UsageError(
            f"calibration images are needed by {method.name!r} or by "
            f"correction={method.correction!r}: give `data` (--data)."
        )
    # What cannot be solved (or not by this solver) and images that do not fit are told before
    # minutes of measuring.
    layers = sized_layers(found, method.rounding)
    joined = together(layers, method.ties, method.unties, layers_by_feature(found))
    binding = {
        "counted_once": joined.counted_once,
        "shared": joined.shared,
        "activation_bits": method.activation_bits,
        "pins": method.pins,
        "ties": joined.patterns,
        "candidates": candidates,
        "latency": load_latency(latency) if isinstance(latency, (str, os.PathLike)) else latency,
        "schedule": schedule(found),
    }
    beside = method.activation_bits if isinstance(method.activation_bits, tuple) else ()
    blank = Scores(
        proxy=method.name,
        layers=layers,
        bits=method.bits,
        values=np.zeros((len(layers), len(method.bits))),
        activations=np.zeros((len(layers), len(beside))) if method.measures_activations else None,
        activation_bits=beside,
    )
    solving = {"time_limit": time_limit, **method.solver_options}
    couples = method.proxy is not None and method.proxy.couples
    trial = program(layers, blank, budget, **binding)
    draws = method.solver != "auto" and SOLVERS.get(method.solver).draws
    if couples or draws or method.solver == "auto":
        solve(trial, "greedy", time_limit=time_limit)
    else:
        solve(trial, method.solver, **solving)
    if couples and method.solver != "auto" and not SOLVERS.get(method.solver).couples:
        raise UsageError(
            f"the proxy {method.name!r} couples layers, which the solver {method.solver!r} does "
            "not take: use 'iqp'."
        )
    labelled = as_eval_data(eval_data, model) if measured else None

    images = Images.of(calibration, model, method, seed, effort, refine)
    kept = Cache(cache_dir) if isinstance(cache_dir, (str, os.PathLike)) else cache_dir

    def problem_of(scores: Scores, of: Method = method) -> Problem:
        errors = None
        if cost_name(scores, of.cost) in NEED_ERRORS:
            errors = weight_errors(model, of.bits, of.rounding)
        return program(
            layers, scores, budget, cost=of.cost, errors=errors, outliers=of.outliers, **binding
        )

    def scores_of(of: Method) -> Scores:
        assert of.proxy is not None
        (scores,) = score(
            model,
            [(of.proxy, of.options)],
            images.first(of.samples) if of.proxy.needs_images else None,
            labels=None if images.labels is None else images.labels[: of.samples],
            bits=of.bits,
            activation_bits=beside,
            seed=seed or 0,
            memory=memory,
            rounding=of.rounding,
            cache=kept,
            progress=progress,
        )
        return scores

    correction = method.correction
    predicted: dict[str, Any] = {}
    if method.proxy is None:
        outcome = choose(
            images.judge(model, method, memory),
            problem_of,
            method.bits,
            beside,
            _fixed(method, len(layers)),
            correction=method.correction,
            effort=effort,
            solver=method.solver,
            time_limit=time_limit,
            time_budget=time_budget,
            refine_seconds=refine,
            cache=kept,
            progress=progress,
        )
        scores, answer, correction = outcome.scores, outcome.answer, outcome.correction
        predicted["auto"] = outcome.report
    else:
        if method.start is not None:
            began = method.start
            first = solve(problem_of(scores_of(began), began), began.solver, **began.solver_options)
            solving["start"] = first.choice
        if draws:
            solving["seed"] = seed or 0
        scores = scores_of(method)
        answer = solve(problem_of(scores), method.solver, **solving)
        if refine > 0:
            judge = images.judge(model, method, memory)
            fixed = _fixed(method, len(layers))
            better = improve(
                judge,
                answer,
                method.bits,
                beside,
                fixed,
                correction=method.correction,
                seconds=refine,
                progress=progress,
            )
            answer, correction = better.answer, judge.correction
            predicted["refined"] = better.report
    predicted["scores"] = _by_layer(scores)
    if told := {k: v for k, v in scores.notes.items() if isinstance(v, (str, int, float))}:
        predicted["notes"] = told  # tables of numbers are for `score`
    plan = plan_from(
        answer,
        layers,
        model=model.record(),
        method={
            "proxy": scores.proxy if method.proxy is not None else AUTO,
            "recipe": method.recipe,
            "options": dict(scores.options),
            "cost": cost_name(scores, method.cost),
            "bits": list(method.bits),
            "activation_bits": list(beside) or method.activation_bits,
            "rounding": asdict(method.rounding),
            "correction": correction,
            "samples": images.samples,
        },
        activation_bits=None if beside else method.activation_bits,
        provenance=provenance(
            seed=seed,
            data=None if calibration is None else calibration.identity,
            devices=several(),
        ),
        predicted=predicted,
    )
    if labelled is None:
        return plan
    result = measure(
        model,
        [plan],
        images.all(),
        labelled,
        latency=binding["latency"],
        memory=memory,
        progress=progress,
    )
    record = plan.model_dump(by_alias=True)
    return Plan.model_validate({**record, "measured": result.summary()})


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Calibration images: those that a method may fit on, and those held back."""

    inputs: Any
    labels: np.ndarray | None
    held_back: Any = None

    @classmethod
    def of(
        cls,
        calibration: Data | Prepared | None,
        model: Model,
        method: Method,
        seed: int | None,
        effort: str,
        refine: float,
    ) -> "Images":
        """As many as the method asks for; further ones to hold back, where plans are measured."""
        if calibration is None:
            return cls(inputs=None, labels=None)
        if method.proxy is not None and not refine:
            inputs, labels = calibration_of(calibration, model, method.samples, seed)
            return cls(inputs=inputs, labels=labels)
        most = max(method.samples * (1 + HELD_BACK[effort]), LEAST)
        inputs, labels = calibration_of(calibration, model, most, seed)
        if len(calibration) < LEAST:
            raise UsageError(
                f"plans are measured on at least {LEAST} calibration images, got "
                f"{len(calibration)}: give more, or name a proxy (--proxy output-error) and no "
                "refinement."
            )
        fit, check = halves(len(jax.tree.leaves(inputs)[0]), method.samples)
        return cls(
            inputs=jax.tree.map(lambda x: x[fit], inputs),
            labels=None if labels is None else labels[fit],
            held_back=jax.tree.map(lambda x: x[check], inputs),
        )

    @property
    def samples(self) -> int:
        """How many images there are to fit on."""
        return 0 if self.inputs is None else len(jax.tree.leaves(self.inputs)[0])

    def first(self, number: int) -> Any:
        """So many of the images to fit on."""
        return jax.tree.map(lambda x: x[:number], self.inputs)

    def all(self) -> Any:
        """All images, for the final network's correction and ranges: the more, the better."""
        if self.held_back is None:
            return self.inputs
        both = (self.inputs, self.held_back)
        return jax.tree.map(lambda *parts: np.concatenate(parts), *both)

    def judge(self, model: Model, method: Method, memory: int | None) -> Judge:
        """What measures plans on them."""
        return Judge(model, self.inputs, self.held_back, rounding=method.rounding, memory=memory)


def _fixed(method: Method, layers: int) -> list[int | None]:
    """Activation bits of all layers, where they are not chosen."""
    given = method.activation_bits
    return [given if isinstance(given, int) else None] * layers


def _check_seconds(time_budget: float | None, refine: float) -> None:
    if time_budget is not None and not time_budget > 0:
        raise UsageError(f"`time_budget` must be positive seconds, got {time_budget}.")
    if not 0 <= refine < float("inf"):
        raise UsageError(f"`refine` must be seconds, at least 0, got {refine}.")


def _runs_on_images(method: Method) -> bool:
    return method.correction in ("auto", "statistics") or method.activation_bits is not None


def _by_layer(scores: Scores) -> dict[str, Any]:
    return {
        layer.name: np.asarray(v).tolist()
        for layer, v in zip(scores.layers, scores.values, strict=True)
    }
