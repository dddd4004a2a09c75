"""`proxyq quantize`: a plan applied for good, as a packed network."""

from typing import Any

from proxyq.cli import options as o
from proxyq.cli.arguments import byte_count
from proxyq.cli.models import load
from proxyq.cli.output import print_json, print_text
from proxyq.cli.plans import model_and_plan, tell_other_weights
from proxyq.cli.runtime import score_cache, working


def quantize(
    arguments: o.ModelAndPlan,
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
    eval_data: o.EvalData = None,
    out: o.OutFolder = "quantized",
    seed: o.LearningSeed = 0,
    memory: o.Memory = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.CacheDir = None,
    no_cache: o.NoCache = False,
    device: o.Device = None,
    devices: o.DeviceCount = None,
) -> None:
    """Apply a plan for good, and write the packed network.

    The folder gets packed.safetensors, with weights at their true bit-width, and plan.json.
    """
    model, file = model_and_plan(arguments, "apply")
    bound = None if memory is None else byte_count(memory, "--memory")
    with working(
        device=device, devices=devices, cache_dir=cache_dir, no_cache=no_cache, quiet=quiet
    ) as progress:
        from proxyq import api
        from proxyq.ptq.reconstruct import Learning
        from proxyq.search.allocate.plan import Plan

        plan = Plan.load(file)
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
        tell_other_weights(file, plan, loaded, quiet=quiet)
        made = api.pack(
            loaded,
            plan,
            data,
            out=out,
            correction=correction,
            reconstruction=reconstruct,
            learning=None if steps is None else Learning(steps=steps),
            activation_range=activation_range,  # type: ignore[arg-type]
            samples=api.DEFAULT_SAMPLES if samples is None else samples,
            seed=seed,
            memory=bound,
            cache_dir=score_cache(cache_dir, no_cache=no_cache),
            eval_data=eval_data,
            progress=progress,
        )
    record = made.to_json()
    if json:
        print_json(record)
    else:
        print_text("\n".join(_lines(record)))


def _lines(record: dict[str, Any]) -> list[str]:
    size = record["size"]
    lines = [
        f"wrote {record['file']}: {size['total'] / 1024:,.1f} KiB",
        f"  weights       {size['codes'] / 1024:>12,.1f} KiB, as the plan says "
        f"({record['plan_bytes'] / 1024:,.1f})",
        f"  scales, bias  {size['scales'] / 1024:>12,.1f} KiB",
        f"  not quantized {size['unquantized'] / 1024:>12,.1f} KiB",
        f"  plan, names   {size['header'] / 1024:>12,.1f} KiB",
        f"rounding: {record['reconstruction']}; correction: {record['correction']}",
    ]
    if record["accuracy"] is not None:
        accuracy = record["accuracy"]
        lines.append(
            f"top-1 {accuracy['top1']:.2f} %, float {accuracy['float']:.2f} %, on "
            f"{accuracy['n']:,} images"
        )
    return lines
