"""plan.json: exact round trips, stable bytes, and one sentence about whatever is wrong."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyq.errors import ProxyqError
from proxyq.search.allocate import build_problem, solve
from proxyq.search.allocate.plan import Plan, plan_from


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
    Layer("größe", 640, 640),
)


def make(**fields: Any) -> Plan:
    cost = np.outer([3, 1, 2, 2], [1.0, 0.5, 0.1])
    budgets = ["size=3bit", "bops=2.5G"]
    problem = build_problem(LAYERS, cost, (2, 4, 8), budgets, pins=["stem=8"], activation_bits=8)
    base = {"model": {"name": "net", "shape": (3, 32, 32)}, "method": {"proxy": "snip", "beta": 3}}
    return plan_from(solve(problem), LAYERS, activation_bits=8, **{**base, **fields})


def test_the_file_is_the_contract(tmp_path: Path) -> None:
    make(provenance={"seed": 0}).save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert list(data) == [
        "schema",
        "model",
        "method",
        "layers",
        "budgets",
        "solver",
        "provenance",
    ]
    assert data["schema"] == "proxyq/plan/1"
    assert list(data["layers"]) == [layer.name for layer in LAYERS]
    assert data["layers"]["stem"] == {
        "weight_bits": 8,
        "activation_bits": 8,
        "weights": 864,
        "macs": 884_736,
        "group": None,
        "pinned": True,
    }
    assert [(b["name"], b["asked"], b["unit"]) for b in data["budgets"]] == [
        ("size", 3, "bit"),
        ("bops", 2.5, "G"),
    ]
    assert all(b["achieved"] <= b["asked"] for b in data["budgets"])
    assert set(data["solver"]) == {"name", "status", "objective", "bound", "gap", "seconds"}
    assert data["solver"]["status"] == "optimal"


def test_round_trips_are_exact_and_bytes_stable(tmp_path: Path) -> None:
    plan = make(method={"z": 1, "a": {"c": 0.1, "b": None}, "correction": "statistics"})
    path = plan.save(tmp_path / "plan.json")
    again = Plan.load(path)
    assert again == plan
    assert again.save(tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert list(again.layers) == [layer.name for layer in LAYERS]
    other = make(method={"correction": "statistics", "a": {"b": None, "c": 0.1}, "z": 1})
    assert other.model_copy(update={"solver": None}).to_json() == (
        plan.model_copy(update={"solver": None}).to_json()
    )


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20),
        st.tuples(
            st.sampled_from([None, 1, 2, 3, 4, 5, 6, 7, 8, 16]),
            st.integers(0, 10**15),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | st.text(),
        lambda leaf: st.lists(leaf, max_size=3) | st.dictionaries(st.text(), leaf, max_size=3),
        max_leaves=8,
    ),
)
def test_any_plan_survives_the_file(tmp_path_factory, layers: dict, anything: Any) -> None:
    plan = Plan(
        layers={  # type: ignore[arg-type]
            name: {"weight_bits": bits, "weights": count, "macs": count, "pinned": pinned}
            for name, (bits, count, pinned) in layers.items()
        },
        method={"anything": anything},
        predicted={"loss": 0.5},
        measured={"top1": 93.1},
    )
    path = plan.save(tmp_path_factory.mktemp("plan") / "plan.json")
    again = Plan.load(path)
    assert again == plan and again.to_json() == path.read_text(encoding="utf-8")
    assert list(again.layers) == list(layers)


def test_what_a_plan_tells() -> None:
    plan = make()
    bits = plan.bits()
    assert plan.size_bits == sum(layer.weights * bits[layer.name] for layer in LAYERS)
    free = [layer for layer in LAYERS if layer.name != "stem"]
    average = sum(layer.weights * bits[layer.name] for layer in free) / sum(
        layer.weights for layer in free
    )
    assert plan.average_bits == average == plan.budgets[0].achieved
    floating = Plan(layers={"a": {"weight_bits": None, "weights": 10, "macs": 1}})  # type: ignore[arg-type]
    assert floating.size_bits == 320 and floating.average_bits == 32
    text = str(plan)
    assert text.startswith("optimal · ilp · size ") and "* pinned" in text
    assert all(len(line) <= 88 for line in text.splitlines())
    assert "4 layers" in repr(plan)


def test_activation_bits_by_layer() -> None:
    cost = np.zeros((4, 1))
    answer = solve(build_problem(LAYERS, cost, (4,)))
    plan = plan_from(answer, LAYERS, activation_bits={"stem": 8, "b.conv1": 4})
    assert [layer.activation_bits for layer in plan.layers.values()] == [8, 4, None, None]
    with pytest.raises(ProxyqError, match="not those"):
        plan_from(answer, LAYERS[:2])
    with pytest.raises(ProxyqError, match=r"'method': .*plain JSON"):
        plan_from(answer, LAYERS, method={"loss": float("nan")})
    with pytest.raises(ProxyqError, match=r"'provenance': .*plain JSON"):
        plan_from(answer, LAYERS, provenance={"model": object()})


def test_activation_bits_that_were_chosen() -> None:
    problem = build_problem(
        LAYERS,
        np.outer([3, 1, 2, 2], [1.0, 0.5, 0.1]),
        (2, 4, 8),
        "bops=500M",
        pins=["stem=8/float"],
        activation_bits=[4, 8],
        activation_cost=np.outer([1, 4, 1, 2], [0.8, 0.2]),
    )
    answer = solve(problem)
    # What was chosen wins over what the caller says of all layers.
    plan = plan_from(answer, LAYERS, activation_bits=[4, 8])
    assert plan.layers["stem"].activation_bits is None and plan.layers["stem"].pinned
    chosen = [layer.activation_bits for layer in plan.layers.values()]
    assert tuple(chosen) == answer.activation_bits and set(chosen) == {None, 4, 8}
    bops = sum(
        layer.macs * (layer.weight_bits or 32) * (layer.activation_bits or 32)
        for layer in plan.layers.values()
    )
    assert plan.budgets[0].achieved == bops / 1e6 <= 500
    assert Plan.from_json(json.loads(plan.to_json())) == plan
    with pytest.raises(ProxyqError, match=r"bad field 'activation_bits'"):
        plan_from(solve(build_problem(LAYERS, np.zeros((4, 1)), (4,))), LAYERS, activation_bits=[4])


def test_shares_keep_what_they_are_shares_of() -> None:
    problem = build_problem(
        LAYERS, np.outer([3, 1, 2, 2], [1.0, 0.5, 0.1]), (2, 4, 8), ["size=40%", "bops=3G"]
    )
    plan = plan_from(solve(problem), LAYERS)
    weights = sum(layer.weights for layer in LAYERS)
    share, bops = plan.budgets
    assert (share.asked, share.unit, share.low, share.high) == (40, "%", 2 * weights, 8 * weights)
    # size = low + achieved (high - low)
    assert plan.size_bits == pytest.approx(weights * (2 + 6 * share.achieved / 100))
    assert bops.low is None and '"low"' not in plan.to_json().split('"bops"')[1]
    assert Plan.from_json(json.loads(plan.to_json())) == plan
    # On its own it is the raw amount, whatever the candidates are then.
    raw = share.budget()
    assert raw.amount * raw.per_unit(0) == problem.limits[0].budget
    assert bops.budget().amount == 3
    assert "size" in str(plan) and "of 40 %" in str(plan)


def damaged(change) -> dict:
    data = json.loads(make().to_json())
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("schema"), r"'schema' must be 'proxyq/plan/1', got None"),
        (lambda d: d.update(schema="proxyq/scores/1"), "got 'proxyq/scores/1'"),
        (lambda d: d.update(schema="proxyq/plan/2"), "does not read.*use the version"),
        (lambda d: d.pop("layers"), "'layers': it is missing"),
        (lambda d: d.update(layers={}), "'layers'"),
        (lambda d: d.update(layers=[1]), "'layers'"),
        (lambda d: d.update(extra=1), "'extra': no such field"),
        (lambda d: d["layers"]["stem"].update(weight_bits=9), r"'layers\.stem\.weight_bits'.*9"),
        (lambda d: d["layers"]["stem"].update(weight_bits=0), r"'layers\.stem\.weight_bits'.*0"),
        (lambda d: d["layers"]["stem"].update(weight_bits="4"), r"'layers\.stem\.weight_bits'"),
        (lambda d: d["layers"]["stem"].update(weight_bits=4.0), r"'layers\.stem\.weight_bits'"),
        (lambda d: d["layers"]["stem"].update(weight_bits=True), r"'layers\.stem\.weight_bits'"),
        (lambda d: d["layers"]["stem"].pop("weight_bits"), r"weight_bits': it is missing"),
        (lambda d: d["layers"]["stem"].update(activation_bits=12), "activation_bits'.*12"),
        (lambda d: d["layers"]["stem"].update(weights=-1), r"'layers\.stem\.weights'.*-1"),
        (lambda d: d["layers"]["stem"].update(macs=1.5), r"'layers\.stem\.macs'"),
        (lambda d: d["layers"]["stem"].update(pinned="yes"), "pinned"),
        (lambda d: d["layers"]["stem"].update(colour=1), r"'layers\.stem\.colour': no such"),
        (lambda d: d["solver"].update(status="lucky"), r"'solver\.status'.*'optimal'"),
        (lambda d: d["solver"].update(objective=float("nan")), r"'solver\.objective'.*finite"),
        (lambda d: d["budgets"][0].update(asked="3"), r"'budgets\.0\.asked'"),
        (lambda d: d["budgets"][0].update(unit="%"), r"'budgets\.0'.*'low' <= 'high'"),
        (lambda d: d["budgets"][0].update(unit="%", low=3, high=2), r"'budgets\.0'.*'low'"),
        (lambda d: d["budgets"][0].update(low=-1), r"'budgets\.0\.low'.*-1"),
        (lambda d: d.update(method=3), "'method'"),
        (lambda d: d["model"].update(x=float("inf")), "'model'.*plain JSON"),
    ],
)
def test_a_bad_field_is_named_in_one_sentence(tmp_path: Path, change, words: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(damaged(change)))
    with pytest.raises(ProxyqError, match=words) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("content", ["", "[]", "3", "{", "null", "\ufeff{}"])
def test_what_is_no_plan_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(ProxyqError, match="plan"):
        Plan.load(path)


def test_a_plan_cut_short_is_refused_at_every_length(tmp_path: Path) -> None:
    text = make().to_json().encode()
    path = tmp_path / "plan.json"
    for length in range(0, len(text) - 2, 7):
        path.write_bytes(text[:length])
        with pytest.raises(ProxyqError):
            Plan.load(path)
    with pytest.raises(ProxyqError, match="cannot read the plan"):
        Plan.load(tmp_path / "missing.json")


def test_plans_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make().model = {}
