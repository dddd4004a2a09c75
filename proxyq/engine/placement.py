"""Where a batch and the parameters lie when a network runs on several devices.

A mesh of two axes: the images of a batch are split along one, the alternatives of a layer along
the other, and parameters are on every device. That is all that is said, here and nowhere else:
XLA splits each program by what it is given, and adds what has to be exchanged (a sum over
images, the Gram matrix of all of them).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from proxyq.devices import Devices
from proxyq.model.graph import Graph, is_literal

IMAGES, ALTERNATIVES = "images", "alternatives"


@dataclass(frozen=True)
class Placement:
    """A mesh `[images, alternatives]` of devices; without one, the device that JAX takes."""

    mesh: Mesh | None = None

    @property
    def images(self) -> int:
        """Among how many devices the images of a batch are split."""
        return 1 if self.mesh is None else self.mesh.shape[IMAGES]

    @property
    def alternatives(self) -> int:
        """Among how many devices alternatives are split."""
        return 1 if self.mesh is None else self.mesh.shape[ALTERNATIVES]

    def batch(self, leaf: Any, dtype: Any = None) -> Any:
        """A part of a batch, its first axis split among devices; it must divide."""
        if self.mesh is None:
            return jnp.asarray(leaf, dtype)
        if not isinstance(leaf, jax.Array):  # from the host each device gets its own part alone
            leaf = np.asarray(leaf)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype) if dtype is None else dtype
        if leaf.dtype != dtype:
            leaf = leaf.astype(dtype)
        return jax.device_put(leaf, NamedSharding(self.mesh, PartitionSpec(IMAGES)))

    @property
    def everywhere(self) -> NamedSharding | None:
        """The sharding of what every device holds whole."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def whole(self, array: Any) -> Any:
        """An array that every device holds."""
        array = jnp.asarray(array)
        return array if self.mesh is None else jax.device_put(array, self.everywhere)

    def each_image(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of arrays that have the images first, as it does: each device its own.

        For what convolves each image with a kernel of its own, which is one convolution with
        groups: XLA's partitioner gives wrong results where it has to split these.
        """
        if self.images == 1:
            return function
        spec = PartitionSpec(IMAGES)
        # Unchecked: the check would add a sum over devices to derivatives inside.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False
        )

    def stack(self, values: Sequence[Any]) -> Any:
        """Alternatives along a new first axis, which is split among devices."""
        if self.alternatives == 1:
            return jnp.stack(list(values))
        return _stacker(self.mesh)(list(values))


ALONE = Placement()


@lru_cache(maxsize=8)
def _stacker(mesh: Mesh) -> Any:
    def stack(values: list[Any]) -> Any:
        x = jnp.stack(values)
        # How the images lie in the other axes is left as it is.
        others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        spec = PartitionSpec(ALTERNATIVES, *others)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.jit(stack)


def placement(
    devices: Devices, images: int, *, exactly: bool = False, apart: bool = True
) -> Placement:
    """How to use `devices` for `images`: as many as can be for images, the rest for alternatives.

    Each device has at least one image; the batch is filled up until it divides, unless `exactly`
    so many must run at once. A number set for alternatives gives way where it leaves more devices
    than images. Images that cannot be taken `apart` stay together.
    """
    if devices.devices is None:
        return ALONE
    count, fixed = devices.count, devices.alternatives
    most = count if fixed is None else count // fixed
    if not apart:
        most = 1
    shares = (d for d in range(1, most + 1) if count % d == 0)
    share = max(d for d in shares if (images % d == 0 if exactly else d <= images))
    grid = np.array(devices.devices, dtype=object).reshape(share, -1)
    return Placement(Mesh(grid, (IMAGES, ALTERNATIVES)))


def can_split(graph: Graph) -> bool:
    """Whether the images of a batch may be on several devices.

    Not where a convolution's kernels are made from the images, one for each of them, which are its
    groups: see `Placement.each_image`.
    """
    known = set(graph.frontier)
    return not any(
        eqn.primitive.name == "conv_general_dilated"
        and eqn.params["feature_group_count"] * eqn.params["batch_group_count"] > 1
        and not (is_literal(eqn.invars[1]) or eqn.invars[1] in known)
        for eqn in graph.main
    )
