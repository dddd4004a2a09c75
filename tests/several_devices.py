"""Runs in a process of its own, with several host devices: what `test_devices.py` looks at.

    python tests/several_devices.py FUNCTION...

prints what the functions below give, as JSON. JAX counts its devices once, when it starts.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

FLAG = "--xla_force_host_platform_device_count=4"
IMAGES = 13  # no number of devices divides it
BITS = (2, 4, 8)
PROXIES = (
    *("orthogonality", "separability", "output-error", "snip", "fisher", "hessian-trace"),
    *("kl-delta", "logit-coupling", "clado"),
)
ONE_OF_A_KIND = ("orthogonality", "output-error", "snip", "fisher")
SWEEPS = ("kl-delta", "logit-coupling", "clado")
# How many devices, and among how many of them alternatives are split.
LAYOUTS = ((1, None), (2, None), (4, None), (4, 2), (4, 4))


def run(*functions: str):
    """The results of functions of this file, by name, in a process with four devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, *functions],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def images(model, number=IMAGES):
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(size=(number, *leaf.shape[1:])).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, model.example(1))


def labels(number=IMAGES, classes=3):
    import numpy as np

    return np.random.default_rng(1).integers(0, classes, number)


def tiny():
    """A convolution, a linear layer and a classifier."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from proxyq.model.function_import import from_function

    rng = np.random.default_rng(0)
    shapes = {"stem": (3, 3, 2, 4), "linear": (4, 4), "head": (4, 3)}
    params = {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()}

    def apply(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, p["stem"], (1, 1), "SAME", dimension_numbers=numbers)
        x = jnp.mean(jax.nn.relu(x), axis=(1, 2))
        return jax.nn.relu(x @ p["linear"]) @ p["head"]

    return from_function(apply, params, (4, 4, 2), name="tiny")


def scores_of(model, names=PROXIES, layouts=LAYOUTS, memory=None, classes=3):
    """By layout, then proxy: values and coupling."""
    from proxyq import on_devices
    from proxyq.engine import Engine
    from proxyq.engine.compared import matrices_bytes
    from proxyq.proxies import PROXIES as KNOWN
    from proxyq.proxies import score

    x, y = images(model), labels(classes=classes)
    compared = [name for name in names if name == "orthogonality"]
    rest = [name for name in names if name not in compared]
    more = memory
    if memory is not None:  # matrices of all images are more than a tiny network's batch
        more = memory + matrices_bytes(Engine.build(model, IMAGES), IMAGES, 1, "post-activation")
    found = []
    for count, alternatives in layouts:
        own = []
        with on_devices(count, alternatives=alternatives):
            for some, bound in ((compared, more), (rest, memory)):
                requests = [(KNOWN.get(name), {}) for name in some]
                if requests:
                    own += score(model, requests, x, labels=y, bits=BITS, memory=bound)
        found.append(
            {
                one.proxy: {
                    "values": one.values.tolist(),
                    "coupling": None if one.coupling is None else one.coupling.tolist(),
                    "devices": one.notes.get("devices"),
                }
                for one in own
            }
        )
    return found


def four_images_a_device(model):
    """Memory for four at a time, and the batches that engines make of it."""
    from proxyq import on_devices
    from proxyq.engine import Engine
    from proxyq.engine.memory import bytes_per_image
    from proxyq.model.network import LAYERS_AT, network

    memory = 4 * 2 * bytes_per_image(network(model, LAYERS_AT).graph)
    sizes = []
    for count in (1, 2, 4):
        with on_devices(count):
            sizes.append(Engine.build(model, IMAGES, memory=memory).batch_size)
    return memory, sizes


def same_batches():
    """With as many images on each device whatever their number: one kind of proxy each on 1 and 4,
    and sweeps on 2 and with their alternatives on 4."""
    memory, sizes = four_images_a_device(tiny())
    one, two, four, _, alternatives = LAYOUTS
    return {
        "sizes": sizes,
        "images": scores_of(tiny(), ONE_OF_A_KIND, (one, four), memory=memory),
        "sweeps": scores_of(tiny(), SWEEPS, (one, two, alternatives), memory=memory),
    }


def other_networks():
    """The same of a network with a depthwise layer and a tied one, of attention whose images are
    not on the first axis, and of residual blocks with batch norm."""
    from networks import mixer, small_net

    from proxyq.testing import branched_network

    found = {}
    networks = ((tiny(), 3), (branched_network(), 3), (mixer(), 8), (small_net(), 10))
    for model, classes in networks:
        memory, _ = four_images_a_device(model)
        found[model.name] = {
            "same": scores_of(model, memory=memory, classes=classes),
            "default": scores_of(model, layouts=LAYOUTS[:3], classes=classes),
        }
    return found


def placed():
    """Where tensors are: shapes of the parts that devices hold, and how many different ones."""
    import jax

    from proxyq import on_devices
    from proxyq.engine import Edit, Engine, TapOptions, collect
    from proxyq.model.model import logits_of

    def parts(array):
        return {
            "shape": list(array.shape),
            "parts": [list(shard.data.shape) for shard in array.addressable_shards],
            "different": len({str(shard.index) for shard in array.addressable_shards}),
        }

    model = tiny()
    x, found = images(model), {}
    with on_devices(4):
        engine = Engine.build(model, IMAGES)
        batch, count = next(engine.chunks(x))
        found["batch"] = parts(batch) | {"count": count}
        state, found["states"] = engine.start(batch), []
        for site in range(len(engine.network.sites)):
            state, _ = engine.step(state, site)
            found["states"] += [parts(value) for value in state.values()]
        found["weights"] = [parts(value) for value in engine.frontier.values()]
        taps = collect(engine, x, ("output", "gram"), (2,), options=TapOptions())
        found["tap"] = parts(taps.taps[0].output)
        compiled = jax.jit(model.apply).lower(engine.network.model.params, batch).compile()
        lines = [line for line in compiled.as_text().splitlines() if "convolution(" in line]
        found["convolutions"] = [line.split("=")[1].split("[")[1].split("]")[0] for line in lines]
    with on_devices(4, alternatives=4):
        engine = Engine.build(model, IMAGES)
        state = engine.start(next(engine.chunks(x))[0])
        weight = engine.weight(0)
        edits = [Edit(weight=weight * scale) for scale in (0.5, 0.8, 0.9, 1.1)]
        found["alternatives"] = parts(logits_of(engine.resume_stacked(state, 0, edits)))
    return found


def kernels_from_images():
    """A network that makes a kernel for each image: split, it would compute something else."""
    import jax
    import numpy as np

    from proxyq import on_devices
    from proxyq.engine import Engine
    from proxyq.model.function_import import from_function

    rng = np.random.default_rng(0)
    params = {"make": rng.normal(size=(2, 36)), "head": rng.normal(size=(2, 3))}

    def one(p, x):
        kernel = (x.mean(axis=(0, 1)) @ p["make"]).reshape(3, 3, 2, 2)
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return y[0].mean(axis=(0, 1)) @ p["head"]

    model = from_function(jax.vmap(one, in_axes=(None, 0)), params, (5, 5, 2), name="dynamic")
    x, logits, splits = images(model, 16), [], []
    for count in (1, 4):
        with on_devices(count):
            engine = Engine.build(model, 16)
            splits.append([engine.placement.images, engine.placement.alternatives])
            logits.append(engine.logits(x).tolist())
    return {"logits": logits, "splits": splits}


def asked():
    """How many devices a command uses, by what `--devices` says."""
    from proxyq.cli.runtime import working
    from proxyq.devices import current

    counts = {}
    for text in (None, "1", "3", "all"):
        with working(devices=text, no_cache=True, quiet=True):
            counts[str(text)] = current().count
    return counts


def kept():
    """One cache for all numbers of devices, but not for what is unfinished."""
    import logging
    import tempfile

    import numpy as np

    from proxyq import api, on_devices
    from proxyq.proxies import Cache

    said = []

    class Listener(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    logger = logging.getLogger("proxyq.scores")
    logger.setLevel(logging.INFO)
    logger.addHandler(Listener())
    model, rows = tiny(), []
    with tempfile.TemporaryDirectory() as where:
        cache, x = Cache(where), np.asarray(images(model))
        for count in (4, 1):
            with on_devices(count):
                unfinished = cache.checkpoint("key").folder.name
                whole = cache.checkpoint("key", batches=False).folder.name
                said.clear()
                file = api.score(model, x, proxies="params", bits=(2, 4), cache_dir=cache)
                rows.append(
                    {
                        "cached": [text for text in said if "from the cache" in text],
                        "devices": file.provenance.get("devices"),
                        "notes": file.of("params").notes.get("devices"),
                        "unfinished": [unfinished, whole],
                    }
                )
    return rows


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        results = {name: globals()[name]() for name in sys.argv[1:]}
    print(json.dumps(results))
