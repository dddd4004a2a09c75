"""What commands that make or take plans have in common: how plans are named, written and shown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxyq.cli.output import print_blocks, print_text, say
from proxyq.errors import UsageError


def check_results(*files: str | None, plot: str | None = None) -> None:
    """Refuse early what could not be written in the end."""
    from proxyq.files import check_writable

    if plot is not None:
        from proxyq.report.plots import check_format

        check_format(plot)
    for file in filter(None, (*files, plot)):
        check_writable(file)


def model_and_plans(
    arguments: Sequence[str], use: str, *, packed: bool = False
) -> tuple[str | None, list[str]]:
    """The model, where one argument names it, and the files of the plans to `use` (a verb).

    What ends in `.json` is a plan, and in `.safetensors`, where they may stand, a `packed` network.
    """
    ends = (".json", ".safetensors") if packed else (".json",)
    files = f"files that end in {' or '.join(f'`{end}`' for end in ends)}"
    plans = [argument for argument in arguments if argument.endswith(ends)]
    others = [argument for argument in arguments if not argument.endswith(ends)]
    if len(others) > 1:
        raise UsageError(f"name one model, got {others[0]!r} and {others[1]!r}: plans are {files}.")
    if not plans:
        raise UsageError(f"name at least one plan to {use}: plans are {files}.")
    return (others[0] if others else None), plans


def model_and_plan(arguments: Sequence[str], use: str) -> tuple[str | None, str]:
    """The same of a command that takes one plan."""
    model, plans = model_and_plans(arguments, use)
    if len(plans) > 1:
        raise UsageError(f"name one plan to {use}, got {plans[0]!r} and {plans[1]!r}.")
    return model, plans[0]


def tell_other_weights(file: str, plan: Any, model: Any, *, quiet: bool) -> None:
    """Say where a plan was made for the network with other weights: it is applied all the same."""
    if plan.model.get("digest") not in (None, model.digest()):
        say(f"{file} was made for other weights of this network.", quiet=quiet)


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
