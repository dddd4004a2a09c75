"""Time libraries beside each other on a few cores, without one disturbing the other.

Call `pin` before anything imports numpy, jax or torch: all of them size their thread pools when
they start. Sides are run in turn, several times, and the least is kept, for wall time and for
CPU time apart: on a busy machine the CPU time is the steadier of the two.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Time:
    """Seconds by the clock, and seconds of all threads of this process together."""

    wall: float
    cpu: float

    def __add__(self, other: "Time") -> "Time":
        return Time(self.wall + other.wall, self.cpu + other.cpu)

    def cells(self) -> tuple[str, str]:
        """Both as text for `table`."""
        return f"{self.wall:.3f}", f"{self.cpu:.3f}"


def pin(threads: int) -> int:
    """Keep this process on `threads` cores (fewer where there are fewer); returns how many."""
    for module in ("jax", "torch"):
        if module in sys.modules:
            raise RuntimeError(f"pin() comes before the import of {module}.")
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as it may use cores
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(0, cores)
        threads = len(cores)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    # Threads of OpenMP that wait must sleep: spinning, they take the other side's cores.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["KMP_BLOCKTIME"] = "0"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return threads


def once(function: Callable[[], Any]) -> tuple[Time, Any]:
    """The time of one call, and what it returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return Time(time.perf_counter() - wall, time.process_time() - cpu), result


def alternately(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Time]:
    """The least time of each side over `repeats` rounds; every round runs all, in turn."""
    times: dict[str, list[Time]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, function in sides.items():
            times[name].append(once(function)[0])
    return {
        name: Time(min(t.wall for t in taken), min(t.cpu for t in taken))
        for name, taken in times.items()
    }


class Compilations:
    """Counts the programs that XLA compiles in this process: `count` since the last `reset`."""

    def __init__(self) -> None:
        import jax

        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration: float, **_: Any) -> None:
        del duration
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def reset(self) -> int:
        """The count so far, which then starts again from zero."""
        count, self.count = self.count, 0
        return count


def peak_mib() -> float:
    """The most memory that this process has held so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def growth_mib(function: Callable[[], Any]) -> float:
    """How much more memory this process holds at most during a call than before it, in MiB."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak so far

        def held(field: str) -> float:
            with open("/proc/self/status") as file:
                line = next(line for line in file if line.startswith(field))
            return int(line.split()[1]) / 1024

        before = held("VmRSS")
        function()
        return held("VmHWM") - before
    except OSError:  # no Linux: what the peak rose by
        before = peak_mib()
        function()
        return peak_mib() - before


def heading(text: str, threads: int) -> str:
    """What is measured, with which versions, and how busy the machine is."""
    import jax
    import torch

    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    return f"{text}\n{versions}, {threads} thread{'s' * (threads != 1)}{load}\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first one flush left."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def ratio(name: str, side: Time, other: Time) -> str:
    """One line: how many times the other side's time this side takes."""
    wall, cpu = side.wall / other.wall, side.cpu / max(other.cpu, 1e-9)
    return f"ratio {name}: {wall:.3f} wall, {cpu:.3f} cpu"
