"""`proxyq search`: a bit-width for every layer."""

from proxyq.cli import options as o
from proxyq.cli.arguments import activation_bits as parse_activation_bits
from proxyq.cli.arguments import attention_bits as parse_attention_bits
from proxyq.cli.arguments import byte_count, group_sizes, key_values, numbers
from proxyq.cli.models import load
from proxyq.cli.output import say
from proxyq.cli.plans import check_results, save_plan, show_plan, tell_unused_pins
from proxyq.cli.runtime import score_cache, working


def search(
    model: o.ModelName = None,
    proxy: o.ProxyName = None,
    recipe: o.RecipeName = None,
    option: o.ProxyOptions = None,
    cost: o.Cost = None,
    effort: o.Effort = None,
    time_budget: o.TimeBudget = None,
    refine: o.Refine = 0.0,
    bits: o.Bits = None,
    activation_bits: o.ActivationBits = None,
    attention_bits: o.AttentionBits = None,
    extra_code: o.ExtraCode = None,
    group_size: o.GroupSize = None,
    pin: o.Pins = None,
    tie: o.Ties = None,
    untie: o.Unties = None,
    candidates: o.Candidates = None,
    budget: o.Budgets = None,
    solver: o.SolverName = None,
    time_limit: o.TimeLimit = 60.0,
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
    evaluate: o.Evaluate = False,
    out: o.Out = None,
    plot: o.Plot = None,
    seed: o.Seed = None,
    memory: o.Memory = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.CacheDir = None,
    no_cache: o.NoCache = False,
    device: o.Device = None,
    devices: o.DeviceCount = None,
) -> None:
    """Choose a bit-width for every layer within hard budgets.

    Without arguments: the embedded digits network at 4 bits on average.
    """
    widths = None if bits is None else numbers(bits, "--bits")
    activations = parse_activation_bits(activation_bits)
    attention = parse_attention_bits(attention_bits)
    settings = key_values(option, "--option")
    sizes = group_sizes(group_size)
    bound = None if memory is None else byte_count(memory, "--memory")
    check_results(out, plot=plot)

    with working(
        device=device, devices=devices, cache_dir=cache_dir, no_cache=no_cache, quiet=quiet
    ) as progress:
        from proxyq import api

        loaded = load(
            model,
            weights=weights,
            input_shape=input_shape,
            embeddings=embeddings,
            mean=mean,
            std=std,
            size=size,
            resize=resize,
        )
        plan = api.search(
            loaded,
            data,
            proxy=proxy,
            recipe=recipe,
            budget=budget or None,
            bits=widths,
            activation_bits=activations,
            attention_bits=attention,
            extra_code=extra_code,
            group_size=sizes,
            correction=correction,
            samples=samples,
            pins=pin or (),
            ties=tie or (),
            unties=untie or (),
            candidates=candidates or (),
            solver=solver,
            time_limit=time_limit,
            latency=latency_table,
            options=settings,
            cost=cost,
            effort=effort,
            time_budget=time_budget,
            refine=refine,
            cache_dir=score_cache(cache_dir, no_cache=no_cache),
            seed=seed,
            memory=bound,
            evaluate=evaluate,
            eval_data=eval_data,
            progress=progress,
        )
        save_plan(plan, out, plot)
        kinds = {layer.name: layer.kind for layer in api.inspect(loaded).layers}

    if not budget:
        taken = plan.budgets[0]
        say(f"no --budget given: took {taken.name}={taken.asked:g}{taken.unit}.", quiet=quiet)
    tell_unused_pins(pin, list(plan.layers), quiet=quiet)
    show_plan(plan, kinds, json=json, quiet=quiet, files=(out, plot))
