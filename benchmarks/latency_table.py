"""Measure a latency table on this CPU, for `proxyq search --latency-table` (`docs/latency.md`).

Every layer runs alone in ONNX Runtime, with its real shapes, strides, padding and groups, in
float32 and in int8. The CPU has no other kernels, so the file gives a layer the time of int8
where weights and activations have at most 8 bits, and that of float32 anywhere else: 2, 3 and 4
bits take what 8 bits take. Transposed convolutions, which have no int8 kernel, take float32's.

All kernels run in turn, several times over; the median counts, less what an empty call takes.
Layers alike in everything are measured once; a layer used several times takes as many times as
long. Data and weights are warm in the caches. What lies between layers (pooling, sums, rounding
of the input) is not measured: `other_seconds` is 0.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

from timing import pin, table

LEAST = 2e-3
"""Seconds of one round of a kernel: short ones run several times in it."""
AT_ONCE = 1 << 26
"""Weights of the layers that are in memory together."""


def parsed():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", help="as `proxyq inspect` takes it; default: digits")
    parser.add_argument("--out", default="latency.json", help="the table (default: %(default)s)")
    parser.add_argument("--bits", default="2,3,4,6,8,16", help="weight bits (%(default)s)")
    parser.add_argument(
        "--activation-bits", default="2,4,6,8,16,float", help="activation bits (%(default)s)"
    )
    parser.add_argument("--batch", type=positive, default=1, help="images at once")
    parser.add_argument("--threads", type=positive, default=1, help="cores")
    parser.add_argument("--rounds", type=positive, default=15, help="of which the median counts")
    parser.add_argument("--weights", help="a .safetensors file, or .pt")
    parser.add_argument(
        "--input-shape", type=shape, help="such as 3,224,224, where no weights say it"
    )
    parser.add_argument("--quick", action="store_true", help="one round: times mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 1
    return args


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def shape(text):
    return tuple(map(positive, text.split(",")))


def operations(args):
    """The network's layers, and for each the operations of its uses."""
    from onnx_layers import operation

    from proxyq.model.load import load_model
    from proxyq.model.network import network

    model = load_model(args.model, weights=args.weights, input_shape=args.input_shape)
    found = network(model, args.batch)
    uses = {name: [] for name in found.names}
    for site in found.sites:
        uses[site.layer].append(operation(found.graph.main[site.position], site.operand))
    return uses


def measured(uses, rounds, threads):
    """Seconds in float32 and in int8 (`None` without such a kernel) by operation."""
    distinct = list(dict.fromkeys(op for ops in uses.values() for op in ops))
    groups, held = [[]], 0
    for op in distinct:
        size = math.prod(op.weight)
        if groups[-1] and held + size > AT_ONCE:
            groups.append([])
            held = 0
        groups[-1].append(op)
        held += size
    found = {}
    for number, group in enumerate(groups):
        print(f"group {number + 1} of {len(groups)}: {len(group)} layers", file=sys.stderr)
        found |= measured_together(group, rounds, threads)
    return found


def measured_together(group, rounds, threads):
    from onnx_layers import empty_kernel, float_kernel, int8_kernel

    made = {(op, "float32"): float_kernel(op, threads) for op in group}
    made |= {(op, "int8"): int8_kernel(op, threads) for op in group}
    kernels = {key: kernel for key, kernel in made.items() if kernel is not None}
    for (_, kind), kernel in kernels.items():
        check(kernel, kind)
    kernels[None, "empty"] = empty_kernel(threads)
    # A first call allocates and packs weights; the second tells how many make a round.
    repeats = {}
    for key, kernel in kernels.items():
        kernel()
        repeats[key] = max(1, round(LEAST / max(seconds(kernel, 1), 1e-7)))
    times = {key: [] for key in kernels}
    for _ in range(rounds):
        for key, kernel in kernels.items():
            times[key].append(seconds(kernel, repeats[key]))
    middle = {key: statistics.median(taken) for key, taken in times.items()}
    # What a call takes beyond one that does nothing.
    alone = {key: max(taken - middle[None, "empty"], 1e-9) for key, taken in middle.items()}
    return {op: (alone[op, "float32"], alone.get((op, "int8"))) for op in group}


