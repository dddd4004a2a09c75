"""What one backward pass over the images gives of each layer: gradients and what they spread.

One walk serves every need with the same objective. Tensors are reduced batch by batch, in
float64 over batches, so that memory holds one batch's tape.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.checkpoint import Checkpoint
from proxyq.engine.backward import Tape, pull_weight, record
from proxyq.engine.blocks import Block, first_blocks
from proxyq.engine.engine import Engine
from proxyq.engine.objectives import Objective, Targets
from proxyq.engine.rounded import weight_changes
from proxyq.engine.segments import remember, text_key
from proxyq.errors import ProxyqError
from proxyq.model.examples import locate, split_examples
from proxyq.progress import Progress, silent
from proxyq.quantize import Rounding

GRADIENT_NEEDS = {
    "gradient": "mean derivative of the loss by the weight, [fan_in, channels]",
    "gradient-squares": "mean over images of each image's squared gradient, [fan_in, channels]",
    "gradient-magnitudes": "mean over images of each image's |gradient|, [fan_in, channels]",
    "first-order": "each image's gradient times the weight's rounding error, [bits, images]",
    "input-gradients": "derivative of the loss by what the layer reads, [images, values] (some)",
}
RELATED_IMAGES = 64
RELATED_VALUES = 16384


def record_gradients(
    engine: Engine,
    inputs: Any,
    needs: Sequence[str],
    bits: Sequence[int],
    objective: Objective,
    targets: Targets,
    *,
    rounding: Rounding,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """What `needs` names (keys of `GRADIENT_NEEDS`), for each layer.

    Derivatives are those of the mean loss over the images. A layer whose weight is used in two
    shapes is differentiated in the shape of its first use; `first-order` adds all uses.
    `input-gradients` keeps the first 64 images and at most 16,384 values of each, at a fixed
    stride.

    **Raises** `ProxyqError` for `input-gradients` of a layer that reads indices.
    """
    for site in engine.network.sites:
        if site.lookup and "input-gradients" in needs:
            raise ProxyqError(
                f"the layer {site.layer!r} looks up rows by indices, which have no derivatives "
                "('input-gradients'): leave embeddings out (--embeddings), or record something "
                "else."
            )
    checkpoint = checkpoint or Checkpoint()
    network = engine.network
    owners = first_blocks(engine)
    rows = {name: row for row, name in enumerate(network.names)}
    deltas = None
    if "first-order" in needs:
        deltas = [
            weight_changes(engine, site, bits, rounding) for site in range(len(network.sites))
        ]
    sums: dict[str, np.ndarray] = checkpoint.load("gradients") or {}
    first_batch = int(sums.pop("batches", np.array(0)))
    images = len(jax.tree.leaves(inputs)[0])
    chunks = -(-images // engine.batch_size)

    def add(need: str, row: int, value: Any) -> None:
        key = f"{need}/{row}"
        value = np.asarray(value, np.float64)
        sums[key] = sums[key] + value if key in sums else value

    def extend(need: str, row: int, value: Any) -> None:
        key = f"{need}/{row}"
        value = np.asarray(value)
        sums[key] = np.concatenate([sums[key], value], axis=-1) if key in sums else value

    for done, (batch, count) in enumerate(engine.chunks(inputs)):
        start = done * engine.batch_size
        if done < first_batch:
            continue
        tape = record(engine, batch, count, objective, targets, start)
        tape.backward()
        for row, block in enumerate(owners):
            _add_gradients(tape, row, block, needs, add)
            if "input-gradients" in needs and start < RELATED_IMAGES:
                kept = min(count, RELATED_IMAGES - start)
                extend("input-gradients", row, _input_gradients(tape, block.sites[0])[:kept].T)
        if deltas is not None:
            for row in range(len(owners)):
                own = [
                    site for site in range(len(network.sites)) if _row(engine, site, rows) == row
                ]
                products = [_first_order(tape, site, deltas[site]) for site in own]
                extend("first-order", row, np.sum(products, axis=0)[:, :count])
        progress("backward", done + 1, chunks)
        if checkpoint.due():
            checkpoint.save("gradients", {**sums, "batches": np.array(done + 1)})
    averaged = ("gradient", "gradient-squares", "gradient-magnitudes")
    found: list[dict[str, Any]] = []
    for row in range(len(owners)):
        own = {}
        for need in needs:
            if need in averaged:
                own[need] = sums[f"{need}/{row}"] / images
            elif need == "input-gradients":
                own[need] = sums[f"{need}/{row}"].T
            elif need in GRADIENT_NEEDS:
                own[need] = sums[f"{need}/{row}"].astype(np.float64)
        found.append(own)
    return found


def _row(engine: Engine, site: int, rows: dict[str, int]) -> int:
    return rows[engine.network.sites[site].layer]


def _add_gradients(tape: Tape, row: int, block: Block, needs: Sequence[str], add: Any) -> None:
    engine = tape.engine
    where = engine.network.sites[block.sites[0]]
    if "gradient" in needs:
        parts = (tape.pull_weight(site, tape.deltas[site]) for site in block.sites)
        add("gradient", row, where.columns(sum(parts)))
    if not set(needs) & {"gradient-squares", "gradient-magnitudes"}:
        return
    square, magnitude = per_image(tape, block, _sums)
    if "gradient-squares" in needs:
        add("gradient-squares", row, where.columns(square))
    if "gradient-magnitudes" in needs:
        add("gradient-magnitudes", row, where.columns(magnitude))


def _sums(each: Any) -> Any:
    return jnp.sum(each * each, axis=0), jnp.sum(jnp.abs(each), axis=0)


def squared_norms(each: Any) -> Any:
    """`[images]`: the squared norm of each image's gradient."""
    return jnp.sum(jnp.reshape(each * each, (len(each), -1)), axis=1)


