"""`table`: many random plans of a network, each really quantized and measured."""

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.api.inputs import (
    as_data,
    as_eval_data,
    as_model,
    inputs_of,
    labelled_batches,
)
from proxyq.api.method import DEFAULT_SAMPLES, GroupSizes, as_group_sizes, as_rounding
from proxyq.api.model_spec import ModelSpec, check_text
from proxyq.devices import several
from proxyq.engine import Edits, Engine
from proxyq.engine.divergence import cross_entropy_of, kl_divergence, rescaled_divergence
from proxyq.engine.rounded import sized_layers
from proxyq.errors import ProxyqError, UsageError
from proxyq.executor import Executor
from proxyq.executor import executor as executor_of
from proxyq.files import digest_json
from proxyq.model.model import Model, logits_of
from proxyq.model.network import LAYERS_AT, network
from proxyq.progress import Progress, silent
from proxyq.provenance import provenance
from proxyq.proxies import Cache
from proxyq.ptq.measure import top1
from proxyq.ptq.plan_edits import PlanEdits
from proxyq.quantize import Rounding, check_bits
from proxyq.search.draw import draw_plans
from proxyq.search.table_file import (
    FLOAT_BITS,
    FloatNetwork,
    MeasuredTable,
    TableImages,
    TableLayer,
    TablePlan,
)
from proxyq.widths import CHANNEL

DEFAULT_PLANS = 101
DEFAULT_TABLE_BITS = (2, 3, 4)
CORRECTIONS = ("none", "weights", "statistics")
TOGETHER = 4
"""Plans that one pass over the images serves."""
RESIDENT = 1 << 30
"""Bytes of prepared images that are kept; more are prepared anew at every pass."""
MEASURES = ("top1", "loss", "kl", "rescaled")


def table(
    model: Any = None,
    data: Any = None,
    eval_data: Any = None,
    *,
    plans: int | Sequence[Sequence[int]] = DEFAULT_PLANS,
    bits: Sequence[int] = DEFAULT_TABLE_BITS,
    draw: str = "uniform",
    activation_bits: int | None = None,
    correction: str = "statistics",
    extra_code: str = "negative",
    group_size: GroupSizes = None,
    samples: int = DEFAULT_SAMPLES,
    eval_samples: int | None = None,
    seed: int = 0,
    memory: int | None = None,
    executor: str | Executor | None = None,
    cache_dir: str | os.PathLike[str] | Cache | None = None,
    progress: Progress = silent,
) -> MeasuredTable:
    """Accuracy, loss and divergence of random plans: the truth that proxies are ranked against.

    **Arguments:**

    - `model`, `data` (calibration images), `eval_data` (labelled): as for `evaluate`.
    - `plans`: how many, or the plans themselves, each the bits of all layers.
    - `bits`, `draw`, `seed`: what plans are drawn from, how (`proxyq.search.draw`), and by which
      seed. `activation_bits`: of every layer's input, `None` for float.
    - `correction`: `none`, `weights` or `statistics`, the default: without it random plans at
      two to four bits are nearly all wrecked, and their ranking tells nothing of methods.
    - `extra_code`, `group_size`: of the weights' rounding, as for `search`.
    - `samples`: calibration images; `eval_samples`: the first so many images to measure on.
    - `executor`: an executor, `serial`, `process:N` or `ray:N`. Other processes load model and data
      by themselves: these must be text then, or a `ModelSpec`.
    - `cache_dir`: where finished plans are kept, for a run that goes on after a kill.

    **Raises** `UsageError` for wrong arguments.
    """
    runner = executor_of(executor)
    if correction not in CORRECTIONS:
        raise UsageError(
            f"`correction` of a table must be one of {', '.join(CORRECTIONS)}, the same for all "
            f"plans, got {correction!r}."
        )
    bits, seed = [_whole(b, "bits") for b in bits], _whole(seed, "seed")
    if seed < 0:
        raise UsageError(f"`seed` must be at least 0, got {seed}.")
    if activation_bits is not None:
        activation_bits = _whole(activation_bits, "activation_bits")
    for width in (*bits, *([] if activation_bits is None else [activation_bits])):
        check_bits(width, "bits")
    size, sizes = as_group_sizes(group_size)
    if sizes:
        raise UsageError(
            "`group_size` (--group-size) of a table must be one size, since its plans differ in "
            f"bits alone, got {', '.join(str(one or CHANNEL) for one in sizes)}."
        )
    rounding = as_rounding(extra_code, size)
    if runner.remote:
        check_text(model, data, eval_data)
    setting: dict[str, Any] = {
        "correction": correction,
        "activation_bits": activation_bits,
        "rounding": asdict(rounding),
        "samples": samples,
        "eval_samples": eval_samples,
        "memory": memory,
    }
    bench = Bench(as_model(model), data, eval_data, **setting)
    layers = sized_layers(network(bench.model, LAYERS_AT), rounding)
    if not isinstance(plans, Sequence) and np.ndim(plans) == 0:
        plans = _whole(plans, "plans")
    if isinstance(plans, int):
        wanted = draw_plans(len(layers), bits, plans, how=draw, seed=seed)
    else:
        wanted, draw = [tuple(map(int, plan)) for plan in plans], "given"
        _check_plans(wanted, len(layers))
    float_network = bench.float_network()
    cache = Cache.of(cache_dir)
    facts = {
        **cache.facts(bench.model, inputs=bench.inputs, labels=None, rounding=rounding),
        **setting,
        "preprocessing": asdict(bench.model.preprocessing),
        "data": bench.identity,
        "plans": wanted,
        "measures": MEASURES,
    }
    facts.pop("cores", None)  # six digits are kept, which the threads do not change
    kept = cache.checkpoint(digest_json(facts), batches=False)
    values = (kept.load("table") or {}).get("values", np.full((len(wanted), len(MEASURES)), np.nan))
    left = [i for i in range(len(wanted)) if np.isnan(values[i, 0])]
    groups = [left[i : i + TOGETHER] for i in range(0, len(left), TOGETHER)]
    tasks = [[wanted[i] for i in group] for group in groups]
    finished = len(wanted) - len(left)
    if runner.remote:
        found = runner.run(
            "proxyq.api.table:worker", _setup(model, data, eval_data, setting), tasks
        )
    else:
        found = enumerate(map(bench.measure, tasks))
    try:
        for number, records in found:
            for index, record in zip(groups[number], records, strict=True):
                # What is not finite is kept as infinite: NaN is what has not been measured.
                row = [np.inf if record[name] is None else record[name] for name in MEASURES]
                values[index] = row
            finished += len(records)
            progress("plans", finished, len(wanted))
            if kept.due():
                kept.save("table", {"values": values})
    finally:
        # Also of a table that is whole: it has yet to be written.
        if left:
            kept.save("table", {"values": values})
    return MeasuredTable(
        schema="proxyq/table/1",
        model=bench.model.record(),
        images=_images(bench.model),
        method={
            "bits": sorted(set(bits))
            if draw != "given"
            else sorted({b for p in wanted for b in p}),
            "draw": draw,
            "seed": seed if draw != "given" else None,
            "activation_bits": activation_bits,
            "correction": correction,
            "rounding": setting["rounding"],
            "samples": bench.samples,
        },
        float=float_network,
        layers=[
            TableLayer(name=one.name, weights=int(one.weights), macs=int(one.macs))
            for one in layers
        ],
        plans=[
            _plan(plan, row, layers, activation_bits)
            for plan, row in zip(wanted, values, strict=True)
        ],
        provenance=provenance(**bench.identity, devices=several()),
    )


