"""`proxyq evaluate`: measured accuracy of plans."""

from proxyq.cli import options as o
from proxyq.cli.arguments import byte_count
from proxyq.cli.models import load
from proxyq.cli.output import print_blocks, print_json
from proxyq.cli.plans import model_and_plans, tell_other_weights
from proxyq.cli.runtime import working


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
    model, files = model_and_plans(arguments, "evaluate", packed=True)
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
            tell_other_weights(file, plan, loaded, quiet=quiet)
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
