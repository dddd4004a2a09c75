"""Keep a C library's prints off standard output.

HiGHS as built into SciPy prints a debug line now and then, which would corrupt the JSON of
`--json`. Sending file descriptor 1 elsewhere for the time of a solve would swallow what
other threads and child processes print. Here only the C library's own `stdout` stream
is pointed at its `stderr`: C code then prints there, while Python, which writes to the
descriptor itself, is not touched. Where the streams cannot be found (Windows), nothing is
done.
"""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

_lock = threading.Lock()
_inside = 0
_original: int | None = None


def _streams() -> tuple[Any, Any, Any] | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    for out, err in (("stdout", "stderr"), ("__stdoutp", "__stderrp")):  # Linux; macOS, BSD
        try:
            return (
                library,
                ctypes.c_void_p.in_dll(library, out),
                ctypes.c_void_p.in_dll(library, err),
            )
        except ValueError:
            continue
    return None


@contextlib.contextmanager
def c_prints_to_stderr() -> Iterator[None]:
    """Within, C code that prints to its `stdout` prints to `stderr`; any number of threads."""
    global _inside, _original
    found = _streams()
    if found is None:
        yield
        return
    _, out, err = found
    with _lock:
        if _inside == 0:
            _original, out.value = out.value, err.value
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                out.value = _original
