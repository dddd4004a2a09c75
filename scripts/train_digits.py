"""Train the embedded digits network and write the files that the package ships.

    python scripts/train_digits.py [--seed 0] [--epochs 80] [--out proxyq/model/digits_files]

Needs scikit-learn, whose copy of the UCI set this reads (no download). About
25 seconds on one core; the same seed on the same machine and versions gives the same bytes.
"""

import argparse
import io
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save

from proxyq.files import write_atomic
from proxyq.model.digits import DigitsNet

SIZES = {"training": 997, "calibration": 256, "validation": 144, "test": 400}
ATTRIBUTION = {
    "data_set": "Optical Recognition of Handwritten Digits",
    "creators": ["E. Alpaydin", "C. Kaynak"],
    "publisher": "UCI Machine Learning Repository",
    "year": 1998,
    "doi": "10.24432/C50P49",
    "licence": "Creative Commons Attribution 4.0 International (CC BY 4.0)",
    "licence_url": "https://creativecommons.org/licenses/by/4.0/legalcode",
    "obtained_through": "sklearn.datasets.load_digits (its test part, 1797 images)",
    "changes": "Grey values 0 to 16 scaled by 255/16 and rounded to uint8; the images shuffled "
    "by a seed and cut into splits, of which calibration, validation and test are here.",
    "files": {
        "digits.npz": "images and labels of three splits, adapted from the data set",
        "digits.safetensors": "weights of a network trained on the remaining 997 images",
    },
}


def make_splits(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Shuffled images (N, 8, 8, 1) uint8 and labels, cut so that each class is spread evenly."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = np.rint(source.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = source.target.astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(labels))
    # Deal the classes out in turn: any run of consecutive images is nearly balanced.
    rank = np.empty(len(labels), int)
    for digit in range(10):
        members = order[labels[order] == digit]
        rank[members] = np.arange(len(members)) * len(labels) // len(members) * 10 + digit
    order = np.argsort(rank, kind="stable")
    splits, start = {}, 0
    # Training takes what is left at the end, where the classes that have more images remain.
    for name in ("test", "calibration", "validation", "training"):
        part = order[start : start + SIZES[name]]
        splits[name] = images[part], labels[part]
        start += SIZES[name]
    return splits


def shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Each image moved by up to one pixel either way, the border filled with black."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=images.min())
    starts = jax.random.randint(key, (len(images), 2), 0, 3)
    return jax.vmap(lambda x, s: jax.lax.dynamic_slice(x, (s[0], s[1], 0), (8, 8, 1)))(
        padded, starts
    )


def train(x: jax.Array, y: jax.Array, *, seed: int, epochs: int, batch_size: int) -> nnx.Module:
    """AdamW with a cosine schedule on cross-entropy with label smoothing of 0.05."""
    module = DigitsNet(rngs=nnx.Rngs(seed))
    definition, weights, state = nnx.split(module, nnx.Param, ...)
    per_epoch = len(x) // batch_size
    steps = epochs * per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10, steps)
    optimizer = optax.adamw(schedule, weight_decay=1e-2)

    def loss(weights, state, images, labels):
        module = nnx.merge(definition, weights, state, copy=True)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.05)
        value = optax.softmax_cross_entropy(module(images), targets).mean()
        return value, nnx.state(module, nnx.Not(nnx.Param))

    @jax.jit
    def step(weights, state, moments, index, key):
        images = shifted(x[index], key)
        (value, state), slope = jax.value_and_grad(loss, has_aux=True)(
            weights, state, images, y[index]
        )
        updates, moments = optimizer.update(slope, moments, weights)
        return optax.apply_updates(weights, updates), state, moments, value

    moments = optimizer.init(weights)
    for epoch, key in enumerate(jax.random.split(jax.random.key(seed), epochs)):
        shuffle, *keys = jax.random.split(key, 1 + per_epoch)
        order = jax.random.permutation(shuffle, len(x))[: per_epoch * batch_size]
        values = []
        for index, step_key in zip(order.reshape(per_epoch, -1), keys, strict=True):
            weights, state, moments, value = step(weights, state, moments, index, step_key)
            values.append(value)
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1:3d}  loss {float(np.mean(values)):.4f}", flush=True)
    return nnx.merge(definition, weights, state)


def main() -> None:
    """Train, write the files and print the accuracy on the three held-out splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=64)
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--out", type=Path, default=here / "proxyq" / "model" / "digits_files")
    options = parser.parse_args()
    started = time.perf_counter()

    splits = make_splits(options.seed)
    images, labels = splits.pop("training")
    mean = round(float((images / 255).mean()), 4)
    std = round(float((images / 255).std()), 4)

    def normalise(images: np.ndarray) -> jax.Array:
        return jnp.asarray((images.astype(np.float32) / 255 - mean) / std, jnp.float32)

    module = train(
        normalise(images),
        jnp.asarray(labels, jnp.int32),
        seed=options.seed,
        epochs=options.epochs,
        batch_size=options.batch_size,
    )
    module.eval()
    accuracy = {
        name: round(100 * float((module(normalise(x)).argmax(-1) == y).mean()), 2)
        for name, (x, y) in splits.items()
    }

    _, state = nnx.split(module)
    weights = {
        ".".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(state)
    }
    buffer = io.BytesIO()
    arrays = {}
    for name, (x, y) in splits.items():
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = x, y
    np.savez_compressed(buffer, **arrays)
    record = {
        "mean": mean,
        "std": std,
        "top1": accuracy,
        "seed": options.seed,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    contents = {
        "digits.safetensors": save(weights),
        "digits.npz": buffer.getvalue(),
        "digits.json": json.dumps(record, indent=2) + "\n",
        "ATTRIBUTION.json": json.dumps(ATTRIBUTION, indent=2) + "\n",
    }
    for name, content in contents.items():
        write_atomic(options.out / name, content)
        print(f"{len(content):8d} bytes  {name}")
    print(f"top-1 % {accuracy}; {time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
