"""Joint training of step sizes for every layer and bit-width (LIMPQ, arXiv:2203.08368).

One network holds all bit-widths at once: shared weights, and for every layer and bit-width one
LSQ step size for the weights and one for the layer's input. After a short training with labels
the step sizes tell how sensitive each layer is: the larger, the more it deserves the bits.

One step of the training, on one mini-batch (as in the published code):

1. for each bit-width, a pass with all layers at it; the gradients of the passes add up;
2. a pass with a bit-width drawn at random for every layer, weights and input alike;
3. gradients clipped to [-1, 1], then one step of SGD with Nesterov momentum; what has no
   gradient at all stays as it is. Weight decay acts on arrays of two axes or more.

Batch norm takes the statistics of the batch, with a scale and a shift of its own for every
bit-width, those of the convolution before it.

Where ours differs from the published code:

- The first and the last layer are trained as well (`ends=False` leaves them in floating point).
- A layer whose input goes negative on the first batch has a signed range for it; published
  networks have ReLUs, and every input is unsigned.
- A copy for each bit-width is kept of every parameter that is no layer's weight, biases and
  layer norms included, since a graph does not tell batch norm from them; each follows the layer
  before its first use.
- Step sizes are brought back into [1e-5, 1] after every step. Published ones that leave it,
  or begin outside, get no gradient ever after.
- The learning rate falls with every step, not with every epoch: ours are few.
- A model that offers no pass with batch statistics is trained as it is, with its running
  statistics as constants and nothing folded, so that its step sizes mean the same.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from proxyq.checkpoint import Checkpoint
from proxyq.errors import ProxyqError, UsageError
from proxyq.files import digest_arrays
from proxyq.model.graph import Equation, Graph, is_literal, trace
from proxyq.model.layers import Layer, Site, find_sites
from proxyq.model.lowering import run
from proxyq.model.model import Model, logits_of
from proxyq.model.network import LAYERS_AT, network
from proxyq.progress import Progress, silent
from proxyq.quantize import check_bits
from proxyq.quantize.lsq import (
    STEP_RANGE,
    code_range,
    first_activation_step,
    first_weight_step,
    lsq,
    scale_of_gradient,
)

STAGE = "train step sizes"
_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class StepSizes:
    """Trained step sizes.

    - `layers`: those that were trained, in order of first use.
    - `weights`: `[layers, bits]` float64; `activations`: `[layers, activation_bits]`.
    - `signed`: `[layers]`: whether the range of the layer's input is signed.
    - `losses`: `[steps, passes]`: the loss of each pass, in the order of the passes.
    """

    layers: tuple[Layer, ...]
    bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    weights: np.ndarray
    activations: np.ndarray
    signed: np.ndarray
    losses: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(layer.name for layer in self.layers)


def train_step_sizes(
    model: Model,
    inputs: Any,
    labels: Any,
    bits: Sequence[int],
    *,
    activation_bits: Sequence[int] | None = None,
    key: Any,
    epochs: int = 1,
    batch_size: int = 64,
    learning_rate: float = 0.01,
    final_learning_rate: float = 1e-5,
    momentum: float = 0.9,
    weight_decay: float = 2.5e-5,
    label_smoothing: float = 0.1,
    random_passes: int = 1,
    ends: bool = True,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> StepSizes:
    """Train the step sizes of all layers at all bit-widths; see the module's first lines.

    **Arguments:**

    - `inputs`: the network's inputs, `[images, …]`, as `apply` takes them; `labels`: the class
      of each, `[images]` whole numbers.
    - `bits`: bit-widths of weights, 2 to 8 or 16; `activation_bits`: of the layers' inputs, the
      same when `None`, floating point when empty. Passes pair them by position; the shorter
      list is repeated.
    - `key`: a JAX key, for the order of the images and the random passes.
    - `epochs`: times through the images, in a new order each time. Batches have `batch_size`
      images; what is left over at the end of an epoch is dropped.
    - `learning_rate` falls to `final_learning_rate` along a cosine over all steps.
    - `random_passes`: passes with random bits in every step.
    - `ends`: whether the first and the last layer are trained too.
    - `checkpoint`: where the state is kept; a run that was stopped goes on from there and ends
      in the same bytes. The state of other arguments or data is not used.

    **Raises** `UsageError` for arguments that do not fit each other or the model, and
    `ProxyqError` when the training diverges.
    """
    checkpoint = checkpoint or Checkpoint()
    _check_numbers(
        epochs=(epochs, 1, None, True),
        batch_size=(batch_size, 1, None, True),
        random_passes=(random_passes, 0, None, True),
        learning_rate=(learning_rate, 0, None, False),
        final_learning_rate=(final_learning_rate, 0, learning_rate, False),
        momentum=(momentum, 0, 1, False),
        weight_decay=(weight_decay, 0, None, False),
        label_smoothing=(label_smoothing, 0, 1, False),
    )
    widths = _check_bits(bits, "bits")
    own = widths if activation_bits is None else _check_bits(activation_bits, "activation_bits")
    if not widths:
        raise UsageError("`bits` must hold at least one bit-width, got none.")
    model.check_finite()
    leaves, tree = jax.tree.flatten(inputs)
    leaves = [np.asarray(leaf) for leaf in leaves]
    images = _check_inputs(model, leaves, batch_size)
    trainer = make_trainer(model, batch_size, widths, own, ends, float(label_smoothing))
    classes = _check_labels(labels, images, trainer.classes)

    per_epoch = images // batch_size
    total = epochs * per_epoch
    order_key, draw_key = jax.random.split(key)

    @lru_cache(maxsize=1)
    def order(epoch: int) -> np.ndarray:
        return np.asarray(jax.random.permutation(jax.random.fold_in(order_key, epoch), images))

    def batch(step: int) -> tuple[Any, Any]:
        epoch, place = divmod(step, per_epoch)
        rows = order(epoch)[place * batch_size : (place + 1) * batch_size]
        types = (var.aval.dtype for var in trainer.graph.inputs)
        part = [jnp.asarray(leaf[rows], kind) for leaf, kind in zip(leaves, types, strict=True)]
        return jax.tree.unflatten(tree, part), jnp.asarray(classes[rows])

    numbers = {
        "bits": widths,
        "activation_bits": own,
        "epochs": epochs,
        "batch_size": batch_size,
        "rates": [learning_rate, final_learning_rate, momentum, weight_decay, label_smoothing],
        "random_passes": random_passes,
        "ends": ends,
    }
    mark = _mark(checkpoint, model, leaves, classes, key, numbers)
    state = _load(checkpoint, mark, trainer)
    if state is None:
        values, signed = trainer.start(batch(0)[0])
        nothing = jax.tree.map(jnp.zeros_like, values)
        state = _State(values, nothing, np.asarray(signed), [])

    # lr = end + (begin - end) (1 + cos(pi t / T)) / 2
    share = final_learning_rate / learning_rate if learning_rate else 0.0
    rate = optax.cosine_decay_schedule(learning_rate, total, alpha=share)
    for step in range(len(state.losses), total):
        values, velocity, losses = trainer.step(
            state.values,
            state.velocity,
            state.signed,
            trainer.settings_of_step(draw_key, step, random_passes),
            *batch(step),
            rate=float(np.asarray(rate(step))),
            momentum=momentum,
            decay=weight_decay,
        )
        if not (np.isfinite(losses).all() and trainer.is_finite(values)):
            worst = float(losses[np.argmin(np.isfinite(losses))])
            raise ProxyqError(
                f"training the step sizes of {model.name!r} diverged at step {step + 1} of {total} "
                f"(loss {worst:g}): give a smaller `learning_rate` than {learning_rate:g}, and "
                "check that the images are preprocessed as the network expects."
            )
        state = state._replace(values=values, velocity=velocity)
        state.losses.append(losses)
        if checkpoint.due() and step + 1 < total:
            _save(checkpoint, mark, state)
        progress(STAGE, step + 1, total)
    _save(checkpoint, mark, state)
    return StepSizes(
        layers=trainer.layers,
        bits=widths,
        activation_bits=own,
        weights=np.asarray(state.values.weights, np.float64),
        activations=np.asarray(state.values.activations, np.float64),
        signed=state.signed,
        losses=np.asarray(state.losses, np.float64),
    )


class Values(NamedTuple):
    """All that is trained, in float32.

    - `params`: by name; with a first axis of settings where each setting has its own copy.
    - `weights`: step sizes of weights `[layers, bits]`; `activations`: of the layers' inputs.
    """

    params: Mapping[str, Any]
    weights: Any
    activations: Any


Change = Callable[[int, Any, Any], tuple[Any, Any]]
"""What a layer's input and weight become, from the layer's row and both."""


class Trainer:
    """A model whose layers take their bit-widths as traced numbers.

    A *setting* is a pair of bit-widths, of a layer's weight and of its input: `settings` holds
    their positions in `bits` and `activation_bits`. One compiled program serves every choice
    of settings.

    - `layers`: those with step sizes; `graph`: the pass that is trained; `classes`: logits.
    - `follows`: parameters with a copy for each setting, and the row of the layer they follow.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int,
        bits: tuple[int, ...],
        activation_bits: tuple[int, ...],
        ends: bool,
        label_smoothing: float,
    ):
        self.model, self.bits, self.activation_bits = model, bits, activation_bits
        self.label_smoothing = label_smoothing
        self.graph, sites = _graph(model, batch_size)
        described = network(model, LAYERS_AT).layers
        names = list(dict.fromkeys(site.layer for site in sites))
        if len(names) < 3 and not ends:
            raise UsageError(
                f"`ends=False` leaves the first and the last layer in floating point, but the "
                f"model {model.name!r} has {len(names)} layers in all: use ends=True."
            )
        searched = names if ends else names[1:-1]
        known = {layer.name: layer for layer in described}
        if known.keys() != set(names):
            raise ProxyqError(
                f"the model {model.name!r} has other layers in its pass with batch statistics "
                "than in evaluation: give a `batch_statistics_apply` that runs the same layers."
            )
        self.layers = tuple(known[name] for name in searched)
        self._rows = {name: row for row, name in enumerate(searched)}
        self._sites = {
            id(self.graph.main[site.position]): site for site in sites if site.layer in self._rows
        }
        shape = self.graph.outputs[0].aval.shape
        if len(shape) != 2 or shape[0] != batch_size:
            raise UsageError(
                f"training needs a classifier with logits [images, classes], but the model "
                f"{model.name!r} returns {shape} for {batch_size} images."
            )
        self.classes = shape[1]

        number = max(len(bits), len(activation_bits))
        inputs = len(activation_bits) or 1
        self.settings = tuple((i % len(bits), i % inputs) for i in range(number))
        self._weight_column = jnp.asarray([w for w, _ in self.settings])
        self._input_column = jnp.asarray([a for _, a in self.settings])
        self._weight_bits = jnp.asarray([bits[w] for w, _ in self.settings], jnp.float32)
        self._input_bits = jnp.asarray(
            [activation_bits[a] if activation_bits else 0 for _, a in self.settings], jnp.float32
        )

        trained = {
            name
            for name, var in self.graph.params.items()
            if name not in model.frozen and jnp.issubdtype(var.aval.dtype, jnp.floating)
        }
        weights = {known[name].parameter for name in names}
        before = _layer_before(self.graph, sites)
        self.follows = {
            name: self._rows[before[name]]
            for name in sorted(trained - weights)
            if before.get(name) in self._rows
        }
        self.trained = tuple(sorted(trained & self._used()))
        self.fixed = {n: jnp.asarray(v) for n, v in model.params.items() if n not in self.trained}
        self._programs: dict[str, Any] = {}

    def start(self, inputs: Any) -> tuple[Values, Any]:
        """Values before the first step, and which layers' inputs are signed, `[layers]` bool.

        Steps of weights come from the weights. Steps of inputs come from the first batch, one
        pass a bit-width, in a network whose earlier layers are rounded already.
        """
        params = {}
        for name in self.trained:
            value = jnp.asarray(self.model.params[name], jnp.float32)
            copies = name in self.follows
            params[name] = jnp.stack([value] * len(self.settings)) if copies else value
        tables = [jnp.ones((len(self.layers), len(b))) for b in (self.bits, self.activation_bits)]
        values = Values(params, *tables)
        signed, weights = self._call("look", self._look, values, self.fixed, inputs)
        values = values._replace(weights=jnp.clip(weights, *STEP_RANGE))
        columns = []
        for column in range(len(self.activation_bits)):
            index = jnp.full(len(self.layers), column)  # of the first setting with these bits
            found = self._call("first", self._first, values, self.fixed, signed, index, inputs)
            columns.append(jnp.clip(found, *STEP_RANGE))
        if columns:
            values = values._replace(activations=jnp.stack(columns, axis=1))
        return values, signed

    def settings_of_step(self, key: Any, step: int, random_passes: int) -> np.ndarray:
        """`[passes, layers]`: each setting for all layers, then random ones."""
        layers, number = len(self.layers), len(self.settings)
        uniform = np.repeat(np.arange(number), layers).reshape(number, layers)
        draw = jax.random.fold_in(key, step)
        drawn = jax.random.randint(draw, (random_passes, layers), 0, number)
        return np.concatenate([uniform, np.asarray(drawn)]).astype(np.int32)

    def step(
        self,
        values: Values,
        velocity: Values,
        signed: Any,
        settings: np.ndarray,
        inputs: Any,
        labels: Any,
        *,
        rate: float,
        momentum: float,
        decay: float,
    ) -> tuple[Values, Values, np.ndarray]:
        """One step on one batch: new values and velocities, and the loss of each pass."""
        gradient = jax.tree.map(jnp.zeros_like, values)
        losses = []
        for index in settings:
            loss, gradient = self._call(
                "gradient",
                self._add_gradient,
                gradient,
                values,
                self.fixed,
                jnp.asarray(signed),
                jnp.asarray(index),
                inputs,
                labels,
            )
            losses.append(loss)
        numbers = jnp.asarray([rate, momentum, decay], jnp.float32)
        values, velocity = self._call("sgd", self._sgd, values, velocity, gradient, numbers)
        return values, velocity, np.asarray(losses, np.float32)

    def is_finite(self, values: Values) -> bool:
        """Whether every value is a number."""
        return bool(self._call("finite", _all_finite, values))

    def loss(
        self, values: Values, fixed: Any, signed: Any, index: Any, inputs: Any, labels: Any
    ) -> Any:
        """Cross-entropy with label smoothing; `index` is the setting of each layer."""

        def change(row: int, x: Any, weight: Any) -> tuple[Any, Any]:
            setting = index[row]
            step = values.weights[row, self._weight_column[setting]]
            weight = _rounded(weight, step, code_range(self._weight_bits[setting], True))
            if self.activation_bits:
                step = values.activations[row, self._input_column[setting]]
                x = _rounded(x, step, code_range(self._input_bits[setting], signed[row]))
            return x, weight

        logits = self._outputs(self._params(values, fixed, index), inputs, change)
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        chosen = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
        # -(1 - eps) log p_y - eps <log p>
        eps = self.label_smoothing
        return -jnp.mean((1 - eps) * chosen + eps * jnp.mean(log_p, axis=1))

    def _add_gradient(self, total: Values, values: Values, *rest: Any) -> tuple[Any, Values]:
        loss, gradient = jax.value_and_grad(self.loss)(values, *rest)
        return loss, jax.tree.map(jnp.add, total, gradient)

    def _sgd(
        self, values: Values, velocity: Values, gradient: Values, numbers: Any
    ) -> tuple[Values, Values]:
        rate, momentum, decay = numbers
        # The first `alone` axes count what are parameters of their own in published code.
        alone = Values({name: int(name in self.follows) for name in self.trained}, 2, 2)
        # g = clip(dL/dp, -1, 1) + lambda p;  v = mu v + g;  p = p - lr (g + mu v)
        rule = optax.chain(
            optax.clip(_LARGEST_GRADIENT),
            optax.add_decayed_weights(
                decay, mask=jax.tree.map(lambda p, first: p.ndim - first >= 2, values, alone)
            ),
            optax.trace(decay=momentum, nesterov=True),
            optax.scale(-rate),
        )
        before: Any = list(rule.init(values))  # type: ignore[arg-type]
        before[2] = optax.TraceState(trace=velocity)  # type: ignore[arg-type]
        updates, after = rule.update(gradient, tuple(before), values)  # type: ignore[arg-type]
        stepped = optax.apply_updates(values, updates)  # type: ignore[arg-type]

        def moved(slope: Any, first: int) -> Any:
            return jnp.any(slope != 0, axis=tuple(range(first, slope.ndim)), keepdims=True)

        # What has no gradient at all stays as it is, its velocity too.
        moves = jax.tree.map(moved, gradient, alone)
        new = jax.tree.map(jnp.where, moves, stepped, values)
        speeds = jax.tree.map(jnp.where, moves, after[2].trace, velocity)  # type: ignore[union-attr]
        return Values(new.params, *(jnp.clip(t, *STEP_RANGE) for t in new[1:])), speeds

    def _look(self, values: Values, fixed: Any, inputs: Any) -> tuple[Any, Any]:
        """Of the floating-point network: signs of the layers' inputs, first weight steps."""
        lowest: dict[int, Any] = {}
        steps: dict[int, Any] = {}

        def change(row: int, x: Any, weight: Any) -> tuple[Any, Any]:
            low = jnp.min(x)
            lowest[row] = jnp.minimum(lowest[row], low) if row in lowest else low
            # A tied weight has one step, from how it looks at its first use.
            widths = jnp.asarray(self.bits, jnp.float32)
            steps.setdefault(row, first_weight_step(weight, widths))
            return x, weight

        index = jnp.zeros(len(self.layers), jnp.int32)
        self._outputs(self._params(values, fixed, index), inputs, change)
        rows = range(len(self.layers))
        return jnp.stack([lowest[r] < 0 for r in rows]), jnp.stack([steps[r] for r in rows])

    def _first(self, values: Values, fixed: Any, signed: Any, index: Any, inputs: Any) -> Any:
        """First steps of the layers' inputs at one setting, `[layers]`."""
        steps: dict[int, Any] = {}

        def change(row: int, x: Any, weight: Any) -> tuple[Any, Any]:
            setting = index[row]
            step = values.weights[row, self._weight_column[setting]]
            weight = _rounded(weight, step, code_range(self._weight_bits[setting], True))
            codes = code_range(self._input_bits[setting], signed[row])
            steps.setdefault(row, first_activation_step(x, codes[1]))
            return _rounded(x, steps[row], codes), weight

        self._outputs(self._params(values, fixed, index), inputs, change)
        return jnp.stack([steps[row] for row in range(len(self.layers))])

    def _params(self, values: Values, fixed: Any, index: Any) -> dict[str, Any]:
        """The model's parameters, with the copies of the chosen settings, in its own types."""
        chosen = {
            name: value[index[self.follows[name]]] if name in self.follows else value
            for name, value in values.params.items()
        }
        types = {name: var.aval.dtype for name, var in self.graph.params.items()}
        return {**fixed, **{name: value.astype(types[name]) for name, value in chosen.items()}}

    def _outputs(self, params: Mapping[str, Any], inputs: Any, change: Change) -> Any:
        def rule(eqn: Equation, operands: list[Any]) -> Sequence[Any] | None:
            site = self._sites.get(id(eqn))
            if site is not None:
                w, x = site.operand, 1 - site.operand
                operands = list(operands)
                operands[x], operands[w] = change(self._rows[site.layer], operands[x], operands[w])
            return run(eqn, operands)

        return logits_of(self.graph(params, inputs, rule))

    def _used(self) -> set[str]:
        """Names of the parameters that the pass reads."""
        leaves = (self.graph.leaves[var] for var in self.graph.frontier)
        return set().union(*leaves)

    def _call(self, name: str, function: Any, *args: Any) -> Any:
        if name not in self._programs:
            self._programs[name] = _compiled(function, args)
        return self._programs[name](*args)


