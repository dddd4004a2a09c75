"""Record what proxies need of every layer, in as few passes over the images as they allow.

One forward pass, one backward pass, one sweep and one look at the inputs serve all proxies
that ask for the same setting.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np

from proxyq.checkpoint import Checkpoint
from proxyq.engine.alternatives import CORRECTED, beside_each_other, choices
from proxyq.engine.divergence import (
    cross_entropy_of,
    divergence_from,
    kl_divergence,
    rescaled_divergence,
    two_classes,
)
from proxyq.engine.engine import Engine
from proxyq.engine.gauss_newton import gauss_newton
from proxyq.engine.gradients import GRADIENT_NEEDS, record_gradients
from proxyq.engine.gram import Gram
from proxyq.engine.memory import (
    CHANGES_MEMORY,
    bytes_per_image,
    evenly,
    outputs_per_image,
    too_little,
)
from proxyq.engine.objectives import LABELS, Targets, objective, objective_for, targets
from proxyq.engine.pairs import PairLoss, PairLosses, RowWork, pair_row, pair_sweep, pairs_by_row
from proxyq.engine.ranges import input_errors
from proxyq.engine.rounded import rounded_columns
from proxyq.engine.sweep import Measure, single_layer_sweep
from proxyq.engine.walk import FORWARD_NEEDS, record_forward
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.features import features
from proxyq.model.graph import Var
from proxyq.model.layers import Layer
from proxyq.progress import Progress, silent
from proxyq.quantize import Rounding

SWEEP_NEEDS = {
    "kl": "KL to the float network when this layer alone is rounded, [bits], in nats",
    "rescaled-kl": "the same, each prediction made as sure as suits it best, [bits], in nats",
    "loss-change": "rise of the cross-entropy when this layer alone is rounded, [bits], in nats",
    "logit-mse": "mean squared change of the logits when this layer alone is rounded, [bits]",
}
PAIR_NEEDS = {
    "coupling": "how alike the choices of all layers move the logits: `taps.correlation`",
    "rescaled-coupling": "the same of what is not their scale: `taps.rescaled_correlation`",
    "pairs": "the loss with each choice, and with each pair of choices: `taps.pairs`",
    "tangents": "KL to the float network to second order, for pairs of choices: `taps.curvature`",
}
OF_ALL = {
    "coupling": "correlation",
    "rescaled-coupling": "rescaled_correlation",
    "pairs": "pairs",
    "tangents": "curvature",
}
"""Where `Taps` has what is of all layers together."""
NEEDS = {
    "weight": "the layer's weight, batch norm folded in",
    **FORWARD_NEEDS,
    **GRADIENT_NEEDS,
    **SWEEP_NEEDS,
    **PAIR_NEEDS,
    "input-error": "mean squared error of rounding what the layer reads, and its variance",
    "engine": "the network, ready to run, differentiate and change: `taps.engine`, `taps.inputs`",
}

Recorded = dict[str, dict[str, Any]]
"""By layer, then by need."""

# Random probes have squares that mean something, and nothing else.
_NO_PROBES = frozenset(
    {"gradient", "gradient-magnitudes", "input-gradients", "loss-change", "pairs"}
)
PAIR_LOSSES = ("kl", "cross-entropy")

# Which options of `TapOptions` govern which needs.
GOVERNS = {
    "batch_norm": frozenset(FORWARD_NEEDS),
    "feature": frozenset({"feature", "gram", "pooled", "codes", "sample"}),
    "centre": frozenset({"gram"}),
    "loss": frozenset(GRADIENT_NEEDS),
    "labels": frozenset({*GRADIENT_NEEDS, "loss-change", "pairs", "engine"}),
    "temperature": frozenset({"kl", "pairs", "tangents"}),
    "pair_loss": frozenset({"pairs"}),
    "correction": frozenset({*SWEEP_NEEDS, *PAIR_NEEDS}),
}


@dataclass(frozen=True, kw_only=True)
class TapOptions:
    """How tensors are recorded.

    - `batch_norm`: normalise with `running` statistics, or with those of the `batch`.
    - `feature`: what a layer's feature is: its `post-activation` tensor (residual sum and
      activation included), or its own `output`.
    - `centre`: subtract each feature's mean over the images before the Gram matrix.
    - `loss`: what gradients are of: `cross-entropy`, `log-logit` or `logit-sum`.
    - `labels`: the targets: `data`, `predicted`, `sampled`, `probes` (see `Targets`), or `auto`
      (those of the data where there are any, else predicted).
    - `temperature`: of both softmaxes in KL.
    - `pair_loss`: what `pairs` measures: `kl` to the float network, or `cross-entropy`.
    - `correction`: of a layer that is measured alone: `none`, `weights` or `statistics` (see
      `engine.statistics`).
    """

    batch_norm: str = "running"
    feature: str = "post-activation"
    centre: bool = True
    loss: str = "cross-entropy"
    labels: str = "auto"
    temperature: float = 1.0
    pair_loss: str = "kl"
    correction: str = "none"

    def __post_init__(self) -> None:
        if self.feature not in ("post-activation", "output"):
            raise UsageError(
                f"`feature` must be 'post-activation' or 'output', got {self.feature!r}."
            )
        if self.labels not in LABELS:
            raise UsageError(f"`labels` must be one of {', '.join(LABELS)}, got {self.labels!r}.")
        objective(self.loss)
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"`temperature` must be positive, got {self.temperature}.")
        if self.pair_loss not in PAIR_LOSSES:
            raise UsageError(
                f"`pair_loss` must be one of {', '.join(PAIR_LOSSES)}, got {self.pair_loss!r}."
            )
        if self.pair_loss == "cross-entropy" and self.temperature != 1:
            raise UsageError(
                f"`temperature` goes with pair_loss='kl': leave out {self.temperature:g}."
            )
        if self.correction not in CORRECTED:
            raise UsageError(
                f"`correction` of a proxy must be one of {', '.join(CORRECTED)}, got "
                f"{self.correction!r}."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTap:
    """What was recorded of one layer; asking for more than was recorded is an error.

    What a sweep measures with weights rounded (`kl`) it also measures with the layer's input
    rounded (`activation_kl`). `weight` is the weight at the layer's first use, batch norm folded
    in; `columns` the same as `[fan_in, channels]`, one column an output channel.
    `same_feature_as` is the first layer that hands on the same tensor, usually the layer itself.
    """

    layer: Layer
    engine: Engine
    site: int
    recorded: Mapping[str, Any]
    same_feature_as: str
    rounding: Rounding

    @property
    def weight(self) -> Any:
        """The weight as the graph lays it out."""
        return self.engine.weight(self.site)

    @cached_property
    def columns(self) -> Any:
        """The weight as `[fan_in, channels]`."""
        return self.engine.columns(self.site)

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    def __getattr__(self, name: str) -> Any:
        need = name.replace("_", "-")
        if need.removeprefix("activation-") in NEEDS:
            recorded = object.__getattribute__(self, "recorded")
            if need in recorded:
                return recorded[need]
            raise ProxyqError(f"a proxy that reads `{name}` must say so: needs=({need!r},).")
        raise AttributeError(name)

    def quantized(self, bits: int) -> Any:
        """`columns` rounded to `bits`, on symmetric grids."""
        return rounded_columns(self.engine, self.site, bits, self.rounding)


@dataclass(frozen=True, kw_only=True, eq=False)
class Taps:
    """The taps of all layers, in the network's order, and the candidate bit-widths, some of which
    may bring a group size (`proxyq.quantize.GroupedBits`).

    - `engine`: the network as the taps were recorded with; `tape_engine` the same with batches
      small enough to be differentiated; `inputs`, `targets`: the images and what is true of
      them, for measured proxies (need `engine`).
    - `correlation`: with the need `coupling`, `rho` of the logits' changes for all choices,
      `[choices, choices]`: for each layer its `bits`, then its `activation_bits`;
      `rescaled_correlation`: with the need `rescaled-coupling`, of what is not their scale.
    - `pairs`: with the need `pairs`, the losses of the same choices; `curvature`: with the need
      `tangents`, half the curvature of KL between them.
    - `checkpoint`: where a long computation of one proxy may keep how far it is.
    """

    taps: tuple[LayerTap, ...]
    bits: tuple[int, ...]
    engine: Engine
    activation_bits: tuple[int, ...] = ()
    images: int = 0
    options: TapOptions = field(default_factory=TapOptions)
    inputs: Any = None
    labels: Any = None
    seed: int = 0
    memory: int | None = None
    rounding: Rounding = field(default_factory=Rounding)
    correlation: np.ndarray | None = None
    rescaled_correlation: np.ndarray | None = None
    pairs: PairLosses | None = None
    curvature: np.ndarray | None = None
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    progress: Progress = silent

    def __iter__(self) -> Iterator[LayerTap]:
        return iter(self.taps)

    def __len__(self) -> int:
        return len(self.taps)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in order."""
        return tuple(tap.layer for tap in self.taps)

    @property
    def targets(self) -> Targets:
        """Which class counts as true for every image, by the option `labels`."""
        return targets(self.options.labels, self.labels, self.seed)

    @cached_property
    def tape_engine(self) -> Engine:
        """An engine whose batches are small enough to keep all that derivatives need."""
        return _tape_engine(self.engine, self.images, self.memory)

    def map(self, function: Callable[[LayerTap], Any]) -> np.ndarray:
        """`[layers]`: one number for each layer."""
        return np.asarray([np.asarray(function(tap)) for tap in self.taps], np.float64)

    def table(self, function: Callable[[LayerTap, int], Any]) -> np.ndarray:
        """`[layers, bits]`: one number for each layer and bit-width."""
        rows = [[np.asarray(function(tap, bits)) for bits in self.bits] for tap in self.taps]
        return np.asarray(rows, np.float64)


