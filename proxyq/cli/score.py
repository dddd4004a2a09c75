"""`proxyq score`: what proxies say of a model's layers, kept in a file."""

from collections.abc import Sequence
from typing import Any

from proxyq.cli import options as o
from proxyq.cli.arguments import activation_bits as parse_activation_bits
from proxyq.cli.arguments import attention_bits as parse_attention_bits
from proxyq.cli.arguments import byte_count, group_sizes, key_values, numbers
from proxyq.cli.models import named
from proxyq.cli.output import print_blocks, print_text, say
from proxyq.cli.plans import check_results
from proxyq.cli.runtime import checkpoint_seconds, score_cache, working
from proxyq.errors import UsageError, near

ALL = "all"


def score(
    model: o.ModelName = None,
    proxy: o.ProxyNames = None,
    option: o.ScoreOptions = None,
    bits: o.Bits = None,
    activation_bits: o.ActivationBits = None,
    attention_bits: o.AttentionBits = None,
    extra_code: o.ExtraCode = None,
    group_size: o.GroupSize = None,
    data: o.CalibrationData = None,
    samples: o.Samples = None,
    mean: o.Mean = None,
    std: o.Std = None,
    size: o.Size = None,
    resize: o.Resize = None,
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    embeddings: o.Embeddings = False,
    out: o.OutScores = None,
    executor: o.PairExecutor = "serial",
    seed: o.Seed = None,
    memory: o.Memory = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.CacheDir = None,
    no_cache: o.NoCache = False,
    device: o.Device = None,
    devices: o.DeviceCount = None,
) -> None:
    """Measure how sensitive the layers are, for `proxyq allocate`.

    Finished scores are cached, and a killed run goes on where it was.
    """
    widths = None if bits is None else numbers(bits, "--bits")
    activations = parse_activation_bits(activation_bits)
    attention = parse_attention_bits(attention_bits)
    settings = key_values(option, "--option")
    sizes = group_sizes(group_size)
    bound = None if memory is None else byte_count(memory, "--memory")
    checkpoint_seconds()  # a wrong one is told before anything is loaded
    check_results(out)
    if not proxy:
        raise UsageError(
            "name a proxy to score with (--proxy), or `--proxy all`; `proxyq proxies` lists them."
        )

    with working(
        device=device,
        devices=devices,
        cache_dir=cache_dir,
        no_cache=no_cache,
        quiet=quiet,
        times=True,
        shared=executor != "serial",
    ) as progress:
        from proxyq import api

        asked = with_options(proxy, settings)
        loaded = named(
            model,
            weights=weights,
            input_shape=input_shape,
            embeddings=embeddings,
            mean=mean,
            std=std,
            size=size,
            resize=resize,
        )
        file = api.score(
            loaded,
            data,
            proxies=asked,
            bits=widths,
            activation_bits=activations,
            attention_bits=attention,
            extra_code=extra_code,
            group_size=sizes,
            samples=samples,
            seed=seed,
            memory=bound,
            executor=executor,
            cache_dir=score_cache(cache_dir, no_cache=no_cache),
            progress=progress,
        )
        if out is not None:
            file.save(out)

    if json:
        print_text(file.to_json())
        return
    from proxyq.report.tables import scores_tables

    print_blocks(*scores_tables(file))
    if out is not None:
        say(f"wrote {out}", quiet=quiet)


def with_options(names: Sequence[str], settings: dict[str, Any]) -> list[Any]:
    """The proxies with their options: `KEY` for all that have it, `PROXY.KEY` for one."""
    from proxyq.api.score import NOT_IN_ALL
    from proxyq.proxies import PROXIES

    known = {one.name: one for one in PROXIES}
    asked: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in asked:
            raise UsageError(f"the proxy {name!r} is given twice: name each once.")
        if name != ALL:
            PROXIES.get(name)
        asked[name] = {}
    known |= {name: PROXIES.get(name) for name in asked if name != ALL}
    for key, value in settings.items():
        # Names of proxies have dashes, which keys of options have lost.
        prefix, dot, own = key.rpartition(".")
        prefix = prefix.replace("_", "-")
        if dot:
            if prefix not in asked and ALL in asked and prefix in known:
                asked[prefix] = {}
            if prefix not in asked:
                raise UsageError(
                    f"--option {key}={value} is for the proxy {prefix!r}, which is not asked for: "
                    f"{near(prefix, list(asked))}"
                )
            asked[prefix][own] = value
            continue

        def asked_for(name: str) -> bool:
            return name in asked or (ALL in asked and known[name].cost_class not in NOT_IN_ALL)

        takers = [name for name in known if asked_for(name) and key in known[name].options]
        if not takers and len(asked) == 1 and ALL not in asked:
            takers = list(asked)  # which tells what is near
        if not takers:
            options = {option for name in asked if name != ALL for option in known[name].options}
            raise UsageError(
                f"none of the proxies has an option {key!r}: "
                + (near(key, sorted(options)) if options else "look into `proxyq proxies NAME`.")
            )
        for name in takers:
            asked.setdefault(name, {}).setdefault(key, value)
    return [(name, own) if name != ALL else ALL for name, own in asked.items()]
