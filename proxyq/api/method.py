"""`Method`: what a search does, from a proxy or a recipe and the options that override it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from proxyq.errors import UsageError
from proxyq.model.layers import Layer
from proxyq.proxies import PROXIES, Proxy
from proxyq.proxies.cost import check_cost, check_cost_of_groups
from proxyq.ptq.correct import CORRECTIONS
from proxyq.quantize import Rounding, check_bits
from proxyq.search.allocate import SOLVERS
from proxyq.search.allocate.build import AS_WEIGHTS
from proxyq.search.recipes import Recipe, load_recipe
from proxyq.widths import GroupSize, candidates, check_group_sizes, group_of

DEFAULT_BITS = (2, 3, 4, 8)
AUTO = "auto"
DEFAULT_SAMPLES = 256
FLOAT = "float"
GroupSizes = int | Sequence[int | None] | None


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a search does, from `--proxy` or `--recipe` with its options.

    Without a `proxy` it is `auto`: a portfolio of them, every plan measured. `start` is the
    method whose plan the solver begins with. Where there are several `group_sizes` to choose from,
    `bits` are all pairs of a bit-width and one of them, and one grid a channel.
    """

    proxy: Proxy | None
    options: Mapping[str, Any]
    cost: str
    bits: tuple[int, ...]
    activation_bits: int | tuple[int, ...] | str | None
    attention_bits: int | None
    rounding: Rounding
    correction: str
    samples: int
    solver: str
    solver_options: Mapping[str, Any]
    pins: tuple[str, ...]
    ties: tuple[str, ...]
    unties: tuple[str, ...]
    outliers: str
    recipe: str | None
    start: "Method | None" = None
    group_sizes: tuple[GroupSize, ...] = ()

    @property
    def name(self) -> str:
        """What measures sensitivity."""
        return AUTO if self.proxy is None else self.proxy.name

    @property
    def needs_images(self) -> bool:
        """Whether calibration images are read for the plan."""
        if self.start is not None and self.start.needs_images:
            return True
        return self.proxy is None or self.proxy.needs_images

    @property
    def activation_choices(self) -> tuple[int, ...]:
        """The activation bits to choose from; none where they are given, or float."""
        return self.activation_bits if isinstance(self.activation_bits, tuple) else ()

    @property
    def measures_activations(self) -> bool:
        """Whether bits of activations can be chosen."""
        return self.proxy is None or self.proxy.activations


def as_rounding(extra_code: str | None, group_size: int | None) -> Rounding:
    """How weights are rounded, where what is not given is as usual."""
    return Rounding(extra_code=extra_code or "negative", group_size=group_size)  # type: ignore[arg-type]


