"""`auto`: a portfolio of costs, every plan measured, the best kept."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from proxyq.auto.judge import Judge, Verdict
from proxyq.auto.portfolio import (
    CURVATURE_PASSES,
    curvature_scores,
    free_scores,
    portfolio,
    sweep_passes,
)
from proxyq.auto.refine import Refined, Spell, refine, round_passes
from proxyq.engine.loss import Loss
from proxyq.errors import ProxyqError, UsageError
from proxyq.progress import Progress, silent
from proxyq.proxies import Cache, Scores
from proxyq.ptq.correct import CORRECTIONS
from proxyq.ptq.plan_edits import Choice
from proxyq.search.allocate import Assignment, InfeasibleError, Problem, finish, solve

Effort = Literal["low", "medium", "high"]
HELD_BACK = {"low": 2, "medium": 4, "high": 8}
"""Images held back at most, as a multiple of those that are fitted on. Those beyond what the
judge looks at verify the last few plans."""
ROUNDS = {"low": 0, "medium": 0, "high": 4}
WRECKED_ROUNDS = {"low": 0, "medium": 5, "high": 10}
"""Where even the best plan wrecks the network: what is measured from the float network on tells
little of such a plan, so effort `medium` refines it too."""
STARTS = 3
"""So many plans are refined where even the best is a wreck: which of them leads furthest is
not the one that measures best."""
VERIFIED = 4
"""So many plans, the best, are run on the images in reserve."""
ENDLESS = 1_000_000
COUPLED_NODES = 50
"""Of the tree for a coupled candidate: its plan is found before the first; a proof is not needed
to measure it, and a bound on work gives the same plan on every machine."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan that a cost proposes: what is predicted of it, and what it does."""

    scores: Scores
    problem: Problem
    answer: Assignment
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The plan that measured best: the scores that proposed it, its answer (refined or not), the
    correction that goes with it, and a report in plain JSON."""

    scores: Scores
    answer: Assignment
    correction: str
    report: dict[str, Any]


def check_effort(effort: str) -> str:
    """Refuse an effort that does not exist."""
    if effort not in HELD_BACK:
        raise UsageError(f"`effort` must be one of {', '.join(HELD_BACK)}, got {effort!r}.")
    return effort


def spelled(problem: Problem, fixed: Sequence[int | None]) -> Spell:
    """Columns of a problem as bits; `fixed` activation bits where it does not choose them."""

    widths, beside = problem.widths, problem.activation_bits

    def spell(choice: Sequence[int]) -> list[Choice]:
        return [
            (widths[k], fixed[i] if beside is None else beside[k]) for i, k in enumerate(choice)
        ]

    return spell


def choose(
    judge: Judge,
    problem_of: Callable[[Scores], Problem],
    bits: Sequence[int],
    activation_bits: Sequence[int] = (),
    fixed: Sequence[int | None] = (),
    *,
    correction: str = "auto",
    effort: str = "medium",
    solver: str = "auto",
    time_limit: float = 60.0,
    time_budget: float | None = None,
    refine_seconds: float = 0.0,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> Outcome:
    """The plan that diverges least from the float network, of those that many costs propose.

    1. `output-error`, `sqnr` and `restored-error`, which cost a few forward passes, propose a
       plan each; the corrections of layer statistics are compared on the first
       (`correction="auto"`).
    2. From effort `medium` on, curvature gives one more, and one sweep over single layers,
       corrected likewise, the costs of the `portfolio`, each of which proposes a plan.
    3. The best is refined at effort `high`, or for `refine_seconds`. Where it wrecks the network
       (`Loss.wrecked`), the best few are, at effort `medium` too.
    4. Where the judge has images in reserve, as at effort `high`, the best few of all plans are
       verified on them.

    Every plan is measured on images held back. `problem_of` turns scores into the problem with
    its budgets; `cache` keeps the sweep. `time_budget` seconds bound steps 2 and 3: what would
    take longer, by the forward passes timed in step 1, is left out, which the report says.
    """
    started = time.perf_counter()
    left = float("inf") if time_budget is None else time_budget
    candidates: list[Candidate] = []
    notes: list[str] = []

    def propose(scores: Sequence[Scores]) -> None:
        for own in scores:
            problem = problem_of(own)
            seconds = min(time_limit, max(started + left - time.perf_counter(), 1.0))
            if own.coupling is None:
                answer = solve(problem, solver, time_limit=seconds)
            else:
                answer = solve(problem, "iqp", time_limit=seconds, nodes=COUPLED_NODES)
            verdict = judge.measure(spelled(problem, fixed)(answer.choice))
            candidates.append(
                Candidate(scores=own, problem=problem, answer=answer, verdict=verdict)
            )

    # Held-back loss of the first plan under each correction sets the judge's.
    free = free_scores(judge, bits, activation_bits)
    first = problem_of(free[0])
    plan = spelled(first, fixed)(solve(first, solver, time_limit=time_limit).choice)
    by_correction = judge.best_correction(plan, _corrections(correction))
    propose(free[:1])
    # By now all is compiled: what another plan takes tells what the rest will.
    seconds, passes = judge.seconds, judge.passes
    propose(free[1:])
    if judge.passes > passes:
        per_pass = (judge.seconds - seconds) / (judge.passes - passes)
    else:  # they proposed the first plan again, which was not run again
        per_pass = judge.seconds_per_pass()
    spent = time.perf_counter() - started
    sweep = sweep_passes(judge, bits, activation_bits) + CURVATURE_PASSES
    needed = (sweep + 6 * judge.plan_passes) * per_pass
    if effort != "low" and spent + needed > left:
        notes.append(
            f"the sweep over single layers would take about {needed:.0f} s, beyond the time "
            "budget, and was left out"
        )
    elif effort != "low":
        try:
            propose(curvature_scores(judge, bits, activation_bits, cache=cache, progress=progress))
        except InfeasibleError:
            raise
        except ProxyqError as error:
            notes.append(f"hessian-trace could not be measured and was left out: {error}")
        propose(portfolio(judge, bits, activation_bits, cache=cache, progress=progress))
    ranked = sorted(candidates, key=lambda one: one.verdict.held_back)
    report: dict[str, Any] = {
        "effort": effort,
        "corrections": {name: _loss(loss) for name, loss in by_correction.items()},
        "correction": judge.correction,
        "fitted_images": len(jax.tree.leaves(judge.fit)[0]),
        "held_back_images": len(jax.tree.leaves(judge.check)[0]),
        "candidates": [_record(one, bits, fixed) for one in ranked],
    }
    best = ranked[0]
    wrecked = best.verdict.held_back.wrecked
    rounds = ENDLESS if refine_seconds else (WRECKED_ROUNDS if wrecked else ROUNDS)[effort]
    starts = _distinct(ranked, fixed)[: STARTS if wrecked else 1]
    now = time.perf_counter()
    if rounds and not refine_seconds and left < float("inf"):
        needed = round_passes(judge, bits, activation_bits) * per_pass
        within = int(max(started + left - now, 0.0) / needed)
        if within < rounds:
            notes.append(
                f"a round of refinement would take about {needed:.0f} s; the time budget leaves "
                f"{within} of {rounds}"
            )
            rounds = within
    found = Refined(reached=(), rounds=0, tried=0)
    if rounds:
        found = refine(
            judge,
            best.problem,
            [one.answer.choice for one in starts],
            spelled(best.problem, fixed),
            bits,
            activation_bits,
            rounds=rounds,
            deadline=min(started + left, now + (refine_seconds or float("inf"))),
            progress=progress,
        )
    last = [(starts[one.origin], one.choice, one.verdict) for one in found.reached]
    if not rounds:
        last = [(one, one.answer.choice, one.verdict) for one in _distinct(ranked, fixed)]
    place = 0
    if judge.reserve is not None:
        plans = [spelled(one.problem, fixed)(choice) for one, choice, _ in last[:VERIFIED]]
        verified = [judge.verify(plan) for plan in plans]
        place = min(range(len(plans)), key=verified.__getitem__)
        report["verified"] = {"plans": len(plans), **_loss(verified[place])}
    best, choice, verdict = last[place]
    answer = best.answer
    if rounds:
        answer, refined = _refined(answer, choice, found, best.verdict)
        report["refined"] = {"from": best.scores.proxy, **refined}
    report |= {
        "chosen": best.scores.proxy,
        **_loss(verdict.held_back),
        "kl_fitted": _finite(verdict.fitted.kl),
    }
    if notes:
        report["notes"] = notes
    return Outcome(scores=best.scores, answer=answer, correction=judge.correction, report=report)


def _distinct(candidates: Sequence[Candidate], fixed: Sequence[int | None]) -> list[Candidate]:
    """Candidates with different plans, the first of each."""
    found: dict[tuple[Choice, ...], Candidate] = {}
    for one in candidates:
        found.setdefault(tuple(spelled(one.problem, fixed)(one.answer.choice)), one)
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Improved:
    """A plan after refinement, and a report in plain JSON."""

    answer: Assignment
    report: dict[str, Any]


def improve(
    judge: Judge,
    answer: Assignment,
    bits: Sequence[int],
    activation_bits: Sequence[int] = (),
    fixed: Sequence[int | None] = (),
    *,
    correction: str = "auto",
    seconds: float = 0.0,
    progress: Progress = silent,
) -> Improved:
    """Refine any solver's answer for so many seconds; `correction` as for `choose`."""
    spell = spelled(answer.problem, fixed)
    by_correction = judge.best_correction(spell(answer.choice), _corrections(correction))
    before = judge.measure(spell(answer.choice))
    found = refine(
        judge,
        answer.problem,
        [answer.choice],
        spell,
        bits,
        activation_bits,
        rounds=ENDLESS,
        deadline=time.perf_counter() + seconds,
        progress=progress,
    )
    better, report = _refined(answer, found.choice, found, before)
    report |= {
        "corrections": {name: _loss(loss) for name, loss in by_correction.items()},
        "correction": judge.correction,
        **_loss(found.verdict.held_back),
    }
    return Improved(answer=better, report=report)


