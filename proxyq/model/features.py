"""Layers that hand on one and the same tensor."""

from proxyq.model.elementwise import feature_of
from proxyq.model.network import Network


def layers_by_feature(network: Network) -> tuple[tuple[str, ...], ...]:
    """Groups of two or more layers with the same feature.

    A downsample convolution and the last convolution of its block meet in one residual sum:
    OMPQ measures that tensor once, and gives both the same bits.
    """
    groups: dict[object, list[str]] = {}
    for name in network.names:
        site = network.sites[network.sites_of(name)[0]]
        var = feature_of(network.graph, network.graph.main[site.position].outvars[0])
        groups.setdefault(var, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)
