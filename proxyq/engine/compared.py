"""Matrices that relate all images to each other, of more images than may be held at one layer.

All batches walk in step, layer by layer, as many states in memory as it has room for (see
`Spill`). What a layer hands on is put together for all images, `[images, values]`, in a file
where it is too large, and read back some columns at a time: each matrix is a sum over columns,

    (X - m)(X - m)' = sum over tiles of columns of (X_t - m_t)(X_t - m_t)'

so that one pass over the images is enough, whatever their number.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine.engine import Engine
from proxyq.engine.memory import WHOLE_MEMORY, bytes_per_image, evenly, too_little
from proxyq.engine.segments import NO_EDIT
from proxyq.engine.spill import Overflow, Spill, no_room
from proxyq.model.examples import Examples, split_examples
from proxyq.model.features import features
from proxyq.model.graph import Var
from proxyq.progress import Progress

_COPIES = 4
"""Of a tile: as it is kept where that is not in a file, as it was read, as the device has it, and
centred."""


def matrices_bytes(engine: Engine, images: int, needs: int, feature: str) -> int:
    """What matrices `[images, images]` of all layers take: one for each of the `needs` and each
    feature, and the one that is being summed."""
    own = set(features(engine.network, feature).values())
    return 8 * images**2 * (needs * len(own) + 2)


def record_compared(
    engine: Engine,
    inputs: Any,
    needs: tuple[str, ...],
    recorded: dict[str, dict[str, Any]],
    *,
    feature: str,
    centre: bool,
    memory: int | None,
    progress: Progress,
) -> None:
    """`gram` and `codes` of every layer's feature into `recorded`, in one pass.

    Of what `memory` leaves beside the matrices half is for the batch that runs, a quarter for the
    states of the others, and a quarter for columns of a feature.

    **Raises** `UsageError` where there is no room for one image, `ProxyqError` where the folder for
    temporary files has none.
    """
    images = len(jax.tree.leaves(inputs)[0])
    held = 0 if memory is None else matrices_bytes(engine, images, len(needs), feature)
    bound = WHOLE_MEMORY if memory is None else memory - held
    if engine.network.batch_norm == "batch":
        least = held + images * _bytes_per_image(engine, feature)
        what = f"statistics of the batch need all {images} images at once, which"
        raise too_little(what, least, bound + held, ", or fewer images")
    least = 2 * _bytes_per_image(engine, feature)
    if least > bound:
        what = f"comparing {images} images with each other layer by layer"
        raise too_little(what, held + least, bound + held, ", or fewer images (--samples)")
    most = bound // least
    engine = engine.with_at_most(evenly(images, most, engine.placement.images))
    # The features of an engine of another size are other variables.
    network, size = engine.network, engine.batch_size
    own = features(network, feature)
    captured = _captured(engine, feature)
    places = {
        own[name]: network.sites[network.sites_of(name)[0]].examples for name in network.names
    }
    done, steps = 0, len(network.sites) * -(-images // size)
    # Of one width, so that one program serves all layers.
    widest = max(var.aval.size for var in own.values()) // size
    tile = max(1, min(widest, bound // 4 // (4 * _COPIES * images)))
    with Spill(bound // 4) as states:
        counts = []
        for number, (batch, count) in enumerate(engine.chunks(inputs)):
            states.put(number, engine.start(batch))
            counts.append(count)
        for index, capture in enumerate(captured):
            with _Features(images, capture, size, tile) as rows:
                for number, count in enumerate(counts):
                    state, values = engine.step(states.get(number), index, NO_EDIT, capture)
                    states.put(number, state)
                    for var, value in zip(capture, values, strict=True):
                        part = np.asarray(_rows(value, places[var], size))[:count]
                        rows.put(var, number * size, part)
                    done += 1
                    progress("record", done, steps)
                for var in capture:
                    found = {
                        need: _matrix(need, rows.columns(var), images, centre) for need in needs
                    }
                    for name in (name for name, one in own.items() if one is var):
                        recorded[name].update(found)


def _captured(engine: Engine, feature: str) -> list[tuple[Var, ...]]:
    """For each site the features that its segment makes."""
    own = dict.fromkeys(features(engine.network, feature).values())
    made = [{var for eqn in one.eqns for var in eqn.outvars} for one in engine.segments[1:]]
    return [tuple(var for var in own if var in some) for some in made]


def _bytes_per_image(engine: Engine, feature: str) -> int:
    """What one image takes while it runs: two states, and what it hands on, as it was captured and
    as a row."""
    graph = engine.network.graph
    largest = max(sum(var.aval.size for var in some) for some in _captured(engine, feature))
    return 2 * bytes_per_image(graph) + 2 * 4 * largest // graph.batch_size


@partial(jax.jit, static_argnums=(1, 2))
def _rows(feature: Any, where: Examples, batch: int) -> Any:
    return split_examples(feature, where, batch).reshape(batch, -1).astype(jnp.float32)


class _Features(Overflow):
    """Features of all images, float32 `[images, values]` each, in memory where they are not wider
    than a `tile`, else in a file; put by rows and taken by columns."""

    def __init__(self, images: int, variables: tuple[Var, ...], batch: int, tile: int):
        super().__init__()
        self.images, self.tile = images, tile
        self.widths = {var: var.aval.size // batch for var in variables}
        self._here: dict[Var, np.ndarray] = {}
        self._starts: dict[Var, int] = {}
        end = 0
        for var, width in self.widths.items():
            if sum(self.widths.values()) <= self.tile:
                self._here[var] = np.empty((images, width), np.float32)
            else:
                self._starts[var], end = end, end + 4 * images * width

    def put(self, var: Var, first: int, rows: np.ndarray) -> None:
        """The features of some images, from the `first` on."""
        if var in self._here:
            self._here[var][first : first + len(rows)] = rows
            return
        try:
            file = self._open()
            file.seek(self._starts[var] + 4 * self.widths[var] * first)
            file.write(np.ascontiguousarray(rows).data)
            file.flush()  # what has no room is told here, not where it is read
        except OSError as error:
            raise no_room(error) from None

    def columns(self, var: Var) -> Iterator[tuple[np.ndarray, int]]:
        """All images' values, some columns `[images, tile]` after the others, and how many of these
        are real: the others are 0."""
        width = self.widths[var]
        for start in range(0, width, self.tile):
            # A new one each time: the device may go on reading the last.
            tile = np.zeros((self.images, self.tile), np.float32)
            count = min(self.tile, width - start)
            if var in self._here:
                tile[:, :count] = self._here[var]
            else:
                file = self._open()
                for row in range(self.images):
                    file.seek(self._starts[var] + 4 * (width * row + start))
                    file.readinto(tile[row, :count].view(np.uint8))  # type: ignore[attr-defined]
            yield tile, count


def _matrix(
    need: str, tiles: Iterator[tuple[np.ndarray, int]], images: int, centre: bool
) -> np.ndarray:
    total = np.zeros((images, images))
    for tile, count in tiles:
        if need == "gram":
            total += np.asarray(_gram(tile, centre))
        else:
            # Units that agree less those that do not, and all, halved. Columns of 0 agree.
            found = np.asarray(_signs_agree(tile), np.float64) - (tile.shape[1] - count)
            total += (found + count) / 2
    return total


@partial(jax.jit, static_argnums=1)
def _gram(tile: Any, centre: bool) -> Any:
    if centre:
        tile = tile - jnp.mean(tile, axis=0)
    return jnp.dot(tile, tile.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _signs_agree(tile: Any) -> Any:
    code = signs(tile)
    return jnp.dot(code, code.T, precision=jax.lax.Precision.HIGHEST)


def signs(x: Any) -> Any:
    """Units that are on as 1, off as -1: a product counts agreements less disagreements."""
    code = jnp.where(x > 0, 1.0, -1.0)
    return jnp.where(jnp.isnan(x), jnp.nan, code)  # neither on nor off
