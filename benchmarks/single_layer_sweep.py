"""Sweep over single layers of a CIFAR ResNet-20: proxyq's engine against full torch passes.

Every layer is quantized alone to 2, 3, 4 and 8 bits, 80 changed networks in all, and each one's
logits are compared with the float network's by KL divergence. The engine runs only what follows
the changed layer, from a state it keeps; its first call, with compiling, is told apart from the
least of the later ones. The torch side makes a full eager forward pass for each changed network,
with batch norm folded into the convolutions as in the engine, and the same quantized weights;
what quantizing itself takes counts on neither side. `stacked` runs a layer's four alternatives
as one program, which is meant for accelerators.

Images are noise and weights random, by a fixed seed, unless files are given. Memory is the most
the process has held up to the end of the phase, so phases can be told apart only by its growth.
"""

import argparse

import numpy as np
from cifar import MEAN, STD, folded, resnet20
from timing import Compilations, alternately, heading, once, peak_mib, pin, ratio, table

BITS = (2, 3, 4, 8)


class Kept:
    """KL divergence for the sweep, which also keeps the logits that it is given."""

    def __init__(self, kl):
        self.kl, self.logits = kl, []

    def __call__(self, reference, logits, start=0):
        del start
        self.logits.append(np.asarray(logits))
        return self.kl(reference, logits)

    def table(self, layers, images):
        """`[layers, bits, images, classes]`; batches of images come one after the other."""
        runs = layers * len(BITS)
        parts = [np.stack(self.logits[i : i + runs]) for i in range(0, len(self.logits), runs)]
        return np.concatenate(parts, axis=1)[:, :images].reshape(layers, len(BITS), images, -1)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="cores for either side")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--weights", help="a .safetensors file")
    parser.add_argument("--data", help="images, as the command line takes them: FILE.npz:IMAGES")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="4 images, once")
    args = parser.parse_args()
    if args.quick:
        args.images, args.repeats = 4, 1
    return args


def main():
    args = parsed()
    threads = pin(args.threads)
    import torch

    import proxyq
    from proxyq.api import inputs_of
    from proxyq.engine import Edit, Engine
    from proxyq.engine.divergence import kl_divergence
    from proxyq.engine.sweep import single_layer_sweep
    from proxyq.quantize import quantize_columns

    torch.set_num_threads(threads)
    compilations = Compilations()
    print(heading(f"ResNet-20, {args.images} images of 32×32, {len(BITS)} bit-widths", threads))

    torch.manual_seed(args.seed)
    module = resnet20()
    if args.weights:
        from safetensors.torch import load_file

        module.load_state_dict(load_file(args.weights), strict=False)
    scale = proxyq.Preprocessing(mean=MEAN, std=STD)
    model = proxyq.from_torch(module, (3, 32, 32), preprocessing=scale)
    pixels = np.random.default_rng(args.seed).integers(0, 256, (args.images, 32, 32, 3), np.uint8)
    noise = proxyq.Data(name="noise", images=pixels)
    data = proxyq.load_data(args.data) if args.data else noise
    inputs = inputs_of(data, model, args.images, None)
    images = torch.from_numpy(np.array(inputs))

    # The same quantized weights for both, made before anything is timed.
    engine = Engine.build(model, args.images)
    network = engine.network
    alternatives, replaced = {}, {}
    plain = folded(module)
    for name in network.names:
        (site,) = network.sites_of(name)
        weight, where = engine.weight(site), network.sites[site]
        columns = [quantize_columns(engine.columns(site), b) for b in BITS]
        edits = [Edit(weight=where.from_columns(c, weight.shape)) for c in columns]
        alternatives[name] = [{site: edit} for edit in edits]
        shape = plain.get_submodule(name).weight.shape
        replaced[name] = [torch.from_numpy(np.array(c).T.reshape(shape)) for c in columns]

    results = {}

    def sweep(stacked=False):
        kept = Kept(kl_divergence)
        kl = single_layer_sweep(engine, inputs, alternatives, kept, stacked=stacked)
        results["stacked" if stacked else "engine"] = (kl, kept)

    def torch_sweep():
        kept = Kept(kl_divergence)
        kl = np.zeros((len(replaced), len(BITS)))
        with torch.no_grad():
            reference = plain(images).numpy()
            for row, (name, weights) in enumerate(replaced.items()):
                layer = plain.get_submodule(name)
                own = layer.weight.data
                for column, weight in enumerate(weights):
                    layer.weight.data = weight
                    kl[row, column] = kept(reference, plain(images).numpy()).mean()
                layer.weight.data = own
        results["torch"] = (kl, kept)

    compilations.reset()
    rows, second, firsts = [], {}, {}
    sides = {"engine": sweep, "engine, stacked": lambda: sweep(True)}
    for name, side in sides.items():
        first, _ = once(side)
        first_count, memory = compilations.reset(), peak_mib()
        once(side)
        firsts[name], second[name] = first, compilations.reset()
        rows.append([name, *first.cells(), str(first_count), str(second[name]), f"{memory:.0f}"])
    torch_sweep()
    rows.append(["torch, full passes", "", "", "", "", f"{peak_mib():.0f}"])
    least = alternately({**sides, "torch, full passes": torch_sweep}, args.repeats)

    changed = len(network.names) * len(BITS)
    suffixes = sum(len(network.sites) - network.sites_of(n)[0] for n in network.names)
    print(
        f"{changed} changed networks: torch runs {changed + 1} full forward passes; the engine "
        f"{suffixes * len(BITS)} of {changed * len(network.sites)} segments, and twice the clean "
        f"network, in batches of {engine.batch_size}\n"
    )
    head = ("side", "first: wall", "CPU", "compiled", "again", "peak MiB", "least: wall", "CPU")
    print(table(head, [[*row, *least[row[0]].cells()] for row in rows]), "\n")

    kl, kept = results["torch"]
    truth = kept.table(len(network.names), args.images)
    for name in ("engine", "stacked"):
        own_kl, own = results[name]
        wrong = np.abs(own.table(len(network.names), args.images) - truth).max()
        each = (np.abs(own_kl - kl) / np.maximum(kl, 1e-12)).max(axis=0)
        by_bits = ", ".join(f"{e:.0e} at {b} bits" for b, e in zip(BITS, each, strict=True))
        print(
            f"{name} against torch: logits within {wrong / np.abs(truth).max():.1e} of the "
            f"largest; KL relative {by_bits}"
        )
    other = least["torch, full passes"]
    print()
    print(ratio("engine / torch", least["engine"], other))
    print(ratio("engine with compiling / torch", firsts["engine"], other))
    print(ratio("engine, stacked / torch", least["engine, stacked"], other))
    if any(second.values()):
        raise SystemExit(f"a second call compiled again: {second}")


if __name__ == "__main__":
    main()
