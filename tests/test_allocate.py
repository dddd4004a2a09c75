"""Problems, budgets and solvers: nothing exceeds a budget, exact means exact."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import plans, rounding, values

from proxyq.errors import ProxyqError, UsageError
from proxyq.search.allocate import (
    SOLVERS,
    InfeasibleError,
    Limit,
    Pin,
    Problem,
    Solver,
    Status,
    budget_steps,
    build_problem,
    finish,
    parse_budget,
    reachable,
    shared_by,
    solve,
    verify,
)
from proxyq.search.allocate.assignment import total_cost, used
from proxyq.search.allocate.highs import Found
from proxyq.search.allocate.lp import ROUNDINGS


def random_problem(seed: int, *, limits: int | None = None, groups: bool = True) -> Problem:
    """A small problem; costs from 1e-9 to 1e12, ties, negative costs, masks, tight budgets."""
    rng = np.random.default_rng(seed)
    layers, columns = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    bits = np.sort(rng.choice([1, 2, 3, 4, 5, 6, 8, 16], columns, replace=False))
    shape = (layers, columns)
    kind = rng.integers(4)
    if kind == 0:
        cost = rng.lognormal(0, 2, (layers, 1)) * 4.0**-bits
    elif kind == 1:
        cost = rng.integers(0, 4, shape).astype(float)
    elif kind == 2:
        cost = -rng.exponential(size=(layers, 1)) * bits
    else:
        cost = rng.normal(size=shape)
    cost = cost * 10.0 ** rng.integers(-9, 13)
    allowed = rng.random(shape) < 0.85
    allowed[np.arange(layers), rng.integers(columns, size=layers)] = True
    grouped: list[tuple[int, ...]] = []
    if groups and layers > 2 and rng.random() < 0.5:
        members = rng.choice(layers, int(rng.integers(2, layers)), replace=False)
        if allowed[members].all(axis=0).any():
            grouped.append(tuple(map(int, members)))
    found = []
    for m in range(int(rng.integers(0, 4)) if limits is None else limits):
        if rng.random() < 0.7:
            usage = rng.integers(1, 10 ** int(rng.integers(1, 13)), (layers, 1)) * bits
        else:
            usage = rng.integers(0, 50, shape)
        low = int(np.where(allowed, usage, usage.max()).min(axis=1).sum())
        high = int(np.where(allowed, usage, 0).max(axis=1).sum())
        fixed = int(rng.integers(0, 3)) * 7
        budget = int(low + (high - low) * rng.uniform(-0.05, 1.1)) + fixed
        found.append(Limit(name=f"limit{m}", usage=usage, budget=budget, fixed=fixed))
    return Problem(
        layers=tuple(f"layer{i}" for i in range(layers)),
        bits=tuple(map(int, bits)),
        cost=cost,
        allowed=allowed,
        limits=tuple(found),
        groups=tuple(grouped),
    )


def check_all(problem: Problem) -> None:
    """Every solver keeps every limit; exact ones agree; bounds are in order."""
    try:
        best = solve(problem, "exhaustive")
    except InfeasibleError:
        for method in ("ilp", "lp", "greedy"):
            with pytest.raises(InfeasibleError, match="cannot"):
                solve(problem, method)
        return
    cheapest = float(problem.cost.min(axis=1).sum())
    slack = 1e-9 * (best.objective - cheapest) + 1e-14 * abs(best.objective) + 1e-300
    answers = {method: solve(problem, method) for method in ("ilp", "greedy")}
    answers |= {how: solve(problem, "lp", rounding=how) for how in ROUNDINGS}
    if len(problem.limits) <= 1:
        answers["dp"] = solve(problem, "dp")
    for name, answer in answers.items():
        verify(problem, answer.choice)
        for limit, amount in zip(problem.limits, answer.usage, strict=True):
            assert amount == used(limit, answer.choice) <= limit.budget
        assert answer.bound <= best.objective + slack, name
        assert answer.objective >= best.objective - slack, name
        assert answer.bound <= answer.objective
        assert answer.objective == total_cost(problem, answer.choice)
    for name in answers.keys() & {"ilp", "dp"}:
        assert answers[name].objective <= best.objective + slack, name
        assert answers[name].status is Status.OPTIMAL
    assert answers["nearest"].bound <= answers["ilp"].objective + slack
    assert answers["ilp"].objective <= answers["greedy"].objective + slack


@pytest.mark.parametrize("block", range(8))
def test_random_problems(block: int) -> None:
    for seed in range(250 * block, 250 * (block + 1)):
        check_all(random_problem(seed))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(10_000, 2**32), st.integers(0, 3))
def test_drawn_problems(seed: int, limits: int) -> None:
    check_all(random_problem(seed, limits=limits))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 3), st.floats(0, 1))
def test_a_looser_budget_never_costs_more(seed: int, limits: int, share: float) -> None:
    problem = random_problem(seed, limits=limits)
    looser = [
        replace(limit, budget=limit.budget + int(share * limit.budget)) for limit in problem.limits
    ]
    try:
        tight = solve(problem)
    except InfeasibleError:
        return
    loose = solve(replace(problem, limits=tuple(looser)))
    assert loose.objective <= tight.objective + 1e-11 * abs(tight.objective)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 2**32))
def test_the_order_of_layers_does_not_matter(seed: int) -> None:
    problem = random_problem(seed, groups=False)
    order = np.random.default_rng(seed + 1).permutation(len(problem.layers))
    moved = replace(
        problem,
        layers=tuple(problem.layers[i] for i in order),
        cost=problem.cost[order],
        allowed=problem.allowed[order],
        limits=tuple(replace(limit, usage=limit.usage[order]) for limit in problem.limits),
    )
    try:
        objective = solve(problem).objective
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            solve(moved)
        return
    assert solve(moved).objective == pytest.approx(objective, rel=1e-11, abs=1e-300)


def test_the_same_answer_every_time() -> None:
    for seed in range(20):
        problem = random_problem(seed, limits=1)
        for method in ("ilp", "greedy", "lp", "dp"):
            try:
                assert solve(problem, method).choice == solve(problem, method).choice
            except InfeasibleError:
                break


def simple(cost, usage, budget: int, **fields) -> Problem:
    cost = np.asarray(cost, float)
    bits = fields.pop("bits", tuple(range(2, 2 + cost.shape[1])))
    limit = Limit(name="size", usage=np.asarray(usage), budget=budget)
    names = tuple(f"l{i}" for i in range(len(cost)))
    return Problem(layers=names, bits=bits, cost=cost, limits=(limit,), **fields)


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e-9, 1.0, 1e12, 1e200])
def test_costs_of_any_size_are_solved_exactly(scale: float) -> None:
    rng = np.random.default_rng(5)
    cost = rng.lognormal(0, 3, (12, 1)) * 4.0 ** -np.array([2, 3, 4])
    weights = rng.integers(100, 10**6, (12, 1))
    usage = weights * np.array([2, 3, 4])
    problem = simple(cost, usage, int(weights.sum() * 2.9))
    wanted = solve(problem, "dp").choice
    scaled = replace(problem, cost=cost * scale)
    for method in ("ilp", "dp"):
        answer = solve(scaled, method)
        assert answer.choice == wanted
        assert answer.status is Status.OPTIMAL


def test_huge_costs_of_what_is_never_chosen_do_not_hide_small_ones() -> None:
    rng = np.random.default_rng(6)
    cost = np.stack([np.full(10, 1e15), rng.random(10), np.zeros(10)], axis=1)
    weights = rng.integers(1, 100, (10, 1))
    problem = simple(cost, weights * np.array([2, 3, 4]), int(weights.sum() * 3.5))
    best = solve(problem, "exhaustive")
    assert solve(problem, "ilp").objective == best.objective
    assert solve(problem, "dp").objective == best.objective


def test_a_budget_missed_by_one_is_missed() -> None:
    # Usages near 2^50: a float tolerance would let a plan through that is one bit too large.
    unit = 2**50 + 1
    usage = np.array([[unit, 2 * unit]] * 4)
    cost = np.array([[1.0, 0.0]] * 4)
    for short, wanted in ((0, 2.0), (1, 3.0)):
        problem = simple(cost, usage + np.arange(4)[:, None], 6 * unit + 6 - short)
        best = solve(problem, "exhaustive")
        assert best.objective == wanted
        for method in ("ilp", "dp", "greedy", "lp"):
            answer = solve(problem, method)
            assert answer.usage[0] <= problem.limits[0].budget
            if SOLVERS.get(method).exact:
                assert answer.objective == wanted


def test_ties_go_to_the_lower_usage() -> None:
    problem = simple([[0.0, 0.0, 0.0]] * 3, [[2, 3, 4]] * 3, 100)
    for method in ("ilp", "dp", "greedy", "exhaustive"):
        assert solve(problem, method).bits == (2, 2, 2)


def test_layers_that_are_alike_are_served_in_order() -> None:
    problem = simple([[1.0, 0.0]] * 6, [[2, 3]] * 6, 14)
    for method in ("ilp", "dp", "greedy"):
        assert solve(problem, method).bits == (3, 3, 2, 2, 2, 2)


def test_a_time_limit_keeps_the_best_answer_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 1000, (30, 1))
    problem = simple(
        rng.random((30, 1)) * 4.0 ** -np.array([2, 3, 4, 6]),
        weights * np.array([2, 3, 4, 6]),
        int(weights.sum() * 3.5),
        bits=(2, 3, 4, 6),
    )
    answer = solve(problem, "ilp", time_limit=1e-9)
    assert answer.status is Status.FEASIBLE
    assert 0 < answer.gap < 1
    assert solve(problem, "dp", time_limit=1e-9).status is Status.FEASIBLE

    def nothing(*args, **options) -> Found:
        return Found(picked=None, bound=0.0, proven=False)

    # The module's name is shadowed by its function in the package.
    module = sys.modules["proxyq.search.allocate.ilp"]
    monkeypatch.setattr(module, "integer_program", nothing)
    answer = solve(problem, "ilp")
    assert "greedy" in answer.notes[0]
    assert answer.objective == solve(problem, "greedy").objective


def test_a_gap_limit_is_enough_for_optimal() -> None:
    problem = random_problem(3, limits=1)
    assert solve(problem, "greedy", gap_limit=0.999).status is Status.OPTIMAL


def test_points_that_are_feasible_only_to_tolerance_are_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """HiGHS is made to see a looser budget; the integer check and the cuts must repair it."""
    module = sys.modules["proxyq.search.allocate.highs"]
    honest = module.rows

    def generous(*args):
        one_hot, kept, rooms, scales = honest(*args)
        return one_hot, kept, [room * 1.2 for room in rooms], scales

    monkeypatch.setattr(module, "rows", generous)
    for seed in range(30):
        problem = random_problem(seed, limits=1)
        try:
            best = solve(problem, "exhaustive").objective
        except InfeasibleError:
            continue
        found = solve(problem, "ilp").objective
        assert found == pytest.approx(best, rel=1e-11, abs=1e-300)


def test_highs_prints_nothing_on_standard_output() -> None:
    code = """
