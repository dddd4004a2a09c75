"""A ResNet and a ViT in flax.nnx and in flax.linen, small, but written as their users write them.

`FOLDER/flax_networks.py:nnx_resnet` and the other factories are models on the command line too.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from proxyq.model.flax_import import from_linen
from proxyq.model.model import Model

SHAPE = (8, 8, 3)


# --- flax.nnx -----------------------------------------------------------------------------------


class ResNetBlock(nnx.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, rngs: nnx.Rngs, **kinds: Any):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs, **kinds)
        norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5, rngs=rngs, **kinds)
        self.conv1 = conv(inputs, outputs, kernel_size=(3, 3), strides=stride, padding="SAME")
        self.bn1 = norm(outputs)
        self.conv2 = conv(outputs, outputs, kernel_size=(3, 3), padding="SAME")
        self.bn2 = norm(outputs)
        if stride > 1 or inputs != outputs:
            self.shortcut = nnx.Sequential(
                conv(inputs, outputs, kernel_size=(1, 1), strides=stride), norm(outputs)
            )
        else:
            self.shortcut = nnx.identity

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + self.shortcut(x))


class ResNet(nnx.Module):
    def __init__(self, classes: int = 10, *, rngs: nnx.Rngs, **kinds: Any):
        self.stem = nnx.Sequential(
            nnx.Conv(3, 8, kernel_size=(3, 3), use_bias=False, rngs=rngs, **kinds),
            nnx.BatchNorm(8, rngs=rngs, **kinds),
            nnx.relu,
        )
        self.blocks = nnx.List(
            [ResNetBlock(8, 8, rngs=rngs, **kinds), ResNetBlock(8, 12, 2, rngs=rngs, **kinds)]
        )
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(12, classes, rngs=rngs, **kinds)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = jnp.mean(x, axis=(1, 2))
        return self.head(self.dropout(x))


class EncoderBlock(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, **kinds: Any):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs, **kinds)
        self.attention = nnx.MultiHeadAttention(
            num_heads=heads,
            in_features=width,
            dropout_rate=0.1,
            broadcast_dropout=False,
            decode=False,
            rngs=rngs,
            **kinds,
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs, **kinds)
        self.mlp = nnx.Sequential(
            nnx.Linear(width, 2 * width, rngs=rngs, **kinds),
            nnx.gelu,
            nnx.Dropout(0.1, rngs=rngs),
            nnx.Linear(2 * width, width, rngs=rngs, **kinds),
            nnx.Dropout(0.1, rngs=rngs),
        )

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nnx.Module):
    """`looped`: the blocks' parameters lie on top of each other, and one loop runs them."""

    def __init__(
        self,
        width: int = 8,
        depth: int = 2,
        classes: int = 10,
        *,
        looped: bool = False,
        rngs: nnx.Rngs,
        **kinds: Any,
    ):
        self.depth, self.looped = depth, looped
        self.patches = nnx.Conv(
            3, width, kernel_size=(4, 4), strides=(4, 4), padding="VALID", rngs=rngs, **kinds
        )
        self.token = nnx.Param(jnp.zeros((1, 1, width)))
        self.position = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 5, width)))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        if looped:

            @nnx.split_rngs(splits=depth)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def create(rngs: nnx.Rngs):
                return EncoderBlock(width, 2, rngs=rngs, **kinds)

            self.blocks = create(rngs)
        else:
            self.blocks = nnx.List(
                [EncoderBlock(width, 2, rngs=rngs, **kinds) for _ in range(depth)]
            )
        self.norm = nnx.LayerNorm(width, rngs=rngs, **kinds)
        self.head = nnx.Linear(width, classes, rngs=rngs, **kinds)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, x.shape[-1]))
        x = self.dropout(jnp.concatenate([token, x], axis=1) + self.position[...])
        if self.looped:

            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            @nnx.remat
            def run(block: EncoderBlock, x):
                return block(x)

            x = run(self.blocks, x)
        else:
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x)[:, 0])


def trained(module: nnx.Module, seed: int = 0) -> nnx.Module:
    """The module with statistics, scales and biases as training leaves them, none a constant."""
    rng = np.random.default_rng(seed)
    state = nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))
    drawn = jax.tree_util.tree_map_with_path(partial(_drawn, rng), state)
    nnx.update(module, drawn)
    return module


def _drawn(rng: np.random.Generator, path: Any, value: Any) -> Any:
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    name = next((n for n in reversed(names) if n in _RANGES), None)
    if name is None:
        return value
    low, high = _RANGES[name]
    return jnp.asarray(rng.uniform(low, high, value.shape), value.dtype)


