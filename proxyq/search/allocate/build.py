"""From scores and wishes to a `Problem`: budgets, pins, ties, candidates per layer.

- The columns hold the candidates and whatever a pin names, ascending. A pinned layer stays in
  the problem, so the answer covers every layer.
- Activation bits are fixed outside the problem, or follow the weights' (`"weights"`: HAWQ-V3's
  W4A4 and W8A8), or are chosen beside them (a list: LIMPQ), every pair being one column with
      cost[l, (b, a)] = cost[l, b] + activation_cost[l, a].
  A coupling holds each layer's weight and its input as choices of their own, and a column takes
  up both: their couplings with all others, and with each other.
  A pin `'PATTERN=8'` then holds the weights alone, `'PATTERN=8/4'` both.
- A bit-width may bring a group size of its own (`GroupedBits`), and is then a column beside the
  plain one. Layers tell which of them they can have, and what the scales take. A pin
  `'PATTERN=8g64'` holds that column, `'PATTERN=8'` the plain one; candidates `'PATTERN=4'` are
  four bits in groups of any size, or in none.
- All layers that a tie matches, and those that are named together in `shared`, take one
  column. Where one of them is pinned, all are. A layer's own `group` (layers that feed one
  residual sum) binds only when asked for: it concerns the grid of activations, and weights
  there may differ.
- `size` in `bit` is the average over the searched layers: pinned layers take no part, neither
  in the sum nor in the count of weights. Every other budget counts all layers.
- An embedding reads indices, which are never rounded: whatever column it takes, its activations
  stay float.
- Where several pins (or several lists of candidates) match a layer, the last one wins. A pin
  is not bound by candidates or masks.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from proxyq.errors import UsageError, near
from proxyq.model.live import Step
from proxyq.search.allocate.budget import Budget, parse_budget
from proxyq.search.allocate.patterns import Held, matching, split_bits, split_pin
from proxyq.search.allocate.problem import Pin, Problem, check_widths, exact_integer
from proxyq.search.allocate.products import Attention
from proxyq.search.allocate.usage import Counted, Latencies, limits_of
from proxyq.widths import by_size, group_of, groups_of_all

AS_WEIGHTS = "weights"
Pair = tuple[int, int | None]


class LayerLike(Protocol):
    """What is needed of a layer; `weights` are elements, `macs` are for one example.

    An attribute `scale_bits`, where there is one, counts with the size of its weights; another,
    `group_scale_bits`, tells the same of each group size that it may have.
    """

    @property
    def name(self) -> str: ...
    @property
    def weights(self) -> int: ...
    @property
    def macs(self) -> int: ...
    @property
    def group(self) -> str | None: ...


def reads_numbers(layer: LayerLike) -> bool:
    """Whether a layer reads activations: an embedding reads indices, which stay as they are."""
    return bool(getattr(layer, "reads_numbers", True))


ActivationBits = int | None | Mapping[str, int | None] | Sequence[int] | str


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
    activation_cost: Any = None,
    allowed: Any = None,
    activation_allowed: Any = None,
    coupling: Any = None,
    latency: Latencies | None = None,
    schedule: Sequence[Step] | None = None,
    attention: Attention | None = None,
) -> Problem:
    """The problem of choosing one of `bits` for every layer within all `budgets`.

    - `cost`: float `[layers, bits]`, columns in the order of `bits`. Entries that are not
      allowed may be anything; a layer pinned to a bit-width outside `bits` costs 0.
    - `pins`: `'PATTERN=8'`, `'PATTERN=8g64'`, `'PATTERN=8/4'`; `ties`: `'PATTERN'`; `candidates`:
      `'PATTERN=2,4'`, of `bits`. Patterns are shell globs on layer names, `re:` and a regular
      expression, `@first` or `@last`.
    - `shared`: sets of layer names that take one choice, such as `shared_by(layers, "group")`.
    - `activation_bits`: for all layers, or by layer name (`None` is float): fixed; a list:
      candidates, which need `activation_cost`, float `[layers, activation bits]`; or
      `"weights"`: every layer's activations have its weights' bit-width.
    - `allowed`, `activation_allowed`: bool, of the shapes of the costs; what they erase is no
      candidate.
    - `coupling`: float `[choices, choices]`, where each layer's choices are its `bits` and then
      its candidate activation bits, if these are chosen; see `Problem`.
    - `latency`: what layers take, for budgets on `latency`; `schedule`: which tensors are live
      when (`proxyq.model.schedule.schedule`), for budgets on `activation-memory`.
    - `attention`: products of two activations, which budgets on BOPs and memory count.

    **Raises** `UsageError` for whatever is wrong, in one sentence.
    """
    names = [layer.name for layer in layers]
    bits = check_widths(bits)
    table = _table(cost, (len(names), len(bits)), "`cost`", "[layers, bits]")
    groups = _groups(names, ties, shared)
    pinned = _pinned(names, pins, groups)
    if activation_bits is None or isinstance(activation_bits, (int, str, Mapping)):
        for option, value in (("cost", activation_cost), ("allowed", activation_allowed)):
            if value is not None:
                raise UsageError(
                    f"`activation_{option}` goes with a list of `activation_bits` to choose from."
                )
    activations = _activations(activation_bits, activation_cost, names, pinned)
    axis = activations.pairs(bits, [held for held, _ in pinned.values()])
    column = {pair: k for k, pair in enumerate(axis)}

    stays = _mask(allowed, table.shape, "`allowed`", "[layers, bits]")
    sizes = [dict(getattr(layer, "group_scale_bits", {})) for layer in layers]
    # A layer that says nothing of group sizes has one grid a channel, or what all are rounded by.
    stays = stays & np.array([[group_of(b) in (own or {None}) for b in bits] for own in sizes])
    _check_held_groups(names, pinned, sizes)
    shape = (len(names), len(activations.candidates))
    axes = "[layers, activation bits]"
    stays_beside = _mask(activation_allowed, shape, "`activation_allowed`", axes)
    free: list[list[int]] = []
    kept: list[list[int]] = []
    for i, wanted in enumerate(_candidates(names, bits, candidates)):
        widths = [b for b, stay in zip(bits, stays[i], strict=True) if stay and b in wanted]
        beside = zip(activations.candidates, stays_beside[i], strict=True)
        erased = {a for a, stay in beside if not stay}
        free.append([column[b, a] for b in widths for a in activations.beside(b, erased)])
        held = pinned[i][0] if i in pinned else None
        if held is None:
            kept.append(free[i])
        elif held.both:
            kept.append([column[held.bits, held.activation_bits]])
        else:
            kept.append([column[held.bits, a] for a in activations.beside(held.bits, erased)])

    # cost[l, (b, a)] = cost[l, b] + activation_cost[l, a], 0 for what only a pin names
    full = np.zeros((len(names), len(axis)))
    at = {b: k for k, b in enumerate(bits)}
    at_beside = {a: k for k, a in enumerate(activations.candidates)}
    for k, (b, a) in enumerate(axis):
        full[:, k] += table[:, at[b]] if b in at else 0.0
        full[:, k] += activations.cost[:, at_beside[a]] if a in at_beside else 0.0
    mask = np.zeros(full.shape, bool)
    for i, open_columns in enumerate(kept):
        mask[i, open_columns] = True
    # One width for all but what a pin says is no candidate that anyone measured.
    listed = isinstance(activation_bits, Sequence) and not isinstance(activation_bits, str)
    chosen = activations.candidates if listed else ()
    problem = Problem(
        layers=tuple(names),
        bits=tuple(int(b) for b, _ in axis),
        group_sizes=groups_of_all(b for b, _ in axis),
        activation_bits=tuple(a for _, a in axis) if activations.variable else None,
        cost=full,
        allowed=mask,
        groups=groups,
        pins=_pin_records(pinned, free, groups),
        coupling=None if coupling is None else _coupling(coupling, len(names), bits, chosen, axis),
    )
    given = [budgets] if isinstance(budgets, (str, Budget)) else list(budgets)
    counted = Counted(
        weights=[exact_integer(layer.weights, f"weights of {layer.name!r}") for layer in layers],
        macs=[exact_integer(layer.macs, f"macs of {layer.name!r}") for layer in layers],
        fixed=activations.fixed,
        searched=[i not in pinned for i in range(len(names))],
        scale_bits=[int(getattr(layer, "scale_bits", 0)) for layer in layers],
        group_scale_bits=sizes,
        reads_numbers=[reads_numbers(layer) for layer in layers],
        latency=latency,
        schedule=schedule,
        attention=attention or {},
    )
    limits = [
        limit
        for budget in given
        for limit in limits_of(
            parse_budget(budget) if isinstance(budget, str) else budget, problem, counted
        )
    ]
    return replace(problem, limits=tuple(limits))


def _table(values: Any, shape: tuple[int, int], what: str, axes: str) -> np.ndarray:
    table = np.asarray(values, np.float64)
    if table.shape != shape:
        raise UsageError(
            f"{what} must have the shape {axes} = {list(shape)}, got {list(table.shape)}."
        )
    return table


def _coupling(
    values: Any, layers: int, bits: Sequence[int], beside: Sequence[int | None], axis: list[Pair]
) -> np.ndarray:
    """Couplings of columns, from those of single choices: `E G E'`, so no less definite."""
    each = len(bits) + len(beside)
    axes = "[choices, choices]"
    matrix = _table(values, (layers * each, layers * each), "`coupling`", axes)
    # E[(b, a), choice] = 1 where the column holds the choice
    taken = np.zeros((len(axis), each))
    for k, (b, a) in enumerate(axis):
        if b in bits:
            taken[k, list(bits).index(b)] = 1
        if a in beside:
            taken[k, len(bits) + list(beside).index(a)] = 1
    expand = np.kron(np.eye(layers), taken)
    return expand @ matrix @ expand.T


def _mask(given: Any, shape: tuple[int, ...], what: str, axes: str) -> np.ndarray:
    mask = np.ones(shape, bool) if given is None else np.asarray(given)
    if mask.shape != shape or mask.dtype != np.bool_:
        raise UsageError(
            f"{what} must be bool of shape {axes} = {list(shape)}, got {mask.dtype.name} of shape "
            f"{list(mask.shape)}."
        )
    return mask


@dataclass(frozen=True, kw_only=True, eq=False)
class _Activations:
    """How activation bits come about.

    - `variable`: whether columns hold them; else `fixed` does, per layer, `None` for float.
    - `candidates`, `cost` `[layers, candidates]`: what is chosen from; none where activations
      follow the weights.
    """

    variable: bool
    fixed: Sequence[int | None]
    candidates: tuple[int | None, ...]
    cost: np.ndarray

    def beside(self, bits: int, erased: Container[int | None] = ()) -> tuple[int | None, ...]:
        """The activation bits that may stand beside these weight bits."""
        if not self.variable:
            return (None,)
        if not self.candidates:
            return (int(bits),)
        return tuple(a for a in self.candidates if a not in erased)

    def pairs(self, bits: Sequence[int], held: Sequence[Held]) -> list[Pair]:
        """All columns, ascending, float last."""
        found = {(b, a) for b in bits for a in self.beside(b)}
        for pin in held:
            beside = (pin.activation_bits,) if pin.both else self.beside(pin.bits)
            found |= {(pin.bits, a) for a in beside}
        return sorted(found, key=lambda pair: (by_size(pair[0]), pair[1] is None, pair[1]))


def _activations(
    given: ActivationBits, cost: Any, names: list[str], pinned: dict[int, tuple[Held, str]]
) -> _Activations:
    what = "`activation_bits`"
    nothing = np.zeros((len(names), 0))
    if isinstance(given, Sequence) and not isinstance(given, str):
        found = check_widths(given, what)
        if cost is None:
            raise UsageError(
                f"to choose activation bits among {', '.join(map(str, found))} a cost of each is "
                "needed (`activation_cost`), and these scores say nothing of activations: give "
                "one bit-width, or 'weights' for that of the weights."
            )
        shape = (len(names), len(found))
        table = _table(cost, shape, "`activation_cost`", "[layers, activation bits]")
        return _Activations(variable=True, fixed=(), candidates=found, cost=table)
    if given == AS_WEIGHTS:
        return _Activations(variable=True, fixed=(), candidates=(), cost=nothing)
    if isinstance(given, str):
        raise UsageError(f"{what} must be bit-widths, 'weights' or None, got {given!r}.")
    both = [text for held, text in pinned.values() if held.both]
    if isinstance(given, Mapping):
        if both:
            raise UsageError(
                f"the pin {both[0]!r} names activation bits, but these are given layer by layer "
                "already; name the weight bits alone."
            )
        values = [given.get(name) for name in names]
    else:
        values = [given] * len(names)
    fixed = [None if value is None else check_widths([value], what)[0] for value in values]
    if both:  # One width for all but the layers whose pins say otherwise.
        zero = np.zeros((len(names), 1))
        return _Activations(variable=True, fixed=(), candidates=(fixed[0],), cost=zero)
    return _Activations(variable=False, fixed=fixed, candidates=(), cost=nothing)


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
        chosen: list[int] = []
        for b in wanted:
            any_size = group_of(b) is None
            meant = [own for own in bits if own == b or (any_size and int(own) == b)]
            if not meant:
                raise UsageError(
                    f"the candidates {wish!r} name {b} bits, which is not among the bit-widths "
                    f"{', '.join(map(str, bits))}; add it there."
                )
            chosen += meant
        for i in matching(pattern, names, "the candidates"):
            free[i] = tuple(chosen)
    return free


def _pinned(
    names: list[str], pins: Sequence[str], groups: tuple[tuple[int, ...], ...]
) -> dict[int, tuple[Held, str]]:
    """Layer index to what its pin holds it at and the pin's text, groups included."""
    pinned: dict[int, tuple[Held, str]] = {}
    for text in pins:
        held = split_pin(text)
        for i in matching(held.pattern, names, "a pin"):
            pinned[i] = (held, text)
    for group in groups:
        members = [i for i in group if i in pinned]
        for i in members[1:]:
            (one, text), (other, other_text) = pinned[members[0]], pinned[i]
            both = one.both and other.both
            if one.bits != other.bits or (both and one.activation_bits != other.activation_bits):
                raise UsageError(
                    f"the layers {names[members[0]]!r} and {names[i]!r} must share one bit-width, "
                    f"but are pinned apart by {text!r} and {other_text!r}."
                )
        # What names both bit-widths holds the group tighter.
        tightest = sorted(members, key=lambda i: not pinned[i][0].both)
        for i in group if members else ():
            pinned.setdefault(i, pinned[tightest[0]])
    return dict(sorted(pinned.items()))


