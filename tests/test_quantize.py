"""Quantization grids against loops in NumPy, and their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyq.errors import UsageError
from proxyq.quantize import (
    BITS,
    Grid,
    Rounding,
    dequantize,
    fake_quantize,
    fit_grid,
    quantize,
    quantize_columns,
)

fast = settings(deadline=None, max_examples=40, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def draw(seed, shape=(13, 5)):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * rng.uniform(0.01, 100, shape[1])).astype(np.float32)


def codes_of(bits):
    if bits == 1:
        return np.array([-0.5, 0.5])
    return np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))


def nearest(x, values):
    return values[np.abs(x[..., None] - values).argmin(axis=-1)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axes", [(0,), None])
def test_symmetric_absmax_equals_a_loop(bits, axes):
    x = draw(bits)
    columns = x.T if axes else [x.ravel()]
    expected = []
    for column in columns:
        column = column.astype(np.float64)
        top = codes_of(bits).max()
        expected.append(nearest(column, codes_of(bits) * (np.abs(column).max() / top)))
    expected = np.array(expected).T if axes else np.array(expected).reshape(x.shape)
    got = fake_quantize(x, fit_grid(jnp.asarray(x), bits, axes=axes))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6 * np.abs(x).max())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_asymmetric_grid_covers_the_range_and_holds_zero(bits):
    x = jnp.asarray(draw(bits) + 3)
    grid = fit_grid(x, bits, symmetric=False)
    assert float(dequantize(quantize(jnp.zeros(()), grid), grid).squeeze()) == 0.0
    codes = np.asarray(quantize(x, grid))
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1
    assert np.abs(np.asarray(fake_quantize(x, grid)) - x).max() <= 1.01 * float(
        grid.scale.squeeze()
    )


@given(seed=seeds, bits=st.sampled_from(BITS), symmetric=st.booleans())
@fast
def test_properties(seed, bits, symmetric):
    x = jnp.asarray(draw(seed))
    grid = fit_grid(x, bits, symmetric=symmetric, axes=(0,))
    once = fake_quantize(x, grid)
    # Inside the range no value moves by more than half a step.
    slack = 1e-3 + 2e-5 * 2**bits
    inside = (x >= (grid.lower - grid.zero) * grid.scale) & (
        x <= (grid.upper - grid.zero) * grid.scale
    )
    moved = jnp.where(inside, jnp.abs(once - x) / grid.scale, 0)
    assert float(moved.max()) <= 0.5 + slack
    # Rounding twice changes no code, and bits may be a traced number.
    np.testing.assert_array_equal(quantize(once, grid), quantize(x, grid))
    traced = jax.jit(lambda b: fit_grid(x, b, symmetric=symmetric, axes=(0,)).scale)(bits)
    np.testing.assert_allclose(traced, grid.scale, rtol=1e-6)


@given(seed=seeds, bits=st.sampled_from((2, 3, 4, 6)))
@fast
def test_mse_range_is_no_worse_than_a_fine_search(seed, bits):
    x = draw(seed)
    got = np.asarray(quantize_columns(jnp.asarray(x), bits), np.float64)
    for column in range(x.shape[1]):
        w = x[:, column].astype(np.float64)
        full = np.abs(w).max() / codes_of(bits).max()
        errors = [
            np.sum((nearest(w, codes_of(bits) * full * f) - w) ** 2)
            for f in np.linspace(0.06, 1, 400)
        ]
        assert np.sum((got[:, column] - w) ** 2) <= 1.12 * min(errors) + 1e-12


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_the_odd_code_on_either_side(bits):
    x = draw(bits)
    x[:, 0] = np.abs(x[:, 0])  # a channel of one sign uses one side of the grid
    plain = np.asarray(quantize_columns(jnp.asarray(x), bits), np.float64)
    mirrored = -np.asarray(quantize_columns(jnp.asarray(-x), bits), np.float64)
    best = np.asarray(quantize_columns(jnp.asarray(x), bits, Rounding(extra_code="either")))
    errors = [np.sum((q - x) ** 2, axis=0) for q in (plain, mirrored, best)]
    np.testing.assert_allclose(errors[2], np.minimum(errors[0], errors[1]), rtol=1e-4)
    for column in best.T:
        assert len(np.unique(column)) <= 2**bits
    if bits in (2, 3):
        assert errors[2][0] < 0.9 * errors[0][0]
    with pytest.raises(UsageError, match="`extra_code` of the rounding must be one of"):
        Rounding(extra_code="positive")


def test_percentile_ignores_outliers():
    x = np.concatenate([np.linspace(-1, 1, 999), [100.0]]).astype(np.float32)
    grid = fit_grid(jnp.asarray(x), 8, method="percentile", percentile=99.5)
    assert float(grid.scale.squeeze()) * 127 < 1.1
    assert float(fit_grid(jnp.asarray(x), 8).scale.squeeze()) * 127 == pytest.approx(100, rel=1e-5)


def test_straight_through_gradient():
    grid = Grid(jnp.float32(0.5), jnp.float32(0), jnp.float32(-2), jnp.float32(1))
    x = jnp.array([-3.0, -1.2, -0.9, 0.1, 0.6, 2.0])
    slope = jax.vmap(jax.grad(lambda v: fake_quantize(v, grid)))(x)
    np.testing.assert_array_equal(slope, [0, 1, 1, 1, 1, 0])
    # Activations of a network in bfloat16, which goes on in bfloat16 after the grid.
    half, one = x.astype(jnp.bfloat16), jnp.bfloat16(1)
    slope = jax.grad(lambda v: jnp.sum(fake_quantize(v * one, grid).astype(v.dtype)))(half)
    np.testing.assert_array_equal(slope.astype(np.float32), [0, 1, 1, 1, 1, 0])


def test_zero_channel_stays_zero():
    x = jnp.zeros((4, 2)).at[:, 1].set(1.0)
    for bits in (2, 8):
        assert np.isfinite(np.asarray(quantize_columns(x, bits))).all()
        np.testing.assert_array_equal(quantize_columns(x, bits)[:, 0], 0)


@pytest.mark.parametrize("bits", [0, 9, -1, 32])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(UsageError, match=r"must be 1 to 8 or 16, got"):
        fit_grid(jnp.ones(3), bits)
