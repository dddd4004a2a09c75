"""The embedded network: accuracy as documented, splits apart, sensitive to few bits."""

import importlib.util
import json
from importlib.resources import files
from pathlib import Path

import jax
import numpy as np
import pytest

from proxyq.errors import UsageError
from proxyq.model.digits import SPLITS, digits_images, load_digits

FOLDER = files("proxyq.model").joinpath("digits_files")


@pytest.fixture(scope="module")
def model():
    return load_digits()


@pytest.fixture(scope="module")
def top1(model):
    """Top-1 in percent of given parameters on a split, the pixels normalised by hand."""
    apply = jax.jit(model.apply)

    def measure(params, split="test"):
        images, labels = digits_images(split)
        (mean,), (std,) = model.preprocessing.mean, model.preprocessing.std
        x = ((images / np.float32(255) - mean) / std).astype(np.float32)
        hits = np.asarray(apply(params, x)).argmax(-1) == labels
        return round(100 * float(hits.mean()), 2)

    return measure


def rounded(params, bits):
    """Every kernel rounded to a symmetric grid, one scale per output channel."""
    top = 2 ** (bits - 1) - 1

    def one(kernel):
        kernel = np.asarray(kernel)
        scale = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)), keepdims=True) / top
        return np.clip(np.round(kernel / scale), -top - 1, top) * scale

    return {name: one(v) if name.endswith("kernel") else v for name, v in params.items()}


def test_accuracy_is_the_one_documented(model, top1):
    assert top1(model.params, "test") == 99.0
    assert top1(model.params, "validation") == 99.31
    assert top1(model.params, "calibration") == 98.83
    assert json.loads(FOLDER.joinpath("digits.json").read_text())["top1"]["test"] == 99.0


def test_few_bits_hurt(model, top1):
    # Rounding at the border of a cell may differ between machines by an image.
    assert top1(rounded(model.params, 2)) == pytest.approx(12.25, abs=2)
    assert top1(rounded(model.params, 3)) == pytest.approx(98.0, abs=0.5)
    assert top1(rounded(model.params, 4)) == pytest.approx(98.75, abs=0.5)


def test_layers_names_and_state(model):
    kernels = {name: v.shape for name, v in model.params.items() if name.endswith("kernel")}
    assert len(kernels) == 12
    assert sum(int(np.prod(shape)) for shape in kernels.values()) == 35_600
    assert kernels["stem.kernel"] == (3, 3, 1, 16)
    assert kernels["blocks.2.shortcut.kernel"] == (1, 1, 16, 24)
    assert kernels["head.kernel"] == (32, 10)
    assert all(name.endswith((".mean", ".var")) for name in model.frozen)
    assert len(model.frozen) == 2 * 11
    assert model.name == "digits" and model.image_layout == "NHWC"
    assert model.input_shape == (8, 8, 1)
    assert model.batch_statistics_apply is not None


def test_splits_are_disjoint_and_balanced():
    seen = set()
    for split, size in {"calibration": 256, "validation": 144, "test": 400}.items():
        images, labels = digits_images(split)
        assert images.shape == (size, 8, 8, 1) and images.dtype == np.uint8
        assert labels.shape == (size,) and set(labels) == set(range(10))
        assert np.ptp(np.bincount(labels)) <= 2
        keys = {image.tobytes() for image in images}
        assert len(keys) == size and not keys & seen
        seen |= keys
    with pytest.raises(UsageError, match="did you mean 'test'"):
        digits_images("tests")


def test_packaged_files_are_small_and_attributed():
    names = ("digits.safetensors", "digits.npz", "digits.json", "ATTRIBUTION.json")
    assert sum(len(FOLDER.joinpath(name).read_bytes()) for name in names) < 300_000
    record = json.loads(FOLDER.joinpath("ATTRIBUTION.json").read_text())
    assert record["creators"] == ["E. Alpaydin", "C. Kaynak"]
    assert "CC BY 4.0" in record["licence"]


def test_training_images_are_not_in_the_shipped_splits():
    """The script's cut gives back the shipped images; what it trains on is apart from them."""
    pytest.importorskip("sklearn")
    path = Path(__file__).resolve().parents[1] / "scripts" / "train_digits.py"
    if not path.is_file():
        pytest.skip("the training script is not part of an installed package")
    spec = importlib.util.spec_from_file_location("train_digits", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    splits = script.make_splits(0)
    training = {image.tobytes() for image in splits["training"][0]}
    assert len(splits["training"][0]) == 997
    for split in SPLITS:
        images, labels = digits_images(split)
        np.testing.assert_array_equal(images, splits[split][0])
        np.testing.assert_array_equal(labels, splits[split][1])
        assert not training & {image.tobytes() for image in images}
