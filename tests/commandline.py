"""Running `proxyq` in this process and in one of its own."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax

from proxyq.cli import main


@dataclass(frozen=True)
class Finished:
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str


def here(*arguments: object) -> Finished:
    """Run a command in this process, which shares what is compiled, without files for it."""
    texts = [str(one) for one in arguments]
    if texts and not texts[0].startswith("-"):
        texts.insert(1, "--no-cache")
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        compiled = jax.config.jax_compilation_cache_dir
        code = main(texts)
        jax.config.update("jax_compilation_cache_dir", compiled)
    return Finished(code, out.getvalue(), err.getvalue())


def alone(*arguments: object, cache: Path, **environment: str) -> Finished:
    """Run a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "proxyq", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        env={**os.environ, "PROXYQ_CACHE_DIR": str(cache), **environment},
    )
    return Finished(done.returncode, done.stdout, done.stderr)