_RANGES = {
    "mean": (-0.3, 0.3),
    "var": (0.5, 1.5),
    "scale": (0.6, 1.4),
    "bias": (-0.2, 0.2),
    "token": (-0.5, 0.5),
}


def nnx_resnet() -> nnx.Module:
    return trained(ResNet(rngs=nnx.Rngs(0)))


def nnx_vit() -> nnx.Module:
    return trained(ViT(rngs=nnx.Rngs(0)))


def nnx_looped_vit() -> nnx.Module:
    return trained(ViT(looped=True, rngs=nnx.Rngs(0)))


# --- flax.linen ---------------------------------------------------------------------------------


class LinenResNetBlock(nn.Module):
    filters: int
    conv: Any
    norm: Any
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        residual = x
        y = self.conv(self.filters, (3, 3), self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = self.conv(self.filters, (3, 3))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if residual.shape != y.shape:
            residual = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(residual)
            residual = self.norm(name="norm_proj")(residual)
        return nn.relu(residual + y)


class LinenResNet(nn.Module):
    classes: int = 10
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = True):
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(nn.Conv, use_bias=False, **kinds)
        norm = partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, **kinds
        )
        x = conv(8, (3, 3), name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = LinenResNetBlock(8, conv=conv, norm=norm)(x)
        x = LinenResNetBlock(12, conv=conv, norm=norm, strides=(2, 2))(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        x = nn.Dense(self.classes, **kinds)(x)
        return jnp.asarray(x, jnp.float32)


class MlpBlock(nn.Module):
    width: int
    dropout: float = 0.1
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, deterministic: bool):
        out = x.shape[-1]
        x = nn.gelu(nn.Dense(self.width, param_dtype=self.param_dtype)(x))
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        return nn.Dense(out, param_dtype=self.param_dtype)(x)


class LinenEncoderBlock(nn.Module):
    heads: int
    deterministic: bool
    scanned: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm(param_dtype=self.param_dtype)(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=self.heads, dropout_rate=0.1, param_dtype=self.param_dtype
        )(y, y, deterministic=self.deterministic)
        x = x + y
        y = nn.LayerNorm(param_dtype=self.param_dtype)(x)
        y = MlpBlock(2 * x.shape[-1], param_dtype=self.param_dtype)(
            y, deterministic=self.deterministic
        )
        self.sow("intermediates", "features", x + y)
        return (x + y, None) if self.scanned else x + y


class LinenViT(nn.Module):
    """`axis`: of the blocks' stacked parameters, where one loop runs them (`nn.scan`)."""

    width: int = 8
    depth: int = 2
    classes: int = 10
    axis: int | None = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = True):
        kinds = {"param_dtype": self.param_dtype}
        x = nn.Conv(self.width, (4, 4), strides=(4, 4), padding="VALID", name="patches", **kinds)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        x = nn.Dropout(0.1)(x, deterministic=not train)
        if self.axis is None:
            for number in range(self.depth):
                x = LinenEncoderBlock(2, not train, name=f"block_{number}", **kinds)(x)
        else:
            x, _ = nn.scan(
                nn.remat(LinenEncoderBlock, prevent_cse=False),
                variable_axes={"params": self.axis, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.depth,
            )(2, not train, scanned=True, name="blocks", **kinds)(x, None)
        x = nn.LayerNorm(name="norm", **kinds)(x)
        return nn.Dense(self.classes, name="head", **kinds)(x[:, 0])


@cache
def initialised(module: nn.Module, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A linen module and its variables, as training leaves them."""
    rng = np.random.default_rng(seed)
    init = jax.jit(partial(module.init, train=False, mutable=["params", "batch_stats"]))
    variables = init(jax.random.key(seed), jnp.zeros((1, *SHAPE)))
    return module, jax.tree_util.tree_map_with_path(partial(_drawn, rng), variables)


def model_of(module: nn.Module, variables: Any) -> Model:
    return from_linen(module, variables, SHAPE, apply_kwargs={"train": False})


def linen_resnet() -> Model:
    return model_of(*initialised(LinenResNet()))


def linen_vit() -> Model:
    return model_of(*initialised(LinenViT()))


def linen_looped_vit() -> Model:
    return model_of(*initialised(LinenViT(axis=1)))


for factory in (nnx_resnet, nnx_vit, nnx_looped_vit):
    factory.input_shape = SHAPE  # type: ignore[attr-defined]
