"""Fronts: what several budgets buy, from one set of scores, and the file that holds it."""

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from commandline import here
from networks import small_net
from rich.console import Console

import proxyq
from proxyq import api
from proxyq.errors import ProxyqError, UsageError
from proxyq.report.plots import draw_front, plot_front
from proxyq.report.tables import front_summary, front_table
from proxyq.search.allocate import (
    SOLVERS,
    InfeasibleError,
    Problem,
    Solver,
    budget_steps,
    build_problem,
    solve,
)
from proxyq.search.allocate.assignment import finish, total_cost
from proxyq.search.allocate.pareto import amount_of, dominated, solve_steps, within
from proxyq.search.allocate.plan import Plan
from proxyq.search.front_file import Front
from proxyq.search.scores_file import ScoreFile

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Layer:
    name: str
    weights: int
    macs: int
    group: str | None = None


def drawn(layers: int, *, coupled: bool, seed: int = 0) -> Problem:
    """Costs that fall with the bits, or couplings that are positive semidefinite."""
    rng = np.random.default_rng(seed)
    found = [Layer(f"l{i}", int(w), 64) for i, w in enumerate(rng.integers(100, 2000, layers))]
    cost = np.exp(rng.normal(0, 1, (layers, 1))) * 4.0 ** -np.array(BITS)
    coupling = None
    if coupled:
        moves = rng.normal(size=(layers * len(BITS), 5)) * np.sqrt(cost.reshape(-1, 1))
        cost, coupling = np.zeros_like(cost), moves @ moves.T
    return build_problem(found, cost, BITS, "size=8bit", coupling=coupling)


@pytest.fixture(scope="module")
def scored() -> ScoreFile:
    """An importance, a cost and a coupling of the embedded network."""
    return api.score(proxies=["params", "sqnr", "logit-coupling"], samples=32)


@pytest.fixture(scope="module")
def front(scored: ScoreFile) -> Front:
    return api.pareto(scored, budget=["size=1bit..9bit", "bops=200M"], points=9, proxy="sqnr")


def without_seconds(plan: Plan) -> dict:
    record = json.loads(plan.to_json())
    del record["solver"]["seconds"]
    return record


def untimed(text: str) -> list[str]:
    return [line for line in text.splitlines() if '"seconds":' not in line]


# -- budgets one after another ---------------------------------------------------------


@pytest.mark.parametrize("budget", ["size=2bit..8bit", "size=1KiB..8KiB", "size=0%..100%"])
def test_separable_is_each_budget_on_its_own(budget: str):
    layers = [Layer(f"l{i}", w, 64) for i, w in enumerate((300, 1200, 700, 2000, 90, 640))]
    cost = np.random.default_rng(1).exponential(size=(6, 1)) * 4.0 ** -np.array(BITS)
    steps = budget_steps(budget, 15)
    problem = build_problem(layers, cost, BITS, steps[7])
    found = solve_steps(problem, steps)
    costs = []
    for step, answer in zip(found.budgets, found.answers, strict=True):
        alone = solve(build_problem(layers, cost, BITS, step))
        assert answer.objective == alone.objective and answer.choice == alone.choice
        assert answer.achieved[0][1] == alone.achieved[0][1] == amount_of(answer, step)
        assert answer.problem.limits[0].budget == alone.problem.limits[0].budget
        assert answer.problem.limits[0].asked_in_units == step.amount
        assert answer.status.short == "optimal"
        costs.append(answer.objective)
    assert costs == sorted(costs, reverse=True)
    assert len(found.left_out) == 15 - len(costs)


def test_coupled_is_what_enumeration_finds():
    problem = drawn(5, coupled=True)
    found = solve_steps(problem, budget_steps("size=2bit..7bit", 11))
    for step, answer in zip(found.budgets, found.answers, strict=True):
        inside = within(problem, step)
        limit = inside.limits[0]
        best = min(
            total_cost(inside, choice)
            for choice in itertools.product(range(4), repeat=5)
            if sum(int(limit.usage[i, k]) for i, k in enumerate(choice)) <= limit.budget
        )
        assert answer.objective == pytest.approx(best, rel=1e-9, abs=1e-15)
        assert answer.status.short == "optimal" and answer.solver == "iqp"
        assert answer.bound <= answer.objective
    costs = [answer.objective for answer in found.answers]
    assert costs == sorted(costs, reverse=True)


