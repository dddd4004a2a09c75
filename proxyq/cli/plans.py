"""What commands that make a plan have in common: where it is written, and how it is shown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxyq.cli.output import print_blocks, print_text, say


def check_results(*files: str | None, plot: str | None = None) -> None:
    """Refuse early what could not be written in the end."""
    from proxyq.files import check_writable

    if plot is not None:
        from proxyq.report.plots import check_format

        check_format(plot)
    for file in filter(None, (*files, plot)):
        check_writable(file)


def save_plan(plan: Any, out: str | None, plot: str | None) -> None:
    """The plan's file and picture, where they are asked for."""
    from proxyq.files import write_together

    files: dict[Path, bytes | str] = {}
    if out is not None:
        files[Path(out)] = plan.to_json()
    if plot is not None:
        from proxyq.report.plots import draw_plan

        files[Path(plot)] = draw_plan(plan, plot)
    write_together(files)


def tell_unused_pins(pins: Sequence[str] | None, names: Sequence[str], *, quiet: bool) -> None:
    """Say which pins changed nothing, because later ones name the same layers."""
    from proxyq.search.allocate.patterns import overridden_pins

    for pin, by in overridden_pins(pins or (), names):
        say(f"the pin {pin!r} has no effect: the later {by!r} holds its layers.", quiet=quiet)


def show_plan(
    plan: Any, kinds: Mapping[str, str], *, json: bool, quiet: bool, files: Sequence[str | None]
) -> None:
    """The plan on stdout: its file with `--json`, else tables."""
    if json:
        print_text(plan.to_json())
        return
    from proxyq.report.tables import (
        accuracy_table,
        candidates_table,
        plan_summary,
        plan_table,
        refinement,
    )

    accuracy = accuracy_table(plan.measured) if plan.measured else None
    report = (plan.predicted or {}).get("auto")
    found = plan.predicted or {}
    how = candidates_table(report) if report else None
    if "refined" in found:
        how = refinement(found["refined"])
    print_blocks(plan_table(plan, kinds), plan_summary(plan), how, accuracy)
    for file in filter(None, files):
        say(f"wrote {file}", quiet=quiet)
