"""What layers read: samples of their inputs, grids that fit them, and the error of rounding."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine.engine import Engine
from proxyq.engine.gradients import stride
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.examples import locate, split_examples
from proxyq.quantize import Grid, Range, fake_quantize, fit_grid

ActivationRange = Literal["min-max", "percentile", "mse", "moving-average"]
"""How a layer's input gets its range: all values seen, all but a thousandth of them on each side,
the range with the least squared error, or extremes of batches averaged as they come."""

_SAMPLES, _LEAST_SAMPLES = 1 << 16, 1 << 12
_AVERAGED = 32  # images in a batch whose extremes enter the moving average
_NEW = 0.1  # weight of a new batch in it


def input_samples(engine: Engine, inputs: Any, layers: Sequence[str]) -> dict[int, np.ndarray]:
    """Values that the named layers' sites read in the float network, by site; of no lookup.

    At most 65,536 values a batch (fewer where the engine's memory has no room for them), at a
    fixed stride that meets all channels, and then the least and the greatest of all, which stay
    whatever the stride. Padding does not count.
    """
    network = engine.network
    wanted = _samples_of_a_batch(engine, inputs, layers)
    places = locate(network.graph)
    samples: dict[int, list[np.ndarray]] = {}
    extremes: dict[int, list[np.ndarray]] = {}
    for batch, count in engine.chunks(inputs):
        state = engine.start(batch)
        for index, site in enumerate(network.sites):
            data = network.graph.main[site.position].invars[1 - site.operand]
            if site.layer in layers and not site.lookup:
                x = np.asarray(state[data] if data in state else engine.frontier[data])
                if data in places:  # else it is no image's own
                    x = split_examples(x, places[data], engine.batch_size)[:count]
                # A copy: the view would hold the whole tensor, of every batch and layer.
                values = x.ravel()[:: stride(x.size, wanted)].copy()
                samples.setdefault(index, []).append(values)
                extremes.setdefault(index, []).append(np.array([x.min(), x.max()]))
            state, _ = engine.step(state, index)
    return {
        index: np.concatenate([*parts, [np.min(extremes[index]), np.max(extremes[index])]])
        for index, parts in samples.items()
    }


def _samples_of_a_batch(engine: Engine, inputs: Any, layers: Sequence[str]) -> int:
    """How many values of each site's input to keep of a batch."""
    room = engine.room
    if room is None:
        return _SAMPLES
    batches = -(-len(jax.tree.leaves(inputs)[0]) // engine.batch_size)
    sites = sum(site.layer in layers for site in engine.network.sites)
    # Float32, and once more while a site's are put together.
    return int(np.clip(room // (8 * sites * batches), _LEAST_SAMPLES, _SAMPLES))


def input_grids(
    engine: Engine, bits: Mapping[str, int], inputs: Any, *, method: ActivationRange = "mse"
) -> dict[int, Grid]:
    """A grid for each named layer's input: asymmetric, one for the tensor, by site.

    A lookup has none. **Raises** `UsageError` for an unknown method, and `ProxyqError` for a layer
    that reads nothing but zeros: any range of it would be made up.
    """
    if method not in get_args(ActivationRange):
        known = ", ".join(get_args(ActivationRange))
        raise UsageError(f"the range of activations must be one of {known}, got {method!r}.")
    samples = input_samples(engine, inputs, tuple(bits))
    for index, x in samples.items():
        if not np.any(x):
            name = engine.network.sites[index].layer
            raise ProxyqError(
                f"the layer {name!r} reads nothing but zeros on the calibration data, so its "
                "activations have no range: give other data, or leave its activations float."
            )
    fit: Range = "mse"
    if method == "moving-average":
        samples, fit = _moving_averages(engine, inputs, tuple(bits)), "absmax"
    elif method != "mse":
        fit = "absmax" if method == "min-max" else "percentile"
    return {
        index: fit_input_grid(x, bits[engine.network.sites[index].layer], method=fit)
        for index, x in samples.items()
    }


def _moving_averages(engine: Engine, inputs: Any, layers: Sequence[str]) -> dict[int, np.ndarray]:
    """Least and greatest input of the named layers' sites, `[2]` each, averaged over batches.

    The images come in their order, 32 at a time (Jacob et al. 2018, arXiv:1712.05877, section
    3.1), however many run at once.
    """
    network, places = engine.network, locate(engine.network.graph)
    found: dict[int, list[np.ndarray]] = {}
    for batch, count in engine.chunks(inputs):
        state = engine.start(batch)
        for index, site in enumerate(network.sites):
            data = network.graph.main[site.position].invars[1 - site.operand]
            if site.layer in layers and not site.lookup:
                x = np.asarray(state[data] if data in state else engine.frontier[data])
                split = x[None]
                if data in places:
                    split = split_examples(x, places[data], engine.batch_size)[:count]
                rows = split.reshape(len(split), -1)
                ends = np.stack([rows.min(axis=1), rows.max(axis=1)], axis=1)
                found.setdefault(index, []).append(ends)
            state, _ = engine.step(state, index)
    averages = {}
    for index, parts in found.items():
        ends = np.concatenate(parts).astype(np.float64)
        average: Any = None
        for start in range(0, len(ends), _AVERAGED):
            some = ends[start : start + _AVERAGED]
            new = np.array([some[:, 0].min(), some[:, 1].max()])
            # r <- r + 0.1 (new - r)
            average = new if average is None else average + _NEW * (new - average)
        averages[index] = average
    return averages


@partial(jax.jit, static_argnames="method")
def _fit(x: Any, bits: Any, method: Range) -> Grid:
    return fit_grid(x, bits, symmetric=False, method=method)


def fit_input_grid(x: np.ndarray, bits: int, *, method: Range = "mse") -> Grid:
    """The grid of one tensor, from samples of it."""
    grid = _fit(jnp.asarray(x, jnp.float32), bits, method)
    return Grid(*(jnp.reshape(field, ()) for field in grid))


def input_errors(
    engine: Engine, inputs: Any, bits: Sequence[int]
) -> dict[str, dict[str, np.ndarray]]:
    """What rounding does to each layer's input, from samples: mean squares, per value.

    For each layer `error [bits]`, the mean squared rounding error; `variance` of the values.
    Several sites of a layer count alike. An embedding reads indices, which nobody rounds: zeros.
    """
    found: dict[str, list[tuple[np.ndarray, float]]] = {
        layer.name: [(np.zeros(len(bits)), 0.0)]
        for layer in engine.network.layers
        if not layer.reads_numbers
    }
    for index, x in input_samples(engine, inputs, engine.network.names).items():
        values = x[:-2]  # the extremes are for the grid; here they stand among the others
        grids = [fit_input_grid(x, b) for b in bits]
        rounded = (np.asarray(fake_quantize(jnp.asarray(values, jnp.float32), g)) for g in grids)
        errors = [np.mean((y - values) ** 2, dtype=np.float64) for y in rounded]
        own = (np.array(errors), float(np.var(values, dtype=np.float64)))
        found.setdefault(engine.network.sites[index].layer, []).append(own)
    return {
        name: {
            "error": np.mean([error for error, _ in parts], axis=0),
            "variance": np.array(np.mean([variance for _, variance in parts])),
        }
        for name, parts in found.items()
    }
