"""A formula as a proxy: its statistics are recorded like those of any other.

`formula_proxy` makes the record; wherever a proxy's name is asked for, `formula:NAME` (of the
shelf `proxies/`) or the name of a file that ends in `.json` stands for one.

A formula that depends on bits gives a cost for each bit-width, of an importance its negative.
One that does not gives an importance for each layer, which becomes costs like those of other
proxies (`--cost`).

Statistics of a layer whose weight is used at several places are those of the first; its
gradients add up all.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine import Engine, LayerTap, Taps
from proxyq.engine.blocks import first_blocks
from proxyq.engine.curvature import hessian_products
from proxyq.engine.objectives import cross_entropy
from proxyq.engine.ranges import fit_input_grid
from proxyq.errors import ProxyqError, UsageError
from proxyq.proxies._synflow import virtual_gradients
from proxyq.proxies.formula.evaluate import evaluate
from proxyq.proxies.formula.file import Formula, available_formulas, load_formula
from proxyq.proxies.formula.grammar import STATISTICS, Node
from proxyq.proxies.formula.statistics import Statistics
from proxyq.proxies.proxy import Proxy, Shape, least_cost_class, make_proxy
from proxyq.quantize import fake_quantize

PREFIX = "formula:"
ENTRIES = 65536
"""Of a layer's weight at most, by default; more are sampled."""


def is_formula(name: str) -> bool:
    """Whether a proxy's name stands for a formula."""
    return name.startswith(PREFIX) or name.endswith(".json")


def named_formula(name: str | os.PathLike[str]) -> Proxy:
    """The proxy of `formula:NAME` or of a formula's file."""
    return formula_proxy(load_formula(os.fspath(name).removeprefix(PREFIX)))


def shelf_formulas() -> list[Proxy]:
    """The proxies of all formulas on the shelf."""
    return [named_formula(PREFIX + name) for name in available_formulas()]


def formula_proxy(formula: Formula) -> Proxy:
    """The proxy that a formula is.

    **Raises** `UsageError` for a cost that does not depend on bits.
    """
    node = formula.node
    if formula.direction == "cost" and not node.depends_on_bits:
        raise UsageError(
            f"the formula {formula.name!r} is a cost and must depend on bits (bits, D or E), got "
            f"{formula.formula!r}: make it an importance."
        )
    # Plain values: caches know a proxy by what its function closes over.
    text, name, importance = str(node), formula.name, formula.direction == "importance"

    def kernel(taps: Taps, *, key: Any, entries: int = ENTRIES) -> np.ndarray:
        del key
        from proxyq.proxies.formula.text import parse_formula

        tree = parse_formula(text)
        (values,) = evaluate([tree], statistics(taps, leaves_of(tree), entries=entries or None))
        if values is None:
            raise ProxyqError(
                f"the formula {name!r} gives numbers that are not finite for this network: check "
                "the model's weights and the data, or use another."
            )
        return -values if importance and tree.depends_on_bits else values

    kernel.__doc__ = f"By the formula {text}.\n\n{formula.note}"
    needs = node.needs() or ("weight",)
    shape: Shape = "layers bits" if node.depends_on_bits else "layers"
    return make_proxy(
        kernel,
        name=PREFIX + name,
        needs=needs,
        shape=shape,
        passes=_passes(node),
        reference=str(formula.origin.get("source", "a formula")),
        cost_class=_cost_class(node),
        random="H" in node.leaves,
        lookups="macs" not in node.leaves,  # of which an embedding has none
        groups=not node.depends_on_bits or bool({"D", "O", "R"} & set(node.leaves)),
    )


def leaves_of(*formulas: Node) -> tuple[str, ...]:
    """Names of the statistics that formulas read, in the grammar's order."""
    found = {name for formula in formulas for name in formula.leaves}
    return tuple(name for name in STATISTICS if name in found)


