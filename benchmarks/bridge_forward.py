"""Forward pass of imported torch networks: XLA against eager torch, warm.

For each network, with random weights and noise images, the least time of

- *torch*: the module itself, in evaluation mode, without gradients;
- *whole*: the imported function jitted as one program, every equation run as XLA has it;
- *lowered*: the same traced once (batch norm folded), with proxyq's own lowering of depthwise
  convolutions, jitted as one program;
- *segments*: proxyq's engine, one program for each layer, the way all measuring runs.

The sides run in turn. Folding and compiling are not timed. Agreement is the largest difference
from torch's outputs over the largest output; parameters that start as zeros (the head of a
vision transformer) are drawn at random first, since zeros would agree with anything.
"""

import argparse

import numpy as np
from timing import alternately, heading, pin, ratio, table

NETWORKS = ("resnet18", "mobilenet_v2", "convnext_tiny", "vit_b_16")


def without_zeros(module):
    """Fill parameters that are zero throughout with small random numbers."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.02)
    return module


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("networks", nargs="*", help=f"torchvision names; {' '.join(NETWORKS)}")
    parser.add_argument("--threads", type=int, default=1, help="cores for either side")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two networks, 2 images of 64 pixels")
    args = parser.parse_args()
    args.networks = args.networks or list(NETWORKS[:2] if args.quick else NETWORKS)
    if args.quick:
        args.batch, args.size, args.repeats = 2, 64, 1
    return args


def measured(name, args):
    """Times of all sides, and how far their outputs are from torch's."""
    import jax
    import jax.numpy as jnp
    import torch

    import proxyq
    from proxyq.engine import Engine
    from proxyq.model.lowering import run
    from proxyq.model.torch_import import import_torchvision

    torch.manual_seed(args.seed)
    module = without_zeros(import_torchvision().models.get_model(name, weights=None).eval())
    model = proxyq.from_torch(module, (3, args.size, args.size))
    shape = (args.batch, 3, args.size, args.size)
    pixels = np.random.default_rng(args.seed).standard_normal(shape, np.float32)
    images, tensor = jnp.asarray(pixels), torch.from_numpy(pixels)
    params = {key: jnp.asarray(value) for key, value in model.params.items()}
    engine = Engine.build(model, args.batch, batch_size=args.batch)
    whole = jax.jit(model.apply)
    graph, known = engine.network.graph, list(engine.frontier.values())

    @jax.jit
    def lowered(known, images):
        return graph.run_main(dict(zip(graph.frontier, known, strict=True)), images, run)

    def eager():
        with torch.no_grad():
            return module(tensor).numpy()

    sides = {
        "torch": eager,
        "whole": lambda: np.asarray(whole(params, images)),
        "lowered": lambda: np.asarray(lowered(known, images)),
        "segments": lambda: np.asarray(engine.run(images)),
    }
    truth = eager()
    wrong = max(np.abs(side() - truth).max() for side in sides.values()) / np.abs(truth).max()
    return alternately(sides, args.repeats), wrong, engine


def main():
    args = parsed()
    threads = pin(args.threads)
    import torch

    from proxyq.model.lowering import is_depthwise

    torch.set_num_threads(threads)
    print(heading(f"forward pass, {args.batch} images of {args.size}×{args.size}", threads))
    rows, lines = [], []
    for name in args.networks:
        least, wrong, engine = measured(name, args)
        depthwise = sum(is_depthwise(eqn) for eqn in engine.network.graph.main)
        cells = [f"{side.wall:.3f} {side.cpu:.3f}" for side in least.values()]
        rows.append((name, str(depthwise), *cells, f"{wrong:.0e}"))
        for side in ("whole", "lowered", "segments"):
            lines.append(ratio(f"{name}, {side} / torch", least[side], least["torch"]))
        if depthwise:
            lines.append(ratio(f"{name}, own depthwise / XLA's", least["lowered"], least["whole"]))
    head = ("wall, CPU seconds", "depthwise", "torch", "whole", "lowered", "segments", "wrong by")
    print(table(head, rows), "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
