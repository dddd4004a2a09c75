"""Methods of the papers and ours on a CIFAR-10 ResNet, at seven budgets: accuracy of their plans.

Three steps, each of which keeps what it finished and goes on from there:

    python benchmarks/methods.py plans    --network resnet20 --weights W --data D --into DIR
    python benchmarks/methods.py accuracy --network resnet20 --weights W --data D --into DIR
    python benchmarks/methods.py table --weights W --into DIR --out docs/methods_cifar10.md

`plans` measures each method on 256 training images and solves for every budget; `--methods` picks
some, and formulas of the shelf (`formula:NAME`). What a paper publishes is measured and solved
without correction. Ours are there for networks that run as rounding leaves them, some of them again
with the statistics of layers restored in the loop. `accuracy` runs every plan on the test images,
as it is and with statistics restored on 1,024 training images; plans that several methods agree on
are run once.
"""

import argparse
import json
import re
import time
from pathlib import Path

from proxy_table import BITS, calibration, folder, load, run

BUDGETS = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0)
SAMPLES = 256
EFFORTS = ("low", "medium", "high")
PUBLISHED = {
    "ompq": ("orthogonality", {"beta": 10.0}, {}),
    "csmpq": ("separability", {}, {}),
    "hawq-v2": ("hessian-trace", {}, {}),
    "hawq-v3": ("hessian-trace", {}, {"bits": (2, 6)}),
    "limpq": ("limpq", {}, {"samples": 4096}),
    "single KL": ("kl-delta", {}, {}),
    "clado, cross-entropy": ("clado", {"pair_loss": "cross-entropy"}, {}),
    "clado, KL": ("clado", {}, {}),
}
OURS = {
    "output-error": ("output-error", {}),
    "restored-error": ("restored-error", {}),
    "logit-coupling": ("logit-coupling", {}),
    "rescaled-coupling": ("rescaled-coupling", {}),
    "gauss-newton": ("gauss-newton", {}),
    "logit-coupling, in the loop": ("logit-coupling", {"correction": "statistics"}),
    "single KL, in the loop": ("kl-delta", {"correction": "statistics"}),
}
AUTO = [f"auto, {effort} effort" for effort in EFFORTS]
LOOPED = ", in the loop"
REFINE = 60
"""Seconds by the clock, at each budget, of the rows whose cheap plan is then refined by itself."""
REFINED = [f"output-error, refined {REFINE} s", f"output-error, refined {REFINE} s{LOOPED}"]


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("step", choices=("plans", "accuracy", "table"))
    parser.add_argument("--network", default="resnet20", help="resnet20, 32, 44 or 56")
    parser.add_argument("--weights", help="a .safetensors file; {} stands for the network")
    parser.add_argument("--data", help="FILE.npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--into", required=True, help="the folder of finished parts")
    parser.add_argument("--methods", default="", help="some only, with semicolons")
    parser.add_argument("--budgets", default="", help="some only, with commas")
    parser.add_argument("--part", default="0/1", help="accuracy: this share of the plans, as 0/2")
    parser.add_argument("--correction-images", type=int, default=1024)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--out", help="the table's file")
    args = parser.parse_args()
    args.budgets = tuple(map(float, args.budgets.split(","))) if args.budgets else BUDGETS
    return args


# -- plans ----------------------------------------------------------------------------


def plans(args):
    model = load(args)
    wanted = [*PUBLISHED, *OURS, *REFINED, *AUTO, *(f"{name}{LOOPED}" for name in AUTO)]
    for name in args.methods.split(";") if args.methods else wanted:
        file = folder(args) / f"plans-{re.sub('[ :]', '-', name.replace(',', ''))}.json"
        if file.exists():
            continue
        started = time.process_time()
        found = (
            automatic(args, model, name) if name.startswith("auto") else scored(args, model, name)
        )
        record = {"method": name, "seconds": time.process_time() - started, **found}
        file.write_text(json.dumps(record))
        print(name, f"{record['seconds']:.0f} s", flush=True)


def scored(args, model, name):
    from proxyq.api.problem import problem_from
    from proxyq.auto import improve
    from proxyq.proxies import PROXIES, Cache, score
    from proxyq.proxies.cost import weight_errors
    from proxyq.search.allocate import InfeasibleError, solve

    if name.startswith("formula:"):
        proxy, options, changed = name, {}, {}
    else:
        plain = name.partition(", refined")[0]
        proxy, options, changed = (*OURS[plain], {}) if plain in OURS else PUBLISHED[plain]
    bits = changed.get("bits", BITS)
    inputs, labels = calibration(args, model, changed.get("samples", SAMPLES))
    # An hour of pairs goes on where it was stopped; its CPU seconds are then those of the rest.
    cache = Cache(folder(args) / "cache")
    (scores,) = score(
        model, [(PROXIES.get(proxy), options)], inputs, labels=labels, bits=bits, cache=cache
    )
    errors = weight_errors(model, bits) if scores.shape == "layers" else None
    judge = judge_of(args, model, "medium") if name in REFINED else None
    found, solved = {}, {}
    for budget in args.budgets:
        problem = problem_from(scores.layers, scores, f"size={budget}bit", errors=errors)
        try:
            answer = solve(problem, time_limit=20.0)
        except InfeasibleError:
            continue
        if judge is not None:
            how = "auto" if name.endswith(LOOPED) else "none"
            fixed = [None] * len(judge.names)
            answer = improve(judge, answer, bits, (), fixed, correction=how, seconds=REFINE).answer
        found[str(budget)] = answer.bits
        solved[str(budget)] = [answer.status.short, answer.gap, answer.seconds]
    return {"plans": found, "solver": solved, "notes": dict(scores.notes)}


