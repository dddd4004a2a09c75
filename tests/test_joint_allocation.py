"""Weight and activation bits chosen together, erased candidates, shares and latency as budgets."""

import itertools
import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyq.errors import ProxyqError, UsageError
from proxyq.search.allocate import (
    InfeasibleError,
    Limit,
    Problem,
    Status,
    build_problem,
    parse_budget,
    reachable,
    solve,
    verify,
    without_outliers,
)
from proxyq.search.allocate.latency import LatencyTable, load_latency


@dataclass(frozen=True)
class Layer:
    name: str
    weights: int
    macs: int
    group: str | None = None


LAYERS = (
    Layer("stem", 864, 884_736),
    Layer("b.conv1", 9216, 9_437_184),
    Layer("b.conv2", 9216, 9_437_184),
    Layer("b.down", 512, 500_000),
    Layer("fc", 640, 640),
)
COST = np.outer([3, 1, 2, 1, 2], [1.0, 0.5, 0.1])
BESIDE = np.outer([1, 4, 1, 2, 1], [0.8, 0.2])


def build(bits=(2, 4, 8), cost=COST, budgets=(), **options) -> Problem:
    return build_problem(LAYERS, cost, bits, budgets, **options)


def joint(**options) -> Problem:
    return build(**{"activation_bits": [4, 8], "activation_cost": BESIDE, **options})


# -- problems and solvers --------------------------------------------------------------


def random_joint(seed: int) -> Problem:
    """A small problem over pairs; a few columns have float activations."""
    rng = np.random.default_rng(seed)
    layers, columns = int(rng.integers(1, 6)), int(rng.integers(1, 7))
    every = list(itertools.product((2, 3, 4, 8), (2, 4, 8, None)))
    pairs = [every[k] for k in rng.choice(len(every), columns, replace=False)]
    shape = (layers, columns)
    cost = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 7)
    allowed = rng.random(shape) < 0.8
    allowed[:, rng.integers(columns)] = True
    limits = []
    for m in range(int(rng.integers(0, 3))):
        sizes = rng.integers(1, 10 ** int(rng.integers(1, 10)), (layers, 1))
        both = np.array([b * (a or 32) if m else b for b, a in pairs])
        usage = sizes * both
        low = int(np.where(allowed, usage, usage.max()).min(axis=1).sum())
        high = int(np.where(allowed, usage, 0).max(axis=1).sum())
        budget = int(low + (high - low) * rng.uniform(-0.05, 1.1))
        limits.append(Limit(name=f"limit{m}", usage=usage, budget=budget))
    return Problem(
        layers=tuple(f"layer{i}" for i in range(layers)),
        bits=tuple(b for b, _ in pairs),
        activation_bits=tuple(a for _, a in pairs),
        cost=cost,
        allowed=allowed,
        limits=tuple(limits),
        groups=((0, layers - 1),) if layers > 2 and rng.random() < 0.5 else (),
    )


@pytest.mark.parametrize("block", range(4))
def test_random_joint_problems(block: int) -> None:
    """All solvers against the enumeration of all assignments."""
    for seed in range(150 * block, 150 * (block + 1)):
        problem = random_joint(seed)
        assert problem.activation_bits is not None
        try:
            best = solve(problem, "exhaustive")
        except InfeasibleError:
            for method in ("ilp", "greedy"):
                with pytest.raises(InfeasibleError, match="cannot"):
                    solve(problem, method)
            continue
        methods = ["ilp", "greedy"] + (["dp"] if len(problem.limits) <= 1 else [])
        slack = 1e-9 * max(1.0, abs(best.objective))
        for method in methods:
            answer = solve(problem, method)
            verify(problem, answer.choice)
            assert answer.bound <= best.objective + slack
            assert answer.objective >= best.objective - slack
            pairs = zip(answer.bits, answer.activation_bits or (), strict=True)
            columns = list(zip(problem.bits, problem.activation_bits, strict=True))
            assert [columns.index(pair) for pair in pairs] == list(answer.choice)
            if method != "greedy":
                assert answer.objective <= best.objective + slack
                assert answer.status is Status.OPTIMAL


# -- from wishes to problems: everything against definitions ------------------------------


