"""Whatever goes wrong, as one sentence and an exit code."""

import errno
import os
import sys
import traceback

from proxyq.errors import ProxyqError, near

INTERRUPTED = 130


def explain(error: BaseException) -> tuple[str, int]:
    """The line to print after `proxyq: `, and the exit code."""
    if os.environ.get("PROXYQ_DEBUG"):
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return "interrupted.", INTERRUPTED
    text, code = _sentence(error)
    return f"error: {' '.join(text.split())}", code


def _sentence(error: BaseException) -> tuple[str, int]:
    if isinstance(error, ProxyqError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):  # the command line was wrong, says its parser
        return _usage(error), 2
    kind, message = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message:
        return "out of memory: give --memory, such as 1GiB, or fewer --samples.", 1
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            return "no space is left on the device: free some and try again.", 1
        what = error.strerror or message
        where = f" {str(error.filename)!r}" if error.filename else ""
        return f"the system refuses{where}: {what}.", 1
    return (
        f"unexpected {kind}: {message[:400] or 'no message'}; this is a bug: please report it "
        "(set PROXYQ_DEBUG=1 for the traceback).",
        1,
    )


def _usage(error: BaseException) -> str:
    """What the parser of the command line has to say, with the nearest that there is."""
    context = getattr(error, "ctx", None)
    command = getattr(context, "command", None)
    path = getattr(context, "command_path", "proxyq")
    option = getattr(error, "option_name", None)
    message = error.format_message().strip() or "nothing to do."  # type: ignore[attr-defined]
    if option is not None and command is not None and message.startswith("No such option"):
        known = [name for one in command.params for name in one.opts if name.startswith("--")]
        hint = near(option, known)
        if hint.startswith("known"):
            hint = f"`{path} --help` lists them."
        return f"no option {option!r}: {hint}"
    if command is not None and message.startswith("No such command"):
        wanted = message.split("'")[1]
        return f"no command {wanted!r}: {near(wanted, command.list_commands(context))}"
    message = message.rstrip(".")
    return f"{message[:1].lower()}{message[1:]}; `{path} --help` tells more."
