"""What a formula does on the tables, and early rejection of what cannot be a proxy.

EMQ's compatibility screening (Dong et al., ICCV 2023) rejects a formula at the first configurations
that show it to be useless. Here each step is only taken by what has passed those before it:

1. its numbers on the first table are finite;
2. its scores there take at least four values;
3. on other entries of the same layers it orders the plans nearly alike (one that jumps, such as
   `log` at zero, does not: what it says is about the sample);
4. the same on all other tables.

The other half, to keep what behaves alike only once, is done by `Measured.behaviour`, a digest of
the ranks on all tables up to their sign.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from proxyq.proxies.formula import Node, Statistics, evaluate
from proxyq.search.evolve.fitness import (
    OBJECTIVES,
    Fold,
    correlation,
    direction,
    ranks,
    scores,
)

FEWEST_VALUES = 4
ALIKE = 0.9
"""Rank correlation of the scores by two samples of entries."""
REASONS = ("not finite", "too few values", "unstable")


@dataclass(frozen=True)
class Measured:
    """What was found of a formula.

    - `fitness`: mean of `folds`, one number for each table.
    - `sign`: 1 of an importance, -1 of a cost.
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
    left = list(range(len(formulas)))
    for fold in folds:
        own = _ranks([formulas[i] for i in left], fold, fold.statistics)
        passed = []
        for i, answer in zip(left, own, strict=True):
            if isinstance(answer, str):
                found[i] = answer
            else:
                by_fold[i].append(answer)
                passed.append(i)
        left = passed
        if fold.again is not None:
            others = _ranks([formulas[i] for i in left], fold, fold.again)
            passed = []
            for i, other in zip(left, others, strict=True):
                if isinstance(other, str) or correlation(by_fold[i][-1], other) < ALIKE:
                    found[i] = "unstable"
                else:
                    passed.append(i)
            left = passed
    truth = [ranks(fold.accuracy) for fold in folds]
    judge = OBJECTIVES[objective]
    for i in left:
        sign = direction(by_fold[i], truth)
        each = tuple(judge(sign * p, a) for p, a in zip(by_fold[i], truth, strict=True))
        found[i] = Measured(
            fitness=math.fsum(each) / len(each),
            folds=each,
            sign=sign,
            ranks=tuple((sign * np.concatenate(by_fold[i])).tolist()),
        )
    return found


def _ranks(formulas: Sequence[Node], fold: Fold, statistics: Statistics) -> list[np.ndarray | str]:
    """The ranks of all plans of a table by each formula, or why there are none."""
    found: list[np.ndarray | str] = []
    for values in evaluate(formulas, statistics):
        score = None if values is None else scores(values, fold.choices)
        if score is None:
            found.append("not finite")
            continue
        order = ranks(score)
        found.append(order if len(np.unique(order)) >= FEWEST_VALUES else "too few values")
    return found


def alike(one: Measured, other: Measured) -> float:
    """How alike two formulas order all plans, from 0 (not at all) to 1."""
    a, b = (np.asarray(each.ranks, np.int64) for each in (one, other))
    return abs(correlation(a, b))
