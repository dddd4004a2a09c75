"""Commands killed and interrupted at any moment, and run again: nothing lost, the same bytes.

`kill -9` in the middle of one checkpoint, Ctrl-C somewhere later, then once more to the end.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commandline import alone
from safetensors import safe_open
from test_bad_inputs import content

SCORE = "score --proxy clado --bits 2,4 --samples 48 --out {o}/scores.json"
TABLE = "table --plans 16 --samples 32 --eval-samples 100 --out {o}/table.json"
EVOLVE = (
    "evolve --table digits --leaves W,D,bits --entries 128 --evaluations 900 --population 30"
    " --samples 8 --out {o}/found.json --logbook {o}/log.json"
)
QUANTIZE = "quantize {g}/plan.json --reconstruct adaround --steps 60 --samples 64 --out {o}"
COMMANDS = {
    "score": SCORE,
    "table": TABLE,
    "evolve": EVOLVE,
    "quantize": QUANTIZE,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_interrupted_and_run_again(name: str, tmp_path: Path):
    given = tmp_path / "given"
    given.mkdir()
    if name == "quantize":
        words = ("search", "--proxy", "params", "--budget", "size=3bit", "--correction", "none")
        plan = alone(*words, "--out", given / "plan.json", cache=tmp_path / "cache")
        assert plan.code == 0, plan.err
    out, cache = tmp_path / "out", tmp_path / "cache"
    out.mkdir()
    words = COMMANDS[name].format(o=out, g=given).split()
    whole = alone(*words, cache=cache)
    assert whole.code == 0, whole.err
    wanted = content(out)
    shutil.rmtree(cache / "scores")  # all but what is compiled
    for path in wanted:
        (out / path).write_text("old")
    old = content(out)

    rng = random.Random(name)
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        ended = stopped(words, cache, number, rng.random() * 0.5)
        if ended is None:
            break  # it was faster than the signal
        assert ended in (-signal.SIGKILL, 130)
        assert content(out) == old or number == signal.SIGKILL
        for file in (cache / "scores").rglob("[!.]*.safetensors"):
            with safe_open(file, framework="numpy") as kept:  # whole, whenever it was written
                assert list(kept.keys())
    if ended is not None:
        done = alone(*words, cache=cache)
        assert done.code == 0, done.err
    found = {path: data for path, data in content(out).items() if not path.startswith(".")}
    assert found == wanted
    left = [path for path in (cache / "scores/unfinished").rglob("*") if path.is_file()]
    assert name in ("table", "evolve") or not left


def stopped(words: list[str], cache: Path, number: int, delay: float) -> int | None:
    """The exit code of a command that gets a signal a moment after it has kept something more;
    `None` where it ended before."""
    unfinished = cache / "scores" / "unfinished"

    def newest() -> float:
        times = []
        for file in unfinished.rglob("*.safetensors"):
            try:
                times.append(file.stat().st_mtime)
            except OSError:
                continue  # replaced in this moment
        return max(times, default=0.0)

    before, deadline = newest(), time.monotonic() + 300
    running = subprocess.Popen(
        [sys.executable, "-m", "proxyq", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PROXYQ_CACHE_DIR": str(cache), "PROXYQ_CHECKPOINT_SECONDS": "0"},
    )
    while newest() <= before and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    running.send_signal(number)
    code = running.wait()
    return None if code == 0 else code
