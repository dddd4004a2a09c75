"""Two at once in one cache folder: right answers, whole files, nothing left over."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import alone
from safetensors import safe_open

import proxyq
from proxyq.checkpoint import Checkpoint
from proxyq.files import write_atomic
from proxyq.model.digits import load_digits
from proxyq.proxies import PROXIES, Cache


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """The jobs' answers, each of a thread of its own; all begin together."""
    ready, answers = threading.Barrier(len(jobs)), [None] * len(jobs)
    failed: list[BaseException] = []

    def run(index: int) -> None:
        try:
            ready.wait(timeout=60)
            answers[index] = jobs[index]()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return answers


def whole(folder: Path) -> list[str]:
    """All files below a folder can be read, and are no temporary ones."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for file in files:
        assert file.suffix == ".safetensors" and file.name[0] != ".", file
        with safe_open(file, framework="numpy") as read:
            assert list(read.keys())
    return sorted(path.name for path in files)


def test_one_file_written_by_many_is_one_of_theirs(tmp_path: Path):
    file = tmp_path / "file"
    contents = [bytes([letter]) * 200_000 for letter in b"abcd"]
    stop = threading.Event()

    def write(data: bytes) -> None:
        for _ in range(25):
            write_atomic(file, data)

    def read() -> set[bytes]:
        seen = set()
        while not stop.is_set():
            if file.exists():
                seen.add(file.read_bytes())
        return seen

    def write_all() -> None:
        try:
            at_once(*(lambda data=data: write(data) for data in contents))
        finally:
            stop.set()

    seen, _ = at_once(read, write_all)
    assert seen and seen <= set(contents)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_checkpoints_written_read_and_cleared_at_once(tmp_path: Path):
    """A finished process clears what another, of the same work, is still writing."""
    states = {n: {"a": np.full(5000, n), "b": np.arange(n + 1)} for n in range(3)}

    def write(n: int) -> None:
        kept = Checkpoint(tmp_path / "kept", every=0)
        for _ in range(30):
            kept.save("state", states[n])
            found = kept.load("state")
            if found is not None:
                own = states[int(found["a"][0])]
                assert all(np.array_equal(found[name], value) for name, value in own.items())

    def clear() -> None:
        for _ in range(60):
            Checkpoint(tmp_path / "kept").clear()

    at_once(*(lambda n=n: write(n) for n in states), clear)
    Checkpoint(tmp_path / "kept").clear()
    assert not (tmp_path / "kept").exists()


def test_scores_kept_and_read_at_once(tmp_path: Path):
    digits = load_digits()
    (scores,) = [PROXIES.get("params")(digits)]

    def work() -> int:
        cache, found = Cache(tmp_path), 0
        for _ in range(25):
            cache.save("key", scores)
            again = cache.load("key", digits)
            assert again is not None and np.array_equal(again.values, scores.values)
            found += 1
        return found

    assert at_once(work, work, work) == [25, 25, 25]
    assert whole(tmp_path) == ["key.safetensors"]


@pytest.mark.slow
def test_two_threads_score_the_same_and_something_else(tmp_path: Path):
    """One proxy twice at once, with checkpoints, and another option beside them."""
    asked = [("kl-delta", {"temperature": t}) for t in (1.0, 1.0, 2.0)]
    images = np.random.default_rng(0).random((6, 8, 8, 1), np.float32)

    def values(cache: Any, one: Any) -> np.ndarray:
        found = proxyq.score(load_digits(), images, proxies=[one], bits=(2,), cache_dir=cache)
        return found.of().values

    alone = [values(None, one) for one in asked]
    found = at_once(*(lambda one=one: values(Cache(tmp_path, every=0), one) for one in asked))
    for one, other in zip(alone, found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(found[0], found[2])
    assert len(whole(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [((), ()), (("--seed", "1"), ("--seed", "2")), (("--bits", "2,4"), ("--samples", "24"))],
    ids=["same", "seeds", "options"],
)
def test_two_processes_in_one_cache(options: Sequence[Sequence[str]], tmp_path: Path):
    words = ("score", "--proxy", "kl-delta", "--proxy", "fisher", "--samples", "32")
    cache = tmp_path / "shared"
    outs = [tmp_path / f"{number}.json" for number in range(len(options))]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "proxyq", *words, *own, "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PROXYQ_CACHE_DIR": str(cache),
                "PROXYQ_CHECKPOINT_SECONDS": "0",
            },
        )
        for own, out in zip(options, outs, strict=True)
    ]
    for process in running:
        err = process.communicate(timeout=600)[1]
        assert process.returncode == 0 and "Traceback" not in err, err
    assert len(whole(cache / "scores")) == 2 * len(set(map(tuple, options)))
    for number, (own, out) in enumerate(zip(options, outs, strict=True)):
        again = tmp_path / f"again{number}.json"
        done = alone(*words, *own, "--out", again, cache=tmp_path / "own")
        assert done.code == 0, done.err
        assert again.read_bytes() == out.read_bytes()
        assert json.loads(again.read_text())["scores"]
