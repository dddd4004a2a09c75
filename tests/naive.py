"""Networks written out by hand, in float64: what derivatives are compared with.

A `Naive` network is a plain function of its weights. Everything else (its gradients, Hessian
products, Hessians) comes from `jax.grad` of the whole network, never from proxyq.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from proxyq.model.function_import import from_function
from proxyq.model.model import Model


def float64() -> AbstractContextManager:
    """A block in which JAX computes in float64."""
    if hasattr(jax, "enable_x64"):  # since JAX 0.8
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


@dataclass(frozen=True, kw_only=True, eq=False)
class Naive:
    """A network in float64.

    - `weights`: one array for each block (a weight used in two shapes has two), in the
      engine's order and layout, batch norm folded in by hand.
    - `rows`: the layer of each block. `apply(weights, x, moved)` gives the logits; `moved`
      maps reads (blocks, mostly) to what is added to the tensor that is read.

    Derivatives are compiled once, for all blocks together; a direction in one of them is zero
    in all others.
    """

    weights: dict[str, np.ndarray]
    rows: tuple[int, ...]
    apply: Callable[..., Any]

    def logits(self, x: Any, weights: Any = None, moved: Any = None) -> Any:
        """The logits, some weights replaced."""
        return self.apply({**self.weights, **(weights or {})}, jnp.asarray(x), moved or {})

    @cached_property
    def _gradient(self) -> Any:
        def loss(w: Any, x: Any, targets: Any, objective: Any) -> Any:
            return objective(self.apply(w, x, {}), targets).mean()

        return jax.jit(jax.grad(loss), static_argnums=3)

    @cached_property
    def _product(self) -> Any:
        def product(w: Any, v: Any, x: Any, targets: Any, objective: Any) -> Any:
            return jax.jvp(lambda w: self._gradient(w, x, targets, objective), (w,), (v,))[1]

        return jax.jit(product, static_argnums=4)

    @cached_property
    def _tangent(self) -> Any:
        return jax.jit(lambda w, v, x: jax.jvp(lambda w: self.apply(w, x, {}), (w,), (v,)))

    def _whole(self, some: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: some.get(name, np.zeros_like(w)) for name, w in self.weights.items()}

    def _one_hot(self, block: str) -> Iterator[dict[str, np.ndarray]]:
        shape = self.weights[block].shape
        yield from (self._whole({block: row.reshape(shape)}) for row in np.eye(math.prod(shape)))

    def gradient(
        self, objective: Any, x: Any, targets: Any, block: str, moved: Any = 0.0
    ) -> np.ndarray:
        """Of the mean loss, by one block, which may be moved first."""
        with float64():
            w = {**self.weights, block: self.weights[block] + moved}
            found = self._gradient(w, np.asarray(x, np.float64), targets, objective)
            return np.asarray(found[block])

    def products(
        self, objective: Any, x: Any, targets: Any, directions: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """`(H v)` with the whole Hessian of the blocks in `directions`."""
        with float64():
            x = np.asarray(x, np.float64)
            found = self._product(self.weights, self._whole(directions), x, targets, objective)
            return {block: np.asarray(found[block]) for block in directions}

    def hessian(self, objective: Any, x: Any, targets: Any, block: str) -> np.ndarray:
        """One block of the mean loss's Hessian, as a matrix."""
        with float64():
            x = np.asarray(x, np.float64)
            found = (
                self._product(self.weights, v, x, targets, objective)[block]
                for v in self._one_hot(block)
            )
            return np.stack([np.asarray(row).ravel() for row in found])

    def gauss_newton(self, x: Any, direction: dict[str, np.ndarray]) -> np.ndarray:
        """`v' J' (diag p - p p') J v` for each image: Gauss-Newton of the cross-entropy."""
        with float64():
            x = np.asarray(x, np.float64)
            return gauss_newton_form(*self._tangent(self.weights, self._whole(direction), x))

    def gauss_newton_trace(self, x: Any, block: str) -> float:
        """Of one block, the mean over the images."""
        return sum(self.gauss_newton(x, v).mean() for v in self._one_hot(block))

    def image_gradients(self, objective: Any, x: Any, targets: Any) -> dict[str, np.ndarray]:
        """Each image's gradient, one image after the other: `[images, *weight]`."""
        with float64():
            x, targets = np.asarray(x, np.float64), np.asarray(targets)
            each = [
                self._gradient(self.weights, x[s : s + 1], targets[s : s + 1], objective)
                for s in range(len(x))
            ]
            return {b: np.stack([np.asarray(one[b]) for one in each]) for b in self.weights}


def gauss_newton_form(logits: Any, moved: Any) -> np.ndarray:
    """`dz' (diag p - p p') dz` for each image."""
    z, dz = np.asarray(logits), np.asarray(moved)
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return np.sum(p * dz**2, axis=-1) - np.sum(p * dz, axis=-1) ** 2


def cross_entropy(logits: Any, targets: Any) -> Any:
    """`-ln p_y` for each image, written anew."""
    z = logits - logits.max(axis=-1, keepdims=True)
    log_p = z - jnp.log(jnp.exp(z).sum(axis=-1, keepdims=True))
    each = -jnp.take_along_axis(log_p, jnp.asarray(targets)[..., None], axis=-1)[..., 0]
    return each.reshape(len(each), -1).mean(axis=1)