def test_no_time_still_gives_plans_that_get_no_worse():
    problem = drawn(12, coupled=True, seed=3)
    steps = budget_steps("size=2.2bit..6bit", 8)
    hurried, careful = solve_steps(problem, steps, time_limit=1e-6), solve_steps(problem, steps)
    for first, second in zip(hurried.answers, careful.answers, strict=True):
        assert first.bound <= second.objective * (1 + 1e-9) <= first.objective * (1 + 1e-8)
    for found in (hurried, careful):
        for one, other in itertools.pairwise(found.answers):
            assert other.objective <= one.objective and other.bound <= one.bound


def test_plans_go_up_and_bounds_come_down(monkeypatch: pytest.MonkeyPatch):
    """A solver that is poor at every other budget is made up for by its neighbours."""
    calls: list[int] = []

    def moody(problem: Problem, *, time_limit: float, gap_limit: float):
        calls.append(len(calls))
        exact = solve(problem)
        if len(calls) % 2:
            return exact
        # The least of everything, and a bound that says nothing.
        return finish(problem, [0] * 6, bound=-1.0, solver="moody", started=0.0)

    monkeypatch.setattr(SOLVERS, "_records", dict(SOLVERS._records))
    SOLVERS.add(Solver(name="moody", function=moody, summary="every other time"))
    problem, steps = drawn(6, coupled=False), budget_steps("size=3bit..7bit", 5)
    found, exact = solve_steps(problem, steps, "moody").answers, solve_steps(problem, steps).answers
    assert len(calls) == 5
    for index in (1, 3):
        assert found[index].choice == exact[index - 1].choice
        assert found[index].bound == exact[index + 1].bound
        assert found[index].status.short == "feasible" and found[index].gap > 0
    for index in (0, 2, 4):
        assert found[index].choice == exact[index].choice


def test_at_equal_cost_the_plan_that_takes_less_stays():
    layers = [Layer(f"l{i}", 100, 64) for i in range(4)]
    problem = build_problem(layers, np.ones((4, 4)), BITS, "size=8bit")
    found = solve_steps(problem, budget_steps("size=2bit..8bit", 4))
    assert {answer.choice for answer in found.answers} == {(0, 0, 0, 0)}


def test_budgets_that_cannot_be_met_are_left_out():
    problem = drawn(5, coupled=False)
    found = solve_steps(problem, budget_steps("size=1bit..3bit", 5))
    assert [step.amount for step in found.left_out] == [1, Fraction(3, 2)]
    assert [step.amount for step in found.budgets] == [2, Fraction(5, 2), 3]
    assert "size = 1.5 bit cannot be met" in str(found.why)
    with pytest.raises(InfeasibleError, match=r"size = 1\.9 bit cannot be met"):
        solve_steps(problem, budget_steps("size=1bit..1.9bit", 3))
    with pytest.raises(UsageError, match="time_limit"):
        solve_steps(problem, budget_steps("size=2bit..3bit", 3), time_limit=0)


@pytest.mark.parametrize("criteria", [2, 3])
def test_dominated_by_brute_force(criteria: int):
    rng = np.random.default_rng(0)
    for count in (1, 2, 30):
        points = rng.integers(0, 4, (count, criteria)).tolist()
        naive = [
            any(
                all(a <= b for a, b in zip(other, one, strict=True)) and other != one
                for other in points
            )
            for one in points
        ]
        assert dominated(points) == naive
    assert dominated([(1, 1), (1, 1), (2, 1), (0, 5)]) == [False, False, True, False]


# -- the library call ------------------------------------------------------------------


def test_points_are_the_plans_of_allocate(front: Front, scored: ScoreFile):
    assert len(front.points) == 7 and front.points[-1].asked == [8, 9]
    assert front.budget.model_dump(exclude={"low", "high"}) == {
        "name": "size",
        "unit": "bit",
        "first": 1,
        "last": 9,
        "points": 9,
    }
    assert front.notes == [
        "size=1bit is left out (1 of 9 points): the budget size = 1 bit cannot be met: with the "
        "bit-widths allowed the smallest reachable is 2 bit and the largest 8 bit; ask for more, "
        "or allow smaller bit-widths."
    ]
    for index, point in enumerate(front.points):
        budget = [f"size={point.asked[-1]:g}bit", "bops=200M"]
        ours, theirs = front.plan(index), api.allocate(scored, budget, proxy="sqnr")
        assert without_seconds(ours) == without_seconds(theirs)
        assert point.average_bits == ours.average_bits and point.size_bits == ours.size_bits
        assert point.achieved == ours.budgets[0].achieved <= point.asked[0]
    values = [point.predicted for point in front.points]
    assert values == sorted(values, reverse=True)
    assert not any(point.dominated for point in front.points)
    with pytest.raises(UsageError, match="no point 7: the front has 7"):
        front.plan(7)


