"""SynFlow: synaptic flow (Tanaka et al., NeurIPS 2020, arXiv:2006.05467), in logarithms.

With all weights replaced by their magnitudes, all biases by zero and an input of ones, let `R`
be the sum of the outputs; a layer's score is `sum |W| dR/d|W| = <dR/dy_l, y_l>`. No images and
no labels. `R` grows with depth beyond any floating-point number (10^61 for a ResNet of some
fifty layers), so states and derivatives are rescaled at every layer and the logarithms of the
scales kept: exact for piecewise linear networks, where `R` is homogeneous in every state.

Values are scores over the largest of them, `exp(ln s_l - max ln s)`. Where every path runs
through a layer its score is `R` itself, so a chain without branches gives equal scores: then
nothing is told apart. Batch norm is folded into the weights, as in the variants that keep it
in evaluation mode; the paper's own leaves it out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine import Engine, Taps
from proxyq.engine.backward import Tape, record
from proxyq.engine.objectives import logit_sum, targets
from proxyq.errors import ProxyqError
from proxyq.model.graph import Graph, Var
from proxyq.proxies.proxy import Result, register


@register(
    needs=("weight",),
    shape="layers",
    passes="1 forward + 1 backward on ones",
    reference="SynFlow: Tanaka et al. 2020, arXiv:2006.05467",
    cost_class="backward",
)
def synflow(taps: Taps, *, key: Any) -> Result:
    """Flow through the layer when all weights are positive, relative to the largest."""
    del key
    tape = _flow(taps.engine)
    engine, model = tape.engine, taps.engine.network.model
    logs = np.full(len(taps), -np.inf)
    names = engine.network.names
    for index, site in enumerate(engine.network.sites):
        # <dR/dy, y>, both rescaled
        flow = float(np.sum(np.asarray(tape.deltas[index] * tape.outs[index], np.float64)))
        if flow > 0:
            row = names.index(site.layer)
            logs[row] = np.logaddexp(logs[row], np.log(flow) + tape.log_scales[index])
    if not np.isfinite(logs).any():
        raise ProxyqError(
            f"no flow reaches the outputs of {model.name!r} (synflow): its weights are zero or its "
            "outputs do not depend on them."
        )
    notes = {"log_score": [float(log) if np.isfinite(log) else None for log in logs]}
    return Result(np.exp(logs - logs.max()), notes=notes)


def _flow(engine: Engine) -> Tape:
    """The network of magnitudes on ones, run forwards and backwards, rescaled at every layer."""
    model = engine.network.model
    positive = magnitudes(Engine.build(model, 1, batch_size=1))
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), model.example(1))
    ((batch, count),) = positive.chunks(ones)
    tape = record(positive, batch, count, logit_sum, targets("predicted"), rescale=True)
    tape.backward()
    return tape


def virtual_gradients(engine: Engine) -> list[np.ndarray]:
    """`dR/d|W|` of every layer, `[fan_in, channels]`, all over the largest of them.

    Of a weight that is used several times the parts are added.
    """
    tape = _flow(engine)
    logs: dict[int, list[float]] = {}
    parts: dict[int, list[np.ndarray]] = {}
    names = tape.engine.network.names
    for index, site in enumerate(tape.engine.network.sites):
        row = names.index(site.layer)
        own = np.asarray(site.columns(tape.pull_weight(index, tape.deltas[index])), np.float64)
        # The state before the site was divided by the exponential of its part of the scale.
        parts.setdefault(row, []).append(own)
        logs.setdefault(row, []).append(tape.log_scales[index])
    largest = max(
        np.log(np.abs(part).max()) + log
        for row, own in parts.items()
        for part, log in zip(own, logs[row], strict=True)
        if np.abs(part).max() > 0
    )
    return [
        np.sum(
            [p * np.exp(log - largest) for p, log in zip(parts[r], logs[r], strict=True)], axis=0
        )
        for r in range(len(names))
    ]


def magnitudes(engine: Engine) -> Engine:
    """The engine with weights replaced by their magnitudes and biases by zero."""
    positive = Engine(network=engine.network)
    graph = engine.network.graph
    weights = {site.weight for site in engine.network.sites}
    frontier = {}
    for var, value in engine.frontier.items():
        if not jnp.issubdtype(var.aval.dtype, jnp.floating):
            frontier[var] = value
        elif var not in weights and is_added(graph, var):
            frontier[var] = jnp.zeros_like(value)
        else:
            frontier[var] = jnp.abs(value)
    positive.__dict__["frontier"] = frontier  # in place of the cached property
    return positive


_SHAPES = frozenset({"broadcast_in_dim", "reshape", "squeeze", "transpose", "convert_element_type"})


def is_added(graph: Graph, var: Var) -> bool:
    """Whether a constant is only ever added to tensors or taken from them: a bias."""
    for position in graph.consumers.get(var, ()):
        eqn = graph.main[position]
        if eqn.primitive.name in _SHAPES:
            if not all(is_added(graph, out) for out in eqn.outvars):
                return False
        elif eqn.primitive.name not in ("add", "sub", "add_any"):
            return False
    return bool(graph.consumers.get(var, ()))