# XLA on CPU fuses a dot or a convolution with what follows into one slow kernel; kept apart, a
# pass of ResNet-20 takes a fifth less time.
_FUSION = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def _compiled(function: Any, args: tuple[Any, ...]) -> Any:
    """A program for arguments of just these shapes."""
    lowered = jax.jit(function).lower(*args)
    if jax.default_backend() == "cpu":
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # older XLA knows no such option
            return lowered.compile(compiler_options=dict(_FUSION))
    return lowered.compile()


@lru_cache(maxsize=4)
def make_trainer(*args: Any) -> Trainer:
    """A `Trainer`, kept so that a second training of the same kind compiles nothing."""
    return Trainer(*args)


def _rounded(x: Any, step: Any, codes: tuple[Any, Any]) -> Any:
    return lsq(x, step, *codes, scale_of_gradient(x.size, codes[1]))


def _all_finite(values: Values) -> Any:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(values)]))


def _graph(model: Model, batch_size: int) -> tuple[Graph, tuple[Site, ...]]:
    """The pass that is trained: with batch statistics where there is one, nothing folded."""
    if model.batch_statistics_apply is not None:
        if batch_size < 2:
            raise UsageError("`batch_size` must be at least 2 for statistics of the batch, got 1.")
        traced = network(model, batch_size, batch_norm="batch")
        return traced.graph, traced.sites
    graph = trace(model, batch_size)
    return graph, find_sites(graph, model.frozen, model.params)[0]


