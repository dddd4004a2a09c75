"""`search`: from a model to a plan."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from proxyq.api.evaluate import measure
from proxyq.api.inputs import Prepared, as_data, as_eval_data, as_model, calibration_of
from proxyq.api.method import (
    AUTO,
    GroupSizes,
    Method,
    check_groups,
    method_of,
    within_reach,
)
from proxyq.api.problem import bits_record, problem_from, products_at, trial_solver, unscored
from proxyq.auto import HELD_BACK, Judge, check_effort, choose, halves, improve
from proxyq.data import Data
from proxyq.devices import several
from proxyq.engine.rounded import sized_layers
from proxyq.errors import UsageError
from proxyq.model.features import layers_by_feature
from proxyq.model.layers import Layer
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT, network
from proxyq.model.schedule import schedule
from proxyq.progress import Progress, silent
from proxyq.provenance import provenance
from proxyq.proxies import Cache, Proxy, Scores, score
from proxyq.proxies.cost import NEED_ERRORS, cost_name, weight_errors
from proxyq.search.allocate import SOLVERS, Assignment, Problem, solve
from proxyq.search.allocate.latency import LatencyTable, load_latency
from proxyq.search.allocate.patterns import pinned_sizes
from proxyq.search.allocate.plan import Plan, plan_from
from proxyq.search.allocate.together import together
from proxyq.search.recipes import Recipe

DEFAULT_BUDGET = "size=4bit"
DEFAULT_EFFORT = "medium"
CORRECTED = ("auto", "statistics")
"""Corrections that read calibration images."""
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
    attention_bits: int | str | None = None,
    extra_code: str | None = None,
    group_size: GroupSizes = None,
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
    effort: str | None = None,
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
    - `effort`: of `auto`: `low` (a few forward passes), `medium` (a sweep over single layers, the
      default) or `high` (refined, checked on more images); `time_budget`: seconds that it may
      take, about. Of one proxy that is refined, `effort` says how many images are held back.
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
    - `attention_bits`: bits of both operands of every product of two activations, such as those of
      attention (`Network.attention`); `None` leaves them float. Plans are measured so; the scores
      that they are chosen by are of the network with these products in float.
    - `extra_code`: on which side of zero a weight grid has its odd code: `negative` (two's
      complement, the default) or `either`, whichever rounds a channel better.
    - `group_size`: so many weights of an output channel share a grid (32, 64, 128), in layers that
      multiply by a matrix; budgets on size count the scales. `None` is one grid a channel. Of
      several, such as `(None, 64)`, every layer takes its own.
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
        attention_bits=attention_bits,
        extra_code=extra_code,
        group_size=group_size,
        correction=correction,
        samples=samples,
        solver=solver,
        pins=pins,
        ties=ties,
        unties=unties,
    )
    effort = _effort(method, effort, time_budget, refine)
    model = as_model(model)
    task = _Task.of(model, method, budget, candidates=candidates, latency=latency)
    measured = evaluate or eval_data is not None
    readers = _readers_of_images(method, refine, measured)
    calibration = as_data(data, model) if readers else None
    if calibration is None and readers:
        raise UsageError(
            f"calibration images are needed by {' and by '.join(readers)}: give `data` (--data)."
        )
    # What cannot be solved (or not by this solver) and images that do not fit are told before
    # minutes of measuring.
    task.try_out(time_limit)
    labelled = as_eval_data(eval_data, model) if measured else None
    run = _Run(
        task=task,
        images=Images.of(calibration, model, method, seed, effort, refine),
        seed=seed or 0,
        memory=memory,
        time_limit=time_limit,
        refine=refine,
        cache=Cache.of(cache_dir),
        progress=progress,
    )
    found = run.auto(effort, time_budget) if method.proxy is None else run.one_proxy()
    plan = _plan(found, run, seed=seed, data=None if calibration is None else calibration.identity)
    if labelled is None:
        return plan
    result = measure(
        model,
        [plan],
        run.images.all(),
        labelled,
        latency=task.binding["latency"],
        memory=memory,
        progress=progress,
    )
    record = plan.model_dump(by_alias=True)
    return Plan.model_validate({**record, "measured": result.summary()})


@dataclass(frozen=True, kw_only=True, eq=False)
class _Task:
    """What is to be chosen: bits for the layers of a model, by a method, within budgets.

    `binding`: what else `problem_from` takes, the same for all scores.
    """

    model: Model
    method: Method
    layers: tuple[Layer, ...]
    budget: str | Sequence[str]
    binding: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        model: Model,
        method: Method,
        budget: str | Sequence[str] | None,
        *,
        candidates: Sequence[str],
        latency: str | LatencyTable | None,
    ) -> "_Task":
        """**Raises** `UsageError` for a budget that is no text, and for a bad latency table."""
        if budget is None:
            low, high = int(min(method.bits)), int(max(method.bits))
            budget = DEFAULT_BUDGET if high > 4 or low == high else f"size={(low + high) / 2:g}bit"
        elif not isinstance(budget, str) and not isinstance(budget, Sequence):
            raise UsageError(f"`budget` must be text such as 'size=3bit', got {budget!r}.")
        found = network(model, LAYERS_AT)
        held = pinned_sizes(method.pins)
        layers = sized_layers(found, method.rounding, method.group_sizes, held)
        method = within_reach(method, layers)
        check_groups(method)
        joined = together(layers, method.ties, method.unties, layers_by_feature(found))
        if isinstance(latency, (str, os.PathLike)):
            latency = load_latency(latency)
        binding = {
            "counted_once": joined.counted_once,
            "shared": joined.shared,
            "activation_bits": method.activation_bits,
            "pins": method.pins,
            "ties": joined.patterns,
            "candidates": candidates,
            "latency": latency,
            "schedule": schedule(found),
            "attention": products_at(found, method.attention_bits),
        }
        return cls(model=model, method=method, layers=layers, budget=budget, binding=binding)

    @property
    def fixed(self) -> list[int | None]:
        """Activation bits of all layers, where they are not chosen."""
        given = self.method.activation_bits
        return [given if isinstance(given, int) else None] * len(self.layers)

    def problem(self, scores: Scores, of: Method | None = None) -> Problem:
        """The problem by scores, whose costs are made as this method, or another, makes them."""
        of = of or self.method
        errors = None
        if cost_name(scores, of.cost) in NEED_ERRORS:
            errors = weight_errors(self.model, of.bits, of.rounding)
        return problem_from(
            self.layers,
            scores,
            self.budget,
            cost=of.cost,
            errors=errors,
            outliers=of.outliers,
            **self.binding,
        )

    def try_out(self, time_limit: float) -> None:
        """**Raises** what solving will raise, whatever the scores are."""
        blank = unscored(self.layers, self.method)
        trial, by = problem_from(self.layers, blank, self.budget, **self.binding), self.method
        solver = trial_solver(by)
        options = by.solver_options if solver == by.solver else {}
        solve(trial, solver, time_limit=time_limit, **options)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    """The scores that a plan was chosen by, the answer, the correction that goes with it, and what
    is told of how it was found."""

    scores: Scores
    answer: Assignment
    correction: str
    told: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """A task with the images to measure on, and what bounds the measuring."""

    task: _Task
    images: "Images"
    seed: int
    memory: int | None
    time_limit: float
    refine: float
    cache: Cache
    progress: Progress

    def auto(self, effort: str, time_budget: float | None) -> _Found:
        """The best of the plans that several costs propose."""
        task, method = self.task, self.task.method
        outcome = choose(
            self._judge(),
            task.problem,
            method.bits,
            method.activation_choices,
            task.fixed,
            correction=method.correction,
            effort=effort,
            solver=method.solver,
            time_limit=self.time_limit,
            time_budget=time_budget,
            refine_seconds=self.refine,
            cache=self.cache,
            progress=self.progress,
        )
        return _Found(
            scores=outcome.scores,
            answer=outcome.answer,
            correction=outcome.correction,
            told={"auto": outcome.report},
        )

    def one_proxy(self) -> _Found:
        """The plan by the method's proxy, from that of another method where a recipe says so."""
        task, method = self.task, self.task.method
        solving = {"time_limit": self.time_limit, **method.solver_options}
        if method.start is not None:
            began = method.start
            problem = task.problem(self._scores(began), began)
            solving["start"] = solve(problem, began.solver, **began.solver_options).choice
        if method.solver != "auto" and SOLVERS.get(method.solver).draws:
            solving["seed"] = self.seed
        scores = self._scores(method)
        answer = solve(task.problem(scores), method.solver, **solving)
        if not self.refine:
            return _Found(scores=scores, answer=answer, correction=method.correction, told={})
        judge = self._judge()
        better = improve(
            judge,
            answer,
            method.bits,
            method.activation_choices,
            task.fixed,
            correction=method.correction,
            seconds=self.refine,
            progress=self.progress,
        )
        return _Found(
            scores=scores,
            answer=better.answer,
            correction=judge.correction,
            told={"refined": better.report},
        )

    def _scores(self, of: Method) -> Scores:
        assert of.proxy is not None
        labels = self.images.labels
        (scores,) = score(
            self.task.model,
            [(of.proxy, of.options)],
            self.images.first(of.samples) if of.proxy.needs_images else None,
            labels=None if labels is None else labels[: of.samples],
            bits=of.bits,
            # Of what the search chooses from, also for the plan that another method starts with.
            activation_bits=self.task.method.activation_choices,
            seed=self.seed,
            memory=self.memory,
            rounding=of.rounding,
            cache=self.cache,
            progress=self.progress,
        )
        return scores

    def _judge(self) -> Judge:
        return self.images.judge(self.task.model, self.task.method, self.memory)