def seconds(kernel, repeats):
    started = time.perf_counter()
    for _ in range(repeats):
        kernel()
    return (time.perf_counter() - started) / repeats


def check(kernel, kind):
    """Make sure that ONNX Runtime runs the kernel that is meant."""
    from onnx_layers import FLOAT_OPS, INT8_OPS, MOVES

    executed = kernel.executed() - MOVES
    if not executed or not executed <= (FLOAT_OPS if kind == "float32" else INT8_OPS):
        names = ", ".join(sorted(executed)) or "nothing"
        sys.exit(f"error: this ONNX Runtime runs {names} where {kind} is to be measured.")


def layer_times(uses, found):
    """Seconds in float32 and int8 by layer, over all of its uses."""
    return {
        name: (
            sum(found[op][0] for op in ops),
            sum(found[op][0] if found[op][1] is None else found[op][1] for op in ops),
        )
        for name, ops in uses.items()
    }


def widths(text, option, *others):
    """`2,4,8` or `8,float` to bit-widths, `None` for float where it is among the `others`."""
    from proxyq.errors import UsageError
    from proxyq.search.allocate.problem import check_widths

    names = [name.strip() for name in text.split(",")]
    try:
        bits = [int(name) for name in names if name not in others]
    except ValueError:
        raise UsageError(f"{option} must be bit-widths such as 4,8, got {text!r}.") from None
    check_widths(bits or [8], option)
    return [None if name in others else int(name) for name in names]


def written(times, bits, beside, device):
    """The text of the file, a line for each time."""
    layers = []
    for name, (in_float, in_int8) in times.items():
        rows = []
        for b in bits:
            for a in beside:
                narrow = b <= 8 and a is not None and a <= 8
                taken = float(f"{in_int8 if narrow else in_float:.4g}")
                row = {"weight_bits": b, "activation_bits": a, "seconds": taken}
                rows.append(f"      {json.dumps(row)}")
        layers.append(f"    {json.dumps(name)}: [\n" + ",\n".join(rows) + "\n    ]")
    head = f'{{\n  "schema": "proxyq/latency/1",\n  "device": {json.dumps(device)},\n'
    return head + '  "other_seconds": 0,\n  "layers": {\n' + ",\n".join(layers) + "\n  }\n}\n"


def processor():
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    args = parsed()
    threads = pin(args.threads)
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        sys.exit(
            f"error: measuring layers needs the package {error.name!r}, which is not installed: "
            "run `pip install onnxruntime onnx`."
        )
    from proxyq.errors import ProxyqError
    from proxyq.files import check_writable, write_atomic
    from proxyq.search.allocate.latency import load_latency

    try:
        bits = widths(args.bits, "--bits")
        beside = widths(args.activation_bits, "--activation-bits", "float")
        check_writable(args.out)
        uses = operations(args)
        times = layer_times(uses, measured(uses, args.rounds, threads))
        device = (
            f"{processor()}, {threads} thread{'s' * (threads != 1)}, batch {args.batch}; ONNX "
            f"Runtime {onnxruntime.__version__}, float32 and int8 kernels only: at most 8 bits on "
            "both sides take int8's time, all else float32's; each layer alone"
        )
        write_atomic(args.out, written(times, bits, beside, device))
        load_latency(args.out)
    except ProxyqError as error:
        sys.exit(f"error: {error}")
    total = tuple(sum(column) for column in zip(*times.values(), strict=True))
    rows = [
        (name, f"{1e6 * a:.1f}", f"{1e6 * b:.1f}", f"{b / a:.2f}")
        for name, (a, b) in {**times, "all layers": total}.items()
    ]
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{device}{load}\n")
    print(table(["layer", "float32 µs", "int8 µs", "int8 / float32"], rows))
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