def _layer_before(graph: Graph, sites: Sequence[Site]) -> dict[str, str]:
    """For each parameter the layer that it follows: the one at or before its first use.

    A parameter that goes into a layer's weight (a gain) follows that layer; one that is used
    before any layer follows none and is missing here.
    """
    by_position = {site.position: site for site in sites}
    found: dict[str, str | None] = {}
    last: str | None = None
    for position, eqn in enumerate(graph.main):
        if position in by_position:
            last = by_position[position].layer
        if all(var in graph.leaves for var in eqn.outvars):
            continue  # made from parameters alone: what reads it is its use
        for atom in eqn.invars:
            if not is_literal(atom) and atom in graph.leaves:
                for name in graph.leaves[atom]:
                    found.setdefault(name, last)
    return {name: layer for name, layer in found.items() if layer is not None}


# --- where a run is kept ---------------------------------------------------------------------


class _State(NamedTuple):
    values: Values
    velocity: Values
    signed: np.ndarray
    losses: list[np.ndarray]


_FILE = "step-sizes"


def _mark(
    checkpoint: Checkpoint,
    model: Model,
    leaves: Sequence[np.ndarray],
    labels: np.ndarray,
    key: Any,
    numbers: Mapping[str, Any],
) -> np.ndarray:
    """Bytes that differ where the training would."""
    if checkpoint.folder is None:
        return np.zeros(0, np.uint8)  # nothing is kept; the images need not be read
    arrays = {"labels": labels, **{str(i): leaf for i, leaf in enumerate(leaves)}}
    key_data = np.asarray(jax.random.key_data(key)).tolist()
    text = json.dumps([model.digest(), digest_arrays(arrays), key_data, numbers], default=float)
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)


