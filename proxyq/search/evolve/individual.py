"""An individual: its genes, the formula they stand for, and what was measured of it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from proxyq.proxies.formula import Node, parse_formula
from proxyq.search.evolve.screen import Measured
from proxyq.search.evolve.structures import Genes, Structure


@dataclass(frozen=True, kw_only=True)
class Individual:
    """One formula that passed the screen.

    `formula` is its text, in canonical form and weighted by bits; `size` counts its nodes.
    """

    genes: Genes
    formula: str
    size: int
    measured: Measured

    @property
    def fitness(self) -> float:
        """The mean over the tables."""
        return self.measured.fitness

    @property
    def order(self) -> tuple[float, int, str]:
        """The best first: fitness, then the shorter, then by text."""
        return -self.fitness, self.size, self.formula

    @cached_property
    def node(self) -> Node:
        """The formula's tree."""
        return parse_formula(self.formula)

    def to_json(self, structure: Structure) -> dict[str, Any]:
        """As plain JSON."""
        own = self.measured
        return {
            "genes": structure.write(self.genes),
            "formula": self.formula,
            "size": self.size,
            "fitness": own.fitness,
            "folds": list(own.folds),
            "sign": own.sign,
            "ranks": list(own.ranks),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any], structure: Structure) -> "Individual":
        """The same again."""
        return cls(
            genes=structure.read(record["genes"]),
            formula=record["formula"],
            size=record["size"],
            measured=Measured(
                record["fitness"],
                tuple(record["folds"]),
                record["sign"],
                tuple(record["ranks"]),
            ),
        )
