"""Coupled layers: exact means exact, bounds hold, and what was done to couplings is said."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from problems import coupled_problem, plans, rounding, values

from proxyq.errors import ProxyqError, UsageError
from proxyq.search.allocate import (
    InfeasibleError,
    Limit,
    Problem,
    Status,
    solve,
    verify,
)
from proxyq.search.allocate.assignment import total_cost
from proxyq.search.allocate.branch import separable_bound
from proxyq.search.allocate.convexify import convexify, safe_delta
from proxyq.search.allocate.interior import Program, steps
from proxyq.search.allocate.quadratic import quadratic
from proxyq.search.allocate.relax import Convex
from proxyq.search.allocate.symmetry import alike, arranged, in_order
from proxyq.search.allocate.threads import _functions, one_thread


def check(problem: Problem, **options) -> None:
    """The answer keeps all limits, is the best of all plans, and its bound is one."""
    try:
        answer = solve(problem, "iqp", **options)
    except InfeasibleError:
        assert not len(plans(problem))
        return
    asked, problem = problem, answer.problem
    assert (problem is asked) == (not answer.notes)
    verify(asked, answer.choice)
    best = values(problem, plans(problem)).min()
    slack = rounding(problem)
    assert answer.objective == total_cost(problem, answer.choice)
    assert answer.objective == pytest.approx(best, rel=1e-9, abs=slack)
    assert answer.bound <= min(best + slack, answer.objective)
    assert answer.status is Status.OPTIMAL
    # Cut short, the answer is no better and the bound no worse than true.
    early = solve(asked, "iqp", nodes=0, starts=1, **options)
    verify(problem, early.choice)
    assert early.objective >= best - slack
    assert early.bound <= best + slack


@pytest.mark.parametrize("block", range(4))
def test_every_plan_looked_at(block: int) -> None:
    for seed in range(60 * block, 60 * (block + 1)):
        check(coupled_problem(seed))


@pytest.mark.parametrize("kind", ["indefinite", "integers"])
def test_as_it_is(kind: str) -> None:
    for seed in range(60):
        problem = coupled_problem(seed, kind=kind)
        check(problem, indefinite="exact")
        if plans(problem).size:
            assert solve(problem, indefinite="exact").problem is problem


def test_the_reference_takes_couplings() -> None:
    for seed in range(20):
        problem = coupled_problem(seed, limits=1, most=300)
        try:
            best = solve(problem, "exhaustive")
        except InfeasibleError:
            with pytest.raises(InfeasibleError, match="cannot"):
                solve(problem, "iqp")
            continue
        assert best.objective == pytest.approx(
            values(problem, plans(problem)).min(), rel=1e-12, abs=rounding(problem)
        )


def gram_problem(layers: int, seed: int = 0, bits=(2, 3, 4, 6), share: float = 0.4) -> Problem:
    """Positive correlations, costs that fall with the bits, one budget: as real ones are."""
    rng = np.random.default_rng(seed)
    bits = np.array(bits)
    directions = rng.normal(size=(layers, 1, 30)) + rng.normal(size=30)
    directions = directions + 0.5 * rng.normal(size=(layers, len(bits), 30))
    directions = directions.reshape(layers * len(bits), 30)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    own = (rng.lognormal(0, 1.2, (layers, 1)) * 4.0**-bits).ravel()
    weights = rng.lognormal(9, 1.2, layers).astype(np.int64) + 1
    least, most = weights.sum() * bits.min(), weights.sum() * bits.max()
    size = Limit(
        name="size",
        usage=weights[:, None] * bits,
        budget=int(least + share * (most - least)),
    )
    return Problem(
        layers=tuple(f"layer{i}" for i in range(layers)),
        bits=tuple(map(int, bits)),
        cost=np.zeros((layers, len(bits))),
        coupling=(directions @ directions.T) * np.sqrt(np.outer(own, own)),
        limits=(size,),
    )


@pytest.mark.parametrize("layers", [20, 50])
def test_problems_of_real_size_are_proven_in_few_nodes(layers: int) -> None:
    for share in (0.15, 0.4):
        answer = solve(gram_problem(layers, share=share), nodes=2000)
        assert answer.status is Status.OPTIMAL
        assert answer.gap == 0
        found = solve(gram_problem(layers, share=share), nodes=0)
        assert found.objective <= answer.objective * 1.03


def test_more_budget_is_never_worse() -> None:
    for seed in range(25):
        rng = np.random.default_rng(seed)
        problem = coupled_problem(seed, kind="gram", limits=int(rng.integers(1, 4)))
        shares = np.sort(rng.random((3, len(problem.limits))), axis=0)
        last = np.inf
        for row in shares:
            limits = [
                replace(limit, budget=limit.budget + int(share * limit.budget))
                for limit, share in zip(problem.limits, row, strict=True)
            ]
            try:
                found = solve(replace(problem, limits=tuple(limits))).objective
            except InfeasibleError:
                continue
            assert found <= last + 1e-9 * abs(found) + rounding(problem)
            last = found


def test_the_order_of_layers_does_not_matter() -> None:
    for seed in range(20):
        problem = replace(coupled_problem(seed, kind="gram", limits=1), groups=())
        layers, columns = problem.cost.shape
        order = np.random.default_rng(seed).permutation(layers)
        rows = (order[:, None] * columns + np.arange(columns)).ravel()
        moved = replace(
            problem,
            layers=tuple(problem.layers[i] for i in order),
            cost=problem.cost[order],
            coupling=problem.coupling[np.ix_(rows, rows)],
            allowed=problem.allowed[order],
            limits=tuple(replace(limit, usage=limit.usage[order]) for limit in problem.limits),
        )
        try:
            wanted = solve(problem).objective
        except InfeasibleError:
            continue
        assert solve(moved).objective == pytest.approx(wanted, rel=1e-9, abs=rounding(problem))


# -- what is known beforehand ----------------------------------------------------------------


def test_nested_errors_alone_take_the_most_bits() -> None:
    # Errors of all layers in one direction, shrinking with the bits: G = e e'.
    rng = np.random.default_rng(0)
    bits = np.array([2, 3, 4, 8])
    error = (rng.random((6, 1)) + 0.1) * 2.0**-bits
    problem = Problem(
        layers=tuple("abcdef"),
        bits=tuple(map(int, bits)),
        cost=np.zeros((6, 4)),
        coupling=np.outer(error, error),
    )
    assert solve(problem).bits == (8,) * 6


def test_couplings_within_layers_alone_are_costs() -> None:
    for seed in range(20):
        problem = coupled_problem(seed, kind="apart", limits=2)
        diagonal = problem.coupling.diagonal().reshape(problem.cost.shape)
        if problem.groups:
            continue
        apart = replace(problem, cost=problem.cost + diagonal, coupling=None)
        try:
            answer = solve(apart, "ilp")
        except InfeasibleError:
            continue
        assert solve(problem).choice == answer.choice


def test_without_couplings_it_is_the_integer_program() -> None:
    problem = replace(gram_problem(6), coupling=None, cost=np.arange(24.0).reshape(6, 4))
    assert solve(problem, "iqp").solver == "ilp"


def test_two_layers_that_cancel_are_taken_together() -> None:
    # Alone both choices cost 1, together nothing: the local search has to move two at once.
    coupling = np.zeros((4, 4))
    coupling[0, 0] = coupling[2, 2] = 1.0
    coupling[0, 2] = coupling[2, 0] = -1.0
    coupling[1, 1] = coupling[3, 3] = 0.1
    problem = Problem(layers=("a", "b"), bits=(2, 4), cost=np.zeros((2, 2)), coupling=coupling)
    answer = solve(problem, nodes=0, starts=1)
    assert answer.bits == (2, 2)
    assert answer.objective == 0


@pytest.mark.parametrize("scale", [1e-250, 1e-9, 1.0, 1e12, 1e150])
def test_costs_of_any_size(scale: float) -> None:
    problem = gram_problem(10)
    wanted = solve(problem).choice
    answer = solve(replace(problem, coupling=problem.coupling * scale))
    assert answer.choice == wanted
    assert answer.status is Status.OPTIMAL


def test_huge_costs_of_what_is_never_chosen_do_not_hide_small_ones() -> None:
    problem = gram_problem(7, share=0.6)
    huge = problem.coupling.reshape(7, 4, 7, 4).copy()
    huge[:, 0, :, 0] += 1e15
    big = replace(problem, coupling=huge.reshape(28, 28))
    best = values(big, plans(big)).min()
    assert solve(big).objective == pytest.approx(best, rel=1e-9)


def test_a_budget_missed_by_one_is_missed() -> None:
    # Usages near 2^50: a float tolerance would let a plan through that is one bit too large.
    unit = 2**50 + 1
    usage = np.array([[unit, 2 * unit]] * 4) + np.arange(4)[:, None]
    error = np.array([[1.0, 0.0]] * 4)
    for short, wanted in ((0, 4.0), (1, 9.0)):
        problem = Problem(
            layers=tuple("abcd"),
            bits=(2, 4),
            cost=np.zeros((4, 2)),
            coupling=np.outer(error, error),
            limits=(Limit(name="size", usage=usage, budget=6 * unit + 6 - short),),
        )
        answer = solve(problem)
        assert answer.objective == wanted
        assert answer.usage[0] <= problem.limits[0].budget


# -- indefinite couplings --------------------------------------------------------------------


def test_an_indefinite_matrix_is_projected_and_said_so() -> None:
    for seed in range(20):
        problem = replace(coupled_problem(seed, kind="indefinite", limits=0), groups=())
        problem = replace(problem, cost=np.zeros(problem.cost.shape))
        given = problem.coupling
        answer = solve(problem)
        eigenvalues = np.linalg.eigvalsh(given)
        largest = np.abs(eigenvalues).max()
        negative = np.minimum(eigenvalues, 0.0)
        if -negative.sum() <= 1e-6 * np.abs(eigenvalues).sum():
            assert answer.problem is problem
            assert not answer.notes
            continue
        used = answer.problem.coupling
        assert np.linalg.eigvalsh(used)[0] >= -1e-12 * largest
        # What was removed are the negative eigenvalues, no more and no less.
        assert np.linalg.norm(used - given) == pytest.approx(np.linalg.norm(negative), rel=1e-9)
        share = np.abs(negative).sum() / np.abs(eigenvalues).sum()
        norm = np.linalg.norm(negative) / np.linalg.norm(eigenvalues)
        assert f"removes {share:.1%} of the eigenvalues' magnitude ({norm:.1%}" in answer.notes[0]
        assert answer.objective == total_cost(answer.problem, answer.choice)
        assert answer.bound >= -1e-9 * largest


def test_costs_count_as_a_diagonal() -> None:
    problem = gram_problem(6)
    diagonal = problem.coupling.diagonal().reshape(6, 4)
    moved = replace(problem, cost=diagonal, coupling=problem.coupling - np.diag(diagonal.ravel()))
    assert np.linalg.eigvalsh(moved.coupling)[0] < -0.01
    answer = solve(moved)
    assert answer.problem is moved
    assert answer.choice == solve(problem).choice
    # Also where something has to be removed: less than without them.
    moved = replace(moved, cost=0.9 * diagonal)
    assert solve(moved).problem is not moved


# -- what ends early, and what cannot be -----------------------------------------------------


def test_a_time_limit_keeps_the_best_answer_so_far() -> None:
    problem = gram_problem(40, share=0.3)
    best = solve(problem)
    for options in ({"time_limit": 1e-9}, {"nodes": 0}, {"nodes": 3}):
        answer = solve(problem, "iqp", **options)
        assert answer.status is Status.FEASIBLE
        assert answer.bound <= best.objective <= answer.objective
        assert 0 < answer.gap <= 1
    exact = solve(problem, time_limit=1e-9, indefinite="exact")
    assert exact.bound <= best.objective


def test_a_gap_limit_is_enough_for_optimal() -> None:
    problem = gram_problem(30, share=0.3)
    best = solve(problem).objective
    for limit in (0.01, 0.1, 0.9):
        answer = solve(problem, "iqp", gap_limit=limit)
        assert answer.status is Status.OPTIMAL
        assert answer.gap <= limit + 1e-12
        assert answer.bound <= best <= answer.objective


def test_what_cannot_be_is_told_as_by_the_integer_program() -> None:
    problem = gram_problem(5)
    (size,) = problem.limits
    low = replace(problem, limits=(replace(size, budget=10),))
    other = Limit(name="other", usage=size.usage[:, ::-1], budget=size.budget)
    both = replace(problem, limits=(size, replace(other, budget=int(size.budget * 0.9))))
    for wrong in (low, both):
        texts = []
        for method, coupling in (("iqp", wrong.coupling), ("ilp", None)):
            with pytest.raises(InfeasibleError) as error:
                solve(replace(wrong, coupling=coupling), method)
            texts.append(str(error.value))
        assert texts[0] == texts[1]


def test_wrong_options_are_told() -> None:
    problem = gram_problem(3)
    with pytest.raises(UsageError, match="'project' or 'exact', got 'ignore'"):
        solve(problem, indefinite="ignore")
    with pytest.raises(UsageError, match="`starts` must be at least 1, got 0"):
        solve(problem, starts=0)
    with pytest.raises(UsageError, match="`seed` must be at least 0, got -1"):
        solve(problem, seed=-1)
    with pytest.raises(UsageError, match=r"`nodes` must be an integer, got 1\.5"):
        solve(problem, nodes=1.5)
    with pytest.raises(ProxyqError, match="takes no couplings"):
        solve(problem, "ilp")


def test_no_other_solver_is_needed() -> None:
    code = """