def collect(
    engine: Engine,
    inputs: Any,
    needs: Sequence[str],
    bits: Sequence[int],
    *,
    labels: Any = None,
    activation_bits: Sequence[int] = (),
    options: TapOptions | None = None,
    rounding: Rounding | None = None,
    seed: int = 0,
    memory: int | None = None,
    checkpoint: Checkpoint | None = None,
    pair_work: RowWork | None = None,
    progress: Progress = silent,
) -> Taps:
    """Record what `needs` names (see `NEEDS`) of every layer.

    **Arguments:**

    - `inputs`: the images, `[images, …]`, or `None` when only weights are needed; `labels`
      are theirs, `[images]`, where they have any.
    - `bits`: candidate bit-widths of weights; `activation_bits`: of what layers read.
    - `rounding`: how weights are rounded; `seed`: of what is drawn.
    - `memory`: bound on the activations held at once.
    - `checkpoint`: keeps how far the long passes are.
    - `pair_work`: measures rows of the table of pairs elsewhere, as `pair_rows` does.

    **Raises** `UsageError` for an unknown need, or when images are needed and missing.
    """
    options, rounding = options or TapOptions(), rounding or Rounding()
    checkpoint = checkpoint or Checkpoint()
    if unknown := set(needs) - set(NEEDS):
        raise UsageError(f"unknown need {min(unknown)!r}: known are {', '.join(NEEDS)}.")
    network, bits = engine.network, tuple(bits)
    recorded: Recorded = {name: {} for name in network.names}
    images = _images(engine, inputs, options, memory) if set(needs) - {"weight"} else 0
    aims = targets(options.labels, labels, seed) if set(needs) & GOVERNS["labels"] else None
    unread = {"pairs"} if options.pair_loss == "kl" else set()  # which needs no targets
    if aims is not None and aims.how == "probes" and set(needs) & _NO_PROBES - unread:
        raise UsageError("labels='probes' are for squared gradients alone: use labels='sampled'.")
    forward = tuple(need for need in needs if need in FORWARD_NEEDS)
    if forward:
        record_forward(
            engine,
            inputs,
            forward,
            bits,
            rounding,
            recorded,
            feature=options.feature,
            centre=options.centre,
            memory=memory,
            progress=progress,
        )
    gradients = tuple(need for need in needs if need in GRADIENT_NEEDS)
    if gradients:
        assert aims is not None
        found = record_gradients(
            _tape_engine(engine, images, memory),
            inputs,
            gradients,
            bits,
            objective_for(options.loss, aims),
            aims,
            rounding=rounding,
            checkpoint=checkpoint,
            progress=progress,
        )
        for name, values in zip(network.names, found, strict=True):
            recorded[name].update(values)
    whole: dict[str, Any] = {}
    if set(needs) & {*SWEEP_NEEDS, *PAIR_NEEDS}:
        whole = _record_changed(
            engine,
            inputs,
            needs,
            bits,
            recorded,
            activation_bits=tuple(activation_bits),
            options=options,
            aims=aims,
            rounding=rounding,
            memory=memory,
            pair_work=pair_work,
            checkpoint=checkpoint,
            progress=progress,
        )
    if "input-error" in needs:
        widths = tuple(dict.fromkeys([*bits, *activation_bits]))
        for name, values in input_errors(engine, inputs, widths).items():
            errors = dict(zip(widths, values["error"].tolist(), strict=True))
            recorded[name]["input-error"] = {**errors, "variance": float(values["variance"])}
    taps = _layer_taps(engine, recorded, options, rounding)
    return Taps(
        taps=taps,
        bits=bits,
        engine=engine,
        activation_bits=tuple(activation_bits),
        images=images,
        options=options,
        inputs=inputs,
        labels=labels,
        seed=seed,
        memory=memory,
        rounding=rounding,
        **whole,
        checkpoint=checkpoint,
        progress=progress,
    )


