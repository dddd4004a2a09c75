"""Networks on several devices: the same scores, the work really split, and what is asked for."""

import numpy as np
import pytest
import several_devices
from commandline import here
from several_devices import LAYOUTS

import proxyq
from proxyq.devices import Devices, current, on_devices, several
from proxyq.engine import Engine
from proxyq.errors import ProxyqError, UsageError
from proxyq.testing import branched_network


@pytest.fixture(scope="module")
def found():
    return several_devices.run("same_batches", "placed", "kernels_from_images", "kept", "asked")


def relative(found, wanted):
    """The largest relative difference of one number."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return np.max(np.abs(found - wanted) / np.maximum(np.abs(wanted), 1e-300))


def of_largest(found, wanted):
    """The largest difference, relative to the largest number."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    return np.max(np.abs(found - wanted)) / np.max(np.abs(wanted))


def tables(scores):
    return [table for table in (scores["values"], scores["coupling"]) if table is not None]


def check(others, alone, difference, most=1e-6):
    for name, scores in alone.items():
        for number, other in enumerate(others):
            for found, wanted in zip(tables(other[name]), tables(scores), strict=True):
                assert difference(found, wanted) <= most, (name, number)


def test_as_many_images_on_each_device_give_the_same_scores(found):
    """13 images, four at a time on each of 1, 2 and 4 devices, or alternatives on 4."""
    found = found["same_batches"]
    assert found["sizes"] == [4, 8, 16]
    alone, *others = found["images"]
    check(others, alone, relative)
    alone, *others = found["sweeps"]
    assert [one["clado"]["devices"] for one in found["sweeps"]] == [None, 2, 4]
    # The logits have the same bits; what is left is the order of sums in float64.
    check(others, alone, relative, most=1e-9)


@pytest.mark.slow
def test_other_networks_on_several_devices():
    for found in several_devices.run("other_networks")["other_networks"].values():
        alone, *others = found["same"]
        check(others, alone, relative)
        # Left to itself a single device takes more images at once, and rounds differently: of
        # choices that change next to nothing, such as eight bits, that is more than a millionth.
        alone, *others = found["default"]
        check(others, alone, of_largest)


def test_the_work_is_split(found):
    found = found["placed"]
    batch = found["batch"]
    assert batch == {
        "shape": [16, 4, 4, 2],
        "parts": [[4, 4, 4, 2]] * 4,
        "different": 4,
        "count": several_devices.IMAGES,
    }
    for tensor in found["states"]:
        assert tensor["shape"][0] == 16 and tensor["different"] == 4, tensor
        assert {part[0] for part in tensor["parts"]} == {4}, tensor
    for weight in found["weights"]:  # every device has all of them
        assert weight["parts"] == [weight["shape"]] * 4 and weight["different"] == 1
    # A tap has the real images alone; which are no longer evenly split.
    assert found["tap"]["shape"][0] == several_devices.IMAGES
    # What a device runs is a convolution of its own four images.
    assert found["convolutions"] and all(
        shape.split(",")[0] == "4" for shape in found["convolutions"]
    )
    assert found["alternatives"]["shape"][0] == 4
    assert {part[0] for part in found["alternatives"]["parts"]} == {1}
    assert found["alternatives"]["different"] == 4


def test_images_that_make_kernels_stay_together(found):
    found = found["kernels_from_images"]
    assert found["splits"] == [[1, 1], [1, 4]]
    np.testing.assert_allclose(*found["logits"], rtol=1e-5, atol=1e-5)


def test_the_cache_does_not_know_how_many_devices_there_were(found):
    first, second = found["kept"]
    assert first["cached"] == [] and second["cached"] == ["from the cache: params"]
    # Provenance tells of this run, a score's notes of the run that computed it.
    assert (first["devices"], second["devices"]) == (4, None)
    assert (first["notes"], second["notes"]) == (4, 4)
    # What is counted in batches goes on with as many devices as it began with.
    assert first["unfinished"] == ["key-4", "key"] and second["unfinished"] == ["key", "key"]


# -- what is asked for -----------------------------------------------------------------


def test_one_device_of_cpu_is_the_default():
    import jax

    assert current() == Devices() and several() is None
    with on_devices(1):
        assert current() == Devices()
    with on_devices(jax.local_devices()[:1]):
        assert current().count == 1 and current().label == ""
        engine = Engine.build(branched_network(), 3)
        assert engine.placement.images == 1
        assert engine.weight(0).sharding.device_set == set(jax.local_devices()[:1])
    assert current() == Devices()
    assert Devices(devices=(1, 2, 3, 4), alternatives=2).label == "4x2"
    assert len(LAYOUTS) == 5 and proxyq.on_devices is on_devices


@pytest.mark.parametrize("which", [0, -1, True, 1.5, "many", [], [1], None])
def test_devices_that_make_no_sense(which):
    with pytest.raises(UsageError, match="the devices must be"), on_devices(which):
        pass


def test_more_devices_than_there_are():
    with pytest.raises(ProxyqError, match="64 devices were asked for, and JAX finds 1"):
        on_devices(64).__enter__()
    for alternatives in (0, 2, 1.0):
        with pytest.raises(UsageError, match="`alternatives` must"):
            on_devices(1, alternatives=alternatives).__enter__()


@pytest.mark.parametrize(
    ("number", "code", "text"),
    [("0", 2, "--devices must be"), ("two", 2, "--devices must be"), ("64", 1, "JAX finds 1")],
)
def test_devices_on_the_command_line(number, code, text):
    done = here("score", "--proxy", "params", "--devices", number)
    assert done.code == code and text in done.err and done.err.count("\n") == 1


def test_a_number_of_devices_and_all_on_the_command_line(found):
    assert found["asked"] == {"None": 1, "1": 1, "3": 3, "all": 4}