def statistics(taps: Taps, leaves: tuple[str, ...], *, entries: int | None = None) -> Statistics:
    """The statistics of all layers that formulas read, from recorded taps.

    `entries` of a layer are kept at most (`None`: all), drawn by the seed of the taps.
    """
    per_layer: dict[str, dict[str, Any]] = {tap.name: {} for tap in taps}
    beyond = _NETWORK.keys() & set(leaves)
    for name in (name for name in STATISTICS if name in beyond):
        for layer, value in zip(per_layer.values(), _NETWORK[name](taps), strict=True):
            layer[name] = value
    for tap, layer in zip(taps, per_layer.values(), strict=True):
        for name in leaves:
            if name in _LAYER:
                layer[name] = _LAYER[name](tap, taps.bits)
        layer["macs"] = tap.layer.macs
        layer["weights"] = tap.layer.weights
    return Statistics.build(per_layer, taps.bits, entries=entries, seed=taps.seed)


def _float64(value: Any) -> np.ndarray:
    return np.asarray(value, np.float64)


def _rounding_errors(tap: LayerTap, bits: tuple[int, ...]) -> np.ndarray:
    """`[bits, fan_in, channels]`: Q_b(W) - W."""
    return np.stack([_float64(tap.quantized(b) - tap.columns) for b in bits])


def _activation_errors(tap: LayerTap, bits: tuple[int, ...]) -> np.ndarray:
    """`[bits, values]`: Q_b(A) - A, each bit-width with its own grid."""
    sample = np.asarray(tap.sample, np.float32)
    rounded = (fake_quantize(jnp.asarray(sample), fit_input_grid(sample, b)) for b in bits)
    return np.stack([_float64(one) - sample for one in rounded])


def _virtual(taps: Taps) -> list[np.ndarray]:
    return [_float64(value) for value in virtual_gradients(taps.engine)]


def _hessian_probes(taps: Taps) -> list[np.ndarray]:
    """z (H z) for random signs z on all weights, H of the mean cross-entropy: E = diag H."""
    engine: Engine = taps.tape_engine
    owners = first_blocks(engine)
    key = jax.random.key(taps.seed)
    signs = {}
    for layer, block in enumerate(owners):
        shape = engine.weight(block.sites[0]).shape
        draw = jax.random.rademacher(jax.random.fold_in(key, layer), shape, jnp.float32)
        signs[layer] = np.asarray(draw)
    found = hessian_products(engine, taps.inputs, cross_entropy, taps.targets, signs, joint=True)
    return [
        _float64(engine.network.sites[block.sites[0]].columns(signs[layer] * found[layer]))
        for layer, block in enumerate(owners)
    ]


_LAYER: dict[str, Callable[[LayerTap, tuple[int, ...]], np.ndarray]] = {
    "W": lambda tap, bits: _float64(tap.columns),
    "G": lambda tap, bits: _float64(tap.gradient),
    "F": lambda tap, bits: _float64(tap.gradient_squares),
    "D": _rounding_errors,
    "A": lambda tap, bits: _float64(tap.sample),
    "E": _activation_errors,
    "O": lambda tap, bits: _float64(tap.output_error),
    "R": lambda tap, bits: _float64(tap.restored_error),
}
_NETWORK: dict[str, Callable[[Taps], list[np.ndarray]]] = {
    "V": _virtual,
    "H": _hessian_probes,
}


def _passes(node: Node) -> str:
    parts = []
    if {"A", "E", "G", "F", "H", "O", "R"} & set(node.leaves):
        parts.append("1 forward")
    if {"O", "R"} & set(node.leaves):
        parts.append("1 per bit-width")
    if {"G", "F"} & set(node.leaves):
        parts.append("1 backward")
    if "H" in node.leaves:
        parts.append("1 Hessian product")
    if "V" in node.leaves:
        parts.append("1 forward + 1 backward on ones")
    return " + ".join(parts) or "none"


def _cost_class(node: Node) -> str:
    if "H" in node.leaves:
        return "curvature"
    found = least_cost_class(node.needs() or ("weight",))
    return "backward" if "V" in node.leaves and found in ("weights", "forward") else found