import sys
import numpy as np
sys.modules["pyscipopt"] = None
from proxyq.search.allocate import Limit, Problem, solve
rng = np.random.default_rng(0)
factor = rng.normal(size=(36, 12))
weights = rng.integers(1, 1000, (12, 1))
problem = Problem(
    layers=tuple(f"l{i}" for i in range(12)), bits=(2, 3, 4), cost=np.zeros((12, 3)),
    coupling=factor @ factor.T, limits=(
        Limit(name="size", usage=weights * np.array([2, 3, 4]), budget=int(weights.sum() * 3)),),
)
answer = solve(problem)
print(answer.choice, answer.objective.hex(), answer.bound.hex(), answer.status.short)
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": hashed, "PYTHONPATH": ":".join(sys.path)},
        )
        for hashed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert "optimal" in runs[0].stdout


# -- the parts -------------------------------------------------------------------------------


def test_bounds_hold_for_every_set_of_choices() -> None:
    for seed in range(60):
        problem = coupled_problem(seed, most=600)
        every = plans(problem)
        if not len(every):
            continue
        program = quadratic(problem)
        rng = np.random.default_rng(seed)
        number = np.zeros(program.reduced.open.shape, int)
        number[program.variable, program.column] = np.arange(len(program.variable))
        taken = number[
            np.arange(len(program.first)), every[:, [own[0] for own in problem.decisions]]
        ]
        costs = np.array([program.value(one) for one in taken])
        slack = rounding(problem)
        np.testing.assert_allclose(costs, values(problem, every), rtol=1e-9, atol=slack)
        least, if_taken = separable_bound(program)
        assert least <= costs.min() + slack
        convex = Convex(program, safe_delta(program))
        whole, hint = np.ones(len(program.unary), bool), rng.random(len(program.unary))
        tight = convexify(convex, whole, hint, float(costs.min()), np.inf, below=0.01)
        bounds = [one.bound(whole, hint, np.inf) for one in (convex, tight)]
        for a in range(len(whole)):
            with_it = costs[(taken == a).any(axis=1)].min(initial=np.inf) + slack
            assert if_taken[a] <= with_it
            assert all(bound.if_taken[a] <= with_it for bound in bounds)
        for _ in range(3):
            open_ = rng.random(len(whole)) < 0.6
            open_[taken[rng.integers(len(taken))]] = True
            inside = open_[taken].all(axis=1)
            for one in (convex, tight):
                bound = one.bound(open_, hint, float(rng.choice([costs.min(), np.inf])))
                assert bound.value <= costs[inside].min() + slack
                assert (bound.if_taken[~open_] == np.inf).all()


