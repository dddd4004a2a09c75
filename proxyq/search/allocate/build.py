"""From scores and wishes to a `Problem`: budgets, pins, ties, candidates per layer.

- The bits axis holds the candidates and every pinned bit-width, ascending. A pinned layer
  stays in the problem with one candidate, so the answer covers every layer.
- All layers that a tie matches, and those that are named together in `shared`, take one
  bit-width. Where one of them is pinned, all are. A layer's own `group` (layers that feed one
  residual sum) binds only when asked for: it concerns the grid of activations, and weights
  there may differ.
- `size` in `bit` is the average over the searched layers: pinned layers take no part, neither
  in the sum nor in the count of weights. Every other budget counts all layers.
- Where several pins (or several lists of candidates) match a layer, the last one wins.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from proxyq.errors import UsageError, near
from proxyq.search.allocate.budget import Budget, parse_budget
from proxyq.search.allocate.patterns import matching, split_bits
from proxyq.search.allocate.problem import Limit, Pin, Problem, check_bits, exact_integer

FLOAT_BITS = 32


class LayerLike(Protocol):
    """What is needed of a layer; `weights` are elements, `macs` are for one example."""

    @property
    def name(self) -> str: ...
    @property
    def weights(self) -> int: ...
    @property
    def macs(self) -> int: ...
    @property
    def group(self) -> str | None: ...


ActivationBits = int | None | Mapping[str, int | None]


def build_problem(
    layers: Sequence[LayerLike],
    cost: Any,
    bits: Sequence[int],
    budgets: str | Budget | Sequence[str | Budget] = (),
    *,
    pins: Sequence[str] = (),
    ties: Sequence[str] = (),
    shared: Sequence[Sequence[str]] = (),
    candidates: Sequence[str] = (),
    activation_bits: ActivationBits = None,
) -> Problem:
    """The problem of choosing one of `bits` for every layer within all `budgets`.

    - `cost`: float `[layers, bits]`, columns in the order of `bits`. Entries that are not
      allowed may be anything; a layer pinned to a bit-width outside `bits` costs 0.
    - `pins`: `'PATTERN=8'`; `ties`: `'PATTERN'`; `candidates`: `'PATTERN=2,4'`, of `bits`.
      Patterns are shell globs on layer names, or `re:` and a regular expression.
    - `shared`: sets of layer names that take one bit-width, such as `shared_by(layers, "group")`.
    - `activation_bits`: for all layers, or by layer name; `None` is float.

    **Raises** `UsageError` for whatever is wrong, in one sentence.
    """
    names = [layer.name for layer in layers]
    bits = check_bits(bits)
    table = np.asarray(cost, np.float64)
    if table.shape != (len(names), len(bits)):
        raise UsageError(
            f"`cost` must have the shape [layers, bits] = {[len(names), len(bits)]}, got "
            f"{list(table.shape)}."
        )
    weights = [exact_integer(layer.weights, f"weights of {layer.name!r}") for layer in layers]
    macs = [exact_integer(layer.macs, f"macs of {layer.name!r}") for layer in layers]
    groups = _groups(names, ties, shared)
    free = _candidates(names, bits, candidates)
    pinned = _pinned(names, pins, groups)
    axis = tuple(sorted({*bits, *(b for b, _ in pinned.values())}))
    column = {b: k for k, b in enumerate(axis)}

    full = np.full((len(names), len(axis)), np.nan)
    full[:, [column[b] for b in bits]] = table
    allowed = np.zeros(full.shape, bool)
    for i in range(len(names)):
        if i in pinned:
            b = pinned[i][0]
            allowed[i, column[b]] = True
            if b not in bits:
                full[i, column[b]] = 0.0
        else:
            allowed[i, [column[b] for b in free[i]]] = True
    records = _pin_records(pinned, free, groups, column)
    given = [budgets] if isinstance(budgets, (str, Budget)) else list(budgets)
    activations = [_activation(activation_bits, name) for name in names]
    limits = [
        _limit(
            parse_budget(budget) if isinstance(budget, str) else budget,
            axis,
            weights,
            macs,
            activations,
            [i not in pinned for i in range(len(names))],
        )
        for budget in given
    ]
    return Problem(
        layers=tuple(names),
        bits=axis,
        cost=full,
        allowed=allowed,
        limits=tuple(limits),
        groups=groups,
        pins=records,
    )


def _activation(activation_bits: ActivationBits, name: str) -> int:
    value = activation_bits.get(name) if isinstance(activation_bits, Mapping) else activation_bits
    return FLOAT_BITS if value is None else check_bits([value], "`activation_bits`")[0]


def shared_by(layers: Sequence[Any], attribute: str) -> tuple[tuple[str, ...], ...]:
    """Names of the layers with the same non-empty `attribute`, two or more each, for `shared`."""
    found: dict[Any, list[str]] = {}
    for layer in layers:
        value = getattr(layer, attribute)
        if value:
            found.setdefault(value, []).append(layer.name)
    return tuple(tuple(names) for names in found.values() if len(names) > 1)


def _groups(
    names: list[str], ties: Sequence[str], shared: Sequence[Sequence[str]]
) -> tuple[tuple[int, ...], ...]:
    """Connected sets of layers that share bits, two or more each, in layer order."""
    parent = list(range(len(names)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    index = {name: i for i, name in enumerate(names)}
    sets = [matching(tie, names, "a tie") for tie in ties]
    for together in shared:
        for name in together:
            if name not in index:
                raise UsageError(f"`shared` names an unknown layer {name!r}: {near(name, names)}")
        sets.append(tuple(index[name] for name in together))
    for members in sets:
        for i in members[1:]:
            a, b = sorted((root(members[0]), root(i)))
            parent[b] = a
    joined: dict[int, list[int]] = {}
    for i in range(len(names)):
        joined.setdefault(root(i), []).append(i)
    return tuple(tuple(members) for members in joined.values() if len(members) > 1)


def _candidates(
    names: list[str], bits: tuple[int, ...], wishes: Sequence[str]
) -> list[tuple[int, ...]]:
    """The bit-widths each layer may take when it is not pinned."""
    free = [bits] * len(names)
    for wish in wishes:
        pattern, wanted = split_bits(wish, "the candidates")
        for b in wanted:
            if b not in bits:
                raise UsageError(
                    f"the candidates {wish!r} name {b} bits, which is not among the bit-widths "
                    f"{', '.join(map(str, bits))}; add it there."
                )
        for i in matching(pattern, names, "the candidates"):
            free[i] = wanted
    return free


def _pinned(
    names: list[str], pins: Sequence[str], groups: tuple[tuple[int, ...], ...]
) -> dict[int, tuple[int, str]]:
    """Layer index to (bits, text of the pin), groups included."""
    pinned: dict[int, tuple[int, str]] = {}
    for text in pins:
        pattern, wanted = split_bits(text, "a pin")
        if len(wanted) != 1:
            raise UsageError(
                f"a pin names one bit-width, got {text!r}; give several as candidates instead."
            )
        for i in matching(pattern, names, "a pin"):
            pinned[i] = (wanted[0], text)
    for group in groups:
        held = [i for i in group if i in pinned]
        for i in held[1:]:
            if pinned[i][0] != pinned[held[0]][0]:
                raise UsageError(
                    f"the layers {names[held[0]]!r} and {names[i]!r} must share one bit-width, but "
                    f"are pinned apart by {pinned[held[0]][1]!r} and {pinned[i][1]!r}."
                )
        for i in group if held else ():
            pinned.setdefault(i, pinned[held[0]])
    return dict(sorted(pinned.items()))


def _pin_records(
    pinned: dict[int, tuple[int, str]],
    free: list[tuple[int, ...]],
    groups: tuple[tuple[int, ...], ...],
    column: dict[int, int],
) -> tuple[Pin, ...]:
    """`Pin`s by text and by what the layers could take otherwise.

    Layers of a group are lifted together: a group held by two pins of the same bit-width is
    filed under the first.
    """
    first = {i: pinned[group[0]][1] for group in groups if group[0] in pinned for i in group}
    filed: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for i, (_, text) in pinned.items():
        columns = tuple(column[b] for b in free[i])
        filed.setdefault((first.get(i, text), columns), []).append(i)
    return tuple(
        Pin(text=text, layers=tuple(members), free=columns)
        for (text, columns), members in filed.items()
    )


def _limit(
    budget: Budget,
    bits: tuple[int, ...],
    weights: list[int],
    macs: list[int],
    activations: list[int],
    searched: list[bool],
) -> Limit:
    """The usage table of a budget, in bits or operations; Python ints throughout."""
    if budget.is_average:
        amounts = [w if s else 0 for w, s in zip(weights, searched, strict=True)]
        if not sum(amounts):
            raise UsageError(
                f"the budget {budget.text!r} is an average over the searched layers, but every "
                "layer with weights is pinned; lift a pin or give the size in MiB."
            )
    elif budget.kind == "size":
        amounts = weights
    elif budget.kind == "bops":
        # BOPs = MACs * weight bits * activation bits
        amounts = [m * a for m, a in zip(macs, activations, strict=True)]
    else:
        amounts = macs
    per_unit = budget.per_unit(sum(amounts) if budget.is_average else 0)
    raw = Fraction(budget.amount * per_unit)
    usage = np.array([[amount * b for b in bits] for amount in amounts], dtype=object)
    return Limit(
        name=budget.kind,
        usage=usage,
        budget=min(raw.numerator // raw.denominator, 2**61),
        unit=budget.unit,
        per_unit=per_unit,
        asked=budget.amount,
    )
