"""On how many devices networks run: a setting for what stands inside of a `with`; main memory.

    with proxyq.on_devices("all"):
        scores = proxyq.score(model, images, proxies="output-error")

Without it, on all devices of an accelerator, and on one of CPU: JAX shows several there only when
told to, and they are the same cores. Where `jax_default_device` names a device, on that one.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxyq.errors import ProxyqError, UsageError


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Which devices, `None` for the one that JAX takes by itself, and among how many of them a
    layer's alternatives are split (`None`: as few as the images allow)."""

    devices: tuple[Any, ...] | None = None
    alternatives: int | None = None

    @property
    def count(self) -> int:
        """How many."""
        return 1 if self.devices is None else len(self.devices)

    @property
    def label(self) -> str:
        """What tells ways to split a batch apart; empty for a single device."""
        if self.count == 1:
            return ""
        return f"{self.count}" if self.alternatives is None else f"{self.count}x{self.alternatives}"


_ONE = Devices()
_SET: ContextVar[Devices | None] = ContextVar("proxyq_devices", default=None)


@contextlib.contextmanager
def on_devices(
    which: int | str | Sequence[Any], *, alternatives: int | None = None
) -> Iterator[None]:
    """Run networks on several devices of this machine.

    The images of a batch are split among the devices, and where there are too few of them (one at
    a time, say) the alternatives of a layer that are measured; parameters are on all of them.
    Scores are the same but for rounding.

    **Arguments:**

    - `which`: how many of `jax.local_devices()`, `"all"` of them, or the devices themselves.
    - `alternatives`: among how many of them alternatives are split, a divisor of their number;
      the images are split among the others.

    **Raises** `UsageError` for a number that makes no sense, `ProxyqError` for more devices than
    there are.
    """
    chosen = _chosen(which)
    if alternatives is not None:
        count = 1 if chosen is None else len(chosen)
        if isinstance(alternatives, bool) or not isinstance(alternatives, int):
            raise UsageError(f"`alternatives` must be a whole number, got {alternatives!r}.")
        if alternatives < 1 or count % alternatives:
            raise UsageError(
                f"`alternatives` must divide the number of devices, {count}, got {alternatives}."
            )
    token = _SET.set(Devices(devices=chosen, alternatives=alternatives))
    try:
        yield
    finally:
        _SET.reset(token)


def _chosen(which: int | str | Sequence[Any]) -> tuple[Any, ...] | None:
    import jax

    local = jax.local_devices()
    if which == "all":
        return tuple(local) if len(local) > 1 else None
    if isinstance(which, int) and not isinstance(which, bool) and which >= 1:
        if which > len(local):
            kind = local[0].platform
            hint = (
                f" (set XLA_FLAGS=--xla_force_host_platform_device_count={which} to split the "
                "cores among so many)"
                if kind == "cpu"
                else ""
            )
            raise ProxyqError(
                f"{which} devices were asked for, and JAX finds {len(local)} ({kind}): ask for at "
                f"most so many, or for all{hint}."
            )
        return tuple(local[:which]) if which > 1 else None
    if isinstance(which, Sequence) and not isinstance(which, str) and which:
        found = tuple(which)
        if all(isinstance(one, jax.Device) for one in found) and len(set(found)) == len(found):
            return found
    raise UsageError(
        "the devices must be a number of at least 1, 'all', or different jax devices, got "
        f"{which!r}."
    )


def current() -> Devices:
    """What is set here, or else the default."""
    found = _SET.get()
    if found is not None:
        return found
    import jax

    if jax.config.values["jax_default_device"] is not None or jax.default_backend() == "cpu":
        return _ONE
    local = jax.local_devices()
    return Devices(devices=tuple(local)) if len(local) > 1 else _ONE


def several() -> int | None:
    """The number of devices for provenance: `None` for one, which goes without saying."""
    count = current().count
    return count if count > 1 else None


def cores() -> list[int]:
    """The processor's cores that this process may use, by number; not every system tells."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def main_memory() -> dict[str, int | None]:
    """Bytes of main memory, `total` and `available`: of the machine, or of the container that this
    runs in where that has less; `None` where the system does not tell."""
    total = available = None
    with contextlib.suppress(AttributeError, ValueError, OSError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as file:
        kib = next(line.split()[1] for line in file if line.startswith("MemAvailable:"))
        available = int(kib) * 1024
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text())  # "max" is no number
        used = int((group / "memory.current").read_text())
        if total is None or most < total:
            total = most
            available = min(available or most, max(most - used, 0))
    return {"total": total, "available": available}


_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)


def give_back_large_blocks() -> None:
    """Let this process return blocks of 256 KiB and more to the system as soon as they are free.

    By itself glibc keeps them, once it has met larger ones, between the small ones of a compiler:
    what images take in a first run came out 1.6 times as much. The command line calls this where
    `--memory` is given. `memory=` in Python does not: it is of the whole process, all that runs in
    it pays for fresh pages, and it cannot be taken back. Where there is no glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, 1 << 18)
