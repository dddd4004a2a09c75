"""The evolution: generation after generation, each decided by the one before and the generator.

A generation draws children that are new as text, measures them, drops those that the screen
rejects or that behave like one already kept, and lets the rest compete with their parents. All
that changes is in `State`, which is plain JSON: a run that was killed goes on from the last one
kept and ends in the same bytes.

Strongly typed genetic programming: Montana 1995; length control by two objectives: Bleuler et al.
2001. What the hall of fame, and nothing else, answers for is decided on the tables given here; no
other plans are seen.
"""

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from proxyq.checkpoint import Checkpoint
from proxyq.errors import ProxyqError
from proxyq.executor import Executor
from proxyq.executor import executor as executor_of
from proxyq.progress import Progress, silent
from proxyq.proxies.formula import Node
from proxyq.search.evolve.evaluator import Evaluate, evaluator
from proxyq.search.evolve.fitness import Fold, with_bits
from proxyq.search.evolve.hall import Hall
from proxyq.search.evolve.individual import Individual
from proxyq.search.evolve.screen import REASONS
from proxyq.search.evolve.selection import parents, survivors
from proxyq.search.evolve.settings import Settings
from proxyq.search.evolve.structures import Genes, Structure

TRIES = 30
"""Draws for each child that is wanted, before the structure counts as used up."""
DIGEST = 16
KNOWN = "known behaviour"


@dataclass
class State:
    """How far a run is.

    - `population`: sorted, the best first; `hall`: of the whole run.
    - `seen`: digests of all formulas measured; `sizes`: of each behaviour kept, the size of the
      shortest formula.
    - `stale`: generations since the best of this era was found; `restarts`: how many there were.
    - `logbook`: a row for each generation.
    """

    rng: Random
    hall: Hall
    population: list[Individual] = field(default_factory=list)
    seen: dict[str, None] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    era_best: float = -1.0
    stale: int = 0
    restarts: int = 0
    finished: bool = False
    logbook: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def first(cls, settings: Settings) -> "State":
        """Before anything was measured."""
        return cls(rng=Random(settings.seed), hall=Hall(settings.hall))

    @property
    def evaluations(self) -> int:
        """Formulas measured."""
        return len(self.seen)

    def to_json(self, structure: Structure) -> dict[str, Any]:
        """As plain JSON."""
        version, numbers, gauss = self.rng.getstate()
        return {
            "rng": [version, list(numbers), gauss],
            "hall": self.hall.to_json(structure),
            "population": [one.to_json(structure) for one in self.population],
            "seen": list(self.seen),
            "sizes": self.sizes,
            "era_best": self.era_best,
            "stale": self.stale,
            "restarts": self.restarts,
            "finished": self.finished,
            "logbook": self.logbook,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any], settings: Settings) -> "State":
        """The same again."""
        structure, rng = settings.space(), Random()
        version, numbers, gauss = record["rng"]
        rng.setstate((version, tuple(numbers), gauss))
        return cls(
            rng=rng,
            hall=Hall.from_json(record["hall"], settings.hall, structure),
            population=[Individual.from_json(r, structure) for r in record["population"]],
            seen=dict.fromkeys(record["seen"]),
            **{k: record[k] for k in ("sizes", "era_best", "stale", "restarts")},
            **{k: record[k] for k in ("finished", "logbook")},
        )


