"""Accuracy of every built-in method on a CIFAR-10 ResNet, with and without correction.

For each proxy and recipe: search at a budget, then measure top-1 on the test images of the plan
as it is (`none`) and with the layers' statistics corrected, beside the float network and a
uniform plan. All networks of one correction run in one pass over the images.

    python benchmarks/cifar_accuracy.py --weights resnet20.safetensors --data cifar10.npz

`--data` holds `x_train, y_train, x_test, y_test`. Batch norm is folded, weights are rounded per
output channel to the least squared error, activations stay float unless a recipe says otherwise
(`--float-activations` makes all alike).
"""

import argparse
import time
from pathlib import Path

import proxyq
from proxyq import Plan
from proxyq.api import evaluate

PROXIES = (
    "weight-mse",
    "sqnr",
    "output-error",
    "orthogonality",
    "separability",
    "params",
    "macs",
    "uniform",
    "random",
)
RECIPES = ("ompq", "csmpq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="resnet20", help="resnet20, 32, 44 or 56")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--bits", default="2,3,4,6")
    parser.add_argument("--budget", default="size=3bit")
    parser.add_argument("--samples", type=int, default=1024, help="images for the correction")
    parser.add_argument("--corrections", default="none,weights,statistics,auto")
    parser.add_argument("--extra-code", default="negative", help="negative or either")
    parser.add_argument("--float-activations", action="store_true")
    parser.add_argument("--proxies", default=",".join(PROXIES))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    args = parser.parse_args()

    example = Path(__file__).resolve().parents[1] / "examples" / "cifar_resnet.py"
    model = proxyq.load_model(f"{example}:{args.network}", weights=args.weights)
    model = model.replace(
        preprocessing=proxyq.Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    )
    train, test = f"{args.data}:x_train,y_train", f"{args.data}:x_test,y_test"
    bits = tuple(int(b) for b in args.bits.split(","))
    plans: dict[str, Plan] = {}
    seconds: dict[str, float] = {}
    methods = [("proxy", name) for name in args.proxies.split(",") if name]
    methods += [("recipe", name) for name in args.recipes.split(",") if name]
    for kind, name in methods:
        started = time.perf_counter()
        own = {"proxy": name, "bits": bits} if kind == "proxy" else {"recipe": name}
        if args.float_activations:
            own["activation_bits"] = "float"
        plan = proxyq.search(model, train, budget=args.budget, extra_code=args.extra_code, **own)
        label = name if kind == "proxy" else f"recipe {name}"
        seconds[label] = time.perf_counter() - started
        plans[label] = plan

    columns = args.corrections.split(",")
    table: dict[str, dict[str, float]] = {name: {} for name in ("uniform", *plans)}
    exact = 0.0
    for correction in columns:
        result = evaluate(
            model,
            list(plans.values()),
            train,
            test,
            names=list(plans),
            correction=correction,
            samples=args.samples,
        )
        exact = result.float_top1
        for one in (*result.plans, *([result.uniform] if result.uniform else [])):
            table[one.name][correction] = one.top1

    print(
        f"{args.network}, {args.budget}, bits {args.bits}, odd code {args.extra_code}; "
        f"float {exact:.2f} %"
    )
    print(f"{'method':<20}{'size bit':>9}{'search s':>9}" + "".join(f"{c:>12}" for c in columns))
    for name, row in table.items():
        average = f"{plans[name].average_bits:.3f}" if name in plans else ""
        spent = f"{seconds[name]:.2f}" if name in seconds else ""
        cells = "".join(f"{row[c]:12.2f}" if c in row else " " * 12 for c in columns)
        print(f"{name:<20}{average:>9}{spent:>9}{cells}")
    for name, plan in plans.items():
        print(f"{name:<20}", *plan.bits().values())


if __name__ == "__main__":
    main()
