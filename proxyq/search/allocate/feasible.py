"""Whether a problem can be met at all, what is reachable, and whose fault it is if not."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NoReturn

import numpy as np

from proxyq.errors import ProxyqError
from proxyq.search.allocate.highs import integer_program
from proxyq.search.allocate.problem import InfeasibleError, Limit, Pin, Problem
from proxyq.search.allocate.reduce import Reduced, candidates, merged, reduce


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The least and most of one budget that any choice uses, alone, in the budget's unit."""

    name: str
    unit: str
    low: Fraction
    high: Fraction
    asked: Fraction


def extremes(problem: Problem, limit: Limit, allowed: np.ndarray | None = None) -> tuple[int, int]:
    """Least and most raw amount of `limit`, the other limits left out; Python ints."""
    open_ = candidates(problem, allowed)
    usage = merged(problem, limit.usage)
    low = np.where(open_, usage, np.iinfo(np.int64).max).min(axis=1)
    high = np.where(open_, usage, -1).max(axis=1)
    return limit.fixed + sum(map(int, low)), limit.fixed + sum(map(int, high))


def reach(
    problem: Problem, parts: Sequence[Limit], allowed: np.ndarray | None = None
) -> tuple[int, int]:
    """Least and most raw amount of a budget, the others left out.

    Of several parts the largest counts. They are least all at once where the same choices are
    least in each, as those of activation memory are; else the true least may be more.
    """
    ends = [extremes(problem, part, allowed) for part in parts]
    return max(low for low, _ in ends), max(high for _, high in ends)


def reachable(problem: Problem) -> tuple[Reach, ...]:
    """What each budget can be, in the order of `problem.budgets`."""
    found = []
    for parts in problem.budgets:
        limit = parts[0]
        low, high = reach(problem, parts)
        found.append(
            Reach(
                name=limit.name,
                unit=limit.unit,
                low=limit.in_units(low),
                high=limit.in_units(high),
                asked=limit.asked_in_units,
            )
        )
    return tuple(found)


def require_reachable(problem: Problem, reduced: Reduced) -> None:
    """Raise `InfeasibleError` when some limit cannot be met even alone."""
    for limit, room in zip(problem.limits, reduced.room, strict=True):
        if room < 0:
            parts = next(parts for parts in problem.budgets if limit in parts)
            raise InfeasibleError(_alone(problem, parts))


def feasible_point(problem: Problem, reduced: Reduced, *, time_limit: float) -> np.ndarray:
    """Some answer within all limits, columns `[variables]`.

    **Raises** `InfeasibleError` when there is none, `ProxyqError` when time ran out first.
    """
    require_reachable(problem, reduced)
    found = integer_program(reduced, time_limit=time_limit, any_point=True)
    if found.picked is not None:
        return found.picked
    if found.infeasible:
        _jointly(problem, time_limit)
    raise ProxyqError(
        f"no plan within all limits was found in {time_limit:g} s, and none was ruled out; "
        "allow more time or loosen a budget."
    )


def lifted(problem: Problem, pins: Sequence[Pin]) -> np.ndarray:
    """`allowed` as it would be without these pins."""
    allowed = problem.allowed.copy()
    for pin in pins:
        for layer in pin.layers:
            allowed[layer, list(pin.free)] = True
    return allowed


def _alone(problem: Problem, parts: Sequence[Limit]) -> str:
    """The sentence on a budget that no choice can meet, with the pins that cause it."""
    limit = parts[0]
    low, high = reach(problem, parts)
    least, most, asked = limit.show_units(
        limit.in_units(low), limit.in_units(high), limit.asked_in_units
    )
    where = max(parts, key=lambda part: extremes(problem, part)[0]).part
    text = (
        f"the budget {limit.name} = {asked} cannot be met: with the bit-widths allowed the "
        f"smallest reachable is {least}{f' (at {where!r})' if where else ''} and the largest {most}"
    )

    def least_without(pins: Sequence[Pin]) -> int:
        return reach(problem, parts, lifted(problem, pins))[0]

    wishes = _wishes(problem.pins)
    guilty = {wish: best for wish in wishes if (best := least_without(wish)) <= limit.budget}
    if guilty:
        best = limit.show(min(guilty.values()))[0]
        text += f"; the pin {_names(guilty, 'or')} causes it: lifted, {best} is reachable."
        return text
    effective = [wish for wish in wishes if least_without(wish) < low]
    best = least_without([pin for wish in effective for pin in wish])
    if effective and best <= limit.budget:
        text += f"; the pins {_names(effective, 'and')} cause it together: lifted, "
        return text + f"{limit.show(best)[0]} is reachable."
    return text + "; ask for more, or allow smaller bit-widths."


def _wishes(pins: Sequence[Pin]) -> list[tuple[Pin, ...]]:
    """Pins that come from one text of the user's, together: people lift them together."""
    texts: dict[str, list[Pin]] = {}
    for pin in pins:
        texts.setdefault(pin.text, []).append(pin)
    return [tuple(found) for found in texts.values()]


def _names(wishes: Iterable[Sequence[Pin]], word: str) -> str:
    return f" {word} ".join(repr(pins[0].text) for pins in wishes)


def _infeasible(problem: Problem, time_limit: float) -> bool:
    reduced = reduce(problem)
    if any(room < 0 for room in reduced.room):
        return True
    return integer_program(reduced, time_limit=time_limit, any_point=True).infeasible


def _jointly(problem: Problem, time_limit: float) -> NoReturn:
    """Raise for limits that hold one by one but not together, naming a smallest such set."""
    core = budgets = list(problem.budgets)
    for parts in budgets:
        rest = [other for other in core if other is not parts]
        if len(rest) > 1 and _infeasible(replace(problem, limits=_limits(rest)), time_limit):
            core = rest
    # What is one sum can be the objective below, so such a budget comes last.
    core.sort(key=lambda parts: len(parts) == 1)
    text = f"the budgets {_asked(core)} cannot hold together, though each can alone"
    *rest, (last, *others) = core
    if not others:
        # The least of the last limit within the others: an allocation whose cost is that usage.
        cost = np.where(problem.allowed, last.usage.astype(np.float64), np.inf)
        inner = reduce(replace(problem, cost=cost, coupling=None, limits=_limits(rest)))
        found = integer_program(inner, time_limit=time_limit)
        if found.picked is not None:
            choice = inner.expand(found.picked)
            low = last.fixed + sum(int(last.usage[i, k]) for i, k in enumerate(choice))
            least, most = last.show(low, extremes(problem, last)[1])
            text += (
                f": within {_asked(rest)} the smallest reachable {last.name} is {least} (the "
                f"largest, without other budgets, {most})"
            )
    if problem.pins:
        free = replace(
            problem,
            allowed=lifted(problem, problem.pins),
            limits=_limits(core),
            cost=np.zeros(problem.cost.shape),
            pins=(),
        )
        if not _infeasible(free, time_limit):
            wishes = _wishes(problem.pins)
            word = "pin" if len(wishes) == 1 else "pins"
            text += f"; without the {word} {_names(wishes, 'and')} they can"
    raise InfeasibleError(text + "; loosen one of them.")


def _limits(budgets: Iterable[Sequence[Limit]]) -> tuple[Limit, ...]:
    return tuple(limit for parts in budgets for limit in parts)


def _asked(budgets: Iterable[Sequence[Limit]]) -> str:
    firsts = (parts[0] for parts in budgets)
    return " and ".join(f"{one.name} = {one.show_units(one.asked_in_units)[0]}" for one in firsts)
