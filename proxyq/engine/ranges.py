"""What layers read: samples of their inputs, grids that fit them, and the error of rounding."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine.engine import Engine
from proxyq.engine.gradients import stride
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.examples import locate, split_examples
from proxyq.model.graph import Var
from proxyq.model.network import Network
from proxyq.quantize import Grid, Range, fake_quantize, fit_grid

ActivationRange = Literal["min-max", "percentile", "mse", "moving-average"]
"""How a layer's input gets its range: all values seen, all but a thousandth of them on each side,
the range with the least squared error, or extremes of batches averaged as they come."""

_SAMPLES, _LEAST_SAMPLES = 1 << 16, 1 << 12
_AVERAGED = 32  # images in a batch whose extremes enter the moving average
_NEW = 0.1  # weight of a new batch in it


P = TypeVar("P", bound=int | tuple[int, int])
Point = int | tuple[int, int]
"""Where values are rounded: a site, by its index, at its input; or an operand of a product of two
activations, by the product's index in `network.attention` and the operand's (0 is the left one)."""


class ActivationGrids(NamedTuple):
    """The grids of all that is rounded beside weights.

    `inputs` of sites, by site; `attention`: of both operands of products of two activations, by
    the product's index in `network.attention`.
    """

    inputs: Mapping[int, Grid] = {}
    attention: Mapping[int, tuple[Grid, Grid]] = {}


def input_samples(engine: Engine, inputs: Any, layers: Sequence[str]) -> dict[int, np.ndarray]:
    """Values that the named layers' sites read in the float network, by site; of no lookup.

    At most 65,536 values a batch (fewer where the engine's memory has no room for them), at a
    fixed stride that meets all channels, and then the least and the greatest of all, which stay
    whatever the stride. Padding does not count.
    """
    return _samples(engine, inputs, _inputs_of(engine, layers))


def attention_samples(
    engine: Engine, inputs: Any, products: Sequence[str]
) -> dict[tuple[int, int], np.ndarray]:
    """The same of both operands of the named products of two activations."""
    return _samples(engine, inputs, _operands_of(engine, products))


def _inputs_of(engine: Engine, layers: Sequence[str]) -> list[int]:
    sites = enumerate(engine.network.sites)
    return [index for index, site in sites if site.layer in layers and not site.lookup]


def _operands_of(engine: Engine, products: Sequence[str]) -> list[tuple[int, int]]:
    known = enumerate(engine.network.attention)
    return [(index, side) for index, p in known if p.name in products for side in (0, 1)]


def _samples(engine: Engine, inputs: Any, points: Sequence[P]) -> dict[P, np.ndarray]:
    wanted = _samples_of_a_batch(engine, inputs, len(points))
    samples: dict[P, list[np.ndarray]] = {}
    extremes: dict[P, list[np.ndarray]] = {}
    for point, x, _ in _values(engine, inputs, points):
        # A copy: the view would hold the whole tensor, of every batch and layer.
        values = x.ravel()[:: stride(x.size, wanted)].copy()
        samples.setdefault(point, []).append(values)
        extremes.setdefault(point, []).append(np.array([x.min(), x.max()]))
    return {
        point: np.concatenate([*parts, [np.min(extremes[point]), np.max(extremes[point])]])
        for point, parts in samples.items()
    }


def _values(
    engine: Engine, inputs: Any, points: Sequence[P]
) -> Iterator[tuple[P, np.ndarray, bool]]:
    """What is read at points in the float network: batch after batch, in execution order.

    Yields the point, its values without padding, and whether their first axis is the images'.
    """
    network = engine.network
    places = locate(network.graph)
    at: dict[int, list[P]] = {}
    for point in points:
        own = point if isinstance(point, int) else network.attention[point[0]].site
        at.setdefault(own, []).append(point)
    for batch, count in engine.chunks(inputs):
        state = engine.start(batch)
        for index, site in enumerate(network.sites):
            found: list[tuple[P, Var, Any]] = []
            inside: list[tuple[P, Var]] = []
            for point in at.get(index, ()):
                if isinstance(point, tuple):
                    product, side = point
                    inside.append((point, network.attention[product].operands[side]))
                    continue
                data = network.graph.main[site.position].invars[1 - site.operand]
                value = state[data] if data in state else engine.frontier[data]
                found.append((point, data, np.asarray(value)))
            state, recorded = engine.step(state, index, capture=tuple(var for _, var in inside))
            found += [(*own, value) for own, value in zip(inside, recorded, strict=True)]
            for point, var, value in found:
                x = np.asarray(value)
                if var in places:  # else it is no image's own
                    x = split_examples(x, places[var], engine.batch_size)[:count]
                yield point, x, var in places


def _samples_of_a_batch(engine: Engine, inputs: Any, points: int) -> int:
    """How many values of each point to keep of a batch."""
    room = engine.room
    if room is None:
        return _SAMPLES
    batches = -(-len(jax.tree.leaves(inputs)[0]) // engine.batch_size)
    # Float32, and once more while those of a point are put together.
    return int(np.clip(room // (8 * max(points, 1) * batches), _LEAST_SAMPLES, _SAMPLES))


def activation_grids(
    engine: Engine,
    layers: Mapping[str, int],
    products: Mapping[str, int],
    inputs: Any,
    *,
    method: ActivationRange = "mse",
) -> ActivationGrids:
    """Grids for the inputs of the named layers and the operands of the named products.

    Both are named with their bits. Each grid is asymmetric, one for the tensor; a lookup has none.

    **Raises** `UsageError` for an unknown method, and `ProxyqError` where nothing but zeros is
    read: any range of it would be made up.
    """
    if method not in get_args(ActivationRange):
        known = ", ".join(get_args(ActivationRange))
        raise UsageError(f"the range of activations must be one of {known}, got {method!r}.")
    network = engine.network
    points: list[Point] = [
        *_inputs_of(engine, tuple(layers)),
        *_operands_of(engine, tuple(products)),
    ]
    samples = _samples(engine, inputs, points) if points else {}
    for point, x in samples.items():
        if not np.any(x):
            raise ProxyqError(
                f"{_reader(network, point)} reads nothing but zeros on the calibration data, so "
                "its activations have no range: give other data, or leave its activations float."
            )
    fit: Range = "mse"
    if method == "moving-average":
        samples, fit = _moving_averages(engine, inputs, points), "absmax"
    elif method != "mse":
        fit = "absmax" if method == "min-max" else "percentile"
    found: dict[Point, Grid] = {}
    for point, x in samples.items():
        if isinstance(point, int):
            bits = layers[network.sites[point].layer]
        else:
            bits = products[network.attention[point[0]].name]
        found[point] = fit_input_grid(x, bits, method=fit)
    return ActivationGrids(
        {point: grid for point, grid in found.items() if isinstance(point, int)},
        {
            point[0]: (grid, found[point[0], 1])
            for point, grid in found.items()
            if isinstance(point, tuple) and point[1] == 0
        },
    )


def _reader(network: Network, point: Point) -> str:
    if isinstance(point, int):
        return f"the layer {network.sites[point].layer!r}"
    return f"the product {network.attention[point[0]].name!r}"


def _moving_averages(
    engine: Engine, inputs: Any, points: Sequence[Point]
) -> dict[Point, np.ndarray]:
    """Least and greatest value at points, `[2]` each, averaged over batches.

    The images come in their order, 32 at a time (Jacob et al. 2018, arXiv:1712.05877, section
    3.1), however many run at once.
    """
    found: dict[Point, list[np.ndarray]] = {}
    for point, x, apart in _values(engine, inputs, points):
        rows = x.reshape(len(x) if apart else 1, -1)
        ends = np.stack([rows.min(axis=1), rows.max(axis=1)], axis=1)
        found.setdefault(point, []).append(ends)
    averages = {}
    for point, parts in found.items():
        ends = np.concatenate(parts).astype(np.float64)
        average: Any = None
        for start in range(0, len(ends), _AVERAGED):
            some = ends[start : start + _AVERAGED]
            new = np.array([some[:, 0].min(), some[:, 1].max()])
            # r <- r + 0.1 (new - r)
            average = new if average is None else average + _NEW * (new - average)
        averages[point] = average
    return averages


@partial(jax.jit, static_argnames="method")
def _fit(x: Any, bits: Any, method: Range) -> Grid:
    return fit_grid(x, bits, symmetric=False, method=method)


def fit_input_grid(x: np.ndarray, bits: int, *, method: Range = "mse") -> Grid:
    """The grid of one tensor, from samples of it, whatever groups weights of so many bits have."""
    grid = _fit(jnp.asarray(x, jnp.float32), int(bits), method)
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