def _plan(found: _Found, run: _Run, *, seed: int | None, data: Mapping[str, Any] | None) -> Plan:
    """The answer as a plan, with how it came about."""
    model, method, scores = run.task.model, run.task.method, found.scores
    predicted = {**found.told, "scores": _by_layer(scores)}
    if told := {k: v for k, v in scores.notes.items() if isinstance(v, (str, int, float))}:
        predicted["notes"] = told  # tables of numbers are for `score`
    chosen, attention = method.activation_choices, method.attention_bits
    return plan_from(
        found.answer,
        run.task.layers,
        model=model.record(),
        method={
            "proxy": scores.proxy if method.proxy is not None else AUTO,
            "recipe": method.recipe,
            "options": dict(scores.options),
            "cost": cost_name(scores, method.cost),
            **bits_record(run.task.layers, method.bits),
            "activation_bits": list(chosen) or method.activation_bits,
            **({} if attention is None else {"attention_bits": attention}),
            "rounding": asdict(method.rounding),
            "correction": found.correction,
            "samples": run.images.samples,
        },
        activation_bits=None
        if isinstance(method.activation_bits, tuple)
        else method.activation_bits,
        attention=run.task.binding["attention"],
        provenance=provenance(seed=seed, data=data, devices=several()),
        predicted=predicted,
    )


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
        return Judge(
            model,
            self.inputs,
            self.held_back,
            rounding=method.rounding,
            attention_bits=method.attention_bits,
            memory=memory,
        )