def _params(model: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float64) for name, value in model.params.items()}


def naive_small_net(model: Any) -> Naive:
    """`SmallNet`, its batch norms folded by hand."""
    p = _params(model)
    weights: dict[str, np.ndarray] = {}
    biases: dict[str, np.ndarray] = {}

    def put(layer: str, norm: str | None) -> None:
        kernel = p[f"{layer}.kernel"]
        bias = p.get(f"{layer}.bias", np.zeros(kernel.shape[-1]))
        if norm is not None:
            scale = p[f"{norm}.scale"] / np.sqrt(p[f"{norm}.var"] + 1e-5)
            kernel, bias = kernel * scale, (bias - p[f"{norm}.mean"]) * scale + p[f"{norm}.bias"]
        weights[layer], biases[layer] = kernel, bias

    put("stem", None)
    for block in ("blocks.0", "blocks.1"):
        for layer, norm in (("conv1", "bn1"), ("depthwise", "bn2"), ("conv2", "bn3")):
            put(f"{block}.{layer}", f"{block}.{norm}")
    put("blocks.1.shortcut", None)
    put("head", None)

    def apply(weights: Any, x: Any, moved: Any, biases: Any = biases) -> Any:
        def conv(layer: str, x: Any, stride: int = 1, groups: int = 1) -> Any:
            x = x + moved.get(layer, 0.0)
            y = lax.conv_general_dilated(
                x, weights[layer], (stride, stride), "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
            )  # fmt: skip
            return y + biases[layer]

        x = jnp.maximum(conv("stem", x), 0)
        for block, stride in (("blocks.0", 1), ("blocks.1", 2)):
            y = jnp.maximum(conv(f"{block}.conv1", x, stride), 0)
            y = jnp.maximum(conv(f"{block}.depthwise", y, groups=y.shape[-1]), 0)
            y = conv(f"{block}.conv2", y)
            x = jnp.maximum(y + (x if stride == 1 else conv(f"{block}.shortcut", x, stride)), 0)
        x = x.mean(axis=(1, 2)) + moved.get("head", 0.0)
        return x @ weights["head"] + biases["head"]

    return Naive(weights=weights, rows=tuple(range(9)), apply=apply)


def naive_mixer(model: Any) -> Naive:
    """`mixer`, whose tied weight is two blocks, and whose gain is folded into the second."""
    p = _params(model)
    gain = p.pop("gain")
    names = ("embed", "tokens", "query", "key", "value", "out", "tied")
    weights = {name: p[name] for name in names}
    weights["tied, again"] = p["tied"].T * gain

    def apply(w: Any, x: Any, moved: Any) -> Any:
        def read(name: str, x: Any) -> Any:
            return x + moved.get(name, 0.0)

        x = read("embed", x) @ w["embed"]
        x = x + jnp.einsum("st,btd->bsd", w["tokens"], read("tokens", x))
        q, k, v = (jnp.einsum("btd,dhe->bthe", read(n, x), w[n]) for n in ("query", "key", "value"))
        scores = jnp.einsum("bshe,bthe->bhst", q, k)
        scores = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        attention = scores / scores.sum(axis=-1, keepdims=True)
        mixed = jnp.einsum("bhst,bthe->bshe", attention, v)
        x = x + jnp.einsum("bshe,hed->bsd", read("out", mixed), w["out"])
        x = jnp.maximum(read("tied", x) @ w["tied"], 0)
        return jnp.mean(read("tied, again", x) @ w["tied, again"], axis=1)

    return Naive(weights=weights, rows=(0, 1, 2, 3, 4, 5, 6, 6), apply=apply)


def gelu_net(seed: int = 0) -> Model:
    """Plain JAX: smooth activations, a norm over features, and a weight used twice in one shape."""
    rng = np.random.default_rng(seed)
    shapes = {"first": (5, 6), "loop": (6, 6), "last": (6, 4), "bias": (4,)}
    params = {k: rng.normal(0, 0.6, shape).astype(np.float32) for k, shape in shapes.items()}

    def apply(p, x):
        x = jax.nn.gelu(x @ p["first"], approximate=False)
        for _ in range(2):
            x = jax.nn.gelu(x @ p["loop"], approximate=False)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
        return x @ p["last"] + p["bias"]

    return from_function(apply, params, (5,), name="gelu")


def naive_gelu_net(model: Any) -> Naive:
    """`gelu_net`: one weight used twice in one shape, smooth activations, a norm over features."""
    p = _params(model)
    weights = {name: p[name] for name in ("first", "loop", "last")}

    def apply(w: Any, x: Any, moved: Any) -> Any:
        def gelu(x: Any) -> Any:
            return 0.5 * x * (1 + lax.erf(x / np.sqrt(2)))

        x = gelu((x + moved.get("first", 0.0)) @ w["first"])
        for turn in range(2):
            x = gelu((x + moved.get(f"loop {turn}", 0.0)) @ w["loop"])
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
        return (x + moved.get("last", 0.0)) @ w["last"] + p["bias"]

    return Naive(weights=weights, rows=(0, 1, 2), apply=apply)
