"""`write_report`: one HTML page about plans, and what they came from."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxyq.api.evaluate import Evaluation
from proxyq.errors import UsageError
from proxyq.files import write_atomic
from proxyq.report.page import page
from proxyq.search.allocate.plan import Plan
from proxyq.search.evaluation_file import EvaluationFile
from proxyq.search.front_file import Front
from proxyq.search.scores_file import ScoreFile

SUFFIXES = (".html", ".htm")

File = str | os.PathLike[str]


def write_report(
    plans: Plan | File | Sequence[Plan | File],
    path: File,
    *,
    scores: ScoreFile | File | None = None,
    front: Front | File | None = None,
    evaluation: Evaluation | Mapping[str, Any] | File | None = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """One self-contained HTML page: bits and scores by layer, couplings, front, accuracy, origin.

    Nothing is fetched when it is opened, and no script is in it. The same input gives the same
    bytes.

    **Arguments:**

    - `plans`: one or several plans of one model, or the names of their files.
    - `path`: the page, a file that ends in `.html`.
    - `scores`, `front`: of the same model; sections for scores, couplings and the front.
    - `evaluation`: what `evaluate` gave, or the file that `proxyq evaluate --json` printed; else
      the accuracy that plans hold is shown.
    - `names`: what the plans are called; else by their files, or `plan 1` and so on.
    - `title`: the headline; else the model's name.

    **Returns** the path of the page.

    **Raises** `UsageError` for wrong arguments, `ProxyqError` for files that cannot be read, are
    wrong, or belong to different models.
    """
    check_page(path)
    given = [plans] if isinstance(plans, (Plan, str, os.PathLike)) else list(plans)
    if not given:
        raise UsageError("`plans` must hold at least one plan.")
    if names is None:
        names = [
            f"plan {number}" if isinstance(one, Plan) else os.fspath(one)
            for number, one in enumerate(given, 1)
        ]
    if len(names) != len(given):
        raise UsageError(
            f"`names` must be as many as the plans, {len(given)}, got {len(names)} of them."
        )
    if isinstance(scores, (str, os.PathLike)):
        scores = ScoreFile.load(scores)
    if isinstance(front, (str, os.PathLike)):
        front = Front.load(front)
    text = page(
        [one if isinstance(one, Plan) else Plan.load(one) for one in given],
        names=list(names),
        scores=scores,
        front=front,
        evaluation=_evaluation(evaluation),
        title=title,
    )
    return write_atomic(path, text)


def check_page(path: File) -> None:
    """Refuse a name that does not end in `.html`: it may well be that of a plan."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"a report is a file that ends in {' or '.join(SUFFIXES)}, got {os.fspath(path)!r}."
        )


def _evaluation(given: Evaluation | Mapping[str, Any] | File | None) -> EvaluationFile | None:
    if isinstance(given, (str, os.PathLike)):
        return EvaluationFile.load(given)
    if isinstance(given, Evaluation):
        given = given.to_json()
    return None if given is None else EvaluationFile.from_json(dict(given))
