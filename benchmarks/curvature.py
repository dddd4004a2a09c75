"""Derivatives on a CIFAR ResNet-20: proxyq's engine against eager PyTorch.

- `snip`: the gradient of every layer's weight, and the sums of |gradient times weight|.
- `fisher`: the mean over images of each image's squared gradient. Torch once image by image, as
  it is mostly written, and once vectorised by `torch.func`.
- `trace`: Hutchinson's estimate of every layer's Hessian trace, the same number of probes on
  either side. Torch as PyHessian does it: one backward graph for the batch, kept, and one
  `autograd.grad` through it for each probe on all weights. The engine's `joint` is the same
  estimator; `output` is proxyq's default, whose probes sit on the outputs of each image.

The same batch, labels and folded weights for all. Estimators differ in noise as well as in time:
the last lines tell what each takes to a standard error of 10 %, the median over the layers, by
time * (error / 10 %)^2. The first call of the engine, with compiling, is told apart from the
least of the later ones. Memory is what a fresh process holds at most while it does the work,
beyond what it held before, measured in a run of its own for each side: in the first call, with
compiling, and in a second one.

Images are noise and weights random, by a fixed seed, unless files are given.
"""

import argparse
import subprocess
import sys

import numpy as np
from cifar import MEAN, STD, folded, resnet20
from timing import alternately, growth_mib, heading, once, pin, ratio, table

SIDES = {
    "snip": ("snip, engine", "snip, torch"),
    "fisher": ("fisher, engine", "fisher, torch loop", "fisher, torch.func"),
    "trace": ("trace, engine output", "trace, engine joint", "trace, torch joint"),
}


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="cores for either side")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weights", help="a .safetensors file")
    parser.add_argument("--data", help="images, as the command line takes them: FILE.npz:IMAGES")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="4 images, 2 probes, once")
    args = parser.parse_args()
    if args.quick:
        args.images, args.probes, args.repeats = 4, 2, 1
    return args


def build(args):
    """All sides by name, each a function without arguments that returns its numbers."""
    import torch

    import proxyq
    from proxyq.api.inputs import calibration_of
    from proxyq.checkpoint import Checkpoint
    from proxyq.engine import Engine
    from proxyq.engine.curvature import hutchinson
    from proxyq.engine.gradients import record_gradients
    from proxyq.engine.objectives import cross_entropy, targets
    from proxyq.quantize import Rounding

    torch.manual_seed(args.seed)
    module = resnet20()
    if args.weights:
        from safetensors.torch import load_file

        module.load_state_dict(load_file(args.weights), strict=False)
    scale = proxyq.Preprocessing(mean=MEAN, std=STD)
    model = proxyq.from_torch(module, (3, 32, 32), preprocessing=scale)
    rng = np.random.default_rng(args.seed)
    pixels = rng.integers(0, 256, (args.images, 32, 32, 3), np.uint8)
    noise = proxyq.Data(name="noise", images=pixels, labels=rng.integers(0, 10, args.images))
    data = proxyq.load_data(args.data) if args.data else noise
    inputs, labels = calibration_of(data, model, args.images, None)
    assert labels is not None

    engine = Engine.build(model, args.images, tape=True)
    names = engine.network.names
    aims = targets("data", labels)

    def gradients(need):
        found = record_gradients(
            engine, inputs, (need,), (), cross_entropy, aims, rounding=Rounding()
        )
        return [own[need] for own in found]

    def engine_snip():
        weights = [engine.columns(engine.network.sites_of(name)[0]) for name in names]
        pairs = zip(gradients("gradient"), weights, strict=True)
        return np.array([np.abs(g * np.asarray(w)).sum() for g, w in pairs])

    def engine_fisher():
        return np.array([square.sum() for square in gradients("gradient-squares")])

    def engine_trace(probes):
        import jax

        found = hutchinson(
            engine,
            inputs,
            cross_entropy,
            aims,
            key=jax.random.key(args.seed),
            probes=probes,
            curvature="gauss-newton" if probes == "output" else "hessian",
            tolerance=0.0,
            least=args.probes,
            most=args.probes,
            checkpoint=Checkpoint(),
        )
        return np.stack([found.trace, found.error])

    net = folded(module)
    x, y = torch.from_numpy(np.array(inputs)), torch.from_numpy(np.array(labels))
    weights = [net.get_submodule(name).weight for name in names]
    loss_of = torch.nn.functional.cross_entropy

    def torch_snip():
        found = torch.autograd.grad(loss_of(net(x), y), weights)
        return np.array([float((g * w).abs().sum()) for g, w in zip(found, weights, strict=True)])

    def torch_fisher_loop():
        sums = [torch.zeros_like(w) for w in weights]
        for image, label in zip(x, y, strict=True):
            found = torch.autograd.grad(loss_of(net(image[None]), label[None]), weights)
            for total, g in zip(sums, found, strict=True):
                total += g * g
        return np.array([float(total.sum()) / len(x) for total in sums])

    own = {f"{name}.weight": w.detach() for name, w in zip(names, weights, strict=True)}
    rest = {k: v.detach() for k, v in net.state_dict().items() if k not in own}

    def torch_fisher_func():
        def loss(params, image, label):
            z = torch.func.functional_call(net, {**rest, **params}, (image[None],))
            return loss_of(z, label[None])

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(own, x, y)
        return np.array([float((g * g).sum()) / len(x) for g in each.values()])

    def torch_trace():
        generator = torch.Generator().manual_seed(args.seed)
        found = torch.autograd.grad(loss_of(net(x), y), weights, create_graph=True)
        draws = []
        for _ in range(args.probes):
            v = [
                torch.randint(0, 2, w.shape, generator=generator).to(w.dtype) * 2 - 1
                for w in weights
            ]
            hv = torch.autograd.grad(found, weights, grad_outputs=v, retain_graph=True)
            draws.append([float((a * b).sum()) for a, b in zip(v, hv, strict=True)])
        draws = np.array(draws)
        error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
        return np.stack([draws.mean(axis=0), error])

    return {
        "snip, engine": engine_snip,
        "snip, torch": torch_snip,
        "fisher, engine": engine_fisher,
        "fisher, torch loop": torch_fisher_loop,
        "fisher, torch.func": torch_fisher_func,
        "trace, engine output": lambda: engine_trace("output"),
        "trace, engine joint": lambda: engine_trace("joint"),
        "trace, torch joint": torch_trace,
    }