def _images(engine: Engine, inputs: Any, options: TapOptions, memory: int | None) -> int:
    """How many images there are, which the options can do with."""
    if inputs is None:
        raise UsageError("this proxy needs images: give calibration data.")
    images = len(jax.tree.leaves(inputs)[0])
    if options.batch_norm == "batch":
        _check_batch(engine, images, memory)
    return images


def _record_changed(
    engine: Engine,
    inputs: Any,
    needs: Sequence[str],
    bits: tuple[int, ...],
    recorded: Recorded,
    *,
    activation_bits: tuple[int, ...],
    options: TapOptions,
    aims: Targets | None,
    rounding: Rounding,
    memory: int | None,
    pair_work: RowWork | None,
    checkpoint: Checkpoint,
    progress: Progress,
) -> dict[str, Any]:
    """What is measured with layers changed: each layer's own into `recorded`; **returns** what is
    of all layers together, as `Taps` names it (`OF_ALL`)."""
    network, images = engine.network, len(jax.tree.leaves(inputs)[0])
    kept: dict[str, Any] = {"checkpoint": checkpoint, "progress": progress}
    whole: dict[str, Any] = {}
    small = _small_enough(engine, 0, images, memory)
    alternatives = choices(
        small,
        inputs,
        bits,
        activation_bits,
        rounding=rounding,
        correction=options.correction,
        progress=progress,
    )
    size = len(network.names) * (len(bits) + len(activation_bits))
    grams = {
        name: Gram(size, rescaled=name == "rescaled-coupling")
        for name in ("coupling", "rescaled-coupling")
        if name in needs
    }
    swept = tuple(need for need in needs if need in SWEEP_NEEDS)
    if swept or grams:
        swept = swept or ("kl",)  # Gram matrices are taken up by a sweep, which measures something
        table = single_layer_sweep(
            _small_enough(engine, size * len(grams), images, memory) if grams else small,
            inputs,
            alternatives,
            _measure(swept, options, aims),
            grams=list(grams.values()),
            **kept,
        )
        for row, name in enumerate(network.names):
            for i, need in enumerate(swept):
                recorded[name][need] = table[row, : len(bits), i]
                recorded[name]["activation-" + need] = table[row, len(bits) :, i]
        for name, gram in grams.items():
            whole[OF_ALL[name]] = gram.correlation()
    if "pairs" in needs:
        inside = beside_each_other(len(bits), len(activation_bits))
        given = (small, inputs, alternatives, _pair_loss(options, aims))
        if pair_work is None:
            found = pair_sweep(*given, inside=inside, **kept)
        else:
            found = pairs_by_row(*given, pair_work, inside=inside, **kept)
        whole[OF_ALL["pairs"]] = found
    if "tangents" in needs:
        taped = _tape_engine(engine, images, memory)
        if memory is not None:
            taped = _small_enough(taped, size, images, memory)
        whole[OF_ALL["tangents"]] = gauss_newton(
            taped, inputs, alternatives, temperature=options.temperature, **kept
        )
    return whole