_PER_IMAGE: dict[Any, Any] = {}


def per_image(tape: Tape, block: Block, reduce: Callable[[Any], Any]) -> Any:
    """`reduce` of each image's gradient by a block's weight, `[batch, …]`.

    A weight used at several sites has one gradient for each image, the sum of its uses'.
    """
    if len(block.sites) == 1:
        return _site_gradients(tape, block.sites[0], reduce)
    whole = sum(_site_gradients(tape, site, lambda each: each) for site in block.sites)
    return reduce(whole)


def _site_gradients(tape: Tape, index: int, reduce: Callable[[Any], Any]) -> Any:
    engine = tape.engine
    graph, site = engine.network.graph, engine.network.sites[index]
    eqn, batch = graph.main[site.position], engine.batch_size
    reads = locate(graph).get(eqn.invars[1 - site.operand], site.examples)
    text = text_key([eqn], [eqn.invars[1 - site.operand]], eqn.outvars, site.operand)
    key = (text, reads, site.examples, batch, reduce.__qualname__, engine.placement)
    program = _PER_IMAGE.get(key)
    if program is None:

        def gradients(x: Any, delta: Any) -> Any:
            split = split_examples(x, reads, batch), split_examples(delta, site.examples, batch)
            pull = jax.vmap(partial(pull_weight, eqn, site.operand))
            return reduce(engine.placement.each_image(pull)(*split))

        program = remember(_PER_IMAGE, key, jax.jit(gradients))
    return program(tape.x(index), tape.deltas[index])


def _first_order(tape: Tape, index: int, deltas: Sequence[Any]) -> np.ndarray:
    """`[bits, batch]`: each image's `<delta, f(x, dW)>`, which is its gradient times dW."""
    site, batch = tape.engine.network.sites[index], tape.engine.batch_size
    delta, x = tape.deltas[index], tape.x(index)
    changes = (tape.push(index, x, change) for change in deltas)
    rows = (_row_sums(site.rows(delta * change, batch)) for change in changes)
    return np.stack([np.asarray(row, np.float64) for row in rows])


@jax.jit
def _row_sums(rows: Any) -> Any:
    return jnp.sum(rows.astype(jnp.float32), axis=1)


def _input_gradients(tape: Tape, index: int) -> np.ndarray:
    """`[batch, values]`: the loss's derivative by what a site reads, thinned."""
    engine = tape.engine
    graph, site = engine.network.graph, engine.network.sites[index]
    data = graph.main[site.position].invars[1 - site.operand]
    pulled = tape.pull_input(index, tape.deltas[index])
    where = locate(graph).get(data, site.examples)
    rows = split_examples(pulled, where, engine.batch_size).reshape(engine.batch_size, -1)
    return np.asarray(rows[:, :: stride(rows.shape[1], RELATED_VALUES)], np.float32)


def stride(size: int, wanted: int) -> int:
    """A step that leaves at most `wanted` of `size` values and shares no factor with `size`.

    So it walks through all channels and positions, whatever the layout.
    """
    step = max(1, -(-size // wanted))
    while math.gcd(step, size) > 1:
        step += 1
    return step
