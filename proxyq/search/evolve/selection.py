"""Who has children, and who lives on.

Parents:

- `tournament`: the best of a few drawn at random, twice;
- `top-half`: both evenly from the better half (as EMQ's sibling project does);
- `top-and-any`: one evenly from the better half, one from all. EMQ (Dong et al., ICCV 2023) says
  of its diversity-prompting selection that it introduces diversity among parents, and not how:
  this is the simplest rule that does;
- `diverse`: the first wins a tournament, the second is of a few drawn at random the one whose
  order of the plans is least like the first's.

Survivors:

- `best`: the fittest of parents and children;
- `worst-out`: every child takes the place of the worst (steady state);
- `nsga2`: NSGA-II (Deb et al. 2002) of fitness against size, by DEAP; the fittest and the shortest
  always live on.
"""

from collections.abc import Sequence
from random import Random
from typing import Any

from proxyq.errors import ProxyqError
from proxyq.search.evolve.individual import Individual
from proxyq.search.evolve.screen import alike

PARENTS = ("tournament", "top-half", "top-and-any", "diverse")
SURVIVORS = ("best", "worst-out", "nsga2")
ENTRANTS = 4
"""Of a tournament, and of a draw for the least alike."""

Pair = tuple[Individual, Individual]


def parents(rng: Random, population: Sequence[Individual], how: str) -> Pair:
    """Two parents from a population that is sorted, the best first."""
    if how in ("top-half", "top-and-any"):
        half = population[: max(2, (len(population) + 1) // 2)]
        return rng.choice(half), rng.choice(half if how == "top-half" else population)
    first = _tournament(rng, population)
    if how == "tournament":
        return first, _tournament(rng, population)
    drawn = [rng.choice(population) for _ in range(ENTRANTS)]
    return first, min(drawn, key=lambda one: alike(first.measured, one.measured))


def _tournament(rng: Random, population: Sequence[Individual]) -> Individual:
    # Sorted, so the best of those drawn is the one with the least place.
    return population[min(rng.randrange(len(population)) for _ in range(ENTRANTS))]


def survivors(
    population: Sequence[Individual], children: Sequence[Individual], most: int, how: str
) -> list[Individual]:
    """At most `most` of all, sorted, the best first."""
    everyone = sorted([*population, *children], key=lambda one: one.order)
    if len(everyone) <= most:
        return everyone
    if how == "worst-out":
        own = sorted(population, key=lambda one: one.order)
        kept = [*own[: max(0, most - len(children))], *children]
        return sorted(kept, key=lambda one: one.order)[:most]
    if how == "nsga2":
        return sorted(_nsga2(everyone, most), key=lambda one: one.order)
    return everyone[:most]


def _nsga2(everyone: Sequence[Individual], most: int) -> list[Individual]:
    """`most` of all, from the front of the highest fitness and least size inwards."""
    try:
        from deap import base, tools
    except ImportError:
        raise ProxyqError(
            "DEAP is not installed: run `pip install deap`, or use survivors='best'."
        ) from None

    class Quality(base.Fitness):
        weights = (1.0, -1.0)

    class Entry:
        def __init__(self, one: Individual):
            self.one = one
            self.fitness: Any = Quality((one.fitness, one.size))

    return [entry.one for entry in tools.selNSGA2([Entry(one) for one in everyone], most)]
