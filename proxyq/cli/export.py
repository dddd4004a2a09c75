"""`proxyq export`: a quantized network for other programs."""

from typing import Any

from proxyq.cli import options as o
from proxyq.cli.arguments import byte_count
from proxyq.cli.models import load
from proxyq.cli.output import print_json, print_text, say
from proxyq.cli.plans import model_and_plan, tell_other_weights
from proxyq.cli.runtime import score_cache, working
from proxyq.errors import UsageError


def export(
    arguments: o.ModelAndMaybePlan = None,
    to: o.ExportFormat = None,
    out: o.OutExport = None,
    packed: o.PackedFile = None,
    strict: o.Strict = False,
    reconstruct: o.Reconstruct = "none",
    steps: o.Steps = None,
    activation_range: o.ActivationRanges = "mse",
    data: o.CalibrationData = None,
    samples: o.Samples = None,
    mean: o.Mean = None,
    std: o.Std = None,
    size: o.Size = None,
    resize: o.Resize = None,
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    embeddings: o.Embeddings = False,
    correction: o.PlanCorrection = None,
    seed: o.LearningSeed = 0,
    memory: o.Memory = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.CacheDir = None,
    no_cache: o.NoCache = False,
    device: o.Device = None,
) -> None:
    """Apply a plan and write the network for another program."""
    arguments = arguments or []
    if packed is not None and not any(one.endswith(".json") for one in arguments):
        if len(arguments) > 1:
            raise UsageError(f"name one model, got {arguments[0]!r} and {arguments[1]!r}.")
        model, file = (arguments[0] if arguments else None), None
    else:
        model, file = model_and_plan(arguments, "export")
    if out is None:
        raise UsageError("say where to write: --out PATH.")
    bound = None if memory is None else byte_count(memory, "--memory")
    with working(device=device, cache_dir=cache_dir, no_cache=no_cache, quiet=quiet) as progress:
        from proxyq import api
        from proxyq.export.registry import EXPORTERS
        from proxyq.ptq.reconstruct import Learning
        from proxyq.search.allocate.plan import Plan

        if to is None:
            raise UsageError(f"say the format: --to {' or '.join(EXPORTERS.available())}.")
        EXPORTERS.get(to)  # an unknown one is told before the network is loaded
        plan = None if file is None else Plan.load(file)
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
        if plan is not None and file is not None:
            tell_other_weights(file, plan, loaded, quiet=quiet)
        made = api.export_model(
            loaded,
            plan,
            data,
            to=to,
            out=out,
            packed=packed,
            strict=strict,
            correction=correction,
            reconstruction=reconstruct,
            learning=None if steps is None else Learning(steps=steps),
            activation_range=activation_range,  # type: ignore[arg-type]
            samples=api.DEFAULT_SAMPLES if samples is None else samples,
            seed=seed,
            memory=bound,
            cache_dir=score_cache(cache_dir, no_cache=no_cache),
            progress=progress,
        )
    record = made.to_json()
    # Not even --quiet hides a file that is larger than its plan.
    for text in _warnings(record):
        say(text)
    if json:
        print_json(record)
    else:
        print_text("\n".join(_lines(record)))


def _warnings(record: dict[str, Any]) -> list[str]:
    lines = []
    if record["raised"]:
        count = len(record["raised"])
        lines.append(
            f"{count} layer{'s' if count > 1 else ''} take{'' if count > 1 else 's'} more bits in "
            f"{record['format']} than planned: the weights are {record['size_bits'] / 8192:,.1f} "
            f"KiB, not {record['planned_bits'] / 8192:,.1f}."
        )
    return lines + record["notes"]


def _lines(record: dict[str, Any]) -> list[str]:
    lines = [
        f"wrote {', '.join(record['paths'])}",
        f"weights: {record['size_bits'] / 8192:,.1f} KiB as stored, "
        f"{record['planned_bits'] / 8192:,.1f} as planned",
    ]
    if record["difference"] is not None:
        lines.append(
            f"outputs: within {record['difference']:.1e} of the quantized network's, relative to "
            "the largest"
        )
    return lines
