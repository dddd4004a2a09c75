"""Solvers by name, and `solve`, which picks one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from proxyq.errors import UsageError
from proxyq.registry import Registry
from proxyq.search.allocate.assignment import Assignment, verify
from proxyq.search.allocate.dp import dp
from proxyq.search.allocate.exhaustive import exhaustive
from proxyq.search.allocate.greedy import greedy
from proxyq.search.allocate.ilp import ilp
from proxyq.search.allocate.iqp import iqp
from proxyq.search.allocate.lp import lp
from proxyq.search.allocate.mutation import mutation
from proxyq.search.allocate.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A solver for the command line and the tests to find.

    `function(problem, *, time_limit, gap_limit, ...)` returns an `Assignment`. `several_limits`
    and `couples`: whether it takes more than one budget, and couplings between layers. `draws`:
    whether it takes a `seed`, and the plan to `start` from.
    """

    name: str
    function: Callable[..., Assignment]
    summary: str
    exact: bool = False
    several_limits: bool = True
    couples: bool = False
    draws: bool = False


SOLVERS: Registry[Solver] = Registry("solver", group="proxyq.solvers")
SOLVERS.add(Solver(name="ilp", function=ilp, exact=True, summary="exact, with proof (HiGHS)"))
SOLVERS.add(
    Solver(
        name="iqp",
        function=iqp,
        exact=True,
        couples=True,
        summary="exact where layers are coupled, with proof",
    )
)
SOLVERS.add(
    Solver(
        name="dp",
        function=dp,
        exact=True,
        several_limits=False,
        summary="exact for one budget, no dependency",
    )
)
SOLVERS.add(Solver(name="lp", function=lp, summary="linear relaxation, rounded as the papers do"))
SOLVERS.add(Solver(name="greedy", function=greedy, summary="marginal gains and exchanges"))
SOLVERS.add(
    Solver(
        name="mutation",
        function=mutation,
        draws=True,
        summary="the best mutant of a plan, as EMQ does",
    )
)
SOLVERS.add(
    Solver(
        name="exhaustive",
        function=exhaustive,
        exact=True,
        couples=True,
        summary="all plans, tiny problems",
    )
)


def solve(
    problem: Problem,
    method: str = "auto",
    *,
    time_limit: float = 60.0,
    gap_limit: float = 0.0,
    **options: Any,
) -> Assignment:
    """The best assignment that `method` finds; `auto` is the exact `ilp`, or `iqp` where layers
    are coupled.

    - `time_limit`: seconds; `gap_limit`: the relative gap at which a proof may stop.
    - `options`: what only this solver takes, such as `rounding` for `lp`.

    **Raises** `UsageError` for a wrong argument, `InfeasibleError` when there is no answer.
    """
    if not time_limit > 0:
        raise UsageError(f"`time_limit` must be a positive number of seconds, got {time_limit}.")
    if not 0 <= gap_limit < 1:
        raise UsageError(f"`gap_limit` must be at least 0 and below 1, got {gap_limit}.")
    coupled = problem.coupling is not None
    if method == "auto":
        method = "iqp" if coupled else "ilp"
    solver = SOLVERS.get(method)
    if coupled and not solver.couples:
        able = " or ".join(repr(one.name) for one in SOLVERS if one.couples)
        raise UsageError(
            f"the solver {solver.name!r} takes no couplings between layers; use {able}, or costs "
            "that add up."
        )
    try:
        answer = solver.function(problem, time_limit=time_limit, gap_limit=gap_limit, **options)
    except TypeError as error:
        if options and "unexpected keyword" in str(error):
            names = ", ".join(repr(name) for name in options)
            raise UsageError(f"the solver {solver.name!r} does not take {names}.") from error
        raise
    verify(problem, answer.choice)  # again, for solvers from elsewhere
    return answer
