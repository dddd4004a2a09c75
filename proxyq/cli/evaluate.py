"""`proxyq evaluate`: measured accuracy of plans."""

from proxyq.cli import options as o
from proxyq.cli.arguments import byte_count
from proxyq.cli.models import load
from proxyq.cli.output import print_blocks, print_json, say
from proxyq.cli.runtime import working
from proxyq.errors import UsageError


def evaluate(
    arguments: o.ModelAndPlans,
    data: o.CalibrationData = None,
    eval_data: o.EvalData = None,
    samples: o.Samples = None,
    mean: o.Mean = None,
    std: o.Std = None,
    size: o.Size = None,
    resize: o.Resize = None,
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    embeddings: o.Embeddings = False,
    correction: o.PlanCorrection = None,
    latency_table: o.LatencyFile = None,
    seed: o.Seed = None,
    memory: o.Memory = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.CacheDir = None,
    no_cache: o.NoCache = False,
    device: o.Device = None,
    devices: o.DeviceCount = None,
) -> None:
    """Measure plans beside float and uniform bits, tested image by image."""
    model, files = model_and_plans(arguments, packed=True)
    bound = None if memory is None else byte_count(memory, "--memory")
    with working(
        device=device, devices=devices, cache_dir=cache_dir, no_cache=no_cache, quiet=quiet
    ) as progress:
        from proxyq import api
        from proxyq.ptq.packed import load_packed
        from proxyq.search.allocate.plan import Plan

        read = {file: Plan.load(file) for file in files if file.endswith(".json")}
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
        for file, plan in read.items():
            if plan.model.get("digest") not in (None, loaded.digest()):
                say(f"{file} was made for other weights of this network.", quiet=quiet)
        result = api.evaluate(
            loaded,
            [read[file] if file in read else load_packed(file, loaded) for file in files],
            data,
            eval_data,
            names=files,
            correction=correction,
            samples=api.DEFAULT_SAMPLES if samples is None else samples,
            seed=seed,
            memory=bound,
            latency=latency_table,
            progress=progress,
        ).to_json()

    if json:
        print_json(result)
        return
    from proxyq.report.tables import accuracy_table, class_table, comparison_table, speed_line

    print_blocks(
        accuracy_table(result, files),
        comparison_table(result, files),
        class_table(result, files),
        speed_line(result),
    )


def model_and_plans(arguments: list[str], *, packed: bool = False) -> tuple[str | None, list[str]]:
    """What ends in `.json` is a plan, and in `.safetensors`, where they may stand, a `packed`
    network; at most one other argument names the model."""
    ends = (".json", ".safetensors") if packed else (".json",)
    plans = [argument for argument in arguments if argument.endswith(ends)]
    others = [argument for argument in arguments if not argument.endswith(ends)]
    if len(others) > 1:
        raise UsageError(
            f"name one model, got {others[0]!r} and {others[1]!r}: plans are files that end in "
            "`.json`."
        )
    if not plans:
        raise UsageError("name at least one plan to evaluate: a file that ends in `.json`.")
    return (others[0] if others else None), plans
