"""CLADO's matrix and what stands in for it, against the published procedure in eager PyTorch.

Every layer at 2, 3 and 4 bits, 256 images. The published procedure makes a full forward pass for
each pair of choices; it is timed on a random tenth of the pairs (and of the single choices), and
scaled, with batch norm folded as here and as the network comes. The engine measures all pairs,
starting each from the state that the earlier layer left. `logit-coupling` is one sweep over
single layers, and `kl-delta` is too, without couplings.

With `--data` and `--eval-data` the plans of both matrices at 3 bits on average are run on all
test images, without and with the statistics of layers restored.
"""

import argparse
import time

import numpy as np
from cifar import MEAN, STD, folded, resnet
from timing import Compilations, Time, heading, once, peak_mib, pin, ratio, table

BITS = (2, 3, 4)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", default="resnet20", help="resnet20, resnet32 or resnet56")
    parser.add_argument("--threads", type=int, default=1, help="cores for either side")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--share", type=float, default=0.1, help="of the pairs that torch runs")
    parser.add_argument("--weights", help="a .safetensors file")
    parser.add_argument("--data", help="calibration images: FILE.npz:IMAGES,LABELS")
    parser.add_argument("--eval-data", help="test images: FILE.npz:IMAGES,LABELS")
    parser.add_argument("--budget", default="size=3bit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2 images, a hundredth of the pairs")
    args = parser.parse_args()
    if args.quick:
        args.images, args.share = 2, 0.01
    return args


def compare_plans(args, model, inputs, found):
    """Accuracy of the plans of all matrices, and how sure they are."""
    import jax

    import proxyq
    from proxyq.api.inputs import inputs_of
    from proxyq.api.problem import problem_from
    from proxyq.engine import Engine
    from proxyq.engine.statistics import correct_statistics, float_moments
    from proxyq.ptq.quantized import round_weights
    from proxyq.search.allocate import solve

    test = proxyq.load_data(args.eval_data)
    images = inputs_of(test, model, len(test), None)
    engine = Engine.build(model, len(jax.tree.leaves(inputs)[0]))
    moments, _ = float_moments(engine, inputs)
    rows = []
    for name, scores in found.items():
        answer = solve(problem_from(scores.layers, scores, args.budget), time_limit=20.0)
        edits = round_weights(engine, answer.by_name())
        restored = correct_statistics(engine, edits, inputs, moments)
        right = [
            100 * np.mean(engine.logits(images, own).argmax(axis=1) == test.labels)
            for own in (edits, restored)
        ]
        gap = f"{100 * answer.gap:.2g} %"
        rows.append([name, *(f"{top1:.2f}" for top1 in right), gap, f"{answer.seconds:.1f}"])
    print(f"\nplans at {args.budget}, top-1 in percent on {len(test):,} test images")
    print(table(("matrix", "as it is", "statistics restored", "gap", "seconds"), rows))


class Remaining:
    """Listens to progress: what it foresees once a tenth of the work is done, and what came."""

    def __init__(self):
        self.started = self.heard = time.perf_counter()
        self.tenth = None

    def __call__(self, stage, done, total):
        del stage
        self.heard = time.perf_counter()
        if self.tenth is None and 10 * done >= total:
            spent = self.heard - self.started
            self.tenth = (spent * (total - done) / done, self.heard)

    @property
    def at(self):
        """Seconds foreseen after a tenth, and those that it took from there."""
        foreseen, then = self.tenth
        return foreseen, self.heard - then


