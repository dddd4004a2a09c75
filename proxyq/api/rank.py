"""`rank`: how well proxies order the plans of a measured table."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from proxyq.api.inputs import as_model
from proxyq.api.measured import Table, load_table
from proxyq.api.pareto import is_scores
from proxyq.api.score import ALL, Asked, score
from proxyq.devices import several
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.network import with_embeddings
from proxyq.progress import Progress, silent
from proxyq.provenance import provenance
from proxyq.proxies import PROXIES, Cache, Proxy, Scores
from proxyq.proxies.cost import as_cost, cost_name
from proxyq.search.rank import LEVEL, RESAMPLES, Ranking, ranking
from proxyq.search.scores_file import ScoreFile
from proxyq.search.table_file import MeasuredTable

SCHEMA = "proxyq/rank/1"
IN_THE_LOOP = ", in loop"
TRIVIAL = ("size", "bops", "sum of bits")


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranked:
    """One row: a cost's name, what became of it, and the costs of all plans."""

    name: str
    cost: str
    ranking: Ranking
    costs: np.ndarray
    trivial: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class RankResult:
    """All rows, the best first by Spearman's coefficient, and the table they are about.

    `left_out`: proxies that could not be ranked, and why.
    """

    table: MeasuredTable
    rows: tuple[Ranked, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Ranked:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def costs(self) -> dict[str, np.ndarray]:
        """`[plans]` by name, the best first."""
        return {row.name: row.costs for row in self.rows}

    def text(self) -> str:
        """The text of the file."""
        return json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The object that `rank --json` prints."""
        return {
            "schema": SCHEMA,
            "table": {
                "model": self.table.model,
                "method": self.table.method,
                "plans": len(self.table.plans),
                "float": self.table.float_.model_dump(),
            },
            "interval": LEVEL,
            "rows": [
                {
                    "name": row.name,
                    "cost": row.cost,
                    "trivial": row.trivial,
                    "mean_regret": round(row.ranking.mean_regret, 6),
                    "max_regret": round(row.ranking.max_regret, 6),
                    "correlations": {
                        name: {
                            k: None if v is None else round(v, 6) for k, v in asdict(one).items()
                        }
                        for name, one in row.ranking.correlations.items()
                    },
                }
                for row in self.rows
            ],
            "left_out": dict(self.left_out),
            "provenance": dict(self.provenance),
        }


def rank(
    source: Any = None,
    data: Any = None,
    *,
    table: Table,
    proxies: Asked | Sequence[Asked] = ALL,
    in_the_loop: bool = True,
    samples: int | None = None,
    seed: int | None = None,
    resamples: int = RESAMPLES,
    memory: int | None = None,
    cache_dir: str | os.PathLike[str] | Cache | None = None,
    progress: Progress = silent,
) -> RankResult:
    """How well proxies order the plans of a table by their predicted costs.

    **Arguments:**

    - `source`: the table's network, as for `search`, which is scored; or scores of it, a
      `ScoreFile` or the name of its file. `data`, `samples`, `memory`, `cache_dir`: as for
      `score`; `seed` is also that of the intervals.
    - `table`: a `MeasuredTable` or its file, or `digits` for that of the embedded network. Its
      rounding is the scores', and plans with
      rounded activations are predicted by their weights alone.
    - `proxies`: as for `score`. The trivial costs are always there: minus the size, the bit
      operations and the sum of bits.
    - `in_the_loop`: proxies that measure the network (option `correction`) are ranked a second
      time, corrected as the table's plans are.
    - `resamples`: of the bootstrap.

    **Raises** `UsageError` when the table is of another network.
    """
    found = load_table(table)
    if seed is not None and seed < 0:
        raise UsageError(f"`seed` must be at least 0, got {seed}.")
    if resamples < 1:
        raise UsageError(f"`resamples` must be at least 1, got {resamples}.")
    rows, left_out = _trivial(found, seed or 0, resamples), {}
    if is_scores(source):
        files = {"": source if isinstance(source, ScoreFile) else ScoreFile.load(source)}
        _check_same(found, files[""].model.get("name"), files[""].model.get("digest"))
        if files[""].rounding != asdict(found.rounding):
            raise UsageError(
                f"the scores are of the rounding {files[''].rounding}, the table of "
                f"{asdict(found.rounding)}: score again with the table's (--extra-code, "
                "--group-size)."
            )
    else:
        # Its layers are the table's, whatever was typed.
        model = with_embeddings(as_model(source), bool(found.model.get("embeddings")))
        _check_same(found, model.name, model.digest())
        files = _scored(
            model,
            data,
            found,
            proxies,
            in_the_loop,
            samples=samples,
            seed=seed,
            memory=memory,
            cache_dir=cache_dir,
            progress=progress,
        )
    names = [(label, name) for label, file in files.items() for name in file.proxies]
    for done, (label, name) in enumerate(names):
        file = files[label]
        scores = file.of(name)
        try:
            costs = plan_costs(scores, found, file)
            row = Ranked(
                name=name + label,
                cost=cost_name(scores),
                ranking=_ranking(costs, found, seed or 0, resamples),
                costs=costs,
            )
            rows.append(row)
        except UsageError:
            raise
        except ProxyqError as error:
            left_out[name + label] = str(error)
        progress("rank", done + 1, len(names))
    return RankResult(
        table=found,
        rows=tuple(sorted(rows, key=_order)),
        left_out=left_out,
        provenance=provenance(seed=seed, devices=several()),
    )


def _check_same(table: MeasuredTable, name: Any, digest: Any) -> None:
    own = table.model.get("digest")
    if own is not None and digest is not None and own != digest:
        raise UsageError(
            f"the table of {table.name!r} is of another network than {str(name)!r}: its weights "
            f"have the digest {str(own)[:12]}, these {str(digest)[:12]}; give the network that was "
            "measured, with its weights (--weights)."
        )


def plan_costs(scores: Scores, table: MeasuredTable, file: ScoreFile | None = None) -> np.ndarray:
    """`[plans]`: what scores predict the plans of a table to cost.

    **Raises** `UsageError` when they are of another network, or lack a bit-width.
    """
    names = [layer.name for layer in table.layers]
    if [layer.name for layer in scores.layers] != names:
        raise UsageError(
            f"the table is of another network: its layers are {_some(names)}, and those of the "
            f"scores {_some([layer.name for layer in scores.layers])}."
        )
    missing = sorted({int(b) for b in table.bits.ravel()} - set(scores.bits))
    if missing:
        raise UsageError(
            f"the scores have no costs at {missing[0]} bits, which plans of the table have: score "
            f"with bits={sorted({*scores.bits, *missing})}."
        )
    column = np.searchsorted(scores.bits, table.bits)
    layers = np.arange(len(names))
    if scores.coupling is None:
        costs = as_cost(scores, errors=None if file is None else file.errors())
        return costs[layers, column].sum(axis=1)
    # x' G x with the one-hot choices of each plan
    chosen = layers * (len(scores.bits) + len(scores.activation_bits)) + column
    return np.array([scores.coupling[np.ix_(row, row)].sum() for row in chosen])


def _scored(
    model: Any,
    data: Any,
    table: MeasuredTable,
    proxies: Asked | Sequence[Asked],
    in_the_loop: bool,
    **options: Any,
) -> dict[str, ScoreFile]:
    """Scores as the proxies are, and again as the table's plans are corrected."""
    bits = sorted({int(b) for b in table.bits.ravel()})
    if len(bits) == 1:
        bits = sorted({*bits, 8})  # scores tell bit-widths apart
    given = {
        "bits": bits,
        "extra_code": table.rounding.extra_code,
        "group_size": table.rounding.group_size,
        **options,
    }
    files = {"": score(model, data, proxies=proxies, **given)}
    correction = table.method.get("correction", "none")
    looped = [
        (name, {**one.options, "correction": correction})
        for name, one in ((name, files[""].of(name)) for name in files[""].proxies)
        if one.options.get("correction") == "none" and correction != "none"
    ]
    if in_the_loop and looped:
        own = _records(proxies)
        asked = [(own.get(name, name), options) for name, options in looped]
        files[IN_THE_LOOP] = score(model, data, proxies=asked, **given)
    return files


def _records(proxies: Any) -> dict[str, Proxy]:
    """Proxies that were given as records, by name: they need not be registered."""
    given = proxies if isinstance(proxies, Sequence) and not isinstance(proxies, str) else [proxies]
    firsts = [one[0] if isinstance(one, tuple) and one else one for one in given]
    return {one.name: one for one in firsts if isinstance(one, Proxy) and one.name not in PROXIES}


def _trivial(table: MeasuredTable, seed: int, resamples: int) -> list[Ranked]:
    """The costs that know nothing of the network: the larger a plan, the better."""
    found = {
        "size": -table.column("size_bits"),
        "bops": -table.column("bops"),
        "sum of bits": -table.bits.sum(axis=1).astype(np.float64),
    }
    return [
        Ranked(
            name=name,
            cost="given",
            ranking=_ranking(found[name], table, seed, resamples),
            costs=found[name],
            trivial=True,
        )
        for name in TRIVIAL
    ]


def _ranking(costs: np.ndarray, table: MeasuredTable, seed: int, resamples: int) -> Ranking:
    return ranking(
        costs, table.column("top1"), table.column("size_bits"), seed=seed, resamples=resamples
    )


def _order(row: Ranked) -> tuple[float, str]:
    value = row.ranking.correlations["spearman"].value
    return (2.0 if value is None else -value), row.name


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:2])
    return f"{shown} and {len(names) - 2} more" if len(names) > 2 else shown