def judge_of(args, model, effort):
    import jax

    from proxyq.auto import HELD_BACK, Judge, halves

    inputs, _ = calibration(args, model, SAMPLES * (1 + HELD_BACK[effort]))
    fit, check = halves(len(inputs), SAMPLES)
    return Judge(
        model, *(jax.tree.map(lambda x, rows=rows: x[rows], inputs) for rows in (fit, check))
    )


def automatic(args, model, name):
    from proxyq.api.problem import problem_from
    from proxyq.auto import choose

    plain = name.removesuffix(LOOPED)
    effort = plain.removeprefix("auto, ").removesuffix(" effort")
    judge = judge_of(args, model, effort)
    found, reports = {}, {}
    for budget in args.budgets:
        outcome = choose(
            judge,
            lambda scores, budget=budget: problem_from(scores.layers, scores, f"size={budget}bit"),
            BITS,
            fixed=[None] * len(judge.names),
            correction="none" if plain == name else "auto",
            effort=effort,
        )
        found[str(budget)], reports[str(budget)] = outcome.answer.bits, outcome.report
        print(
            f"  {name} {budget}: {outcome.report['chosen']} {outcome.report['kl']:.4f}", flush=True
        )
    return {"plans": found, "reports": reports}


# -- accuracy and table ---------------------------------------------------------------


def known(args):
    """`{method: {budget: bits}}` of all finished plans, and of uniform bits."""
    found = {}
    for file in sorted(folder(args).glob("plans-*.json")):
        record = json.loads(file.read_text())
        found[record["method"]] = {float(b): tuple(p) for b, p in record["plans"].items()}
    layers = max((len(plan) for own in found.values() for plan in own.values()), default=0)
    found["uniform"] = {float(b): (b,) * layers for b in (3, 4)}
    return found


def accuracy(args):
    found = [plan for own in known(args).values() for plan in own.values()]
    run(args, load(args), found)


def table(args):
    text = [
        "# Methods on CIFAR-10 ResNets",
        "",
        "Made by `benchmarks/methods.py`; its first lines tell how. Top-1 in percent on the test "
        f"images. Bits from {', '.join(map(str, BITS))}, weights only, one grid an output channel "
        "(two's complement), batch norm folded, every layer searched, average bits as given; one "
        "standard error is 0.3 at 90 %, 0.5 at 50 %. CPU seconds are for all budgets together, on "
        "a shared machine (none where a run was stopped and went on). `hawq-v3` chooses from 2 and "
        "6 bits alone. `auto` of effort high refines whatever it finds, of medium what is far off. "
        "The last rows: points above the best of uniform bits and of the methods as their papers "
        "have them (the first eight).",
    ]
    for path in sorted(one for one in Path(args.into).iterdir() if one.is_dir()):
        args.network = path.name
        text += section(args, path)
    Path(args.out).write_text("\n".join(text) + "\n")


def section(args, path):
    measured, records = {}, {}
    for file in sorted(path.glob("accuracy-*.json")):
        measured |= json.loads(file.read_text())
    for file in path.glob("plans-*.json"):
        record = json.loads(file.read_text())
        records[record["method"]] = record
    plans = known(args)
    formulas = sorted(name for name in plans if name.startswith("formula:"))
    order = ["uniform", *PUBLISHED, *OURS, *formulas]
    order += [*REFINED, *AUTO, *(f"{name}{LOOPED}" for name in AUTO)]
    images = measured["float"]["images"]
    text = ["", f"## {path.name}: float {measured['float']['none']:.2f} %, {images:,} test images"]
    for how, title in (("none", "As rounding leaves the network"),
                       ("statistics", "With the statistics of layers restored")):  # fmt: skip
        text += [
            "",
            f"{title}:",
            "",
            "| method | CPU s | " + " | ".join(map(str, args.budgets)) + " |",
        ]
        text.append("|---|---:|" + "---:|" * len(args.budgets))
        best = {}
        rows = []
        for name in order:
            looped = name.endswith(LOOPED)
            if name not in plans or (looped and how == "none"):
                continue
            if how == "statistics" and name in (*AUTO, REFINED[0]):
                continue
            cells = []
            for budget in args.budgets:
                bits = plans[name].get(budget)
                one = measured.get(",".join(map(str, bits))) if bits else None
                cells.append(None if one is None else one[how])
                if one is not None:
                    best[budget] = max(best.get(budget, 0.0), one[how])
            spent = records.get(name, {}).get("seconds")
            seconds = "" if spent is None else f"{spent:.0f}"
            rows.append((name, seconds, cells))
        for name, seconds, cells in rows:
            shown = [
                "" if c is None else f"**{c:.1f}**" if c == best[b] else f"{c:.1f}"
                for b, c in zip(args.budgets, cells, strict=True)
            ]
            text.append("| " + " | ".join([name, seconds, *shown]) + " |")
        text += beside_the_papers(args, rows)
    return text


def beside_the_papers(args, rows):
    """Rows of `auto`: points above the best of the published methods, at each budget."""
    found = {name: cells for name, _, cells in rows}
    text = []
    for name in (*AUTO, *(f"{one}{LOOPED}" for one in AUTO)):
        if name not in found:
            continue
        shown = []
        for place in range(len(args.budgets)):
            others = [found[one][place] for one in ("uniform", *PUBLISHED) if one in found]
            others, own = [c for c in others if c is not None], found[name][place]
            shown.append("" if own is None or not others else f"{own - max(others):+.1f}")
        text.append("| " + " | ".join([f"{name}, less the best published", "", *shown]) + " |")
    return text


if __name__ == "__main__":
    arguments = parsed()
    {"plans": plans, "accuracy": accuracy, "table": table}[arguments.step](arguments)