def naive(wishes: dict[str, Any]) -> tuple[float, list] | None:
    """The best assignment by trying all, from the definitions; None when there is none."""
    layers, bits, beside = wishes["layers"], wishes["bits"], wishes["activation_bits"]
    as_weights = beside == "weights"
    options: list[dict[tuple, float]] = []
    for i, layer in enumerate(layers):
        pin = next((p for n, p in reversed(wishes["pins"]) if n == layer.name), None)
        for tied in wishes["ties"]:
            if pin is None and layer.name in tied:
                pin = next((p for n, p in reversed(wishes["pins"]) if n in tied), None)
        found = {}
        widths = [b for k, b in enumerate(bits) if wishes["allowed"][i, k]]
        if pin is not None:
            widths = [pin[0]]
        for b in widths:
            if pin is not None and len(pin) > 1:
                those = [pin[1]]
            elif as_weights:
                those = [b]
            else:
                those = [a for k, a in enumerate(beside) if wishes["activation_allowed"][i, k]]
            for a in those:
                cost = wishes["cost"][i][bits.index(b)] if b in bits else 0.0
                if not as_weights and a in beside:
                    cost += wishes["activation_cost"][i][beside.index(a)]
                found[b, a] = cost
        options.append(found)
    for tied in wishes["ties"]:
        members = [i for i, layer in enumerate(layers) if layer.name in tied]
        common = set.intersection(*(set(options[i]) for i in members))
        for i in members:
            options[i] = {pair: cost for pair, cost in options[i].items() if pair in common}

    def amount(kind: str, i: int, pair: tuple) -> int:
        b, a = pair
        if kind == "latency":
            return wishes["times"][i, b, a]
        return {"size": layers[i].weights, "macs-bits": layers[i].macs}.get(
            kind, layers[i].macs * a
        ) * b

    def fits(choice: tuple) -> bool:
        for text in wishes["budgets"]:
            kind, asked = text.split("=")
            parts = [amount(kind, i, pair) for i, pair in enumerate(choice)]
            if asked.endswith("bit"):
                searched = [i for i, p in enumerate(wishes["searched"]) if p]
                total = sum(layers[i].weights for i in searched)
                if sum(parts[i] for i in searched) > Fraction(asked[:-3]) * total:
                    return False
            elif asked.endswith("%"):
                ends = [[amount(kind, i, pair) for pair in options[i]] for i in range(len(layers))]
                low, high = sum(map(min, ends)), sum(map(max, ends))
                if sum(parts) - low > (high - low) * Fraction(asked[:-1]) / 100:
                    return False
            elif sum(parts) > Fraction(asked.removesuffix("us")) * (
                10**6 if kind == "latency" else 1
            ):
                return False
        return True

    best = None
    for choice in itertools.product(*options):
        if any(
            len({choice[i] for i, layer in enumerate(layers) if layer.name in tied}) > 1
            for tied in wishes["ties"]
        ):
            continue
        cost = math.fsum(options[i][pair] for i, pair in enumerate(choice))
        if (best is None or cost < best[0]) and fits(choice):
            best = (cost, list(choice))
    return best


