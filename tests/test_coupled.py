"""The solver for coupled layers against every assignment, one by one."""

import numpy as np
import pytest

from proxyq.errors import UsageError
from proxyq.search.allocate import InfeasibleError, Limit, Problem, Status, solve, verify


def problem(rng, *, layers, bits=(2, 4, 8), definite=True, limits=1, groups=(), tight=0.5):
    """A random problem; couplings are of few directions, as measured ones are."""
    size = layers * len(bits)
    factor = rng.normal(size=(size, int(rng.integers(1, size + 1))))
    coupling = factor @ factor.T / size
    if not definite:
        other = rng.normal(size=(size, size))
        coupling = other + other.T
    usage = [np.sort(rng.integers(1, 50, (layers, len(bits))), axis=1) for _ in range(limits)]
    allowed = rng.random((layers, len(bits))) < 0.8
    allowed[np.arange(layers), rng.integers(0, len(bits), layers)] = True
    for group in groups:
        allowed[list(group)] = True
    return Problem(
        layers=tuple(f"l{i}" for i in range(layers)),
        bits=bits,
        cost=rng.normal(size=(layers, len(bits))) * rng.integers(0, 2),
        coupling=coupling,
        allowed=allowed,
        groups=groups,
        limits=tuple(
            Limit(name=f"m{i}", usage=u, budget=int(u.min(axis=1).sum() * (1 - tight)
                                                   + u.max(axis=1).sum() * tight))
            for i, u in enumerate(usage)
        ),
    )  # fmt: skip


def both(one, **options):
    """The answers of `exhaustive` and `iqp`; `None` where there is none."""
    answers = []
    for method in ("exhaustive", "iqp"):
        try:
            answers.append(solve(one, method, **(options if method == "iqp" else {})))
        except InfeasibleError:
            answers.append(None)
    assert (answers[0] is None) == (answers[1] is None)
    return answers


@pytest.mark.parametrize("definite", [True, False])
@pytest.mark.parametrize("limits", [0, 1, 3])
@pytest.mark.parametrize("groups", [(), ((0, 2), (1, 4))])
def test_it_is_the_best_of_all(definite, limits, groups):
    rng = np.random.default_rng(limits + 10 * len(groups) + definite)
    for _ in range(12):
        one = problem(
            rng, layers=int(rng.integers(5, 7)), definite=definite, limits=limits, groups=groups,
            tight=rng.uniform(0.1, 0.9),
        )  # fmt: skip
        best, found = both(one, **({} if definite else {"indefinite": "exact"}))
        if best is None:
            continue
        verify(one, found.choice)
        scale = np.abs(one.coupling).sum()
        assert found.objective == pytest.approx(best.objective, abs=1e-9 * scale)
        assert found.status is Status.OPTIMAL and found.bound <= found.objective


def test_an_indefinite_matrix_is_projected_and_said():
    one = problem(np.random.default_rng(0), layers=6, definite=False)
    found = solve(one)
    assert any("positive semidefinite" in note for note in found.notes)
    # Costs may count as a diagonal or not.
    cost = np.where(one.allowed, one.cost, 0).ravel()
    for diagonal in (0, cost):
        values = np.linalg.eigvalsh(found.problem.coupling + np.diag(np.ones(len(cost)) * diagonal))
        if values.min() > -1e-9 * values.max():
            break
    else:
        pytest.fail("no way to see the couplings as positive semidefinite")
    best = solve(found.problem, "exhaustive")
    assert found.objective == pytest.approx(best.objective, rel=1e-9)


def test_more_budget_is_never_worse_and_time_gives_what_it_has():
    rng = np.random.default_rng(3)
    one = problem(rng, layers=12, tight=0.2)
    (limit,) = one.limits
    costs = []
    for budget in range(limit.budget, limit.budget + 200, 40):
        wider = Limit(name="m", usage=limit.usage, budget=budget)
        costs.append(solve(_replace(one, limits=(wider,))).objective)
    assert costs == sorted(costs, reverse=True)
    hurried = solve(one, time_limit=1e-6)
    exact = solve(one)
    assert hurried.bound <= exact.objective + 1e-9 and hurried.objective >= exact.objective - 1e-9
    verify(one, hurried.choice)
    few = [solve(one, "iqp", nodes=1) for _ in range(2)]
    assert few[0].choice == few[1].choice and few[0].bound <= exact.objective + 1e-9


def test_without_limits_nested_errors_take_the_highest_bits():
    """Errors along one direction each that shrink with the bits: all-highest is best."""
    rng = np.random.default_rng(0)
    layers, bits = 6, (2, 4, 8)
    direction = np.abs(rng.normal(size=(layers, 20)))
    shrink = np.array([1.0, 0.3, 0.05])
    change = (direction[:, None] * shrink[None, :, None]).reshape(-1, 20)
    one = Problem(
        layers=tuple("abcdef"), bits=bits, cost=np.zeros((layers, 3)), coupling=change @ change.T
    )
    assert solve(one).bits == (8,) * layers


def test_block_diagonal_couplings_are_a_separable_problem():
    rng = np.random.default_rng(1)
    one = problem(rng, layers=10)
    own = np.kron(np.eye(10), np.ones((3, 3))) * one.coupling
    diagonal = np.diag(own).reshape(10, 3)
    separable = _replace(one, coupling=None, cost=np.where(one.allowed, one.cost, 0) + diagonal)
    coupled = _replace(one, coupling=own, cost=np.where(one.allowed, one.cost, 0))
    assert solve(coupled).objective == pytest.approx(solve(separable, "ilp").objective)


def test_what_is_wrong_is_said():
    one = problem(np.random.default_rng(0), layers=5)
    for solver in ("ilp", "dp", "lp", "greedy"):
        with pytest.raises(UsageError, match="takes no couplings between layers; use 'iqp'"):
            solve(one, solver)
    with pytest.raises(UsageError, match="`indefinite` must be"):
        solve(one, indefinite="maybe")
    skewed = np.array(one.coupling)
    skewed[0, 3] += 1.0
    for wrong, words in (
        (skewed, "must be symmetric: layer 'l0' at 2 bits with layer 'l1' at 2 bits"),
        (np.zeros((3, 3)), r"must have the shape .* = \[15, 15\], got \[3, 3\]"),
        (np.full((15, 15), np.nan), "the coupling of layer"),
    ):
        with pytest.raises(UsageError, match=words):
            _replace(one, coupling=wrong, allowed=np.ones((5, 3), bool), cost=np.zeros((5, 3)))


def _replace(one, **changed):
    from dataclasses import replace

    changed.setdefault("cost", np.where(one.allowed, one.cost, 0))
    return replace(one, **changed)