import ctypes, threading
import numpy as np
from proxyq.search.allocate import Limit, Problem, solve
from proxyq.search.allocate.quiet import quiet_highs
rng = np.random.default_rng(1)
bits = np.array([2, 3, 4, 5, 6, 8])
cost = rng.lognormal(0, 1.5, (200, 1)) * 4.0**-bits * rng.uniform(0.5, 1.5, (200, 6))
limits = []
for m in range(2):
    w = rng.lognormal(10, 1.5, (200, 1)).astype(np.int64) + 1
    limits.append(Limit(name=f"m{m}", usage=w * bits, budget=int(w.sum() * (4 + m / 2))))
names = tuple(f"l{i}" for i in range(200))
problem = Problem(layers=names, bits=tuple(map(int, bits)), cost=cost, limits=tuple(limits))
threads = [threading.Thread(target=solve, args=(problem,)) for _ in range(2)]
[t.start() for t in threads]
[t.join() for t in threads]
library = ctypes.CDLL(None)
with quiet_highs():
    library.puts(b"HighsMipSolverData::noise")
    library.puts(b"from C")
    print("from Python", flush=True)
library.fflush(None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.split("\n")
    assert lines[0] == "from Python"
    assert not any("ighs" in line for line in lines)
    if sys.platform == "linux":
        assert lines == ["from Python", "from C", ""]


def test_importing_needs_neither_jax_nor_scipy_nor_pydantic() -> None:
    code = (
        "import sys, proxyq.search.allocate\n"
        "print([m for m in ('jax', 'scipy', 'pydantic', 'torch') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "[]\n"


# -- problems and answers ------------------------------------------------------------------


def good(**fields) -> Problem:
    base = {"layers": ("a", "b"), "bits": (2, 4), "cost": [[1.0, 0.5], [2.0, 0.1]]}
    return Problem(**{**base, **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cost": [[1.0, math.nan], [2.0, 0.1]]}, "'a' at 4 bits is nan"),
        ({"cost": [[1.0, 0.5], [math.inf, 0.1]]}, "'b' at 2 bits is inf"),
        ({"cost": [[1e308, 0.5], [1e308, 0.1]]}, "too large"),
        ({"cost": [1.0, 2.0]}, r"shape \[layers, bits\] = \[2, 2\]"),
        ({"cost": "x"}, "numbers"),
        ({"layers": ("a", "a")}, "'a' is given twice"),
        ({"layers": ()}, "at least one layer"),
        ({"bits": ()}, "at least one bit-width"),
        ({"bits": (2, 2)}, "twice"),
        ({"bits": (2, 9)}, "1 to 8 or 16, got 9"),
        ({"bits": (2, -4)}, "got -4"),
        ({"bits": (2, 4.0)}, "integer"),
        ({"bits": (2, True)}, "integer"),
        ({"allowed": np.array([[True, True], [False, False]])}, "'b' has no bit-width"),
        ({"allowed": np.ones((1, 2), bool)}, "`allowed` must be bool"),
        ({"groups": ((0, 5),)}, "number 5"),
        ({"groups": ((0, 1), (1,))}, "'b' is in two groups"),
        (
            {"groups": ((0, 1),), "allowed": np.array([[True, False], [False, True]])},
            "'a', 'b' must share one bit-width but have none in common",
        ),
    ],
)
def test_bad_problems_are_refused_in_one_sentence(fields: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        good(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"usage": [[1.5, 2.0], [1.0, 2.0]]}, "integers"),
        ({"usage": [[-1, 2], [1, 2]]}, "negative"),
        ({"usage": [1, 2]}, r"\[layers, bits\]"),
        ({"usage": [[1, 2]]}, r"\[2, 2\], got \[1, 2\]"),
        ({"usage": [[2**61, 2**61], [2**61, 1]]}, "2\\^62"),
        ({"usage": np.array([[2**70, 1], [1, 1]], object)}, "2\\^62"),
        ({"budget": 1.5}, "integer"),
        ({"fixed": -1}, "negative"),
        ({"per_unit": 0}, "positive"),
    ],
)
def test_bad_limits_are_refused_in_one_sentence(fields: dict, words: str) -> None:
    base = {"name": "size", "usage": [[1, 2], [1, 2]], "budget": 3}
    with pytest.raises(UsageError, match=words):
        good(limits=(Limit(**{**base, **fields}),))