def test_the_interior_method_ends_where_the_conditions_hold() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        n, rows = int(rng.integers(1, 12)), int(rng.integers(1, 5))
        factor = rng.normal(size=(n, n))
        a, b = rng.random((rows, n)), rng.random(rows) + 0.1
        program = Program(factor @ factor.T, rng.normal(size=n), a, b)
        last = None
        for last in steps(program, np.full(n, 0.1)):
            if last.mean < 1e-11 and last.violation < 1e-11:
                break
        assert last is not None
        assert last.mean < 1e-11
        assert (a @ last.z <= b + 1e-9).all()
        # Stationary: c + 2 P z + A'y - x = 0, with x z = 0 and y slack = 0.
        np.testing.assert_allclose(last.gradient + a.T @ last.y - last.x, 0, atol=1e-5)
        assert (last.z * last.x < 1e-8).all()
        assert (last.slack * last.y < 1e-8).all()


def test_a_tight_relaxation_is_tighter() -> None:
    problem = gram_problem(12, share=0.3)
    own = np.diag(problem.coupling.diagonal())
    problem = replace(problem, coupling=0.6 * problem.coupling + 0.4 * own)
    program = quadratic(problem)
    best = solve(problem).objective
    plain = Convex(program, safe_delta(program))
    whole, hint = np.ones(len(program.unary), bool), np.zeros(len(program.unary))
    tight = convexify(plain, whole, hint, best, np.inf, below=0.01)
    loose, tighter = (best - one.bound(whole, hint, best).value for one in (plain, tight))
    assert 0 < tighter < 0.7 * loose


