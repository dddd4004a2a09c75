"""`inspect`: what a model is made of."""

from typing import Any

from proxyq.api.inputs import as_model
from proxyq.model.network import LAYERS_AT, Network, network


def inspect(model: Any = None) -> Network:
    """The model's layers: kinds, weights, MACs, output shapes, groups."""
    return network(as_model(model), LAYERS_AT)
