"""Orthogonality search on ResNet-18: proxyq against an eager PyTorch implementation.

Both sides get the same network (random weights), the same images and the same cores. What is
timed: *scoring*, from images to one weight for each layer; *solving*, from weights to bits;
*whole*, `proxyq.search` against the sum of the two. "Cold" is the first call of the process:
tracing and compiling included, no compiled program kept from elsewhere, one sample. "Warm" is
any later call on the same model. Importing the module into proxyq is done once and told apart.

The torch side (`eager_ompq.py`) is the published procedure of OMPQ. As in proxyq, size counts
weights alone, not the parameters of batch norm.

Agreement is printed first: of the matrices of pairs, and of the plans. proxyq is scored on the
same 18 tensors and also as it comes, where the three downsample convolutions count as layers.
"""

import argparse

import numpy as np
from eager_ompq import (
    layer_groups,
    layer_weights,
    pairwise_orthogonality,
    rounded,
    slsqp_bits,
    torch_features,
)
from timing import Time, alternately, heading, once, pin, ratio, table

BITS = (2, 3, 4)


def same_features(model, inputs, groups, args):
    """proxyq's matrix of pairs and layer weights on the 18 tensors alone."""
    from proxyq.engine import Engine, TapOptions, collect
    from proxyq.proxies._orthogonality import importance, orthogonality_matrix

    options = TapOptions(batch_norm="batch", feature="post-activation")
    engine = Engine.build(model, len(inputs), batch_norm="batch", batch_size=len(inputs))
    taps = {tap.name: tap for tap in collect(engine, inputs, ("gram",), BITS, options=options)}
    orm = orthogonality_matrix([taps[group[0]].gram for group in groups])
    return orm, importance(orm, beta=args.beta)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="cores for either side")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="pixels, a multiple of 32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", default="size=3bit")
    parser.add_argument("--beta", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="8 images of 64 pixels, once")
    args = parser.parse_args()
    if args.quick:
        args.images, args.size, args.repeats = 8, 64, 1
    return args


def main():
    args = parsed()
    threads = pin(args.threads)
    import jax
    import torch

    import proxyq
    from proxyq.api import inputs_of
    from proxyq.model.torch_import import import_torchvision
    from proxyq.proxies import PROXIES, as_cost
    from proxyq.search.allocate import build_problem

    torch.set_num_threads(threads)
    jax.numpy.zeros(1).block_until_ready()  # the backend starts before anything is timed
    print(heading(f"ResNet-18, {args.images} images of {args.size}×{args.size}", threads))

    torch.manual_seed(args.seed)
    module = import_torchvision().models.resnet18(weights=None)
    groups = layer_groups(module)
    sizes = np.array(
        [sum(module.get_submodule(name).weight.numel() for name in group) for group in groups]
    )
    importing, model = once(lambda: proxyq.from_torch(module, (3, args.size, args.size)))
    # Coarse patches of noise: on fine noise all layers agree, and any error would look small.
    patches = np.random.default_rng(args.seed).integers(0, 256, (args.images, 4, 4, 3), np.uint8)
    pixels = patches.repeat(args.size // 4, axis=1).repeat(args.size // 4, axis=2)
    data = proxyq.Data(name="noise", images=pixels)
    inputs = inputs_of(data, model, args.images, None)
    images = torch.from_numpy(np.array(inputs))
    options = {"batch_norm": "batch", "feature": "post-activation", "beta": args.beta}
    found = {}

    def search():
        return proxyq.search(
            model, data, recipe="ompq", options={"beta": args.beta}, budget=args.budget
        )

    def score():
        found["scores"] = PROXIES.get("orthogonality")(model, inputs, bits=BITS, **options)

    def solve():
        return answer(as_cost(found["scores"], "linear-bits"))

    def answer(cost):
        layers = found["scores"].layers
        shared = [group for group in groups if len(group) > 1]
        problem = build_problem(layers, cost, BITS, args.budget, shared=shared)
        return proxyq.solve(problem, "lp", rounding="closest-below")

    def torch_score():
        found["orm"] = pairwise_orthogonality(torch_features(module, images))
        found["weights"] = layer_weights(found["orm"], args.beta)

    def torch_solve():
        found["bits"] = rounded(slsqp_bits(found["weights"], sizes, budget), sizes)

    cold, plan = once(search)
    cold_solve = Time(plan.solver.seconds, plan.solver.seconds)
    score(), torch_score()
    budget = float(solve().problem.limits[0].budget)
    torch_solve()

    # Agreement: a group's score counts once, as in the paper, when the tensors are the same.
    orm, c = same_features(model, inputs, groups, args)
    names = [layer.name for layer in found["scores"].layers]
    cost = np.zeros((len(names), len(BITS)))
    cost[[names.index(group[0]) for group in groups]] = -c[:, None] * np.array(BITS)
    same = dict(zip(names, answer(cost).bits, strict=True))
    print(f"matrices of pairs: largest absolute difference {np.abs(orm - found['orm']).max():.2e}")
    plans = {
        "torch, SLSQP": found["bits"],
        "proxyq, the same 18 tensors": [same[group[0]] for group in groups],
        "proxyq, recipe ompq": [plan.bits()[group[0]] for group in groups],
    }
    rows = []
    for name, bits in plans.items():
        equal = sum(a == b for a, b in zip(bits, found["bits"], strict=True))
        used = sizes @ bits / sizes.sum()
        cells = ("".join(map(str, bits)), f"{found['weights'] @ bits:.6f}", f"{used:.4f}")
        rows.append((name, *cells, f"{equal}/{len(bits)}"))
    print(table(("plan", "bits", "sum of c b", "bits a weight", "as torch"), rows), "\n")

    least = alternately(
        {
            "score": score,
            "torch score": torch_score,
            "solve": solve,
            "torch solve": torch_solve,
            "whole": search,
        },
        args.repeats,
    )
    slow_score, slow_solve = least["torch score"], least["torch solve"]
    slow = slow_score + slow_solve
    columns = ("seconds: wall, CPU", "scoring", "", "solving", "", "whole", "")
    warm = (least["score"], least["solve"], least["whole"])
    rows = [
        ("torch", *slow_score.cells(), *slow_solve.cells(), *slow.cells()),
        ("proxyq, cold", "", "", *cold_solve.cells(), *cold.cells()),
        ("proxyq, warm", *(cell for time in warm for cell in time.cells())),
    ]
    print(table(columns, rows))
    print(f"importing the module into proxyq, once: {' '.join(importing.cells())}\n")
    print(ratio("scoring, warm", least["score"], slow_score))
    print(ratio("solving, warm", least["solve"], slow_solve))
    print(ratio("whole, warm", least["whole"], slow))
    print(ratio("whole, cold", cold, slow))
    print(ratio("whole, cold with import", cold + importing, slow))


if __name__ == "__main__":
    main()
