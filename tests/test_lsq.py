"""The learned step size quantizer against its published formulas, element by element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxyq.quantize.lsq import (
    code_range,
    first_activation_step,
    first_weight_step,
    lsq,
    scale_of_gradient,
)

CASES = [(2, True), (2, False), (3, True), (4, False), (8, True)]


def published(x, s, lower, upper):
    """Value, derivative by x and by s (times nothing), each element alone."""
    value, by_x, by_s = (np.zeros_like(x) for _ in range(3))
    for i, element in enumerate(x):
        v = element / s
        if v < lower:
            value[i], by_x[i], by_s[i] = lower * s, 0, lower
        elif v > upper:
            value[i], by_x[i], by_s[i] = upper * s, 0, upper
        else:
            value[i], by_x[i], by_s[i] = np.round(v) * s, 1, np.round(v) - v
    return value, by_x, by_s


def draw(bits, signed, step, size=400):
    """Values on both sides of the range, none on an edge between two codes."""
    rng = np.random.default_rng(bits)
    span = step * 2**bits
    return rng.uniform(-span, span, size).astype(np.float32)


@pytest.mark.parametrize(("bits", "signed"), CASES)
def test_value_and_derivatives(bits, signed):
    step, x = 0.07, draw(bits, signed, 0.07)
    lower, upper = code_range(bits, signed)
    assert (lower, upper) == (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    )
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    scale = scale_of_gradient(x.size, upper)
    assert scale == pytest.approx(1 / np.sqrt(x.size * float(upper)), rel=1e-6)
    out, pull = jax.vjp(
        lambda x, s: lsq(x, s, lower, upper, scale), jnp.asarray(x), jnp.float32(step)
    )
    by_x, by_s = pull(jnp.asarray(cotangent))
    value, each_x, each_s = published(x.astype(np.float64), step, float(lower), float(upper))
    np.testing.assert_allclose(out, value, atol=1e-6)
    np.testing.assert_allclose(by_x, cotangent * each_x)
    np.testing.assert_allclose(by_s, (cotangent * each_s).sum() * float(scale), rtol=2e-4)


def test_against_torch_autograd():
    """The same derivatives as a clamp and a rounding with its gradient put straight."""
    torch = pytest.importorskip("torch")
    x = draw(3, True, 0.2)
    a = torch.tensor(x, requires_grad=True)
    s = torch.tensor(0.2, requires_grad=True)
    v = (a / s).clamp(-4, 3)
    out = (v + (v.round() - v).detach()) * s
    (out**2).sum().backward()
    by_x, by_s = jax.grad(lambda x, s: (lsq(x, s, -4.0, 3.0, 1.0) ** 2).sum(), (0, 1))(
        jnp.asarray(x), jnp.float32(0.2)
    )
    np.testing.assert_allclose(by_x, a.grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(by_s, s.grad.numpy(), rtol=1e-4)


@pytest.mark.parametrize("signed", [True, False])
def test_zero_moves_no_step(signed):
    codes = code_range(3, signed)
    by_step = jax.grad(lambda s: lsq(jnp.zeros(5), s, *codes, 1.0).sum())(jnp.float32(0.3))
    assert by_step == 0


@pytest.mark.parametrize(("bits", "signed"), CASES)
def test_rounding_twice_changes_nothing(bits, signed):
    codes = code_range(bits, signed)
    once = lsq(jnp.asarray(draw(bits, signed, 0.013)), 0.013, *codes, 1.0)
    np.testing.assert_array_equal(lsq(once, 0.013, *codes, 1.0), once)


def test_steps_are_clamped():
    x = jnp.asarray([0.4, 1.6, 9.0])
    value = lambda s: lsq(x, jnp.float32(s), 0.0, 3.0, 1.0)  # noqa: E731
    np.testing.assert_array_equal(value(7.0), value(1.0))
    np.testing.assert_allclose(value(-1.0), np.full(3, 3e-5), rtol=1e-6)
    by_step = jax.grad(lambda s: lsq(x, s, 0.0, 3.0, 1.0).sum())
    assert by_step(jnp.float32(7.0)) == 0 and by_step(jnp.float32(1e-6)) == 0
    assert by_step(jnp.float32(1.0)) != 0


def test_bit_widths_may_be_traced():
    x = jnp.asarray(draw(4, True, 0.1))
    program = jax.jit(lambda b: lsq(x, 0.1, *code_range(b, True), 1.0))
    for bits in (2, 3, 5):
        np.testing.assert_array_equal(program(bits), lsq(x, 0.1, *code_range(bits, True), 1.0))
    assert program._cache_size() == 1


def test_other_types_keep_theirs():
    x = jnp.asarray(draw(4, True, 0.1), jnp.bfloat16)
    out, pull = jax.vjp(lambda x, s: lsq(x, s, -8.0, 7.0, 1.0), x, jnp.float32(0.1))
    by_x, by_s = pull(jnp.ones_like(out))
    assert out.dtype == by_x.dtype == jnp.bfloat16 and by_s.dtype == jnp.float32


def test_first_steps():
    w = np.random.default_rng(0).normal(0.1, 0.3, (7, 5)).astype(np.float32)
    reach = max(abs(w.mean() - 3 * w.std(ddof=1)), abs(w.mean() + 3 * w.std(ddof=1)))
    for bits in (2, 4):
        assert first_weight_step(jnp.asarray(w), bits) == pytest.approx(
            reach / 2 ** (bits - 1), rel=1e-5
        )
        assert first_activation_step(jnp.asarray(w), 2.0**bits - 1) == pytest.approx(
            2 * abs(w).mean() / np.sqrt(2**bits - 1), rel=1e-5
        )
    assert first_weight_step(jnp.full((1, 1), 3.0), 2) == 1.5