def memory_of(name):
    """MiB that one side takes in a process of its own: the first call, and one more."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    first, again = run.stdout.split()[-2:]
    return float(first), float(again)


def main():
    args = parsed()
    threads = pin(args.threads)
    import torch

    torch.set_num_threads(threads)
    sides = build(args)
    if args.memory_of:
        side = sides[args.memory_of]
        print(growth_mib(side), growth_mib(side))
        return
    print(heading(f"ResNet-20, {args.images} images, {args.probes} probes", threads))
    results, firsts = {}, {}
    for name, side in sides.items():
        firsts[name], results[name] = once(side)
    least = alternately(sides, args.repeats)
    measured = SIDES["snip"] if args.quick else list(sides)
    memory = {name: memory_of(name) for name in measured}
    rows = []
    for name in sides:
        cells = [f"{mib:.0f}" for mib in memory.get(name, ())] or ["", ""]
        rows.append([name, *firsts[name].cells(), *least[name].cells(), *cells])
    head = ("side", "first: wall", "CPU", "least: wall", "CPU", "MiB, first", "again")
    print(table(head, rows), "\n")
    for what in ("snip", "fisher"):
        own, *others = (results[name] for name in SIDES[what])
        wrong = max(np.abs(own / other - 1).max() for other in others)
        print(f"{what}: engine within {wrong:.1e} of torch, relative, every layer")
    means = {name: results[name][0] for name in SIDES["trace"]}
    total = {name: mean.sum() for name, mean in means.items()}
    print("sum of traces: " + ", ".join(f"{k} {v:.1f}" for k, v in total.items()))
    errors = {n: float(np.median(np.abs(results[n][1] / means[n]))) for n in SIDES["trace"]}
    print("standard error, median: " + ", ".join(f"{k} {v:.0%}" for k, v in errors.items()), "\n")
    for what, (own, *others) in SIDES.items():
        for other in others:
            if own in memory:
                pairs = zip(memory[own], memory[other], strict=True)
                shares = [f"{mine / max(theirs, 1.0):.2f}" for mine, theirs in pairs]
                print(f"memory {own} / {other}: {shares[0]} first, {shares[1]} again")
            if what == "trace":
                noise = (errors[own] / errors[other]) ** 2
                wall = least[own].wall / least[other].wall * noise
                print(f"time to equal error {own} / {other}: {wall:.3f} wall")
    print()
    for own, *others in SIDES.values():
        for other in others:
            print(ratio(f"{own} / {other}", least[own], least[other]))
            print(ratio(f"{own} with compiling / {other}", firsts[own], least[other]))
    joint, other = SIDES["trace"][1:]
    print(ratio(f"{joint} / {other}", least[joint], least[other]))


if __name__ == "__main__":
    main()