def main():
    args = parsed()
    threads = pin(args.threads)
    import torch

    import proxyq
    from proxyq import proxies
    from proxyq.api import inputs_of
    from proxyq.engine import Engine
    from proxyq.engine.alternatives import choices
    from proxyq.engine.divergence import kl_divergence
    from proxyq.quantize import quantize_columns

    torch.set_num_threads(threads)
    compilations = Compilations()
    print(heading(f"{args.network}, {args.images} images, {len(BITS)} bit-widths", threads))
    torch.manual_seed(args.seed)
    module = resnet(args.network)
    if args.weights:
        from safetensors.torch import load_file

        module.load_state_dict(load_file(args.weights), strict=False)
    module.eval()
    scale = proxyq.Preprocessing(mean=MEAN, std=STD)
    model = proxyq.from_torch(module, (3, 32, 32), preprocessing=scale)
    pixels = np.random.default_rng(args.seed).integers(0, 256, (args.images, 32, 32, 3), np.uint8)
    data = proxyq.load_data(args.data) if args.data else proxyq.Data(name="noise", images=pixels)
    inputs = inputs_of(data, model, args.images, None)
    images = torch.from_numpy(np.array(inputs))

    # The published procedure, on a random share of its runs.
    engine = Engine.build(model, args.images)
    names = engine.network.names
    rounded = {}
    for name in names:
        (site,) = engine.network.sites_of(name)
        rounded[name] = [np.array(quantize_columns(engine.columns(site), b)).T for b in BITS]
    layers, each = len(names), len(BITS)
    pairs = [
        (a, b) for a in range(layers * each) for b in range(layers * each) if b // each > a // each
    ]
    runs = [(a,) for a in range(layers * each)] + pairs
    chosen = np.random.default_rng(args.seed).permutation(len(runs))
    chosen = [runs[i] for i in chosen[: max(2, round(args.share * len(runs)))]]
    losses = {}

    def published(plain):
        with torch.no_grad():
            reference = reference_of[plain]
            for run in chosen:
                kept = []
                for choice in run:
                    layer = plain.get_submodule(names[choice // each])
                    kept.append((layer, layer.weight.data))
                    new = rounded[names[choice // each]][choice % each]
                    layer.weight.data = torch.from_numpy(new).reshape(layer.weight.shape)
                losses[run] = kl_divergence(reference, plain(images).numpy()).mean()
                for layer, weight in kept:
                    layer.weight.data = weight

    sides = {"torch, folded": folded(module), "torch, as it comes": module}
    with torch.no_grad():  # the reference warms either side up
        reference_of = {plain: plain(images).numpy() for plain in sides.values()}
    times, rows = {}, []
    scaled = len(runs) / len(chosen)
    for name, plain in sides.items():
        taken, _ = once(lambda plain=plain: published(plain))
        times[name] = Time(taken.wall * scaled, taken.cpu * scaled)
        rows.append([name, *times[name].cells(), "", f"{peak_mib():.0f}"])
        if name == "torch, folded":
            truth = dict(losses)

    # The engine's programs are those of a sweep: compiled in a first one, told apart.
    compilations.reset()
    cold, _ = once(lambda: proxies.logit_coupling(model, inputs, bits=BITS))
    rows.append(["first sweep", *cold.cells(), str(compilations.reset()), f"{peak_mib():.0f}"])
    found, estimates = {}, {}
    for name in ("clado", "logit-coupling", "kl-delta"):
        proxy, remaining = proxies.PROXIES.get(name), Remaining()
        times[name], found[name] = once(
            lambda proxy=proxy, heard=remaining: proxy(model, inputs, bits=BITS, progress=heard)
        )
        estimates[name] = remaining
        cells = times[name].cells()
        rows.append([name, *cells, str(compilations.reset()), f"{peak_mib():.0f}"])
    print(table(("side", "wall", "CPU", "compiled", "peak MiB"), rows), "\n")
    print(
        f"{len(runs)} runs, of which torch made {len(chosen)}, scaled by {scaled:.1f}; "
        f"{100 * found['clado'].notes['removed_mass']:.1f} % of the eigenvalues' mass of the exact "
        "matrix is negative and goes"
    )
    told, real = estimates["clado"].at
    print(
        f"after a tenth of the exact matrix {told:.1f} s were foreseen for the rest, which took "
        f"{real:.1f} s"
    )
    own = choices(engine, inputs, BITS)
    reference, wrong = engine.logits(inputs), []
    for run in chosen[:20]:
        edits = {}
        for choice in run:
            edits |= own[names[choice // each]][choice % each]
        ours = kl_divergence(reference, engine.logits(inputs, edits)).mean()
        wrong.append((ours - truth[run], truth[run]))
    wrong, size = np.linalg.norm(wrong, axis=0)
    print(f"losses of 20 of these runs, engine against torch: {wrong / size:.1e} relative")
    if args.eval_data:
        compare_plans(args, model, inputs, found)
    print()
    for name in ("clado", "logit-coupling", "kl-delta"):
        print(ratio(f"torch, folded / {name}", times["torch, folded"], times[name]))
    for name in ("clado", "logit-coupling"):
        print(ratio(f"torch, as it comes / {name}", times["torch, as it comes"], times[name]))


if __name__ == "__main__":
    main()