def random_wishes(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 5))
    layers = [
        Layer(f"l{i}", int(rng.integers(1, 200)), int(rng.integers(1, 5000))) for i in range(count)
    ]
    bits = [int(b) for b in rng.permutation([2, 3, 4, 8])[: rng.integers(1, 4)]]
    as_weights = rng.random() < 0.3
    beside = [int(b) for b in rng.permutation([2, 4, 6, 8])[: rng.integers(1, 4)]]
    cost = np.round(rng.lognormal(0, 1, (count, 1)) * 3.0 ** -np.array(bits) * 100, 4)
    cost = cost + rng.integers(0, 2, cost.shape)
    allowed = rng.random((count, len(bits))) < 0.85
    allowed[:, int(rng.integers(len(bits)))] = True
    open_beside = rng.random((count, len(beside))) < 0.85
    open_beside[:, int(rng.integers(len(beside)))] = True
    ties = [("l0", f"l{count - 1}")] if rng.random() < 0.4 else []
    pins: list[tuple[str, tuple[int, ...]]] = []
    if rng.random() < 0.6:
        name = f"l{int(rng.integers(count))}"
        pins.append((name, ((8,), (5,), (8, 4), (4, 3))[int(rng.integers(4))]))
    held = {name for name, _ in pins}
    held |= {name for tied in ties if held & set(tied) for name in tied}
    searched = [layer.name not in held for layer in layers]
    widths = {*bits, *(pin[0] for _, pin in pins)}
    acts = {*beside, *widths, 3, 4}
    times = {
        (i, b, a): int(rng.integers(1, 10**6)) * 10
        for i in range(count)
        for b in widths
        for a in acts
    }
    menu = ["size=50%", "bops=33.3%", "latency=25%", "macs-bits=80%", "size=0%", "bops=100%"]
    menu += [f"latency={rng.integers(1, 3 * count)}us", f"bops={rng.integers(50, 10**5)}"]
    menu += ["size=3.5bit"] if any(searched) else []
    chosen = rng.permutation(menu)[: rng.integers(0, 3)]
    # One budget of a kind and unit.
    budgets = list({(t.split("=")[0], t.endswith("%")): str(t) for t in chosen}.values())
    return {
        "layers": layers,
        "bits": bits,
        "activation_bits": "weights" if as_weights else beside,
        "cost": cost,
        "activation_cost": None if as_weights else rng.integers(0, 50, (count, len(beside))) / 8,
        "allowed": allowed,
        "activation_allowed": None if as_weights else open_beside,
        "ties": ties,
        "pins": pins,
        "budgets": budgets,
        "searched": searched,
        "times": times,
    }


def built(wishes: dict[str, Any]) -> Problem:
    same = ("activation_bits", "activation_cost", "allowed", "activation_allowed")
    table: dict[str, dict] = {layer.name: {} for layer in wishes["layers"]}
    for (i, b, a), time in wishes["times"].items():
        table[f"l{i}"][b, a] = time
    return build_problem(
        wishes["layers"],
        wishes["cost"],
        wishes["bits"],
        wishes["budgets"],
        pins=[f"{name}={'/'.join(map(str, pin))}" for name, pin in wishes["pins"]],
        shared=wishes["ties"],
        latency=LatencyTable(name="table", layers=table),
        **{key: wishes[key] for key in same},
    )


@pytest.mark.parametrize("block", range(4))
def test_what_is_built_is_what_was_wished(block: int) -> None:
    solved = 0
    for seed in range(100 * block, 100 * (block + 1)):
        wishes = random_wishes(seed)
        try:
            problem = built(wishes)
        except UsageError as error:  # ties of layers whose pins or masks leave nothing in common
            assert wishes["ties"] and "none in common" in str(error), seed
            continue
        best = naive(wishes)
        if best is None:
            with pytest.raises(InfeasibleError):
                solve(problem)
            continue
        answer = solve(problem)
        assert answer.objective == pytest.approx(best[0], rel=1e-9, abs=1e-12), seed
        assert answer.status is Status.OPTIMAL
        for reach in reachable(problem):
            assert reach.unit != "%" or (reach.low, reach.high) in ((0, 100), (0, 0))
        solved += 1
    assert solved > 60


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from(["size", "bops", "latency"]))
def test_a_looser_share_never_raises_the_objective(seed: int, kind: str) -> None:
    wishes = random_wishes(seed)

    def at(percent: int) -> float:
        return solve(built({**wishes, "budgets": [f"{kind}={percent}%"]})).objective

    try:
        costs = [at(percent) for percent in (0, 10, 40, 70, 100)]
    except UsageError:
        return
    assert all(b <= a + 1e-9 * abs(a) for a, b in itertools.pairwise(costs))
    assert costs[-1] == pytest.approx(solve(built({**wishes, "budgets": []})).objective)


# -- activation bits -------------------------------------------------------------------


