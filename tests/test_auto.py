"""`auto`: the judge measures what runs, the portfolio's best is kept, refinement never harms."""

import json
import time
from importlib import import_module

import jax.numpy as jnp
import numpy as np
import pytest
from networks import mixer, small_net

import proxyq
from proxyq.api.problem import problem_from
from proxyq.auto import Judge, choose, halves, improve, refine
from proxyq.auto.choose import WRECKED_ROUNDS, spelled
from proxyq.auto.judge import Verdict
from proxyq.auto.portfolio import MEMBERS, curvature_scores, portfolio
from proxyq.auto.refine import anchored, proposals
from proxyq.engine.divergence import kl_divergence, rescaled_divergence
from proxyq.engine.loss import BROKEN, WRECKED, Loss
from proxyq.engine.ranges import activation_grids
from proxyq.engine.statistics import correct_statistics, correct_weights, float_moments
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.function_import import from_function
from proxyq.proxies import PROXIES, Cache, as_cost, kl_delta, rescaled_coupling
from proxyq.proxies.cost import weight_errors
from proxyq.ptq.quantized import round_weights, with_grids
from proxyq.search.allocate import solve
from proxyq.search.allocate.assignment import used

BITS = (2, 3, 6)


def images(model, count=32, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *model.input_shape)).astype(np.float32)


def loss(record):
    """The loss that a report tells."""
    return Loss(record["rescaled"], record["kl"])


def judge_of(model, correction="none", fit=24, check=16, attention_bits=None):
    x = images(model, fit + check)
    return Judge(model, x[:fit], x[fit:], correction=correction, attention_bits=attention_bits)


def problem_of(budget="size=3bit", **binding):
    return lambda scores: problem_from(scores.layers, scores, budget, **binding)


@pytest.mark.parametrize("correction", ["none", "weights", "statistics"])
def test_the_judge_measures_the_network_that_runs(correction):
    model = small_net()
    judge = judge_of(model, correction)
    engine = judge.engine
    plan = [(b, 4 if i % 2 else None) for i, b in enumerate([2, 3, 6] * 9)][: len(judge.names)]
    edits = round_weights(engine, {n: b for n, (b, _) in zip(judge.names, plan, strict=True)})
    beside = {n: a for n, (_, a) in zip(judge.names, plan, strict=True) if a}
    edits = with_grids(engine.network, edits, activation_grids(engine, beside, {}, judge.fit))
    if correction == "weights":
        edits = correct_weights(engine, edits)
    elif correction == "statistics":
        edits = correct_statistics(engine, edits, judge.fit, float_moments(engine, judge.fit)[0])
    verdict = judge.measure(plan)
    for loss, x in ((verdict.fitted, judge.fit), (verdict.held_back, judge.check)):
        exact, logits = engine.logits(x), engine.logits(x, edits)
        assert loss.kl == pytest.approx(kl_divergence(exact, logits).mean(), rel=1e-6)
        assert loss.rescaled == pytest.approx(rescaled_divergence(exact, logits).mean(), rel=1e-6)
        assert 0 <= loss.rescaled <= loss.kl
    spent = judge.passes
    assert judge.measure(plan) is verdict and judge.passes == spent


