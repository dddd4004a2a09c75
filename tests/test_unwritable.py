"""Full disks and folders that are read-only: one sentence, old files whole, nothing left over."""

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from commandline import Finished, alone, here
from test_bad_inputs import content, refused

from proxyq import files
from proxyq.checkpoint import Checkpoint
from proxyq.cli import main
from proxyq.errors import ProxyqError
from proxyq.files import write_atomic, write_together

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _never(error: BaseException) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    return fails


@contextlib.contextmanager
def trouble(where: str, error: BaseException) -> Iterator[None]:
    """The step of a write that fails: the temporary file, its bytes, its last block, its place."""
    with pytest.MonkeyPatch.context() as patch:
        if where == "open":
            patch.setattr(tempfile, "mkstemp", _never(error))
        elif where == "write":
            opened = os.fdopen

            def half(handle: int, *args: Any, **named: Any) -> Any:
                file = opened(handle, *args, **named)

                class Half(contextlib.AbstractContextManager[Any]):
                    def __exit__(self, *_: object) -> None:
                        file.close()

                    def write(self, data: bytes) -> None:
                        file.write(data[: len(data) // 2])
                        raise error

                return Half()

            patch.setattr(os, "fdopen", half)
        else:
            patch.setattr(os, where, _never(error))
        yield


@pytest.mark.parametrize("where", ["open", "write", "fsync", "chmod", "replace"])
@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "limit on the size of files"),
        (errno.EROFS, "exists and is writable"),
        (errno.EACCES, "exists and is writable"),
    ],
)
def test_a_write_that_fails_leaves_all_as_it_was(where: str, code: int, told: str, tmp_path: Path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("old")
    error = OSError(code, os.strerror(code))
    for path in (old, new):
        with trouble(where, error), pytest.raises(ProxyqError, match=told) as caught:
            write_atomic(path, "something else" * 100)
        assert path.name in str(caught.value) and str(error.strerror) in str(caught.value)
    with trouble(where, error), pytest.raises(ProxyqError, match=told):
        write_together(
            {tmp_path / "a/b/one": b"1", tmp_path / "a/b/two": "2"}, folder=tmp_path / "a/b"
        )
    assert content(tmp_path) == {"old.json": b"old"}
    assert list(tmp_path.iterdir()) == [old]
    assert not files._unfinished


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["ctrl-c", "memory"])
@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_write_that_is_broken_off_leaves_all_as_it_was(
    where: str, error: BaseException, tmp_path: Path
):
    (tmp_path / "old").write_text("old")
    with trouble(where, error), pytest.raises(type(error)):
        write_atomic(tmp_path / "old", "new" * 100)
    assert content(tmp_path) == {"old": b"old"}
    assert not files._unfinished


