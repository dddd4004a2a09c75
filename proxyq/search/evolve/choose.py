"""Which formula of the hall of fame is written, and what all of them do on plans held back.

Of every table some plans are held back from the evolution. The hall's formulas are measured on
them after the run, and the one-standard-error rule (Breiman et al. 1984) decides: the shortest
formula whose mean correlation is no further below the best than one standard error of their
difference, by a bootstrap of the plans held back. Tables held out altogether are measured too, and
decide nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from proxyq.proxies.formula import evaluate
from proxyq.search.evolve.fitness import Fold, correlation, ranks, scores
from proxyq.search.evolve.individual import Individual

RESAMPLES = 200
FEWEST_PLANS = 8
"""Of a table that are held back, and that are left."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A formula of the hall of fame.

    `validation`, `holdout`: its rank correlations with accuracy, of the sign that it has on the
    plans of the evolution, on each table's plans held back and on each table held out; `None`
    where its numbers are not finite.
    """

    individual: Individual
    validation: tuple[float | None, ...]
    holdout: tuple[float | None, ...]


def split(plans: int, share: float, seed: int, table: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the plans that the evolution sees, and of those held back: `share` of all."""
    order = np.random.default_rng([seed, table]).permutation(plans)
    held = round(share * plans)
    return np.sort(order[held:]), np.sort(order[:held])


def choose(
    individuals: Sequence[Individual],
    validation: Sequence[Fold],
    holdouts: Sequence[Fold],
    *,
    seed: int,
) -> tuple[int, list[Entry]]:
    """The place of the formula to be written, and all entries.

    Without plans held back it is the first, which is the fittest.
    """
    own, others = _scores(individuals, validation), _scores(individuals, holdouts)
    entries = [
        Entry(
            individual=one,
            validation=_correlations(mine, validation),
            holdout=_correlations(its, holdouts),
        )
        for one, mine, its in zip(individuals, own, others, strict=True)
    ]
    valid = [i for i, entry in enumerate(entries) if None not in entry.validation]
    if not validation or not valid:
        return 0, entries
    means = {i: _mean(entries[i].validation) for i in valid}
    best = max(valid, key=lambda i: (means[i], -i))
    drawn = _resampled([own[i] for i in valid], validation, seed)
    at_best = drawn[valid.index(best)]
    near = [
        i
        for i, row in zip(valid, drawn, strict=True)
        if means[best] - means[i] <= float((at_best - row).std())
    ]
    return min(near, key=lambda i: (individuals[i].size, -means[i], i)), entries


def _mean(values: Sequence[float | None]) -> float:
    return sum(value or 0.0 for value in values) / len(values)


def _scores(
    individuals: Sequence[Individual], folds: Sequence[Fold]
) -> list[list[np.ndarray | None]]:
    """The score of every plan by each individual and table, times the individual's sign."""
    found: list[list[np.ndarray | None]] = [[] for _ in individuals]
    for fold in folds:
        values = evaluate([one.node for one in individuals], fold.statistics)
        for row, one, value in zip(found, individuals, values, strict=True):
            score = None if value is None else scores(value, fold.choices)
            row.append(None if score is None else one.measured.sign * score)
    return found


def _correlations(
    scored: Sequence[np.ndarray | None], folds: Sequence[Fold]
) -> tuple[float | None, ...]:
    return tuple(
        None if score is None else correlation(ranks(score), ranks(fold.accuracy))
        for score, fold in zip(scored, folds, strict=True)
    )


def _resampled(
    scored: Sequence[Sequence[np.ndarray | None]], folds: Sequence[Fold], seed: int
) -> np.ndarray:
    """`[individuals, resamples]`: mean correlations over tables of plans drawn again."""
    rng = np.random.default_rng(seed)
    found = np.zeros((len(scored), RESAMPLES))
    for place, fold in enumerate(folds):
        plans = len(fold.accuracy)
        for column in range(RESAMPLES):
            rows = rng.integers(0, plans, plans)
            truth = ranks(fold.accuracy[rows])
            for row, score in zip(found, scored, strict=True):
                own = score[place]
                assert own is not None  # only those with finite scores come here
                row[column] += correlation(ranks(own[rows]), truth) / len(folds)
    return found