def _effort(method: Method, effort: str | None, time_budget: float | None, refine: float) -> str:
    """The effort to be made; refuses seconds that make no sense, and what 'auto' alone takes."""
    check_effort(effort or DEFAULT_EFFORT)
    if time_budget is not None and not time_budget > 0:
        raise UsageError(f"`time_budget` must be positive seconds, got {time_budget}.")
    if not 0 <= refine < float("inf"):
        raise UsageError(f"`refine` must be seconds, at least 0, got {refine}.")
    if method.proxy is None:
        return effort or DEFAULT_EFFORT
    if time_budget is not None:
        raise UsageError(
            f"`time_budget` is for 'auto', and {method.name!r} is one proxy: leave it out, or give "
            "`time_limit` for the solver."
        )
    if effort is not None and not refine:
        raise UsageError(
            f"`effort` is for 'auto' and for refinement, and {method.name!r} is one proxy: leave "
            "it out, or give `refine` seconds."
        )
    return effort or DEFAULT_EFFORT


def _readers_of_images(method: Method, refine: float, measured: bool) -> list[str]:
    """What of a search reads calibration images."""
    rounds = method.activation_bits is not None, method.attention_bits is not None
    asked = {
        repr(method.name): method.needs_images,
        "refinement": refine > 0,
        f"correction={method.correction!r}": measured and method.correction in CORRECTED,
        "the ranges of activations": measured and any(rounds),
    }
    return [reader for reader, reads in asked.items() if reads]


def _by_layer(scores: Scores) -> dict[str, Any]:
    return {
        layer.name: np.asarray(v).tolist()
        for layer, v in zip(scores.layers, scores.values, strict=True)
    }