def evolve(
    folds: Sequence[Fold],
    settings: Settings,
    *,
    executor: str | Executor | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> State:
    """Run an evolution on tables, or go on with one.

    - `executor`: as for `proxyq.evolve`; the answer does not depend on it.
    - `checkpoint`: where the state is kept, of a run with these settings and tables.

    **Returns** the last state. **Raises** `ProxyqError` when no formula passed the screen.
    """
    checkpoint = checkpoint or Checkpoint()
    # Where a generation is one child, the state of a whole population is not written for each.
    often = max(1, settings.population // settings.children)
    state = _load(checkpoint, settings) or State.first(settings)
    with evaluator(folds, settings.objective, executor_of(executor)) as evaluate:
        while not state.finished:
            step(state, settings, evaluate)
            progress("evolve", state.evaluations, settings.evaluations)
            if state.finished or (len(state.logbook) - 1) % often == 0:
                _save(checkpoint, state, settings)
    if not state.hall.best:
        raise ProxyqError(
            f"none of {state.evaluations} formulas gives the plans different finite scores: the "
            "leaves may be too few, or more formulas must be measured."
        )
    return state


def step(state: State, settings: Settings, evaluate: Evaluate) -> None:
    """One generation: `state` becomes the next one."""
    structure = settings.space()
    left = settings.evaluations - state.evaluations
    wanted = settings.children if state.population else settings.population
    genes, nodes = _offspring(state, settings, structure, min(wanted, left))
    rejected: dict[str, int] = dict.fromkeys((*REASONS, KNOWN), 0)
    children = []
    for own, node, found in zip(genes, nodes, evaluate(nodes), strict=True):
        if isinstance(found, str):
            rejected[found] += 1
            continue
        one = Individual(genes=own, formula=str(node), size=node.size, measured=found)
        known = state.sizes.get(found.behaviour)
        if known is not None and known <= one.size:
            rejected[KNOWN] += 1
            continue
        if known is not None:  # a shorter way to say the same
            state.population = [
                each for each in state.population if each.measured.behaviour != found.behaviour
            ]
            children = [each for each in children if each.measured.behaviour != found.behaviour]
        state.sizes[found.behaviour] = one.size
        state.hall.add(one)
        children.append(one)
    state.population = survivors(
        state.population, children, settings.population, settings.survivors
    )
    _log(state, len(nodes), rejected)
    best = state.population[0].fitness if state.population else -1.0
    state.stale = 0 if best > state.era_best else state.stale + 1
    state.era_best = max(best, state.era_best)
    generations = len(state.logbook)
    state.finished = (
        not nodes
        or state.evaluations >= settings.evaluations
        or (settings.generations is not None and generations >= settings.generations)
    )
    if state.stale >= settings.patience and state.restarts < settings.restarts:
        state.restarts += 1
        state.population, state.sizes, state.era_best, state.stale = [], {}, -1.0, 0


def _offspring(
    state: State, settings: Settings, structure: Structure, wanted: int
) -> tuple[list[Genes], list[Node]]:
    """Genes and formulas that were never measured, as many as are wanted where there are."""
    rng, genes, nodes = state.rng, [], []
    for _ in range(TRIES * wanted):
        if len(nodes) == wanted:
            break
        if len(state.population) < 2 or rng.random() < settings.fresh:
            own = structure.grow(rng)
        else:
            one, other = parents(rng, state.population, settings.parents)
            own = one.genes
            if rng.random() < settings.crossover:
                own = structure.cross(rng, own, other.genes)
            if rng.random() < settings.mutation:
                own = structure.mutate(rng, own)
        node = with_bits(structure.node(own))
        digest = hashlib.sha256(str(node).encode()).hexdigest()[:DIGEST]
        if digest not in state.seen:
            state.seen[digest] = None
            genes.append(own)
            nodes.append(node)
    return genes, nodes


def _log(state: State, measured: int, rejected: dict[str, int]) -> None:
    living = state.population
    best = state.hall.best[0] if state.hall.best else None
    state.logbook.append(
        {
            "generation": len(state.logbook),
            "evaluations": state.evaluations,
            "restarts": state.restarts,
            "best": best.fitness if best else None,
            "best_size": best.size if best else None,
            "population_best": living[0].fitness if living else None,
            "mean": statistics.fmean(one.fitness for one in living) if living else None,
            "mean_size": statistics.fmean(one.size for one in living) if living else None,
            "measured": measured,
            "rejected": rejected,
        }
    )


# -- between two runs ------------------------------------------------------------------


def _save(checkpoint: Checkpoint, state: State, settings: Settings) -> None:
    text = json.dumps(state.to_json(settings.space()), ensure_ascii=False)
    checkpoint.save("evolution", {"state": np.frombuffer(text.encode(), np.uint8)})


def _load(checkpoint: Checkpoint, settings: Settings) -> State | None:
    kept = checkpoint.load("evolution")
    if kept is None:
        return None
    try:
        return State.from_json(json.loads(bytes(kept["state"])), settings)
    except (KeyError, TypeError, ValueError):
        return None  # to begin anew is always right