def test_files_that_belong_together_take_their_places_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("old one")
    two.write_text("old two")
    written = files._written
    monkeypatch.setattr(
        files, "_written", lambda path, data: written(path, data) if path == one else _never(FULL)()
    )
    with pytest.raises(OSError, match="No space"):
        write_together({one: "new one", two: "new two"})
    assert content(tmp_path) == {"one": b"old one", "two": b"old two"}
    monkeypatch.undo()
    write_together({one: "new one", two: b"new two"})
    assert content(tmp_path) == {"one": b"new one", "two": b"new two"}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan and scores that all commands can be given."""
    folder = tmp_path_factory.mktemp("given")
    for words in (
        ("search", "--proxy", "params", "--budget", "size=4bit", "--out", folder / "plan.json"),
        ("score", "--proxy", "params", "--proxy", "sqnr", "--out", folder / "scores.json"),
    ):
        done = here(*words, "--quiet")
        assert done.code == 0, done.err
    return folder


# Every command that writes; `{g}` holds what is given, `{o}` what is written.
WRITES = {
    "search": "search --proxy params --budget size=4bit --out {o}/plan.json",
    "search plot": "search --proxy params --budget size=4bit --out {o}/plan.json --plot {o}/p.svg",
    "score": "score --proxy params --out {o}/scores.json",
    "allocate": "allocate {g}/scores.json --proxy sqnr --budget size=3bit --out {o}/plan.json",
    "pareto": "pareto {g}/scores.json --proxy sqnr --budget size=2bit..4bit --points 3"
    " --out {o}/front.json --plans {o}/new",
    "table": "table --plans 2 --eval-samples 20 --samples 8 --out {o}/table.json",
    "rank": "rank {g}/scores.json --proxy sqnr --table digits --out {o}/rank.json",
    "evolve": "evolve --table digits --leaves W,D,bits --evaluations 60 --population 20 "
    "--samples 8 --entries 64 --out {o}/formula.json --logbook {o}/log.json",
    "quantize": "quantize {g}/plan.json --out {o}",
    "quantize anew": "quantize {g}/plan.json --out {o}/new",
    "report": "report {g}/plan.json --scores {g}/scores.json --out {o}/page.html",
}
DEAR = ("table", "evolve", "rank", "quantize", "quantize anew", "search plot")


def words_of(line: str, given: Path, out: Path) -> list[str]:
    return line.format(g=given, o=out).split()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in DEAR else []) for n in WRITES]
)
def test_commands_on_a_full_disk(name: str, given: Path, tmp_path: Path):
    """Refused in one sentence; what was there stays; the same command goes through later."""
    out = tmp_path / "out"
    out.mkdir()
    words = words_of(WRITES[name], given, out)
    for where, code in (("fsync", errno.ENOSPC), ("open", errno.EROFS), ("write", errno.EACCES)):
        with trouble(where, OSError(code, os.strerror(code))):
            done = here(*words, "--quiet")
        refused(done, 1, os.strerror(code))
        assert not any(out.iterdir())
    assert here(*words, "--quiet").code == 0
    written = content(out)
    assert written
    (out / "beside").write_text("beside")
    for path in written:
        (out / path).write_text("old")
    before = content(out)
    with trouble("fsync", FULL):
        refused(here(*words, "--quiet"), 1, "No space left on device")
    assert content(out) == before


def test_a_folder_of_an_export_on_a_full_disk(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from proxyq.export.torch_folder import read_config, read_weights, write_folder

    tensors, config = {"weight": torch.ones(3)}, {"proxyq": {"schema": "some/1"}}
    made = tmp_path / "made"

    def write(check: Callable[[Path], Any]) -> Any:
        return write_folder(made, tensors, {}, config, check)

    for where in ("fsync", "open", "replace"):
        with trouble(where, FULL), pytest.raises(ProxyqError, match="No space left"):
            write(lambda folder: None)
        assert not made.exists()
    with pytest.raises(ProxyqError, match="it differs"):
        write(_never(ProxyqError("it differs")))
    assert not made.exists()
    assert write(lambda folder: sorted(content(folder)))[1] == ["config.json", "model.safetensors"]
    before = content(made)
    with trouble("fsync", FULL), pytest.raises(ProxyqError, match="No space left"):
        write(lambda folder: None)
    assert content(made) == before
    assert read_config(made, "some/1") == config and "weight" in read_weights(made)[0]


# -- caches ----------------------------------------------------------------------------


def caching(folder: Path, *words: object) -> Finished:
    """A command in this process, with a cache in a folder."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        compiled = jax.config.jax_compilation_cache_dir
        code = main([*map(str, words), "--cache-dir", str(folder)])
        jax.config.update("jax_compilation_cache_dir", compiled)
    return Finished(code, out.getvalue(), err.getvalue())


