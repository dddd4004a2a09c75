"""What a proxy is: a pure function of taps, filed under its name with what it needs."""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from proxyq.checkpoint import Checkpoint
from proxyq.engine import (
    GOVERNS,
    GRADIENT_NEEDS,
    NEEDS,
    PAIR_NEEDS,
    SWEEP_NEEDS,
    TapOptions,
    Taps,
)
from proxyq.errors import ProxyqError, UsageError, near
from proxyq.model.layers import EMBEDDING, TIED_EMBEDDING, Layer
from proxyq.model.model import Model
from proxyq.progress import Progress, silent
from proxyq.quantize import Rounding
from proxyq.registry import Registry
from proxyq.widths import groups_of_all

Shape = Literal["layers", "layers bits"]
COST_CLASSES = {
    "weights": "looks at the weights alone",
    "forward": "a few forward passes",
    "backward": "one backward pass",
    "curvature": "many derivative passes",
    "sweep": "the network with each layer rounded at each bit-width",
    "pairs": "the network with every two layers rounded at every two bit-widths",
    "training": "minutes of training",
}
MOST = 1e150
"""Scores beyond this cannot be squared and summed."""


class Result(NamedTuple):
    """What a kernel may return instead of an array.

    - `values`: `[layers]` or `[layers, bits]`, as the proxy's shape says.
    - `activations`: `[layers, activation_bits]`, the cost of rounding what each layer reads.
    - `notes`: what else was found out, as plain JSON.
    - `coupling`: of a pairwise proxy, see `Scores`.
    """

    values: Any
    activations: Any = None
    notes: Mapping[str, Any] = {}
    coupling: Any = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """A proxy's answer: how sensitive each layer is.

    - `values`: `[layers]` (an importance: the higher, the more bits the layer deserves) or
      `[layers, bits]` (a cost: what the bit-width is predicted to add to the loss).
    - `cost`: how an importance becomes costs, unless asked otherwise (see `as_cost`).
    - `activations`: `[layers, activation_bits]`, costs of rounding what the layers read.
    - `coupling`: of a pairwise proxy, symmetric `[choices, choices]`, where each layer's choices
      are its `bits` and then its `activation_bits`. A plan with the one-hot choices x is
      predicted to cost `x' G x`, and that is all: `values` and `activations` are what each choice
      was measured to cost alone.
    """

    proxy: str
    layers: tuple[Layer, ...]
    bits: tuple[int, ...]
    values: np.ndarray
    cost: str = "linear-bits"
    activations: np.ndarray | None = None
    activation_bits: tuple[int, ...] = ()
    coupling: np.ndarray | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def shape(self) -> Shape:
        """Whether there is one number for each layer, or one for each layer and bit-width."""
        return "layers" if self.values.ndim == 1 else "layers bits"

    def __str__(self) -> str:
        """A table, the most sensitive layer first."""
        columns = self.values.reshape(len(self.layers), -1)
        heads = ["score"] if self.shape == "layers" else [f"{b} bit" for b in self.bits]
        lines = [f"{'layer':<44}" + "".join(f"{head:>11}" for head in heads)]
        for index in np.argsort(-columns[:, 0], kind="stable"):
            numbers = "".join(f"{value:11.4g}" for value in columns[index])
            lines.append(f"{self.layers[index].name[:43]:<44}{numbers}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, eq=False)
class Proxy:
    """A registered proxy; call it on a model, or its `on` with taps that you have.

    - `needs`: what must be recorded (keys of `proxyq.engine.NEEDS`).
    - `shape`: whether it gives an importance for each layer, or a cost for each bit-width.
    - `passes`: forward and backward passes over the images, as text; `cost_class`: a key of
      `COST_CLASSES`.
    - `options`: keyword options and their defaults; `fixed`: tap options that are part of the
      method.
    - `cost`: how its importance becomes costs by default.
    - `activations`: whether it also gives costs of rounding what layers read.
    - `random`: whether, with its default options, scores depend on the key (or seed).
    - `lookups`: whether it can score embeddings, tables that are looked up.
    - `groups`: whether costs for each bit-width tell groups of weights from whole channels.
    - `baseline`: whether it is meant to tell nothing, so that equal scores are no mistake.
    """

    name: str
    kernel: Callable[..., Any]
    needs: tuple[str, ...]
    shape: Shape
    passes: str
    reference: str
    summary: str
    options: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    cost: str = "linear-bits"
    cost_class: str = "forward"
    activations: bool = False
    random: bool = False
    baseline: bool = False
    lookups: bool = True
    groups: bool = True

    direction: str = "higher is more sensitive"

    @property
    def needs_images(self) -> bool:
        """Whether calibration images are read."""
        return bool(set(self.needs) - {"weight"})

    @property
    def couples(self) -> bool:
        """Whether it says what layers cost together, which takes a solver for couplings."""
        return bool(set(self.needs) & set(PAIR_NEEDS))

    def check_layers(self, layers: Sequence[Layer]) -> None:
        """Refuse embeddings where it cannot score them."""
        for layer in layers:
            if layer.kind in (EMBEDDING, TIED_EMBEDDING) and not self.lookups:
                raise ProxyqError(
                    f"the proxy {self.name!r} cannot score tables that are looked up, such as "
                    f"{layer.name!r}: leave embeddings out (--embeddings), or use another proxy."
                )

    def check_groups(self, bits: Sequence[int]) -> None:
        """Refuse group sizes to choose from where its costs are the same for all of them."""
        if not self.groups and groups_of_all(bits):
            raise blind_to_groups(self.name)

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options, defaults filled in; unknown names and other kinds of values are refused."""
        for name, value in options.items():
            if name not in self.options:
                raise UsageError(
                    f"the proxy {self.name!r} has no option {name!r}: "
                    + (near(name, list(self.options)) if self.options else "it takes none.")
                )
            kinds, words = _kinds_like(self.options[name])
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise UsageError(
                    f"the option {name!r} of the proxy {self.name!r} must be {words}, got "
                    f"{value!r}."
                )
        settings = {**self.options, **options}
        self.tap_options(settings)  # refuses values that no tap option has
        return settings

    def tap_options(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What governs how its taps are recorded: settings, what is fixed, and else defaults.

        Defaults too: what a proxy leaves alone must not be set by another that shares its taps.
        """
        plain, needs = TapOptions(), set(self.needs)
        governing = {k: getattr(plain, k) for k, governed in GOVERNS.items() if governed & needs}
        if needs:
            governing["batch_norm"] = plain.batch_norm  # weights are folded by it
        governing |= {k: v for k, v in settings.items() if k in GOVERNS} | dict(self.fixed)
        TapOptions(**governing)
        return governing

    def on(
        self,
        taps: Taps,
        *,
        key: Any = None,
        checkpoint: Checkpoint | None = None,
        **options: Any,
    ) -> Scores:
        """Scores from recorded taps.

        **Raises** `ProxyqError` naming layer and proxy when a score would break a solver: not
        finite, too large to be summed, or equal for all layers.
        """
        settings = self.check_options(options)
        self.check_layers(taps.layers)
        self.check_groups(taps.bits)
        key = jax.random.key(0) if key is None else key
        if checkpoint is not None:
            taps = replace(taps, checkpoint=checkpoint)
        own = {name: value for name, value in settings.items() if name not in GOVERNS}
        started = time.perf_counter()
        result = self.kernel(taps, key=key, **own)
        if not isinstance(result, Result):
            result = Result(result)
        bits = taps.bits
        wanted = (len(taps),) if self.shape == "layers" else (len(taps), len(bits))
        values = self._checked(result.values, wanted, taps, bits)
        if self.shape == "layers" and values.min() < 0:
            raise ProxyqError(
                f"the proxy {self.name!r} gives {values.min():g} for layer "
                f"{taps.layers[int(values.argmin())].name!r}, and an importance below zero would "
                "pay for errors: it must not be negative."
            )
        if not self.baseline and len(taps) > 1 and np.all(values == values.flat[0]):
            raise ProxyqError(
                f"the proxy {self.name!r} gives {values.flat[0]:g} for every layer, from "
                f"{taps.layers[0].name!r} on, so it tells nothing apart: check the model's weights "
                "and the data, or use another proxy."
            )
        notes = dict(result.notes)
        unread = settings.get("pair_loss") == "kl"  # which needs no labels
        if settings.get("labels") == "auto" and not unread:
            notes["labels"] = taps.targets.how
        activations = result.activations
        if activations is not None:
            wanted = (len(taps), len(taps.activation_bits))
            activations = self._checked(activations, wanted, taps, taps.activation_bits)
        coupling = None
        if result.coupling is not None:
            coupling = self._checked_coupling(result.coupling, taps)
        return Scores(
            proxy=self.name,
            layers=taps.layers,
            bits=bits,
            values=values,
            cost=self.cost,
            activations=activations if taps.activation_bits else None,
            activation_bits=taps.activation_bits,
            coupling=coupling,
            options=settings,
            notes=notes,
            seconds=time.perf_counter() - started,
        )

    def _checked(
        self, values: Any, shape: tuple[int, ...], taps: Taps, bits: tuple[int, ...]
    ) -> np.ndarray:
        values = np.asarray(values, np.float64)
        if values.shape != shape:
            raise ProxyqError(
                f"the proxy {self.name!r} must return an array of shape {shape} "
                f"({self.shape}), got {values.shape}."
            )
        wrong = ~np.isfinite(values) | (np.abs(values) > MOST)
        if wrong.any():
            where = np.argwhere(wrong)[0]
            at = f" at {bits[where[1]]} bits" if len(where) > 1 else ""
            raise ProxyqError(
                f"the proxy {self.name!r} gives {values[tuple(where)]:g} for layer "
                f"{taps.layers[where[0]].name!r}{at}, which no solver can use: check the model's "
                "weights and the data."
            )
        return values

    def _checked_coupling(self, given: Any, taps: Taps) -> np.ndarray:
        matrix = np.asarray(given, np.float64)
        columns = len(taps.bits) + len(taps.activation_bits)
        size = len(taps) * columns
        if matrix.shape != (size, size):
            raise ProxyqError(
                f"the coupling of the proxy {self.name!r} must have the shape {(size, size)}, got "
                f"{matrix.shape}."
            )
        wrong = ~np.isfinite(matrix) | (np.abs(matrix) > MOST)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            one, other = (taps.layers[i // columns].name for i in (row, column))
            raise ProxyqError(
                f"the proxy {self.name!r} gives {matrix[row, column]:g} for the coupling of the "
                f"layers {one!r} and {other!r}, which no solver can use: check the model's "
                "weights and the data."
            )
        if np.abs(matrix - matrix.T).max(initial=0.0) > 1e-9 * np.abs(matrix).max(initial=0.0):
            raise ProxyqError(f"the coupling of the proxy {self.name!r} must be symmetric.")
        return (matrix + matrix.T) / 2

    def __call__(
        self,
        model: Model,
        inputs: Any = None,
        *,
        labels: Any = None,
        bits: tuple[int, ...] = (2, 3, 4, 8),
        activation_bits: tuple[int, ...] = (),
        seed: int = 0,
        memory: int | None = None,
        rounding: Rounding | None = None,
        progress: Progress = silent,
        **options: Any,
    ) -> Scores:
        """Scores of a model on a batch of inputs `[images, …]`, tapped for you.

        `labels` are those of the images; a text is the proxy's option of that name (`score`
        takes both).
        """
        from proxyq.proxies.scoring import score

        if isinstance(labels, str):
            options, labels = {**options, "labels": labels}, None

        (scores,) = score(
            model,
            [(self, options)],
            inputs,
            labels=labels,
            bits=bits,
            activation_bits=activation_bits,
            seed=seed,
            memory=memory,
            rounding=rounding,
            progress=progress,
        )
        return scores


def blind_to_groups(name: str) -> ProxyqError:
    """What is told of a proxy whose costs are the same for all group sizes."""
    return ProxyqError(
        f"the proxy {name!r} cannot tell groups of weights from whole channels, so their size "
        "cannot be chosen: give one group size (--group-size 64), or use a proxy that rounds the "
        "weights, such as output-error or sqnr."
    )


def _kinds_like(default: Any) -> tuple[tuple[type, ...], str]:
    """Which types an option may have whose default is this, and how to call them."""
    if isinstance(default, bool):
        return (bool,), "true or false"
    if isinstance(default, int):
        return (Integral,), "a whole number"
    if isinstance(default, float):
        return (Real,), "a number"
    if isinstance(default, str):
        return (str,), "text"
    return (object, bool), "a value"


class Proxies(Registry[Proxy]):
    """The registered proxies; formulas are found too, as `formula:NAME` and by their files."""

    def get(self, name: str) -> Proxy:
        """The proxy called `name`, or that a formula's name or file stands for."""
        from proxyq.proxies.formula.binding import is_formula, named_formula

        return named_formula(name) if is_formula(name) else super().get(name)


PROXIES = Proxies("proxy", group="proxyq.proxies")


def make_proxy(
    kernel: Callable[..., Any],
    *,
    name: str | None = None,
    needs: tuple[str, ...],
    shape: Shape = "layers",
    passes: str,
    reference: str,
    cost: str = "linear-bits",
    cost_class: str | None = None,
    fixed: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    activations: bool = False,
    random: bool = False,
    baseline: bool = False,
    lookups: bool = True,
    groups: bool = True,
) -> Proxy:
    """A `Proxy` record from a kernel `(taps, *, key, **options) -> array or Result`.

    The record's name is the function's with dashes, its summary the docstring's first line,
    its options the keyword-only parameters with their defaults, and the options of
    `TapOptions` that govern its needs: those in `fixed` are set once and for all, those in
    `defaults` have another default here. What reads derivatives by a layer's input
    (`input-gradients`) has no `lookups`.
    """
    for need in needs:
        if need not in NEEDS:
            raise UsageError(f"unknown need {need!r}: {near(need, list(NEEDS))}")
    plain, fixed, defaults = TapOptions(), dict(fixed or {}), dict(defaults or {})
    options: dict[str, Any] = {}
    for option, governed in GOVERNS.items():
        if governed & set(needs) and option not in fixed and option != "loss":
            options[option] = defaults.get(option, getattr(plain, option))
    for parameter in inspect.signature(kernel).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "key":
            options[parameter.name] = parameter.default
    return Proxy(
        name=name or kernel.__name__.replace("_", "-"),
        kernel=kernel,
        needs=tuple(needs),
        shape=shape,
        passes=passes,
        reference=reference,
        summary=(inspect.getdoc(kernel) or "").split("\n")[0],
        options=options,
        fixed=fixed,
        cost=cost,
        cost_class=cost_class or _cost_class(needs),
        activations=activations,
        random=random,
        baseline=baseline,
        lookups=lookups and "input-gradients" not in needs,
        groups=groups,
    )


def _cost_class(needs: tuple[str, ...]) -> str:
    if "engine" in needs:
        raise UsageError(
            f"a proxy with the need 'engine' must say its `cost_class`: {', '.join(COST_CLASSES)}."
        )
    return least_cost_class(needs)


def least_cost_class(needs: tuple[str, ...]) -> str:
    """The class of the dearest need; a kernel that runs the network itself may be of a dearer."""
    if "pairs" in needs:
        return "pairs"
    swept = {*SWEEP_NEEDS, *PAIR_NEEDS} - {"tangents"}
    for name, group in (
        ("sweep", swept),
        ("curvature", {"tangents"}),
        ("backward", GRADIENT_NEEDS),
    ):
        if set(needs) & set(group):
            return name
    return "forward" if set(needs) - {"weight"} else "weights"


def register(**record: Any) -> Callable[[Callable[..., Any]], Proxy]:
    """Decorator: make a `Proxy` from the function and file it under its name."""

    def decorate(kernel: Callable[..., Any]) -> Proxy:
        return PROXIES.add(make_proxy(kernel, **record))

    return decorate