def as_group_sizes(given: GroupSizes) -> tuple[GroupSize, tuple[GroupSize, ...]]:
    """The group size of all layers, and those to choose from where there are several."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        return given, ()  # type: ignore[return-value]
    sizes = check_group_sizes(given)
    return (sizes[0], ()) if len(sizes) == 1 else (None, sizes)


def within_reach(method: Method, layers: Sequence[Layer]) -> Method:
    """The method without group sizes that no layer can have, which would be measured for nothing.

    `layers` are those of the network, sized by the method's group sizes.
    """
    have = {None, *(size for layer in layers for size in layer.group_scale_bits)}
    bits = tuple(b for b in method.bits if group_of(b) in have)
    start = None if method.start is None else within_reach(method.start, layers)
    return replace(method, bits=bits, start=start)


def check_groups(method: Method) -> None:
    """Refuse group sizes to choose from by what cannot tell them apart, before it is measured."""
    proxy = method.proxy
    if proxy is None or not method.group_sizes:
        return
    proxy.check_groups(method.bits)
    if proxy.shape == "layers":
        check_cost_of_groups(proxy.cost if method.cost == "auto" else method.cost, method.bits)


def method_of(
    proxy: str | Proxy | None = None,
    recipe: str | Recipe | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    cost: str | None = None,
    bits: Sequence[int] | None = None,
    activation_bits: int | str | Sequence[int] | None = None,
    attention_bits: int | str | None = None,
    extra_code: str | None = None,
    group_size: GroupSizes = None,
    correction: str | None = None,
    samples: int | None = None,
    solver: str | None = None,
    pins: Sequence[str] = (),
    ties: Sequence[str] = (),
    unties: Sequence[str] = (),
) -> Method:
    """The method that a proxy or a recipe stands for; what is given explicitly wins.

    `activation_bits` may be a list to choose from, `"weights"` (those of the layer's weights), or
    `"float"`, against a recipe that rounds activations. `attention_bits` is a bit-width, or
    `"float"`, which is the default. `group_size` may be several to choose from.

    **Raises** `UsageError` for unknown names, both at once, or impossible values.
    """
    if proxy is not None and recipe is not None:
        raise UsageError("give a proxy or a recipe, not both: a recipe brings its proxy.")
    check_correction(correction)
    check_cost(cost or "auto")
    if samples is not None and samples < 1:
        raise UsageError(f"`samples` must be at least 1, got {samples}.")
    if solver not in (None, "auto"):
        SOLVERS.get(solver)
    activations = _activation_bits(activation_bits)
    attention = as_attention_bits(attention_bits)
    size, sizes = as_group_sizes(group_size)
    rounding = as_rounding(extra_code, size)
    if bits is not None and not bits:
        raise UsageError("`bits` must name at least one bit-width, got none.")
    for width in bits or ():
        check_bits(width)
    if recipe is None:
        chosen = None
        if isinstance(proxy, Proxy):
            chosen = proxy
        elif proxy not in (None, AUTO):
            chosen = PROXIES.get(proxy)
        elif options or cost not in (None, "auto"):
            what = f"the option {min(options)!r}" if options else f"cost={cost!r}"
            raise UsageError(
                f"{what} is for a single proxy: name one (--proxy), 'auto' tries several."
            )
        return Method(
            proxy=chosen,
            options={} if chosen is None else chosen.check_options(options or {}),
            cost=cost or "auto",
            bits=candidates(bits or DEFAULT_BITS, sizes),
            activation_bits=activations,
            attention_bits=attention,
            rounding=rounding,
            correction=correction or "auto",
            samples=samples or DEFAULT_SAMPLES,
            solver=solver or "auto",
            solver_options={},
            pins=tuple(pins),
            ties=tuple(ties),
            unties=tuple(unties),
            outliers="keep",
            recipe=None,
            group_sizes=sizes,
        )
    found = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chosen = PROXIES.get(found.proxy)
    same_solver = solver is None or solver == found.solver
    solving = found.solver_options()
    if sizes or (bits is not None and sorted(set(bits)) != found.bits):
        solving.pop("chances", None)  # they are of the recipe's own bits
    start = None
    if found.start is not None and same_solver:
        start = method_of(
            recipe=found.start,
            bits=bits or found.bits,
            extra_code=extra_code,
            group_size=group_size,
        )
    return Method(
        proxy=chosen,
        options=chosen.check_options({**found.options, **(options or {})}),
        cost=cost or found.cost,
        bits=candidates(bits or found.bits, sizes),
        activation_bits=(
            _activation_bits(found.activation_bits) if activation_bits is None else activations
        ),
        attention_bits=attention,
        rounding=rounding,
        correction=correction or found.correction,
        samples=samples or max(found.samples, start.samples if start else 0),
        solver=solver or found.solver,
        solver_options=solving if same_solver else {},
        pins=(*found.pins, *pins),
        ties=(*found.ties, *ties),
        unties=tuple(unties),
        outliers=found.outliers,
        recipe=found.name,
        start=start,
        group_sizes=sizes,
    )


def check_correction(correction: str | None) -> None:
    """Refuse a correction that does not exist; `None` leaves it open."""
    if correction is not None and correction not in CORRECTIONS:
        raise UsageError(
            f"`correction` must be one of {', '.join(CORRECTIONS)}, got {correction!r}."
        )


def as_attention_bits(value: int | str | None) -> int | None:
    """Bits of both operands of products of two activations; `None` is float."""
    if value is None or value == FLOAT:
        return None
    if isinstance(value, str):
        raise UsageError(f"`attention_bits` must be a bit-width or 'float', got {value!r}.")
    return check_bits(value, "attention_bits")


def _activation_bits(
    value: int | str | Sequence[int] | None,
) -> int | tuple[int, ...] | str | None:
    if value is None or value == FLOAT:
        return None
    if isinstance(value, str):
        if value != AS_WEIGHTS:
            raise UsageError(
                "`activation_bits` must be a bit-width, several to choose from, 'weights' or "
                f"'float', got {value!r}."
            )
        return value
    if isinstance(value, Sequence):
        if not value:
            raise UsageError("`activation_bits` must name at least one bit-width, got none.")
        return tuple(sorted({check_bits(bits, "activation_bits") for bits in value}))
    return check_bits(value, "activation_bits")
