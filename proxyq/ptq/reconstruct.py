"""Learned rounding: each weight goes up or down so that layers, or blocks, keep their outputs.

Rounding to the nearest code is not the best for a network: what a layer hands on depends on all
its rounding errors together. AdaRound (Nagel et al. 2020, arXiv:2004.10568) learns for every
weight whether it goes up or down, layer after layer, with gradient descent on a few unlabelled
images; BRECQ (Li et al. 2021, arXiv:2102.05426) does so for all layers of a block at once and
weighs each element of the block's output by its Fisher information.

For one piece (a layer and what follows it up to the next, or a block), with the network before it
already quantized:

    minimise over V:  sum_k F_k (y_k(W(V), x^) - y_k(W, x))^2 / n
                      + penalty sum_i (1 - |2 h_i - 1|^beta) / N

    W(V) = (clip(floor(W / s + z) + h(V), 0, 2^b - 1) - z) s
    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)

(AdaRound, equations 21 to 25), where x^ is what the quantized network hands to the piece and x
what the float one does. beta falls from 20 to 2, so that every h ends at 0 or 1.

Where ours differs from the papers:

- The error is divided by that of rounding to nearest, and the penalty by the number of weights:
  one set of numbers serves networks of any scale.
- A gain and a shift for each output channel are learned beside the rounding (`affine`). They fold
  into scale and bias and cost nothing, as the correction of statistics does, which this replaces.
- The Fisher information is that of the network's own predictions: labels drawn from its softmax,
  no data's labels. It is an option (`weighting`), and not the default: weighed by each image's own
  (BRECQ, equation 10) the few images that the network is unsure of decide everything, and plain
  squared error, which BRECQ's published code runs, came out 12 points better on ResNet-20 at 2.5
  bits; weighed by the mean over images it is level with plain.
- Mini-batches are drawn from batches of images that were put together once.
- Tables that are looked up (embeddings, also where the head has the same weight) stay rounded to
  nearest: a few images hold few of their rows, and a gain of the channels has no place there.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from proxyq.checkpoint import Checkpoint
from proxyq.devices import main_memory
from proxyq.engine import Edit, Engine
from proxyq.engine.memory import amount
from proxyq.engine.pieces import Piece, PieceEdits, block_pieces, layer_pieces
from proxyq.engine.ranges import ActivationGrids
from proxyq.engine.segments import remember
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.examples import locate
from proxyq.model.graph import Var
from proxyq.progress import Progress, silent
from proxyq.quantize.integers import Integers

Level = Literal["layer", "block"]
Weighting = Literal["none", "image", "mean"]
STAGE = "reconstruct"
_LOW, _HIGH = -0.1, 1.1  # zeta and gamma of the rectified sigmoid
_BETA = (20.0, 2.0)
_AT_ONCE = 50  # steps between two looks at the error


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How rounding is learned.

    - `steps`: of Adam for each piece; `batch_size`: images in each.
    - `learning_rate`: of the rounding; `affine_rate`: of gains and shifts, 0 for none.
    - `penalty`: weight of the term that decides the rounding; `warm_up`: the share of the steps
      before it acts.
    - `weighting`: of the elements of the output: `none`, their Fisher information by `image`, or
      the `mean` of that over the images.
    """

    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 0.03
    affine_rate: float = 1e-3
    penalty: float = 1.0
    warm_up: float = 0.2
    weighting: Weighting = "none"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("steps", 1, None),
            ("batch_size", 1, None),
            ("learning_rate", 0, None),
            ("affine_rate", 0, None),
            ("penalty", 0, None),
            ("warm_up", 0, 1),
        ):
            value = getattr(self, name)
            if not (value >= least and (most is None or value <= most) and value < float("inf")):
                bound = f"at least {least}" + ("" if most is None else f" and at most {most}")
                raise UsageError(f"`{name}` of the learning must be {bound}, got {value}.")
        if self.weighting not in get_args(Weighting):
            known = ", ".join(get_args(Weighting))
            raise UsageError(f"`weighting` must be one of {known}, got {self.weighting!r}.")


class Rounded(NamedTuple):
    """A site's learned weight as integers, `[fan_in, channels]`, and what is added `[channels]`.

    A table that is looked up keeps the nearest codes, and nothing is added.
    """

    integers: Integers
    offset: np.ndarray | None


