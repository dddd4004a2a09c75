"""The hall of fame: the fittest formulas of a run, and the fittest of each length."""

from collections.abc import Iterable
from typing import Any

from proxyq.search.evolve.individual import Individual
from proxyq.search.evolve.screen import alike
from proxyq.search.evolve.structures import Structure

SAME = 0.98
"""How alike two formulas may order all plans and both be in the hall."""


class Hall:
    """Keeps the `most` fittest individuals that are not alike, and the fittest of each size.

    Of formulas that order the plans nearly alike the fittest is kept, of those equally fit the
    shortest.
    """

    def __init__(self, most: int, individuals: Iterable[Individual] = ()):
        self.most = most
        self._best: list[Individual] = []
        self._by_size: dict[int, Individual] = {}
        for one in individuals:
            self.add(one)

    def add(self, one: Individual) -> None:
        """Take an individual in, if it is good enough."""
        known = self._by_size.get(one.size)
        if known is None or one.order < known.order:
            self._by_size[one.size] = one
        if len(self._best) == self.most and one.order > self._best[-1].order:
            return
        same = [i for i in self._best if alike(i.measured, one.measured) >= SAME]
        if any(other.order <= one.order for other in same):
            return
        kept = [i for i in self._best if i not in same]
        self._best = sorted([*kept, one], key=lambda each: each.order)[: self.most]

    @property
    def best(self) -> tuple[Individual, ...]:
        """The fittest, in order."""
        return tuple(self._best)

    @property
    def front(self) -> tuple[Individual, ...]:
        """The fittest of each size that are fitter than all shorter ones, the shortest first."""
        found: list[Individual] = []
        for size in sorted(self._by_size):
            one = self._by_size[size]
            if not found or one.fitness > found[-1].fitness:
                found.append(one)
        return tuple(found)

    @property
    def everyone(self) -> tuple[Individual, ...]:
        """The fittest, then those of the front that are not among them."""
        texts = [one.formula for one in self._best]
        return (*self._best, *(one for one in self.front if one.formula not in texts))

    def to_json(self, structure: Structure) -> dict[str, Any]:
        """As plain JSON."""
        sizes = sorted(self._by_size)
        return {
            "best": [one.to_json(structure) for one in self._best],
            "by_size": [self._by_size[size].to_json(structure) for size in sizes],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any], most: int, structure: Structure) -> "Hall":
        """The same again."""
        hall = cls(most)
        hall._best = [Individual.from_json(one, structure) for one in record["best"]]
        found = [Individual.from_json(one, structure) for one in record["by_size"]]
        hall._by_size = {one.size: one for one in found}
        return hall