def test_a_limit_given_twice_is_refused() -> None:
    limit = Limit(name="size", usage=[[1, 2], [1, 2]], budget=3, unit="MiB")
    with pytest.raises(UsageError, match="given twice"):
        good(limits=(limit, limit))


def test_what_is_not_allowed_may_cost_anything() -> None:
    problem = good(
        cost=[[1.0, math.nan], [2.0, 0.1]], allowed=np.array([[True, False], [True, True]])
    )
    assert solve(problem).bits == (2, 4)


def test_problems_cannot_be_changed() -> None:
    problem = good()
    with pytest.raises(ValueError, match="read-only"):
        problem.cost[0, 0] = 3.0


def test_wrong_answers_are_not_handed_on() -> None:
    problem = replace(
        simple([[1.0, 0.0]] * 3, [[2, 3]] * 3, 7),
        groups=((0, 1),),
        allowed=np.array([[True, True], [True, True], [True, False]]),
    )
    for choice, words in (
        ((0, 0), "3 layers"),
        ((0, 0, 1), "not allowed"),
        ((0, 0, 2), "not allowed"),
        ((0, 1, 0), "share"),
        ((1, 1, 0), "above 7"),
    ):
        with pytest.raises(ProxyqError, match=words):
            verify(problem, choice)
        with pytest.raises(ProxyqError, match=words):
            finish(problem, choice, bound=0.0, solver="x", started=0.0)


