"""The peak of main memory under `--memory`: what a command takes beside what it was allowed.

Each command works on an untrained network of torchvision and random images, in a process of its
own, whose largest resident set the system tells: *peak*. Much of that is there before anything is
measured, and goes again: libraries, the network while it is imported. So *images* begins with the
first batch that runs. What is resident then (images as they were read among it, free memory given
back) is taken off the largest set after it; and the same of a run on two images (`reconstruct` on
a batch), for weights at every bit-width, programs and what comes with them. What is left is what
the other images take while they run: the number that the bound is about.

Each command is run twice with one cache of compiled programs, and the second run is told: a
compiler takes more than a few images do and at another time, so that in the first it would hide
them (`--first`).

The default network has few weights and multiplications for the size of its activations (3 MiB for
one image after its first layer). `reconstruct` learns the rounding of one plan with a step for
each layer, `statistics` corrects it, `evaluate` runs it, and `search` is `auto`, whose judge runs
plans. Linux alone tells so much of a process.

    python benchmarks/memory.py --commands output-error,clado --memory 128MiB,4GiB
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}
PAIRS = ("clado", "gauss-newton", "logit-coupling")
FEWEST = {"orthogonality": 4, "reconstruct": 32, "search": 24}
LATER = {"search": 1}
"""Copies of images that are made after the first batch: `search` puts those that it fits on and
those that it holds back together."""
PLENTY = "1024GiB"
COMMANDS = (
    "output-error,restored-error,orthogonality,fisher,hessian-trace,logit-coupling,gauss-newton,"
    "clado,search,statistics,reconstruct,evaluate"
)


def parsed():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="torchvision:squeezenet1_1@none", help="(%(default)s)")
    parser.add_argument("--commands", default=COMMANDS, help="proxies and others (%(default)s)")
    parser.add_argument("--memory", default="128MiB,512MiB,4GiB", help="bounds (%(default)s)")
    parser.add_argument("--samples", type=int, default=256, help="images (%(default)s)")
    parser.add_argument("--pairs", type=int, default=32, help="those of couplings (%(default)s)")
    parser.add_argument("--first", action="store_true", help="what the first run takes")
    parser.add_argument("--quick", action="store_true", help="the digits network, few images")
    args = parser.parse_args()
    if args.quick:
        args.model, args.samples, args.pairs = "digits", 64, 8
        args.memory, args.commands, args.first = "1MiB,64MiB", "output-error,fisher", True
    return args


def size(text):
    """`4GiB` in bytes."""
    unit = text[-3:]
    return int(float(text[:-3]) * UNITS[unit])


def resident(what):
    """`VmRSS`, or `VmHWM` for the largest so far, of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def run(words, told):
    """A command, with what it took written to the file `told`: all in all, and after its first
    batch began beside what was resident then."""
    from proxyq.cli import main as command_line
    from proxyq.engine import Engine

    found = {}

    def begins(function):
        def called(*args):
            if not found:
                gc.collect()
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                found.update(before=resident("VmHWM"), there=resident("VmRSS"))
                Path("/proc/self/clear_refs").write_text("5")  # the largest begins anew
            return function(*args)

        return called

    for name in ("start", "chunks"):
        setattr(Engine, name, begins(getattr(Engine, name)))
    code = command_line(words)
    after = resident("VmHWM")
    found = {"peak": max(after, found.get("before", 0)), "taken": after - found.get("there", 0)}
    Path(told).write_text(json.dumps(found))
    return code