def _save(checkpoint: Checkpoint, mark: np.ndarray, state: _State) -> None:
    arrays = {"mark": mark, "signed": state.signed, "losses": np.stack(state.losses)}
    for part, values in (("value", state.values), ("velocity", state.velocity)):
        arrays |= {f"{part}:{name}": np.asarray(array) for name, array in _named(values).items()}
    checkpoint.save(_FILE, arrays)


def _load(checkpoint: Checkpoint, mark: np.ndarray, trainer: Trainer) -> _State | None:
    """What was kept of a training with the same mark."""
    arrays = checkpoint.load(_FILE)
    if arrays is None or not np.array_equal(arrays.get("mark", ()), mark):
        return None

    def values(part: str) -> Values:
        params = {n: jnp.asarray(arrays[f"{part}:param:{n}"]) for n in trainer.trained}
        tables = (jnp.asarray(arrays[f"{part}:{table}"]) for table in ("weights", "activations"))
        return Values(params, *tables)

    return _State(values("value"), values("velocity"), arrays["signed"], list(arrays["losses"]))


def _named(values: Values) -> dict[str, Any]:
    params = {f"param:{name}": array for name, array in values.params.items()}
    return {**params, "weights": values.weights, "activations": values.activations}


# --- what comes in ---------------------------------------------------------------------------