def test_a_third_party_solver_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = simple([[1.0, 0.0]] * 3, [[2, 3]] * 3, 7)
    loose = replace(problem, limits=(replace(problem.limits[0], budget=100),))

    def careless(problem, *, time_limit, gap_limit):
        return solve(loose)

    monkeypatch.setattr(SOLVERS, "_records", dict(SOLVERS._records))
    SOLVERS.add(Solver(name="careless", function=careless, summary="forgets the budget"))
    with pytest.raises(ProxyqError, match="above 7"):
        solve(problem, "careless")


def test_dispatch_explains_itself() -> None:
    problem = good()
    with pytest.raises(UsageError, match="did you mean 'greedy'"):
        solve(problem, "gredy")
    with pytest.raises(UsageError, match="did you mean 'nearest'"):
        solve(problem, "lp", rounding="nearst")
    with pytest.raises(UsageError, match="'ilp' does not take 'rounding'"):
        solve(problem, rounding="down")
    with pytest.raises(UsageError, match="time_limit"):
        solve(problem, time_limit=0)
    with pytest.raises(UsageError, match="gap_limit"):
        solve(problem, gap_limit=-1)
    two = [Limit(name=n, usage=[[1, 2], [1, 2]], budget=3) for n in ("size", "bops")]
    with pytest.raises(UsageError, match=r"one limit, got 2 \(size, bops\); use 'ilp'"):
        solve(good(limits=tuple(two)), "dp")
    with pytest.raises(UsageError, match="at most 2 assignments"):
        solve(problem, "exhaustive", max_assignments=2)
    many = simple([[1.0, 0.5, 0.3]] * 9, np.arange(27).reshape(9, 3) ** 2, 2000)
    many = replace(many, cost=np.random.default_rng(0).random((9, 3)))
    with pytest.raises(ProxyqError, match="beyond 3 states"):
        solve(many, "dp", max_states=3)


