"""Keep HiGHS's stray prints off standard output.

HiGHS as built into SciPy prints a debug line now and then, whatever its options say, which
would corrupt the JSON of `--json`. Sending file descriptor 1 elsewhere for the time of a solve
would swallow what other threads and child processes print. Here only the C library's own
`stdout` stream is exchanged, for one that collects: Python, which writes to the descriptor
itself, is not touched. What was collected and is not HiGHS's goes where it was meant to go.
Where the C library's streams cannot be found (Windows), nothing is done.
"""

import atexit
import contextlib
import ctypes
import functools
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

NOISE = b"Highs"

_lock = threading.Lock()
_inside = 0
_original: int | None = None


class _Streams:
    """The C library, its `stdout` variable, and a stream that collects into a file."""

    def __init__(self) -> None:
        self.library: Any = ctypes.CDLL(None)
        self.stdout = self._variable()
        # Kept open for good: another thread may be about to print to it.
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        atexit.register(self.file.close)
        self.library.fdopen.restype = ctypes.c_void_p
        self.collector = self.library.fdopen(os.dup(self.file.fileno()), b"a")
        if not self.collector:
            raise OSError("fdopen failed")

    def _variable(self) -> ctypes.c_void_p:
        for name in ("stdout", "__stdoutp"):  # Linux; macOS, BSD
            with contextlib.suppress(ValueError):
                return ctypes.c_void_p.in_dll(self.library, name)
        raise OSError("the C library has no stdout")

    def collected(self) -> bytes:
        """What came in since the last time, without HiGHS's own lines."""
        self.library.fflush(ctypes.c_void_p(self.collector))
        number = self.file.fileno()
        text = os.pread(number, os.fstat(number).st_size, 0)
        os.ftruncate(number, 0)
        return b"".join(line for line in text.splitlines(True) if not line.startswith(NOISE))


@functools.cache
def _streams() -> _Streams | None:
    try:
        return _Streams()
    except (OSError, TypeError, AttributeError):
        return None


@contextlib.contextmanager
def quiet_highs() -> Iterator[None]:
    """Within, HiGHS prints nothing on standard output; any number of threads at once."""
    global _inside, _original
    with _lock:
        streams = _streams()
        if streams is not None:
            if _inside == 0:
                _original, streams.stdout.value = streams.stdout.value, streams.collector
            _inside += 1
    try:
        yield
    finally:
        if streams is not None:
            with _lock:
                _inside -= 1
                if _inside == 0:
                    streams.stdout.value = _original
                    for_others = streams.collected()
                    if for_others:
                        streams.library.fputs(for_others, ctypes.c_void_p(_original))
