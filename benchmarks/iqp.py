"""Coupled layers: proxyq's `iqp` against SCIP and HiGHS on the same problems.

Each problem is one choice of bits per layer at least cost x'Gx within a budget of average bits,
G positive semidefinite. The sides, each with the same limit of time and one thread:

- `iqp`: proxyq's local search, then branch and bound on its own convex relaxation.
- `scip`: SCIP with the objective as it stands, z >= x'Gx.
- `scip factor`: SCIP with G = F F', y = F'x and one z_j >= y_j^2 for each column of F.
- `highs`: HiGHS on the linearised form, a product variable w_ab for each pair of choices of two
  layers, with sum_b w_ab = x_a over the choices of each other layer.

Times are to the best plan that the side found and to the end of its proof, with what it takes
to write the model down; the gap is what was left of the proof. HiGHS does not tell when it found
its plan, and for proxyq it is the end of the local search where that found it, else the end.

Problems are drawn by a fixed seed: Gram matrices of directions with a common part, costs that
fall fourfold a bit. `--matrices FILE.npz` takes measured ones instead: `coupling [LB, LB]`,
`weights [L]`, `bits [B]`, and, where there is one, `cost [L, B]`.
"""

import argparse
import time
from functools import partial
from pathlib import Path

from timing import Time, once, pin, ratio, table

pin(1)  # before NumPy is imported

import numpy as np  # noqa: E402

SHARES = (0.15, 0.25, 0.4, 0.55, 0.7)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="20x4,50x4,100x4,150x3", help="layers x bit-widths")
    parser.add_argument("--matrices", action="append", default=[], help="FILE.npz; repeatable")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of each solve")
    parser.add_argument("--sides", default="iqp,scip,scip factor,highs")
    parser.add_argument(
        "--shares", default=",".join(map(str, SHARES)), help="0: least bits, 1: most"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="5 layers, one budget, 10 seconds")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.matrices, args.seconds, args.shares = "5x3", [], 10.0, "0.4"
    return args


def drawn(layers, columns, seed):
    """`(coupling, weights, bits)` like those of measured networks."""
    rng = np.random.default_rng([seed, layers, columns])
    bits = np.array((2, 3, 4, 6, 8)[:columns])
    directions = rng.normal(size=20) + rng.normal(size=(layers, 1, 20))
    directions = (directions + 1.4 * rng.normal(size=(layers, columns, 20))).reshape(-1, 20)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    alike = 0.7 * directions @ directions.T + 0.3 * np.eye(layers * columns)
    loss = rng.lognormal(0, 1.2, (layers, 1)) * rng.uniform(0.6, 1.4, (layers, columns))
    loss = (loss * 4.0 ** -(bits - 2.0)).ravel()
    weights = rng.lognormal(9, 1.2, layers).astype(np.int64) + 1
    return alike * np.sqrt(np.outer(loss, loss)), weights, bits


def problem_of(coupling, weights, bits, share, cost=None):
    """The problem at `share` of the way from the least to the most bits."""
    from proxyq.search.allocate import Limit, Problem

    least, most = int(weights.sum() * bits.min()), int(weights.sum() * bits.max())
    size = Limit(
        name="size",
        usage=weights[:, None] * bits,
        budget=int(least + share * (most - least)),
        per_unit=int(weights.sum()),
        unit="bit",
    )
    return Problem(
        layers=tuple(f"layer{i}" for i in range(len(weights))),
        bits=tuple(map(int, bits)),
        cost=np.zeros((len(weights), len(bits))) if cost is None else cost,
        coupling=coupling,
        limits=(size,),
    )


def iqp(problem, seconds, scale=1.0, **options):
    """`(objective, bound, seconds to the best plan)`, as all sides; the last one is not known.

    The others take costs times `scale`.
    """
    from proxyq.search.allocate import solve

    del scale
    answer = solve(problem, "iqp", time_limit=seconds, **options)
    return answer.objective, answer.bound, np.nan


def scip(problem, seconds, scale, factor=False):
    import pyscipopt

    started = time.perf_counter()
    g, cost = problem.coupling, problem.cost.ravel()
    layers, columns = problem.cost.shape
    model = pyscipopt.Model()
    model.hideOutput()
    x = [model.addVar(vtype="B") for _ in range(layers * columns)]
    for layer in range(layers):
        model.addCons(pyscipopt.quicksum(x[layer * columns : (layer + 1) * columns]) == 1)
    for limit in problem.limits:
        shares = limit.usage.ravel() / limit.budget
        model.addCons(pyscipopt.quicksum(float(u) * v for u, v in zip(shares, x, strict=True)) <= 1)
    linear = pyscipopt.quicksum(float(c * scale) * v for c, v in zip(cost, x, strict=True))
    if factor:
        values, vectors = np.linalg.eigh(g * scale)
        kept = values > 1e-10 * values[-1]
        terms = []
        for column in (vectors[:, kept] * np.sqrt(values[kept])).T:
            y, z = model.addVar(lb=None), model.addVar()
            projected = pyscipopt.quicksum(float(f) * v for f, v in zip(column, x, strict=True))
            model.addCons(projected == y)
            model.addCons(y * y <= z)
            terms.append(z)
        model.setObjective(linear + pyscipopt.quicksum(terms))
    else:
        z = model.addVar(lb=None)
        pairs = (
            float(g[a, b] * scale) * x[a] * x[b]
            for a in range(len(x))
            for b in range(len(x))
            if g[a, b]
        )
        model.addCons(pyscipopt.quicksum(pairs) <= z)
        model.setObjective(linear + z)
    written = time.perf_counter() - started
    model.setParam("limits/time", max(seconds - written, 0.01))
    model.optimize()
    found = model.getBestSol() if model.getNSols() else None
    if found is None:
        return np.inf, model.getDualbound() / scale, np.nan
    point = np.array([model.getSolVal(found, v) for v in x]).reshape(layers, columns)
    return valued(problem, point), model.getDualbound() / scale, written + model.getSolTime(found)


