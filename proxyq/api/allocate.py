"""`allocate`: bits from scores that were measured before, without the model."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from proxyq.api.method import as_attention_bits, method_of
from proxyq.api.problem import bits_record, problem_from
from proxyq.errors import UsageError
from proxyq.model.layers import Layer
from proxyq.provenance import provenance
from proxyq.proxies import Scores
from proxyq.proxies.cost import NEED_ERRORS, check_cost, cost_name
from proxyq.search.allocate import Assignment, Problem, solve
from proxyq.search.allocate.latency import LatencyTable, load_latency
from proxyq.search.allocate.plan import Plan, plan_from
from proxyq.search.allocate.products import Multiplied
from proxyq.search.allocate.together import together
from proxyq.search.scores_file import ScoreFile


def allocate(
    scores: ScoreFile | str | os.PathLike[str],
    budget: str | Sequence[str],
    *,
    proxy: str | None = None,
    cost: str | None = None,
    activation_bits: int | str | Sequence[int] | None = None,
    attention_bits: int | str | None = None,
    pins: Sequence[str] = (),
    ties: Sequence[str] = (),
    unties: Sequence[str] = (),
    candidates: Sequence[str] = (),
    solver: str | None = None,
    time_limit: float = 60.0,
    latency: str | os.PathLike[str] | LatencyTable | None = None,
    correction: str | None = None,
) -> Plan:
    """A bit-width for every layer by `scores`, within hard budgets.

    **Arguments:**

    - `scores`: what `score` gives, or its file. `proxy`: whose, where there are several.
    - `activation_bits`: as for `search`; `None` is what the scores were measured for, and a
      list must be of those. `attention_bits`: likewise.
    - All others: as for `search`.

    **Returns** the `Plan` that `search` would find by the same method.

    **Raises** `UsageError` for wrong arguments, `InfeasibleError` when no plan fits.
    """
    found = allocation(
        scores,
        budget,
        proxy=proxy,
        cost=cost,
        activation_bits=activation_bits,
        attention_bits=attention_bits,
        pins=pins,
        ties=ties,
        unties=unties,
        candidates=candidates,
        solver=solver,
        latency=latency,
        correction=correction,
    )
    return found.plan(solve(found.problem, found.solver, time_limit=time_limit))


@dataclass(frozen=True, kw_only=True, eq=False)
class Allocation:
    """What is to be solved and by what, and what a plan holds beside the answer."""

    problem: Problem
    solver: str
    layers: tuple[Layer, ...]
    record: Mapping[str, Any]

    def plan(self, answer: Assignment) -> Plan:
        """The plan of an answer to the problem."""
        return plan_from(answer, self.layers, **self.record)


def allocation(
    scores: ScoreFile | str | os.PathLike[str],
    budget: str | Sequence[str],
    *,
    proxy: str | None = None,
    cost: str | None = None,
    activation_bits: int | str | Sequence[int] | None = None,
    attention_bits: int | str | None = None,
    pins: Sequence[str] = (),
    ties: Sequence[str] = (),
    unties: Sequence[str] = (),
    candidates: Sequence[str] = (),
    solver: str | None = None,
    latency: str | os.PathLike[str] | LatencyTable | None = None,
    correction: str | None = None,
) -> Allocation:
    """What `allocate` solves, by the same arguments; raises what it raises but for the solver."""
    if not isinstance(scores, ScoreFile):
        scores = ScoreFile.load(scores)
    if not budget:
        raise UsageError("give at least one budget, such as 'size=3bit' (--budget).")
    if not isinstance(budget, Sequence):
        raise UsageError(f"`budget` must be text such as 'size=3bit', got {budget!r}.")
    one, found = scores.record(proxy), scores.of(proxy)
    # What is given is checked as `search` does it; the proxy need not be installed here.
    cost = cost or "auto"
    check_cost(cost)
    method = method_of(
        activation_bits=scores.activation_bits if activation_bits is None else activation_bits,
        correction=correction,
        solver=solver,
    )
    beside = method.activation_bits
    if isinstance(beside, tuple) and found.activations is not None:
        found = _activations_among(found, beside)
    layers, products = found.layers, _products(scores, attention_bits)
    rounded = {own.bits for own in products.values() if own.bits is not None}
    name = cost_name(found, cost)
    joined = together(layers, ties, unties, scores.same_feature)
    problem = problem_from(
        layers,
        found,
        budget,
        cost=cost,
        errors=scores.errors() if name in NEED_ERRORS else None,
        counted_once=joined.counted_once,
        shared=joined.shared,
        activation_bits=beside,
        pins=pins,
        ties=joined.patterns,
        candidates=candidates,
        latency=load_latency(latency) if isinstance(latency, (str, os.PathLike)) else latency,
        schedule=scores.steps(),
        attention=products,
    )
    record = {
        "model": scores.model,
        "method": {
            "proxy": found.proxy,
            "recipe": None,
            "options": dict(found.options),
            "cost": name,
            **bits_record(layers, found.bits),
            "activation_bits": list(beside) if isinstance(beside, tuple) else beside,
            **({"attention_bits": max(rounded)} if rounded else {}),
            "rounding": dict(scores.rounding),
            "correction": method.correction,
            "samples": scores.samples if one.images else 0,
        },
        "activation_bits": None if isinstance(beside, tuple) else beside,
        "attention": products,
        "provenance": _provenance(scores, one.images),
        "predicted": {"scores": dict(one.values)},
    }
    return Allocation(problem=problem, solver=method.solver, layers=layers, record=record)


def _products(scores: ScoreFile, attention_bits: int | str | None) -> dict[str, Multiplied]:
    """The products of two activations, at the bits that are asked for or else as the file has."""
    bits = as_attention_bits(attention_bits)
    if bits is not None and not scores.attention:
        raise UsageError(
            "`attention_bits` (--attention-bits) is for products of two activations, and the "
            "scores are of a network without, or of an older version: leave it out."
        )
    return {
        name: Multiplied(own.macs, own.bits if attention_bits is None else bits)
        for name, own in scores.attention.items()
    }


def _activations_among(scores: Scores, chosen: tuple[int, ...]) -> Scores:
    """The scores with costs of the `chosen` activation bits alone."""
    assert scores.activations is not None
    known = scores.activation_bits
    for bits in chosen:
        if bits not in known:
            raise UsageError(
                f"the scores hold no cost of {bits} activation bits, only of "
                f"{', '.join(map(str, known)) or 'none'}: score again with --activation-bits."
            )
    columns = [known.index(bits) for bits in chosen]
    coupling = scores.coupling
    if coupling is not None:
        widths, each = len(scores.bits), len(scores.bits) + len(known)
        kept = np.array([*range(widths), *(widths + k for k in columns)])
        rows = (np.arange(len(scores.layers))[:, None] * each + kept).ravel()
        coupling = coupling[np.ix_(rows, rows)]
    return replace(
        scores,
        activations=scores.activations[:, columns],
        activation_bits=chosen,
        coupling=coupling,
    )


def _provenance(scores: ScoreFile, images: bool) -> dict[str, Any]:
    """Of this run; of the run that scored, the seed, the data, and versions that differ."""
    record = provenance(seed=scores.seed, data=scores.provenance.get("data") if images else None)
    measured_with = scores.provenance.get("versions")
    if measured_with not in (None, record["versions"]):
        record["scores"] = {"versions": measured_with}
    return record
