"""Ranges of what layers read: each method against a plain one, and layers that read nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
from networks import small_net
from test_reconstruct import images, plan_of

from proxyq.api import quantize_model
from proxyq.engine import Engine
from proxyq.engine.ranges import activation_grids
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.function_import import from_function


def ends(grid):
    """The least and the greatest value of a grid."""
    low, high = ((code - grid.zero) * grid.scale for code in (grid.lower, grid.upper))
    return float(low), float(high)


def grid_of(engine, x, method, bits=8):
    return activation_grids(engine, {"stem": bits}, {}, x, method=method).inputs[0]


@pytest.fixture(scope="module")
def stem():
    """The first layer reads the images themselves."""
    model = small_net()
    x = images(model, 80)
    x[3, 0, 0, 0], x[4, 0, 0, 0] = 40.0, -40.0  # outliers
    return model, x


def test_min_max_covers_all_and_percentile_leaves_a_thousandth_out(stem):
    model, x = stem
    engine = Engine.build(model, len(x))
    low, high = ends(grid_of(engine, x, "min-max"))
    step = 80 / 255
    assert low == pytest.approx(-40.0, abs=step) and high == pytest.approx(40.0, abs=step)
    low, high = ends(grid_of(engine, x, "percentile"))
    assert high == pytest.approx(np.percentile(x, 99.9), rel=0.05)
    assert low == pytest.approx(np.percentile(x, 0.1), rel=0.05)


def test_mse_has_less_error_than_the_others(stem):
    model, x = stem
    engine = Engine.build(model, len(x))

    def error(method):
        grid = grid_of(engine, x, method, bits=4)
        codes = np.clip(np.round(x / grid.scale + grid.zero), grid.lower, grid.upper)
        return float((((codes - grid.zero) * grid.scale - x) ** 2).mean())

    # Ends are tried in steps, so that another range may be better by a little.
    others = [error(method) for method in ("min-max", "percentile", "moving-average")]
    assert error("mse") < 1.05 * min(others) and error("mse") < 0.2 * max(others)


@pytest.mark.parametrize("batch_size", [80, 16, 7])
def test_a_moving_average_is_of_batches_of_32_images(stem, batch_size):
    model, x = stem
    average = None
    for start in (0, 32, 64):
        part = x[start : start + 32]
        new = np.array([part.min(), part.max()], np.float64)
        average = new if average is None else average + 0.1 * (new - average)
    low, high = ends(grid_of(Engine.build(model, 80, batch_size=batch_size), x, "moving-average"))
    step = (average[1] - average[0]) / 255
    assert low == pytest.approx(average[0], abs=step)
    assert high == pytest.approx(average[1], abs=step)


def silent():
    """A second layer that calibration never reaches: its inputs are all zero."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(4, 4)).astype(np.float32) for name in ("one", "two")}

    def apply(p, x):
        y = jnp.maximum(x @ p["one"] - 1000.0, 0)
        return y @ p["two"] + x @ p["one"]

    return from_function(apply, params, (4,), name="silent")


def test_a_layer_that_calibration_never_reaches_is_told():
    model = silent()
    x = images(model)
    with pytest.raises(ProxyqError, match="the layer 'two' reads nothing but zeros"):
        quantize_model(model, plan_of(model, 4, 8), x)
    floats = plan_of(model, 4, 8)
    left = floats.layers["two"].model_copy(update={"activation_bits": None})
    plan = floats.model_copy(update={"layers": {**floats.layers, "two": left}})
    assert np.isfinite(quantize_model(model, plan, x).logits(x)).all()
    with pytest.raises(UsageError, match="must be one of min-max, percentile, mse"):
        quantize_model(model, plan, x, activation_range="widest")  # type: ignore[arg-type]
