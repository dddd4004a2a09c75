"""`Network`: a model, its graph at one batch size, and the layers found in it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from proxyq.errors import ProxyqError, UsageError
from proxyq.model.attention import Product, find_products
from proxyq.model.fold import fold, foldable
from proxyq.model.graph import Graph, trace
from proxyq.model.groups import grouped
from proxyq.model.layers import Layer, Site, describe, find_sites
from proxyq.model.model import Model

LAYERS_AT = 2
"""The batch size at which a model is traced to look at its layers: the least that shows what
depends on the batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A traced model: `graph` (batch norm folded), `sites` in execution order, `layers`.

    `attention` holds the products of two activations. `folded` counts the equations after each
    site that went into its weight. `batch_norm` tells whether normalisation uses the `running`
    statistics or those of the `batch` (then nothing can be folded).
    """

    model: Model
    graph: Graph
    sites: tuple[Site, ...]
    layers: tuple[Layer, ...]
    folded: tuple[int, ...]
    attention: tuple[Product, ...] = ()
    batch_norm: str = "running"

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names, in order of first use."""
        return tuple(layer.name for layer in self.layers)

    def sites_of(self, layer: str) -> tuple[int, ...]:
        """Indices in `sites` of a layer's uses."""
        return tuple(i for i, site in enumerate(self.sites) if site.layer == layer)

    def products_of(self, layer: str) -> tuple[int, ...]:
        """Those of them that multiply; the others look up rows."""
        return tuple(i for i in self.sites_of(layer) if not self.sites[i].lookup)

    def looked_up(self, layer: str) -> bool:
        """Whether rows of a layer's weight are looked up.

        Its grid must then be the same at all its sites, and no lookup has output channels: nothing
        may scale what it multiplies to.
        """
        return any(self.sites[i].lookup for i in self.sites_of(layer))

    def layer(self, name: str) -> Layer:
        """The layer of this name."""
        return next(layer for layer in self.layers if layer.name == name)

    def prelude(self, params: Mapping[str, Any] | None = None) -> dict[Any, Any]:
        """The values that main reads: folded weights, biases, tables."""
        return self.graph.run_prelude(self.model.params if params is None else params)


@lru_cache(maxsize=32)
def with_embeddings(model: Model, embeddings: bool) -> Model:
    """The model with tables that are looked up among its layers, or without."""
    return model if model.embeddings == embeddings else model.replace(embeddings=embeddings)


@lru_cache(maxsize=32)
def network(model: Model, batch_size: int, *, batch_norm: str = "running") -> Network:
    """Trace a model at a batch size and find its layers.

    **Raises** `ProxyqError` when the model has no layer to quantize, and `UsageError` for a
    `batch_norm` that is neither `running` nor `batch`.
    """
    if batch_norm == "running":
        graph = trace(model, batch_size)
    elif batch_norm == "batch":
        if model.batch_statistics_apply is None:
            raise ProxyqError(
                f"the model {model.name!r} offers no forward pass with batch statistics: use "
                "batch_norm='running', or give its `Model` a `batch_statistics_apply`."
            )
        graph = trace(model, batch_size, apply=model.batch_statistics_apply)
    else:
        raise UsageError(f"`batch_norm` must be 'running' or 'batch', got {batch_norm!r}.")
    sites, named = find_sites(graph, model.frozen, model.params)
    if not sites:
        raise ProxyqError(
            f"the model {model.name!r} has no layer to quantize: no convolution or dot product "
            "has a weight among the model's parameters (weights captured as constants have no "
            "name; pass them in the parameters)."
        )
    layers = describe(graph, sites, named, model.params)
    if batch_size == 1:
        # What is repeated along the batch looks like one number a channel here; weights must
        # be the same at every batch size.
        lengths = network(model, 2, batch_norm=batch_norm).folded
    else:
        lengths = foldable(graph, sites)
    folded = fold(graph, sites, lengths)
    if folded is not graph:
        found, _ = find_sites(folded, model.frozen, model.params)
        if len(found) != len(sites):  # a layer was lost: the names would shift
            raise ProxyqError(f"folding batch norm changed the layers of {model.name!r}.")
        # Folding keeps the order of sites; their names come from the unfolded weights.
        sites = tuple(replace(new, layer=old.layer) for new, old in zip(found, sites, strict=True))
        graph = folded
    return Network(
        model=model,
        graph=graph,
        sites=sites,
        layers=grouped(graph, sites, layers),
        folded=lengths,
        attention=find_products(graph, sites),
        batch_norm=batch_norm,
    )
