"""`evolve`: a new formula for a proxy, from tables of measured plans."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np

from proxyq.api.inputs import as_data, calibration_of
from proxyq.api.measured import Table, for_each, load_table, networks_of
from proxyq.api.method import DEFAULT_SAMPLES
from proxyq.api.model_spec import ModelSpec
from proxyq.engine import Engine, collect
from proxyq.errors import UsageError
from proxyq.executor import Executor
from proxyq.executor import executor as executor_of
from proxyq.files import digest_arrays, digest_json
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT, network
from proxyq.progress import Progress, silent
from proxyq.provenance import provenance
from proxyq.proxies import Cache
from proxyq.proxies.cache import code_digest
from proxyq.proxies.formula import STATISTICS, Formula, parse_formula
from proxyq.proxies.formula.binding import statistics
from proxyq.proxies.formula.file import SCHEMA as FORMULA_SCHEMA
from proxyq.search.evolve import Fold, Settings, settings
from proxyq.search.evolve import evolve as run
from proxyq.search.evolve.choose import FEWEST_PLANS, Entry, choose, split
from proxyq.search.evolve.evaluator import arrays_of
from proxyq.search.evolve.individual import Individual
from proxyq.search.evolve.screen import measure
from proxyq.search.table_file import MeasuredTable

SCHEMA = "proxyq/evolution/1"
DEFAULT_ENTRIES = 2048
"""Of a layer's weight, and of its input, that formulas read while they are evolved."""
DEFAULT_VALIDATION = 0.25
FEWEST_ACCURACIES = 3
"""That plans must have for their order to say anything."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evolution:
    """What was found.

    - `entries`: the hall of fame, then the fittest of each length that are not in it.
    - `chosen`: the place of the formula that is written.
    - `size`: what the plan's size alone would say, for comparison.
    - `logbook`: a row for each generation.
    """

    settings: Settings
    tables: tuple[MeasuredTable, ...]
    holdouts: tuple[MeasuredTable, ...]
    validation: float
    validation_seed: int
    entries: tuple[Entry, ...]
    chosen: int
    size: Entry | None
    logbook: tuple[Mapping[str, Any], ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Entry:
        """The entry that is written."""
        return self.entries[self.chosen]

    def formula(self, name: str, place: int | None = None) -> Formula:
        """The chosen formula, or the entry at a place, as a record with all that is known of it."""
        entry = self.best if place is None else self.entries[place]
        one = entry.individual
        return Formula(
            schema=FORMULA_SCHEMA,
            name=name,
            formula=one.formula,
            direction=_direction(one.measured.sign),
            origin={
                "source": "proxyq evolve",
                "settings": self.settings.to_json(),
                "tables": [_described(table) for table in self.tables],
                "holdouts": [_described(table) for table in self.holdouts],
                "validation_share": self.validation,
                "validation_seed": self.validation_seed,
                **_figures(entry),
                "provenance": dict(self.provenance),
            },
            note=(
                f"Found among {self.logbook[-1]['evaluations']:,} formulas. Fitness is the "
                "rank correlation with accuracy on the plans that the evolution saw; validation "
                "is that on plans held back."
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The object that `evolve --json` prints."""
        return {
            "schema": SCHEMA,
            "settings": self.settings.to_json(),
            "tables": [_described(table) for table in self.tables],
            "holdouts": [_described(table) for table in self.holdouts],
            "validation_share": self.validation,
            "validation_seed": self.validation_seed,
            "chosen": self.chosen,
            "entries": [_record(entry) for entry in self.entries],
            "comparison": None if self.size is None else _record(self.size),
            "logbook": [dict(row) for row in self.logbook],
            "provenance": dict(self.provenance),
        }

    def text(self) -> str:
        """The text of the file."""
        return json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def evolve(
    tables: Table | Sequence[Table],
    holdouts: Table | Sequence[Table] = (),
    *,
    models: Sequence[Any] | None = None,
    data: Any = None,
    weights: str | Sequence[str] | None = None,
    code: str | Sequence[str] = (),
    loading: ModelSpec | None = None,
    method: str = "default",
    validation: float = DEFAULT_VALIDATION,
    validation_seed: int | None = None,
    samples: int = DEFAULT_SAMPLES,
    entries: int = DEFAULT_ENTRIES,
    memory: int | None = None,
    executor: str | Executor | None = None,
    cache_dir: str | os.PathLike[str] | Cache | None = None,
    progress: Progress = silent,
    **changes: Any,
) -> Evolution:
    """A formula that orders measured plans well, found by strongly typed genetic programming.

    **Arguments:**

    - `tables`: what the fitness is measured on, `MeasuredTable`s or files, or `digits`;
      `holdouts`: tables that are only looked at when all is decided.
    - `models`: the networks of all tables, then of the holdouts. Left out, each is loaded by the
      name in its table and fed as it was, with `weights`: one file for all, in which `{}` stands
      for what follows the last colon of the name, or one for each; `code`: the Python files that
      may be run for tables which name one; `loading`: another shape or preprocessing, of all.
    - `data`: calibration images, one for all or a list with one for each.
    - `method`: `default`, `emq` or `random`; `changes`: fields of
      `proxyq.search.evolve.Settings`, such as `seed`, `structure`, `evaluations`.
    - `validation`: the share of each table's plans that is held back to choose from the hall of
      fame; 0 for none. They are drawn by `validation_seed`, the seed of the run if left out: give
      one to several runs whose formulas are to be compared on plans that none of them saw.
    - `samples`: calibration images; `entries`: how many entries of a layer formulas read.
    - `executor`: an executor, `serial`, `process:N` or `ray:N`, which changes no result.
    - `cache_dir`: where the run is kept, so that it goes on after a kill.

    **Raises** `UsageError` for wrong arguments, or a table of another network.
    """
    rules = settings(method, **changes)
    runner = executor_of(executor)
    if not 0 <= validation < 1:
        raise UsageError(f"`validation` must be a share from 0 to below 1, got {validation}.")
    if isinstance(tables, (MeasuredTable, str, os.PathLike)):
        tables = [tables]
    if isinstance(holdouts, (MeasuredTable, str, os.PathLike)):
        holdouts = [holdouts]
    given = [load_table(table) for table in tables]
    held = [load_table(table) for table in holdouts]
    if not given:
        raise UsageError("`tables` must hold at least one table of measured plans (--table).")
    everyone = [*given, *held]
    _check_tables(given, held, validation)
    found = networks_of(
        everyone,
        models=models,
        weights=weights,
        loading=loading or ModelSpec(),
        code=[code] if isinstance(code, str) else list(code),
    )
    images = for_each(data, everyone, "data")
    cache = Cache.of(cache_dir)
    folds, identities = [], []
    for table, model, source in zip(everyone, found, images, strict=True):
        fold, identity = _fold(
            table,
            model,
            source,
            rules.leaves,
            samples=samples,
            entries=entries,
            seed=rules.seed,
            memory=memory,
            progress=progress,
        )
        folds.append(fold)
        identities.append(identity)
    own, others = folds[: len(given)], folds[len(given) :]
    drawn_by = rules.seed if validation_seed is None else validation_seed
    if drawn_by < 0:
        raise UsageError(f"`validation_seed` must be at least 0, got {drawn_by}.")
    rows = [split(len(fold.accuracy), validation, drawn_by, i) for i, fold in enumerate(own)]
    seen = [fold.rows(first) for fold, (first, _) in zip(own, rows, strict=True)]
    back = [fold.rows(last) for fold, (_, last) in zip(own, rows, strict=True) if len(last)]
    for fold in (*seen, *back):
        _check_accuracy(fold)
    # Of the arrays themselves, which are all that an evolution knows of tables and networks.
    facts = {"rules": rules.to_json(), "tables": digest_arrays(arrays_of(seen)), **_provenance()}
    facts["code"] = code_digest()
    kept = cache.checkpoint(digest_json(facts))
    state = run(seen, rules, executor=runner, checkpoint=kept, progress=progress)
    chosen, entries_found = choose(state.hall.everyone, back, others, seed=rules.seed)
    return Evolution(
        settings=rules,
        tables=tuple(given),
        holdouts=tuple(held),
        validation=validation,
        validation_seed=drawn_by,
        entries=tuple(entries_found),
        chosen=chosen,
        size=_size(seen, back, others, rules),
        logbook=tuple(state.logbook),
        provenance=_provenance(samples=samples, entries=entries, data=identities),
    )