def _refined(
    answer: Assignment, choice: Sequence[int], found: Refined, before: Verdict
) -> tuple[Assignment, dict[str, Any]]:
    """The refined plan as an answer: no optimum of the predicted cost any more."""
    changes = sum(a != b for a, b in zip(choice, answer.choice, strict=True))
    report = {
        "rounds": found.rounds,
        "tried": found.tried,
        "changes": changes,
        "before": _loss(before.held_back),
    }
    if not changes:
        return answer, report
    notes = (
        *answer.notes,
        f"{changes} layers were changed by measured refinement, which lowers the divergence and "
        "not the predicted cost.",
    )
    better = finish(
        answer.problem,
        choice,
        bound=answer.bound,
        solver=f"{answer.solver}+refine",
        started=time.perf_counter() - answer.seconds,
        notes=notes,
    )
    return better, report


def _corrections(correction: str) -> list[str]:
    return [one for one in CORRECTIONS if one != "auto"] if correction == "auto" else [correction]


def _record(one: Candidate, bits: Sequence[int], fixed: Sequence[int | None]) -> dict[str, Any]:
    # A prediction of KL, where the cost is one and knows all that is rounded.
    widths = one.problem.widths
    chosen = {widths[k] for k in one.answer.choice}
    knows = chosen <= set(bits) and all(width is None for width in fixed)
    predicts = knows and one.scores.proxy in ("kl", "logit-coupling")
    return {
        "proxy": one.scores.proxy,
        "predicted_kl": one.answer.objective if predicts else None,
        **_loss(one.verdict.held_back),
        "kl_fitted": _finite(one.verdict.fitted.kl),
        "status": one.answer.status.short,
        "gap": one.answer.gap,
    }


def _loss(loss: Loss) -> dict[str, Any]:
    return {"kl": _finite(loss.kl), "rescaled": _finite(loss.rescaled)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
