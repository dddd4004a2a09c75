"""Evolution of formulas, against random search and EMQ's settings, with as many evaluations.

Each method runs with the same tables, plans held back and seeds. Printed are the best fitness by
evaluations (mean over seeds, least and most), then, of the formula that is written, its length and
its rank correlation on the plans held back and on tables held out.

    python benchmarks/evolution.py --table digits --evaluations 5000 --seeds 5
    python benchmarks/evolution.py --table one.json --holdout two.json --data images.npz
"""

import argparse
import time

import numpy as np

from proxyq import api
from proxyq.proxies import Cache

METHODS = {
    "evolution": {"method": "default"},
    "evolution, no NSGA-II": {"method": "default", "survivors": "best"},
    "random search": {"method": "random"},
    "EMQ's settings": {"method": "emq"},
    "random trees of EMQ": {"method": "random", "structure": "tree"},
}
POINTS = 8


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="append")
    parser.add_argument("--holdout", action="append", default=[])
    parser.add_argument("--weights", action="append")
    parser.add_argument("--code", action="append", default=[])
    parser.add_argument("--data", action="append")
    parser.add_argument("--evaluations", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--entries", type=int, default=2048)
    parser.add_argument("--executor", default="serial")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.table = args.table or ["digits"]
    if args.quick:
        args.evaluations, args.seeds, args.entries = 300, 2, 128
    return args


def curve(logbook, points):
    """The best fitness after so many evaluations; NaN before the first."""
    rows = [(row["evaluations"], row["best"]) for row in logbook if row["best"] is not None]
    measured, best = map(np.asarray, zip(*rows, strict=True))
    places = np.searchsorted(measured, points, side="right") - 1
    return np.where(places >= 0, best[places], np.nan)


def mean(values):
    return float(np.mean([np.nan if value is None else value for value in values] or [np.nan]))


def main():
    args = parsed()
    points = np.unique(np.geomspace(100, args.evaluations, POINTS).round(-1).astype(int))
    print(
        f"{', '.join(args.table)}; held out: {', '.join(args.holdout) or 'none'}; "
        f"{args.evaluations} formulas, {args.seeds} seeds; fitness: mean, least and most\n"
    )
    heads = [f"{point:>18}" for point in points]
    print(f"{'formulas measured':<24}" + "".join(heads))
    results = {}
    for name, method in METHODS.items():
        given = dict(method)
        started = time.process_time()
        results[name] = [
            api.evolve(
                args.table,
                args.holdout,
                weights=args.weights,
                code=args.code,
                data=args.data,
                entries=args.entries,
                evaluations=args.evaluations,
                seed=seed,
                executor=args.executor,
                cache_dir=Cache(),
                **given,
            )
            for seed in range(args.seeds)
        ]
        spent = (time.process_time() - started) / args.seeds
        curves = np.array([curve(one.logbook, points) for one in results[name]])
        cells = [
            f"{column.mean():>8.3f} {column.min():.2f} {column.max():.2f}" for column in curves.T
        ]
        print(f"{name:<24}" + "".join(cells) + f"   {spent:.1f} s cpu each", flush=True)
    print(f"\n{'written':<24}{'nodes':>8}{'fitness':>9}{'held back':>11}{'held out':>10}")
    for name, found in results.items():
        best = [one.best for one in found]
        figures = (
            np.mean([one.individual.size for one in best]),
            np.mean([one.individual.fitness for one in best]),
            np.mean([mean(one.validation) for one in best]),
            np.mean([mean(one.holdout) for one in best]),
        )
        print("{:<24}{:>8.1f}{:>9.3f}{:>11.3f}{:>10.3f}".format(name, *figures))
    print(
        "\nformulas of the evolution: "
        + "; ".join(one.best.individual.formula for one in results["evolution"])
    )


if __name__ == "__main__":
    main()
