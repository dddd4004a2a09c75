"""What a proxy is: a pure function of taps, filed under its name with what it needs."""

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

import jax
import numpy as np

from proxyq.engine import NEEDS, Engine, TapOptions, Taps, collect
from proxyq.errors import ProxyqError, UsageError, near
from proxyq.model.layers import Layer
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT
from proxyq.progress import Progress, silent
from proxyq.quantize import Rounding
from proxyq.registry import Registry

Shape = Literal["layers", "layers bits"]
_TAP_OPTIONS = ("batch_norm", "feature", "centre")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """A proxy's answer: how sensitive each layer is.

    `values` is `[layers]` (an importance: the higher, the more bits the layer deserves) or
    `[layers, bits]` (a cost: what the bit-width is predicted to add to the loss).
    """

    proxy: str
    layers: tuple[Layer, ...]
    bits: tuple[int, ...]
    values: np.ndarray
    options: Mapping[str, Any] = field(default_factory=dict)
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
    - `passes`: forward and backward passes over the images, as text.
    - `options`: keyword options and their defaults.
    """

    name: str
    kernel: Callable[..., Any]
    needs: tuple[str, ...]
    shape: Shape
    passes: str
    reference: str
    summary: str
    options: Mapping[str, Any]

    direction: str = "higher is more sensitive"

    @property
    def needs_images(self) -> bool:
        """Whether calibration images are read."""
        return bool(set(self.needs) - {"weight"})

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
        return {**self.options, **options}

    def on(self, taps: Taps, *, key: Any = None, **options: Any) -> Scores:
        """Scores from recorded taps.

        **Raises** `ProxyqError` naming layer and proxy when a score is not finite.
        """
        settings = self.check_options(options)
        key = jax.random.key(0) if key is None else key
        own = {name: value for name, value in settings.items() if name not in _TAP_OPTIONS}
        started = time.perf_counter()
        values = np.asarray(self.kernel(taps, key=key, **own), np.float64)
        expected = (len(taps),) if self.shape == "layers" else (len(taps), len(taps.bits))
        if values.shape != expected:
            raise ProxyqError(
                f"the proxy {self.name!r} must return an array of shape {expected} "
                f"({self.shape}), got {values.shape}."
            )
        if not np.isfinite(values).all():
            where = np.argwhere(~np.isfinite(values))[0]
            at = f" at {taps.bits[where[1]]} bits" if len(where) > 1 else ""
            raise ProxyqError(
                f"the proxy {self.name!r} gives {values[tuple(where)]} for layer "
                f"{taps.layers[where[0]].name!r}{at}: check the model's weights and the data."
            )
        return Scores(
            proxy=self.name,
            layers=taps.layers,
            bits=taps.bits,
            values=values,
            options=settings,
            seconds=time.perf_counter() - started,
        )

    def __call__(
        self,
        model: Model,
        inputs: Any = None,
        *,
        bits: tuple[int, ...] = (2, 3, 4, 8),
        key: Any = None,
        memory: int | None = None,
        rounding: Rounding | None = None,
        progress: Progress = silent,
        **options: Any,
    ) -> Scores:
        """Scores of a model on a batch of inputs `[images, …]`, tapped for you."""
        settings = self.check_options(options)
        chosen = TapOptions(**{k: v for k, v in settings.items() if k in _TAP_OPTIONS})
        started = time.perf_counter()
        images = LAYERS_AT if inputs is None else len(jax.tree.leaves(inputs)[0])
        whole = images if chosen.batch_norm == "batch" else None
        engine = Engine.build(
            model, images, batch_norm=chosen.batch_norm, memory=memory, batch_size=whole
        )
        taps = collect(
            engine, inputs, self.needs, bits, options=chosen, rounding=rounding, progress=progress
        )
        scores = self.on(taps, key=key, **options)
        return Scores(
            proxy=scores.proxy,
            layers=scores.layers,
            bits=scores.bits,
            values=scores.values,
            options=scores.options,
            seconds=time.perf_counter() - started,
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


PROXIES: Registry[Proxy] = Registry("proxy", group="proxyq.proxies")


def make_proxy(
    kernel: Callable[..., Any],
    *,
    name: str | None = None,
    needs: tuple[str, ...],
    shape: Shape = "layers",
    passes: str,
    reference: str,
) -> Proxy:
    """A `Proxy` record from a kernel `(taps, *, key, **options) -> array`.

    The record's name is the function's with dashes, its summary the docstring's first line,
    its options the keyword-only parameters with their defaults. `gram`, `pooled` and
    `feature` bring the options of `TapOptions` that govern them.
    """
    for need in needs:
        if need not in NEEDS:
            raise UsageError(f"unknown need {need!r}: {near(need, list(NEEDS))}")
    options: dict[str, Any] = {}
    if needs_images := set(needs) - {"weight"}:
        defaults = TapOptions()
        options["batch_norm"] = defaults.batch_norm
        if needs_images & {"gram", "pooled", "feature"}:
            options["feature"] = defaults.feature
        if "gram" in needs:
            options["centre"] = defaults.centre
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
    )


def register(**record: Any) -> Callable[[Callable[..., Any]], Proxy]:
    """Decorator: make a `Proxy` from the function and file it under its name."""

    def decorate(kernel: Callable[..., Any]) -> Proxy:
        return PROXIES.add(make_proxy(kernel, **record))

    return decorate
