"""`proxyq evolve`: a new formula for a proxy, from measured plans."""

from pathlib import Path
from typing import Any

from proxyq.cli import options as o
from proxyq.cli.arguments import byte_count
from proxyq.cli.models import named
from proxyq.cli.output import print_blocks, print_json, say
from proxyq.cli.plans import check_results
from proxyq.cli.runtime import score_cache, working
from proxyq.errors import UsageError


def evolve(
    table: o.EvolveTables = None,
    holdout: o.Holdouts = None,
    method: o.EvolveMethod = "default",
    structure: o.StructureName = None,
    leaves: o.Leaves = None,
    objective: o.Objective = None,
    population: o.Population = None,
    evaluations: o.Evaluations = None,
    generations: o.Generations = None,
    restarts: o.Restarts = None,
    nodes: o.Nodes = None,
    validation: o.Validation = 0.25,
    entries: o.Entries = 2048,
    data: o.TablesData = None,
    samples: o.Samples = None,
    mean: o.Mean = None,
    std: o.Std = None,
    size: o.Size = None,
    resize: o.Resize = None,
    weights: o.TablesWeights = None,
    code: o.TablesCode = None,
    input_shape: o.InputShape = None,
    out: o.OutFormula = None,
    logbook: o.Logbook = None,
    plot: o.PlotEvolution = None,
    executor: o.ExecutorName = "serial",
    seed: o.SearchSeed = 0,
    memory: o.Memory = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.CacheDir = None,
    no_cache: o.NoCache = False,
    device: o.Device = None,
    devices: o.DeviceCount = None,
) -> None:
    """Find a formula that orders measured plans well: a new proxy.

    How far it is, is kept in the cache: a killed run goes on where it was.
    """
    bound = None if memory is None else byte_count(memory, "--memory")
    name = None if out is None else _name(out)
    check_results(out, logbook, plot=plot)
    if not table:
        raise UsageError(
            "give the measured plans (--table TABLE.json), as `proxyq table` writes them; or "
            "--table digits for the embedded network."
        )
    if entries < 1:
        raise UsageError(f"--entries must be at least 1, got {entries}.")
    changes: dict[str, Any] = {
        "structure": structure,
        "objective": objective,
        "population": population,
        "evaluations": evaluations,
        "generations": generations,
        "restarts": restarts,
        "most_nodes": nodes,
        "seed": seed,
    }
    if leaves is not None:
        changes["leaves"] = tuple(part.strip() for part in leaves.split(","))
    with working(
        device=device,
        devices=devices,
        cache_dir=cache_dir,
        no_cache=no_cache,
        quiet=quiet,
        shared=executor != "serial",
    ) as progress:
        from proxyq import api
        from proxyq.files import write_together
        from proxyq.report.plots import draw_evolution

        found = api.evolve(
            table,
            holdout or (),
            data=data,
            weights=weights,
            code=code or (),
            loading=named(
                None, input_shape=input_shape, mean=mean, std=std, size=size, resize=resize
            ),
            method=method,
            validation=validation,
            samples=api.DEFAULT_SAMPLES if samples is None else samples,
            entries=entries,
            memory=bound,
            executor=executor,
            cache_dir=score_cache(cache_dir, no_cache=no_cache),
            progress=progress,
            **changes,
        )
        written: dict[Path, bytes | str] = {}
        if out is not None and name is not None:
            written[Path(out)] = found.formula(name).to_json()
        if logbook is not None:
            written[Path(logbook)] = found.text()
        if plot is not None:
            written[Path(plot)] = draw_evolution(found.to_json(), plot)
        write_together(written)

    if json:
        print_json(found.to_json())
        return
    from proxyq.report.tables import evolution_table

    print_blocks(*evolution_table(found.to_json()))
    for file in filter(None, (out, logbook, plot)):
        say(f"wrote {file}", quiet=quiet)


def _name(out: str) -> str:
    """The formula's name, from that of its file."""
    from proxyq.proxies.formula.file import SCHEMA, Formula

    path = Path(out)
    if path.suffix != ".json":
        raise UsageError(f"--out must be a file that ends in .json, got {out!r}.")
    try:
        Formula(schema=SCHEMA, name=path.stem, formula="W", direction="importance")
    except ValueError:
        raise UsageError(
            f"--out names the formula {path.stem!r}: a name has letters, digits, '_', '.' and '-', "
            "and begins with a letter or digit."
        ) from None
    return path.stem
