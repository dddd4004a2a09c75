"""`pareto`: from one set of scores the plans over a range of budgets."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from proxyq.api.allocate import allocation
from proxyq.api.evaluate import measure
from proxyq.api.inputs import as_data, as_eval_data, as_model, inputs_of
from proxyq.api.method import GroupSizes, Method, check_groups, method_of
from proxyq.api.problem import products_at, trial_solver, unscored
from proxyq.api.score import score
from proxyq.engine.rounded import sized_layers
from proxyq.errors import UsageError
from proxyq.model.features import layers_by_feature
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT, network
from proxyq.model.schedule import schedule
from proxyq.progress import Progress, silent
from proxyq.proxies import Cache, Proxy
from proxyq.search.allocate import budget_steps, parse_budget_range, solve
from proxyq.search.allocate.latency import LatencyTable, load_latency
from proxyq.search.allocate.pareto import TIME_LIMIT, Steps, solve_steps
from proxyq.search.front_file import Front, front_of
from proxyq.search.scores_file import ScoreFile, score_file

DEFAULT_PROXY = "logit-coupling"
DEFAULT_POINTS = 15


def pareto(
    source: Any = None,
    data: Any = None,
    *,
    budget: str | Sequence[str],
    points: int = DEFAULT_POINTS,
    proxy: str | Proxy | None = None,
    options: Mapping[str, Any] | None = None,
    cost: str | None = None,
    bits: Sequence[int] | None = None,
    activation_bits: int | str | Sequence[int] | None = None,
    attention_bits: int | str | None = None,
    extra_code: str | None = None,
    group_size: GroupSizes = None,
    pins: Sequence[str] = (),
    ties: Sequence[str] = (),
    unties: Sequence[str] = (),
    candidates: Sequence[str] = (),
    solver: str | None = None,
    time_limit: float = TIME_LIMIT,
    latency: str | os.PathLike[str] | LatencyTable | None = None,
    correction: str | None = None,
    samples: int | None = None,
    seed: int | None = None,
    memory: int | None = None,
    cache_dir: str | os.PathLike[str] | Cache | None = None,
    evaluate: bool = False,
    eval_data: Any = None,
    progress: Progress = silent,
) -> Front:
    """The plans over a range of budgets, by scores that are measured once.

    **Arguments:**

    - `source`: a model, as for `search`; or scores, a `ScoreFile` or the name of its file
      (`….json`): then nothing is measured, and what says how to measure is refused.
    - `budget`: one or several, of which exactly one is a range, `size=2.5bit..6bit`; all
      others hold at every point. `points`: how many budgets from one end to the other.
    - `proxy`: what measures sensitivity, or whose scores. Without it a model is scored by
      `logit-coupling`: one cost must do for all budgets, so there is nothing for `auto` to choose
      from, and this one predicts the divergence of whole plans, in nats, for the runs that
      `kl-delta` takes. `options` are the proxy's.
    - `time_limit`: seconds for the solver at all points together.
    - `evaluate`, `eval_data`: run every plan quantized, in one pass over the images.
    - All others: as for `search`.

    **Returns** a `Front`: plans that are alike are one point, and the dominated ones are marked.
    Budgets that cannot be met are left out, and `notes` says so.

    **Raises** `UsageError` for wrong arguments, `InfeasibleError` when no plan fits even the
    largest budget.
    """
    texts, which = _with_range(budget)
    ends, steps = parse_budget_range(texts[which]), budget_steps(texts[which], points)
    # What is counted does not hang on the amount: any that can be met will do.
    texts[which] = ends[1].text
    table = load_latency(latency) if isinstance(latency, (str, os.PathLike)) else latency
    binding: dict[str, Any] = {
        "pins": pins,
        "ties": ties,
        "unties": unties,
        "candidates": candidates,
        "solver": solver,
        "latency": table,
        "correction": correction,
    }
    model = scores = inputs = labelled = None
    measured = evaluate or eval_data is not None
    if is_scores(source):
        _refuse(
            data=data,
            options=options,
            bits=bits,
            extra_code=extra_code,
            group_size=group_size,
            samples=samples,
            evaluate=evaluate or None,
            eval_data=eval_data,
        )
        scores = source if isinstance(source, ScoreFile) else ScoreFile.load(source)
        name = proxy.name if isinstance(proxy, Proxy) else proxy
    else:
        method = method_of(
            DEFAULT_PROXY if proxy is None else proxy,
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
        )
        if method.proxy is None:
            raise UsageError(
                "a front needs one cost for all budgets, and 'auto' has a choice of them at each: "
                f"name a proxy (--proxy), or leave it out for {DEFAULT_PROXY!r}."
            )
        check_groups(method)
        model, name = as_model(source), method.name
        # What cannot be solved, or run, is told before minutes of measuring.
        trial = allocation(
            _unscored_file(model, method),
            texts,
            activation_bits=activation_bits,
            attention_bits=attention_bits,
            **{**binding, "solver": trial_solver(method)},
        )
        solve(trial.problem, trial.solver, time_limit=time_limit)
        if measured:
            labelled = as_eval_data(eval_data, model)
            inputs = _inputs(model, data, method, seed)
        scores = score(
            model,
            data,
            proxies=(method.proxy, method.options),
            bits=bits,
            activation_bits=activation_bits,
            attention_bits=attention_bits,
            extra_code=extra_code,
            group_size=group_size,
            samples=samples,
            seed=seed,
            memory=memory,
            cache_dir=cache_dir,
            progress=progress,
        )
    found = allocation(
        scores,
        texts,
        proxy=name,
        cost=cost,
        activation_bits=activation_bits,
        attention_bits=attention_bits,
        **binding,
    )
    solved = solve_steps(
        found.problem, steps, found.solver, time_limit=time_limit, progress=progress
    )
    front = front_of(list(map(found.plan, solved.answers)), ends, points, _notes(solved))
    if model is None or labelled is None:
        return front
    result = measure(
        model, front.plans, inputs, labelled, latency=table, memory=memory, progress=progress
    ).summary()
    return front.with_measured(
        result["float"],
        [{what: one[what] for what in ("top1", "kl", "correction")} for one in result["plans"]],
    )


def is_scores(source: Any) -> bool:
    """Whether this is scores, or names a file of them, and no model."""
    named = isinstance(source, str) and source.endswith(".json")
    return named or isinstance(source, (ScoreFile, os.PathLike))


def _with_range(budget: str | Sequence[str]) -> tuple[list[str], int]:
    """The budgets one by one, and which of them is the range."""
    texts = [budget] if isinstance(budget, str) else budget
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"`budget` must be text such as 'size=2.5bit..6bit', got {budget!r}.")
    ranges = [index for index, text in enumerate(texts) if ".." in text]
    if not ranges:
        got = ", ".join(map(repr, texts)) or "none"
        raise UsageError(
            f"one budget must be a range, such as 'size=2.5bit..6bit' (--budget), got {got}."
        )
    if len(ranges) > 1:
        one, other = (texts[index] for index in ranges[:2])
        raise UsageError(
            f"only one budget can be a range, got {one!r} and {other!r}: fix one of them."
        )
    return list(texts), ranges[0]


def _refuse(**given: Any) -> None:
    """Refuse what says how to measure, where there is nothing to measure with."""
    for name, value in given.items():
        if value not in (None, {}):
            raise UsageError(
                f"`{name}` (--{name.replace('_', '-')}) needs the model, and scores from a file "
                "go without: name the model instead."
            )


def _unscored_file(model: Model, method: Method) -> ScoreFile:
    """A file of scores of a model in which all are zero."""
    found = network(model, LAYERS_AT)
    return score_file(
        [unscored(sized_layers(found, method.rounding, method.group_sizes), method)],
        images=[False],
        model={},
        same_feature=layers_by_feature(found),
        schedule=schedule(found),
        attention=products_at(found, method.attention_bits),
        activation_bits=method.activation_bits,
        errors=None,
        rounding=method.rounding,
        samples=0,
        seed=None,
        provenance={},
    )


def _inputs(model: Model, data: Any, method: Method, seed: int | None) -> Any:
    """Calibration inputs to run plans with; `None` where they can do without."""
    calibration = as_data(data, model)
    if calibration is not None:
        return inputs_of(calibration, model, method.samples, seed)
    rounds = method.activation_bits is not None or method.attention_bits is not None
    if method.correction in ("auto", "statistics") or rounds:
        raise UsageError(
            f"calibration images are needed by correction={method.correction!r} and by activation "
            "bits: give `data` (--data)."
        )
    return None


def _notes(solved: Steps) -> list[str]:
    """What was left out, and why."""
    if not solved.left_out:
        return []
    first, last = solved.left_out[0], solved.left_out[-1]
    count = len(solved.left_out)
    which = f"{first.text} is" if count == 1 else f"{first.text} to {last.text} are"
    return [f"{which} left out ({count} of {count + len(solved.budgets)} points): {solved.why}"]