def _check_numbers(**given: tuple[Any, float, float | None, bool]) -> None:
    """Each argument's value, least value, greatest value and whether it must be whole."""
    for name, (value, least, most, whole) in given.items():
        right = isinstance(value, (int, np.integer) if whole else (int, float, np.number))
        right = right and not isinstance(value, bool) and math.isfinite(value)
        if not right or value < least or (most is not None and value > most):
            kind = "a whole number" if whole else "a number"
            span = f"of at least {least}" if most is None else f"from {least} to {most:g}"
            raise UsageError(f"`{name}` must be {kind} {span}, got {value!r}.")


def _check_bits(bits: Sequence[int], name: str) -> tuple[int, ...]:
    widths = tuple(check_bits(b, name) for b in bits)
    if 1 in widths:
        raise UsageError(
            f"`{name}` must be at least 2 for learned step sizes, got 1: a signed range of one "
            "bit has no positive code."
        )
    if len(set(widths)) < len(widths):
        raise UsageError(f"`{name}` must hold each bit-width once, got {widths}.")
    return widths


def _check_inputs(model: Model, leaves: Sequence[np.ndarray], batch_size: int) -> int:
    """The number of images."""
    shapes = [tuple(spec.shape) for spec in jax.tree.leaves(model.inputs)]
    if [leaf.shape[1:] for leaf in leaves] != shapes or len({len(leaf) for leaf in leaves}) != 1:
        got = ", ".join(str(leaf.shape) for leaf in leaves)
        want = ", ".join(str(("images", *shape)).replace("'", "") for shape in shapes)
        raise UsageError(f"`inputs` of {model.name!r} must have the shape {want}, got {got}.")
    images = len(leaves[0])
    if images < batch_size:
        raise UsageError(
            f"training needs at least one batch of {batch_size} images, got {images}: give more "
            "images or a smaller `batch_size`."
        )
    return images


def _check_labels(labels: Any, images: int, classes: int) -> np.ndarray:
    """The labels as int32."""
    if labels is None:
        raise UsageError("training step sizes needs labels: give the class of each image.")
    array = np.asarray(labels)
    if array.shape != (images,) or array.dtype.kind not in "iu":
        raise UsageError(
            f"`labels` must be {images} whole numbers, one for each image, got an array of shape "
            f"{array.shape} and type {array.dtype}."
        )
    wrong = array[(array < 0) | (array >= classes)]
    if wrong.size:
        raise UsageError(
            f"`labels` must be from 0 to {classes - 1}, for the network has {classes} outputs; "
            f"got {wrong[0]}."
        )
    return array.astype(np.int32)
