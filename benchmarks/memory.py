"""The peak of main memory under `--memory`: what a command takes beside what it was allowed.

Each command works on an untrained network of torchvision and random images, in a process of its
own, whose largest resident set the system tells (`wait4`). Most of that is there before anything
is measured: libraries, the imported network, its weights at every bit-width and what is compiled.
So every command is also run on four images (`reconstruct` on a batch), and the difference of the
two, less the images themselves, is what the others take: the number that the bound is about.
Each is run twice with one cache of compiled programs, and the second run is told: a compiler takes
more than a few images do and at another time, so that in the first it would hide them (`--first`).

The default network has few weights and multiplications for the size of its activations (3 MiB for
one image after its first layer). `reconstruct` learns the rounding of one plan with a step for
each layer, `statistics` corrects it, `evaluate` runs it, and `search` is `auto`, whose judge runs
plans.

    python benchmarks/memory.py --commands output-error,clado --memory 128MiB,4GiB
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}
PAIRS = ("clado", "gauss-newton", "logit-coupling")
FEWEST = {"reconstruct": 32, "search": 24}
COPIES = {"search": 2}
"""How often images are held: `search` keeps those that it fits on apart, and puts them together."""
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


def peak(words):
    """The largest resident set of a command in bytes, its exit code and stderr, and the seconds
    of processors that it took."""
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "proxyq", *words], stdout=subprocess.DEVNULL, stderr=told
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        text = told.read().decode(errors="replace").strip()
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit, process.returncode, text, usage.ru_utime + usage.ru_stime


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
    row = "| {:<14} | {:>6} | {:>9} | {:>8} | {:>9} | {:>10} | {:>5} | {}"
    print(row.format("", "images", "--memory", "peak MiB", "alone MiB", "images MiB", "CPU s", ""))
    pixels = int(np.prod(shape_of(args)))
    with tempfile.TemporaryDirectory() as made:
        for name in args.commands.split(","):
            images = args.pairs if name in PAIRS else args.samples
            least = FEWEST.get(name, 4)
            # With a bound too, for blocks of memory are given back where there is one.
            alone, code, text, _ = measured(args, name, least, PLENTY, Path(made))
            if code:
                raise SystemExit(text)
            # As bytes and prepared, in float32.
            own = (images - least) * pixels * (1 if name == "evaluate" else 5)
            for memory in args.memory.split(","):
                found, code, text, spent = measured(args, name, images, memory, Path(made))
                if code:
                    print(f"| {name:<14} | {images:>6} | {memory:>9} | refused: {text}", flush=True)
                    continue
                taken = found - alone - COPIES.get(name, 1) * own
                verdict = "holds" if taken <= size(memory) else "MORE"
                numbers = (f"{number / (1 << 20):,.0f}" for number in (found, alone, taken))
                print(row.format(name, images, memory, *numbers, f"{spent:.0f}", verdict))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