def _layer_taps(
    engine: Engine, recorded: Recorded, options: TapOptions, rounding: Rounding
) -> tuple[LayerTap, ...]:
    network = engine.network
    owner: dict[Var, str] = {}
    handed_on = features(network, options.feature).values()
    return tuple(
        LayerTap(
            layer=layer,
            engine=engine,
            site=network.sites_of(layer.name)[0],
            recorded=recorded[layer.name],
            same_feature_as=owner.setdefault(var, layer.name),
            rounding=rounding,
        )
        for layer, var in zip(network.layers, handed_on, strict=True)
    )


def pair_rows(
    engine: Engine,
    inputs: Any,
    bits: Sequence[int],
    *,
    labels: Any = None,
    activation_bits: Sequence[int] = (),
    options: TapOptions,
    rounding: Rounding,
    seed: int = 0,
) -> Callable[[int], tuple[float, np.ndarray]]:
    """What measures a row of the table of pairs, as `collect` would with the need `pairs`."""
    aims = targets(options.labels, labels, seed)
    alternatives = choices(
        engine, inputs, bits, activation_bits, rounding=rounding, correction=options.correction
    )
    inside = beside_each_other(len(bits), len(activation_bits))
    loss = _pair_loss(options, aims)
    return lambda choice: pair_row(engine, inputs, alternatives, loss, choice, inside=inside)


