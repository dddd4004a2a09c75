"""Walks along operations that treat each element alone: folding, groups and features."""

from proxyq.model.graph import Equation, Graph, Var, primitives

# Primitives whose output element depends on the same element of each operand only.
ELEMENTWISE = frozenset(
    """
    abs add add_any and atan2 broadcast_in_dim cbrt ceil clamp convert_element_type copy
    copy_p cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite
    le log log1p logistic lt max min mul ne neg nextafter not optimization_barrier or pow rem
    round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh
    """.split()
)


def is_elementwise(eqn: Equation) -> bool:
    """Whether an equation (calls included) treats each element alone, keeping the shape."""
    if len(eqn.outvars) != 1 or not primitives(eqn) <= ELEMENTWISE:
        return False
    shape = eqn.outvars[0].aval.shape
    return any(getattr(atom.aval, "shape", None) == shape for atom in eqn.invars)


def data_operands(graph: Graph, eqn: Equation) -> list[Var]:
    """The operands of an equation that depend on the network's inputs."""
    return [atom for atom in eqn.invars if graph.is_data(atom)]


def feature_of(graph: Graph, start: Var, *, channels: int | None = None) -> Var:
    """The tensor that a layer hands on: its output after bias, activation and residual sum.

    From a layer's output, follow operations that treat each element alone, up to the first
    that does not (the next layer, a pooling). Where a residual sum joins, its result is
    meant, as OMPQ measures a block's last convolution after the sum and the activation.

    Give `channels`, the layer's number of output channels, where batch norm takes the
    statistics of the batch: sums over the examples that leave one number a channel, and what
    is made of them, then belong to the normalisation and are followed too.
    """
    shape = start.aval.shape
    outputs = {atom for atom in graph.outputs if graph.is_data(atom)}
    reached = {start}
    # How many readers of each tensor have not been passed yet.
    pending = {start: len(graph.consumers.get(start, ()))}
    feature = start
    queue = set() if start in outputs else set(graph.consumers.get(start, ()))
    while queue:
        index = min(queue)  # execution order
        queue.remove(index)
        eqn = graph.main[index]
        operands = list(dict.fromkeys(data_operands(graph, eqn)))
        joins = any(operand not in reached for operand in operands)
        out = eqn.outvars[0]
        whole = out.aval.shape == shape
        if whole:
            sums = eqn.primitive.name in ("add", "add_any")
            if not is_elementwise(eqn) or (joins and not sums):
                break
        elif joins or not _is_statistic(eqn, operands[0].aval.shape == shape, channels):
            break
        for operand in operands:
            if operand in pending:
                pending[operand] -= 1
        reached.add(out)
        pending[out] = len(graph.consumers.get(out, ()))
        queue.update(graph.consumers.get(out, ()))
        # Only where everything reached so far has been used up does one tensor go on.
        if whole and all(count == 0 for var, count in pending.items() if var is not out):
            feature = out
        if out in outputs:
            break
    return feature


_SMALL = ELEMENTWISE | {"reduce_sum", "reshape", "squeeze", "expand_dims", "transpose"}


def _is_statistic(eqn: Equation, from_whole: bool, channels: int | None) -> bool:
    """Whether an equation makes, or works on, one number a channel from all examples."""
    if channels is None or len(eqn.outvars) != 1 or not primitives(eqn) <= _SMALL:
        return False
    # A mean over positions keeps the examples; the batch is the first axis of every tensor.
    if from_whole and 0 not in eqn.params.get("axes", (0,)):
        return False
    return eqn.outvars[0].aval.size == channels