def test_a_model_is_scored_once_and_its_options_are_those_of_score(scored: ScoreFile):
    settings = {"budget": "size=40%..60%", "points": 3, "pins": ["stem=8"], "correction": "none"}
    found = api.pareto(None, samples=32, **settings)
    again = api.pareto(scored, proxy="logit-coupling", **settings)
    assert untimed(found.to_json()) == untimed(again.to_json())
    assert found.method["proxy"] == "logit-coupling" and found.points[0].solver == "iqp"
    assert found.layers["stem"].pinned and found.points[0].bits["stem"] == 8
    assert found.budget.low is not None and found.budget.unit == "%"
    assert found.plan(1).budgets[0].budget().kind == "size"


def test_activations_and_other_budgets():
    found = api.pareto(
        budget=["size=4bit", "bops=12M..40M"],
        points=4,
        proxy="activation-mse",
        activation_bits=[4, 8],
        samples=16,
        solver="greedy",
    )
    assert found.budget.name == "bops" and found.points[0].solver == "greedy"
    assert {bits for one in found.points for bits in one.activation_bits.values()} == {4, 8}
    assert all(one.budgets[0].achieved <= 4 for one in found.points)
    memory = api.pareto(
        budget="activation-memory=3KiB..5KiB", points=3, proxy="sqnr", activation_bits="weights"
    )
    assert [one.asked for one in memory.points]
    assert all(one.achieved <= one.asked[0] for one in memory.points)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": "size=3bit"}, "one budget must be a range.*got 'size=3bit'"),
        ({"budget": []}, "one budget must be a range.*got none"),
        ({"budget": ["size=2bit..3bit", "bops=1G..2G"]}, "only one budget can be a range"),
        ({"budget": "size=3bit..2bit"}, "grow from left to right"),
        ({"budget": "size=2bit..3KiB"}, "the same unit"),
        ({"budget": "size=2bit..3bit..4bit"}, "must look like"),
        ({"budget": "size=2bit..3bit", "points": 1}, "`points` must be at least 2"),
        ({"budget": 3}, "`budget` must be text"),
        ({"budget": "size=2bit..3bit", "proxy": "auto"}, "'auto' has a choice"),
        ({"budget": "size=2bit..3bit", "proxy": "sqnrr"}, "did you mean 'sqnr'"),
        ({"budget": "size=2bit..3bit", "solver": "ipl"}, "did you mean"),
        ({"budget": "size=2bit..3bit", "solver": "dp"}, "'logit-coupling' couples layers"),
        ({"budget": "latency=2ms..3ms", "proxy": "sqnr"}, "needs a latency table"),
        ({"budget": "size=2bit..3bit", "time_limit": 0, "proxy": "sqnr"}, "time_limit"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_measured(
    settings: dict, words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.modules["proxyq.api.pareto"], "score", None)
    with pytest.raises(UsageError, match=words) as caught:
        api.pareto(**settings)
    assert str(caught.value).count("\n") == 0


def test_a_model_without_images_and_a_budget_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["proxyq.api.pareto"], "score", None)
    with pytest.raises(InfeasibleError, match=r"size = 1\.8 bit cannot be met"):
        api.pareto(budget="size=1bit..1.8bit", proxy="sqnr")
    net, budget = small_net(), "size=2bit..4bit"
    with pytest.raises(UsageError, match="eval_data"):
        api.pareto(net, budget=budget, proxy="sqnr", evaluate=True)
    x = np.zeros((4, *net.input_shape), np.float32)
    with pytest.raises(UsageError, match="calibration images are needed by correction='auto'"):
        labels = np.zeros(4, np.int64)
        api.pareto(net, budget=budget, proxy="sqnr", eval_data=(x, labels))


def test_scores_take_no_word_on_measuring(scored: ScoreFile):
    for name, value in {"bits": (2, 4), "samples": 4, "evaluate": True, "data": "digits"}.items():
        with pytest.raises(UsageError, match=f"`{name}` .*needs the model"):
            api.pareto(scored, budget="size=2bit..3bit", proxy="sqnr", **{name: value})
    with pytest.raises(UsageError, match="name one of params, sqnr"):
        api.pareto(scored, budget="size=2bit..3bit")