def test_pairs_are_columns_and_costs_add_up() -> None:
    problem = joint()
    assert problem.bits == (2, 2, 4, 4, 8, 8)
    assert problem.activation_bits == (4, 8, 4, 8, 4, 8)
    assert problem.cost[1].tolist() == pytest.approx([4.2, 1.8, 3.7, 1.3, 3.3, 0.9])
    assert problem.shown(3) == "4/8"
    # Candidates in another order are the same problem.
    other = build(
        bits=(8, 2, 4),
        cost=COST[:, [2, 0, 1]],
        activation_bits=(8, 4),
        activation_cost=BESIDE[:, ::-1],
    )
    assert other.bits == problem.bits and (other.cost == problem.cost).all()
    (limit,) = joint(budgets="bops=1G").limits
    assert limit.usage[1].tolist() == [9_437_184 * x for x in (8, 16, 16, 32, 32, 64)]
    answer = solve(joint(budgets=["bops=300M", "size=4bit"]))
    assert answer.activation_bits is not None and set(answer.activation_bits) == {4, 8}
    assert all(line[36:40].strip() for line in str(answer).splitlines()[-5:])
    assert "4/8" in str(answer) and all(len(line) <= 88 for line in str(answer).splitlines())
    assert solve(build()).activation_bits is None


def test_activations_can_follow_the_weights() -> None:
    problem = build(activation_bits="weights", budgets="bops=1G", pins=["stem=8", "fc=16"])
    assert problem.bits == problem.activation_bits == (2, 4, 8, 16)
    assert problem.limits[0].usage[2].tolist() == [9_437_184 * b * b for b in (2, 4, 8, 16)]
    answer = solve(problem)
    assert answer.bits == answer.activation_bits
    # One width a layer: there is an order to round in.
    assert solve(problem, "lp").bits == solve(problem, "lp").activation_bits
    # A pin may take them apart.
    apart = solve(build(activation_bits="weights", pins=["fc=8/4", "stem=4"]))
    assert (apart.bits[-1], (apart.activation_bits or ())[-1]) == (8, 4)
    assert (apart.activation_bits or ())[0] == 4


def test_pins_hold_the_weights_or_both() -> None:
    answer = solve(joint(pins=["stem=8", "fc=6/5", "b.down=4/float", "b.conv?=2/8"]))
    assert answer.bits == (8, 2, 2, 4, 6)
    assert answer.activation_bits == (8, 8, 8, None, 5)
    # The weights of the stem are held, its activations are not.
    pinned = joint(pins=["stem=8"], budgets=["bops=50%"])
    assert pinned.allowed[0].sum() == 2
    # With activations given for all, a pin may still say otherwise for one.
    fixed = build(activation_bits=8, pins=["fc=8/4"], budgets="bops=3G")
    assert solve(fixed).activation_bits == (8, 8, 8, 8, 4)
    floating = solve(build(pins=["@first=8/8"], budgets="bops=9G"))
    assert floating.activation_bits == (8, None, None, None, None)
    assert build(activation_bits=8, pins=["fc=8"]).activation_bits is None
    # Of tied layers the pin that names both holds all.
    tied = joint(ties=["b.*"], pins=["b.conv1=4", "b.conv2=4/8"])
    answer = solve(tied)
    assert answer.bits[1:4] == (4, 4, 4) and (answer.activation_bits or ())[1:4] == (8, 8, 8)
    with pytest.raises(UsageError, match=r"pinned apart by 'b\.conv1=4/4' and 'b\.conv2=4/8'"):
        joint(ties=["b.*"], pins=["b.conv1=4/4", "b.conv2=4/8"])


def test_positions_name_the_ends() -> None:
    answer = solve(joint(pins=["@first=8/8", "@last=4"], candidates=["@first=2"]))
    assert (answer.bits[0], answer.bits[-1]) == (8, 4)
    problem = build(candidates=["@last=2"], ties=["@first"])
    assert solve(problem).bits == (8, 8, 8, 8, 2)
    named = (Layer("@last", 1, 1), Layer("other", 1, 1))
    pinned = build_problem(named, np.zeros((2, 2)), (2, 4), pins=["@last=4"])
    assert solve(pinned).bits == (4, 2)  # a name is a name
    with pytest.raises(UsageError, match="did you mean '@first'"):
        build(pins=["@fist=8"])


