"""The answer to a problem, how it came about, and the check that every answer passes."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np

from proxyq.errors import ProxyqError
from proxyq.search.allocate.problem import Limit, Problem
from proxyq.search.allocate.text import elided, wrapped

# A solver's proof is arithmetic in float64: gaps below this share of what is at stake (the
# cost above every layer's cheapest choice) are rounding, not missing proof.
ROUNDING = 1e-9


class Status(Enum):
    """How good the answer is known to be; the value is the message for people."""

    OPTIMAL = "optimal: proven best within the gap limit"
    FEASIBLE = (
        "feasible: within every limit, but not proven best; the gap says how far off it may be "
        "(more time or an exact solver closes it)"
    )

    @property
    def short(self) -> str:
        """The word that plan.json uses."""
        return self.name.lower()


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """A column for every layer of `problem`, checked against all limits in exact integers.

    - `choice`: column per layer, which `bits`, `group_sizes` and `activation_bits` spell out;
      `objective`: its total cost.
    - `bound`: no assignment within the limits costs less than this.
    - `expected_bits`: the linear relaxation's fractional bit-widths, from solver `lp` only.
    - `notes`: what else one should know, a sentence each.
    """

    problem: Problem
    choice: tuple[int, ...]
    objective: float
    bound: float
    status: Status
    solver: str
    seconds: float
    notes: tuple[str, ...] = ()
    expected_bits: tuple[float, ...] | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return self.problem.layers

    @cached_property
    def bits(self) -> tuple[int, ...]:
        """Weight bit-width per layer."""
        return tuple(self.problem.bits[k] for k in self.choice)

    @cached_property
    def group_sizes(self) -> tuple[int | None, ...] | None:
        """How many weights share a grid, per layer (`None`: a channel); `None` where they were not
        chosen."""
        columns = self.problem.group_sizes
        return None if columns is None else tuple(columns[k] for k in self.choice)

    @cached_property
    def activation_bits(self) -> tuple[int | None, ...] | None:
        """Activation bit-width per layer (`None`: float); `None` where they were not chosen."""
        columns = self.problem.activation_bits
        return None if columns is None else tuple(columns[k] for k in self.choice)

    def by_name(self) -> dict[str, int]:
        """Weight bit-width by layer name."""
        return dict(zip(self.layers, self.bits, strict=True))

    @cached_property
    def usage(self) -> tuple[int, ...]:
        """Raw amount used of every limit, exact, in the order of `problem.limits`."""
        return tuple(used(limit, self.choice) for limit in self.problem.limits)

    @cached_property
    def achieved(self) -> tuple[tuple[Limit, int], ...]:
        """Raw amount used of every budget, in the order of `problem.budgets`, and by which limit.

        A budget in several parts takes what the largest of them takes.
        """
        usage = dict(zip(map(id, self.problem.limits), self.usage, strict=True))
        peaks = (max(parts, key=lambda part: usage[id(part)]) for parts in self.problem.budgets)
        return tuple((peak, usage[id(peak)]) for peak in peaks)

    @property
    def gap(self) -> float:
        """(objective - bound) / max(|objective|, |bound|); 0 where they agree."""
        return relative_gap(self.objective, self.bound)

    def __repr__(self) -> str:
        return (
            f"<Assignment {self.status.short} by {self.solver}: {len(self.choice)} layers, "
            f"objective {self.objective:.6g}, bound {self.bound:.6g}>"
        )

    def __str__(self) -> str:
        """Two lines on the whole, then a table with a line per layer."""
        parts = [self.status.short, self.solver]
        for limit, amount in self.achieved:
            have, budget = limit.show_units(limit.in_units(amount), limit.asked_in_units)
            parts.append(f"{limit.name} {have} of {budget}")
        parts += [f"cost {self.objective:.4g}", f"bound {self.bound:.4g}"]
        lines = wrapped(parts)
        lines += [f"note: {note}" for note in self.notes]
        columns = [limit.name[:9] for limit, _ in self.achieved][:3]
        chosen = [self.problem.shown(k) for k in self.choice]
        wide = max(4, *map(len, chosen))
        room = 40 - wide
        head = f"{'layer':<{room}} {'bits':>{wide}} {'cost':>10}"
        lines.append(head + "".join(f" {name + ' %':>11}" for name in columns))
        for i, name in enumerate(self.layers):
            k = self.choice[i]
            line = f"{elided(name, room):<{room}} {chosen[i]:>{wide}}"
            line += f" {self.problem.cost[i, k]:>10.3g}"
            for limit, amount in self.achieved[:3]:
                share = 100 * int(limit.usage[i, k]) / amount if amount else 0.0
                line += f" {share:>11.1f}"
            lines.append(line)
        return "\n".join(lines)


def used(limit: Limit, choice: Sequence[int]) -> int:
    """`fixed + sum of usage` at these columns, in Python integers."""
    return limit.fixed + sum(int(limit.usage[i, k]) for i, k in enumerate(choice))


def relative_gap(objective: float, bound: float) -> float:
    """(objective - bound) / max(|objective|, |bound|), never negative."""
    if objective <= bound:
        return 0.0
    return (objective - bound) / max(abs(objective), abs(bound))


def verify(problem: Problem, choice: Sequence[int]) -> None:
    """Check one column per layer, candidates, groups and limits, in exact integers.

    **Raises** `ProxyqError` naming the first thing that is violated.
    """
    if len(choice) != len(problem.layers):
        raise ProxyqError(
            f"an answer must choose for {len(problem.layers)} layers, got {len(choice)} choices."
        )
    for i, k in enumerate(choice):
        if not 0 <= k < len(problem.bits) or not problem.allowed[i, k]:
            raise ProxyqError(f"the choice {k} for layer {problem.layers[i]!r} is not allowed.")
    for group in problem.groups:
        if len({choice[i] for i in group}) > 1:
            names = ", ".join(repr(problem.layers[i]) for i in group)
            raise ProxyqError(f"the layers {names} must share one bit-width and do not.")
    for limit in problem.limits:
        amount = used(limit, choice)
        if amount > limit.budget:
            have, budget = limit.show(amount, limit.budget)
            where = f" at {limit.part!r}" if limit.part else ""
            raise ProxyqError(f"the answer takes {have} of {limit.name!r}{where}, above {budget}.")


def total_cost(problem: Problem, choice: Sequence[int]) -> float:
    """Costs and couplings at these columns, correctly rounded (so layer order is no matter)."""
    terms = [float(problem.cost[i, k]) for i, k in enumerate(choice)]
    if problem.coupling is not None:
        rows = np.arange(len(choice)) * len(problem.bits) + np.asarray(choice)
        terms += problem.coupling[np.ix_(rows, rows)].ravel().tolist()
    return math.fsum(terms)


def finish(
    problem: Problem,
    choice: Sequence[int],
    *,
    bound: float,
    solver: str,
    started: float,
    gap_limit: float = 0.0,
    proven: bool = False,
    notes: Sequence[str] = (),
    expected_bits: Sequence[float] | None = None,
) -> Assignment:
    """The verified `Assignment`; every solver returns through here.

    `proven` says that the solver's search was exhaustive, up to rounding; else the status
    is optimal only where `bound` shows it. `started` is `time.perf_counter()` at the start.

    **Raises** `ProxyqError` when the answer violates anything: a solver's mistake is never
    handed on.
    """
    choice = tuple(int(k) for k in choice)
    verify(problem, choice)
    objective = total_cost(problem, choice)
    bound = min(float(bound), objective)
    cheapest = math.fsum(float(c) for c in problem.cost.min(axis=1))
    at_stake = max(objective - cheapest, abs(objective) if problem.coupling is not None else 0.0)
    rounding = ROUNDING * at_stake + 4e-16 * abs(objective)
    close = objective - bound <= rounding or relative_gap(objective, bound) <= gap_limit
    return Assignment(
        problem=problem,
        choice=choice,
        objective=objective,
        bound=bound,
        status=Status.OPTIMAL if proven or close else Status.FEASIBLE,
        solver=solver,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
        expected_bits=None if expected_bits is None else tuple(map(float, expected_bits)),
    )