# -- tables and their networks ---------------------------------------------------------


def _check_tables(
    tables: Sequence[MeasuredTable], holdouts: Sequence[MeasuredTable], validation: float
) -> None:
    texts = [table.to_json() for table in (*tables, *holdouts)]
    for place, text in enumerate(texts):
        if text in texts[:place]:
            raise UsageError(
                f"the table of {[*tables, *holdouts][place].name!r} is given twice: each table "
                "must be given once, as --table or as --holdout."
            )
    for table in tables:
        plans = len(table.plans)
        held = round(validation * plans)
        if plans - held < FEWEST_PLANS or 0 < held < FEWEST_PLANS:
            raise UsageError(
                f"the table of {table.name!r} has {plans} plans, of which {held} are held back: "
                f"both parts must have at least {FEWEST_PLANS}; change --validation, or measure "
                "more plans."
            )


def _check_accuracy(fold: Fold) -> None:
    values = len(np.unique(fold.accuracy))
    if values < FEWEST_ACCURACIES:
        raise UsageError(
            f"the plans of the table of {fold.name!r} cannot be ranked: {len(fold.accuracy)} of "
            f"them have {values} different accuracies between them; measure plans that differ, on "
            "more images or with other bits."
        )


def _fold(
    table: MeasuredTable,
    model: Model,
    data: Any,
    leaves: tuple[str, ...],
    *,
    samples: int,
    entries: int,
    seed: int,
    memory: int | None,
    progress: Progress,
) -> tuple[Fold, Any]:
    """A table with the statistics of its network, twice, and where the images came from."""
    names = [layer.name for layer in network(model, LAYERS_AT).layers]
    if names != [layer.name for layer in table.layers]:
        raise UsageError(f"the layers of the table of {table.name!r} are not those of its network.")
    bits = sorted({int(b) for b in table.bits.ravel()})
    choices = np.searchsorted(bits, table.bits)
    accuracy = table.column("top1")
    needs = tuple(dict.fromkeys(need for name in leaves for need in STATISTICS[name].needs)) or (
        "weight",
    )
    inputs = labels = identity = None
    if set(needs) - {"weight"}:
        calibration = as_data(data, model)
        if calibration is None:
            raise UsageError(
                f"calibration images are needed for the table of {table.name!r}: give `data` "
                "(--data), or only leaves of weights (--leaves W,D,V)."
            )
        identity = calibration.identity
        inputs, labels = calibration_of(calibration, model, samples, None)
    rounding = table.rounding
    images = LAYERS_AT if inputs is None else len(jax.tree.leaves(inputs)[0])
    engine = Engine.build(model, images, memory=memory)
    taps = collect(
        engine,
        inputs,
        needs,
        bits,
        labels=labels,
        rounding=rounding,
        seed=seed,
        memory=memory,
        progress=progress,
    )
    first = statistics(taps, leaves, entries=entries)
    # Entries that begin elsewhere: what a formula says must not hang on which were drawn.
    again = statistics(replace(taps, seed=seed + 1), leaves, entries=entries)
    whole = digest_arrays(first.leaves) == digest_arrays(again.leaves)
    fold = Fold(
        name=table.name,
        statistics=first,
        choices=choices,
        accuracy=accuracy,
        again=None if whole else again,
    )
    return fold, identity


