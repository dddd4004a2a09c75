"""The depthwise lowering equals XLA's convolution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from proxyq.model.lowering import depthwise, is_depthwise

CASES = list(
    itertools.product(
        [("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC"), ("NHWC", "OIHW", "NCHW")],
        [(1, 1), (2, 2), (2, 1)],
        [(1, 1), (2, 1)],
        [((1, 1), (1, 1)), ((0, 0), (3, 2)), ((2, -1), (0, 1))],
        [(3, 3), (1, 5)],
    )
)


# Every fifth: five shares no factor with the numbers of choices, so each choice meets each other.
@pytest.mark.parametrize(("spec", "stride", "dilation", "padding", "window"), CASES[::5])
def test_depthwise_equals_xla(spec, stride, dilation, padding, window):
    rng = np.random.default_rng(0)
    sizes = {"N": 2, "C": 6, "H": 11, "W": 9}
    kernel_sizes = {"O": 6, "I": 1, "H": window[0], "W": window[1]}
    image = rng.normal(size=[sizes[axis] for axis in spec[0]]).astype(np.float32)
    kernel = rng.normal(size=[kernel_sizes[axis] for axis in spec[1]]).astype(np.float32)

    def convolve(x, w):
        return lax.conv_general_dilated(
            x, w, stride, padding, rhs_dilation=dilation, dimension_numbers=spec,
            feature_group_count=6,
        )  # fmt: skip

    eqn = jax.make_jaxpr(convolve)(image, kernel).eqns[0]
    assert is_depthwise(eqn)
    np.testing.assert_allclose(
        depthwise(eqn, jnp.asarray(image), jnp.asarray(kernel)), convolve(image, kernel), atol=2e-5
    )


def test_dense_and_multiplier_convolutions_are_left_alone():
    def convolve(groups, outputs):
        x, w = jnp.ones((1, 4, 5, 5)), jnp.ones((outputs, 4 // groups, 3, 3))
        return jax.make_jaxpr(
            lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=groups)
        )(x, w).eqns[0]

    assert not is_depthwise(convolve(1, 4))
    assert not is_depthwise(convolve(2, 4))
    assert not is_depthwise(convolve(4, 8))
    assert is_depthwise(convolve(4, 4))