def peak(words):
    """What a command took (see `run`), its exit code and stderr, and the seconds of processors."""
    with tempfile.TemporaryFile() as said, tempfile.NamedTemporaryFile() as told:
        process = subprocess.Popen(
            [sys.executable, __file__, "--run", told.name, *words],
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode(errors="replace").strip()
        found = json.loads(Path(told.name).read_text() or "{}")
    return found, process.returncode, text, usage.ru_utime + usage.ru_stime


def measured(args, name, images, memory, folder):
    """`peak` of a command, nothing of whose result was kept."""
    words = command(args, name, images, memory, folder)
    found = peak(words)
    if args.first or found[1]:
        return found
    # Finished scores lie beside the compiled programs.
    shutil.rmtree(folder / "cache" / "scores", ignore_errors=True)
    return peak(words)


def shape_of(args):
    """Height, width and channels of an image."""
    return (8, 8, 1) if args.model == "digits" else (224, 224, 3)


def labelled(args, count, folder):
    """The name of a file of labelled random images."""
    file = folder / f"images{count}.npz"
    if not file.exists():
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (count, *shape_of(args)), dtype=np.uint8)
        np.savez(file, images=images, labels=np.arange(count) % 10)
    return str(file)


def plan_of(args, folder):
    """The name of a file with a plan of 4 bits."""
    plan = folder / "plan.json"
    if not plan.exists():
        words = ["search", args.model, "--proxy", "params", "--budget", "size=4bit"]
        done = peak([*words, "--correction", "none", "--out", str(plan), "--quiet"])
        if done[1]:
            raise SystemExit(done[2])
    return str(plan)


def command(args, name, samples, memory, folder):
    """What is typed."""
    # Finished scores are kept by their bound and images, so none is met again.
    common = ["--quiet", "--cache-dir", str(folder / "cache")]
    common += ["--memory", memory]
    if name == "evaluate":
        file = labelled(args, samples, folder)
        return ["evaluate", args.model, plan_of(args, folder), "--eval-data", file, *common]
    common += ["--data", "random" if args.model != "digits" else "digits"]
    if name == "search":
        # A third of the images is fitted on, the others are held back.
        words = ["search", args.model, "--effort", "low", "--bits", "4,8", "--budget", "size=6bit"]
        return [*words, "--samples", str(samples // 3), "--out", str(folder / "p.json"), *common]
    common += ["--samples", str(samples)]
    if name in ("statistics", "reconstruct"):
        words = ["quantize", args.model, plan_of(args, folder), "--out", str(folder / "net")]
        how = ["--reconstruct", "block", "--steps", "1"]
        return [*words, *(how if name == "reconstruct" else ["--correction", name]), *common]
    words = ["score", args.model, "--proxy", name, "--bits", "4"]
    return [*words, "--out", str(folder / "scores.json"), *common]


def main():
    args = parsed()
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("this system does not tell what a process takes from a moment on.")
    row = "| {:<14} | {:>6} | {:>9} | {:>8} | {:>9} | {:>10} | {:>5} | {}"
    print(row.format("", "images", "--memory", "peak MiB", "alone MiB", "images MiB", "CPU s", ""))
    pixels = int(np.prod(shape_of(args)))
    with tempfile.TemporaryDirectory() as made:
        for name in args.commands.split(","):
            images = args.pairs if name in PAIRS else args.samples
            least = FEWEST.get(name, 2)
            # With a bound too, for blocks of memory are given back where there is one.
            alone, code, text, _ = measured(args, name, least, PLENTY, Path(made))
            if code:
                raise SystemExit(text)
            again = LATER.get(name, 0) * 4 * (images - least) * pixels
            for memory in args.memory.split(","):
                found, code, text, spent = measured(args, name, images, memory, Path(made))
                if code:
                    print(f"| {name:<14} | {images:>6} | {memory:>9} | refused: {text}", flush=True)
                    continue
                taken = found["taken"] - alone["taken"] - again
                verdict = "holds" if taken <= size(memory) else "MORE"
                sizes = (found["peak"], alone["peak"], taken)
                numbers = (f"{number / (1 << 20):,.0f}" for number in sizes)
                print(row.format(name, images, memory, *numbers, f"{spent:.0f}", verdict))
                sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        raise SystemExit(run(sys.argv[3:], sys.argv[2]))
    main()