# -- what is written -------------------------------------------------------------------


def _size(
    seen: Sequence[Fold], back: Sequence[Fold], holdouts: Sequence[Fold], rules: Settings
) -> Entry | None:
    """The entry that a plan's size would be; `None` where all plans are alike large."""
    node = parse_formula("bits * weights")
    (found,) = measure([node], seen, rules.objective)
    if isinstance(found, str):
        return None
    one = Individual(genes=None, formula=str(node), size=node.size, measured=found)
    return choose([one], back, holdouts, seed=rules.seed)[1][0]


def _record(entry: Entry) -> dict[str, Any]:
    one = entry.individual
    return {
        "formula": one.formula,
        "direction": _direction(one.measured.sign),
        "size": one.size,
        **_figures(entry),
    }


def _direction(sign: int) -> Any:
    return "importance" if sign > 0 else "cost"


def _provenance(**facts: Any) -> dict[str, Any]:
    """Versions, DEAP's too, whose NSGA-II decides who lives on."""
    found = provenance(**facts)
    with suppress(PackageNotFoundError):
        found["versions"]["deap"] = version("deap")
    return found


def _described(table: MeasuredTable) -> dict[str, Any]:
    return {
        "model": dict(table.model),
        "plans": len(table.plans),
        "digest": hashlib.sha256(table.to_json().encode()).hexdigest(),
    }


def _figures(entry: Entry) -> dict[str, Any]:
    def rounded(values: Sequence[float | None]) -> list[float | None]:
        return [None if value is None else round(value, 6) for value in values]

    one = entry.individual
    return {
        "fitness": round(one.fitness, 6),
        "fitness_by_table": rounded(one.measured.folds),
        "validation_by_table": rounded(entry.validation),
        "holdout_by_table": rounded(entry.holdout),
    }
