"""The peak of live activations as a budget: what is live, what it takes, what is chosen."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from commandline import here
from jax import lax
from networks import mixer, small_net

from proxyq.api import allocate, inspect, score
from proxyq.api.evaluate import uniform_plan
from proxyq.engine.segments import cut
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.function_import import from_function
from proxyq.model.graph import is_literal
from proxyq.model.live import Step, Tensor, float_peak
from proxyq.model.network import LAYERS_AT, Network, network
from proxyq.model.schedule import schedule
from proxyq.search.allocate import (
    Assignment,
    InfeasibleError,
    Limit,
    Problem,
    build_problem,
    memory,
    reachable,
    solve,
    verify,
)
from proxyq.search.allocate.latency import LatencyTable
from proxyq.search.allocate.plan import Plan, plan_from
from proxyq.search.scores_file import ScoreFile

# -- what is live, written out by hand -------------------------------------------------


def conv(x: Any, w: Any, stride: int = 1) -> Any:
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=names)


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def plain() -> Network:
    def apply(p: Any, x: Any) -> Any:
        x = jnp.maximum(conv(x, p["first"]), 0)
        x = jnp.maximum(conv(x, p["second"], 2) * 0.5, 0)
        return x.mean(axis=(1, 2)) @ p["fc"]

    shapes = {"first": (3, 3, 3, 6), "second": (3, 3, 6, 8), "fc": (8, 5)}
    return network(from_function(apply, weights(**shapes), (8, 8, 3)), LAYERS_AT)


def residual() -> Network:
    def apply(p: Any, x: Any) -> Any:
        x = jnp.maximum(conv(x, p["stem"]), 0)
        y = jnp.maximum(conv(x, p["one"]), 0)
        x = jnp.maximum(conv(y, p["two"]) + x, 0)
        y = jnp.maximum(conv(x, p["three"], 2), 0)
        y = conv(y, p["four"])
        x = jnp.maximum(y + conv(x, p["short"], 2), 0)
        return x.reshape(x.shape[0], -1) @ p["fc"]

    shapes = {"stem": (3, 3, 1, 4), "one": (3, 3, 4, 4), "two": (3, 3, 4, 4)}
    shapes |= {"three": (3, 3, 4, 6), "four": (3, 3, 6, 6), "short": (1, 1, 4, 6), "fc": (96, 3)}
    return network(from_function(apply, weights(**shapes), (8, 8, 1)), LAYERS_AT)


def attention() -> Network:
    def apply(p: Any, x: Any) -> Any:
        x = x @ p["embed"]
        q, k, v = (x.reshape(-1, 8) @ p[name] for name in "qkv")
        q, k, v = (one.reshape(x.shape) for one in (q, k, v))
        y = jnp.einsum("bst,btd->bsd", jnp.exp(jnp.einsum("bsd,btd->bst", q, k)), v)
        return (x + y @ p["out"]).mean(axis=1)

    shapes = {name: (8, 8) for name in ("q", "k", "v", "out")}
    return network(from_function(apply, weights(embed=(4, 8), **shapes), (6, 4)), LAYERS_AT)


Named = dict[str, tuple[int, tuple[str, ...]]]
BY_HAND: dict[str, tuple[Any, Named, dict[str, str]]] = {
    # elements and readers by tensor; the tensors that are live in each layer's turn
    "plain": (
        plain,
        {
            "image": (8 * 8 * 3, ("first",)),
            "a": (8 * 8 * 6, ("second",)),
            "pooled": (8, ("fc",)),
            "logits": (5, ()),
        },
        {"first": "image a", "second": "a pooled", "fc": "pooled logits"},
    ),
    "residual": (
        residual,
        {
            "image": (64, ("stem",)),
            "a": (256, ("one",)),
            "b": (256, ("two",)),
            "c": (256, ("three", "short")),
            "d": (96, ("four",)),
            "e": (96, ()),  # waits for the sum
            "f": (96, ("fc",)),
            "logits": (3, ()),
        },
        {
            "stem": "image a",
            "one": "a b",
            "two": "a b c",
            "three": "c d",
            "four": "c d e",
            "short": "c e f",
            "fc": "f logits",
        },
    ),
    "attention": (
        attention,
        {
            "tokens": (24, ("embed",)),
            "x": (48, ("q", "k", "v")),  # also in the shape that the three read it in
            "queries": (48, ()),  # no layer reads them
            "keys": (48, ()),
            "mixed": (48, ("out",)),
            "pooled": (8, ()),
        },
        {
            "embed": "tokens x",
            "q": "x queries",
            "k": "x queries keys",
            "v": "x queries keys mixed",
            "out": "x mixed pooled",
        },
    ),
}


def peak_by_hand(case: str, bits: Mapping[str, int | None]) -> int:
    """The most that is live, in bits, from the tables above and nothing else."""
    _, tensors, turns = BY_HAND[case]
    peak = 0
    for live in turns.values():
        total = 0
        for name in live.split():
            elements, readers = tensors[name]
            widths = [bits[reader] or 32 for reader in readers]
            total += elements * max(widths, default=32)
        peak = max(peak, total)
    return peak


def joint(found: Network, budgets: Any = (), beside: Sequence[int] = (4, 8), **options: Any):
    """A problem over weight and activation bits with costs that differ everywhere."""
    rng = np.random.default_rng(3)
    count = len(found.layers)
    widths = options.pop("bits", (2, 4, 8))
    return build_problem(
        found.layers,
        rng.lognormal(0, 1, (count, 1)) * 4.0 ** -np.array(widths),
        widths,
        budgets,
        activation_bits=list(beside),
        activation_cost=rng.lognormal(0, 1, (count, 1)) * 4.0 ** -np.array(beside),
        schedule=schedule(found),
        **options,
    )


def fixed(found: Network, budgets: Any, **options: Any) -> Problem:
    """A problem over weight bits alone."""
    cost = np.outer(np.arange(1, len(found.layers) + 1), [0.5, 0.1])
    steps = options.pop("schedule", schedule(found))
    return build_problem(found.layers, cost, (4, 8), budgets, schedule=steps, **options)


def achieved(problem: Problem, choice: Sequence[int]) -> int:
    """The largest part of the budget on memory."""
    return max(
        limit.fixed + sum(int(limit.usage[i, k]) for i, k in enumerate(choice))
        for limit in problem.limits
        if limit.name == "activation-memory"
    )


@pytest.mark.parametrize("case", BY_HAND)
def test_what_is_live_is_what_was_written_out(case: str) -> None:
    build, tensors, turns = BY_HAND[case]
    head, *steps = schedule(build())
    assert head.layer is None and len(head.tensors) == 1
    found = {
        step.layer: sorted((one.elements, one.readers) for one in step.tensors) for step in steps
    }
    assert found == {
        layer: sorted(tensors[name] for name in live.split()) for layer, live in turns.items()
    }
    assert {one.bits for step in steps for one in step.tensors} == {32}
    floats = dict.fromkeys(turns, None)
    assert float_peak(steps).float_bits == peak_by_hand(case, floats)


@pytest.mark.parametrize("case", BY_HAND)
def test_every_choice_takes_what_the_definition_says(case: str) -> None:
    found = BY_HAND[case][0]()
    problem = joint(found, "activation-memory=1GiB", beside=(2, 4, 8), bits=(4,))
    assert problem.activation_bits is not None
    choices = list(itertools.product(range(3), repeat=len(found.layers)))
    for choice in choices[:: max(1, len(choices) // 500)]:
        bits = dict(zip(found.names, (problem.activation_bits[k] for k in choice), strict=True))
        assert achieved(problem, choice) == peak_by_hand(case, bits), choice
    (reach,) = reachable(problem)
    for end, width in ((reach.low, 2), (reach.high, 8)):
        assert end * 2**33 == peak_by_hand(case, dict.fromkeys(found.names, width))


@pytest.mark.parametrize("build", [small_net, mixer, lambda: inspect().model])
def test_the_schedule_is_the_engines(build: Any) -> None:
    """The engine cuts the network by itself: what its segments read, keep and write is live."""
    found = network(build(), LAYERS_AT)
    graph = found.graph
    for step, segment in zip(schedule(found), cut(found), strict=True):
        held = {*segment.reads, *segment.keeps, *segment.writes}
        sizes: dict[Any, int] = {}
        for var in held:
            if not graph.is_data(var):
                continue
            source = var
            while source in graph.producer:
                eqn = graph.main[graph.producer[source]]
                if eqn.primitive.name not in ("reshape", "transpose"):
                    break
                source = eqn.invars[0]
            sizes[source] = source.aval.size // graph.batch_size
        assert sorted(sizes.values()) == sorted(one.elements for one in step.tensors)
        if segment.site is not None:
            site = found.sites[segment.site]
            assert step.layer == site.layer
            read = graph.main[site.position].invars[1 - site.operand]
            assert not is_literal(read)
            assert any(site.layer in one.readers for one in step.tensors)


def test_a_layer_used_twice_takes_its_turn_twice() -> None:
    steps = schedule(network(mixer(), LAYERS_AT))
    tied = [step for step in steps if step.layer == "tied"]
    assert len(tied) == 2
    x = next(one for one in tied[0].tensors if one.readers == ("tied",))
    assert x.elements == 6 * 8
    # The queries, keys and values read what the token mixer hands on, at their widest.
    assert any(set(one.readers) == {"query", "key", "value"} for s in steps for one in s.tensors)


# -- rows: any schedule against the definition ----------------------------------------


@dataclass(frozen=True)
class Layer:
    name: str
    weights: int = 10
    macs: int = 100
    group: str | None = None


def random_case(seed: int) -> tuple[tuple[Layer, ...], tuple[Step, ...], dict[str, Any]]:
    """A schedule that no network need have, and wishes of all kinds."""
    rng = np.random.default_rng(seed)
    layers = tuple(Layer(f"l{i}") for i in range(int(rng.integers(1, 5))))
    names = [layer.name for layer in layers]
    tensors = [
        Tensor(
            elements=int(rng.integers(1, 30)),
            bits=int(rng.choice([32, 32, 16])),
            readers=tuple(n for n in names if rng.random() < 0.45),
        )
        for _ in range(int(rng.integers(1, 8)))
    ]
    steps = tuple(
        Step(layer=layer, tensors=tuple(one for one in tensors if rng.random() < 0.6))
        for layer in (None, *names, *names[:1])
    )
    options: dict[str, Any] = {"budgets": "activation-memory=1MiB"}
    mode = rng.choice(["list", "list", "list", "weights", "fixed", "float", "by layer"])
    beside = [int(b) for b in rng.permutation([2, 4, 6, 8])[: rng.integers(1, 4)]]
    if mode == "list":
        options["activation_bits"] = beside
        options["activation_cost"] = rng.random((len(layers), len(beside)))
    elif mode != "float":
        by_layer = {name: (None, 4, 8)[rng.integers(3)] for name in names}
        options["activation_bits"] = {"weights": "weights", "fixed": 8, "by layer": by_layer}[mode]
    if rng.random() < 0.4:
        options["ties"] = ["l*" if rng.random() < 0.3 else "re:l[02]"]
    if rng.random() < 0.4:
        both = mode not in ("by layer", "weights") and rng.random() < 0.6
        options["pins"] = ["l0=8/6" if both else "l0=8"]
    if rng.random() < 0.4 and "ties" not in options:
        options["candidates"] = [f"{names[-1]}=4"]
    return layers, steps, options


def peak_of(steps: Sequence[Step], bits: Mapping[str, int | None]) -> int:
    """The definition, for a schedule."""
    return max(
        sum(
            one.elements * max(((bits[n] or one.bits) for n in one.readers), default=one.bits)
            for one in step.tensors
        )
        for step in steps
    )


def peaks(problem: Problem, steps: Sequence[Step], options: Mapping[str, Any], lifted: bool):
    """Of every choice the peak by the definition, and by the limits."""
    given = options.get("activation_bits")
    open_ = []
    for i in range(len(problem.layers)):
        columns = set(np.flatnonzero(problem.allowed[i]).tolist())
        columns.update(k for pin in problem.pins if lifted and i in pin.layers for k in pin.free)
        open_.append(sorted(columns))
    for choice in itertools.product(*open_):
        if any(len({choice[i] for i in group}) > 1 for group in problem.groups):
            continue
        if problem.activation_bits is not None:
            bits = [problem.activation_bits[k] for k in choice]
        elif isinstance(given, Mapping):
            bits = [given[name] for name in problem.layers]
        else:
            bits = [given] * len(problem.layers)
        yield peak_of(steps, dict(zip(problem.layers, bits, strict=True))), choice


@pytest.mark.parametrize("block", range(3))
def test_rows_are_the_definition_for_any_schedule(block: int) -> None:
    several = 0
    for seed in range(60 * block, 60 * (block + 1)):
        layers, steps, options = random_case(seed)
        problem = build_problem(
            layers, np.ones((len(layers), 2)), (4, 8), schedule=steps, **options
        )
        several += len(problem.limits) > 1
        assert len({limit.part for limit in problem.limits}) == len(problem.limits)
        # Also where pins are lifted, as messages do.
        for lifted in (False, True):
            for peak, choice in peaks(problem, steps, options, lifted):
                assert achieved(problem, choice) == peak, (seed, choice)
        if problem.activation_bits is None:
            assert len(problem.limits) == 1
    assert several > 10


def test_too_many_rows_are_bounded_from_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_ROWS", 2)
    more = 0
    for seed in range(60):
        layers, steps, options = random_case(seed)
        problem = build_problem(
            layers, np.ones((len(layers), 2)), (4, 8), schedule=steps, **options
        )
        found = [(peak, achieved(problem, c)) for peak, c in peaks(problem, steps, options, False)]
        assert all(peak <= counted for peak, counted in found), seed
        # What the least bits take is exact, so what can be met is never called infeasible.
        assert min(peak for peak, _ in found) == min(counted for _, counted in found)
        more += any(peak < counted for peak, counted in found)
    assert more > 3


def test_rows_that_can_not_be_the_peak_are_left_out() -> None:
    found = residual()
    problem = joint(found, "activation-memory=1GiB")
    # A block's second convolution holds three tensors, one of them with two readers; in the next
    # block a float one is held. All other turns are smaller whatever is chosen.
    places = [limit.part for limit in problem.limits]
    assert places == ["two", "two (2)", "four", "four (2)", "short", "short (2)"]
    # Readers that decide together need no row each.
    tied = joint(found, "activation-memory=1GiB", ties=["re:three|short"])
    assert [limit.part for limit in tied.limits] == ["two", "four", "short"]
    # What is lifted with a pin is not left out.
    pinned = joint(found, "activation-memory=1GiB", pins=["short=8/8"])
    assert [limit.part for limit in pinned.limits] == places
    # Nothing to choose is one number.
    for options in ({"activation_bits": 8}, {}):
        held = fixed(found, "activation-memory=1MB", **options)
        bits = dict.fromkeys(found.names, options.get("activation_bits"))
        assert len(held.limits) == 1
        assert achieved(held, (0,) * 7) == peak_by_hand("residual", bits)


# -- chosen together, under all budgets ------------------------------------------------


def everything(found: Network, pairs: Sequence[tuple[int, int]], times: Any) -> dict[str, int]:
    """Size, BOPs, latency and memory of weight and activation bits a layer, from scratch."""
    of_layers = list(zip(found.layers, pairs, strict=True))
    return {
        "size": sum(layer.weights * b for layer, (b, _) in of_layers),
        "bops": sum(layer.macs * b * a for layer, (b, a) in of_layers),
        "latency": 7 + sum(times[layer.name][pair] for layer, pair in of_layers),
        "activation-memory": peak_by_hand("plain", {x.name: a for x, (_, a) in of_layers}),
    }


def test_all_four_budgets_at_once_against_all_choices() -> None:
    found = plain()
    rng = np.random.default_rng(5)
    pairs = list(itertools.product((2, 4, 8), (2, 4, 8)))
    times: dict[str, dict[tuple[int, int | None], int]] = {
        name: {(b, a): int(rng.integers(50, 99)) * (b + a) * 10**6 for b, a in pairs}
        for name in found.names
    }
    table = LatencyTable(name="table", layers=times, other=7)
    low, high = (everything(found, [pair] * 3, times) for pair in (pairs[0], pairs[-1]))
    of_all = [
        (choice, everything(found, [pairs[k] for k in choice], times))
        for choice in itertools.product(range(len(pairs)), repeat=3)
    ]
    bound = 0
    for seed in range(12):
        draw = np.random.default_rng(seed)
        asked = {k: int(low[k] + (high[k] - low[k]) * draw.uniform(0.2, 0.9)) for k in low}
        budgets = [
            f"size={asked['size'] / 8}B",
            f"bops={asked['bops']}",
            f"latency={asked['latency'] // 10**6}us",
            f"activation-memory={asked['activation-memory'] / 8}B",
        ]
        problem = joint(found, budgets, beside=(2, 4, 8), latency=table)
        assert [parts[0].name for parts in problem.budgets] == list(low)
        asked["latency"] -= asked["latency"] % 10**6
        best = min(
            sum(problem.cost[i, k] for i, k in enumerate(choice))
            for choice, taken in of_all
            if all(taken[kind] <= asked[kind] for kind in asked)
        )
        answer = solve(problem)
        assert answer.objective == pytest.approx(best, rel=1e-9), seed
        assert answer.activation_bits is not None
        chosen = [(b, a or 32) for b, a in zip(answer.bits, answer.activation_bits, strict=True)]
        taken = everything(found, chosen, times)
        assert {limit.name: amount for limit, amount in answer.achieved} == taken
        loose = solve(joint(found, budgets[:3], beside=(2, 4, 8), latency=table))
        bound += loose.objective < answer.objective
    assert bound >= 3  # the budget on memory is no ornament


@pytest.mark.parametrize("method", ["ilp", "greedy", "exhaustive"])
def test_every_solver_keeps_all_parts(method: str) -> None:
    found = BY_HAND["residual"][0]()
    for share in (0, 20, 60, 100):
        problem = joint(found, f"activation-memory={share}%", bits=(4,))
        answer = solve(problem, method)
        bits = dict(zip(found.names, answer.activation_bits or (), strict=True))
        ((_, peak),) = answer.achieved
        (reach,) = reachable(problem)
        assert peak == peak_by_hand("residual", bits) <= problem.limits[0].budget
        assert (reach.low, reach.high, reach.asked) == (0, 100, share)
    with pytest.raises(
        UsageError, match=r"takes one limit, got 6 \(activation-memory in 6 parts\)"
    ):
        solve(problem, "dp")
    # Of several parts the fullest is what a wrong answer is told by.
    tight = joint(found, "activation-memory=0%", bits=(4,))
    with pytest.raises(ProxyqError, match=r"of 'activation-memory' at 'two', above 0 %"):
        verify(tight, [1] * 7)


def test_activations_that_follow_the_weights() -> None:
    found = residual()
    low, high = (peak_by_hand("residual", dict.fromkeys(found.names, b)) for b in (4, 8))
    budget = f"activation-memory={(low + high) / 16}B"
    problem = fixed(found, budget, activation_bits="weights")
    answer = solve(problem)
    assert answer.bits == answer.activation_bits and len(set(answer.bits)) == 2
    bits = dict(zip(found.names, answer.bits, strict=True))
    assert answer.achieved[0][1] == peak_by_hand("residual", bits) <= (low + high) / 2


# -- what cannot be -------------------------------------------------------------------


def sentence(problem: Problem) -> str:
    with pytest.raises(InfeasibleError) as caught:
        solve(problem)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_can_not_be_met_is_told_with_the_place_and_the_pins() -> None:
    found = residual()
    text = sentence(joint(found, "activation-memory=100B"))
    least = peak_by_hand("residual", dict.fromkeys(found.names, 4)) / 8
    assert f"smallest reachable is {least:g} B (at 'four') and the largest 768 B" in text
    text = sentence(joint(found, "activation-memory=600B", pins=["one=8/8", "t*=8/8", "fc=4"]))
    assert "the pin 't*=8/8' causes it" in text and "'fc=4'" not in text
    # Fixed bits leave nothing to choose.
    text = sentence(fixed(found, "activation-memory=700B", activation_bits=8))
    assert "smallest reachable is 768 B (at 'two') and the largest 768 B" in text
    text = sentence(fixed(found, "activation-memory=3000B"))
    assert "3072 B (at 'two')" in text


def test_memory_and_another_budget_that_can_not_hold_together() -> None:
    found = residual()
    # A budget that few activation bits exceed.
    usage = np.array([[(12 - a) * layer.macs for a in (4, 8)] for layer in found.layers])
    problem = joint(found, "activation-memory=0%", bits=(4,))
    wish = Limit(name="wide", usage=usage, budget=int(usage.min(axis=1).sum()) + 1, unit="x")
    text = sentence(Problem(**{**vars(problem), "limits": (wish, *problem.limits)}))
    assert text.startswith("the budgets activation-memory = 0 % and wide = ")
    assert "within activation-memory = 0 % the smallest reachable wide is" in text


def test_parts_of_a_budget_share_its_amount() -> None:
    usage = np.ones((1, 1), int)
    one, two = (Limit(name="m", usage=usage, budget=b, part=f"p{b}") for b in (1, 2))
    with pytest.raises(UsageError, match="'p1' and 'p2' of the limit 'm' must have the same"):
        Problem(layers=("a",), bits=(4,), cost=np.zeros((1, 1)), limits=(one, two))
    with pytest.raises(UsageError, match="given twice"):
        Problem(layers=("a",), bits=(4,), cost=np.zeros((1, 1)), limits=(one, one))


def test_without_a_schedule_the_budget_can_not_be_counted() -> None:
    found = plain()
    with pytest.raises(UsageError, match=r"score the model again .* or search with the model\."):
        fixed(found, "activation-memory=1KiB", schedule=None)
    strange = (Step(layer=None, tensors=(Tensor(elements=1, bits=32, readers=("frist",)),)),)
    with pytest.raises(UsageError, match="unknown layer 'frist': did you mean 'first'"):
        fixed(found, "activation-memory=1KiB", schedule=strange)


# -- plans, files, the command line ---------------------------------------------------


def planned(answer: Assignment, found: Network, **fields: Any) -> Plan:
    return plan_from(answer, found.layers, activation_bits=[4, 8], **fields)


@pytest.mark.parametrize("budget", ["activation-memory=0.6KiB", "activation-memory=40%"])
def test_a_plan_holds_one_budget_and_survives_the_file(tmp_path: Path, budget: str) -> None:
    found = residual()
    answer = solve(joint(found, [budget, "size=6bit"], beside=(2, 4, 8)))
    plan = planned(answer, found, method={"bits": [2, 4, 8], "activation_bits": [2, 4, 8]})
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    entry, size = plan.budgets
    assert (entry.name, size.name) == ("activation-memory", "size")
    bits = {name: layer.activation_bits for name, layer in plan.layers.items()}
    peak = peak_by_hand("residual", bits)
    limit = answer.problem.limits[0]
    assert entry.achieved == pytest.approx(float(limit.in_units(peak)))
    assert entry.achieved <= entry.asked
    again = entry.budget()
    assert int(again.amount * again.per_unit(0)) == limit.budget
    assert f"activation-memory {entry.achieved:.4g} of" in str(plan)
    assert all(len(line) <= 88 for line in f"{plan}\n{answer}".splitlines())
    # The uniform rival keeps the same budgets.
    rival = uniform_plan(found.model, plan)
    assert rival is not None
    bits = {name: layer.activation_bits for name, layer in rival.layers.items()}
    assert peak_by_hand("residual", bits) <= limit.budget
    assert {layer.weight_bits for layer in rival.layers.values()} == {6}


@pytest.fixture(scope="module")
def scores() -> ScoreFile:
    return score(proxies="activation-mse", bits=[4, 8], activation_bits=[4, 8], samples=16)


def test_saved_scores_know_what_is_live(tmp_path: Path, scores: ScoreFile) -> None:
    again = ScoreFile.load(scores.save(tmp_path / "scores.json"))
    assert again.steps() == schedule(inspect()) and again.to_json() == scores.to_json()
    plan = allocate(again, ["activation-memory=2.5KiB", "size=6bit"])
    ours = {name: layer.activation_bits for name, layer in plan.layers.items()}
    assert plan.budgets[0].achieved == peak_of(schedule(inspect()), ours) / 8 / 1024 <= 2.5
    # A file of an older version still serves every other budget.
    data = json.loads(scores.to_json())
    del data["schedule"]
    older = ScoreFile.from_json(data)
    assert '"schedule"' not in older.to_json() and older.steps() is None
    assert allocate(older, "size=6bit").budgets[0].achieved <= 6
    with pytest.raises(UsageError, match="score the model again with this version") as caught:
        allocate(older, "activation-memory=2.5KiB")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["schedule"][1].update(layer="stm"), "names the layer 'stm'"),
        (lambda d: d["schedule"][0]["tensors"][0].update(readers=["x"]), "names the layer 'x'"),
        (lambda d: d["schedule"][0]["tensors"][0].update(elements=-1), r"schedule\.0\.tensors"),
        (lambda d: d["schedule"][0]["tensors"][0].update(elements=2**40), r"schedule\.0\.tensors"),
        (lambda d: d["schedule"][0]["tensors"][0].update(bits=0), r"tensors\.0\.bits"),
        (lambda d: d["schedule"][0].pop("tensors"), r"schedule\.0\.tensors': it is missing"),
        (lambda d: d.update(schedule=[]), "'schedule'"),
        (lambda d: d.update(schedule=3), "'schedule'"),
    ],
)
def test_a_bad_schedule_is_named_in_one_sentence(scores: ScoreFile, change, words: str) -> None:
    data = json.loads(scores.to_json())
    change(data)
    with pytest.raises(ProxyqError, match=words) as caught:
        ScoreFile.from_json(data)
    assert "\n" not in str(caught.value)


def test_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    options = ("--activation-bits", "4,8", "--proxy", "activation-mse", "--samples", 32)
    budgets = ("--budget", "activation-memory=2.6KiB", "--budget", "size=6bit")
    done = here("search", *budgets, *options, "--out", out)
    assert done.code == 0, done.err
    assert "activation-memory: " in done.out + done.err
    assert "counted: the peak of live activations" in done.out + done.err
    plan = Plan.load(out)
    bits = {name: layer.activation_bits for name, layer in plan.layers.items()}
    entry = plan.budgets[0]
    assert (entry.name, entry.asked, entry.unit) == ("activation-memory", 2.6, "KiB")
    assert entry.achieved == peak_of(schedule(inspect()), bits) / 8192 <= 2.6
    done = here("search", "--budget", "activation-memory=1KiB", *options)
    assert done.code == 1 and "smallest reachable is 2.188 KiB" in done.err
    shown = json.loads(here("inspect", "--json").out)["activation_memory"]
    assert shown == {"float_bytes": 12 * 1024, "layer": "blocks.0.conv2"}
    assert "at most 12.0 KiB at once, in blocks.0.conv2" in here("inspect").out
