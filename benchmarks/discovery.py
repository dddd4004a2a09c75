"""The search for new proxies: evolved on three networks, tested once on two others.

Tables of measured plans come first, one for each network, by

    proxyq table examples/cifar_resnet.py:resnet20 --weights W --data D --eval-data E \\
        --mean ... --std ... --samples 1024 --bits 2,3,4 --out TABLES/resnet20.json

Those measured so far are in `benchmarks/tables` (ResNet-20 on 10,000 test images, the others on
the first 5,000). Then four steps, each of which keeps what it finished and goes on from there:

    python benchmarks/discovery.py evolve --tables TABLES --weights W --data D --into DIR
    python benchmarks/discovery.py shelve --tables TABLES --into DIR
    python benchmarks/discovery.py rank   --tables TABLES --weights W --data D --into DIR
    python benchmarks/discovery.py report --tables TABLES --into DIR --plans PLANS \\
        --out docs/evolved_proxies.md

`evolve` runs evolution, random search and EMQ's settings with the same number of formulas and five
seeds each, on the embedded network, ResNet-20 and ResNet-32; all runs hold the same quarter of each
table back. `shelve` takes the evolution's halls of fame together and writes three formulas as
files: those of at most 4, 8 and 16 nodes that order the plans held back best, by the mean over the
tables. `rank` puts every proxy, and the files of `proxies/evolved`, beside each other on each
network: for ResNet-44 and ResNet-56 this is the test, which decides nothing; a second `shelve`
writes its figures into the files.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
from evolution import curve
from proxy_table import load

from proxyq import api
from proxyq.proxies import PROXIES, Cache
from proxyq.proxies.formula import Formula
from proxyq.shelf import shelf

SEEN, UNSEEN = ("digits", "resnet20", "resnet32"), ("resnet44", "resnet56")
METHODS = {
    "evolution": {"method": "default", "restarts": 8},
    "random search": {"method": "random"},
    "EMQ's settings": {"method": "emq"},
}
LEAVES = ("W", "D", "A", "E", "O", "R", "bits", "weights", "macs")
"""What one pass forward gives, and one with each bit-width."""
NODES = (4, 8, 16)
"""Of the formulas of at most so many nodes the best goes on the shelf."""
WIDTHS = (2.5, 2.75, 3.0)
BESIDE = ("output-error", "restored-error", "auto, medium effort, in the loop")
TWIN = "evolved"
"""The best formula as a function, on more entries."""
PAIRS = ("clado",)
"""Proxies that run pairs of layers: an hour and more on the deeper networks."""


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("step", choices=("evolve", "shelve", "rank", "report"))
    parser.add_argument("--tables", required=True, help="the folder of measured tables")
    parser.add_argument("--weights", help="a .safetensors file; {} stands for the network")
    parser.add_argument("--data", help="FILE.npz with x_train, y_train")
    parser.add_argument("--into", required=True, help="the folder of finished parts")
    parser.add_argument("--networks", default="", help="some only, with commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=10_000)
    parser.add_argument("--entries", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--plans", help="report: the folder of benchmarks/methods.py")
    parser.add_argument("--out", help="the report's file")
    args = parser.parse_args()
    args.networks = tuple(args.networks.split(",")) if args.networks else None
    Path(args.into).mkdir(parents=True, exist_ok=True)
    return args


def measured(args, name):
    return "digits" if name == "digits" else str(Path(args.tables) / f"{name}.json")


def network(args, name):
    if name == "digits":
        return api.as_model(), None
    args.network = name
    return load(args), f"{args.data}:x_train,y_train"


# -- evolution ------------------------------------------------------------------------


def file_of(args, name, seed):
    return Path(args.into) / f"evolve-{re.sub('[^a-zA-Z]+', '-', name)}-{seed}.json"


def run(args, name, seed):
    names = args.networks or SEEN
    models, data = map(list, zip(*(network(args, one) for one in names), strict=True))
    return api.evolve(
        [measured(args, one) for one in names],
        models=models,
        data=data,
        leaves=None if name.startswith("EMQ") else LEAVES,
        evaluations=args.evaluations,
        entries=args.entries,
        samples=args.samples,
        seed=seed,
        validation_seed=0,
        cache_dir=Cache(Path(args.into) / "cache"),
        **METHODS[name],
    )


def evolve(args):
    for seed in range(args.seeds):
        for name in METHODS:
            file = file_of(args, name, seed)
            if file.exists():
                continue
            started = time.process_time()
            found = run(args, name, seed)
            for place, entry in enumerate(found.entries):
                if place == found.chosen or name == "evolution":
                    shown = " ".join(f"{value or 0:.3f}" for value in entry.validation)
                    mark = "*" if place == found.chosen else " "
                    one = entry.individual
                    print(f"{mark} {one.fitness:.3f} held back {shown} {one.formula}", flush=True)
            records = [
                json.loads(found.formula(f"seed-{seed}-{place}", place).to_json())
                for place in range(len(found.entries))
            ]
            record = found.to_json() | {
                "seconds": time.process_time() - started,
                "formulas": records,
            }
            file.write_text(json.dumps(record))
            print(f"{name}, seed {seed}: {record['seconds']:.0f} s", flush=True)


def back(record):
    """Mean rank correlation of a formula on the plans held back; undefined counts as none."""
    return float(np.mean([value or 0.0 for value in record["origin"]["validation_by_table"]]))


def fame(args):
    """`(nodes, record)` of all formulas in the evolution's halls of fame, the best held back first.

    Of those that are as good, the shortest; of these the first by seed.
    """
    found = []
    for seed in range(args.seeds):
        record = json.loads(file_of(args, "evolution", seed).read_text())
        sizes = [entry["size"] for entry in record["entries"]]
        found += zip(sizes, record["formulas"], strict=True)
    return sorted(found, key=lambda pair: (-back(pair[1]), pair[0]))


def best_by_nodes(args):
    """The best formula of each number of nodes, where more nodes make it better."""
    found = []
    for most in NODES:
        record = next((record for nodes, record in fame(args) if nodes <= most), None)
        if record is not None and record not in found:
            found.append(record)
    return found


def shelve(args):
    """Write the files; once every proxy was ranked, with the coefficients on all whole tables."""
    for number, record in enumerate(best_by_nodes(args), start=1):
        name = f"evolved-{number}"
        known = {}
        for file in sorted(Path(args.into).glob("rank-*.json")):
            for row in json.loads(file.read_text())["rows"]:
                if row["name"] == f"formula:{name}":
                    known[file.stem.removeprefix("rank-")] = row["correlations"]["spearman"]
        origin = {**record["origin"], **({"spearman_of_all_plans": known} if known else {})}
        formula = Formula.from_json({**record, "name": name, "origin": origin})
        formula.save(shelf("proxies") / "evolved" / f"{formula.name}.json")
        print(formula.name, f"{back(record):.3f}", record["formula"])


# -- ranking --------------------------------------------------------------------------


def rank(args):
    for name in args.networks or (*SEEN, *UNSEEN):
        file = Path(args.into) / f"rank-{name}.json"
        model, data = network(args, name)
        evolved = sorted((shelf("proxies") / "evolved").glob("*.json"))
        left_out = (TWIN,) if name == "digits" else (TWIN, *PAIRS)
        wanted = [one for one in PROXIES.available() if one not in left_out]
        started = time.process_time()
        found = api.rank(
            model,
            data,
            table=measured(args, name),
            proxies=[*wanted, *(f"formula:{one.stem}" for one in evolved)],
            samples=args.samples,
            cache_dir=Cache(Path(args.into) / "cache"),
        )
        file.write_text(json.dumps(found.to_json()))
        print(f"{name}: {time.process_time() - started:.0f} s", flush=True)


# -- report ---------------------------------------------------------------------------


def report(args):
    text = [
        "# Evolved proxies, and all others, on measured plans",
        "",
        "Made by `benchmarks/discovery.py`; its first lines tell how, and on how many images.",
        "",
        *curves(args),
        *rankings(args),
        *(plans(args) if args.plans else []),
    ]
    Path(args.out).write_text("\n".join(text) + "\n")


def curves(args):
    points = np.unique(np.geomspace(100, args.evaluations, 7).round(-2).astype(int))
    text = [
        "## The search",
        "",
        f"{args.evaluations:,} formulas with each of {args.seeds} seeds. Best fitness (mean "
        "Spearman's coefficient over the tables' plans that are seen): mean over the seeds, and "
        "least. Then of the formula that is written: nodes, and its mean coefficient on the plans "
        "held back.",
        "",
        "| | " + " | ".join(f"{point:,}" for point in points) + " | nodes | held back |",
        "|---|" + "---:|" * (len(points) + 2),
    ]
    for name in METHODS:
        rows, sizes, backs = [], [], []
        for seed in range(args.seeds):
            record = json.loads(file_of(args, name, seed).read_text())
            rows.append(curve(record["logbook"], points))
            chosen = record["chosen"]
            sizes.append(record["entries"][chosen]["size"])
            backs.append(back(record["formulas"][chosen]))
        cells = [
            f"{column.mean():.3f} ({column.min():.2f})" if np.isfinite(column).all() else ""
            for column in np.transpose(rows)
        ]
        cells += [f"{np.mean(sizes):.1f}", f"{np.mean(backs):.3f}"]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    text += [
        "",
        f"The best of at most {', '.join(map(str, NODES))} nodes on the plans held back, of all "
        "halls of fame together; in brackets table by table:",
        "",
    ]
    for record in best_by_nodes(args):
        by_table = ", ".join(f"{v or 0:.3f}" for v in record["origin"]["validation_by_table"])
        text.append(f"- `{record['formula']}`: {back(record):.3f} ({by_table})")
    return text


def rankings(args):
    """Spearman's coefficient of every proxy on every table, with its interval."""
    names = [one for one in (*SEEN, *UNSEEN) if (Path(args.into) / f"rank-{one}.json").exists()]
    rows = {}
    for name in names:
        record = json.loads((Path(args.into) / f"rank-{name}.json").read_text())
        for row in (one for one in record["rows"] if one["name"] != TWIN):
            rows.setdefault((row["name"], row["trivial"]), {})[name] = row
    text = [
        "",
        "## Every proxy on every table",
        "",
        "Spearman's rank correlation of predicted cost and measured top-1, with statistics "
        "restored, and its 95 % bootstrap interval; then, of the plan that the proxy prefers "
        "among those of about the same size, the mean points it loses to the best of them. "
        "Sorted by the mean over networks that no formula was evolved on. `, in loop`: each "
        "single run is corrected as the plans are.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    last = [name for name in names if name in UNSEEN] or names

    def mean(pair):
        values = [pair[1][n]["correlations"]["spearman"]["value"] for n in last if n in pair[1]]
        return np.mean([value or 0.0 for value in values] or [-2.0])

    for (name, trivial), own in sorted(rows.items(), key=mean, reverse=True):
        cells = []
        for network_name in names:
            row = own.get(network_name)
            one = None if row is None else row["correlations"]["spearman"]
            cells.append(
                ""
                if one is None or one["value"] is None
                else f"{one['value']:.3f} ({one['low']:.2f} to {one['high']:.2f}), "
                f"{row['mean_regret']:.2f}"
            )
        text.append(f"| {'*' + name + '*' if trivial else name} | " + " | ".join(cells) + " |")
    text += ["", *spread(args, names)]
    return text


def spread(args, names):
    """How far the plans of each table lie apart, beside what its images can tell."""
    parts = []
    for name in names:
        file = Path(args.tables) / f"{name}.json"
        if not file.is_file():  # on the package's shelf
            continue
        plans = json.loads(file.read_text())["plans"]
        images = json.loads(file.read_text())["float"]["images"]
        top1 = np.array([plan["top1"] for plan in plans])
        # The variance of a share p of n images is p (1 - p) / n.
        noise = np.mean(top1 * (100 - top1)) / images
        ceiling = np.sqrt(max(0.0, 1 - noise / top1.var()))
        parts.append(
            f"{name} {top1.std():.2f} points ({np.sqrt(noise):.2f} of it noise, were each plan "
            f"measured on {images:,} images of its own; then no cost could correlate by more than "
            f"about {ceiling:.2f})"
        )
    return ["Standard deviation of top-1 over the plans: " + "; ".join(parts) + "."]


def plans(args):
    """Accuracy of the plans that formulas find, beside others', from what `methods.py` keeps."""
    text = [
        "",
        "## The plans that they find",
        "",
        "Ranking drawn plans is not finding the best one. Top-1 on the test images of the plan "
        "that each cost finds at an average width (`benchmarks/methods.py`; bits 2, 3, 4 and 6, "
        "where tables have 2, 3 and 4), as rounding leaves the network / with statistics restored.",
    ]
    for path in sorted(one for one in Path(args.plans).iterdir() if one.is_dir()):
        measured = {}
        for file in path.glob("accuracy-*.json"):
            measured |= json.loads(file.read_text())
        text += ["", f"{path.name}, float {measured['float']['none']:.2f} %:", ""]
        text.append("| | " + " | ".join(f"{width} bits" for width in WIDTHS) + " |")
        text.append("|---|" + "---:|" * len(WIDTHS))
        for file in sorted(path.glob("plans-*.json")):
            record = json.loads(file.read_text())
            if record["method"] not in BESIDE and "evolved" not in record["method"]:
                continue
            cells = []
            for width in WIDTHS:
                bits = record["plans"].get(str(width), ())
                own = measured.get(",".join(map(str, bits)))
                cells.append("" if own is None else f"{own['none']:.1f} / {own['statistics']:.1f}")
            text.append("| " + " | ".join([record["method"], *cells]) + " |")
    return text


if __name__ == "__main__":
    arguments = parsed()
    {"evolve": evolve, "shelve": shelve, "rank": rank, "report": report}[arguments.step](arguments)