def _check_batch(engine: Engine, images: int, memory: int | None) -> None:
    """Refuse statistics of a batch that `memory` has no room for."""
    if images > engine.batch_size:
        raise ProxyqError(
            f"statistics of the batch need all {images} images at once, but memory allows "
            f"{engine.batch_size}: give fewer images or more memory."
        )
    least = 2 * images * bytes_per_image(engine.network.graph)
    if memory is not None and least > memory:
        what = f"statistics of the batch need all {images} images at once, which"
        raise too_little(what, least, memory, ", or fewer images")


def _tape_engine(engine: Engine, images: int, memory: int | None) -> Engine:
    return Engine.build(engine.network.model, max(images, 1), memory=memory, tape=True)


def _small_enough(engine: Engine, choices: int, images: int, memory: int | None) -> Engine:
    """The engine, or one of smaller batches where the outputs of a batch are too many: those of
    each of the `choices` that are held, and what compares two of them, in float64.

    Those of a language model are a vocabulary for each token.

    **Raises** `UsageError` where a single image's are.
    """
    graph = engine.network.graph
    outputs = outputs_per_image(graph)
    bound, per_image = CHANGES_MEMORY, 4 * choices * outputs
    if memory is not None:
        bound = memory
        per_image += 2 * bytes_per_image(graph) + 8 * _COMPARED_AT_ONCE * outputs
    if per_image > bound:
        raise too_little(
            f"what {choices} choices change of the {outputs:,} outputs of one image",
            per_image,
            bound,
            ", or fewer --bits",
        )
    if memory is None and (not per_image or engine.batch_size <= bound // per_image):
        return engine
    return engine.with_at_most(evenly(images, bound // per_image, engine.placement.images))


_COMPARED_AT_ONCE = 12
"""Arrays of a batch's outputs that a divergence and its logarithms hold, in float64."""


def _measure(needs: tuple[str, ...], options: TapOptions, aims: Targets | None) -> Measure:
    """`[images, needs]` of a changed network's logits."""

    def measure(reference: np.ndarray, logits: np.ndarray, start: int) -> np.ndarray:
        found = []
        for need in needs:
            if need == "kl":
                found.append(kl_divergence(reference, logits, temperature=options.temperature))
            elif need == "rescaled-kl":
                found.append(rescaled_divergence(reference, logits))
            elif need == "logit-mse":
                # mean over outputs of (z' - z)^2
                change = np.asarray(logits, np.float64) - reference
                found.append(np.mean(change.reshape(len(change), -1) ** 2, axis=1))
            else:
                assert aims is not None
                true = np.asarray(aims.of(two_classes(reference), start, len(reference)))
                found.append(cross_entropy_of(logits, true) - cross_entropy_of(reference, true))
        return np.stack(found, axis=-1)

    return measure


def _pair_loss(options: TapOptions, aims: Targets | None) -> PairLoss:
    """What `pairs` measures of a changed network's logits, `[images]`."""
    if options.pair_loss == "kl":
        return lambda reference, start: divergence_from(reference, options.temperature)

    def loss(reference: np.ndarray, start: int) -> Callable[[np.ndarray], np.ndarray]:
        assert aims is not None
        true = np.asarray(aims.of(two_classes(reference), start, len(reference)))
        return lambda logits: cross_entropy_of(logits, true)

    return loss
