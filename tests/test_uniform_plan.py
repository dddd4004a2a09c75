"""The uniform rival of a plan: the largest widths within the very budgets of the plan."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import small_net

from proxyq.api import evaluate
from proxyq.api.evaluate import uniform_plan
from proxyq.api.quantize import quantize_model
from proxyq.model.network import LAYERS_AT, network
from proxyq.search.allocate import build_problem, solve
from proxyq.search.allocate.latency import load_latency
from proxyq.search.allocate.plan import Plan, PlannedBudget, plan_from

MODEL = small_net()
LAYERS = network(MODEL, LAYERS_AT).layers
COUNT = len(LAYERS)


def plan_of(budgets: Any, bits=(2, 3, 4, 6), record: dict | None = None, **options: Any) -> Plan:
    rng = np.random.default_rng(0)
    cost = rng.lognormal(0, 1, (COUNT, 1)) * 4.0 ** -np.array(bits)
    beside = options.get("activation_bits")
    if isinstance(beside, list):
        scale = rng.lognormal(0, 1, (COUNT, 1))
        options["activation_cost"] = scale * 4.0 ** -np.array(beside, float)
    problem = build_problem(LAYERS, cost, bits, budgets, **options)
    method = {"bits": list(bits), **(record or {})}
    return plan_from(solve(problem), LAYERS, activation_bits=beside, method=method)


def uniform(plan: Plan, **options: Any) -> tuple[set, set]:
    """Weight and activation bits of the layers that are not pinned."""
    found = uniform_plan(MODEL, plan, **options)
    assert found is not None
    free = [layer for layer in found.layers.values() if not layer.pinned]
    return {layer.weight_bits for layer in free}, {layer.activation_bits for layer in free}


def bops(width: int, beside: int) -> int:
    return sum(layer.macs for layer in LAYERS) * width * beside


def test_activations_that_were_given_stay() -> None:
    assert uniform(plan_of("size=3.5bit", activation_bits=8)) == ({3}, {8})
    assert uniform(plan_of(f"bops={bops(4, 8)}", activation_bits=8)) == ({4}, {8})


@pytest.mark.parametrize("record", [None, {"activation_bits": "weights"}])
def test_activations_that_follow_the_weights_go_on_doing_so(record: dict | None) -> None:
    plan = plan_of(
        ["bops=30%"], bits=(4, 8), activation_bits="weights", pins=["@first=8"], record=record
    )
    assert len(set(plan.bits().values())) == 2
    widths, beside = uniform(plan)
    # Least: 16 a MAC, greatest: 64; 30 % of the way are 30.4, which 5 x 5 keeps and 6 x 6 not.
    assert widths == beside == {5}
    found = uniform_plan(MODEL, plan)
    assert found is not None
    first = next(iter(plan.layers))
    assert found.layers[first] == plan.layers[first]


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        ([f"bops={bops(3, 4)}"], (3, 4)),
        ([f"bops={bops(4, 4)}"], (4, 4)),
        ([f"bops={bops(3, 3)}", "size=6bit"], (3, 3)),
        (["size=3bit"], (3, 6)),
        ([f"bops={bops(3, 4)}", "size=2.5bit"], (2, 6)),
    ],
)
def test_activations_that_were_chosen_get_one_width(budgets: list, expected: tuple) -> None:
    listed = [2, 3, 4, 6]
    for record in (None, {"activation_bits": listed}):
        plan = plan_of(budgets, activation_bits=listed, record=record)
        width, beside = expected
        if record is None:  # no more than the plan itself has
            beside = min(beside, max(x.activation_bits or 0 for x in plan.layers.values()))
        assert uniform(plan) == ({width}, {beside})


def test_a_share_is_of_the_searchs_own_ends() -> None:
    # Ends at 3 and 8 bits, so 40 % are 5 bits on average: the candidates alone could not tell.
    stays = np.ones((COUNT, 3), bool)
    stays[:, 0] = False
    plan = plan_of("size=40%", bits=(2, 3, 8), allowed=stays)
    assert uniform(plan)[0] == {5}
    everything = plan_of("size=100%", bits=(2, 3, 8))
    assert uniform(everything)[0] == {8}
    assert uniform(plan_of("size=0%", bits=(2, 3, 8)))[0] == {2}


def test_latency_needs_its_table(tmp_path: Path) -> None:
    rows = [{"weight_bits": b, "activation_bits": 8, "seconds": 1e-6 * b} for b in (2, 3, 4, 6)]
    file = tmp_path / "table.json"
    content = {"schema": "proxyq/latency/1", "layers": {layer.name: rows for layer in LAYERS}}
    file.write_text(json.dumps(content))
    table = load_latency(file)
    for budget in (f"latency={4.5 * COUNT}us", "latency=60%"):
        plan = plan_of(budget, activation_bits=8, latency=table)
        assert uniform_plan(MODEL, plan) is None
        assert uniform(plan, latency=table) == ({4}, {8})


def test_a_budget_of_a_version_to_come_has_no_rival() -> None:
    plan = plan_of("size=3bit")
    strange = PlannedBudget(name="energy", asked=3, achieved=2, unit="J")
    assert uniform_plan(MODEL, plan.model_copy(update={"budgets": [strange]})) is None


def test_chosen_activations_run_and_are_measured() -> None:
    rng = np.random.default_rng(1)
    images = rng.random((24, *MODEL.input_shape)).astype(np.float32)
    labels = np.asarray(MODEL(images)).argmax(axis=1)
    plan = plan_of([f"bops={bops(4, 4)}"], activation_bits=[2, 4, 6], pins=["@last=6/6"])
    assert len({layer.activation_bits for layer in plan.layers.values()}) > 1
    quantized = quantize_model(MODEL, plan, images, correction="none")
    widths = {name: layer.activation_bits for name, layer in plan.layers.items()}
    for index, site in enumerate(network(MODEL, LAYERS_AT).sites):
        grid = quantized.edits[index].input_grid
        assert grid is not None
        assert float(grid.upper - grid.lower) == 2 ** (widths[site.layer] or 0) - 1
    data = (images, labels)
    found = evaluate(MODEL, [plan], data, data, correction="none").to_json()
    # The pinned layer takes a little more than 4 x 4: what is left is 3 x 5 a MAC.
    assert (found["uniform"]["bits"], found["uniform"]["activation_bits"]) == (3, 5)