def test_a_cache_that_cannot_be_written_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three answers and their checkpoints cannot be kept; the command gives them all."""
    monkeypatch.setenv("PROXYQ_CHECKPOINT_SECONDS", "0")
    words = ["score", "--proxy", "sqnr", "--proxy", "params", "--proxy", "weight-mse", "--json"]
    good = here(*words)
    with trouble("fsync", FULL):
        done = caching(tmp_path / "cache", *words)
    assert done.code == 0 and done.out == good.out
    lines = [line for line in done.err.splitlines() if "cache" in line]
    assert len(lines) == 1 and "No space left on device" in lines[0], done.err
    assert not [one for one in content(tmp_path / "cache") if not one.startswith("xla")]
    # The next command in the same place, with room, keeps them.
    assert caching(tmp_path / "cache", *words).out == good.out
    again = caching(tmp_path / "cache", *words)
    assert again.out == good.out and "from the cache" in again.err


def test_a_checkpoint_that_another_process_has_cleared_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    kept = Checkpoint(tmp_path / "kept", every=0)
    with trouble("open", FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))):
        kept.save("state", {})
    assert not caplog.records
    for _ in range(3):
        with trouble("open", FULL):
            kept.within("part").save("state", {})
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    (tmp_path / "kept/.state.safetensors.k1ll3d").write_text("half")
    kept.clear()
    assert not (tmp_path / "kept").exists()


LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
from proxyq.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(given: Path, tmp_path: Path):
    """The kernel's own refusal, without a disk that is full: nothing beyond 2,000 bytes."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "front.json").write_text("old")

    def limited(*words: object) -> Finished:
        done = subprocess.run(
            [sys.executable, "-c", LIMIT, *map(str, words), "--cache-dir", str(tmp_path / "cache")],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "JAX_COMPILATION_CACHE_DIR": ""},
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    words = ("pareto", given / "scores.json", "--proxy", "sqnr", "--budget", "size=2bit..4bit")
    done = limited(*words, "--points", "3", "--quiet", "--out", out / "front.json")
    refused(done, 1, "limit on the size of files")
    assert content(out) == {"front.json": b"old"}
    done = limited("score", "--proxy", "sqnr", "--json", "--bits", "1,2,3,4,5,6,7,8")
    assert done.code == 0 and json.loads(done.out)["scores"]
    assert "Traceback" not in done.err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; skips where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(words, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, given: Path, tmp_path: Path):
    (small_disk / "plan.json").write_text("old")
    with pytest.raises(ProxyqError, match="No space left on device"):
        write_atomic(small_disk / "plan.json", bytes(1 << 20))
    assert content(small_disk) == {"plan.json": b"old"}
    (small_disk / "filler").write_bytes(bytes(48 << 10))
    front = ("pareto", given / "scores.json", "--proxy", "sqnr", "--budget", "size=2bit..4bit")
    for words in (
        (*front, "--plans", small_disk / "plans", "--points", "9"),
        ("report", given / "plan.json", "--out", small_disk / "page.html"),
    ):
        refused(here(*words, "--quiet"), 1, "No space left on device")
    assert sorted(content(small_disk)) == ["filler", "plan.json"]
    assert not (small_disk / "plans").exists()
    # A full cache: the answer all the same.
    (small_disk / "more").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
    words = ("score", "--proxy", "sqnr", "--json")
    done = caching(small_disk, *words)
    assert done.code == 0 and done.out == here(*words).out
    assert done.err.count("cache") == 1, done.err


@pytest.mark.slow
def test_a_full_cache_in_a_process_of_its_own(small_disk: Path, tmp_path: Path):
    (small_disk / "filler").write_bytes(bytes(60 << 10))
    words = ("score", "--proxy", "sqnr", "--proxy", "output-error", "--json")
    done = alone(*words, cache=small_disk, PROXYQ_CHECKPOINT_SECONDS="0")
    assert done.code == 0 and done.out == alone(*words, cache=tmp_path / "cache").out
    lines = [line for line in done.err.splitlines() if "cache" in line]
    assert len(lines) == 1 and "No space left on device" in lines[0], done.err
