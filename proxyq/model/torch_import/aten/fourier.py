"""Fourier transforms and complex numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from proxyq.model.torch_import.aten.promotion import FLOAT, Array, cast, category, elementwise
from proxyq.model.torch_import.aten.table import register_aten

# Transforms along one axis; those along two and several have the same names and arguments.
_LINE = ("fft", "ifft", "rfft", "irfft")


def _single(x: Array) -> Array:
    """Transforms take float32 and complex64 alone."""
    return x if category(x.dtype) == 3 else cast(x, FLOAT)


def _line(function: Callable[..., Array]) -> Callable[..., Array]:
    def transform(x: Array, n: int | None = None, dim: int = -1, norm: str | None = None) -> Array:
        return function(_single(x), n, dim, norm)

    return transform


def _several(function: Callable[..., Array], default: tuple[int, ...] | None) -> Callable:
    def transform(
        x: Array,
        s: list[int] | None = None,
        dim: list[int] | int | None = default,  # type: ignore[assignment]
        norm: str | None = None,
    ) -> Array:
        axes = (dim,) if isinstance(dim, int) else None if dim is None else tuple(dim)
        return function(_single(x), None if s is None else tuple(s), axes, norm)

    return transform


for _name in _LINE:
    register_aten(f"fft_{_name}")(_line(getattr(jnp.fft, _name)))
    register_aten(f"fft_{_name}2")(_several(getattr(jnp.fft, f"{_name}2"), (-2, -1)))
    register_aten(f"fft_{_name}n")(_several(getattr(jnp.fft, f"{_name}n"), None))
register_aten("fft_fftshift")(lambda x, dim=None: jnp.fft.fftshift(x, dim))
register_aten("fft_ifftshift")(lambda x, dim=None: jnp.fft.ifftshift(x, dim))

register_aten("_conj", "_conj_physical")(jnp.conj)
register_aten("_neg_view")(jnp.negative)
register_aten("resolve_conj", "resolve_neg")(lambda x: x)
register_aten("angle")(jnp.angle)


@register_aten("complex")
def complex_of(real: Array, imaginary: Array) -> Array:
    """real + i · imaginary."""
    return elementwise(jax.lax.complex, real, imaginary)


@register_aten("polar")
def polar(length: Array, angle: Array) -> Array:
    """length · exp(i · angle)."""
    return complex_of(length * jnp.cos(angle), length * jnp.sin(angle))


@register_aten("view_as_real", "view_as_real_copy")
def view_as_real(x: Array) -> Array:
    """Real and imaginary parts along a new last axis."""
    return jnp.stack([jnp.real(x), jnp.imag(x)], -1)


@register_aten("view_as_complex", "view_as_complex_copy")
def view_as_complex(x: Array) -> Array:
    """The two places of the last axis as one complex number."""
    return complex_of(x[..., 0], x[..., 1])