def _check_held_groups(
    names: list[str],
    pinned: dict[int, tuple[Held, str]],
    sizes: Sequence[Mapping[int | None, int]],
) -> None:
    """Refuse pins on groups that a layer cannot have."""
    for i, (held, text) in pinned.items():
        size = group_of(held.bits)
        if size is not None and size not in sizes[i]:
            raise UsageError(
                f"the pin {text!r} names groups of {size} weights, which the layer {names[i]!r} "
                "does not have: groups are of matrices whose channels hold a whole number of "
                "them, two or more, and scores know those that they were measured with; name the "
                "bits alone, or another size."
            )


def _pin_records(
    pinned: dict[int, tuple[Held, str]],
    free: list[list[int]],
    groups: tuple[tuple[int, ...], ...],
) -> tuple[Pin, ...]:
    """`Pin`s by text and by what the layers could take otherwise.

    Layers of a group are lifted together: a group held by two pins of the same bit-width is
    filed under the first.
    """
    first = {i: pinned[group[0]][1] for group in groups if group[0] in pinned for i in group}
    filed: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for i, (_, text) in pinned.items():
        filed.setdefault((first.get(i, text), tuple(free[i])), []).append(i)
    return tuple(
        Pin(text=text, layers=tuple(members), free=columns)
        for (text, columns), members in filed.items()
    )
