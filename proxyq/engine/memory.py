"""How many images fit at once under a bound on memory."""

import math
from collections.abc import Iterable
from typing import Any

import jax

from proxyq.errors import UsageError
from proxyq.model.graph import Graph, Var, is_literal
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT, Network, network

CPU_MEMORY, ACCELERATOR_MEMORY, TAPE_MEMORY = 1 << 26, 1 << 30, 1 << 29
"""Bytes of activations that the engine lets live at once, unless told otherwise.

On CPU 64 MiB: larger batches leave the caches and pay for fresh pages (twice the time at 1 GiB).
Derivatives keep a whole batch: 512 MiB.
"""
WHOLE_MEMORY = 1 << 33
"""The same where images are held against each other: fewer at once would take more passes."""
CHANGES_MEMORY = 1 << 30
"""The same of what choices make of a batch's outputs, of which there may be a whole vocabulary."""


def bytes_per_image(graph: Graph) -> int:
    """The largest sum of activations alive at one equation, for one image.

    An upper bound on what XLA holds apart from its scratch space: fusion never lets some of
    them exist.
    """
    last_use = {var: max(uses) for var, uses in graph.consumers.items()}
    for atom in graph.outputs:
        if not is_literal(atom):
            last_use[atom] = len(graph.main)
    alive = {var: var.aval.size * var.aval.dtype.itemsize for var in graph.inputs}
    peak = total = sum(alive.values())
    ends: dict[int, list] = {}
    for var, end in last_use.items():
        ends.setdefault(end, []).append(var)
    for index, eqn in enumerate(graph.main):
        for var in eqn.outvars:
            alive[var] = var.aval.size * var.aval.dtype.itemsize
            total += alive[var]
        peak = max(peak, total)
        unread = [var for var in eqn.outvars if var not in last_use]
        for var in (*ends.get(index, ()), *unread):
            total -= alive.pop(var, 0)
    return math.ceil(peak / graph.batch_size)


def tape_bytes_per_image(of: Network) -> int:
    """What derivatives keep of one image: of each site the output, the state, and of both the
    derivative and a tangent, some six times the outputs; and its own gradient of the largest
    weight, squared beside it."""
    outs = (of.graph.main[site.position].outvars[0].aval for site in of.sites)
    kept = 6 * sum(a.size * a.dtype.itemsize for a in outs) / of.graph.batch_size
    weights = (site.weight.aval for site in of.sites)
    return math.ceil(kept) + 2 * max(a.size * a.dtype.itemsize for a in weights)


def images_beside_each_other(
    of: Network, captured: Iterable[Var], memory: int | None = None
) -> int:
    """How many images may be held at one layer, to be compared with each other.

    Of each live the state and the largest of the `captured` features, three times over: as it was
    captured, put together with the others', and centred.
    """
    bound = WHOLE_MEMORY if memory is None else memory
    return int(bound // bytes_per_image_beside(of, captured))


def bytes_per_image_beside(of: Network, captured: Iterable[Var]) -> float:
    """What one image takes there."""
    graph = of.graph
    sizes = [var.aval.size * var.aval.dtype.itemsize / graph.batch_size for var in captured]
    return bytes_per_image(graph) + 3 * max(sizes, default=0)


def amount(size: float) -> str:
    """Bytes for people: `3.4 GiB`."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}"
    return f"{math.ceil(size / 1024)} KiB"


def images_at_once(
    model: Model, images: int, memory: int | None = None, *, tape: bool = False, parts: int = 1
) -> int:
    """The batch size for a set of `images`: as few, equally large batches as fit `memory`.

    Two states live at once (the clean one and a perturbed one), hence the factor of two; with
    `tape`, all states that derivatives need. A batch that is split into `parts` divides by them,
    and `memory` is that of one part.

    **Raises** `UsageError` where a `memory` that is given has no room for one image.
    """
    if images < 1:
        raise UsageError(f"at least one image is needed, got {images}.")
    found = network(model, LAYERS_AT)
    per_image = tape_bytes_per_image(found) if tape else 2 * bytes_per_image(found.graph)
    # Gradients take two thirds of what products with second derivatives do.
    least, bound = 2 * per_image // 3 if tape else per_image, memory
    if bound is None:
        on_cpu = jax.default_backend() == "cpu"
        bound = TAPE_MEMORY if tape else CPU_MEMORY if on_cpu else ACCELERATOR_MEMORY
    elif least > bound:
        what = "derivatives of one image" if tape else "one image"
        raise too_little(f"{what} in the network {model.name!r}", least, bound)
    return evenly(images, bound // per_image, parts)


def evenly(images: int, most: float, parts: int = 1) -> int:
    """The size of as few, equally large batches as have `most` images in each of their `parts`."""
    size = math.ceil(images / math.ceil(images / (parts * max(1, int(most)))))
    return parts * math.ceil(size / parts)


def less(memory: int | None, held: float, what: str) -> int | None:
    """What is left of `memory` for batches beside what is `held` of all images.

    **Raises** `UsageError` where nothing is.
    """
    if memory is None:
        return None
    if held >= memory:
        raise too_little(what, held, memory, ", or fewer images (--samples)")
    return memory - int(held)


def outputs_per_image(graph: Graph) -> int:
    """How many numbers the first output has for one image."""
    first: Any = jax.tree.leaves(graph.outputs)[0]
    return first.aval.size // graph.batch_size


def too_little(what: str, least: float, memory: float, instead: str = "") -> UsageError:
    """The sentence for what a bound on memory has no room for."""
    return UsageError(
        f"{what} takes {amount(least)}, and `memory` (--memory) allows {amount(memory)}: give at "
        f"least {amount(least)}{instead}."
    )
