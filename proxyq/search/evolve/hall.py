"""The hall of fame: the fittest formulas of a run, and the fittest of each length."""

from collections.abc import Iterable

from proxyq.search.evolve.individual import Individual


class Hall:
    """Keeps the `most` fittest individuals, each behaviour once, and the fittest of each size.

    Of formulas that order all plans alike the shortest is kept.
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
        same = [i for i in self._best if i.measured.behaviour == one.measured.behaviour]
        if same:
            if one.order >= same[0].order:
                return
            self._best.remove(same[0])
        self._best.append(one)
        self._best.sort(key=lambda each: each.order)
        del self._best[self.most :]

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

    @property
    def kept(self) -> tuple[Individual, ...]:
        """All that another hall must be given to be the same."""
        texts = [one.formula for one in self._best]
        sizes = (self._by_size[size] for size in sorted(self._by_size))
        return (*self._best, *(one for one in sizes if one.formula not in texts))
