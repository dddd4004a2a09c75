"""Which tensors are live when: what a budget on the memory of activations is counted from.

A network is executed layer by layer, in the graph's order. What lies between two layers (batch
norm, activations, residual sums, pooling, data movement) is fused into the layer before it, and
what lies before the first into a head of its own. At each of these steps is live what the step
reads, what it writes, and what is kept for later steps. Views of one tensor (reshapes,
transposes) are that tensor; weights, biases and tables are no activations.
"""

from itertools import pairwise

from proxyq.model.graph import Var
from proxyq.model.groups import origin
from proxyq.model.live import Step, Tensor
from proxyq.model.network import Network


def schedule(network: Network) -> tuple[Step, ...]:
    """The head, then a step for each use of a layer, in execution order."""
    graph = network.graph
    readers: dict[Var, dict[str, None]] = {}
    for site in network.sites:
        if site.lookup:  # nobody rounds indices
            continue
        data = graph.main[site.position].invars[1 - site.operand]
        readers.setdefault(origin(graph, data), {})[site.layer] = None
    multiplied: dict[Var, dict[str, None]] = {}
    for product in network.attention:
        for operand in product.operands:
            multiplied.setdefault(origin(graph, operand), {})[product.name] = None

    def tensor(var: Var) -> Tensor:
        return Tensor(
            # What the images of a batch share is parted among them, rounded up.
            elements=-(-var.aval.size // graph.batch_size),
            bits=8 * var.aval.dtype.itemsize,
            readers=tuple(readers.get(var, ())),
            products=tuple(multiplied.get(var, ())),
        )

    # When each variable is made (the inputs before anything) and when it is read last.
    last = {var: uses[-1] for var, uses in graph.consumers.items() if graph.is_data(var)}
    last |= {atom: len(graph.main) for atom in graph.outputs if graph.is_data(atom)}
    lives = [(graph.producer.get(var, -1), end, origin(graph, var)) for var, end in last.items()]
    lives.sort(key=lambda life: life[0])
    cuts = [0, *(site.position for site in network.sites), len(graph.main)]
    names = [None, *(site.layer for site in network.sites)]
    steps = []
    for name, (start, stop) in zip(names, pairwise(cuts), strict=True):
        # Alive at a cut: made before it, read after it.
        live = [var for made, end, var in lives if any(made < cut <= end for cut in (start, stop))]
        steps.append(Step(layer=name, tensors=tuple(map(tensor, dict.fromkeys(live)))))
    return tuple(steps)