def test_answers_print_as_a_table() -> None:
    budgets = ["size=4bit", "bops=2G", "macs-bits=300M"]
    answer = solve(build(budgets=budgets, activation_bits=8))
    text = str(answer)
    assert text.startswith("optimal · ilp · size ")
    assert all(len(line) <= 88 for line in text.splitlines())
    assert [line.split()[0] for line in text.splitlines()[-5:]] == [x.name for x in LAYERS]
    assert answer.by_name()["stem"] in (2, 4, 8)
    assert "optimal by ilp: 5 layers" in repr(answer)


# -- budgets, pins, ties -------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    name: str
    weights: int
    macs: int
    group: str | None = None


LAYERS = (
    Layer("stem", 864, 884_736),
    Layer("b.conv1", 9216, 9_437_184, "b.conv1"),
    Layer("b.conv2", 9216, 9_437_184),
    Layer("b.down", 512, 500_000, "b.conv1"),
    Layer("fc", 640, 640),
)
COST = np.outer([3, 1, 2, 1, 2], [1.0, 0.5, 0.1])


def build(bits=(2, 4, 8), cost=COST, budgets=(), **options) -> Problem:
    return build_problem(LAYERS, cost, bits, budgets, **options)


def test_budgets_are_exact() -> None:
    assert parse_budget("size=1.5MiB").per_unit(0) * Fraction(3, 2) == 8 * 3 * 2**19
    assert parse_budget("size=3bits") == replace(parse_budget("size=3bit"), text="size=3bits")
    assert parse_budget(" size = 0.1 kB ").amount == Fraction(1, 10)
    assert parse_budget("bops=75G").amount * parse_budget("bops=75G").per_unit(0) == 75 * 10**9
    assert parse_budget("macs-bits=2.5e3M").amount == 2500
    weights = sum(layer.weights for layer in LAYERS)
    # 0.1 has no exact float; the budget is the floor of the exact product all the same.
    for text, raw in (("size=2.1bit", weights * 21 // 10), ("size=6.0001kB", 48_000 + 0)):
        assert build(budgets=text).limits[0].budget == raw
    limits = build(budgets=["size=6KiB", "bops=3G", "macs-bits=1G"], activation_bits=8).limits
    assert [int(limit.usage[1, 2]) for limit in limits] == [73_728, 9_437_184 * 64, 75_497_472]
    floating = build(budgets="bops=9G").limits[0]
    assert int(floating.usage[1, 0]) == 9_437_184 * 2 * 32
    mixed = build(budgets="bops=9G", activation_bits={"stem": None, "fc": 4})
    assert mixed.limits[0].usage[:, 0].tolist()[::4] == [884_736 * 2 * 32, 640 * 2 * 4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3bit", "must look like"),
        ("szie=3bit", "did you mean 'size'"),
        ("size=3", "needs a unit: bit, B, kB"),
        ("size=3Mib", "did you mean 'MiB'"),
        ("size=3b", "unknown unit 'b'"),
        ("size=3G", "unknown unit 'G'"),
        ("bops=3bit", "unknown unit 'bit'"),
        ("size=-3bit", "positive"),
        ("size=0bit", "more than zero"),
        ("size=nan", "positive number"),
        ("size=infbit", "positive number"),
        ("size=", "positive number"),
        ("size=1e999bit", "positive number"),
        ("size=3bit..6bit", "positive number"),
        ("latency=3", "needs a unit: s, ms, us"),
        ("latency=3min", "unknown unit 'min'"),
        ("latency=-3ms", "positive number.*like 3.2ms"),
        ("latency=0us", "more than zero"),
        ("size=100.1%", "0% to 100%"),
        ("size=-1%", "positive number"),
        ("bops=%", "positive number"),
        ("activation-memory=512", "needs a unit: B, kB"),
        ("activation-memory=3bit", "unknown unit 'bit'"),
        ("activation-memory=-3KiB", "positive number.*like 512KiB"),
    ],
)
def test_bad_budgets_are_refused_in_one_sentence(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_budget(text)
    assert "\n" not in str(caught.value)


def test_a_range_of_budgets_is_stepped_evenly() -> None:
    steps = budget_steps("size=2.5bit..6bit", 15)
    assert [step.amount for step in steps[:2]] == [Fraction(5, 2), Fraction(11, 4)]
    assert steps[-1].amount == 6 and steps[0].text == "size=2.5bit"
    for text in ("size=3bit", "size=6bit..3bit", "size=1KiB..2MiB", "size=3bit..3bit"):
        with pytest.raises(UsageError):
            budget_steps(text, 3)
    with pytest.raises(UsageError, match="points"):
        budget_steps("size=2bit..3bit", 1)


def test_pins_stay_in_the_problem_and_out_of_the_average() -> None:
    problem = build(budgets=["size=3bit", "size=9KiB"], pins=["stem=8", "re:f.=16"])
    assert problem.bits == (2, 4, 8, 16)
    average, total = problem.limits
    searched = 9216 + 9216 + 512
    assert average.budget == 3 * searched and average.per_unit == searched
    assert average.usage[0].tolist() == [0, 0, 0, 0]
    assert int(total.usage[4, 3]) == 640 * 16
    answer = solve(problem)
    assert answer.by_name()["stem"] == 8 and answer.by_name()["fc"] == 16
    assert (
        sum(
            layer.weights * b
            for layer, b in zip(LAYERS, answer.bits, strict=True)
            if layer.name.startswith("b.")
        )
        == answer.usage[0]
    )
    # The last pin that matches wins, and its cost counts when it is known.
    later = build(pins=["*=8", "stem=2"])
    assert solve(later).bits == (2, 8, 8, 8, 8)
    assert solve(later).objective == pytest.approx(3 + 0.6)
    # Costs of what a pin rules out may be anything.
    spoiled = COST.copy()
    spoiled[0, :2] = math.nan
    assert solve(build(cost=spoiled, pins=["stem=8"])).bits[0] == 8


def test_ties_and_groups() -> None:
    assert build().groups == ()
    assert build(shared=shared_by(LAYERS, "group")).groups == ((1, 3),)
    assert build(shared=[["fc", "b.down"]], ties=["b.*"]).groups == ((1, 2, 3, 4),)
    tied = build(ties=["b.conv?"], budgets="size=5bit")
    answer = solve(tied)
    assert answer.bits[1] == answer.bits[2]
    # A pin on one layer of a group holds all of it, also in the average.
    held = build(ties=["b.conv?"], pins=["b.conv1=4"], budgets="size=3bit")
    assert solve(held).bits[1:3] == (4, 4)
    assert held.limits[0].per_unit == 864 + 512 + 640
    with pytest.raises(UsageError, match=r"pinned apart by 'b\.conv1=4' and 'b\.conv2=8'"):
        build(ties=["b.conv?"], pins=["b.conv1=4", "b.conv2=8"])


def test_candidates_per_layer() -> None:
    problem = build(candidates=["*=2,4", "stem=8"])
    assert solve(problem).bits == (8, 4, 4, 4, 4)
    with pytest.raises(UsageError, match="none in common"):
        build(candidates=["b.conv1=2", "b.conv2=4"], ties=["b.conv?"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pins": ["stm=8"]}, "did you mean 'stem'"),
        ({"pins": ["stem=9"]}, "got 9"),
        ({"pins": ["stem=-1"]}, "got -1"),
        ({"pins": ["stem"]}, "must look like"),
        ({"pins": ["stem=a"]}, "bit-widths"),
        ({"pins": ["stem=2,4"]}, "one bit-width"),
        ({"ties": ["re:(b"]}, "not a regular expression"),
        ({"ties": ["zz*"]}, "matches no layer"),
        ({"shared": [["stem", "fcc"]]}, "did you mean 'fc'"),
        ({"candidates": ["stem=3"]}, "not among the bit-widths 2, 4, 8"),
        ({"activation_bits": 9}, "got 9"),
        ({"activation_bits": -8}, "got -8"),
        ({"bits": (2, -4, 8)}, "got -4"),
        ({"bits": (2, 4)}, "shape"),
        ({"pins": ["*=8"], "budgets": "size=3bit"}, "every layer with weights is pinned"),
        ({"budgets": ["size=3bit", "size=4bit"]}, "given twice"),
    ],
)
def test_bad_wishes_are_refused_in_one_sentence(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        build(**options)
    assert "\n" not in str(caught.value)


def test_reachable_is_told_in_the_units_asked() -> None:
    size, bops = reachable(build(budgets=["size=3bit", "bops=1G"], activation_bits=8))
    assert (size.low, size.high, size.asked) == (2, 8, 3)
    assert float(bops.low) == sum(layer.macs for layer in LAYERS) * 16 / 1e9


def test_an_infeasible_budget_says_what_is_reachable_and_why() -> None:
    def sentence(**options) -> str:
        with pytest.raises(InfeasibleError) as caught:
            solve(build(**options))
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 1
        return str(caught.value)

    text = sentence(budgets="size=1.9bit")
    assert "size = 1.9 bit" in text and "2 bit" in text and "8 bit" in text
    # Amounts that would round to the same text are told apart.
    assert "1.99999 bit" in sentence(budgets="size=1.99999bit")
    text = sentence(budgets="size=6KiB", pins=["b.conv1=8", "fc=2"])
    assert "the pin 'b.conv1=8' causes it" in text and "4.992 KiB is reachable" in text
    assert "'fc=2'" not in text
    text = sentence(budgets="size=7KiB", pins=["b.conv1=8", "b.conv2=8"])
    assert "'b.conv1=8' and 'b.conv2=8' cause it together" in text


def test_limits_that_hold_alone_but_not_together_are_named() -> None:
    usage = np.array([[0, 10], [0, 10]])
    first = Limit(name="size", usage=usage, budget=10, unit="B")
    second = Limit(name="bops", usage=10 - usage, budget=9, unit="G")
    third = Limit(name="macs-bits", usage=usage, budget=15)
    pinned = Problem(
        layers=("a", "b"), bits=(2, 4), cost=np.zeros((2, 2)), limits=(third, first, second)
    )
    for method in ("ilp", "greedy", "lp"):
        with pytest.raises(InfeasibleError) as caught:
            solve(pinned, method)
        text = str(caught.value)
        assert "size = 10 B and bops = 9 G cannot hold together" in text
        assert "within size = 10 B the smallest reachable bops is 10 G" in text
        assert "macs-bits" not in text
    # The same with a pin that is to blame.
    allowed = np.array([[True, True, False], [True, False, False]])
    small = np.array([[0, 10, 5], [0, 10, 5]])
    problem = Problem(
        layers=("a", "b"),
        bits=(2, 4, 3),
        cost=np.zeros((2, 3)),
        allowed=allowed,
        limits=(
            Limit(name="size", usage=small, budget=9),
            Limit(name="bops", usage=np.array([[10, 0, 3], [2, 0, 2]]), budget=5),
        ),
        pins=(Pin(text="a=2,4", layers=(0,), free=(0, 1, 2)),),
    )
    with pytest.raises(InfeasibleError, match="without the pin 'a=2,4' they can"):
        solve(problem)


# -- mutants ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_mutants_of_a_plan(seed):
    """With changes everywhere and many mutants: the optimum. With few: near the start, no worse."""
    problem = random_problem(seed, limits=1)
    every = plans(problem)
    if not len(every):
        return
    best, units = values(problem, every).min(), len(problem.decisions)
    answer = solve(problem, "mutation", mutants=20_000, changes=units, seed=seed)
    assert answer.objective == pytest.approx(best, abs=rounding(problem) + 1e-9 * abs(best))
    start = tuple(every[seed % len(every)].tolist())
    near = solve(problem, "mutation", start=start, mutants=300, changes=1, seed=seed)
    assert sum(near.choice[unit[0]] != start[unit[0]] for unit in problem.decisions) <= 1
    assert near.objective <= values(problem, every)[seed % len(every)] + 1e-9 * abs(best)
    assert (
        near.choice
        == solve(problem, "mutation", start=start, mutants=300, changes=1, seed=seed).choice
    )


def test_chances_of_mutants():
    """What has no chance is never drawn; what is drawn follows the chances."""
    layers, bits = 6, (2, 3, 4)
    problem = Problem(
        layers=tuple(f"l{i}" for i in range(layers)),
        bits=bits,
        cost=np.tile([2.0, 0.0, 1.0], (layers, 1)),
        limits=(),
    )
    found = solve(problem, "mutation", start=(0,) * layers, chances=(0.5, 0.0, 0.5), changes=6)
    assert found.bits == (4,) * layers
    for wrong, words in (
        ({"mutants": 0}, "`mutants` must be at least 1"),
        ({"chances": (1.0,)}, "`chances` must be 3 numbers"),
        ({"chances": (1.0, -1.0, 0.0)}, "`chances` must be 3 numbers"),
        ({"start": (0, 1)}, "`start` must be a column from 0 to 2"),
    ):
        with pytest.raises(UsageError, match=words):
            solve(problem, "mutation", **wrong)
