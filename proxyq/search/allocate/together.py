"""Layers that take one choice of bits: what runtimes fuse into one, and what is asked for.

A runtime multiplies one tensor by the query, key and value weights at once, and by gate and up
projections; a plan that gives such siblings different bits does not load, or loads wrongly. They
are told by their names beside each other, and by reading the same tensor in the graph: of two
layers that share an input by chance, neither is asked to follow the other.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from proxyq.search.allocate.patterns import matching

SAME_FEATURE, SAME_INPUT, SAME_SUM = "same-feature", "same-input", "same-sum"
WORDS = (SAME_FEATURE, SAME_INPUT, SAME_SUM)
"""What a tie may say instead of a pattern: layers that hand on one tensor, that read one, and
whose outputs are added up."""

_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


class Together(NamedTuple):
    """Sets of layers, by name, that share bits.

    `counted_once`: those that hand on one tensor, on which an importance is measured once;
    `shared`: all others; `patterns`: ties that name layers by pattern.
    """

    counted_once: tuple[tuple[str, ...], ...]
    shared: tuple[tuple[str, ...], ...]
    patterns: tuple[str, ...]


def together(
    layers: Sequence[Any],
    ties: Sequence[str],
    unties: Sequence[str],
    same_feature: Sequence[Sequence[str]],
) -> Together:
    """What shares bits by default, without what `unties` matches, and by `ties`.

    `layers` have `name`, `group` and `shares_input` as `proxyq.model.layers.Layer` has them;
    `same_feature` are the sets that hand on one tensor.

    **Raises** `UsageError` for an untie that matches no layer.
    """
    names = [layer.name for layer in layers]
    free = {names[i] for untie in unties for i in matching(untie, names, "an untie")}
    bound = (tuple(name for name in siblings if name not in free) for siblings in fused(layers))
    shared: list[tuple[str, ...]] = [names for names in bound if len(names) > 1]
    if SAME_INPUT in ties:
        shared += shared_by(layers, "shares_input")
    if SAME_SUM in ties:
        shared += shared_by(layers, "group")
    return Together(
        counted_once=tuple(map(tuple, same_feature)) if SAME_FEATURE in ties else (),
        shared=tuple(shared),
        patterns=tuple(tie for tie in ties if tie not in WORDS),
    )


def fused(layers: Sequence[Any]) -> tuple[tuple[str, ...], ...]:
    """Sets of siblings that runtimes run as one layer, two or more each, in layer order."""
    found: dict[Any, list[str]] = {}
    for layer in layers:
        owner, _, last = layer.name.rpartition(".")
        for number, names in enumerate(_SIBLINGS):
            if last in names and layer.shares_input:
                found.setdefault((owner, layer.shares_input, number), []).append(layer.name)
    return tuple(tuple(names) for names in found.values() if len(names) > 1)


def shared_by(layers: Sequence[Any], attribute: str) -> tuple[tuple[str, ...], ...]:
    """Names of the layers with the same non-empty `attribute`, two or more each."""
    found: dict[Any, list[str]] = {}
    for layer in layers:
        value = getattr(layer, attribute)
        if value:
            found.setdefault(value, []).append(layer.name)
    return tuple(tuple(names) for names in found.values() if len(names) > 1)
