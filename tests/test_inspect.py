"""What `inspect` finds in well-known networks."""

import json

import pytest
from commandline import here


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "weights", "gmacs"),
    [
        ("resnet18", 21, 11_678_912, 1.814),
        ("mobilenet_v2", 53, 3_469_760, 0.301),
    ],
)
def test_torchvision_networks(name, layers, weights, gmacs):
    pytest.importorskip("torch")
    done = here("inspect", f"torchvision:{name}@none", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["layers"]
    assert len(found) == layers
    assert sum(layer["weights"] for layer in found.values()) == weights
    assert sum(layer["macs"] for layer in found.values()) / 1e9 == pytest.approx(gmacs, abs=5e-4)
    if name == "resnet18":
        assert found["layer1.0.conv1"]["output_shape"] == [64, 56, 56]
        assert found["layer2.0.downsample.0"]["group"] == found["layer2.0.conv2"]["group"]
    else:
        assert sum(layer["kind"] == "depthwise-conv" for layer in found.values()) == 17
