"""`proxyq table`: random plans, each really quantized and measured."""

from proxyq.cli import options as o
from proxyq.cli.arguments import activation_bits as parse_activation_bits
from proxyq.cli.arguments import byte_count, group_sizes, numbers
from proxyq.cli.models import named
from proxyq.cli.output import print_blocks, print_text, say
from proxyq.cli.plans import check_results
from proxyq.cli.runtime import score_cache, working
from proxyq.errors import UsageError


def table(
    model: o.ModelName = None,
    plans: o.PlanCount = 101,
    draw: o.Draw = "uniform",
    bits: o.TableBits = None,
    activation_bits: o.OneActivation = None,
    correction: o.TableCorrection = "statistics",
    extra_code: o.ExtraCode = None,
    group_size: o.GroupSize = None,
    data: o.CalibrationData = None,
    samples: o.Samples = None,
    eval_data: o.EvalData = None,
    eval_samples: o.EvalSamples = None,
    mean: o.Mean = None,
    std: o.Std = None,
    size: o.Size = None,
    resize: o.Resize = None,
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    embeddings: o.Embeddings = False,
    out: o.OutTable = None,
    executor: o.ExecutorName = "serial",
    seed: o.DrawSeed = 0,
    memory: o.Memory = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.CacheDir = None,
    no_cache: o.NoCache = False,
    device: o.Device = None,
    devices: o.DeviceCount = None,
) -> None:
    """Measure many random plans: the truth that proxies are ranked against.

    Finished plans are kept in the cache: a killed run goes on where it was.
    """
    beside = parse_activation_bits(activation_bits)
    if not (beside is None or beside == "float" or isinstance(beside, int)):
        raise UsageError(
            f"--activation-bits of a table must be one number or float, got {activation_bits!r}."
        )
    sizes = group_sizes(group_size)
    bound = None if memory is None else byte_count(memory, "--memory")
    check_results(out)
    with working(
        device=device,
        devices=devices,
        cache_dir=cache_dir,
        no_cache=no_cache,
        quiet=quiet,
        shared=executor != "serial",
    ) as progress:
        from proxyq import api

        found = api.table(
            named(
                model,
                weights=weights,
                input_shape=input_shape,
                embeddings=embeddings,
                mean=mean,
                std=std,
                size=size,
                resize=resize,
            ),
            data,
            eval_data,
            plans=plans,
            bits=api.DEFAULT_TABLE_BITS if bits is None else numbers(bits, "--bits"),
            draw=draw,
            activation_bits=beside if isinstance(beside, int) else None,
            correction=correction,
            extra_code=extra_code or "negative",
            group_size=sizes,
            samples=api.DEFAULT_SAMPLES if samples is None else samples,
            eval_samples=eval_samples,
            seed=seed,
            memory=bound,
            executor=executor,
            cache_dir=score_cache(cache_dir, no_cache=no_cache),
            progress=progress,
        )
        if out is not None:
            found.save(out)

    if json:
        print_text(found.to_json())
        return
    from proxyq.report.tables import measured_table

    print_blocks(measured_table(found))
    if out is not None:
        say(f"wrote {out}", quiet=quiet)
