"""What surrounds the work of a command: the device, the compilation cache, progress, silence."""

import contextlib
import hashlib
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxyq.cli.output import say
from proxyq.devices import on_devices
from proxyq.errors import ProxyqError, UsageError, near
from proxyq.progress import Progress, silent

if TYPE_CHECKING:
    from proxyq.proxies import Cache

DEVICES = ("cpu", "gpu", "tpu")
CACHE_BYTES = 1 << 30
"""Compiled programs kept at most, and scores likewise; the oldest go first."""
CHECKPOINT_SECONDS = 10.0


@contextlib.contextmanager
def working(
    *,
    device: str | None = None,
    devices: str | None = None,
    cache_dir: str | None = None,
    no_cache: bool = False,
    quiet: bool = False,
    times: bool = False,
    computes: bool = True,
    shared: bool = False,
) -> Iterator[Progress]:
    """Run the body on `device`, on as many as `devices` says, its programs cached; gives what
    reports progress.

    A body that does not compute starts no device; one whose device is `shared` with worker
    processes takes no more of its memory than it needs.

    What the body prints goes to stderr: stdout belongs to the result. So does what the
    library notes, with `times` also how long things took.

    **Raises** `UsageError` for an unknown device or number of them, `ProxyqError` for what is not
    there.
    """
    if device is not None and device not in DEVICES:
        raise UsageError(f"unknown device {device!r}: {near(device, DEVICES)}")
    count = None if devices is None else _device_count(devices)
    with (
        _silence(),
        _notes(logging.CRITICAL if quiet else logging.DEBUG if times else logging.INFO),
        _bar(enabled=not quiet and sys.stderr.isatty()) as progress,
        contextlib.redirect_stdout(sys.stderr),
    ):
        if shared:
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        _use_device(device)
        if computes:
            _use_float32()
            _leave_paths_out()
        _use_cache(None if no_cache else cache_folder(cache_dir), quiet=quiet)
        if count is None:
            yield progress
            return
        with on_devices(count):
            yield progress


# -- the device ------------------------------------------------------------------------


def _device_count(text: str) -> int | str:
    if text == "all":
        return text
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise UsageError(f"--devices must be a number of at least 1, or all, got {text!r}.")
    return int(text)


def _use_device(device: str | None) -> None:
    import jax

    if device is None:
        return
    # Left to itself JAX takes an accelerator first; naming "gpu" would demand every kind.
    jax.config.update("jax_platforms", "cpu" if device == "cpu" else None)
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        raise _no_device(device, str(error)) from error
    if found != device:
        raise _no_device(device, f"JAX finds only: {found}")


def _use_float32() -> None:
    """Whole float32 products on accelerators, unless `JAX_DEFAULT_MATMUL_PRECISION` is set.

    By themselves they multiply float32 numbers with 10 bits of mantissa or fewer, and that is
    more than what rounding a layer to 8 bits changes.
    """
    import jax

    setting = "jax_default_matmul_precision"
    if jax.default_backend() != "cpu" and jax.config.values[setting] is None:
        jax.config.update(setting, "float32")


def _no_device(device: str, reason: str) -> ProxyqError:
    return ProxyqError(
        f"no {device} can be used ({reason.rstrip('.')}): install the JAX that is made for it "
        "(`pip install 'jax[cuda]'` or `'jax[tpu]'`), or leave --device out."
    )


# -- the compilation cache -------------------------------------------------------------


def cache_folder(cache_dir: str | None) -> Path:
    """The folder for caches: as given, `$PROXYQ_CACHE_DIR`, or the user's cache folder."""
    given = cache_dir or os.environ.get("PROXYQ_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "proxyq"


def _use_cache(folder: Path | None, *, quiet: bool) -> None:
    """Let JAX keep what it compiles. Where the folder cannot be made, go on without."""
    import jax

    if folder is None:
        jax.config.update("jax_compilation_cache_dir", None)
        return
    # Machine code of one processor may crash another that shares the folder.
    folder = folder / "xla" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable")
        _shrink(folder)
    except OSError as error:
        jax.config.update("jax_compilation_cache_dir", None)
        reason = error.strerror or error
        say(f"no cache: the folder {str(folder)!r} cannot be used ({reason}).", quiet=quiet)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _leave_paths_out() -> None:
    """Let a compiled program be found where its folder was moved or copied to.

    The folder of an autotuner, which is of GPUs alone, lies in the folder of programs, and its path
    in what tells programs apart, on CPU too.
    """
    import jax

    if jax.default_backend() == "cpu":
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def score_cache(cache_dir: str | None, *, no_cache: bool) -> "Cache | None":
    """The cache of finished scores, shrunk to its bound; `None` where none can be kept."""
    if no_cache:
        return None
    from proxyq.proxies import Cache

    folder = cache_folder(cache_dir) / "scores"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return None  # said already, of the folder of programs beside it
        _shrink(folder)
    except OSError:
        return None
    return Cache(folder, every=checkpoint_seconds())


def checkpoint_seconds() -> float:
    """Seconds between two savings of how far a long computation is."""
    text = os.environ.get("PROXYQ_CHECKPOINT_SECONDS", "")
    try:
        seconds = float(text or CHECKPOINT_SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(
            f"PROXYQ_CHECKPOINT_SECONDS must be a number of seconds of at least 0, got {text!r}."
        )
    return seconds


def _processor() -> str:
    """What tells kinds of processors apart: the features that compilers use."""
    features = f"{platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith(("model name", "flags", "Features")):
                features += line
            elif not line.strip():
                break  # the other cores are the same
    return hashlib.sha256(features.encode()).hexdigest()[:12]


def _shrink(folder: Path) -> None:
    """Delete the oldest entries beyond `CACHE_BYTES`; another process may do so too."""
    found = []
    for parent, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(parent, name)
            with contextlib.suppress(OSError):
                info = os.stat(path)
                found.append((info.st_mtime, info.st_size, path))
    excess = sum(size for _, size, _ in found) - CACHE_BYTES
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        excess -= size


# -- silence and progress --------------------------------------------------------------


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep libraries from talking, unless PROXYQ_DEBUG is set."""
    if os.environ.get("PROXYQ_DEBUG"):
        yield
        return
    # XLA's C++ log is read when jaxlib loads. Its errors come as exceptions as well; what else
    # it says, such as tuning hints missing on this processor for each cached program, is noise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    loggers = [logging.getLogger(name) for name in ("jax", "torch", "matplotlib", "timm")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _notes(level: int) -> Iterator[None]:
    """Show what the library logs, from this level on."""
    logger, handler = logging.getLogger("proxyq"), _Sayer()
    before = logger.level
    logger.setLevel(level)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Sayer(logging.Handler):
    """Lines for people on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(" ".join(record.getMessage().split()))


@contextlib.contextmanager
def _bar(*, enabled: bool) -> Iterator[Progress]:
    """A line on the terminal: the stage, how far it is, the time that is left."""
    if not enabled:
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Display

    display = Display(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = display.add_task("load", total=None)
    current: dict[str, Any] = {"stage": "load"}

    def progress(stage: str, done: int, total: int, /) -> None:
        if stage != current["stage"]:
            current["stage"] = stage
            display.reset(task, description=stage, total=total)
        display.update(task, completed=done, total=total)

    with display:
        yield progress
