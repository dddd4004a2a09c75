"""LSQ: rounding with a learned step size (Esser et al. 2020, arXiv:1902.08153).

Pure array functions: the quantizer with its own derivatives, the codes of a bit-width, and the
first step sizes as LIMPQ takes them from statistics (arXiv:2203.08368 and its published code).
One step size for a tensor; bit-widths may be traced numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp

STEP_RANGE = (1e-5, 1.0)
"""Steps outside of these act as the nearer end (the code of LIMPQ; LSQ itself has no ends)."""


def code_range(bits: Any, signed: Any) -> tuple[Any, Any]:
    """The lowest and the highest code, as float32: `-Q_N` and `Q_P`.

    `bits` and `signed` may be traced and broadcast against each other. A signed range of one
    bit has no positive code, so that `scale_of_gradient` and `first_activation_step` divide by 0.
    """
    codes = jnp.exp2(jnp.asarray(bits, jnp.float32))
    # Signed: -2^(b-1) … 2^(b-1) - 1; unsigned: 0 … 2^b - 1.
    lower = jnp.where(signed, -codes / 2, 0.0)
    upper = jnp.where(signed, codes / 2 - 1, codes - 1)
    return lower, upper


def scale_of_gradient(size: int, upper: Any) -> Any:
    """What the gradient of a step is multiplied by, for a tensor of `size` elements.

    LSQ, section 2.2. As in the code of LIMPQ, the elements of activations are those of the
    whole batch; the paper counts the features of one example.
    """
    # g = 1 / sqrt(N Q_P)
    return 1.0 / jnp.sqrt(size * upper)


@jax.custom_vjp
def lsq(x: Any, step: Any, lower: Any, upper: Any, gradient_scale: Any) -> Any:
    """`x` on the grid of `step`, LSQ equations 1 and 2; differentiable in `x` and `step`.

    **Arguments:**

    - `x`: floating array of any shape; computed in float32, returned in its own type.
    - `step`: positive scalar s, clamped to `STEP_RANGE`.
    - `lower`, `upper`: the lowest and the highest code, `-Q_N <= 0 < Q_P`.
    - `gradient_scale`: g, a constant factor on the gradient of `step`.

    **Derivatives** (equations 3 and 5), with `v = x / s`:

    - by `x`: 1 where `-Q_N <= v <= Q_P`, else 0 (straight-through);
    - by `step`: g times the sum of `round(v) - v` inside, `-Q_N` below, `Q_P` above; 0 where
      the step itself lies outside of `STEP_RANGE`.

    Where ours differs: the ends of the range count as inside, as in every implementation with a
    clamp; the equations count them as outside. It matters at 0 of an unsigned range alone.
    """
    del gradient_scale
    s = jnp.clip(step, *STEP_RANGE)
    # x_hat = s round(clip(x / s, -Q_N, Q_P)); ties go to the even code.
    codes = jnp.round(jnp.clip(x.astype(jnp.float32) / s, lower, upper))
    return (codes * s).astype(x.dtype)


def _forward(x: Any, step: Any, lower: Any, upper: Any, gradient_scale: Any) -> tuple[Any, Any]:
    saved = (x, jnp.asarray(step), lower, upper, gradient_scale)
    return lsq(x, step, lower, upper, gradient_scale), saved


def _backward(saved: Any, cotangent: Any) -> tuple[Any, ...]:
    x, step, lower, upper, scale = saved
    s = jnp.clip(step, *STEP_RANGE)
    v = x.astype(jnp.float32) / s
    clipped = jnp.clip(v, lower, upper)
    inside = v == clipped
    # d x_hat / d x: straight through the rounding, nothing through the clip.
    by_x = jnp.where(inside, cotangent, 0)
    # d x_hat / d s: round(v) - v inside; the clipped code, which is whole, outside.
    change = jnp.round(clipped) - jnp.where(inside, v, 0.0)
    by_step = jnp.sum(cotangent.astype(jnp.float32) * change) * scale
    by_step = jnp.where(s == step, by_step, 0.0)  # a clamp hands nothing on from beyond its ends
    constants = (jnp.zeros_like(jnp.asarray(c, jnp.float32)) for c in (lower, upper, scale))
    return (by_x.astype(x.dtype), by_step.astype(step.dtype), *constants)


lsq.defvjp(_forward, _backward)


def first_weight_step(weight: Any, bits: Any) -> Any:
    """The step that covers three standard deviations of a weight (LIMPQ, published code)."""
    weight = weight.astype(jnp.float32)
    mean = jnp.mean(weight)
    # The sample deviation, with N - 1; a weight with one element has none.
    spread = jnp.std(weight, ddof=1) if weight.size > 1 else 0.0
    # s = max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1)
    reach = jnp.maximum(jnp.abs(mean - 3 * spread), jnp.abs(mean + 3 * spread))
    return reach / jnp.exp2(jnp.asarray(bits, jnp.float32) - 1)


def first_activation_step(x: Any, upper: Any) -> Any:
    """LSQ's first step for activations (section 2.1), from one batch."""
    # s = 2 <|x|> / sqrt(Q_P)
    return 2 * jnp.mean(jnp.abs(x.astype(jnp.float32))) / jnp.sqrt(upper)
