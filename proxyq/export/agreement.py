"""Whether what was written computes what the quantized network does: one rule for all formats."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from proxyq.errors import ProxyqError
from proxyq.model.model import Model, call_arguments
from proxyq.model.network import LAYERS_AT, network
from proxyq.model.torch_import import import_torch
from proxyq.ptq.quantized import QuantizedModel

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest, with rounded weights alone."""
ROUNDED_TOLERANCE = 1e-4
"""The median of these differences where inputs are rounded too."""
LOOSEST_TOLERANCE = 3e-2
"""The most that this median may be for a network that turns codes by itself."""
EXAMPLES = 16
"""How many inputs are compared on."""


def examples_of(model: Model, inputs: Any = None) -> Any:
    """A few inputs to compare on, `[EXAMPLES, …]`: the first of those given, else random ones."""
    if inputs is not None:
        return jax.tree.map(lambda x: np.asarray(x)[:EXAMPLES], inputs)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (
            rng.normal(size=(EXAMPLES, *x.shape))
            if np.issubdtype(x.dtype, np.floating)
            else np.zeros((EXAMPLES, *x.shape))
        ).astype(x.dtype),
        model.inputs,
    )


def differences(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Absolute differences, relative to the largest of ours; infinite for other shapes."""
    if ours.shape != theirs.shape:
        return np.full(1, np.inf)
    return np.abs(ours - theirs) / max(float(np.abs(ours).max()), 1e-30)


def check_agreement(
    quantized: QuantizedModel, run: Callable[[Any], np.ndarray], examples: Any, *, what: str
) -> tuple[float, str | None]:
    """Refuse what says something else than the network.

    The largest difference counts where weights alone are rounded. Where inputs are too, a value
    on a boundary between two codes goes to either side, by the order of a sum, and its step
    moves whatever comes after: single outputs differ by far more than rounding of float32,
    without any fault. Their median mostly does not: it is 1e-7 for a ResNet-20 and a small
    vision transformer at 4 and 8 bits, 3e-6 at 16. In a deep network with random weights it does
    (3e-3 for a ViT-B/16 at 8 bits), and in a text encoder (1e-3 for MiniLM at 8 bits), and then so
    does our own when its weights change by some roundings of float32: four times as much is
    allowed, and the note says so.

    - `run`: `examples`, `[images, …]`, to the outputs of what was written.
    - `what`: names it in messages.

    **Returns** the largest difference relative to the largest output, and what to tell of a
    network that cannot be compared closely, or `None`.
    """
    ours, note = quantized.logits(examples), None
    found = differences(ours, run(examples))
    largest = float(found.max())
    if not any(edit.input_grid or edit.attention for edit in quantized.edits.values()):
        counts, allowed = largest, TOLERANCE
    else:
        counts, allowed = float(np.median(found)), ROUNDED_TOLERANCE
        if counts > allowed:
            moved = float(np.median(differences(ours, _jittered(quantized).logits(examples))))
            allowed = min(max(allowed, 4 * moved), LOOSEST_TOLERANCE)
            note = (
                f"{what} gives other outputs than proxyq by {counts:.1e} of the largest in the "
                "median, and could not be compared more closely: the network's own outputs move "
                f"by {moved:.1e} when its weights change by some roundings of float32, which turns "
                "codes of activations."
            )
    if not counts <= allowed:
        raise ProxyqError(
            f"{what} gives other outputs than the quantized network (by {counts:.1e} of the "
            f"largest, where {allowed:.0e} is allowed) and was not written: choose another format "
            "(--to), and please report the model."
        )
    return largest, note


def with_float_inputs(
    quantized: QuantizedModel, layers: Collection[str] | None = None
) -> QuantizedModel:
    """The network with no activation rounded at all, or none that the named layers read."""
    if layers is None:
        every = quantized.edits.items()
        edits = {i: edit._replace(input_grid=None, attention=()) for i, edit in every}
        return replace(quantized, edits=edits, attention_bits={})
    graph = network(quantized.model, LAYERS_AT)
    sites = {i for name in layers for i in graph.sites_of(name)}
    edits = {
        i: edit._replace(input_grid=None) if i in sites else edit
        for i, edit in quantized.edits.items()
    }
    return replace(quantized, edits=edits)


def with_float_attention(
    quantized: QuantizedModel, *, strict: bool, format: str
) -> tuple[QuantizedModel, tuple[str, ...]]:
    """The network with products of two activations in float, and what is to be told of it.

    **Raises** `ProxyqError` where `strict` and the plan rounds any.
    """
    count = len(quantized.attention_bits)
    if not count:
        return quantized, ()
    told = f"{format} rounds what layers read alone, not products of two activations (attention)"
    if strict:
        raise ProxyqError(f"{told}: search without --attention-bits, or leave --strict out.")
    edits = {i: edit._replace(attention=()) for i, edit in quantized.edits.items()}
    return replace(quantized, edits=edits, attention_bits={}), (
        f"{told}: {count} of them stay float.",
    )


def module_runner(module: Any) -> Callable[[Any], np.ndarray]:
    """A torch module as a function of NumPy arrays, in the structure that the model takes."""
    torch = import_torch()

    def run(inputs: Any) -> np.ndarray:
        leaves = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), inputs)
        with torch.no_grad():
            args, kwargs = call_arguments(leaves)
            outputs = module(*args, **kwargs)
        leaves = torch.utils._pytree.tree_leaves(outputs)
        return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)).numpy()

    return run


def _jittered(quantized: QuantizedModel) -> QuantizedModel:
    """The network with every weight off by some roundings of float32, as another order of sums
    and other approximations of functions leave outputs."""
    rng = np.random.default_rng(0)

    def moved(weight: Any) -> Any:
        if weight is None:
            return None
        noise = rng.standard_normal(np.shape(weight), dtype=np.float32)
        return np.asarray(weight) * (1 + 4 * np.finfo(np.float32).eps * noise)

    edits = {i: e._replace(weight=moved(e.weight)) for i, e in quantized.edits.items()}
    return replace(quantized, edits=edits)
