"""Recurrent layers: LSTM, GRU and plain ones, of several layers and in both directions.

Each direction of a layer is one product with its input for all steps at once, and a `scan`
over the steps with one product with the state in each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from proxyq.model.torch_import.aten.promotion import Array
from proxyq.model.torch_import.aten.table import register_aten

State = tuple[Array, ...]  # what one direction of one layer remembers, each [batch, size]
Step = Callable[[State, Array, Callable[[Array], Array], Sequence[Array]], State]


def _lstm(state: State, x: Array, of_state: Callable[[Array], Array], more: Any) -> State:
    """i, f, g, o = x + W h; c' = σ(f) c + σ(i) tanh(g); h' = P σ(o) tanh(c')."""
    h, c = state
    i, f, g, o = jnp.split(x + of_state(h), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h @ more[0].T if more else h), c


def _gru(state: State, x: Array, of_state: Callable[[Array], Array], more: Any) -> State:
    """r, z = σ(x + W h); n = tanh(x + r (W h)); h' = (1 - z) n + z h."""
    (h,) = state
    (r, z, n), (hr, hz, hn) = jnp.split(x, 3, axis=-1), jnp.split(of_state(h), 3, axis=-1)
    r, z = jax.nn.sigmoid(r + hr), jax.nn.sigmoid(z + hz)
    n = jnp.tanh(n + r * hn)
    return ((1 - z) * n + z * h,)


def _plain(function: Callable[[Array], Array]) -> Step:
    """h' = f(x + W h)."""
    return lambda state, x, of_state, more: (function(x + of_state(state[0])),)


def _direction(
    step: Step, x: Array, state: State, weights: Sequence[Array], biases: bool, backwards: bool
) -> tuple[Array, State]:
    """x [steps, batch, inputs] -> the outputs [steps, batch, size] and the last state.

    `weights` are torch's: of the input, of the state, their biases if there are any, and
    the projection of an LSTM that has one.
    """
    of_input, of_state, *rest = weights
    b_input, b_state = rest[:2] if biases else (None, None)
    more = rest[2:] if biases else rest
    projected = x @ of_input.T
    if b_input is not None:
        projected = projected + b_input

    def product(h: Array) -> Array:
        y = h @ of_state.T
        return y if b_state is None else y + b_state

    def one(state: State, x: Array) -> tuple[State, Array]:
        state = step(state, x, product, more)
        return state, state[0]

    state, outputs = jax.lax.scan(one, state, projected, reverse=backwards)
    return outputs, state


def _recurrent(
    step: Step,
    x: Array,
    states: State,
    params: Sequence[Array],
    biases: bool,
    layers: int,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Array, ...]:
    """All layers; `states` are [layers · directions, batch, size], as are those returned."""
    assert not train
    directions = 1 + bidirectional
    each = len(params) // (layers * directions)
    if batch_first:
        x = jnp.swapaxes(x, 0, 1)
    last: list[State] = []
    for layer in range(layers):
        outputs = []
        for backwards in range(directions):
            place = layer * directions + backwards
            output, state = _direction(
                step,
                x,
                tuple(first[place] for first in states),
                params[place * each : (place + 1) * each],
                biases,
                bool(backwards),
            )
            outputs.append(output)
            last.append(state)
        x = jnp.concatenate(outputs, axis=-1) if bidirectional else outputs[0]
    if batch_first:
        x = jnp.swapaxes(x, 0, 1)
    return x, *(jnp.stack(parts) for parts in zip(*last, strict=True))


@register_aten("lstm.input")
def lstm(
    x: Array,
    states: list[Array],
    params: list[Array],
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Array, ...]:
    """Outputs, last hidden states, last cells; dropout is nothing in evaluation."""
    options = (biases, layers, train, bidirectional, batch_first)
    return _recurrent(_lstm, x, tuple(states), params, *options)


def _with_one_state(step: Step) -> Callable[..., tuple[Array, ...]]:
    def run(
        x: Array,
        state: Array,
        params: list[Array],
        biases: bool,
        layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Array, ...]:
        options = (biases, layers, train, bidirectional, batch_first)
        return _recurrent(step, x, (state,), params, *options)

    return run


register_aten("gru.input")(_with_one_state(_gru))
register_aten("rnn_tanh.input")(_with_one_state(_plain(jnp.tanh)))
register_aten("rnn_relu.input")(_with_one_state(_plain(jax.nn.relu)))
