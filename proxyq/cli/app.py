"""The commands under one name, and what is around every one of them."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated

import typer

from proxyq.cli import (
    allocate,
    completion,
    doctor,
    evaluate,
    evolve,
    export,
    inspect,
    models,
    pareto,
    proxies,
    quantize,
    rank,
    recipes,
    report,
    score,
    search,
    table,
)
from proxyq.cli.errors import INTERRUPTED, explain
from proxyq.cli.output import print_text
from proxyq.version import __version__

app = typer.Typer(
    name="proxyq",
    no_args_is_help=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    help="A bit-width for every layer of a trained network, in seconds, without training.",
    epilog="`proxyq COMMAND --help` tells what a command takes. Try `proxyq search` first: it "
    "needs nothing, and searches the embedded digits network.",
)
app.command()(search.search)
app.command()(score.score)
app.command()(allocate.allocate)
app.command()(pareto.pareto)
app.command()(evaluate.evaluate)
app.command()(quantize.quantize)
app.command()(export.export)
app.command()(table.table)
app.command()(rank.rank)
app.command()(evolve.evolve)
app.command()(report.report)
app.command()(inspect.inspect)
app.command()(proxies.proxies)
app.command()(models.models)
app.command()(recipes.recipes)
app.command()(doctor.doctor)


@app.callback()
def proxyq(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """A bit-width for every layer of a trained network, in seconds, without training."""
    if version:
        print_text(f"proxyq {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print_text(context.get_help())
        raise typer.Exit


def _stop(number: int, frame: object) -> None:
    """End at once on Ctrl-C: an exception could get lost in a callback of XLA."""
    del number, frame
    remove = getattr(sys.modules.get("proxyq.files"), "remove_unfinished", None)
    if remove is not None:  # else it is not imported, or half so, and nothing has been written
        remove()
    with contextlib.suppress(OSError):
        os.write(2, b"\nproxyq: interrupted.\n")
    os._exit(INTERRUPTED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code instead of raising.

    Whatever goes wrong becomes one line on stderr.
    """
    if arguments is None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _stop)  # a process of its own
        _open_what_is_closed()
    try:
        return _run(arguments)
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`): what it wanted to see, it has seen.
        _discard_output()
        return 0


def _run(arguments: Sequence[str] | None) -> int:
    command = typer.main.get_command(app)
    completion.prepare()
    arguments = None if arguments is None else list(arguments)
    try:
        result = command.main(args=arguments, prog_name="proxyq", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        error = KeyboardInterrupt() if code == INTERRUPTED else None
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt, SystemExit) as failure:
        if isinstance(failure.__context__, BrokenPipeError):  # how Typer reports it
            raise failure.__context__ from None
        code, error = 1, failure
        if isinstance(failure, SystemExit) and completion.asked(arguments):
            code, error = int(failure.code or 0), None  # how Typer ends, having answered
    if error is not None:
        text, code = explain(error)
        print(f"proxyq: {text}", file=sys.stderr)
    return code


def _open_what_is_closed() -> None:
    """Discard what goes to a stream that was closed (`>&-`), which Python shows as `None`.

    Its number is taken too, or the next file that is opened would get it, and what libraries
    print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        with contextlib.suppress(OSError):
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            mode = "r" if number == 0 else "w"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def _discard_output() -> None:
    """Let nothing more be written to stdout, or Python complains about it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
