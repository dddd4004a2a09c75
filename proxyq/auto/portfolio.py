"""A portfolio of costs, most of them from one sweep over single layers.

No one cost is best at every budget and on every network; each of these is good at some, all are
solved in seconds, and a plan costs little to measure. So each proposes a plan, and the judge
decides.

- `output-error`, `restored-error`, `sqnr`: what a few forward passes give.
- `hessian-trace`: curvature, by a few backward passes. Where rounding is mild it sees what no
  layer's error alone tells.
- `kl`, `kl-temperature-2`: the divergence with one layer rounded.
- `logit-coupling`, and the same at temperature 2: with the coupling of layers.
- `rescaled-coupling`: with the coupling of what is not the scale of the logits.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from proxyq.auto.judge import Judge
from proxyq.checkpoint import Checkpoint
from proxyq.engine import collect, single_layer_sweep
from proxyq.engine.alternatives import choices, spread
from proxyq.engine.divergence import kl_divergence, rescaled_divergence
from proxyq.engine.gram import Gram
from proxyq.progress import Progress, silent
from proxyq.proxies import (
    PROXIES,
    Cache,
    Scores,
    as_cost,
    output_error,
    restored_error,
    score,
    sqnr,
)
from proxyq.proxies._logit_coupling import coupling_of
from proxyq.proxies.cost import weight_errors
from proxyq.widths import written

TEMPERATURES = (1.0, 2.0)
CURVATURE_PASSES = 24
"""Forward passes that `hessian-trace` costs, about: a probe takes three, and eight are enough for
most networks."""


def _at(temperature: float) -> str:
    return "" if temperature == 1 else f"-temperature-{temperature:g}"


MEMBERS = (
    *(f"{name}{_at(t)}" for t in TEMPERATURES for name in ("kl", "logit-coupling")),
    "rescaled-coupling",
)


def free_scores(
    judge: Judge, bits: Sequence[int], activation_bits: Sequence[int] = ()
) -> list[Scores]:
    """Scores that a few forward passes give: `output-error`, `sqnr` and `restored-error`.

    What rounding a layer's input costs is its squared error relative to the input's variance.
    """
    key = ("free", tuple(bits), tuple(activation_bits))
    if key in judge.kept:
        return judge.kept[key]
    needs = ("output-error", "restored-error", *(("input-error",) if activation_bits else ()))
    taps = collect(
        judge.engine,
        judge.fit,
        needs,
        bits,
        activation_bits=activation_bits,
        rounding=judge.rounding,
    )
    judge.passes += 1 + len(bits)
    beside = None
    if activation_bits:
        errors = [tap.input_error for tap in taps]
        beside = np.array(
            [[e[a] / max(e["variance"], 1e-30) for a in activation_bits] for e in errors]
        )
    judge.kept[key] = [
        Scores(
            proxy=one.proxy,
            layers=one.layers,
            bits=one.bits,
            values=one.values,
            activations=beside,
            activation_bits=tuple(activation_bits),
        )
        for one in (output_error.on(taps), sqnr.on(taps), restored_error.on(taps))
    ]
    return judge.kept[key]


def curvature_scores(
    judge: Judge,
    bits: Sequence[int],
    activation_bits: Sequence[int] = (),
    *,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> list[Scores]:
    """`hessian-trace` as a cost for each bit-width, without labels.

    **Raises** `ProxyqError` for a network without derivatives, or too little memory for them.
    """
    key = ("curvature", tuple(bits), tuple(activation_bits))
    if key not in judge.kept:
        model = judge.engine.network.model
        (found,) = score(
            model,
            [(PROXIES.get("hessian-trace"), {})],
            judge.fit,
            bits=bits,
            activation_bits=activation_bits,
            rounding=judge.rounding,
            memory=judge.memory,
            cache=cache,
            progress=progress,
        )
        judge.passes += CURVATURE_PASSES
        judge.kept[key] = [
            Scores(
                proxy=found.proxy,
                layers=found.layers,
                bits=found.bits,
                values=as_cost(found, errors=weight_errors(model, tuple(bits), judge.rounding)),
                activations=found.activations,
                activation_bits=found.activation_bits,
            )
        ]
    return judge.kept[key]


def sweep_passes(judge: Judge, bits: Sequence[int], activation_bits: Sequence[int] = ()) -> float:
    """Forward passes of all `fit` images that `portfolio` takes, about."""
    each = len(bits) + len(activation_bits)
    # Half of the network follows a layer, on average.
    passes = 0.5 * len(judge.names) * each
    return passes + (1 + each if judge.correction == "statistics" else 0)


def portfolio(
    judge: Judge,
    bits: Sequence[int],
    activation_bits: Sequence[int] = (),
    *,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> list[Scores]:
    """Scores of one sweep over single layers, each corrected as the judge corrects plans.

    `cache` keeps them, and how far the sweep is, for another process.
    """
    key = ("portfolio", judge.correction, tuple(bits), tuple(activation_bits))
    if key not in judge.kept:
        judge.kept[key] = _kept(judge, bits, activation_bits, cache or Cache(), progress)
    return judge.kept[key]


def _kept(
    judge: Judge,
    bits: Sequence[int],
    activation_bits: Sequence[int],
    cache: Cache,
    progress: Progress,
) -> list[Scores]:
    """The portfolio from the cache, or else measured and kept there."""
    model = judge.engine.network.model
    facts = cache.facts(
        model,
        inputs=judge.fit,
        labels=None,
        rounding=judge.rounding,
        bits=written(bits),
        activation_bits=list(activation_bits),
        correction=judge.correction,
        temperatures=TEMPERATURES,
        portfolio=hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    )
    keys = {name: cache.group_key({**facts, "member": name}) for name in MEMBERS}
    found = [cache.load(keys[name], model) for name in MEMBERS]
    whole = [scores for scores in found if scores is not None]
    if len(whole) == len(MEMBERS):
        return whole
    checkpoint = cache.checkpoint(cache.group_key(facts))
    measured = _measured(judge, bits, activation_bits, checkpoint, progress)
    for scores in measured:
        cache.save(keys[scores.proxy], scores)
    checkpoint.clear()
    return measured


def _measured(
    judge: Judge,
    bits: Sequence[int],
    activation_bits: Sequence[int],
    checkpoint: Checkpoint,
    progress: Progress,
) -> list[Scores]:
    engine, layers = judge.engine, judge.engine.network.layers
    alternatives = choices(
        engine,
        judge.fit,
        bits,
        activation_bits,
        rounding=judge.rounding,
        correction=judge.correction,
        moments=judge.moments if judge.correction == "statistics" else None,
        progress=progress,
    )
    each = len(bits) + len(activation_bits)
    gram, rescaled = (Gram(len(layers) * each, rescaled=way) for way in (False, True))

    def measure(reference: np.ndarray, logits: np.ndarray, start: int) -> np.ndarray:
        del start
        found = [kl_divergence(reference, logits, temperature=t) for t in TEMPERATURES]
        return np.stack([*found, rescaled_divergence(reference, logits)], axis=-1)

    table = single_layer_sweep(
        engine,
        judge.fit,
        alternatives,
        measure,
        grams=(gram, rescaled),
        checkpoint=checkpoint,
        progress=progress,
    )
    judge.passes += sweep_passes(judge, bits, activation_bits)
    costs = np.maximum(table, 0.0).reshape(len(layers) * each, -1).T
    found = []

    def add(name: str, k: np.ndarray, correlation: np.ndarray | None = None) -> None:
        values, beside = spread(k, len(layers), len(bits))
        found.append(
            Scores(
                proxy=name,
                layers=layers,
                bits=tuple(bits),
                values=values,
                activations=beside if activation_bits else None,
                activation_bits=tuple(activation_bits),
                coupling=None if correlation is None else coupling_of(k, correlation),
            )
        )

    for temperature, k in zip(TEMPERATURES, costs[:-1], strict=True):
        add(f"kl{_at(temperature)}", k)
        add(f"logit-coupling{_at(temperature)}", k, gram.correlation())
    add("rescaled-coupling", costs[-1], rescaled.correlation())
    return found
