"""`proxyq allocate`: bits from scores that were measured before."""

from proxyq.cli import options as o
from proxyq.cli.arguments import activation_bits as parse_activation_bits
from proxyq.cli.arguments import attention_bits as parse_attention_bits
from proxyq.cli.plans import check_results, save_plan, show_plan, tell_unused_pins
from proxyq.cli.runtime import working


def allocate(
    scores: o.ScoresFile,
    budget: o.AskedBudgets = None,
    proxy: o.WhoseScores = None,
    cost: o.Cost = None,
    activation_bits: o.ActivationBits = None,
    attention_bits: o.AttentionBits = None,
    pin: o.Pins = None,
    tie: o.Ties = None,
    untie: o.Unties = None,
    candidates: o.Candidates = None,
    solver: o.SolverName = None,
    time_limit: o.TimeLimit = 60.0,
    latency_table: o.LatencyFile = None,
    correction: o.Correction = None,
    out: o.Out = None,
    plot: o.Plot = None,
    seed: o.UnusedNumber = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.UnusedFolder = None,
    no_cache: o.UnusedFlag = False,
    device: o.UnusedDevice = None,
) -> None:
    """Choose bits by scores from `proxyq score`, without the model.

    The plan is the one that `proxyq search` finds by the same proxy.
    """
    activations = parse_activation_bits(activation_bits)
    attention = parse_attention_bits(attention_bits)
    check_results(out, plot=plot)

    with working(computes=False, no_cache=True, quiet=quiet):
        from proxyq import api
        from proxyq.search.scores_file import ScoreFile

        file = ScoreFile.load(scores)
        plan = api.allocate(
            file,
            budget or (),
            proxy=proxy,
            cost=cost,
            activation_bits=activations,
            attention_bits=attention,
            pins=pin or (),
            ties=tie or (),
            unties=untie or (),
            candidates=candidates or (),
            solver=solver,
            time_limit=time_limit,
            latency=latency_table,
            correction=correction,
        )
        save_plan(plan, out, plot)

    tell_unused_pins(pin, list(file.layers), quiet=quiet)
    kinds = {name: layer.kind for name, layer in file.layers.items()}
    show_plan(plan, kinds, json=json, quiet=quiet, files=(out, plot))
