"""`proxyq pareto`: plans over a range of budgets."""

from pathlib import Path
from typing import Any

from proxyq.cli import options as o
from proxyq.cli.arguments import activation_bits as parse_activation_bits
from proxyq.cli.arguments import attention_bits as parse_attention_bits
from proxyq.cli.arguments import byte_count, group_sizes, key_values, numbers
from proxyq.cli.models import load
from proxyq.cli.output import print_blocks, print_text, say
from proxyq.cli.plans import check_results, tell_unused_pins
from proxyq.cli.runtime import score_cache, working
from proxyq.errors import UsageError


def pareto(
    model: o.ModelOrScores = None,
    proxy: o.OneProxy = None,
    option: o.ProxyOptions = None,
    cost: o.Cost = None,
    bits: o.Bits = None,
    activation_bits: o.ActivationBits = None,
    attention_bits: o.AttentionBits = None,
    extra_code: o.ExtraCode = None,
    group_size: o.GroupSize = None,
    pin: o.Pins = None,
    tie: o.Ties = None,
    untie: o.Unties = None,
    candidates: o.Candidates = None,
    budget: o.RangeBudgets = None,
    points: o.Points = 15,
    solver: o.SolverName = None,
    time_limit: o.AllTimeLimit = 25.0,
    latency_table: o.LatencyFile = None,
    data: o.CalibrationData = None,
    samples: o.Samples = None,
    eval_data: o.EvalData = None,
    mean: o.Mean = None,
    std: o.Std = None,
    size: o.Size = None,
    resize: o.Resize = None,
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    embeddings: o.Embeddings = False,
    correction: o.Correction = None,
    evaluate: o.EvaluateAll = False,
    out: o.OutFront = None,
    plans: o.Plans = None,
    plot: o.PlotFront = None,
    seed: o.Seed = None,
    memory: o.Memory = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.CacheDir = None,
    no_cache: o.NoCache = False,
    device: o.Device = None,
    devices: o.DeviceCount = None,
) -> None:
    """Choose bits over a range of budgets, by one set of scores.

    Dominated points are marked. A point becomes a plan by --plans, or by `proxyq allocate`.
    """
    widths = None if bits is None else numbers(bits, "--bits")
    activations = parse_activation_bits(activation_bits)
    attention = parse_attention_bits(attention_bits)
    settings = key_values(option, "--option")
    sizes = group_sizes(group_size)
    bound = None if memory is None else byte_count(memory, "--memory")
    if not budget:
        raise UsageError("give a range of budgets, such as --budget size=2.5bit..6bit.")
    check_results(out, plot=plot)
    if plans is not None:
        from proxyq.files import check_folder

        check_folder(plans)
    loading = {
        "weights": weights,
        "input_shape": input_shape,
        "embeddings": embeddings or None,
        "mean": mean,
        "std": std,
        "size": size,
        "resize": resize,
    }

    with working(
        device=device, devices=devices, cache_dir=cache_dir, no_cache=no_cache, quiet=quiet
    ) as progress:
        from proxyq import api

        front = api.pareto(
            model if names_scores(model, loading) else load(model, **loading),
            data,
            budget=budget,
            points=points,
            proxy=proxy,
            options=settings,
            cost=cost,
            bits=widths,
            activation_bits=activations,
            attention_bits=attention,
            extra_code=extra_code,
            group_size=sizes,
            pins=pin or (),
            ties=tie or (),
            unties=untie or (),
            candidates=candidates or (),
            solver=solver,
            time_limit=time_limit,
            latency=latency_table,
            correction=correction,
            samples=samples,
            seed=seed,
            memory=bound,
            cache_dir=score_cache(cache_dir, no_cache=no_cache),
            evaluate=evaluate,
            eval_data=eval_data,
            progress=progress,
        )
        save_front(front, out, plans, plot)

    tell_unused_pins(pin, list(front.layers), quiet=quiet)
    if json:
        print_text(front.to_json())
        return
    from proxyq.report.tables import front_summary, front_table

    print_blocks(front_table(front), front_summary(front))
    for file in filter(None, (out, plot, plans)):
        say(f"wrote {file}", quiet=quiet)


def names_scores(model: str | None, loading: dict[str, Any]) -> bool:
    """Whether a file of scores is named, with which nothing may say how to load a model."""
    if model is None or not model.endswith(".json"):
        return False
    for name, value in loading.items():
        if value is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is for a model, and {model!r} is a file of scores: "
                "leave it out, or name the model instead."
            )
    return True


def save_front(front: Any, out: str | None, plans: str | None, plot: str | None) -> None:
    """The front's file, its plans and its picture, where they are asked for."""
    from proxyq.files import write_together

    files: dict[Path, bytes | str] = {}
    if out is not None:
        files[Path(out)] = front.to_json()
    if plans is not None:
        digits = max(2, len(str(len(front.points))))
        for number, plan in enumerate(front.plans, 1):
            files[Path(plans) / f"plan-{number:0{digits}}.json"] = plan.to_json()
    if plot is not None:
        from proxyq.report.plots import draw_front

        files[Path(plot)] = draw_front(front, plot)
    write_together(files, folder=plans)
