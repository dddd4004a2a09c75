"""Refinement: re-measure single changes around a plan, propose exchanges, keep what is better.

A round measures every other choice of every layer in the network of the plan (anchored, so that
what saturates or couples there is seen), and predicts, of the divergence D that the judge goes by
(KL, and of a wrecked plan KL up to the scale of the logits),

    D(plan with changes S)  ~  D(plan) + sum_{a in S} (D(plan with a alone) - D(plan))

Solving that within all budgets, with at most 2, 3, 4, 6, 9 changes since it is local, gives
candidates; so do the best predicted exchanges of two layers. Each is run, corrected as it will
be used. Those that lower the divergence most on the images that they were found on are run on
images held back, against over-fitting, and are plans to go on from where they are better there
too.

The next round begins at the best plan from which none began yet: best first, so that a round
which finds nothing is not the end.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from proxyq.auto.judge import Judge, Verdict
from proxyq.auto.portfolio import sweep_passes
from proxyq.engine import single_layer_sweep
from proxyq.engine.alternatives import choices
from proxyq.engine.divergence import kl_divergence, rescaled_divergence
from proxyq.engine.loss import Loss
from proxyq.progress import Progress, silent
from proxyq.ptq.plan_edits import Choice
from proxyq.search.allocate import InfeasibleError, Limit, Problem, solve
from proxyq.search.allocate.assignment import used

CHANGES = (2, 3, 4, 6, 9)
EXCHANGES = 20
AT_LEAST = 3
"""Proposals that a round tries even if time is over: its sweep was the larger part."""
CHECKED = 6
"""So many of a round's proposals, the best on the fitted images, are run on those held back."""
PATIENCE = 3
"""Rounds in a row that find no better plan, after which there is none to be found."""

Spell = Callable[[Sequence[int]], list[Choice]]
"""Columns of a problem as bits, layer by layer."""


class Reached(NamedTuple):
    """A plan's columns, its verdict, and the number of the start that it was reached from."""

    choice: tuple[int, ...]
    verdict: Verdict
    origin: int


@dataclass(frozen=True, kw_only=True)
class Refined:
    """All plans that are better than the one they came from, and the starts: the best first."""

    reached: tuple[Reached, ...]
    rounds: int
    tried: int

    @property
    def choice(self) -> tuple[int, ...]:
        """Columns of the best plan."""
        return self.reached[0].choice

    @property
    def verdict(self) -> Verdict:
        """What the best plan measured."""
        return self.reached[0].verdict


def refine(
    judge: Judge,
    problem: Problem,
    starts: Sequence[Sequence[int]],
    spell: Spell,
    bits: Sequence[int],
    activation_bits: Sequence[int] = (),
    *,
    rounds: int = 2,
    deadline: float = float("inf"),
    progress: Progress = silent,
) -> Refined:
    """The best plans found from any of `starts` on, within all limits of `problem`.

    - `starts`: a round begins at each, as far as `rounds` go; then from the best plan on.
    - `spell`: what columns stand for; `bits`, `activation_bits`: what is re-measured.
    - `deadline`: of `time.perf_counter()`; a round that has begun tries its first few proposals.
    """
    origin = {}
    for number, start in enumerate(starts):
        origin.setdefault(tuple(start), number)
    verdicts = {plan: judge.measure(spell(plan)) for plan in origin}

    def worth(plan: tuple[int, ...]) -> tuple[Loss, int]:
        return verdicts[plan].held_back, origin[plan]

    waiting, begun = list(origin), set[tuple[int, ...]]()
    tried = done = idle = 0
    while done < rounds and idle < PATIENCE and time.perf_counter() < deadline:
        unseen = [plan for plan in verdicts if plan not in begun]
        if not unseen:
            break
        plan = waiting.pop(0) if waiting else min(unseen, key=worth)
        begun.add(plan)
        best = min(verdicts, key=worth)
        done += 1
        change = anchored(judge, problem, plan, spell, bits, activation_bits, progress=progress)
        fitted: dict[tuple[int, ...], Loss] = {}
        for number, candidate in enumerate(proposals(problem, plan, change)):
            if number >= AT_LEAST and time.perf_counter() >= deadline:
                break
            tried += 1
            if candidate not in verdicts:
                fitted[candidate] = judge.fitted(spell(candidate))
        better = [one for one in fitted if fitted[one] < verdicts[plan].fitted]
        for candidate in sorted(better, key=fitted.__getitem__)[:CHECKED]:
            found = judge.measure(spell(candidate))
            if found.held_back < verdicts[plan].held_back:
                verdicts[candidate], origin[candidate] = found, origin[plan]
        idle = 0 if waiting or min(verdicts, key=worth) != best else idle + 1
    reached = (Reached(plan, verdicts[plan], origin[plan]) for plan in sorted(verdicts, key=worth))
    return Refined(reached=tuple(reached), rounds=done, tried=tried)


def round_passes(judge: Judge, bits: Sequence[int], activation_bits: Sequence[int] = ()) -> float:
    """Forward passes of all `fit` images that a round takes, about."""
    return sweep_passes(judge, bits, activation_bits) + judge.trial_passes * (
        len(CHANGES) + EXCHANGES
    )