# -- the file --------------------------------------------------------------------------


def test_read_and_written_again_it_is_the_same(front: Front, tmp_path: Path):
    file = front.save(tmp_path / "front.json")
    again = Front.load(file)
    assert again == front and again.to_json() == file.read_text(encoding="utf-8")
    data = json.loads(file.read_text(encoding="utf-8"))
    assert list(data) == [
        *("schema", "model", "method", "budget", "notes", "points", "layers", "predicted"),
        "provenance",
    ]
    assert list(data["layers"]) == list(front.layers)
    assert proxyq.Front is Front and "7 plans, size 1 to 9 bit" in repr(front)
    assert len(str(front).splitlines()) == 8


def test_the_same_run_writes_the_same_bytes(front: Front, scored: ScoreFile):
    again = api.pareto(scored, budget=["size=1bit..9bit", "bops=200M"], points=9, proxy="sqnr")
    assert untimed(again.to_json()) == untimed(front.to_json())
    assert len(untimed(front.to_json())) == len(front.to_json().splitlines()) - 7


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schema": "proxyq/front/2"}, "'proxyq/front/2', which this version does not read"),
        ({"schema": "proxyq/plan/1"}, "holds no front"),
        ({"points": []}, "'points'"),
        ({"points": [{}]}, "'points.0.asked': it is missing"),
        ({"layers": {"stem": {"weights": 1, "macs": 1}}}, "name the layer"),
        ({"budget": {"name": "size"}}, "'budget.first': it is missing"),
        ({"extra": 1}, "no such field is known"),
        ({"model": {"x": float("nan")}}, "NaN"),
    ],
)
def test_wrong_files_are_told_in_a_sentence(front: Front, change: dict, text: str):
    with pytest.raises(ProxyqError) as caught:
        Front.from_json({**json.loads(front.to_json()), **change})
    assert text in str(caught.value) and caught.value.exit_code == 1
    assert str(caught.value).count("\n") == 0


def test_files_that_are_missing_or_cut_short(front: Front, tmp_path: Path):
    with pytest.raises(ProxyqError, match=r"cannot read the front '.*gone.json'"):
        Front.load(tmp_path / "gone.json")
    (tmp_path / "cut.json").write_text(front.to_json()[:300])
    with pytest.raises(ProxyqError, match="cut short"):
        Front.load(tmp_path / "cut.json")


# -- tables and pictures ---------------------------------------------------------------


def measured(front: Front) -> Front:
    """Made up: the third point is the most accurate, the fourth as accurate as the first."""
    top1 = [90.0, 92.0, 93.0, 90.0, 93.0, 94.0, 94.0]
    kl = [0.5, 0.4, 0.3, 0.3, 0.2, 0.1, 0.05]
    points = [{"top1": a, "kl": b, "correction": "none"} for a, b in zip(top1, kl, strict=True)]
    return front.with_measured({"top1": 95.0, "n": 1000}, points)


def test_measured_points_are_marked_too(front: Front):
    found = measured(front)
    marks = [(m.top1_dominated, m.kl_dominated) for p in found.points if (m := p.measured)]
    assert [top1 for top1, _ in marks] == [False, False, False, True, True, False, True]
    assert [kl for _, kl in marks] == [False, False, False, True, False, False, False]
    assert Front.from_json(json.loads(found.to_json())).to_json() == found.to_json()


def shown(block: object) -> list[str]:
    console = Console(width=88, highlight=False)
    with console.capture() as captured:
        console.print(block, markup=False)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_tables(front: Front):
    lines = shown(front_table(front))
    assert lines[0].split("  ")[0] == "point" and "asked, bit" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == list("1234567")
    assert "8 to 9" in lines[-1]
    lines = shown(front_table(measured(front)))
    assert lines[5].split()[-2:] == ["90.00*", "0.3*"]
    assert lines[-2:] == [
        "* dominated: another point takes no more and is no worse",
        "float: 95.00 % on 1,000 images",
    ]
    text = front_summary(front)
    assert text.startswith("digits · sqnr · 12 layers · 9 budgets · 7 plans\nall optimal, proven")
    assert "size: 1 to 9 bit\n" in text and "bops: at most 200 M\n" in text
    assert "note: size=1bit is left out" in text


