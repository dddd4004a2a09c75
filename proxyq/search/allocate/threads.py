"""Keep NumPy's linear algebra on one thread.

Thousands of small matrices gain nothing from more threads, and lose much where other programs
use the cores: the threads wait for each other. NumPy has no call for this. Its OpenBLAS, which
the wheels bring along, has one, found here as `threadpoolctl` finds it; with another library
nothing is done, and nothing but time is lost.
"""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

NAMES = ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}")

_lock = threading.Lock()
_inside = 0
_before = 1


@functools.cache
def _functions() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """OpenBLAS's functions to get and set the number of threads."""
    from numpy.linalg import _umath_linalg  # type: ignore[attr-defined]

    with contextlib.suppress(OSError, TypeError):
        library: Any = ctypes.CDLL(_umath_linalg.__file__)
        for name in NAMES:
            with contextlib.suppress(AttributeError):
                get = getattr(library, name.format("get_num_threads"))
                return get, getattr(library, name.format("set_num_threads"))
    return None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within, NumPy's linear algebra takes one thread; any number of callers at once."""
    global _inside, _before
    functions = _functions()
    if functions is None:
        yield
        return
    get, put = functions
    with _lock:
        if _inside == 0:
            _before = get()
            put(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                put(_before)
