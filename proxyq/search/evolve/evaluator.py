"""Measures formulas in lots of a fixed size, here or in other processes.

Workers get the tables once, as safetensors within the setup, so that those on other machines need
no common folder. Formulas go there as text, what was found comes back as JSON. Lots are the same
whoever works on them, and ranks are whole numbers, so the answers are the same to the last bit on
one kind of machine.
"""

import base64
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from proxyq.executor import Executor
from proxyq.proxies.formula import Node, Statistics, parse_formula
from proxyq.proxies.formula.statistics import Segments
from proxyq.search.evolve.fitness import Fold
from proxyq.search.evolve.screen import Measured, measure

LOT = 32
Evaluate = Callable[[Sequence[Node]], list[Measured | str]]


@contextlib.contextmanager
def evaluator(folds: Sequence[Fold], objective: str, executor: Executor) -> Iterator[Evaluate]:
    """What measures formulas on tables (see `measure`), with the workers of an executor."""
    if not executor.remote:
        yield lambda formulas: [
            one for lot in _lots(formulas) for one in measure(lot, folds, objective)
        ]
        return
    tables = base64.b64encode(save(arrays_of(folds))).decode()
    setup = {"tables": tables, "objective": objective}
    with executor.session("proxyq.search.evolve.evaluator:worker", setup) as work:

        def evaluate(formulas: Sequence[Node]) -> list[Measured | str]:
            tasks = [[str(node) for node in lot] for lot in _lots(formulas)]
            answers = dict(work(tasks))
            return [_read(one) for index in range(len(tasks)) for one in answers[index]]

        yield evaluate


def worker(setup: Mapping[str, Any]) -> Callable[[list[str]], list[Any]]:
    """What measures formulas in another process."""
    folds = folds_of(load(base64.b64decode(setup["tables"])))

    def work(texts: list[str]) -> list[Any]:
        found = measure([parse_formula(text) for text in texts], folds, setup["objective"])
        return [one if isinstance(one, str) else _written(one) for one in found]

    return work


def _lots(formulas: Sequence[Node]) -> list[Sequence[Node]]:
    return [formulas[i : i + LOT] for i in range(0, len(formulas), LOT)]


def _written(one: Measured) -> list[Any]:
    return [one.fitness, list(one.folds), one.sign, list(one.ranks)]


def _read(record: Any) -> Measured | str:
    if isinstance(record, str):
        return record
    fitness, folds, sign, order = record
    return Measured(fitness, tuple(folds), sign, tuple(order))


# -- tables as arrays ------------------------------------------------------------------


def arrays_of(folds: Sequence[Fold]) -> dict[str, np.ndarray]:
    """Tables as arrays by name, for a file."""
    names = json.dumps([[fold.name, list(fold.statistics.layers)] for fold in folds])
    arrays = {"names": np.frombuffer(names.encode(), np.uint8)}
    for i, fold in enumerate(folds):
        arrays |= {f"{i}/choices": fold.choices, f"{i}/accuracy": fold.accuracy}
        for part, statistics in (("first", fold.statistics), ("again", fold.again)):
            if statistics is None:
                continue
            arrays[f"{i}/{part}/bits"] = np.asarray(statistics.bits)
            for name, leaf in statistics.leaves.items():
                arrays[f"{i}/{part}/leaves/{name}"] = leaf
            for kind, own in statistics.segments.items():
                for field in ("counts", "scale", "row_counts"):
                    arrays[f"{i}/{part}/segments/{kind}/{field}"] = getattr(own, field)
    return {name: np.asarray(array, order="C") for name, array in arrays.items()}


def folds_of(arrays: Mapping[str, np.ndarray]) -> list[Fold]:
    """The same tables again."""
    found = []
    for i, (name, layers) in enumerate(json.loads(bytes(arrays["names"]))):
        first = _statistics(arrays, f"{i}/first/", layers)
        assert first is not None
        fold = Fold(
            name=name,
            statistics=first,
            choices=arrays[f"{i}/choices"],
            accuracy=arrays[f"{i}/accuracy"],
            again=_statistics(arrays, f"{i}/again/", layers)
            if f"{i}/again/bits" in arrays
            else None,
        )
        found.append(fold)
    return found


def _statistics(
    arrays: Mapping[str, np.ndarray], start: str, layers: list[str]
) -> Statistics | None:
    if start + "bits" not in arrays:
        return None
    leaves = start + "leaves/"
    kinds = [k for k in ("weight", "activation") if f"{start}segments/{k}/counts" in arrays]
    return Statistics(
        layers=tuple(layers),
        bits=tuple(arrays[start + "bits"].tolist()),
        leaves={n.removeprefix(leaves): a for n, a in arrays.items() if n.startswith(leaves)},
        segments={
            kind: Segments(
                **{
                    field: arrays[f"{start}segments/{kind}/{field}"]
                    for field in ("counts", "scale", "row_counts")
                }
            )
            for kind in kinds
        },
    )
