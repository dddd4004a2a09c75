"""One problem at many budgets: what each amount buys.

Budgets go from the smallest up, and answers help each other. What fits a budget fits every
larger one, so a plan stays where the solver finds none better for more; and no plan within a
budget costs less than the best within a larger one, so bounds hold downwards. Hence more budget
is never predicted to be worse, also where time ends the proofs.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from proxyq.errors import UsageError
from proxyq.progress import Progress, silent
from proxyq.search.allocate.assignment import Assignment, Status, finish, total_cost
from proxyq.search.allocate.budget import Budget
from proxyq.search.allocate.dispatch import solve
from proxyq.search.allocate.problem import InfeasibleError, Problem
from proxyq.search.allocate.usage import asking

TIME_LIMIT = 25.0
"""Seconds for all budgets together, unless asked otherwise."""
LEAST_TIME = 0.05
"""Seconds that every budget gets, also when the others have taken all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """Budgets and the answers within them, both ascending.

    `left_out` are the smallest budgets, which cannot be met; `why` tells it of the last.
    """

    budgets: tuple[Budget, ...]
    answers: tuple[Assignment, ...]
    left_out: tuple[Budget, ...] = ()
    why: InfeasibleError | None = None


def solve_steps(
    problem: Problem,
    budgets: Sequence[Budget],
    method: str = "auto",
    *,
    time_limit: float = TIME_LIMIT,
    progress: Progress = silent,
) -> Steps:
    """The answers of `method` (as for `solve`) at each of `budgets`, ascending and of one unit.

    - `problem`: has a limit of their kind and unit, whose amount is not read; all of its other
      limits hold at every budget.
    - `time_limit`: seconds for all together; what one leaves, the next ones have.

    **Raises** `InfeasibleError` when not even the largest budget can be met.
    """
    if not time_limit > 0:
        raise UsageError(f"`time_limit` must be a positive number of seconds, got {time_limit}.")
    deadline = time.perf_counter() + time_limit
    answers: list[Assignment] = []
    why: InfeasibleError | None = None
    for done, budget in enumerate(budgets):
        left = (deadline - time.perf_counter()) / (len(budgets) - done)
        try:
            answer = solve(within(problem, budget), method, time_limit=max(left, LEAST_TIME))
        except InfeasibleError as error:
            why = error
        else:
            answers.append(_no_worse(answer, answers[-1], budget) if answers else answer)
        progress("allocate", done + 1, len(budgets))
    if not answers:
        raise why or UsageError("give at least one budget.")
    left_out = len(budgets) - len(answers)
    return Steps(
        budgets=tuple(budgets[left_out:]),
        answers=_with_bounds_from_above(answers),
        left_out=tuple(budgets[:left_out]),
        why=why,
    )


def within(problem: Problem, budget: Budget) -> Problem:
    """`problem` at another amount of one of its budgets."""
    limits = [
        asking(limit, budget) if (limit.name, limit.unit) == (budget.kind, budget.unit) else limit
        for limit in problem.limits
    ]
    return replace(problem, limits=tuple(limits))


def amount_of(answer: Assignment, budget: Budget) -> int:
    """The raw amount that an answer takes of what `budget` counts."""
    return next(
        amount
        for limit, amount in answer.achieved
        if (limit.name, limit.unit) == (budget.kind, budget.unit)
    )


def dominated(points: Sequence[Sequence[float]]) -> list[bool]:
    """Of points `[points, criteria]`, less being better: whether another is at least as good in
    everything and better in something."""
    table = np.asarray(points, np.float64)
    as_good = (table[:, None] <= table[None]).all(axis=-1)
    better = (table[:, None] < table[None]).any(axis=-1)
    return np.any(as_good & better, axis=0).tolist()


def _no_worse(answer: Assignment, known: Assignment, budget: Budget) -> Assignment:
    """`answer`, or the choice `known` from a smaller budget where that costs less, or takes less
    at the same cost."""
    cost = total_cost(answer.problem, known.choice)
    amounts = amount_of(known, budget), amount_of(answer, budget)
    if (cost, amounts[0]) >= (answer.objective, amounts[1]):
        return answer
    return _finished(answer, known.choice, answer.bound)


def _with_bounds_from_above(answers: Sequence[Assignment]) -> tuple[Assignment, ...]:
    found = [answers[-1]]
    for answer in reversed(answers[:-1]):
        if found[-1].bound > answer.bound:
            answer = _finished(answer, answer.choice, found[-1].bound)
        found.append(answer)
    return tuple(reversed(found))


def _finished(answer: Assignment, choice: Sequence[int], bound: float) -> Assignment:
    """`answer` with another choice or bound, checked again."""
    return finish(
        answer.problem,
        choice,
        bound=bound,
        solver=answer.solver,
        started=time.perf_counter() - answer.seconds,
        proven=answer.status is Status.OPTIMAL,
        notes=answer.notes,
        expected_bits=answer.expected_bits,
    )
