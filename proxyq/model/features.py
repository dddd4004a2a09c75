"""What each layer hands on, and which layers hand on one and the same tensor."""

from proxyq.model.elementwise import feature_of
from proxyq.model.graph import Var
from proxyq.model.network import Network


def features(network: Network, kind: str = "post-activation") -> dict[str, Var]:
    """The variable of each layer's feature, at the layer's first use.

    `kind` is `post-activation` (see `feature_of`) or `output`, the layer's own output.
    """
    found = {}
    for layer in network.layers:
        site = network.sites[network.sites_of(layer.name)[0]]
        out = network.graph.main[site.position].outvars[0]
        channels = layer.channels if network.batch_norm == "batch" else None
        found[layer.name] = (
            feature_of(network.graph, out, channels=channels) if kind == "post-activation" else out
        )
    return found


def layers_by_feature(network: Network) -> tuple[tuple[str, ...], ...]:
    """Groups of two or more layers with the same feature.

    A downsample convolution and the last convolution of its block meet in one residual sum:
    OMPQ measures that tensor once, and gives both the same bits.
    """
    groups: dict[Var, list[str]] = {}
    for name, var in features(network).items():
        groups.setdefault(var, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)
