"""`proxyq rank`: how well proxies order measured plans."""

from pathlib import Path

from proxyq.cli import options as o
from proxyq.cli.arguments import byte_count, key_values
from proxyq.cli.models import load
from proxyq.cli.output import print_blocks, print_json, say
from proxyq.cli.pareto import names_scores
from proxyq.cli.plans import check_results
from proxyq.cli.runtime import score_cache, working
from proxyq.cli.score import ALL, with_options
from proxyq.errors import UsageError


def rank(
    model: o.ModelOrScores = None,
    table: o.TableFile = None,
    proxy: o.RankedProxies = None,
    option: o.ScoreOptions = None,
    in_the_loop: o.InTheLoop = True,
    data: o.CalibrationData = None,
    samples: o.Samples = None,
    mean: o.Mean = None,
    std: o.Std = None,
    size: o.Size = None,
    resize: o.Resize = None,
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    embeddings: o.Embeddings = False,
    out: o.OutRank = None,
    plot: o.PlotRank = None,
    seed: o.Seed = None,
    memory: o.Memory = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.CacheDir = None,
    no_cache: o.NoCache = False,
    device: o.Device = None,
    devices: o.DeviceCount = None,
) -> None:
    """Rank proxies by how well they order plans of measured accuracy.

    Correlations with their 95 % intervals, and what a proxy's choice loses; the trivial costs
    stand beside them.
    """
    settings = key_values(option, "--option")
    bound = None if memory is None else byte_count(memory, "--memory")
    check_results(out, plot=plot)
    if table is None:
        raise UsageError(
            "give the measured plans (--table TABLE.json), as `proxyq table` writes them; or "
            "--table digits for the embedded network."
        )
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
        device=device,
        devices=devices,
        cache_dir=cache_dir,
        no_cache=no_cache,
        quiet=quiet,
        times=True,
    ) as progress:
        from proxyq import api
        from proxyq.files import write_together
        from proxyq.report.plots import draw_ranking

        result = api.rank(
            model if names_scores(model, loading) else load(model, **loading),
            data,
            table=table,
            proxies=with_options(proxy or [ALL], settings),
            in_the_loop=in_the_loop,
            samples=samples,
            seed=seed,
            memory=bound,
            cache_dir=score_cache(cache_dir, no_cache=no_cache),
            progress=progress,
        )
        written: dict[Path, bytes | str] = {}
        if out is not None:
            written[Path(out)] = result.text()
        if plot is not None:
            written[Path(plot)] = draw_ranking(result.costs(), result.table, plot)
        write_together(written)

    if json:
        print_json(result.to_json())
        return
    from proxyq.report.tables import ranking_table

    print_blocks(ranking_table(result.to_json()))
    for file in filter(None, (out, plot)):
        say(f"wrote {file}", quiet=quiet)
