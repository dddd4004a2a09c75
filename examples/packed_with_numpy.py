"""Quantize, write a packed file, and run the network from it with NumPy alone.

`proxyq/ptq/unpack.py` reads the file; it imports nothing of proxyq and can be copied beside it.
The number: top-1 on the 400 test images, in percent, computed without JAX.
"""

import tempfile

import numpy as np

import proxyq
from proxyq.model.digits import digits_images
from proxyq.ptq import unpack


def convolve(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, stride: int = 1) -> np.ndarray:
    """`x [n, h, w, in]` with `kernel [k, k, in, out]`: the sum over its k * k shifts."""
    size = kernel.shape[0]
    x = np.pad(x, [(0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)])
    rows = (x.shape[1] - size) // stride + 1
    total = bias
    for i in range(size):
        for j in range(size):
            shifted = x[:, i : i + stride * rows : stride, j : j + stride * rows : stride]
            total = total + shifted @ kernel[i, j]
    return total


def digits_net(weights: dict[str, np.ndarray], layers: dict, x: np.ndarray) -> np.ndarray:
    """The embedded network, batch norm folded: images `[n, 8, 8, 1]` to logits `[n, 10]`."""

    def layer(name: str, x: np.ndarray, stride: int = 1) -> np.ndarray:
        entry = layers[name]
        return convolve(x, weights[entry["weight"]], weights[entry["bias"]], stride)

    x = np.maximum(layer("stem", x), 0)
    for block, stride in enumerate((1, 1, 2, 2)):
        name = f"blocks.{block}"
        out = np.maximum(layer(f"{name}.conv1", x, stride), 0)
        out = layer(f"{name}.conv2", out)
        if f"{name}.shortcut" in layers:
            x = layer(f"{name}.shortcut", x, stride)
        x = np.maximum(out + x, 0)
    head = layers["head"]
    return x.mean(axis=(1, 2)) @ weights[head["weight"]] + weights[head["bias"]]


model = proxyq.load_model("digits")
plan = proxyq.search(model, proxy="restored-error", budget="size=2.5bit")

with tempfile.TemporaryDirectory() as folder:
    packed = proxyq.pack(model, plan, "digits", correction="statistics", out=folder)
    header, _ = unpack.read(packed.file)
    weights = unpack.load(packed.file)
    print(f"{packed.file.name}: {packed.file.stat().st_size:,} bytes")
    print(f"weights of the plan: {packed.plan_bytes:,} bytes, {plan.average_bits:.2f} bits each")

# From here on: NumPy.
images, labels = digits_images("test")
mean, std = model.preprocessing.mean[0], model.preprocessing.std[0]
x = ((images / np.float32(255) - mean) / std).astype(np.float32)
logits = digits_net(weights, header["layers"], x)

theirs = np.asarray(packed.model.logits(x))
print(f"largest difference from proxyq's logits: {np.abs(logits - theirs).max():.1e}")
print(f"\ntop-1 by NumPy alone: {100 * (logits.argmax(axis=1) == labels).mean():.2f}")
