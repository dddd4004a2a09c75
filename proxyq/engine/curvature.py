"""Second derivatives of the mean loss, layer by layer: traces and top eigenvalues.

`H_l` is the block of the Hessian that belongs to layer `l`: with respect to its weight, or
to the tensor that it reads (then a block for each image, and traces are means over images).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.checkpoint import Checkpoint
from proxyq.engine.backward import record
from proxyq.engine.blocks import Block, along, blocks, first_blocks, summed
from proxyq.engine.engine import Engine
from proxyq.engine.gradients import per_image, squared_norms
from proxyq.engine.objectives import Objective, Targets, cross_entropy, curvature_probe
from proxyq.errors import ProxyqError, UsageError
from proxyq.progress import Progress, silent

OF = ("weights", "inputs")
CURVATURES = ("hessian", "gauss-newton")
PROBES = ("auto", "output", "layer", "joint")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Estimates for every layer: `trace [layers]`, its standard `error`, `probes` drawn."""

    trace: np.ndarray
    error: np.ndarray
    probes: np.ndarray


def hutchinson(
    engine: Engine,
    inputs: Any,
    objective: Objective,
    targets: Targets,
    *,
    key: Any,
    of: str = "weights",
    curvature: str = "gauss-newton",
    probes: str = "auto",
    tolerance: float = 0.1,
    least: int = 8,
    most: int = 64,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> Trace:
    """Traces of the diagonal blocks by Hutchinson's estimator.

    With probes of random signs, `E[v' H v] = tr H`, with variance twice the sum of squares off
    the diagonal: exact for a diagonal matrix (Hutchinson 1990).

    **Arguments:**

    - `of`: `weights`, or `inputs` (what each layer reads; per image). That of indices is 0.
    - `curvature`: `gauss-newton`, `G = J' (d2L/dz2) J`, never negative, and in one layer's
      weight the whole Hessian where the network is piecewise linear (ReLU, max pooling); or
      `hessian`, with the network's own second derivatives.
    - `probes`: where the random signs are. `output`, for Gauss-Newton and cross-entropy: signs
      on the outputs of every image apart, `tr G = E |J' L u|^2` with `L L' = d2L/dz2`; one
      backward pass serves all layers, and the noise averages out over images too. `layer`: on
      one layer's weight at a time, all images alike (on what it reads: drawn batch by batch).
      `joint`: on all weights at once, `v_l' (H v)_l`; unbiased, with the blocks off the
      diagonal as further noise. `auto` is `output` for Gauss-Newton, and `layer` for the Hessian.
    - `tolerance`, `least`, `most`: a layer is done after `least` probes, when the standard
      error of its mean is within `tolerance` of it (or of a hundredth of the largest average
      over a layer's entries); or after `most`. The rule of PyHessian, that the running mean
      moves by less than 0.1 %, may stop after two lucky draws.
    """
    for name, value, allowed in (
        ("of", of, OF),
        ("curvature", curvature, CURVATURES),
        ("probes", probes, PROBES),
    ):
        if value not in allowed:
            raise UsageError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
    if not 1 <= least <= most:
        raise UsageError(f"`least` must be from 1 to `most` ({most}), got {least}.")
    checkpoint = checkpoint or Checkpoint()
    all_blocks = blocks(engine)
    number = len(engine.network.names)
    sizes = _sizes(engine, all_blocks, of)
    kept = checkpoint.load(f"trace-{of}") or {}
    sums = kept.get("sums", np.zeros(number))
    squares = kept.get("squares", np.zeros(number))
    counts = kept.get("counts", np.zeros(number, np.int64))
    if probes == "auto":
        probes = "output" if curvature == "gauss-newton" else "layer"
    joint = probes in ("joint", "output")
    if probes == "joint" and curvature == "gauss-newton":
        raise UsageError("probes='joint' are for curvature='hessian': use probes='output'.")
    if probes == "output" and (curvature != "gauss-newton" or objective is not cross_entropy):
        raise UsageError(
            "probes='output' are for curvature='gauss-newton' of the cross-entropy: use "
            "probes='layer'."
        )
    while (open_ := _unfinished(sums, squares, counts, sizes, tolerance, least, most)).any():
        if joint:
            open_[:] = True
        index = int(counts.max(initial=0)) if joint else int(counts[open_].min())
        now = open_ & (counts == index)
        wanted = [block for block in all_blocks if now[block.layer]]
        own_key = jax.random.fold_in(key, index)
        if probes == "output":
            forms = _output_forms(engine, inputs, wanted, own_key, of)
        else:
            forms = _forms(
                engine,
                inputs,
                objective,
                targets,
                wanted,
                own_key,
                inputs_too=of == "inputs",
                gauss_newton=curvature == "gauss-newton",
                joint=joint,
            )
        sums, squares = sums + forms, squares + forms**2
        counts = counts + now
        progress("probe", int(counts.sum()), int(np.where(open_, most, counts).sum()))
        if checkpoint.due():
            state = {"sums": sums, "squares": squares, "counts": counts}
            checkpoint.save(f"trace-{of}", state)
    mean, error = _mean_and_error(sums, squares, counts)
    return Trace(trace=mean, error=error, probes=counts)


def _mean_and_error(
    sums: np.ndarray, squares: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    number = np.maximum(counts, 1)
    mean = sums / number
    variance = np.maximum(squares / number - mean**2, 0.0) * number / np.maximum(number - 1, 1)
    # One draw tells nothing of how far it may be off.
    return mean, np.where(counts > 1, np.sqrt(variance / number), np.inf)


def _unfinished(
    sums: np.ndarray,
    squares: np.ndarray,
    counts: np.ndarray,
    sizes: np.ndarray,
    tolerance: float,
    least: int,
    most: int,
) -> np.ndarray:
    mean, error = _mean_and_error(sums, squares, counts)
    floor = 0.01 * np.max(np.abs(mean / np.maximum(sizes, 1)), initial=0.0) * sizes
    close = error <= tolerance * np.maximum(np.abs(mean), floor)
    return (counts < most) & ~((counts >= least) & close)


def _sizes(engine: Engine, all_blocks: Sequence[Block], of: str) -> np.ndarray:
    """Entries of each layer's weight, or of what it reads for one image."""
    sizes = np.zeros(len(engine.network.names))
    for block in all_blocks:
        for site in _reading(engine, block) if of == "inputs" else block.sites[:1]:
            sizes[block.layer] += _shape(engine, site, of)[0]
    return sizes


def _reading(engine: Engine, block: Block) -> tuple[int, ...]:
    """The sites that read numbers: indices have no derivatives."""
    return tuple(site for site in block.sites if not engine.network.sites[site].lookup)


def _shape(engine: Engine, site: int, of: str) -> tuple[int, tuple[int, ...]]:
    """Entries (per image for inputs) and shape of what is perturbed at a site."""
    where = engine.network.sites[site]
    eqn = engine.network.graph.main[where.position]
    aval = eqn.invars[where.operand if of == "weights" else 1 - where.operand].aval
    return (aval.size if of == "weights" else aval.size // engine.batch_size), aval.shape


def input_sizes(engine: Engine) -> np.ndarray:
    """`[layers]`: how many values a layer reads for one image."""
    return _sizes(engine, blocks(engine), "inputs")


def _forms(
    engine: Engine,
    inputs: Any,
    objective: Objective,
    targets: Targets,
    wanted: Sequence[Block],
    key: Any,
    *,
    inputs_too: bool,
    gauss_newton: bool,
    joint: bool,
) -> np.ndarray:
    """`v' H v` of one probe a layer, for the mean loss: `[layers]`."""
    forms = np.zeros(len(engine.network.names))
    of = "inputs" if inputs_too else "weights"
    images = 0
    for batch, count in engine.chunks(inputs):
        tape = record(engine, batch, count, objective, targets, images)
        own = jax.random.fold_in(key, images) if inputs_too else key
        directions: list[tuple[Block, dict[int, Any]]] = []
        for block in wanted:
            draws = {}
            for site in _reading(engine, block) if inputs_too else block.sites:
                if not inputs_too and draws:  # one weight, one change, at all its sites
                    draws[site] = draws[block.sites[0]]
                    continue
                shape = _shape(engine, site, of)[1]
                draws[site] = _rademacher(jax.random.fold_in(own, site), shape)
            if draws:
                directions.append((block, draws))
        if joint and directions:
            whole = {site: v for _, draws in directions for site, v in draws.items()}
            products = tape.tangents(whole, of).hessian()
            for block, draws in directions:
                forms[block.layer] += _inner(block, draws, products, inputs_too)
        else:
            for block, draws in directions:
                moved = tape.tangents(draws, of, keep=not gauss_newton)
                if gauss_newton:
                    forms[block.layer] += moved.gauss_newton_forms()[0, :count].sum()
                else:
                    forms[block.layer] += _inner(block, draws, moved.hessian(), inputs_too)
        images += count
    return forms / images


def _output_forms(
    engine: Engine, inputs: Any, wanted: Sequence[Block], key: Any, of: str
) -> np.ndarray:
    """`|J' L u|^2` of each layer, the mean over the images, one draw of signs each: `[layers]`."""
    aims = Targets(how="probes", seed=int(jax.random.bits(key, dtype=jnp.uint32)))
    forms = np.zeros(len(engine.network.names))
    images = 0
    for batch, count in engine.chunks(inputs):
        tape = record(engine, batch, count, curvature_probe, aims, images)
        tape.backward()
        for block in wanted:
            if of == "inputs":
                reading = _reading(engine, block)
                pulled = (tape.pull_input(site, tape.deltas[site]) for site in reading)
                forms[block.layer] += sum(_dot(p[None], p[None]) for p in pulled)
            else:
                norms = per_image(tape, block, squared_norms)
                forms[block.layer] += np.sum(np.asarray(norms, np.float64)[:count])
        images += count
    return forms / images


def _rademacher(key: Any, shape: tuple[int, ...]) -> Any:
    return jax.random.rademacher(key, (1, *shape), jnp.float32)


def _inner(
    block: Block, draws: Mapping[int, Any], products: dict[int, Any], inputs_too: bool
) -> float:
    if inputs_too:
        return sum(_dot(draws[site], products[site]) for site in block.sites)
    return _dot(draws[block.sites[0]], summed(block, products))


@jax.jit
def _rows_dot(first: Any, second: Any) -> Any:
    product = first.astype(jnp.float32) * second.astype(jnp.float32)
    return jnp.sum(product.reshape(-1, product.shape[-1]), axis=0)


def _dot(first: Any, second: Any) -> float:
    return float(np.sum(np.asarray(_rows_dot(first, second), np.float64)))


# -- products for whole layers -----------------------------------------------------------


def hessian_products(
    engine: Engine,
    inputs: Any,
    objective: Objective,
    targets: Targets,
    directions: Mapping[int, np.ndarray],
    *,
    joint: bool = False,
) -> dict[int, np.ndarray]:
    """`H_l v_l` of the mean loss for the layers in `directions`, in float64.

    Directions have the shape of a layer's weight at its first use. `joint` multiplies by the
    whole Hessian of those layers instead of its diagonal blocks: `(H v)_l`.
    """
    owners = first_blocks(engine)
    given = {layer: jnp.asarray(v, jnp.float32)[None] for layer, v in directions.items()}
    totals: dict[int, np.ndarray] = {}
    images = 0
    for batch, count in engine.chunks(inputs):
        tape = record(engine, batch, count, objective, targets, images)
        if joint:
            whole = {site: v for layer, v in given.items() for site in owners[layer].sites}
            products = tape.tangents(whole).hessian()
        for layer, v in given.items():
            block = owners[layer]
            if not joint:
                products = tape.tangents(along(block, v)).hessian()
            own = np.asarray(summed(block, products)[0], np.float64)  # type: ignore[possibly-unbound]
            totals[layer] = totals[layer] + own if layer in totals else own
        images += count
    return {layer: total / images for layer, total in totals.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Eigenvalues:
    """Top eigenvalues `value [layers]`, their last relative `change`, `iterations` made."""

    value: np.ndarray
    change: np.ndarray
    iterations: np.ndarray


def top_eigenvalues(
    engine: Engine,
    inputs: Any,
    objective: Objective,
    targets: Targets,
    *,
    key: Any,
    tolerance: float = 1e-2,
    least: int = 3,
    most: int = 20,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> Eigenvalues:
    """The eigenvalue of largest magnitude of every layer's Hessian block, by power iteration.

    `v <- H v / |H v|` from a normal draw, with the Rayleigh quotient `v' H v` as the estimate,
    until it changes by less than `tolerance` relative (after `least` iterations) or after
    `most`. It may be negative away from a minimum. All layers go in step, so that a batch is
    run and walked back once for all of them.
    """
    if not 1 <= least <= most:
        raise UsageError(f"`least` must be from 1 to `most` ({most}), got {least}.")
    checkpoint = checkpoint or Checkpoint()
    owners = first_blocks(engine)
    number = len(owners)
    kept = checkpoint.load("eigenvalues")
    if kept is None:
        vectors = {}
        for layer, block in enumerate(owners):
            shape = engine.weight(block.sites[0]).shape
            draw = np.asarray(jax.random.normal(jax.random.fold_in(key, layer), shape), np.float64)
            vectors[layer] = draw / np.linalg.norm(draw)
        value, change = np.zeros(number), np.full(number, np.inf)
        iterations = np.zeros(number, np.int64)
    else:
        vectors = {layer: kept[f"v{layer}"] for layer in range(number)}
        value, change, iterations = kept["value"], kept["change"], kept["iterations"]
    while True:
        open_ = (iterations < most) & ~((iterations >= least) & (change <= tolerance))
        if not open_.any():
            return Eigenvalues(value=value, change=change, iterations=iterations)
        now = {layer: vectors[layer] for layer in range(number) if open_[layer]}
        for layer, product in hessian_products(engine, inputs, objective, targets, now).items():
            quotient = float(np.sum(now[layer] * product))
            norm = np.linalg.norm(product)
            if not np.isfinite(norm):
                raise ProxyqError(
                    f"the Hessian of layer {engine.network.names[layer]!r} is not finite: check "
                    "the model's weights and the data."
                )
            last = value[layer]
            change[layer] = (
                abs(quotient - last) / (abs(last) + 1e-6) if iterations[layer] else np.inf
            )
            value[layer] = quotient
            iterations[layer] += 1
            if norm == 0:  # a layer that the loss does not depend on
                change[layer] = 0.0
                iterations[layer] = most
            else:
                vectors[layer] = product / norm
        progress("iterate", int(iterations.sum()), most * number)
        if checkpoint.due():
            state = {f"v{layer}": v for layer, v in vectors.items()}
            state |= {"value": value, "change": change, "iterations": iterations}
            checkpoint.save("eigenvalues", state)
