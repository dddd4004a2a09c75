"""`score`: what several proxies say of a model, once, for any number of allocations."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import jax

from proxyq.api.inputs import as_data, as_model, calibration_of
from proxyq.api.method import GroupSizes, method_of, within_reach
from proxyq.api.model_spec import ModelSpec, check_text
from proxyq.api.problem import products_at
from proxyq.devices import several
from proxyq.engine import Engine, TapOptions, pair_rows
from proxyq.engine.pairs import RowWork
from proxyq.engine.rounded import sized_layers
from proxyq.errors import ProxyqError, UsageError
from proxyq.executor import Executor
from proxyq.executor import executor as executor_of
from proxyq.model.features import layers_by_feature
from proxyq.model.network import LAYERS_AT, network
from proxyq.model.schedule import schedule
from proxyq.progress import Progress, silent
from proxyq.provenance import provenance
from proxyq.proxies import PROXIES, Cache, Proxy
from proxyq.proxies import score as scores_of
from proxyq.proxies.cost import weight_errors
from proxyq.proxies.scoring import Request, logger
from proxyq.quantize import Rounding
from proxyq.search.scores_file import ScoreFile, score_file
from proxyq.widths import read, written

ALL = "all"
NOT_IN_ALL = frozenset({"pairs", "training"})
"""The cost classes that `all` leaves out."""

Asked = str | Proxy | tuple[str | Proxy, Mapping[str, Any]]


def score(
    model: Any = None,
    data: Any = None,
    *,
    proxies: Asked | Sequence[Asked],
    bits: Sequence[int] | None = None,
    activation_bits: int | str | Sequence[int] | None = None,
    attention_bits: int | str | None = None,
    extra_code: str | None = None,
    group_size: GroupSizes = None,
    samples: int | None = None,
    seed: int | None = None,
    memory: int | None = None,
    executor: str | Executor | None = None,
    cache_dir: str | os.PathLike[str] | Cache | None = None,
    progress: Progress = silent,
) -> ScoreFile:
    """The scores of a model's layers, for `allocate`.

    **Arguments:**

    - `model`, `data`, `samples`, `seed`, `memory`, `extra_code`, `group_size`: as for `search`.
    - `proxies`: names, `Proxy` records, or pairs of either with options; `"all"` is every
      proxy that neither trains nor runs pairs of layers, and those that cannot score this model
      are left out.
    - `bits`: candidate bit-widths; `activation_bits`: as for `search`; a list has proxies that
      measure activations do so, for `allocate` to choose.
    - `attention_bits`: as for `search`; kept for `allocate`, scores are the same.
    - `executor`: who measures pairs of layers (`clado`), all else being done here: `serial`,
      `process:N` or `ray:N`, which need `model` and `data` as text (or a `ModelSpec`).
    - `cache_dir`: where finished scores are kept and long ones go on after a kill.

    **Returns** a `ScoreFile`, which has `save`, `load` and `of(proxy)`.

    **Raises** `UsageError` for wrong arguments, `ProxyqError` when a score would break a solver.
    """
    requests, every = _requests(proxies)
    method = method_of(
        requests[0][0],
        bits=bits,
        activation_bits=activation_bits,
        attention_bits=attention_bits,
        extra_code=extra_code,
        group_size=group_size,
        samples=samples,
    )
    runner, named = executor_of(executor), model
    if runner.remote:
        if not any("pairs" in proxy.needs for proxy, _ in requests):
            raise UsageError(
                f"the executor {executor!r} is for proxies that measure pairs of layers (clado), "
                "and none is asked for: leave it out."
            )
        check_text(model, data, None)
    model = as_model(model)
    found = network(model, LAYERS_AT)
    products = products_at(found, method.attention_bits)
    layers = sized_layers(found, method.rounding, method.group_sizes)
    method = within_reach(method, layers)
    readers = [proxy.name for proxy, _ in requests if proxy.needs_images]
    calibration = as_data(data, model) if readers else None
    if readers and calibration is None:
        raise UsageError(f"calibration images are needed by {readers[0]!r}: give `data` (--data).")
    inputs = labels = None
    if calibration is not None:
        inputs, labels = calibration_of(calibration, model, method.samples, seed)
    left_out: list[ProxyqError] = []

    def leave_out(proxy: Proxy, error: ProxyqError) -> None:
        logger.info("left out %s: %s", proxy.name, error)
        left_out.append(error)

    choose = method.activation_choices

    def pair_work(options: TapOptions) -> RowWork:
        spec = named if isinstance(named, ModelSpec) else ModelSpec(name=named)
        setup = {
            "model": spec.to_json(),
            "data": data,
            "samples": method.samples,
            "draw": seed,
            "bits": written(method.bits),
            "activation_bits": list(choose),
            "options": asdict(options),
            "rounding": asdict(method.rounding),
            "memory": memory,
        }
        return lambda rows: runner.run("proxyq.api.score:worker", setup, rows)

    scores = scores_of(
        model,
        requests,
        inputs,
        labels=labels,
        bits=method.bits,
        activation_bits=choose,
        seed=seed or 0,
        memory=memory,
        rounding=method.rounding,
        cache=Cache.of(cache_dir),
        failed=leave_out if every else None,
        pair_work=pair_work if runner.remote else None,
        progress=progress,
    )
    if not scores:
        raise left_out[0]
    reads = {proxy.name: proxy.needs_images for proxy, _ in requests}
    mapped = any(one.shape == "layers" for one in scores)
    return score_file(
        [replace(one, layers=layers) for one in scores],
        images=[reads[one.proxy] for one in scores],
        model=model.record(),
        same_feature=layers_by_feature(found),
        schedule=schedule(found),
        attention=products,
        activation_bits=method.activation_bits,
        errors=weight_errors(model, method.bits, method.rounding) if mapped else None,
        rounding=method.rounding,
        samples=0 if inputs is None else len(jax.tree.leaves(inputs)[0]),
        seed=seed,
        provenance=provenance(
            data=None if calibration is None else calibration.identity, devices=several()
        ),
    )


def worker(setup: Mapping[str, Any]) -> Any:
    """What measures rows of the table of pairs in another process."""
    model = ModelSpec.from_json(setup["model"]).load()
    data = as_data(setup["data"], model)
    assert data is not None  # the process that asks has looked
    inputs, labels = calibration_of(data, model, setup["samples"], setup["draw"])
    options = TapOptions(**setup["options"])
    engine = Engine.build(
        model,
        len(jax.tree.leaves(inputs)[0]),
        batch_norm=options.batch_norm,
        memory=setup["memory"],
    )
    row = pair_rows(
        engine,
        inputs,
        read(setup["bits"]),
        labels=labels,
        activation_bits=setup["activation_bits"],
        options=options,
        rounding=Rounding(**setup["rounding"]),
        seed=setup["draw"] or 0,
    )

    def measured(choice: int) -> list[Any]:
        single, pairs = row(choice)
        return [float(single), pairs.tolist()]

    return measured


def _requests(proxies: Asked | Sequence[Asked]) -> tuple[list[Request], bool]:
    """Records with their options, each once; and whether all were asked for."""
    single = isinstance(proxies, (str, Proxy)) or (
        isinstance(proxies, tuple) and len(proxies) == 2 and isinstance(proxies[1], Mapping)
    )
    asked: list[Any] = [proxies] if single else list(proxies)  # type: ignore[arg-type]
    every = ALL in [one for one in asked if isinstance(one, str)]
    if every:
        given = {_name(one): one for one in asked if one != ALL}
        asked = [
            given.pop(proxy.name, proxy)
            for proxy in PROXIES
            if proxy.cost_class not in NOT_IN_ALL or proxy.name in given
        ] + list(given.values())
    if not asked:
        raise UsageError("`proxies` must name at least one proxy (--proxy), or 'all'.")
    requests: list[Request] = []
    for one in asked:
        proxy, options = one if isinstance(one, tuple) and len(one) == 2 else (one, {})
        if isinstance(proxy, str):
            proxy = PROXIES.get(proxy)
        if not isinstance(proxy, Proxy) or not isinstance(options, Mapping):
            raise UsageError(
                "`proxies` must hold names, Proxy records, or pairs of either with a dictionary "
                f"of options, got {one!r}."
            )
        if proxy.name in [known.name for known, _ in requests]:
            raise UsageError(f"the proxy {proxy.name!r} is given twice: name each once.")
        requests.append((proxy, proxy.check_options(options)))
    return requests, every


def _name(asked: Any) -> Any:
    first = asked[0] if isinstance(asked, tuple) and asked else asked
    return first.name if isinstance(first, Proxy) else first