def highs(problem, seconds, scale):
    from scipy import sparse
    from scipy.optimize import LinearConstraint, milp

    started = time.perf_counter()
    layers, columns = problem.cost.shape
    g, size = problem.coupling, layers * columns
    layer = np.arange(size) // columns
    a, b = np.nonzero(layer[:, None] < layer)
    count = size + len(a)
    w = np.arange(size, count)
    one_hot = sparse.csr_array((np.ones(size), (layer, np.arange(size))), (layers, count))
    # sum over the choices b of layer m of w_ab = x_a, for each choice a of another layer
    row = np.concatenate([a * layers + layer[b], b * layers + layer[a]])
    sums = sparse.csr_array((np.ones(2 * len(a)), (row, np.tile(w, 2))), (size * layers, count))
    other = (layer[:, None] != np.arange(layers)).ravel()
    each = sparse.csr_array(
        (-np.ones(size * layers), (np.arange(size * layers), np.repeat(np.arange(size), layers))),
        (size * layers, count),
    )
    rows = [
        LinearConstraint(one_hot, 1, 1),
        LinearConstraint((sums + each)[other], 0, 0),
    ]
    for limit in problem.limits:
        usage = np.concatenate([limit.usage.ravel() / limit.budget, np.zeros(len(a))])
        rows.append(LinearConstraint(usage[None], -np.inf, 1))
    objective = np.concatenate([problem.cost.ravel() + g.diagonal(), 2 * g[a, b]]) * scale
    left = seconds - (time.perf_counter() - started)
    result = milp(
        objective,
        integrality=np.arange(count) < size,
        bounds=(0, 1),
        constraints=rows,
        options={"time_limit": max(left, 0.01), "mip_rel_gap": 0},
    )
    bound = -np.inf if result.mip_dual_bound is None else result.mip_dual_bound / scale
    if result.x is None:
        return np.inf, bound, np.nan
    return valued(problem, result.x[:size].reshape(layers, columns)), bound, np.nan


def valued(problem, point):
    """The cost of the plan that is rounded from `point`; infinite where a limit is exceeded."""
    from proxyq.errors import ProxyqError
    from proxyq.search.allocate import verify
    from proxyq.search.allocate.assignment import total_cost

    choice = point.argmax(axis=1).tolist()
    try:
        verify(problem, choice)
    except ProxyqError:
        return np.inf
    return total_cost(problem, choice)


SIDES = {
    "iqp": iqp,
    "scip": scip,
    "scip factor": partial(scip, factor=True),
    "highs": highs,
}


def main():
    args = parsed()
    import pyscipopt
    import scipy

    sides = [name for name in args.sides.split(",") if name]
    print(
        f"numpy {np.__version__}, scipy {scipy.__version__}, SCIP {pyscipopt.Model().version()}; "
        f"one thread, at most {args.seconds:g} s each\n"
    )
    cases = {}
    if not args.matrices:
        for text in args.sizes.split(","):
            layers, columns = map(int, text.split("x"))
            cases[f"drawn {text}"] = (*drawn(layers, columns, args.seed), None)
    for file in args.matrices:
        with np.load(file) as own:
            names = ("coupling", "weights", "bits", "cost")
            cases[Path(file).stem] = tuple(own.get(name) for name in names)
    ratios = []
    for case, (coupling, weights, bits, cost) in cases.items():
        rows, spent = [], {name: Time(0.0, 0.0) for name in sides}
        for share in map(float, args.shares.split(",")):
            problem = problem_of(coupling, weights, bits, share, cost)
            average = float(problem.limits[0].in_units(problem.limits[0].budget))
            # Tolerances of SCIP and HiGHS are absolute: what a plan costs is brought to 1000.
            scale = 1000 / iqp(problem, args.seconds, nodes=0)[0]
            found = {}
            for name in sides:
                used, result = once(partial(SIDES[name], problem, args.seconds, scale))
                objective, bound, best = result
                if name == "iqp":
                    search, early = once(partial(iqp, problem, args.seconds, nodes=0))
                    best = search.wall if early[0] == objective else used.wall
                found[name] = (objective, bound, best, used)
                spent[name] += used
            least = min(objective for objective, *_ in found.values())
            for name, (objective, bound, best, used) in found.items():
                gap = max(objective - bound, 0.0) / max(abs(objective), abs(bound), 1e-300)
                rows.append(
                    [
                        f"{average:.2f} bit, {name}",
                        f"{100 * (objective / least - 1):.3f} %"
                        if np.isfinite(objective)
                        else "none",
                        "" if np.isnan(best) else f"{best:.2f}",
                        f"{used.wall:.2f}",
                        f"{100 * gap:.3f} %",
                    ]
                )
        print(table((case, "above best", "best plan, s", "end, s", "gap left"), rows), "\n")
        ratios += [
            ratio(f"{case}, {sides[0]} / {name}", spent[sides[0]], spent[name])
            for name in sides[1:]
        ]
    print("\n".join(ratios))


if __name__ == "__main__":
    main()