def test_layers_that_are_alike_are_served_in_order() -> None:
    bits = np.array([2, 3, 4, 6])
    error = np.tile(2.0**-bits, 20)
    weights = np.full((20, 1), 1000)
    problem = Problem(
        layers=tuple(f"l{i}" for i in range(20)),
        bits=tuple(map(int, bits)),
        cost=np.zeros((20, 4)),
        coupling=0.5 * np.outer(error, error) + 0.5 * np.diag(error**2),
        limits=(Limit(name="size", usage=weights * bits, budget=int(weights.sum() * 3.3)),),
    )
    # Without an order this one takes hours.
    answer = solve(problem, nodes=500)
    assert answer.status is Status.OPTIMAL
    assert answer.bits == (4,) * 6 + (3,) * 14
    program = quadratic(problem)
    classes = alike(program)
    assert [len(members) for members in classes] == [20]
    shuffled = np.arange(20) * 4 + np.random.default_rng(0).integers(0, 4, 20)
    ordered = arranged(shuffled, classes)
    assert program.value(ordered) == program.value(shuffled)
    assert (np.diff(ordered % 4) <= 0).all()
    open_ = np.ones(80, bool)
    open_[12:16] = [False, True, False, False]  # the fourth is at 3 bits
    kept = in_order(open_, classes)
    assert kept.reshape(20, 4)[:3].tolist() == [[False, True, True, True]] * 3
    assert kept.reshape(20, 4)[4:].tolist() == [[True, True, False, False]] * 16


def test_threads_come_back() -> None:
    functions = _functions()
    if functions is None:
        pytest.skip("NumPy is not built with OpenBLAS")
    before = functions[0]()
    with one_thread(), one_thread():
        assert functions[0]() == 1
    assert functions[0]() == before