def test_pictures(front: Front):
    ax = plot_front(front)
    assert len(ax.figure.axes) == 1 and ax.get_xlabel() == "size, bit"
    ax = plot_front(measured(front))
    costs, accuracy = ax.figure.axes
    assert costs.get_title(loc="left") == "predicted cost" and costs.get_yscale() == "log"
    assert accuracy.get_title(loc="left") == "top-1, %; dashed: float, 95.00"
    assert len(accuracy.lines[1].get_xdata()) == 4  # joined: those that are not dominated
    assert draw_front(front, "a.svg") == draw_front(front, "a.svg")


def test_pictures_of_open_proofs_and_of_costs_below_zero(front: Front):
    changed = [
        one.model_copy(update={"predicted": -1.0 - i, "bound": -8.0, "status": "feasible"})
        for i, one in enumerate(front.points)
    ]
    ax = plot_front(front.model_copy(update={"points": changed}))
    assert ax.get_yscale() == "linear" and len(ax.lines) == 1 + len(changed)


# -- the command line ------------------------------------------------------------------


def test_pareto_in_the_terminal(tmp_path: Path):
    done = here(
        *("pareto", "--proxy", "sqnr", "--budget", "size=2.5bit..6bit", "--points", "4"),
        *("--samples", "32", "--evaluate", "--correction", "weights", "--pin", "stem=8"),
        *("--out", tmp_path / "front.json", "--plot", tmp_path / "front.png"),
        *("--plans", tmp_path / "plans"),
    )
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 88 and "KL, nats" in lines[0]
    assert done.err.splitlines() == [
        f"proxyq: wrote {tmp_path / name}" for name in ("front.json", "front.png", "plans")
    ]
    front = Front.load(tmp_path / "front.json")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert [one.asked for one in front.points] == [
        [2.5],
        [pytest.approx(11 / 3)],
        [pytest.approx(29 / 6)],
        [6],
    ]
    plans = sorted((tmp_path / "plans").iterdir())
    assert [file.name for file in plans] == [f"plan-0{i}.json" for i in range(1, 5)]
    assert Plan.load(plans[1]) == front.plan(1)
    evaluated = json.loads(here("evaluate", *plans[1:3], "--samples", "32", "--json").out)
    for point, one in zip(front.points[1:3], evaluated["plans"], strict=True):
        assert point.measured is not None and point.measured.correction == "weights"
        assert (point.measured.top1, point.measured.kl) == (one["top1"], one["kl"])
    assert front.measured == {"float": evaluated["float"]}


def test_json_is_the_file_and_scores_need_no_model(scored: ScoreFile, tmp_path: Path):
    file = scored.save(tmp_path / "scores.json")
    words = ("pareto", file, "--proxy", "sqnr", "--budget", "size=2.5bit..6bit", "--points", "3")
    done = here(*words, "--json", "--quiet", "--out", tmp_path / "front.json")
    assert (done.code, done.err) == (0, "")
    assert done.out == (tmp_path / "front.json").read_text(encoding="utf-8")
    again = here(*words, "--json")
    assert untimed(again.out) == untimed(done.out)


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("", 2, "give a range of budgets"),
        ("--budget size=3bit", 2, "one budget must be a range"),
        ("--budget size=2bit..3bit --budget bops=1G..2G", 2, "only one budget can be a range"),
        ("--budget size=2bit..3bit --points 1", 2, "`points` must be at least 2"),
        ("--budget size=2bit..3bit --solver ipl", 2, "did you mean"),
        ("--budget size=1bit..1.5bit", 1, "smallest reachable is 2 bit"),
        ("--budget size=2bit..3bit --out {o}/sub/front.json", 1, "does not exist"),
        ("--budget size=2bit..3bit --plans {o}/sub/plans", 1, "does not exist"),
        ("--budget size=2bit..3bit --plans {o}/file", 1, "is no folder"),
        ("--budget size=2bit..3bit --plot {o}/front.bmp", 2, ".png, .svg or .pdf"),
        ("{o}/gone.json --budget size=2bit..3bit", 1, "gone.json"),
        ("{o}/gone.json --budget size=2bit..3bit --weights x.pt", 2, "--weights is for a model"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(line: str, code: int, text: str, tmp_path: Path):
    (tmp_path / "file").write_text("kept")
    done = here("pareto", *line.format(o=tmp_path).split())
    assert (done.code, done.out) == (code, ""), done
    assert text in done.err and done.err.count("\n") == 1, done.err
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_the_benchmark_runs():
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "pareto.py"
    run = subprocess.run(
        [sys.executable, script, "--quick"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert [line.split()[2] for line in run.stdout.splitlines()[1:]] == ["separable", "coupled"]
