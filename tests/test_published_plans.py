"""Published plans, sizes and operation counts, recomputed from the definitions."""

import json
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from architectures import Conv, Network, mobilenetv2, resnet18, resnet50

from proxyq.search.allocate import Assignment, InfeasibleError, Limit, Problem, solve
from proxyq.search.allocate.lp import relax, round_
from proxyq.search.allocate.reduce import reduce

MIB = 8 * 2**20


def network(name: str) -> Network:
    return {"resnet18": resnet18, "resnet50": resnet50, "mobilenetv2": mobilenetv2}[
        name.split("_")[0]
    ]()


def ptq_entries(net: Network) -> list[list[Conv]]:
    """What one entry of a published PTQ list stands for."""
    return [[net.stem], *net.entries(), [net.classifier]]


def ptq_lists(published: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Network, size in MiB and entry of every PTQ list of both methods."""

    def walk(found: dict[str, Any], name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for key, value in found.items():
            if "weight_bits" in value:
                yield name, key, value
            else:
                yield from walk(value, name or key)

    for method in ("ompq", "csmpq"):
        yield from walk(published[method]["ptq"], "")


def test_the_tables_are_the_known_architectures() -> None:
    def weights(net: Network) -> int:
        entries = [conv for entry in ptq_entries(net) for conv in entry]
        return sum(conv.weights for conv in entries)

    def macs(net: Network) -> int:
        return sum(conv.macs for entry in ptq_entries(net) for conv in entry)

    # torchvision's counts: convolutions and classifier weights; GMACs at 224.
    assert weights(resnet18()) == 11_678_912
    assert weights(resnet50()) == 25_502_912
    assert weights(mobilenetv2()) == 3_469_760
    assert macs(resnet18()) == 1_814_073_344
    assert macs(resnet50()) == 4_089_184_256
    assert macs(mobilenetv2()) == 300_774_272


def qat_figures(net: Network, config: dict[str, Any], *, act: int, repo_tables: bool):
    """Size in MiB and BOPs in G of a QAT plan, stem and classifier at 8 × 8 bits.

    `repo_tables` repeats a slip in the published tables: the first bottleneck convolution of
    ResNet-50's first stage is counted at 112 × 112 instead of 56 × 56.
    """
    ends = (net.stem, net.classifier)
    size = sum(8 * conv.parameters for conv in ends)
    bops = sum(64 * conv.flops() for conv in ends)
    for entry, b in zip(net.entries(), config["main_weight_bits"], strict=True):
        for conv in entry:
            slip = repo_tables and len(net.main) == 48 and conv.name == "layer1.0.conv1"
            size += b * conv.parameters
            bops += b * act * conv.flops(out=112 if slip else None)
    return size / MIB, bops / 1e9


def test_sizes_and_bops_of_the_qat_plans(published: dict[str, Any]) -> None:
    plans = {**published["ompq"]["qat"], **published["csmpq"]["qat"]}
    assert len(plans) == 8
    for name, config in plans.items():
        net, act = network(name), config["main_act_bits"]
        size, bops = qat_figures(net, config, act=act, repo_tables=False)
        assert round(size, 4) == config["size_mib_ompq_formula"], name
        assert round(bops, 2) == config["bops_g_ompq_formula"], name
        _, slipped = qat_figures(net, config, act=act, repo_tables=True)
        assert round(slipped, 2) == config["bops_g_ompq_repo_tables"], name
        _, printed = qat_figures(net, config, act=5, repo_tables=True)
        assert round(printed, 2) == config["bops_g_repo_print_act5"], name
        weights = sum(8 * conv.weights for conv in (net.stem, net.classifier)) + sum(
            b * conv.weights
            for entry, b in zip(net.entries(), config["main_weight_bits"], strict=True)
            for conv in entry
        )
        assert round(weights / MIB, 4) == pytest.approx(
            config["size_mib_conv_fc_weights_only"], abs=1.1e-4
        ), name


def test_sizes_of_the_ptq_plans(published: dict[str, Any]) -> None:
    checked = 0
    for name, size, entry in ptq_lists(published):
        entries = ptq_entries(network(name))
        bits = sum(
            b * conv.parameters
            for convs, b in zip(entries, entry["weight_bits"], strict=True)
            for conv in convs
        )
        assert round(bits / MIB, 4) == entry["size_mib"], (name, size)
        checked += 1
    assert checked == 10 + 12 + 8


def linear(entries, theta, bits: tuple[int, ...], mib: str, fixed: int = 0) -> Problem:
    """OMPQ's program: maximise sum theta_i b_i within a size in MiB, batch norm included."""
    parameters = np.array([sum(conv.parameters for conv in entry) for entry in entries])
    b = np.array(bits)
    limit = Limit(
        name="size",
        usage=np.outer(parameters, b),
        budget=int(Fraction(mib) * MIB),
        fixed=fixed,
        unit="MiB",
        per_unit=Fraction(MIB),
        asked=Fraction(mib),
    )
    return Problem(
        layers=tuple(entry[0].name for entry in entries),
        bits=bits,
        cost=-np.outer(theta, b),
        limits=(limit,),
    )


def nearest(problem: Problem) -> list[int]:
    """Bits rounded to the nearest, over budget or not, as the published code does."""
    reduced = reduce(problem)
    choice = reduced.expand(round_(problem, reduced, relax(problem, reduced), "nearest"))
    return [problem.bits[k] for k in choice]


def test_equal_weights_give_the_mobilenetv2_plans(published: dict[str, Any]) -> None:
    """OMPQ ran MobileNetV2 with beta = 1e-9: all theta are 1, nothing is measured."""
    entries = ptq_entries(mobilenetv2())
    theta = np.ones(len(entries))
    plans = published["ompq"]["ptq"]["mobilenetv2_a8"]
    csmpq = published["csmpq"]["ptq"]["mobilenetv2_a8"]["with_beta"]

    def agree(size: str, list_: dict[str, Any]) -> int:
        bits = nearest(linear(entries, theta, (2, 3, 4), size))
        return sum(a == b for a, b in zip(bits, list_["weight_bits"], strict=True))

    assert [agree(size, plans[size]) for size in ("1.5", "1.3")] == [53, 52]
    assert [agree(size, csmpq[size]) for size in ("1.5", "1.3")] == [53, 53]
    # Beyond, many layers of equal size tie; which of them get the bits is arbitrary.
    assert all(agree(size, plans[size]) >= 46 for size in ("1.1", "0.9"))
    # The published 1.5 MiB plan takes 1.5185 MiB. Ours is repaired, and says so.
    answer = solve(linear(entries, theta, (2, 3, 4), "1.5"), "lp", rounding="nearest")
    assert answer.usage[0] <= 1.5 * MIB
    assert "took 1.519 MiB of size, above the 1.5 MiB asked; 1 layer was" in answer.notes[0]
    assert answer.expected_bits is not None and answer.expected_bits[:3] == (4.0, 4.0, 4.0)


def csmpq_example(published: dict[str, Any], size: str = "6.7") -> Problem:
    net = resnet18()
    fixed = 8 * (net.stem.parameters + net.classifier.parameters)
    theta = np.array(published["csmpq"]["example_scores_resnet18_qat"])
    return linear(net.entries(), theta, (4, 5, 6, 7, 8), size, fixed)


def test_csmpq_example_scores(published: dict[str, Any]) -> None:
    answer = solve(csmpq_example(published), "lp", rounding="closest-below")
    assert answer.bits == (8, 8, 8, 8, 8, 8, 8, 8, 8, 4, 8, 5, 4, 4, 4, 4)
    assert answer.expected_bits is not None
    fractional = [b for b in answer.expected_bits if abs(b - round(b)) > 1e-6]
    assert len(fractional) == 1  # a vertex: one fractional layer for one limit


def test_the_linear_program_follows_its_budget(published: dict[str, Any]) -> None:
    def at(size: str) -> Assignment:
        return solve(csmpq_example(published, size), "lp")

    bounds = [at(size).bound for size in ("5.9", "6.2", "6.7", "8", "10.9", "12")]
    assert bounds == sorted(bounds, reverse=True)
    assert set(at("12").bits) == {8}
    with pytest.raises(InfeasibleError, match="smallest reachable"):
        at("5")
    # The range of ResNet-18's PTQ sizes: all layers at 2 bits, at 4 bits.
    entries = ptq_entries(resnet18())
    theta = np.ones(len(entries))
    assert set(solve(linear(entries, theta, (2, 3, 4), "5.575"), "lp").bits) == {4}
    assert set(solve(linear(entries, theta, (2, 3, 4), "2.7875"), "lp").bits) == {2}
    with pytest.raises(InfeasibleError, match=r"2\.787"):
        solve(linear(entries, theta, (2, 3, 4), "2.78"), "lp")


OBJECTIVES = {
    ("resnet18", "modelsize"): (-1.27427, -1.23321, -1.18941),
    ("resnet18", "bops"): (-1.22775, -1.09202, -0.84729),
    ("resnet18", "latency"): (-1.22775, -1.10504, -0.84729),
    ("resnet50", "modelsize"): (-0.89412, -0.87531, -0.83139),
    ("resnet50", "bops"): (-0.88223, -0.84990, -0.75739),
    ("resnet50", "latency"): (-0.88368, -0.85148, -0.76883),
}


@pytest.mark.parametrize("method", ["ilp", "dp"])
def test_hawq_v3_programs(published: dict[str, Any], method: str) -> None:
    """All 18 optima; 17 published plans are those, ResNet-50 at size 0.25 is one layer short.

    cost = trace × (||dW8||² - ||dW4||²) at 8 bits and 0 at 4; one limit at a time, a share r
    of the way from all 4 to all 8 bits; the downsample convolution and the first one of its
    block are tied.
    """
    hawq = json.loads(json.dumps(published["hawq"]), parse_float=Decimal)
    exact = 0
    for net, inputs in hawq["ilp_inputs"].items():
        v = {
            key: [Fraction(x) for x in value["values"]]
            for key, value in inputs.items()
            if isinstance(value, dict)
        }
        gain = [
            float(trace * (at8 - at4))
            for trace, at8, at4 in zip(
                v["Hutchinson_trace"],
                v["delta_weights_8bit_square"],
                v["delta_weights_4bit_square"],
                strict=True,
            )
        ]
        tables = {
            "modelsize": [(4 * x, 8 * x) for x in v["parameters"]],
            "bops": [(16 * x, 64 * x) for x in v["bops"]],
            "latency": list(zip(v["latency_int4"], v["latency_int8"], strict=True)),
        }
        for kind, table in tables.items():
            whole = np.lcm.reduce([x.denominator for row in table for x in row])
            usage = np.array([[int(x * whole) for x in row] for row in table])
            low, high = (int(column.sum()) for column in usage.T)
            for share, objective in zip(
                ("0.75", "0.5", "0.25"), OBJECTIVES[net, kind], strict=True
            ):
                problem = Problem(
                    layers=tuple(f"slot{i}" for i in range(len(gain))),
                    bits=(4, 8),
                    cost=np.array([[0.0, g] for g in gain]),
                    limits=(
                        Limit(
                            name=kind,
                            usage=usage,
                            budget=low + int((high - low) * Fraction(share)),
                        ),
                    ),
                    groups=tuple(map(tuple, inputs["equal_bit_ties"])),
                )
                answer = solve(problem, method)
                assert round(answer.objective, 5) == objective, (net, kind, share)
                assert answer.status.short == "optimal"
                config = hawq["configs"][net][f"{kind}_{share}"]
                differs = [
                    i
                    for i, (a, b) in enumerate(
                        zip(config["slot_weight_bits"], answer.bits, strict=True)
                    )
                    if a != b
                ]
                exact += not differs
                if differs:
                    reproduction = config["ilp_reproduction"]
                    assert list(answer.bits) == reproduction["ilp_optimum"]
                    assert differs == reproduction["differs_at"] == [39]
    assert exact == 17