def test_erased_candidates_are_not_chosen() -> None:
    stays = np.ones((5, 3), bool)
    stays[1, 2] = stays[4, :2] = False
    beside = np.ones((5, 2), bool)
    beside[0, 1] = False
    answer = solve(joint(allowed=stays, activation_allowed=beside))
    assert answer.bits == (8, 4, 8, 8, 8)
    assert answer.activation_bits == (4, 8, 8, 8, 8)
    # A pin is a wish of its own; what its pin leaves open is still bound by the mask.
    answer = solve(joint(allowed=stays, activation_allowed=beside, pins=["b.conv1=8", "stem=2"]))
    assert answer.bits[:2] == (2, 8) and (answer.activation_bits or ())[:2] == (4, 8)
    # What is erased may hold anything.
    spoiled = COST.copy()
    spoiled[1, 2] = np.nan
    assert solve(joint(cost=spoiled, allowed=stays)).bits[1] == 4
    with pytest.raises(UsageError, match="'fc' has no bit-width left"):
        joint(allowed=np.vstack([stays[:4], [[False] * 3]]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation_bits": [4, 8]}, "these scores say nothing of activations"),
        ({"activation_bits": [4, 8], "activation_cost": COST}, r"\[5, 2\], got \[5, 3\]"),
        ({"activation_bits": [4, 4], "activation_cost": BESIDE}, "names the bit-width 4 twice"),
        ({"activation_bits": [4, 9], "activation_cost": BESIDE}, "got 9"),
        ({"activation_bits": [], "activation_cost": BESIDE}, "at least one"),
        ({"activation_bits": "weight"}, "'weights' or None, got 'weight'"),
        ({"activation_bits": 8, "activation_cost": BESIDE}, "goes with a list"),
        ({"activation_bits": "weights", "activation_cost": BESIDE}, "goes with a list"),
        ({"activation_bits": {"fc": 8}, "pins": ["fc=8/4"]}, "'fc=8/4' names activation bits"),
        ({"allowed": np.ones((5, 3))}, r"`allowed` must be bool of shape \[layers, bits\]"),
        ({"allowed": np.ones((5, 2), bool)}, r"= \[5, 3\], got bool of shape \[5, 2\]"),
        ({"activation_allowed": np.ones((5, 2), bool)}, "`activation_allowed` goes with a list"),
        (
            {
                "activation_bits": [4, 8],
                "activation_cost": BESIDE,
                "activation_allowed": np.ones((5, 3), bool),
            },
            r"`activation_allowed` must be bool of shape \[layers, activation bits\] = \[5, 2\]",
        ),
        ({"pins": ["fc=8/9"]}, "got 9"),
        ({"pins": ["fc=9/8"]}, "got 9"),
        ({"pins": ["fc=8/"]}, "weight and activation bits, like 'PATTERN=8/4'"),
        ({"pins": ["fc=8/a"]}, "weight and activation bits, like 'PATTERN=8/4'"),
        ({"pins": ["fc=/8"]}, "bit-widths"),
        ({"pins": ["fc=8/4,8"]}, "one bit-width"),
        ({"pins": ["fc=4,8/8"]}, "one bit-width"),
        ({"pins": ["fc/8"]}, "must look like 'PATTERN=8', got 'fc/8'"),
    ],
)
def test_bad_wishes_are_refused_in_one_sentence(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        build(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ((8,), "an entry for each of the 2 columns, got 1"),
        ((8, 8), "2 bits with activations at 8 are given twice"),
        ((None, None), "activations at float are given twice"),
        ((8, 9), "got 9"),
    ],
)
def test_bad_columns_are_refused(beside: tuple, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Problem(layers=("a",), bits=(2, 2), cost=[[1.0, 2.0]], activation_bits=beside)


def test_a_cost_that_is_no_number_is_named_with_both_bits() -> None:
    spoiled = BESIDE.copy()
    spoiled[0, 0] = np.nan
    with pytest.raises(UsageError, match="'stem' at 2/4 bits is nan"):
        joint(activation_cost=spoiled)


def test_the_papers_roundings_need_one_axis() -> None:
    with pytest.raises(UsageError, match=r"'lp' rounds one bit-width a layer.*use 'ilp'"):
        solve(joint(budgets="size=4bit"), "lp")


# -- shares ----------------------------------------------------------------------------


def test_shares_lie_between_the_least_and_the_greatest() -> None:
    (limit,) = build(budgets="size=50%").limits
    weights = sum(layer.weights for layer in LAYERS)
    assert limit.budget == weights * 2 + weights * 6 // 2
    assert limit.ends == (2 * weights, 8 * weights) and limit.asked_in_units == 50
    assert limit.in_units(limit.budget) == 50
    # Pinned layers are what they are, erased choices no ends.
    stays = np.ones((5, 3), bool)
    stays[1, 0] = False
    (limit,) = build(budgets="size=10%", pins=["stem=4"], allowed=stays).limits
    others = weights - 864 - 9216
    assert limit.ends == (864 * 4 + 9216 * 4 + 2 * others, 864 * 4 + 8 * (9216 + others))
    assert set(solve(build(budgets="bops=0%", activation_bits="weights")).bits) == {2}
    assert set(solve(build(budgets="bops=100%", activation_bits="weights")).bits) == {8}
    assert limit.budget == limit.ends[0] + (limit.ends[1] - limit.ends[0]) // 10
    # Where nothing is to choose, all is reached.
    (limit,) = (held := build(budgets="size=10%", pins=["*=4"])).limits
    assert limit.ends == (4 * weights, 4 * weights) and limit.in_units(4 * weights) == 0
    assert set(solve(held).bits) == {4}
    assert parse_budget("size=12.5 %").amount == Fraction(25, 2)
    assert "size 0 % of 50 %" in str(solve(build(budgets="size=50%", cost=np.ones((5, 3)))))


def test_shares_can_clash() -> None:
    usage = np.array([[0, 10], [0, 10]])
    problem = Problem(
        layers=("a", "b"),
        bits=(2, 4),
        cost=np.zeros((2, 2)),
        limits=(
            Limit(name="size", usage=usage, budget=10, unit="%", ends=(0, 20)),
            Limit(name="bops", usage=10 - usage, budget=9, unit="%", ends=(0, 20)),
        ),
    )
    words = "size = 50 % and bops = 45 % cannot .* smallest reachable bops is 50 % .* 100 %"
    with pytest.raises(InfeasibleError, match=words):
        solve(problem)


# -- latency ---------------------------------------------------------------------------


def table_file(path: Path, **changes: Any) -> Path:
    rows = [
        {"weight_bits": b, "activation_bits": a, "seconds": 1e-6 * b * (a or 16)}
        for b in (2, 4, 8)
        for a in (4, 8, None)
    ]
    data = {
        "schema": "proxyq/latency/1",
        "device": "paper",
        "other_seconds": 0.0001,
        "layers": {layer.name: rows for layer in LAYERS},
    }
    file = path / "latency.json"
    file.write_text(json.dumps({**data, **changes}))
    return file


def test_a_latency_table_is_read_exactly(tmp_path: Path) -> None:
    rows = [
        {"weight_bits": 4, "activation_bits": 4, "seconds": 2.1094404e-4},
        {"weight_bits": 4, "seconds": 3},
        {"weight_bits": 8, "activation_bits": None, "seconds": 1.00000000000001e-12},
    ]
    table = load_latency(table_file(tmp_path, layers={"a": rows}))
    assert table.of("a", 4, 4) == 210_944_040
    assert table.of("a", 4, None) == 3 * 10**12
    assert table.of("a", 8, None) == 2  # up, never down
    assert table.of("a", 8, 8) is None and table.of("b", 4, 4) is None
    assert (table.other, table.device) == (10**8, "paper")


def test_latency_is_a_budget_like_others(tmp_path: Path) -> None:
    table = load_latency(table_file(tmp_path))
    problem = joint(budgets=["latency=0.25ms", "size=6bit"], latency=table)
    limit = problem.limits[0]
    assert limit.fixed == 10**8 and limit.budget == 250 * 10**6
    assert limit.usage[0].tolist() == [10**6 * x for x in (8, 16, 16, 32, 32, 64)]
    answer = solve(problem)
    assert answer.usage[0] <= limit.budget and "latency 0.2" in str(answer)
    assert build(budgets="latency=1s", latency=table).limits[0].usage[0, 0] == 32 * 10**6
    assert build(budgets="latency=1s", activation_bits=8, latency=table).limits[0].usage[0, 0] == (
        16 * 10**6
    )
    ends = joint(budgets="latency=50%", latency=table).limits[0].ends
    assert ends == (10**8 + 5 * 8 * 10**6, 10**8 + 5 * 64 * 10**6)
    with pytest.raises(UsageError, match="needs a latency table"):
        build(budgets="latency=3ms")
    with pytest.raises(InfeasibleError, match=r"latency = 100 us .* smallest reachable is 140 us"):
        solve(joint(budgets="latency=100us", latency=table))


def test_choices_that_were_not_measured_are_named(tmp_path: Path) -> None:
    table = load_latency(table_file(tmp_path))
    with pytest.raises(
        UsageError,
        match=r"latency\.json' says nothing of layer 'stem' at 2 weight bits and 6 activation bits "
        r"\(and of 14 more choices\)",
    ) as caught:
        build(budgets="latency=3ms", activation_bits=6, latency=table)
    assert "\n" not in str(caught.value)
    # What nobody can choose need not be measured.
    cost = np.zeros((5, 2))
    problem = build_problem(
        LAYERS, cost, (3, 4), "latency=1ms", pins=["*=4"], activation_bits=8, latency=table
    )
    assert solve(problem).usage[0] == 10**8 + 5 * 32 * 10**6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": "proxyq/plan/1"}, "no latency table: its field 'schema' must be"),
        ({"layers": {}}, "'layers'"),
        ({"layers": {"a": [{"weight_bits": 9, "seconds": 1}]}}, r"'layers\.a\.0\.weight_bits'.*9"),
        ({"layers": {"a": [{"weight_bits": 4}]}}, r"'layers\.a\.0\.seconds': it is missing"),
        ({"layers": {"a": [{"weight_bits": 4, "seconds": -1}]}}, "seconds'.*-1"),
        ({"layers": {"a": [{"weight_bits": 4, "seconds": "1"}]}}, "seconds'"),
        (
            {"layers": {"a": [{"weight_bits": 4, "seconds": 1}] * 2}},
            "'a' at 4 weight bits and float activation bits twice",
        ),
        ({"colour": 1}, "'colour': no such field"),
    ],
)
def test_a_bad_latency_table_is_named_in_one_sentence(
    tmp_path: Path, changes: dict, words: str
) -> None:
    with pytest.raises(ProxyqError, match=words) as caught:
        load_latency(table_file(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_latency_table_that_is_not_there() -> None:
    with pytest.raises(ProxyqError, match="cannot read the latency table"):
        load_latency("missing.json")


# -- outliers --------------------------------------------------------------------------


def test_outliers_are_erased_at_the_lower_bits() -> None:
    # 5 bits look better than 6: the entry at 5 goes. The comparison of 4 with 5 is on what was
    # measured: 4 stays.
    values = np.array([[1.0, 0.8, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    kept = without_outliers(values, [6, 5, 4, 3])
    assert kept.tolist() == [
        [True, False, True, True],
        [True, True, True, True],
        [True, False, False, False],
    ]
    # The order of the columns is no matter, nor are gaps between bit-widths; equals stay.
    order = [2, 0, 3, 1]
    mixed = without_outliers(values[:, order], [4, 6, 3, 5])
    assert (mixed == kept[:, order]).all()
    assert without_outliers([[1.0, 2.0, 2.0]], [2, 8, 4]).tolist() == [[False, True, True]]
    assert without_outliers([[math.nan, 1.0]], [2, 4]).all()
    with pytest.raises(UsageError, match=r"shape \[layers, 2\]"):
        without_outliers(values, [2, 4])


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(0, 2**32))
def test_outliers_against_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = [int(b) for b in rng.permutation([1, 2, 3, 4, 6, 8])[: rng.integers(1, 6)]]
    values = rng.integers(0, 6, (3, len(bits))).astype(float)
    kept = without_outliers(values, bits)
    for row, stays in zip(values, kept, strict=True):
        by_bits = dict(zip(bits, row, strict=True))
        for b, stay in zip(bits, stays, strict=True):
            higher = [other for other in bits if other > b]
            assert stay == (not higher or by_bits[b] >= by_bits[min(higher)])


def test_a_pin_given_once_is_named_once() -> None:
    stays = np.ones((5, 3), bool)
    stays[1, 2] = False  # so that the layers it holds could take different things
    with pytest.raises(InfeasibleError) as caught:
        solve(build(budgets="size=7KiB", pins=["b.*=8"], allowed=stays))
    assert str(caught.value).count("'b.*=8'") == 1
    assert "the pin 'b.*=8' causes it" in str(caught.value)