def anchored(
    judge: Judge,
    problem: Problem,
    choice: Sequence[int],
    spell: Spell,
    bits: Sequence[int],
    activation_bits: Sequence[int] = (),
    *,
    progress: Progress = silent,
) -> np.ndarray:
    """`[layers, columns]`: the rise of divergence when a layer of the plan takes another column.

    A column that changes weight and input at once is predicted to cost the sum.
    """
    plan = spell(choice)
    base = judge.edits(plan)
    engine = judge.engine
    alternatives = choices(
        engine,
        judge.fit,
        bits,
        activation_bits,
        rounding=judge.rounding,
        correction=judge.correction,
        base=base,
        moments=judge.moments if judge.correction == "statistics" else None,
        progress=progress,
    )
    # A change of the weight leaves the layer's input as the plan has it, and the other way round;
    # both leave the products of two activations after it.
    for own in alternatives.values():
        for k, edits in enumerate(own):
            for site, edit in edits.items():
                kept = base.get(site)
                if kept is None:
                    continue
                if k < len(bits):
                    beside = {"input_grid": kept.input_grid, "attention": kept.attention}
                    edits[site] = edit._replace(**beside)
                else:
                    edits[site] = kept._replace(input_grid=edit.input_grid)

    base_loss = judge.measure(plan).fitted
    divergence = rescaled_divergence if base_loss.wrecked else kl_divergence

    def measure(reference: np.ndarray, logits: np.ndarray, start: int) -> np.ndarray:
        del start
        return divergence(reference, logits)

    table = single_layer_sweep(
        engine, judge.fit, alternatives, measure, base=base, progress=progress
    )
    judge.passes += sweep_passes(judge, bits, activation_bits)
    now = base_loss.rescaled if base_loss.wrecked else base_loss.kl
    rise = np.zeros(problem.cost.shape)
    at: dict[int | None, int] = {b: k for k, b in enumerate(bits)}
    at_beside: dict[int | None, int] = {a: len(bits) + k for k, a in enumerate(activation_bits)}
    for layer, own in enumerate(plan):
        for column in range(len(problem.bits)):
            width, beside = _column(problem, column, own)
            if width != own[0] and width in at:
                rise[layer, column] += table[layer, at[width]] - now
            if beside != own[1] and beside in at_beside:
                rise[layer, column] += table[layer, at_beside[beside]] - now
    return rise


def _column(problem: Problem, column: int, own: Choice) -> Choice:
    beside = own[1] if problem.activation_bits is None else problem.activation_bits[column]
    return problem.widths[column], beside


def proposals(problem: Problem, choice: Sequence[int], rise: np.ndarray) -> list[tuple[int, ...]]:
    """Plans within all limits near `choice`, by what single changes are measured to cost."""
    layers, columns = problem.cost.shape
    moved = np.ones((layers, columns), np.int64)
    moved[np.arange(layers), list(choice)] = 0
    found: dict[tuple[int, ...], None] = {}
    separable = replace(problem, cost=np.where(problem.allowed, rise, 0.0), coupling=None)
    for most in CHANGES:
        near = Limit(name="changes", usage=moved, budget=most)
        try:
            answer = solve(replace(separable, limits=(*problem.limits, near)), time_limit=5.0)
        except InfeasibleError:  # pragma: no cover - the plan itself keeps all limits
            continue
        found[answer.choice] = None
    for exchange in _exchanges(separable, choice, rise):
        found[exchange] = None
    found.pop(tuple(choice), None)
    return list(found)


def _exchanges(problem: Problem, choice: Sequence[int], rise: np.ndarray) -> list[tuple[int, ...]]:
    """The best predicted changes of one decision or two, within all limits."""
    units = problem.decisions
    owner, column = np.array(
        [
            (u, k)
            for u, unit in enumerate(units)
            for k in range(len(problem.bits))
            if k != choice[unit[0]] and problem.allowed[list(unit), k].all()
        ]
        or np.zeros((0, 2), int)
    ).T
    if not len(owner):
        return []
    cost = np.array([rise[list(units[u]), k].sum() for u, k in zip(owner, column, strict=True)])
    change = np.array(
        [
            [sum(int(limit.usage[i, k]) - int(limit.usage[i, choice[i]]) for i in units[u])
             for u, k in zip(owner, column, strict=True)]
            for limit in problem.limits
        ],
        np.int64,
    ).reshape(len(problem.limits), -1)  # fmt: skip
    room = np.array([limit.budget - used(limit, choice) for limit in problem.limits], np.int64)
    # One move alone stands on the diagonal, two of one decision nowhere.
    total = cost[:, None] + cost[None]
    np.fill_diagonal(total, cost)
    fits = (owner[:, None] != owner[None]) | np.eye(len(owner), dtype=bool)
    for own, free in zip(change, room, strict=True):
        taken = own[:, None] + own[None]
        np.fill_diagonal(taken, own)
        fits &= taken <= free
    total = np.where(np.triu(fits), total, np.inf)
    found = []
    for place in np.argsort(total, axis=None, kind="stable")[:EXCHANGES]:
        a, b = divmod(int(place), len(owner))
        if not np.isfinite(total[a, b]):
            break
        changed = list(choice)
        for move in (a, b):
            for i in units[owner[move]]:
                changed[i] = int(column[move])
        found.append(tuple(changed))
    return found
