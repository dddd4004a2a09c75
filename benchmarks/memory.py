"""The peak of main memory under `--memory`: what a command takes beside what it was allowed.

Each command scores an untrained network of torchvision on random images, in a process of its own,
whose largest resident set the system tells (`wait4`). Most of that is there before anything is
measured: libraries, the imported network, its weights and what is compiled. So every proxy is also
run on four images (`reconstruct` on a batch), and the difference of the two is what the others
take: the number that the bound is about. What `--memory` bounds are activations; the images
themselves, weights rounded to every bit-width, and what XLA's kernels need, come on top.

`reconstruct` learns the rounding of one plan with a step for each layer.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}


def parsed():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="torchvision:resnet18@none", help="(%(default)s)")
    parser.add_argument(
        "--proxies",
        default="orthogonality,output-error,fisher,clado,reconstruct",
        help="(%(default)s)",
    )
    parser.add_argument("--memory", default="256MiB,1GiB,4GiB", help="bounds (%(default)s)")
    parser.add_argument("--samples", type=int, default=256, help="images (%(default)s)")
    parser.add_argument("--pairs", type=int, default=16, help="images of clado (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="the digits network, few images")
    args = parser.parse_args()
    if args.quick:
        args.model, args.samples, args.pairs = "digits", 64, 8
        args.memory, args.proxies = "1MiB,64MiB", "orthogonality,fisher"
    return args


def size(text):
    """`4GiB` in bytes."""
    unit = text[-3:]
    return int(float(text[:-3]) * UNITS[unit])


def peak(words):
    """The largest resident set of a command in bytes, its exit code and stderr, and the seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "proxyq", *words], stdout=subprocess.DEVNULL, stderr=told
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        text = told.read().decode(errors="replace").strip()
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit, process.returncode, text, time.perf_counter() - started


def command(args, proxy, samples, memory, folder):
    """What is typed."""
    common = ["--data", "random" if args.model != "digits" else "digits", "--samples", str(samples)]
    common += ["--quiet", *([] if memory is None else ["--memory", memory])]
    if proxy == "reconstruct":
        plan = folder / "plan.json"
        if not plan.exists():
            words = ["search", args.model, "--proxy", "params", "--budget", "size=4bit"]
            done = peak([*words, "--out", str(plan), "--quiet"])
            if done[1]:
                raise SystemExit(done[2])
        words = ["quantize", args.model, str(plan), "--reconstruct", "block", "--steps", "1"]
        return [*words, "--out", str(folder / "net"), "--no-cache", *common]
    words = ["score", args.model, "--proxy", proxy, "--bits", "4", "--no-cache"]
    return [*words, "--out", str(folder / "scores.json"), *common]


def main():
    args = parsed()
    row = "{:<14} {:>7} {:>8} {:>10} {:>10} {:>10} {:>7}  {}"
    print(row.format("", "images", "--memory", "peak MiB", "alone MiB", "images MiB", "s", ""))
    with tempfile.TemporaryDirectory() as made:
        for proxy in args.proxies.split(","):
            images = args.pairs if proxy == "clado" else args.samples
            least = 32 if proxy == "reconstruct" else 4
            alone, code, text, _ = peak(command(args, proxy, least, None, Path(made)))
            if code:
                raise SystemExit(text)
            for memory in args.memory.split(","):
                found, code, text, seconds = peak(command(args, proxy, images, memory, Path(made)))
                if code:
                    print(f"{proxy:<14} {images:>7} {memory:>8}  refused: {text}", flush=True)
                    continue
                taken = found - alone
                verdict = "holds" if taken <= size(memory) else "MORE"
                numbers = (f"{number / (1 << 20):,.0f}" for number in (found, alone, taken))
                print(row.format(proxy, images, memory, *numbers, f"{seconds:.0f}", verdict))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
