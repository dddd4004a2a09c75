"""What a formula does on the tables, and early rejection of what cannot be a proxy.

EMQ's compatibility screening (Dong et al., ICCV 2023) rejects a formula at the first configurations
that show it to be useless. Here each step is only taken by what has passed those before it:

1. its numbers on the first table are finite;
2. its scores there take at least four values;
3. on other entries of the same layers it orders the plans nearly alike (one that jumps, such as
   `log` at zero, does not: what it says is about the sample);
4. its numbers do not hang on the 1e-9 that keeps its divisions and logarithms finite: with ten
   times that all stay within one percent (`1 / x` of entries that are zero in some layers gives
   these a billion times the weight of the others);
5. the same on all other tables;
6. its numbers rise with bits in all layers, or fall in all: it is an importance or a cost. One that
   does both orders drawn plans as well as others, but by it more bits are worse somewhere, and a
   search finds those places.

The other half, to keep what behaves alike only once, is done by `Measured.behaviour`, a digest of
the ranks on all tables up to their sign.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from proxyq.proxies.formula import GUARDED, TINY, Node, evaluate
from proxyq.search.evolve.fitness import (
    OBJECTIVES,
    Fold,
    correlation,
    ranks,
    scores,
)

FEWEST_VALUES = 4
ALIKE = 0.9
"""Rank correlation of the scores by two samples of entries."""
GUARD = 0.01
"""Relative change of a layer's number by ten times the `TINY` of the formulas."""
REASONS = ("not finite", "too few values", "unstable", "by the guard", "not monotone")


@dataclass(frozen=True)
class Measured:
    """What was found of a formula.

    - `fitness`: mean of `folds`, one number for each table.
    - `sign`: 1 of an importance, which rises with bits, -1 of a cost.
    - `ranks`: of all plans of all tables one after the other, times the sign.
    """

    fitness: float
    folds: tuple[float, ...]
    sign: int
    ranks: tuple[int, ...]

    @cached_property
    def behaviour(self) -> str:
        """Equal for formulas that order all plans alike."""
        return hashlib.sha256(np.asarray(self.ranks, "<i4").tobytes()).hexdigest()[:32]


def measure(
    formulas: Sequence[Node], folds: Sequence[Fold], objective: str = "spearman"
) -> list[Measured | str]:
    """What each formula does on all tables, or the reason (of `REASONS`) why it is rejected."""
    found: list[Measured | str] = [""] * len(formulas)
    by_fold: list[list[np.ndarray]] = [[] for _ in formulas]
    rises: list[set[int]] = [set() for _ in formulas]
    left = list(range(len(formulas)))
    for fold in folds:
        values = dict(
            zip(left, evaluate([formulas[i] for i in left], fold.statistics), strict=True)
        )
        for i in left:
            answer = _ranks(values[i], fold)
            if isinstance(answer, str):
                found[i] = answer
            else:
                by_fold[i].append(answer)
                rises[i] |= _signs_of_steps(values[i])
        left = [i for i in left if not found[i]]
        if fold.again is not None:
            own = [formulas[i] for i in left]
            for i, sampled in zip(left, evaluate(own, fold.again), strict=True):
                other = _ranks(sampled, fold)
                if isinstance(other, str) or correlation(by_fold[i][-1], other) < ALIKE:
                    found[i] = "unstable"
            left = [i for i in left if not found[i]]
        exposed = [i for i in left if any(node.name in GUARDED for node in formulas[i].walk())]
        moved = evaluate([formulas[i] for i in exposed], fold.statistics, tiny=10 * TINY)
        for i, other in zip(exposed, moved, strict=True):
            first = values[i]
            assert first is not None  # it would have no ranks
            if other is None or (np.abs(other - first) > GUARD * np.abs(first)).any():
                found[i] = "by the guard"
        left = [i for i in left if not found[i]]
    truth = [ranks(fold.accuracy) for fold in folds]
    judge = OBJECTIVES[objective]
    for i in left:
        if {-1, 1} <= rises[i]:
            found[i] = "not monotone"
            continue
        sign = 1 if 1 in rises[i] else -1
        each = tuple(judge(sign * p, a) for p, a in zip(by_fold[i], truth, strict=True))
        found[i] = Measured(
            fitness=math.fsum(each) / len(each),
            folds=each,
            sign=sign,
            ranks=tuple((sign * np.concatenate(by_fold[i])).tolist()),
        )
    return found


def _ranks(values: np.ndarray | None, fold: Fold) -> np.ndarray | str:
    """The ranks of all plans of a table by a formula's numbers, or why there are none."""
    score = None if values is None else scores(values, fold.choices)
    if score is None:
        return "not finite"
    order = ranks(score)
    return order if len(np.unique(order)) >= FEWEST_VALUES else "too few values"


def _signs_of_steps(values: np.ndarray | None) -> set[int]:
    """Which of -1, 0 and 1 the signs are of the steps from each bit-width to the next."""
    assert values is not None  # it would have no ranks
    steps = np.diff(values, axis=1)
    rounding = 1e-12 * np.abs(values).max(axis=1, keepdims=True)
    return {int(sign) for sign in np.sign(np.where(np.abs(steps) <= rounding, 0.0, steps)).flat}


def alike(one: Measured, other: Measured) -> float:
    """How alike two formulas order all plans, from 0 (not at all) to 1."""
    a, b = (np.asarray(each.ranks, np.int64) for each in (one, other))
    return abs(correlation(a, b))
