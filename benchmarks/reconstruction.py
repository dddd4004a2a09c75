"""What the rounding of one plan does to accuracy: nearest, corrected, learned.

For each network and size: the plan that `auto` finds, with activations in float and at 8 bits; then
top-1 on all test images of the plan rounded to nearest as it is, with means corrected, with
statistics restored, with AdaRound and with block reconstruction, and the CPU seconds that
preparing it took. A row is written as soon as it is measured, and one that is there already is not
measured again.

    python benchmarks/reconstruction.py --weights 'cifar10_{}.safetensors' --data cifar10.npz \\
        --into rows/ --networks resnet20,resnet56 --out docs/reconstruction_cifar10.md

`--data` holds `x_train, y_train, x_test, y_test`; `{}` in `--weights` stands for the network.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

import proxyq
from proxyq.api.inputs import as_data, as_eval_data, calibration_of, inputs_of
from proxyq.api.quantize import quantize_model
from proxyq.files import write_atomic

WAYS = {
    "nearest": {"correction": "none"},
    "means corrected": {"reconstruction": "bias"},
    "statistics restored": {"correction": "statistics"},
    "AdaRound": {"reconstruction": "adaround"},
    "AdaRound, no gains and shifts": {"reconstruction": "adaround", "affine_rate": 0.0},
    "block": {"reconstruction": "block"},
    "block, Fisher by image": {"reconstruction": "block", "weighting": "image"},
    "block, mean Fisher": {"reconstruction": "block", "weighting": "mean"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--into", required=True, help="folder for measured rows")
    parser.add_argument("--out", help="write the table here, in Markdown")
    parser.add_argument("--networks", default="resnet20,resnet56")
    parser.add_argument("--sizes", default="3,2.5", help="bits on average")
    parser.add_argument("--activations", default="float,8")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    into = Path(args.into)
    into.mkdir(parents=True, exist_ok=True)
    names = args.networks.split(",")
    for name in names:
        measure(args, name, into)
    if args.out:
        write_atomic(args.out, "\n".join(table(into, names)) + "\n")


def measure(args: argparse.Namespace, name: str, into: Path) -> None:
    """Rows of one network that are not there yet."""
    example = Path(__file__).resolve().parents[1] / "examples" / "cifar_resnet.py"
    model = proxyq.load_model(f"{example}:{name}", weights=Path(args.weights.format(name)))
    model = model.replace(
        preprocessing=proxyq.Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    )
    train = f"{args.data}:x_train,y_train"
    inputs = inputs_of(as_data(train, model), model, args.samples, None)
    held = as_eval_data(f"{args.data}:x_test,y_test", model)
    test, labels = calibration_of(held, model, len(held), None)
    file = into / f"{name}.json"
    rows = json.loads(file.read_text()) if file.is_file() else {}

    def keep(key: str, edits, seconds: float) -> None:
        engine = proxyq.Engine.build(model, len(test))
        top1 = 100 * float(np.mean(engine.logits(test, edits).argmax(axis=-1) == labels))
        rows[key] = {"top1": round(top1, 2), "seconds": round(seconds, 1)}
        write_atomic(file, json.dumps(rows, indent=1, sort_keys=True) + "\n")
        print(name, key, rows[key], flush=True)

    if "float" not in rows:
        keep("float", {}, 0.0)
    for size in args.sizes.split(","):
        wanted = [
            f"{size} bit, activations {beside}, {way}"
            for beside in args.activations.split(",")
            for way in args.ways.split(",")
        ]
        if all(key in rows for key in wanted):
            continue
        saved = into / f"{name}-{size}.json"
        if not saved.is_file():
            proxyq.search(
                model, train, budget=f"size={size}bit", bits=(2, 3, 4, 6), samples=args.samples
            ).save(saved)
        plan = proxyq.Plan.load(saved)
        for beside in args.activations.split(","):
            width = None if beside == "float" else int(beside)
            layers = {
                key: layer.model_copy(update={"activation_bits": width})
                for key, layer in plan.layers.items()
            }
            own = plan.model_copy(update={"layers": layers})
            for way in args.ways.split(","):
                key = f"{size} bit, activations {beside}, {way}"
                if key in rows:
                    continue
                how = dict(WAYS[way])
                changed = {k: how.pop(k) for k in ("affine_rate", "weighting") if k in how}
                learns = how.get("reconstruction") in ("adaround", "block")
                learning = proxyq.Learning(steps=args.steps, **changed) if learns else None
                start = time.process_time()
                made = quantize_model(model, own, inputs, learning=learning, **how)
                jax.block_until_ready([e.weight for e in made.edits.values()])
                keep(key, made.edits, time.process_time() - start)


def table(into: Path, names: list[str]) -> list[str]:
    """Markdown from the rows."""
    lines = [
        "# What rounding does to a plan",
        "",
        "Top-1 in percent on the 10,000 test images of CIFAR-10, and CPU seconds to prepare the "
        "network: plans of `auto` at 3.0 and 2.5 bits on average (candidates 2, 3, 4, 6), 1,024 "
        "training images without labels, 1,000 steps of 32 images for each layer or block. One "
        "standard error is 0.3 points. `python benchmarks/reconstruction.py` makes this page.",
    ]
    for name in names:
        rows = json.loads((into / f"{name}.json").read_text())
        columns = list(dict.fromkeys(_column(k)[0] for k in rows if k != "float"))
        order = sorted(columns, key=lambda c: ("float" not in c, -float(c.split()[0])))
        lines += ["", f"{name}, float {rows['float']['top1']:.2f} %:", ""]
        lines += ["| | " + " | ".join(order) + " |", "|---|" + "---:|" * len(order)]
        for way in WAYS:
            cells = [rows.get(f"{column}, {way}") for column in order]
            if any(cells):
                text = [f"{c['top1']:.1f} ({c['seconds']:.0f} s)" if c else "" for c in cells]
                lines.append(f"| {way} | " + " | ".join(text) + " |")
    return lines


def _column(key: str) -> tuple[str, str]:
    """`SIZE bit, activations HOW` and the way, of a row's key."""
    size, activations, way = key.split(", ", 2)
    return f"{size}, {activations}", way


if __name__ == "__main__":
    main()
