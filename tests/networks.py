"""Small networks that the library does not ship, as its users would write them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from proxyq.model.flax_import import from_nnx
from proxyq.model.function_import import from_function
from proxyq.model.model import Model


class Residual(nnx.Module):
    """A residual block with batch norm, and a strided shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(inputs, outputs, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(outputs, rngs=rngs)
        self.depthwise = nnx.Conv(
            outputs, outputs, (3, 3), feature_group_count=outputs, use_bias=False, rngs=rngs
        )
        self.bn2 = nnx.BatchNorm(outputs, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (1, 1), rngs=rngs)
        self.bn3 = nnx.BatchNorm(outputs, rngs=rngs)
        self.shortcut = (
            nnx.Conv(inputs, outputs, (1, 1), strides=stride, rngs=rngs) if stride > 1 else None
        )

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.depthwise(y)))
        y = self.bn3(self.conv2(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class SmallNet(nnx.Module):
    """Stem, two residual blocks, global pooling, classifier: 9 layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.blocks = nnx.List([Residual(8, 8, 1, rngs), Residual(8, 12, 2, rngs)])
        self.head = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def small_net(seed: int = 0) -> Model:
    """`SmallNet` on 12×12 images, with batch-norm statistics as if it were trained."""
    model = from_nnx(SmallNet(nnx.Rngs(seed)), (12, 12, 3), name="small")
    return model.replace(params=randomised(model.params, seed))


def randomised(params, seed: int = 0):
    """Parameters without the symmetries of an initialisation: scales and means drawn anew."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, value in params.items():
        array = np.asarray(value)
        if name.endswith(("var", "scale")):
            # A few negative scales: folding turns the filter's sign.
            sign = np.where(rng.random(array.shape) < 0.2, -1, 1) if name.endswith("scale") else 1
            array = rng.uniform(0.5, 1.5, array.shape) * sign
        elif name.endswith(("mean", "bias")):
            array = rng.normal(0, 0.2, array.shape)
        drawn[name] = array.astype(np.float32)
    return drawn


def mixer(seed: int = 0) -> Model:
    """Plain JAX: a token mixer with weights on the left, attention, and a tied projection."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    params = {
        "embed": draw(4, 8),
        "tokens": draw(6, 6),
        "query": draw(8, 2, 4),
        "key": draw(8, 2, 4),
        "value": draw(8, 2, 4),
        "out": draw(2, 4, 8),
        "tied": draw(8, 8),
        "gain": draw(8),
    }

    def apply(p, x):
        x = x @ p["embed"]  # [batch, 6, 8]
        x = x + jnp.einsum("st,btd->bsd", p["tokens"], x)
        q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in ("query", "key", "value"))
        weights = jax.nn.softmax(jnp.einsum("bshe,bthe->bhst", q, k), axis=-1)
        mixed = jnp.einsum("bhst,bthe->bshe", weights, v)
        x = x + jnp.einsum("bshe,hed->bsd", mixed, p["out"])
        x = jax.nn.relu(x @ p["tied"]) @ p["tied"].T
        return jnp.mean(x * p["gain"], axis=1)

    return from_function(apply, params, (6, 4), name="mixer")


def strided_conv(params, x):
    """A convolution whose weight is standardised first (a derived weight)."""
    w = params["w"]
    w = (w - w.mean(axis=(0, 1, 2))) / (w.std(axis=(0, 1, 2)) + 1e-5) * params["gain"]
    x = lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.mean(x, axis=(1, 2))
