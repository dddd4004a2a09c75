"""Every proxy on a CIFAR-10 ResNet: what it costs, and how good its plans are.

Three steps, each of which keeps what it finished and goes on from there:

    python benchmarks/proxy_table.py score    --network resnet20 --weights W --data D --into DIR
    python benchmarks/proxy_table.py accuracy --network resnet20 --weights W --data D --into DIR
    python benchmarks/proxy_table.py table --into DIR --out docs/proxies_cifar10.md

`score` runs each proxy in a process of its own on one core, without any cache: CPU seconds of
scoring (compiling included, loading the network not) and the most memory beyond what the
process held before. `accuracy` solves each proxy's plan for every budget exactly, and measures
all plans on the test images without and with the correction of layer statistics (fitted on
1,024 training images by default), beside uniform bits and random feasible plans: bits raised
one step at a time at random layers until nothing fits. Plans that several proxies agree on are
run once.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from cifar import EXAMPLE, MEAN, STD
from timing import growth_mib, once, pin

BITS = (2, 3, 4, 6)
BUDGETS = (2.5, 2.75, 3.0)
BASELINES = ("params", "macs", "uniform", "random")
CORRECTIONS = ("none", "statistics")
RANDOM_PLANS = 10
SAMPLES, TRAINING_SAMPLES = 256, 4096


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("step", choices=("score", "one", "accuracy", "table"))
    parser.add_argument("--network", default="resnet20", help="resnet20, 32, 44 or 56")
    parser.add_argument("--weights", help="a .safetensors file; {} stands for the network")
    parser.add_argument("--data", help="FILE.npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--into", required=True, help="the folder of finished parts")
    parser.add_argument("--proxies", default="", help="some only, with commas")
    parser.add_argument("--part", default="0/1", help="accuracy: this share of the plans, as 0/2")
    parser.add_argument("--correction-images", type=int, default=1024)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--mappings", default="both", help="own: no second way of importances")
    parser.add_argument("--out", help="the table's file")
    return parser.parse_args()


def load(args):
    import proxyq

    model = proxyq.load_model(
        f"{EXAMPLE}:{args.network}", weights=args.weights.format(args.network)
    )
    return model.replace(preprocessing=proxyq.Preprocessing(mean=MEAN, std=STD))


def calibration(args, model, samples):
    from proxyq.api.inputs import as_data, calibration_of

    return calibration_of(as_data(f"{args.data}:x_train,y_train", model), model, samples, None)


def folder(args):
    path = Path(args.into) / args.network
    path.mkdir(parents=True, exist_ok=True)
    return path


def names(args):
    from proxyq.proxies import PROXIES

    return args.proxies.split(",") if args.proxies else PROXIES.available()


# -- what a proxy costs ---------------------------------------------------------------


def score(args):
    """One process after the other; what is there already is left."""
    for name in names(args):
        if (folder(args) / f"{name}.json").exists():
            continue
        command = [sys.executable, __file__, "one", "--network", args.network, "--into", args.into]
        command += ["--weights", args.weights, "--data", args.data, "--proxies", name]
        run = subprocess.run(command, capture_output=True, text=True)
        print(name, "ok" if run.returncode == 0 else run.stderr[-2000:], flush=True)


def one(args):
    pin(1)
    from proxyq.proxies import PROXIES, as_cost
    from proxyq.proxies import score as scores_of
    from proxyq.proxies.cost import weight_errors

    model = load(args)
    proxy = PROXIES.get(args.proxies)
    samples = TRAINING_SAMPLES if proxy.cost_class == "training" else SAMPLES
    inputs, labels = calibration(args, model, samples)
    found = {}

    def work():
        found["time"], found["scores"] = once(
            lambda: scores_of(model, [(proxy, {})], inputs, labels=labels, bits=BITS)[0]
        )

    memory = growth_mib(work)
    scores, time = found["scores"], found["time"]
    errors = weight_errors(model, BITS) if scores.shape == "layers" else None
    record = {
        "proxy": proxy.name,
        "cpu_seconds": time.cpu,
        "wall_seconds": time.wall,
        "mib": memory,
        "samples": samples if proxy.needs_images else 0,
        "cost": scores.cost if scores.shape == "layers" else "given",
        "cost_class": proxy.cost_class,
        "costs": as_cost(scores, errors=errors).tolist(),
    }
    if scores.shape == "layers":  # the published way with an importance
        record["linear"] = as_cost(scores, "linear-bits").tolist()
    file = folder(args) / f"{proxy.name}.json"
    file.write_text(json.dumps(record))


# -- how good its plans are -----------------------------------------------------------


def plans(args, model):
    """`{(method, budget): bits of every layer}`, for all methods, random plans and uniform."""
    from proxyq.model.network import LAYERS_AT, network
    from proxyq.proxies.cost import weight_errors
    from proxyq.search.allocate import build_problem, solve

    layers = network(model, LAYERS_AT).layers
    errors = weight_errors(model, BITS)
    found = {}
    for name in names(args):
        file = folder(args) / f"{name}.json"
        if not file.exists():
            continue
        record = json.loads(file.read_text())
        tables = {name: np.array(record["costs"])}
        if "linear" in record and name not in BASELINES and args.mappings == "both":
            linear = np.array(record["linear"])
            if record["cost"] != "linear-bits":
                tables[f"{name} (linear-bits)"] = linear
            else:
                importance = linear[:, :1] / (BITS[-1] - BITS[0])
                relative = errors.squared / errors.energy[:, None]
                tables[f"{name} (times-relative-dw2)"] = importance * relative
        for label, table in tables.items():
            for budget in BUDGETS:
                problem = build_problem(layers, table, BITS, f"size={budget}bit")
                found[label, budget] = solve(problem).bits
    sizes = np.array([layer.weights for layer in layers])
    for seed in range(RANDOM_PLANS):
        for budget in BUDGETS:
            found[f"random plan {seed}", budget] = random_plan(sizes, budget, seed)
    found["uniform 3 bit", 3.0] = (3,) * len(layers)
    return layers, found


def random_plan(sizes, budget, seed):
    """Bits raised one step at a time at random layers, until nothing more fits."""
    rng = np.random.default_rng(seed)
    column = np.zeros(len(sizes), int)
    room = budget * sizes.sum() - BITS[0] * sizes.sum()
    while True:
        steps = np.array([BITS[min(k + 1, len(BITS) - 1)] - BITS[k] for k in column]) * sizes
        fits = np.flatnonzero((steps > 0) & (steps <= room))
        if not len(fits):
            return tuple(BITS[k] for k in column)
        layer = rng.choice(fits)
        room -= steps[layer]
        column[layer] += 1


def accuracy(args):
    model = load(args)
    _, wanted = plans(args, model)
    run(args, model, wanted.values())


def run(args, model, plans):
    """Top-1 of each of the plans, as it is and with statistics restored, kept plan by plan."""
    import jax
    import jax.numpy as jnp

    from proxyq.api.inputs import as_eval_data, labelled_batches
    from proxyq.engine import Engine
    from proxyq.engine.statistics import correct_statistics, float_moments
    from proxyq.model.model import logits_of
    from proxyq.ptq.quantized import round_weights

    inputs, _ = calibration(args, model, args.correction_images)
    data = as_eval_data(f"{args.data}:x_test,y_test", model).subset(np.arange(args.test_images))
    fitting = Engine.build(model, args.correction_images)
    moments, _ = float_moments(fitting, inputs)
    engine = Engine.build(model, len(data))
    batches = [
        (engine.start(jax.tree.map(jnp.asarray, batch)), labels)
        for batch, labels in labelled_batches(data, model, engine.batch_size)
    ]

    def top1(edits):
        right = 0
        for start, labels in batches:
            logits = np.asarray(logits_of(engine.resume(start, 0, edits)))[: len(labels)]
            right += int((logits.argmax(axis=-1) == labels).sum())
        return 100.0 * right / len(data)

    part, parts = map(int, args.part.split("/"))
    file = folder(args) / f"accuracy-{part}-of-{parts}.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    known = {
        key for other in folder(args).glob("accuracy-*") for key in json.loads(other.read_text())
    }
    unique = sorted(set(plans))[part::parts]
    if part == 0 and "float" not in known:
        done["float"] = {
            "none": top1({}),
            "images": len(data),
            "correction_images": args.correction_images,
        }
    for number, bits in enumerate(unique):
        key = ",".join(map(str, bits))
        if key in known:
            continue
        rounded = round_weights(fitting, dict(zip(fitting.network.names, bits, strict=True)))
        restored = correct_statistics(fitting, rounded, inputs, moments)
        done[key] = {"none": top1(rounded), "statistics": top1(restored)}
        file.write_text(json.dumps(done))
        print(f"{number + 1}/{len(unique)} {done[key]}", flush=True)


# -- the table ------------------------------------------------------------------------


def table(args):
    text = [
        "# Every proxy on CIFAR-10 ResNets",
        "",
        "Made by `benchmarks/proxy_table.py`; its first lines tell how. Bits from "
        f"{', '.join(map(str, BITS))}, weights only, one grid an output channel, batch norm "
        f"folded, every layer searched, plans solved exactly. Scores from {SAMPLES} training "
        f"images ({TRAINING_SAMPLES:,} for limpq, which trains). Cost: CPU seconds on one core, "
        "compiling included, and MiB beyond the loaded network. Top-1 in percent, without "
        "correction / with the statistics of layers restored; one standard error is 0.3 at 90 %, "
        "0.5 at 50 %. In brackets how an importance becomes costs, first as the proxy's record has "
        "it: bits times importance (linear-bits), as most papers do, or importance times the "
        "rounding error of the weights (times-dw2), or times that error over the weights' energy "
        "(times-relative-dw2).",
    ]
    for path in sorted(one for one in Path(args.into).iterdir() if one.is_dir()):
        args.network = path.name
        text += section(args, path)
    Path(args.out).write_text("\n".join(text) + "\n")


def section(args, path):
    model = load(args)
    _, wanted = plans(args, model)
    measured = {}
    for file in sorted(path.glob("accuracy-*.json")):
        measured |= json.loads(file.read_text())
    records = {file.stem: json.loads(file.read_text()) for file in path.glob("*.json")}
    methods = dict.fromkeys(label for label, _ in wanted if not label.startswith("random plan"))

    def cells(label):
        shown = []
        for budget in BUDGETS:
            labels = [label]
            if label == "mean of ten random plans":
                labels = [f"random plan {seed}" for seed in range(RANDOM_PLANS)]
            keys = [wanted.get((one, budget)) for one in labels]
            found = [measured.get(",".join(map(str, key))) for key in keys if key]
            if not found or None in found:
                shown.append("")
                continue
            means = (np.mean([one[how] for one in found]) for how in CORRECTIONS)
            shown.append(" / ".join(f"{mean:.1f}" for mean in means))
        return shown

    labels = [
        one
        for one in (*methods, "mean of ten random plans")
        if (all if "(" in one else any)(cells(one))  # a second way may share some plans only
    ]

    def row(label):
        name, _, mapping = label.partition(" (")
        record = records.get(name)
        shown, cost = label, [record["cost_class"] if record else "", "", ""]
        if record and not mapping:
            cost[1:] = f"{record['cpu_seconds']:.1f}", f"{max(record['mib'], 0.0):.0f}"
            if "linear" in record and name not in BASELINES:
                shown = f"{name} ({record['cost']})"
        return "| " + " | ".join([shown, *cost, *cells(label)]) + " |"

    order = {"": 0, "weights": 1, "forward": 2, "backward": 3, "curvature": 4, "sweep": 5}

    def place(label):
        record = records.get(label.split(" (")[0], {})
        name = label.split(" (")[0]
        return order.get(record.get("cost_class", ""), 6), name not in BASELINES, label

    images = measured.get("float", {}).get("images", 0)
    fitted = measured.get("float", {}).get("correction_images", 1024)
    exact = measured.get("float", {}).get("none", float("nan"))
    return [
        "",
        f"## {path.name}: float {exact:.2f} %, {images:,} test images, {fitted:,} images for the "
        "correction",
        "",
        "| method | cost class | CPU s | MiB | 2.5 bits | 2.75 bits | 3.0 bits |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(row(label) for label in sorted(labels, key=place)),
    ]


if __name__ == "__main__":
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
    arguments = parsed()
    steps = {"score": score, "one": one, "accuracy": accuracy, "table": table}
    steps[arguments.step](arguments)