def reconstruct(
    engine: Engine,
    start: Mapping[int, Integers],
    inputs: Any,
    *,
    level: Level = "block",
    grids: ActivationGrids | None = None,
    learning: Learning | None = None,
    key: Any,
    memory: int | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> dict[int, Rounded]:
    """Learn the rounding of every site in `start`, piece by piece in the order of the network.

    **Arguments:**

    - `engine`: at `learning.batch_size` images (or one, where images cannot be told apart).
    - `start`: each quantized site's weight rounded to nearest: its grid is kept.
    - `inputs`: unlabelled calibration inputs, `[images, …]`. All tensors that live between two
      pieces are held for all of them, twice: in float and quantized (`held_bytes` says how much).
    - `level`: `layer` (AdaRound) or `block` (BRECQ).
    - `grids`: of what is rounded beside weights.
    - `memory`: bound in bytes on what is held of the images; without one, what the machine has.
    - `checkpoint`: finished pieces are kept there; a run that was stopped goes on after them, to
      the same bytes.

    **Returns** what was learned, by site.

    **Raises** `UsageError` for fewer images than one batch, or more than `memory` has room for;
    `ProxyqError` where the error stops being a number.
    """
    learning, checkpoint = learning or Learning(), checkpoint or Checkpoint()
    if level not in ("layer", "block"):
        raise UsageError(f"`level` must be 'layer' or 'block', got {level!r}.")
    pieces = (block_pieces if level == "block" else layer_pieces)(engine.network)
    _check_room(engine, pieces, inputs, learning, memory)
    walk = _Walk(engine, inputs)
    grids = grids or ActivationGrids()
    learned: dict[int, Rounded] = {}
    by_weight: dict[Var, Rounded] = {}  # a weight used again is the same numbers
    for index, piece in enumerate(pieces):
        for i in piece.sites:
            if i in start and engine.network.looked_up(engine.network.sites[i].layer):
                learned[i] = Rounded(start[i], None)
        trained = [i for i in piece.sites if i in start and i not in learned]
        new = [i for i in trained if engine.network.sites[i].weight not in by_weight]
        for i in set(trained) - set(new):
            again = by_weight[engine.network.sites[i].weight]
            learned[i] = again._replace(offset=np.zeros(again.integers.scale.shape[1], np.float32))
        targets = walk.float_after(piece)
        if new:
            found = _restored(checkpoint, index, new, start)
            if found is None:
                found = _learn(
                    engine, piece, new, start, learned, grids, walk, targets, pieces[index + 1 :],
                    learning, jax.random.fold_in(key, index),
                )  # fmt: skip
                checkpoint.save(f"piece-{index}", _arrays(found))
            learned |= found
            for i, own in found.items():
                by_weight.setdefault(engine.network.sites[i].weight, own)
        del targets
        walk.advance(piece, _edits(engine, piece, learned, grids))
        progress(STAGE, index + 1, len(pieces))
    return learned


def held_bytes(engine: Engine, pieces: Sequence[Piece], learning: Learning) -> int:
    """What is held of one image while the dearest piece is learned.

    Its tensors before the piece in the quantized network and after it in the float one; once more,
    in stacks to draw batches from, what the piece reads and writes; and the weights of the errors,
    with a copy while they are put together.
    """
    weighed = 2 if learning.weighting != "none" else 0

    def size(some: Iterable[Var]) -> int:
        return sum(var.aval.size * var.aval.dtype.itemsize for var in {*some})

    most = max(
        size([*piece.keeps, *piece.reads])
        + size([*piece.keeps, *piece.writes])
        + size(piece.reads)
        + (1 + weighed) * size(piece.writes)
        for piece in pieces
    )
    return -(-most // engine.batch_size)


def step_bytes(engine: Engine, pieces: Sequence[Piece]) -> int:
    """What a step takes beside that: in the dearest piece each tensor of the batch, as it is,
    its derivative, and one of both as XLA lays it out."""

    def size(piece: Piece) -> int:
        made = (var for eqn in piece.eqns for var in eqn.outvars)
        return sum(var.aval.size * var.aval.dtype.itemsize for var in made)

    return 3 * max(map(size, pieces))


def _check_room(
    engine: Engine, pieces: Sequence[Piece], inputs: Any, learning: Learning, memory: int | None
) -> None:
    """Refuse before minutes of work what would be killed in the middle of it."""
    one, images = held_bytes(engine, pieces, learning), len(jax.tree.leaves(inputs)[0])
    room, whose = memory, "`memory` (--memory) allows"
    if room is None:
        room, whose = main_memory()["total"], "this machine has"
    if room is None:
        return
    step = step_bytes(engine, pieces)
    if one * images + step <= room:
        return
    fits = max(0, room - step) // one
    fits -= fits % engine.batch_size
    remedy = f"give at most {fits} images (--samples)" if fits else "give a smaller batch_size"
    raise UsageError(
        f"learning the rounding takes {amount(one * images + step)} for {images} images, and "
        f"{whose} {amount(room)}: {remedy}, or more memory."
    )


def learning_facts(learning: Learning) -> dict[str, Any]:
    """For provenance and keys of checkpoints."""
    return asdict(learning)


# -- walking ---------------------------------------------------------------------------

_FORWARD: dict[str, Any] = {}


def _forward(piece: Piece) -> Any:
    found = _FORWARD.get(piece.key)
    return found or remember(_FORWARD, piece.key, jax.jit(lambda e, c, r: piece(e, c, r)))


def _edits(
    engine: Engine, piece: Piece, learned: Mapping[int, Rounded], grids: ActivationGrids
) -> PieceEdits:
    """The piece's sites as far as they are learned, float where they are not."""
    edits = []
    for index in piece.sites:
        site, weight, offset = engine.network.sites[index], engine.weight(index), None
        if index in learned:
            own = learned[index]
            weight = site.from_columns(jnp.asarray(own.integers.values()), weight.shape)
            offset = None if own.offset is None else jnp.asarray(own.offset)
        edits.append(Edit(weight=weight, offset=offset, input_grid=grids.inputs.get(index)))
    products = tuple(grids.attention.get(index) for index in piece.attention)
    return PieceEdits(edits, products if any(products) else ())


def _float_edits(engine: Engine, piece: Piece) -> PieceEdits:
    return PieceEdits([Edit(weight=engine.weight(index)) for index in piece.sites])


class _Walk:
    """All images between two pieces: as the float network has them, and the quantized one."""

    def __init__(self, engine: Engine, inputs: Any):
        self.engine = engine
        images, size = len(jax.tree.leaves(inputs)[0]), engine.batch_size
        if images < size:
            raise UsageError(
                f"learning the rounding needs at least one batch of {size} images, got {images}: "
                "give more images or a smaller batch_size."
            )
        whole = jax.tree.map(lambda x: x[: images - images % size], inputs)
        graph = engine.network.graph
        self.exact: list[dict[Var, Any]] = [
            dict(zip(graph.inputs, jax.tree.leaves(batch), strict=True))
            for batch, _ in engine.chunks(whole)
        ]
        self.rounded = [dict(state) for state in self.exact]

    def constants(self, piece: Piece) -> list[Any]:
        return [self.engine.frontier[var] for var in piece.constants]

    def _pass(self, piece: Piece, edits: PieceEdits, states: list[dict[Var, Any]]) -> None:
        """Replace states by those after the piece, one by one: both are never held of all."""
        run, constants = _forward(piece), self.constants(piece)
        for index, state in enumerate(states):
            written = run(edits, constants, [state[var] for var in piece.reads])
            kept = {var: state[var] for var in piece.keeps}
            states[index] = kept | dict(zip(piece.writes, written, strict=True))

    def float_after(self, piece: Piece) -> list[dict[Var, Any]]:
        """Pass the piece in the float network: its tensors after it."""
        self._pass(piece, _float_edits(self.engine, piece), self.exact)
        return self.exact

    def advance(self, piece: Piece, edits: PieceEdits) -> None:
        """Pass the piece in the quantized network."""
        self._pass(piece, edits, self.rounded)


# -- learning one piece ----------------------------------------------------------------


class _Fixed(NamedTuple):
    """What of a weight is not learned: its grid, the code below each value, its input's grid."""

    scale: Any
    zero: Any
    below: Any
    top: Any


def _soft(v: Any) -> Any:
    # h(V) = clip((zeta - gamma) sigmoid(V) + gamma, 0, 1)
    return jnp.clip(jax.nn.sigmoid(v) * (_HIGH - _LOW) + _LOW, 0, 1)


def _undo_soft(h: Any) -> Any:
    share = (jnp.clip(h, 1e-3, 1 - 1e-3) - _LOW) / (_HIGH - _LOW)
    return jnp.log(share / (1 - share))


def _columns(learned: Mapping[str, Any], fixed: _Fixed, up: Any) -> Any:
    codes = jnp.clip(fixed.below + up, 0, fixed.top)
    return (codes - fixed.zero) * fixed.scale * jnp.exp(learned["gain"])


def _learn(
    engine: Engine,
    piece: Piece,
    new: Sequence[int],
    start: Mapping[int, Integers],
    before: Mapping[int, Rounded],
    grids: ActivationGrids,
    walk: _Walk,
    targets: list[dict[Var, Any]],
    later: Sequence[Piece],
    learning: Learning,
    key: Any,
) -> dict[int, Rounded]:
    network = engine.network
    owner = {}  # of each new site, the first one with the same weight
    for i in new:
        owner[i] = next(j for j in new if network.sites[j].weight is network.sites[i].weight)
    first = sorted(set(owner.values()))
    fixed, learned = {}, {}
    for i in first:
        scale, zero = (jnp.asarray(field) for field in (start[i].scale, start[i].zero))
        top = float(2 ** start[i].bits - 1)
        exact = jnp.clip(engine.columns(i).astype(jnp.float32) / scale + zero, 0, top)
        below = jnp.minimum(jnp.floor(exact), max(top - 1, 0))
        fixed[i] = _Fixed(scale, zero, below, jnp.float32(top))
        learned[i] = {"v": _undo_soft(exact - below)}
    channels = {i: start[i].scale.shape[1] for i in new}
    # A tied weight has one rounding and one gain, but a shift of its own at each site.
    learned = {i: own | {"gain": jnp.zeros(channels[i])} for i, own in learned.items()}
    offsets = {i: jnp.zeros(channels[i]) for i in new}
    parameters = ([learned[i] for i in first], [offsets[i] for i in new])
    known = _edits(engine, piece, {i: r for i, r in before.items() if i not in new}, grids)
    nearest = {i: Rounded(start[i], np.zeros(channels[i], np.float32)) for i in new}
    run, constants = _forward(piece), walk.constants(piece)

    reads = [jnp.stack([state[var] for state in walk.rounded]) for var in piece.reads]
    wanted = [jnp.stack([state[var] for state in targets]) for var in piece.writes]
    weights: list[Any] = [None] * len(wanted)
    if learning.weighting != "none":
        weights = _fisher(engine, piece, later, targets, jax.random.fold_in(key, 1))
    if learning.weighting == "mean":
        weights = [
            _over_images(w, var, engine) for w, var in zip(weights, piece.writes, strict=True)
        ]
    edits = _edits(engine, piece, {**before, **nearest}, grids)
    batches = len(walk.rounded)
    unit = [jnp.float32(0)] * len(wanted)
    for batch in range(0, batches, max(1, batches // 8)):
        found = run(edits, constants, [tensor[batch] for tensor in reads])
        unit = [
            total + _weighted(y, t[batch], None if w is None else w[batch])
            for total, y, t, w in zip(unit, found, wanted, weights, strict=True)
        ]
    # What no rounding changes has no part in the error.
    looked = len(range(0, batches, max(1, batches // 8)))
    unit = [jnp.where(u > 0, u / looked, jnp.inf) for u in unit]

    step, optimizer = _step(piece, tuple(new), tuple(owner[i] for i in new), learning)
    state = optimizer.init(parameters)
    for number in range(learning.steps):
        parameters, state, error = step(
            parameters, state, jax.random.fold_in(key, 0), jnp.int32(number),
            [fixed[i] for i in first], known, constants, reads, wanted, weights, unit,
        )  # fmt: skip
        if number % _AT_ONCE == _AT_ONCE - 1 and not np.isfinite(float(error)):
            raise ProxyqError(
                f"learning the rounding of {network.sites[new[0]].layer!r} went wrong (the error "
                "is no number): lower the learning rate."
            )
    result = {}
    for i, offset in zip(new, parameters[1], strict=True):
        own = parameters[0][first.index(owner[i])]
        codes = np.asarray(_hard(own["v"], fixed[owner[i]]), np.uint16)
        integers = start[i]._replace(codes=codes).times(np.exp(np.asarray(own["gain"], np.float32)))
        result[i] = Rounded(integers, np.asarray(offset))
    return result


@jax.jit
def _hard(v: Any, fixed: _Fixed) -> Any:
    return jnp.clip(fixed.below + (_soft(v) >= 0.5), 0, fixed.top)


@jax.jit
def _weighted(found: Any, wanted: Any, weight: Any) -> Any:
    """The mean squared difference, weighed."""
    error = (found.astype(jnp.float32) - wanted.astype(jnp.float32)) ** 2
    return jnp.mean(error if weight is None else error * weight)


_STEPS: dict[Any, Any] = {}


def _step(piece: Piece, new: tuple[int, ...], owner: tuple[int, ...], how: Learning) -> Any:
    """A jitted step, shared by all equal pieces, and its optimizer.

    Steps run one by one: inside a loop of XLA, convolutions on CPU are some ten times slower.
    """
    first = sorted(set(owner))
    place = [piece.sites.index(i) for i in new]
    index = [first.index(i) for i in owner]
    # "wf" without a rate would still divide by its own size, so nothing moves it instead.
    quiet = optax.set_to_zero()
    optimizer = optax.multi_transform(
        {
            "v": optax.adam(how.learning_rate),
            "affine": optax.adam(how.affine_rate) if how.affine_rate else quiet,
        },
        lambda p: ([{"v": "v", "gain": "affine"} for _ in p[0]], ["affine" for _ in p[1]]),
    )
    key = (piece.key, tuple(place), tuple(index), how)
    if key in _STEPS:
        return _STEPS[key], optimizer
    sites = [piece.network.sites[i] for i in new]
    shapes = [site.weight.aval.shape for site in sites]

    def loss(
        parameters: Any, number: Any, fixed: Any, known: Any, constants: Any, reads: Any,
        wanted: Any, weights: Any, unit: Any,
    ) -> Any:  # fmt: skip
        learned, offsets = parameters
        soft = [_soft(own["v"]) for own in learned]
        columns = [
            _columns(own, fix, up) for own, fix, up in zip(learned, fixed, soft, strict=True)
        ]
        edits = list(known.sites)
        for p, i, site, shape, offset in zip(place, index, sites, shapes, offsets, strict=True):
            weight = site.from_columns(columns[i], shape)
            edits[p] = edits[p]._replace(weight=weight, offset=offset)
        found = piece(known._replace(sites=edits), constants, reads)
        error = sum(
            _weighted(y, t, w) / u for y, t, w, u in zip(found, wanted, weights, unit, strict=True)
        )
        # beta falls from 20 to 2 after the warm-up.
        warm = how.warm_up * how.steps
        share = jnp.clip((number - warm) / max(how.steps - warm, 1), 0, 1)
        beta = _BETA[0] + (_BETA[1] - _BETA[0]) * share
        # sum (1 - |2 h - 1|^beta) / N
        undecided = sum(jnp.sum(1 - jnp.abs(2 * h - 1) ** beta) for h in soft)
        count = sum(h.size for h in soft)
        return error + jnp.where(number < warm, 0.0, how.penalty) * undecided / count, error

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        parameters: Any, state: Any, key: Any, number: Any, fixed: Any, known: Any,
        constants: Any, reads: Any, wanted: Any, weights: Any, unit: Any,
    ) -> Any:  # fmt: skip
        batch = jax.random.randint(jax.random.fold_in(key, number), (), 0, len(reads[0]))

        def one(tensor: Any) -> Any:
            return jax.lax.dynamic_index_in_dim(tensor, batch, 0, keepdims=False)

        drawn = jax.tree.map(one, (reads, wanted, weights))
        slope, error = jax.grad(loss, has_aux=True)(
            parameters, number, fixed, known, constants, *drawn, unit
        )
        moves, state = optimizer.update(slope, state, parameters)
        return optax.apply_updates(parameters, moves), state, error

    return remember(_STEPS, key, step), optimizer


# -- Fisher information ----------------------------------------------------------------

_PULL: dict[str, Any] = {}


def _fisher(
    engine: Engine, piece: Piece, later: Sequence[Piece], states: list[dict[Var, Any]], key: Any
) -> list[Any]:
    """Squared gradients of the log-likelihood by what the piece writes, `[batches, …]` each.

    In the float network, with a label for each image drawn from its own predictions; the mean
    over all tensors of a piece is one.
    """
    outputs = engine.network.graph.outputs
    logits_var = jax.tree.leaves(outputs)[0]
    found = []
    for number, state in enumerate(states):
        forward, tape = dict(state), []
        for after in later:
            edits, constants = _float_edits(engine, after), _constants(engine, after)
            reads = [forward[var] for var in after.reads]
            written = _forward(after)(edits, constants, reads)
            tape.append((after, edits, constants, reads))
            forward |= dict(zip(after.writes, written, strict=True))
        known = {**engine.frontier, **forward}
        cotangents: dict[Var, Any] = {
            logits_var: _score(known[logits_var], jax.random.fold_in(key, number))
        }
        for after, edits, constants, reads in reversed(tape):
            given = [cotangents.pop(var, None) for var in after.writes]
            given = [
                jnp.zeros(var.aval.shape, var.aval.dtype) if value is None else value
                for var, value in zip(after.writes, given, strict=True)
            ]
            for var, value in zip(
                after.reads, _pull(after)(edits, constants, reads, given), strict=True
            ):
                if value is not None:
                    cotangents[var] = cotangents[var] + value if var in cotangents else value
        found.append([cotangents.get(var, jnp.zeros(var.aval.shape)) ** 2 for var in piece.writes])
    stacked = [jnp.stack(own) for own in zip(*found, strict=True)]
    mean = sum(jnp.sum(part) for part in stacked) / sum(part.size for part in stacked)
    return [part / jnp.where(mean > 0, mean, 1) for part in stacked]


def _over_images(weights: Any, var: Var, engine: Engine) -> Any:
    """Each element's mean over the images, `[batches, …]` again."""
    place = locate(engine.network.graph).get(var)
    if place is None or place.inner != 1 or weights.shape[1 + place.axis] != engine.batch_size:
        return weights  # something else is folded into the images' axis
    axes = (0, 1 + place.axis)
    return jnp.broadcast_to(jnp.mean(weights, axis=axes, keepdims=True), weights.shape)


def _constants(engine: Engine, piece: Piece) -> list[Any]:
    return [engine.frontier[var] for var in piece.constants]


@jax.jit
def _score(logits: Any, key: Any) -> Any:
    """The gradient of log p(y) by the logits, for labels drawn from p: `e_y - p`."""
    logits = logits.astype(jnp.float32)
    drawn = jax.random.categorical(key, logits, axis=-1)
    return jax.nn.one_hot(drawn, logits.shape[-1]) - jax.nn.softmax(logits, axis=-1)


def _pull(piece: Piece) -> Any:
    """Cotangents of what a piece reads, from those of what it writes; `None` for whole numbers."""
    found = _PULL.get(piece.key)
    if found is not None:
        return found
    floats = [jnp.issubdtype(var.aval.dtype, jnp.floating) for var in piece.reads]

    def pull(edits: Any, constants: Any, reads: Any, given: Any) -> Any:
        def own(some: list[Any]) -> list[Any]:
            supply = iter(some)
            whole = [next(supply) if f else r for f, r in zip(floats, reads, strict=True)]
            return piece(edits, constants, whole)

        _, back = jax.vjp(own, [r for f, r in zip(floats, reads, strict=True) if f])
        supply = iter(back(given)[0])
        return [next(supply) if f else None for f in floats]

    return remember(_PULL, piece.key, jax.jit(pull))


# -- checkpoints -----------------------------------------------------------------------


def _arrays(found: Mapping[int, Rounded]) -> dict[str, np.ndarray]:
    arrays = {}
    for index, own in found.items():
        arrays[f"{index}.codes"] = own.integers.codes
        arrays[f"{index}.scale"] = own.integers.scale
        arrays[f"{index}.offset"] = own.offset
    return arrays


def _restored(
    checkpoint: Checkpoint, index: int, sites: Sequence[int], start: Mapping[int, Integers]
) -> dict[int, Rounded] | None:
    saved = checkpoint.load(f"piece-{index}")
    if saved is None:
        return None
    with contextlib.suppress(KeyError):
        return {
            i: Rounded(
                start[i]._replace(codes=saved[f"{i}.codes"], scale=saved[f"{i}.scale"]),
                saved[f"{i}.offset"],
            )
            for i in sites
        }
    return None