def _images(model: Model) -> TableImages | None:
    """What others need to feed the network as it was fed here."""
    if model.image_layout is None:
        return None
    how = model.preprocessing
    return TableImages(
        shape=list(model.input_shape),
        mean=list(how.mean),
        std=list(how.std),
        resize=how.resize,
        size=None if how.size is None else list(how.size),
    )


class Bench:
    """A network on its images, ready to run plans."""

    def __init__(
        self,
        model: Model,
        data: Any,
        eval_data: Any,
        *,
        correction: str,
        activation_bits: int | None,
        rounding: Mapping[str, Any],
        samples: int,
        eval_samples: int | None,
        memory: int | None,
    ):
        self.model, self.correction, self.activation_bits = model, correction, activation_bits
        calibration = as_data(data, model)
        if calibration is None and (correction == "statistics" or activation_bits is not None):
            raise UsageError(
                f"calibration images are needed by correction={correction!r} or by activation "
                "bits: give `data` (--data)."
            )
        inputs = None if calibration is None else inputs_of(calibration, model, samples, None)
        self.inputs = inputs
        self.samples = 0 if inputs is None else len(jax.tree.leaves(inputs)[0])
        self.test = as_eval_data(eval_data, model)
        if eval_samples is not None:
            if eval_samples < 1:
                raise UsageError(f"`eval_samples` must be at least 1, got {eval_samples}.")
            self.test = self.test.subset(np.arange(min(eval_samples, len(self.test))))
        fitting = Engine.build(model, self.samples or LAYERS_AT, memory=memory)
        self.edits = PlanEdits(fitting, inputs, Rounding(**rounding))
        self.engine = Engine.build(model, len(self.test), memory=memory)
        self.identity = {
            "data": None if calibration is None else calibration.identity,
            "eval_data": self.test.identity,
        }
        self._prepared: list[tuple[Any, np.ndarray]] | None = None
        self._reference: np.ndarray | None = None

    def batches(self) -> Iterator[tuple[Any, np.ndarray]]:
        """Prepared batches and their labels; kept where they are small."""
        if self._prepared is not None:
            yield from self._prepared
            return
        kept: list[tuple[Any, np.ndarray]] | None = []
        size = 0
        for batch, labels in labelled_batches(self.test, self.model, self.engine.batch_size):
            size += sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(batch))
            if kept is not None and size <= RESIDENT:
                kept.append((batch, labels))
            else:
                kept = None
            yield batch, labels
        self._prepared = kept

    def _logits(self, networks: Sequence[Edits]) -> list[np.ndarray]:
        """`[images, classes]` of each network, in one pass."""
        parts: list[list[np.ndarray]] = [[] for _ in networks]
        for batch, labels in self.batches():
            start = self.engine.start(jax.tree.map(jnp.asarray, batch))
            for part, edits in zip(parts, networks, strict=True):
                out = np.asarray(logits_of(self.engine.resume(start, 0, edits)))
                part.append(out[: len(labels)])
        return [np.concatenate(part) for part in parts]

    @property
    def labels(self) -> np.ndarray:
        """The classes of the images that are measured on."""
        assert self.test.labels is not None
        return np.asarray(self.test.labels)

    @property
    def reference(self) -> np.ndarray:
        """The float network's logits."""
        if self._reference is None:
            (self._reference,) = self._logits([{}])
        return self._reference

    def float_network(self) -> FloatNetwork:
        """The float network's record."""
        z = self.reference
        if not np.isfinite(z).all():
            raise ProxyqError(
                f"the float network {self.model.name!r} gives logits that are not finite on "
                f"{int((~np.isfinite(z).all(axis=-1)).sum())} of {len(z)} images: check its "
                "weights and how the images are prepared."
            )
        return FloatNetwork(
            top1=_digits(top1(z, self.labels)),
            loss=_digits(cross_entropy_of(z, self.labels).mean()),
            images=len(z),
        )

    def measure(self, plans: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """`MEASURES` of each plan; `None` for what is not finite."""
        reference = self.reference
        networks = [
            self.edits([(b, self.activation_bits) for b in plan], self.correction) for plan in plans
        ]
        found = []
        for z in self._logits(networks):
            record: dict[str, Any] = {"top1": _digits(top1(z, self.labels))}
            finite = bool(np.isfinite(z).all())
            record["loss"] = _digits(cross_entropy_of(z, self.labels).mean()) if finite else None
            for name, how in (("kl", kl_divergence), ("rescaled", rescaled_divergence)):
                record[name] = _digits(how(reference, z).mean()) if finite else None
            found.append(record)
        return found


def worker(setup: Mapping[str, Any]) -> Any:
    """What measures plans in another process."""
    bench = Bench(
        ModelSpec.from_json(setup["model"]).load(),
        setup["data"],
        setup["eval_data"],
        **setup["setting"],
    )
    return bench.measure


def _setup(model: Any, data: Any, eval_data: Any, setting: Mapping[str, Any]) -> dict[str, Any]:
    spec = model if isinstance(model, ModelSpec) else ModelSpec(name=model)
    return {
        "model": spec.to_json(),
        "data": data,
        "eval_data": eval_data,
        "setting": dict(setting),
    }


def _whole(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"`{name}` must be whole, got {value!r}.") from None


def _check_plans(plans: Sequence[Sequence[int]], layers: int) -> None:
    if not plans:
        raise UsageError("`plans` must hold at least one plan.")
    for plan in plans:
        if len(plan) != layers:
            raise UsageError(
                f"every plan must have bits for the network's {layers} layers, got {len(plan)}."
            )
        for width in plan:
            check_bits(width, "bits of a plan")


def _plan(
    plan: Sequence[int], row: np.ndarray, layers: Sequence[Any], activation_bits: int | None
) -> TablePlan:
    beside = FLOAT_BITS if activation_bits is None else activation_bits
    measured = {
        name: float(value) if np.isfinite(value) else None
        for name, value in zip(MEASURES, row, strict=True)
    }
    return TablePlan(
        bits=list(plan),
        **measured,  # type: ignore[arg-type]
        size_bits=sum(
            one.weights * b + one.scale_bits for one, b in zip(layers, plan, strict=True)
        ),
        bops=sum(int(one.macs) * b * beside for one, b in zip(layers, plan, strict=True)),
    )


def _digits(value: Any) -> float:
    """Six significant digits: what two processes agree on, however they split their sums."""
    return float(f"{float(value):.6g}")
