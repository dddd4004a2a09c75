"""Settings of an evolution, and three that are worth a name.

- `default`: free trees, NSGA-II of fitness against size, diverse parents, restarts.
- `emq`: what is known of EMQ's (Dong et al., ICCV 2023; its evolution code is not public, the
  numbers are of its scripts and of a sibling project): the tree structure, 80 individuals, one
  parent from the better half and one from all, crossover and mutation each with the chance of one
  half, one child at a time in place of the worst, 1000 of them.
- `random`: random search: every formula is grown anew.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from proxyq.errors import UsageError, near
from proxyq.search.evolve.fitness import OBJECTIVES
from proxyq.search.evolve.selection import PARENTS, SURVIVORS
from proxyq.search.evolve.structures import STRUCTURES, Structure, structure

CHEAP = ("W", "G", "F", "V", "D", "A", "E", "O", "R", "bits", "weights", "macs")
"""All statistics but those that cost more than a few passes."""
EMQ_LEAVES = ("W", "G", "V", "A")
"""EMQ's, less the Hessian."""
METHODS = ("default", "emq", "random")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides a run, beside the tables.

    - `structure`, `leaves`, `most_nodes`, `most_levels`: what is searched (`structures.py`); the
      limits are those of free trees.
    - `population`: how many live; `children`: how many are made at a time.
    - `evaluations`: how many different formulas are measured; `generations`: a limit, if any.
    - `parents`, `survivors`: see `selection.py`.
    - `crossover`, `mutation`: the chance of each, for each child; `fresh`: of one grown anew.
    - `patience`, `restarts`: after how many generations without a better formula a new population
      is grown, and how often. The hall of fame stays.
    - `objective`: `spearman`, or EMQ's `top-k`.
    - `hall`: how many of the best are kept.
    """

    method: str = "default"
    structure: str = "free"
    leaves: tuple[str, ...] = CHEAP
    most_nodes: int = 32
    most_levels: int = 9
    population: int = 100
    children: int = 100
    evaluations: int = 10_000
    generations: int | None = None
    parents: str = "diverse"
    survivors: str = "nsga2"
    crossover: float = 0.7
    mutation: float = 0.5
    fresh: float = 0.05
    patience: int = 15
    restarts: int = 2
    objective: str = "spearman"
    hall: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("method", METHODS),
            ("structure", STRUCTURES),
            ("parents", PARENTS),
            ("survivors", SURVIVORS),
            ("objective", tuple(OBJECTIVES)),
        ):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"unknown {name} {getattr(self, name)!r}: {near(getattr(self, name), known)}"
                )
        least = {"population": 2, "children": 1, "evaluations": 1, "patience": 1, "restarts": 0}
        least |= {"hall": 1, "seed": 0, "most_nodes": 2}
        if self.generations is not None:
            least["generations"] = 1
        for name, few in least.items():
            if getattr(self, name) < few:
                raise UsageError(f"`{name}` must be at least {few}, got {getattr(self, name)}.")
        if not 2 <= self.most_levels <= 30 or self.most_nodes > 200:
            raise UsageError(
                "`most_levels` must be from 2 to 30 and `most_nodes` at most 200, got "
                f"{self.most_levels} and {self.most_nodes}."
            )
        for name in ("crossover", "mutation", "fresh"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"`{name}` must be from 0 to 1, got {getattr(self, name)}.")
        self.space()

    def space(self) -> Structure:
        """The structure, with its leaves and limits."""
        return structure(
            self.structure, self.leaves, nodes=self.most_nodes, levels=self.most_levels
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "leaves": list(self.leaves)}


def settings(method: str = "default", **changes: Any) -> Settings:
    """The settings of a method, with changes; those that are `None` are none.

    **Raises** `UsageError` for an unknown method or a value that makes no sense.
    """
    named = {
        "default": Settings(),
        "emq": Settings(
            method="emq",
            structure="tree",
            leaves=EMQ_LEAVES,
            population=80,
            children=1,
            evaluations=1080,
            parents="top-and-any",
            survivors="worst-out",
            crossover=0.5,
            mutation=0.5,
            fresh=0.0,
            restarts=0,
        ),
        "random": Settings(method="random", fresh=1.0, survivors="best", restarts=0),
    }
    if method not in named:
        raise UsageError(f"unknown method {method!r}: {near(method, METHODS)}")
    known = [one.name for one in fields(Settings) if one.name != "method"]
    for name in changes:
        if name not in known:
            raise UsageError(f"unknown setting {name!r} of an evolution: {near(name, known)}")
    given = {k: v for k, v in changes.items() if v is not None}
    if "leaves" in given:
        given["leaves"] = tuple(given["leaves"])
    return replace(named[method], **given)
