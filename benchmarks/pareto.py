"""Fronts of 15 budgets from scores that are there: seconds of the solver, separable and coupled.

Layers, costs and couplings are drawn at random in the sizes of a ResNet-20 (20 layers) and a
ResNet-56 (55), four bit-widths each. Costs fall by four for each bit and spread over decades from
layer to layer; a coupling is the Gram matrix of vectors of those lengths with a part in common,
so it is positive semidefinite, as that of `logit-coupling` is. What should hold: under 1 s
separable, under 30 s coupled, all budgets together.
"""

import argparse
from dataclasses import dataclass

from timing import once, pin, table

BITS = (2, 3, 4, 8)
RANK = 30


@dataclass(frozen=True)
class Layer:
    name: str
    weights: int
    macs: int
    group: str | None = None


def drawn(count, coupled, seed):
    """Layers, costs `[layers, bits]` and a coupling of all choices, or `None`."""
    import numpy as np

    rng = np.random.default_rng(seed)
    weights = (2.0 ** rng.uniform(9, 16, count)).astype(int)
    layers = [Layer(f"layer{i}", int(w), int(64 * w)) for i, w in enumerate(weights)]
    spread = np.exp(rng.normal(0, 1, (count, 1)) + rng.normal(0, 0.2, (count, len(BITS))))
    cost = spread * 4.0 ** -np.array(BITS)
    if not coupled:
        return layers, cost, None
    moves = rng.normal(size=(count, 1, RANK)) + 0.3 * rng.normal(size=(count, len(BITS), RANK))
    moves = (moves + 0.7 * rng.normal(size=(1, 1, RANK))).reshape(-1, RANK)
    moves *= np.sqrt(cost.ravel())[:, None] / np.linalg.norm(moves, axis=1, keepdims=True)
    return layers, np.zeros_like(cost), moves @ moves.T


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[20, 55])
    parser.add_argument("--budget", default="size=2.5bit..6bit")
    parser.add_argument("--points", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3, help="problems of each kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="8 layers, 4 budgets, once")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.points, args.seeds = [8], 4, 1
    pin(args.threads)

    from proxyq.search.allocate import budget_steps, build_problem
    from proxyq.search.allocate.pareto import solve_steps

    def front(count, coupled, seed):
        layers, cost, coupling = drawn(count, coupled, seed)
        problem = build_problem(layers, cost, BITS, steps[-1], coupling=coupling)
        return once(lambda: solve_steps(problem, steps))

    steps = budget_steps(args.budget, args.points)
    front(4, False, 0)  # what is imported on the way
    rows = []
    for coupled in (False, True):
        for count in args.layers:
            for seed in range(args.seeds):
                time, found = front(count, coupled, seed)
                proven = sum(one.status.short == "optimal" for one in found.answers)
                gap = max(one.gap for one in found.answers)
                kind = f"{count} layers, {'coupled' if coupled else 'separable'}"
                solved = f"{proven} of {len(found.answers)}"
                rows.append((kind, str(seed), solved, f"{gap:.1e}", *time.cells()))
    print(table(("problem", "seed", "optimal", "worst gap", "wall, s", "cpu, s"), rows))


if __name__ == "__main__":
    main()
