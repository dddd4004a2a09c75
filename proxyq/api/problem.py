"""From scores to the problem that is solved: costs, outliers, ties, activation bits."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from proxyq.api.method import Method
from proxyq.errors import UsageError
from proxyq.model.layers import Layer
from proxyq.model.network import Network
from proxyq.proxies import Scores, as_cost
from proxyq.proxies.cost import WeightErrors
from proxyq.proxies.proxy import blind_to_groups
from proxyq.search.allocate import SOLVERS, Problem, build_problem
from proxyq.search.allocate.build import ActivationBits, LayerLike
from proxyq.search.allocate.outliers import without_outliers
from proxyq.search.allocate.products import Multiplied
from proxyq.widths import by_size, group_of, groups_of_all


def problem_from(
    layers: Sequence[LayerLike],
    scores: Scores,
    budget: str | Sequence[str],
    *,
    cost: str = "auto",
    errors: WeightErrors | None = None,
    counted_once: Sequence[Sequence[str]] = (),
    shared: Sequence[Sequence[str]] = (),
    outliers: str = "keep",
    activation_bits: ActivationBits = None,
    **binding: Any,
) -> Problem:
    """The problem of choosing bits by `scores`.

    - `cost`, `errors`: as for `as_cost`.
    - `counted_once`: sets of layers that hand on one tensor and share their bits; an importance
      was measured on it, so only the first of each has a cost. `shared`: sets that share bits and
      each have theirs.
    - `outliers`: `erase` takes out bit-widths that look better than the next higher one.
    - `activation_bits`: as for `build_problem`; a list needs scores that hold their costs.
    - `binding`: what else `build_problem` takes.

    **Raises** `UsageError` when activation bits are to be chosen by scores that tell nothing of
    activations, `ProxyqError` when group sizes are, by costs that are the same for all of them.
    """
    _check_groups(layers, scores)
    if scores.shape != "layers":
        # Measured on each layer's own weights, whatever tensor it hands on.
        counted_once, shared = (), (*counted_once, *shared)
    coupling = None
    if scores.coupling is None:
        table = as_cost(scores, cost, errors=errors)
    else:
        # All that a plan costs is in the matrix.
        table = np.zeros((len(layers), len(scores.bits)))
        coupling = scores.coupling
        if not isinstance(activation_bits, (list, tuple)):
            coupling = _of_weights(coupling, scores)
    beside: dict[str, Any] = {}
    if isinstance(activation_bits, (list, tuple)):
        if scores.activations is None:
            raise UsageError(
                f"the proxy {scores.proxy!r} tells nothing of activations, so their bits cannot "
                "be chosen: give one bit-width for all (activation_bits=8), or use a proxy that "
                "does, such as hessian-trace, activation-mse or limpq."
            )
        beside["activation_cost"] = (
            scores.activations if coupling is None else np.zeros_like(scores.activations)
        )
    if outliers == "erase":
        own = table if coupling is None else scores.values
        beside["allowed"] = without_outliers(own, scores.bits)
        if "activation_cost" in beside:
            mask = without_outliers(scores.activations, scores.activation_bits)
            beside["activation_allowed"] = mask
    names = [layer.name for layer in layers]
    for _, *others in counted_once:
        # What is measured once counts once.
        again = np.isin(names, others)
        table = np.where(again[:, None], 0.0, table)
        if coupling is not None:
            rows = np.repeat(~again, len(coupling) // len(names))
            coupling = coupling * rows[:, None] * rows[None]
    return build_problem(
        layers,
        table,
        scores.bits,
        budget,
        shared=(*counted_once, *shared),
        activation_bits=activation_bits,
        coupling=coupling,
        **beside,
        **binding,
    )


def products_at(network: Network, bits: int | None) -> dict[str, Multiplied]:
    """The network's products of two activations, both operands at `bits` (`None`: float).

    **Raises** `UsageError` for bits where there is no such product.
    """
    if bits is not None and not network.attention:
        raise UsageError(
            f"`attention_bits` (--attention-bits) is for products of two activations, and "
            f"{network.model.name!r} has none: leave it out."
        )
    return {product.name: Multiplied(product.macs, bits) for product in network.attention}


def _check_groups(layers: Sequence[LayerLike], scores: Scores) -> None:
    """Refuse costs of a proxy that says it rounds weights, and does arithmetic on bits alone."""
    if scores.shape == "layers" or not groups_of_all(scores.bits) or not scores.values.any():
        return
    place = {b: k for k, b in enumerate(scores.bits)}
    pairs = [
        (row[k], row[place[int(b)]])
        for row, layer in zip(scores.values, layers, strict=True)
        for b, k in place.items()
        if group_of(b) in {*getattr(layer, "group_scale_bits", {})} - {None} and int(b) in place
    ]
    if pairs and all(grouped == plain for grouped, plain in pairs):
        raise blind_to_groups(scores.proxy)


def bits_record(layers: Sequence[LayerLike], bits: Sequence[int]) -> dict[str, Any]:
    """What a plan tells of its candidates: the bit-widths, and the group sizes beside them where
    these were chosen too; one grid a channel is named where any layer may have it."""
    if not groups_of_all(bits):
        return {"bits": list(bits)}
    plain = any(None in getattr(one, "group_scale_bits", {}) for one in layers)
    sizes = dict.fromkeys(group_of(b) for b in sorted(bits, key=by_size))
    return {
        "bits": sorted({int(b) for b in bits}),
        "group_sizes": [size for size in sizes if plain or size is not None],
    }


def unscored(layers: Sequence[Layer], method: Method) -> Scores:
    """Scores of zero by a method: what its budgets, pins and ties allow can be tried with them,
    before minutes of measuring."""
    beside = method.activation_choices
    return Scores(
        proxy=method.name,
        layers=tuple(layers),
        bits=method.bits,
        values=np.zeros((len(layers), len(method.bits))),
        activations=np.zeros((len(layers), len(beside))) if method.measures_activations else None,
        activation_bits=beside,
    )


def trial_solver(method: Method) -> str:
    """The solver to try budgets with, before there are scores.

    **Raises** `UsageError` where the proxy couples layers and the method's solver takes none.
    """
    couples = method.proxy is not None and method.proxy.couples
    if method.solver == "auto":
        return "greedy"
    solver = SOLVERS.get(method.solver)
    if couples and not solver.couples:
        raise UsageError(
            f"the proxy {method.name!r} couples layers, which the solver {method.solver!r} does "
            "not take: use 'iqp', or a proxy whose costs add up, such as 'kl-delta'."
        )
    return "greedy" if couples or solver.draws else method.solver


def _of_weights(coupling: np.ndarray, scores: Scores) -> np.ndarray:
    """The coupling of the weights' choices alone."""
    each = len(coupling) // len(scores.layers)
    rows = np.tile(np.arange(each) < len(scores.bits), len(scores.layers))
    return coupling[rows][:, rows]
