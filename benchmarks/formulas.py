"""Evaluate a population of formulas: proxyq's evaluator against DEAP's `gp.compile` and NumPy.

The network has the layers of a ResNet-20 (20 layers, some 270,000 weights) with statistics drawn
by a fixed seed; the population is drawn as in a search, about 15 nodes a tree, on bits 2, 3, 4.

- `proxyq`: `evaluate` on the whole population, all layers in one array, common parts once.
- `deap`: the same trees as DEAP's, each compiled to a Python function, which is called for each
  layer with arrays of all bit-widths; NumPy with the same protected operations.

Both on the same entries: at most `--entries` of each layer, and all there are. Building the
statistics is told apart, since a search does it once; compiling is not, since each generation has
new trees.
"""

import argparse
import os
from random import Random

from timing import alternately, once, pin, ratio, table

pin(1)  # before NumPy is imported

import numpy as np  # noqa: E402

BITS = (2, 3, 4)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--formulas", type=int, default=500)
    parser.add_argument("--entries", type=int, default=512, help="kept of each layer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="10 formulas, once")
    args = parser.parse_args()
    if args.quick:
        args.formulas, args.repeats = 10, 1
    return args


def drawn_layers(seed):
    """Arrays by layer and leaf, with the shapes of a ResNet-20 for CIFAR-10."""
    rng = np.random.default_rng(seed)
    widths = [(3, 16), *[(16, 16)] * 6, (16, 32), *[(32, 32)] * 5, (32, 64), *[(64, 64)] * 5]
    shapes = [*((9 * read, given) for read, given in widths), (64, 10)]
    layers = {}
    for index, shape in enumerate(shapes):
        weight = rng.normal(size=shape) / np.sqrt(shape[0])
        steps = [np.abs(weight).max() / 2.0 ** (bits - 1) for bits in BITS]
        values = np.maximum(rng.normal(size=4096), 0)
        layers[f"layer{index}"] = {
            "W": weight,
            "G": rng.normal(size=shape) * 1e-3,
            "F": rng.normal(size=shape) ** 2 * 1e-6,
            "V": np.abs(rng.normal(size=shape)),
            "H": rng.normal(size=shape),
            "D": np.stack([np.round(weight / step) * step - weight for step in steps]),
            "A": values,
            "E": np.stack([np.round(values * 2**b) / 2**b - values for b in BITS]),
            "O": rng.random(len(BITS)) * 0.1,
            "R": rng.random(len(BITS)) * 0.05,
            "macs": float(shape[0] * shape[1] * 64),
        }
    return layers


def population(count, seed):
    """Random trees of 12 to 18 nodes."""
    from proxyq.proxies.formula import grow

    rng, found = Random(seed), []
    while len(found) < count:
        tree = grow(rng, least=4, most=7)
        if 12 <= tree.size <= 18:
            found.append(tree)
    return found


def given_to_deap(statistics):
    """For each layer the arguments of a compiled tree: `[bits or 1, rows, columns]` each."""
    from proxyq.proxies.formula import STATISTICS

    arguments = []
    for index in range(len(statistics.layers)):
        row = []
        for name, statistic in STATISTICS.items():
            leaf = statistics.leaves[name]
            if statistic.type == "layer":
                # Of each layer and bit-width, of each bit-width or of each layer.
                own = leaf if name == "bits" else leaf[..., index]
                row.append(own.reshape(-1, 1, 1))
                continue
            segments = statistics.segments[statistic.type]
            start, count = segments.starts[index], segments.counts[index]
            # Rows of a layer are of one length: as many as begin in it.
            begun = (segments.row_starts >= start) & (segments.row_starts < start + count)
            part = np.ascontiguousarray(leaf[..., start : start + count])
            lead = len(BITS) if statistic.bits else 1
            row.append(part.reshape(lead, int(begun.sum()), -1))
        arguments.append(row)
    return arguments


def deap_set(scales):
    """DEAP's set of primitives; `scales`: entries of a layer over those kept, set before a call."""
    from deap import gp

    from proxyq.proxies.formula import OPERATIONS, STATISTICS

    tiny, axes = 1e-9, {"axis": (1, 2), "keepdims": True}

    def away(x):
        return x + np.where(x < 0, -tiny, tiny)

    def deviation(x):
        centre, spread = x.mean(**axes), x.std(**axes)
        return np.where(spread <= 1e-12 * np.abs(centre), 0.0, spread)

    def normalise(x):
        spread = deviation(x)
        return (x - x.mean(**axes)) * np.where(spread == 0, 0.0, 1.0 / spread)

    def minmax(x):
        low = x.min(**axes)
        return (x - low) / (x.max(**axes) - low + tiny)

    def softmax(x):
        powers = np.exp(x - x.max(axis=2, keepdims=True))
        return powers / powers.sum(axis=2, keepdims=True)

    def logsoftmax(x):
        below = x - x.max(axis=2, keepdims=True)
        return below - np.log(np.exp(below).sum(axis=2, keepdims=True))

    def total(x):
        # Sums stand for the whole layer; a weight has more rows than one, activations have not.
        return x.sum(**axes) * scales["activation" if x.shape[1] == 1 else "weight"]

    functions = {
        "log": lambda x: np.log(np.where(x <= 0, 1.0, x + tiny)),
        "abslog": lambda x: np.log(np.where(x == 0, 1.0, np.abs(x))),
        "abs": np.abs,
        "square": np.square,
        "exp": lambda x: np.exp(np.minimum(x, 80.0)),
        "sqrt": lambda x: np.sqrt(np.maximum(x, 0.0)),
        "relu": lambda x: np.maximum(x, 0.0),
        "invert": lambda x: 1.0 / away(x),
        "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
        "neg": np.negative,
        "normalise": normalise,
        "minmax": minmax,
        "softmax": softmax,
        "logsoftmax": logsoftmax,
        "mean": lambda x: x.mean(**axes),
        "sum": total,
        "l1": lambda x: np.abs(x).mean(**axes),
        "norm": lambda x: np.sqrt(total(x * x)),
        "std": deviation,
        "max": lambda x: x.max(**axes),
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": lambda a, b: a / away(b),
    }
    primitives = gp.PrimitiveSet("formula", len(STATISTICS))
    primitives.renameArguments(**{f"ARG{i}": name for i, name in enumerate(STATISTICS)})
    for name, arity in OPERATIONS.items():
        primitives.addPrimitive(functions[name], arity, name=name)
    return primitives


def as_deap(tree, primitives):
    """The same tree as a DEAP individual, which lists nodes in prefix order."""
    from deap import gp

    def part(node):
        if node.name == "constant":
            return gp.Terminal(node.value, False, object)
        return primitives.mapping[node.name]

    return gp.PrimitiveTree([part(node) for node in tree.walk()])


def deap_evaluate(individuals, primitives, arguments, scales, statistics):
    """`[layers, bits]` of each individual."""
    from deap import gp

    found = []
    with np.errstate(all="ignore"):
        for individual in individuals:
            function = gp.compile(individual, primitives)
            rows = []
            for index, given in enumerate(arguments):
                for kind, segments in statistics.segments.items():
                    scales[kind] = segments.scale[index]
                values = np.asarray(function(*given), np.float64).ravel()
                rows.append(np.broadcast_to(values, len(BITS)))
            found.append(np.stack(rows))
    return found


def apart(found, others):
    """How far results are apart: the median, and how many formulas by more than 1e-6.

    What a logarithm makes of a rounding error has no digits to agree in.
    """
    differences = []
    for one, other in zip(found, others, strict=True):
        if one is None or not np.isfinite(other).all():
            continue
        one = one if one.ndim == 2 else np.repeat(one[:, None], len(BITS), axis=1)
        differences.append(np.max(np.abs(one - other) / np.maximum(np.abs(other), 1e-12)))
    far = sum(difference > 1e-6 for difference in differences)
    return f"median {np.median(differences):.1e}, {far} of {len(differences)} beyond 1e-6"


def main():
    import deap

    from proxyq.proxies.formula import Statistics, evaluate

    args = parsed()
    layers, trees = drawn_layers(args.seed), population(args.formulas, args.seed)
    size = sum(layer["W"].size for layer in layers.values())
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"{args.formulas} formulas of {np.mean([tree.size for tree in trees]):.1f} nodes, "
        f"{len(layers)} layers, {size} weights, bits {BITS}\n"
        f"deap {deap.__version__}, numpy {np.__version__}, 1 thread{load}\n"
    )
    rows, ratios = [], []
    for what, entries in ((f"{args.entries} entries", args.entries), ("all entries", None)):
        built, statistics = once(lambda e=entries: Statistics.build(layers, BITS, entries=e))
        scales = {}
        primitives = deap_set(scales)
        individuals = [as_deap(tree, primitives) for tree in trees]
        arguments = given_to_deap(statistics)
        results = {}

        def ours(statistics=statistics, results=results):
            results["proxyq"] = evaluate(trees, statistics)

        def deaps(given=(individuals, primitives, arguments, scales, statistics), to=results):
            to["deap"] = deap_evaluate(*given)

        times = alternately({"proxyq": ours, "deap": deaps}, args.repeats)
        for name, taken in times.items():
            per = f"{args.formulas / taken.wall:.0f}"
            rows.append((f"{name}, {what}", *taken.cells(), per))
        ratios.append(ratio(f"proxyq / deap, {what}", times["proxyq"], times["deap"]))
        print(
            f"{what}: statistics in {built.wall:.3f} s; {apart(results['proxyq'], results['deap'])}"
        )
        if entries is not None:
            few = times["proxyq"]
        else:
            ratios.append(
                ratio(f"proxyq, {args.entries} entries / deap, all entries", few, times["deap"])
            )
    print("\n" + table(("side", "wall s", "cpu s", "formulas / s"), rows) + "\n")
    print("\n".join(ratios))


if __name__ == "__main__":
    main()
