"""Random problems through every solver: what must hold for all answers, whoever found them.

A spread of them runs by default; `pytest -m slow tests/test_solvers_random.py` runs ten thousand.
"""

from dataclasses import replace

import numpy as np
import pytest
from problems import coupled_problem, plans, rounding, values
from test_allocate import random_problem

from proxyq.search.allocate import SOLVERS, InfeasibleError, Pin, Problem, Status, solve, verify

DEFAULT, ALL, BLOCKS = 500, 10_000, 10


def drawn(seed: int) -> Problem:
    """Two in five problems have couplings; every third has a layer pinned."""
    rng = np.random.default_rng([seed, 1])
    if seed % 5 < 2:
        problem = coupled_problem(seed, most=600)
    else:
        problem = random_problem(seed, limits=int(rng.integers(0, 5)))
    free = [i for i in range(len(problem.layers)) if not any(i in g for g in problem.groups)]
    if seed % 3 or not free:
        return problem
    layer = int(rng.choice(free))
    open_ = np.flatnonzero(problem.allowed[layer])
    column = int(rng.choice(open_))
    allowed = problem.allowed.copy()
    allowed[layer] = np.arange(len(problem.bits)) == column
    pin = Pin(
        text=f"{problem.layers[layer]}={problem.bits[column]}",
        layers=(layer,),
        free=tuple(map(int, open_)),
    )
    return replace(problem, allowed=allowed, pins=(pin,))


def check(problem: Problem, seed: int) -> None:
    """Every solver that takes the problem."""
    coupled = problem.coupling is not None
    every = plans(problem)
    best = values(problem, every).min() if len(every) else np.inf
    slack = rounding(problem) + 1e-9 * abs(best) if len(every) else 0.0
    for solver in SOLVERS:
        if coupled and not solver.couples:
            continue
        if len(problem.limits) > 1 and not solver.several_limits:
            continue
        options = {"indefinite": "exact"} if solver.name == "iqp" and coupled else {}
        if solver.name == "mutation":
            options = {"mutants": 200, "seed": seed}
        name = f"{solver.name}, seed {seed}"
        if solver.name == "exhaustive" and len(every) > 200:
            continue
        if not len(every):
            with pytest.raises(InfeasibleError):
                solve(problem, solver.name, **options)
            continue
        answer = solve(problem, solver.name, **options)
        verify(problem, answer.choice)
        assert answer.choice in set(map(tuple, every.tolist())), name
        for pin in problem.pins:
            bits = {answer.bits[i] for i in pin.layers}
            assert bits == {int(pin.text.split("=")[1])}, name
        assert answer.bound <= best + slack, name
        assert answer.bound <= answer.objective, name
        assert answer.objective >= best - slack, name
        if solver.exact:
            assert answer.objective <= best + slack, name
            assert answer.status is Status.OPTIMAL, name
        check_looser(problem, solver.name, answer.objective + slack, seed, options)


def check_looser(problem: Problem, solver: str, most: float, seed: int, options: dict) -> None:
    """Exact solvers find nothing dearer where the budgets are looser."""
    if not SOLVERS.get(solver).exact or solver == "exhaustive" or seed % 4:
        return
    rng = np.random.default_rng([seed, 2])
    limits = [
        replace(limit, budget=limit.budget + int(rng.random() * limit.budget))
        for limit in problem.limits
    ]
    loose = solve(replace(problem, limits=tuple(limits)), solver, **options)
    assert loose.objective <= most, f"{solver}, seed {seed}"


@pytest.mark.parametrize("block", range(BLOCKS))
def test_some(block: int) -> None:
    for seed in range(block, ALL, ALL // DEFAULT * BLOCKS):
        check(drawn(seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_all(block: int) -> None:
    for seed in range(block, ALL, BLOCKS):
        check(drawn(seed), seed)