def test_images_are_held_back():
    for number, most in ((100, 40), (48, 40), (40, 40), (9, 40)):
        fit, check = halves(number, most)
        assert sorted([*fit, *check]) == list(range(number))
        if number - most >= max(8, most // 4):
            assert list(fit) == list(range(most))
        else:
            assert len(check) == number // 4


@pytest.mark.parametrize("correction", ["none", "auto"])
def test_the_best_of_all_plans_is_kept(correction):
    judge = judge_of(small_net())
    fixed = [None] * len(judge.names)
    outcome = choose(judge, problem_of(), BITS, fixed=fixed, correction=correction)
    report = outcome.report
    assert len(report["candidates"]) == 9 and json.dumps(report)
    wanted = {"none"} if correction == "none" else {"none", "weights", "statistics"}
    assert set(report["corrections"]) == wanted
    found = {name: loss(one) for name, one in report["corrections"].items()}
    assert outcome.correction == min(found, key=found.__getitem__) == report["correction"]
    assert judge.correction == outcome.correction
    verdict = judge.measure(spelled(outcome.answer.problem, fixed)(outcome.answer.choice))
    assert verdict.held_back.kl == report["kl"]
    assert loss(report) == min(loss(one) for one in report["candidates"])
    assert report["candidates"][0]["proxy"] == report["chosen"]
    (limit,) = outcome.answer.problem.limits
    assert used(limit, outcome.answer.choice) <= limit.budget
    again = choose(judge_of(small_net()), problem_of(), BITS, fixed=fixed, correction=correction)
    assert again.answer.choice == outcome.answer.choice and again.report == report


def test_effort_and_time_decide_how_far_it_goes():
    judge = judge_of(small_net())
    fixed = [None] * len(judge.names)
    low = choose(judge, problem_of(), BITS, fixed=fixed, correction="none", effort="low")
    proposed = sorted(one["proxy"] for one in low.report["candidates"])
    assert proposed == ["output-error", "restored-error", "sqnr"]
    high = choose(judge, problem_of(), BITS, fixed=fixed, correction="none", effort="high")
    assert high.report["refined"]["rounds"] >= 1
    assert loss(high.report) <= loss(high.report["refined"]["before"])
    late = choose(
        judge, problem_of(), BITS, fixed=fixed, correction="none", effort="high", time_budget=1e-9
    )
    assert len(late.report["candidates"]) == 3 and "refined" not in late.report
    assert [("sweep" in note, "refinement" in note) for note in late.report["notes"]] == [
        (True, False),
        (False, True),
    ]


def test_a_pass_is_timed_also_where_the_free_plans_are_one(monkeypatch):
    judge = judge_of(small_net())
    plain = Judge._loss

    def slow(*arguments):
        time.sleep(0.3)
        return plain(*arguments)

    monkeypatch.setattr(Judge, "_loss", slow)
    fixed = [None] * len(judge.names)
    problem = problem_of("size=2bit")  # which leaves one plan
    found = choose(judge, problem, BITS, fixed=fixed, correction="none", time_budget=1.5)
    (note, *_) = found.report["notes"]
    assert int(note.split("about ")[1].split(" s")[0]) >= 0.3 * len(judge.names) * len(BITS)


def test_curvature_is_that_of_the_proxy_and_may_be_left_out(monkeypatch):
    model = small_net()
    judge = judge_of(model)
    (found,) = curvature_scores(judge, BITS)
    assert curvature_scores(judge, BITS)[0] is found
    trace = PROXIES.get("hessian-trace")(model, judge.fit, bits=BITS)
    errors = weight_errors(model, BITS)
    np.testing.assert_allclose(found.values, as_cost(trace, errors=errors), rtol=1e-5)

    def fails(*args, **more):
        raise ProxyqError("too little memory")

    monkeypatch.setattr("proxyq.auto.portfolio.score", fails)
    fixed = [None] * len(judge.names)
    report = choose(judge_of(model), problem_of(), BITS, fixed=fixed, correction="none").report
    assert len(report["candidates"]) == 8
    assert report["notes"] == [
        "hessian-trace could not be measured and was left out: too little memory"
    ]


def test_the_sweep_is_that_of_the_proxy():
    model = small_net()
    judge = judge_of(model, "statistics")
    found = {one.proxy: one for one in portfolio(judge, BITS)}
    plain = kl_delta(model, judge.fit, bits=BITS, correction="statistics")
    warm = kl_delta(model, judge.fit, bits=BITS, correction="statistics", temperature=2.0)
    np.testing.assert_allclose(found["kl"].values, plain.values, rtol=1e-6)
    np.testing.assert_allclose(found["kl-temperature-2"].values, warm.values, rtol=1e-6)
    direct = rescaled_coupling(model, judge.fit, bits=BITS, correction="statistics")
    np.testing.assert_allclose(found["rescaled-coupling"].coupling, direct.coupling, rtol=1e-6)
    for own in (found["logit-coupling"], found["logit-coupling-temperature-2"]):
        np.testing.assert_allclose(np.diag(own.coupling), own.values.ravel())


@pytest.mark.parametrize(
    ("build", "wrecked", "attention_bits"),
    [(small_net, 0.25, None), (small_net, 0.0, None), (mixer, 0.25, None), (mixer, 0.25, 3)],
)
def test_anchored_changes_are_those_of_the_plan(build, wrecked, attention_bits, monkeypatch):
    """Every entry is what one full run says, by the divergence that orders such plans."""
    monkeypatch.setattr("proxyq.engine.loss.WRECKED", wrecked)
    model = build()
    judge = judge_of(model, attention_bits=attention_bits)
    scores = portfolio(judge, BITS)[0]
    answer = solve(problem_from(scores.layers, scores, "size=3bit"))
    spell = spelled(answer.problem, [None] * len(judge.names))
    rise = anchored(judge, answer.problem, answer.choice, spell, BITS)
    assert (rise[np.arange(len(rise)), list(answer.choice)] == 0).all()
    now = judge.measure(spell(answer.choice)).fitted
    name = "rescaled" if now.wrecked else "kl"
    assert now.wrecked == (wrecked == 0.0)
    for layer in range(len(rise)):
        for column in range(len(BITS)):
            if column == answer.choice[layer]:
                continue
            changed = list(answer.choice)
            changed[layer] = column
            exact = getattr(judge.measure(spell(changed)).fitted, name) - getattr(now, name)
            assert rise[layer, column] == pytest.approx(exact, rel=1e-3, abs=1e-6)
    for candidate in proposals(answer.problem, answer.choice, rise):
        assert candidate != answer.choice
        assert all(used(limit, candidate) <= limit.budget for limit in answer.problem.limits)


def test_refinement_keeps_budgets_pins_and_ties_and_never_harms():
    model = small_net()
    judge = judge_of(model)
    scores = portfolio(judge, BITS)[0]
    first, second = judge.names[1], judge.names[2]
    binding = {"pins": [f"{judge.names[0]}=6"], "shared": [(first, second)]}
    problem = problem_from(scores.layers, scores, ["size=3.2bit", "bops=70%"], **binding)
    answer = solve(problem, "greedy")
    spell = spelled(problem, [None] * len(judge.names))
    before = judge.measure(spell(answer.choice))
    found = refine(judge, problem, [answer.choice], spell, BITS, rounds=3)
    assert found.verdict == judge.measure(spell(found.choice))
    assert found.verdict.held_back <= before.held_back and found.verdict.fitted <= before.fitted
    assert problem.bits[found.choice[0]] == 6 and found.choice[1] == found.choice[2]
    assert all(used(limit, found.choice) <= limit.budget for limit in problem.limits)
    better = improve(judge, answer, BITS, fixed=[None] * len(judge.names), seconds=30.0)
    assert loss(better.report) <= loss(better.report["before"])
    if better.report["changes"]:
        assert better.answer.solver == "greedy+refine"
        assert better.answer.bound <= better.answer.objective


class Told(Judge):
    """A judge that is told what plans are worth."""

    def __init__(self, worth):
        model = small_net()
        x = images(model, 24)
        super().__init__(model, x[:16], x[16:])
        self.worth = worth

    def fitted(self, plan):
        return self.measure(plan).fitted

    def measure(self, plan):
        fitted, held_back = self.worth(plan)
        return Verdict(Loss(fitted, fitted), Loss(held_back, held_back))


@pytest.mark.parametrize("overfits", [False, True])
def test_refinement_finds_what_is_better_and_not_what_only_seems_so(overfits):
    """The fitted loss falls with every bit of the head; held back, it may not."""

    def worth(plan):
        loss = 9.0 - plan[-1][0]
        return loss, -loss if overfits else loss

    judge = Told(worth)
    scores = portfolio(judge, BITS)[0]
    problem = problem_from(scores.layers, scores, "size=6bit")
    start = tuple(0 for _ in judge.names)
    spell = spelled(problem, [None] * len(judge.names))
    found = refine(judge, problem, [start], spell, BITS, rounds=3)
    assert found.tried > 0
    if overfits:
        assert found.choice == start
    else:
        assert problem.bits[found.choice[-1]] == max(BITS)
    # A deadline that has passed stops new rounds; one that passes in a round, after a few tries.
    assert refine(judge, problem, [start], spell, BITS, deadline=0.0).rounds == 0


def test_a_round_that_finds_nothing_is_not_the_end(monkeypatch):
    """Nothing near the best start is better; from the second, a path of two rounds leads further.
    More rounds are never worse."""
    monkeypatch.setattr(import_module("proxyq.auto.refine"), "CHANGES", (2,))

    def worth(plan):
        bits = [width for width, _ in plan]
        if bits[0] == 6:
            return (3.0, 3.0) if set(bits[1:]) == {2} else (4.0, 4.0)
        loss = 3.5 - 0.2 * sum(width > 2 for width in bits[1:])
        return loss, loss

    judge = Told(worth)
    scores = portfolio(judge, BITS)[0]
    problem = problem_from(scores.layers, scores, "size=6bit")
    spell = spelled(problem, [None] * len(judge.names))
    least = (0,) * (len(judge.names) - 1)
    starts = [(2, *least), (0, *least)]
    found = [refine(judge, problem, starts, spell, BITS, rounds=r) for r in range(1, 6)]
    losses = [one.verdict.held_back for one in found]
    assert losses == sorted(losses, reverse=True)
    assert [one.reached[0].origin for one in found[:2]] == [0, 0] and found[0].choice == starts[0]
    assert found[2].reached[0].origin == 1 and found[2].verdict == judge.measure(
        spell(found[2].choice)
    )
    assert losses[2].rescaled < 3.0


def test_the_last_few_plans_are_verified_on_images_that_none_was_found_on():
    """Three parts of images: to fit, to look at, and in reserve; what is verified is the mean."""
    model = small_net()
    x = images(model, 60)
    judge, whole = Judge(model, x[:8], x[8:]), Judge(model, x[:25], x[8:])
    assert len(judge.reserve) == 20 and whole.reserve is None
    plan = [(3, None)] * len(judge.names)
    assert judge.verify(plan) == pytest.approx(whole.measure(plan).held_back, rel=1e-5)
    assert whole.verify(plan) == whole.measure(plan).held_back
    fixed = [None] * len(judge.names)
    for effort in ("medium", "high"):
        found = choose(judge, problem_of(), BITS, fixed=fixed, correction="none", effort=effort)
        verified = found.report["verified"]
        assert 1 < verified["plans"] <= 4
        chosen = judge.verify(spelled(found.answer.problem, fixed)(found.answer.choice))
        assert loss(verified) == chosen


def test_the_sweep_is_kept_and_a_killed_one_goes_on(tmp_path):
    model = small_net()

    class Killed(Exception):
        pass

    def run(folder, stop=None):
        seen = []

        def progress(stage, done, total):
            seen.append((stage, done))
            if len(seen) == stop:
                raise Killed

        cache = None if folder is None else Cache(folder, every=0)
        return portfolio(judge_of(model), BITS, cache=cache, progress=progress), seen

    def whole(scores):
        return [
            (one.proxy, one.values.tobytes(), one.coupling is None or one.coupling.tobytes())
            for one in scores
        ]

    direct, steps = run(None)
    assert [one.proxy for one in direct] == list(MEMBERS)
    kept, _ = run(tmp_path / "kept")
    again, left = run(tmp_path / "kept")
    assert not left and whole(direct) == whole(kept) == whole(again)
    with pytest.raises(Killed):
        run(tmp_path / "killed", len(steps) - 1)
    assert list((tmp_path / "killed").glob("unfinished/*/sweep.safetensors"))
    resumed, _ = run(tmp_path / "killed")
    assert whole(resumed) == whole(direct)
    assert not list((tmp_path / "killed").glob("unfinished/*/*"))


def test_wrecked_networks_are_ranked_by_their_answers_and_refined():
    """At one bit a plan gets a round of refinement at effort `medium`; broken ones come last."""
    assert Loss(0.4, 9.0) < Loss(0.5, 1.0) < BROKEN
    assert Loss(0.9 * WRECKED, 0.4) < Loss(0.5 * WRECKED, 0.5) < Loss(1.1 * WRECKED, 0.3)
    assert max(Loss(0.01, 0.2), Loss(0.02, 0.1)) == Loss(0.01, 0.2)
    rng = np.random.default_rng(0)
    params = {f"w{i}": rng.normal(size=(12, 12)).astype(np.float32) ** 3 for i in range(3)}
    model = from_function(
        lambda p, x: x @ p["w0"] @ p["w1"] @ p["w2"], params, (12,), name="linear"
    )
    judge = judge_of(model, check=48)
    fixed = [None] * len(judge.names)
    report = choose(judge, problem_of("size=1bit"), (1, 2), fixed=fixed, correction="none").report
    losses = [one["rescaled"] for one in report["candidates"]]
    assert losses == sorted(losses) and losses[0] > WRECKED
    assert 1 <= report["refined"]["rounds"] <= WRECKED_ROUNDS["medium"]
    assert report["refined"]["from"] == report["chosen"]
    assert report["rescaled"] <= losses[0]
    calm = choose(judge, problem_of("size=8bit"), (7, 8), fixed=fixed, correction="none").report
    assert calm["rescaled"] < WRECKED and "refined" not in calm


def test_activations_are_chosen_and_measured_too():
    model = small_net()
    plan = proxyq.search(
        model,
        images(model, 40),
        budget=["size=4bit", "bops=60%"],
        bits=BITS,
        activation_bits=[4, 8],
        samples=24,
        effort="high",
    )
    assert {layer.activation_bits for layer in plan.layers.values()} <= {4, 8}
    assert plan.method["proxy"] == "auto" and plan.method["correction"] != "auto"
    assert all(budget.achieved <= budget.asked for budget in plan.budgets)
    assert plan.predicted["auto"]["fitted_images"] == 24


def test_search_is_auto_by_default_and_the_same_twice():
    plans = [proxyq.search(budget="size=3bit", bits=(2, 3, 4), samples=64) for _ in range(2)]
    for plan in plans:
        assert plan.method["proxy"] == "auto" and plan.average_bits <= 3
    record = [plan.model_dump(exclude={"solver": {"seconds"}}) for plan in plans]
    assert record[0] == record[1]
    report = plans[0].predicted["auto"]
    assert report["kl"] == min(one["kl"] for one in report["candidates"])
    proxyq.Plan.from_json(json.loads(plans[0].to_json()))


@pytest.mark.slow
def test_it_works_on_hundreds_of_layers():
    rng = np.random.default_rng(0)
    near = np.eye(16) + 0.05 * rng.normal(size=(200, 16, 16))
    params = {f"layer{i:03d}": w.astype(np.float32) for i, w in enumerate(near)}

    def apply(p, x):
        for i in range(200):
            x = x + 0.1 * jnp.maximum(x @ p[f"layer{i:03d}"], 0)
            x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return x[:, :10]

    model = from_function(apply, params, (16,), name="deep")
    plan = proxyq.search(model, images(model, 96), budget="size=3bit", samples=64, effort="high")
    report = plan.predicted["auto"]
    assert plan.average_bits <= 3 and report["kl"] <= min(one["kl"] for one in report["candidates"])


def test_any_plan_can_be_refined():
    plan = proxyq.search(
        proxy="weight-mse", budget="size=2.5bit", bits=(2, 3, 4), samples=64, refine=5.0
    )
    report = plan.predicted["refined"]
    assert loss(report) <= loss(report["before"]) and plan.average_bits <= 2.5
    assert plan.method["proxy"] == "weight-mse"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"effort": "most"}, "`effort` must be one of low, medium, high, got 'most'"),
        ({"refine": -1.0}, "`refine` must be seconds"),
        ({"time_budget": 0.0}, "`time_budget` must be positive"),
        ({"proxy": "sqnr", "effort": "high"}, "`effort` is for 'auto' and for refinement"),
        ({"options": {"beta": 1.0}}, "'auto' tries several"),
        ({"cost": "times-dw2"}, "'auto' tries several"),
        ({"data": np.zeros((7, 8, 8, 1), np.uint8)}, "at least 8 calibration images, got 7"),
    ],
)
def test_what_is_wrong_is_said(arguments, words):
    with pytest.raises(UsageError, match=words):
        proxyq.search(budget="size=3bit", **arguments)
