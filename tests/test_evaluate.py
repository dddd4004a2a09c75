"""Several plans on the same images: comparisons, classes, speed, and where the images are from."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import here
from PIL import Image

from proxyq import api
from proxyq.api.quantize import quantize_model
from proxyq.data import Data, load_data, model_inputs
from proxyq.errors import UsageError
from proxyq.ptq.measure import class_top1, right
from proxyq.ptq.paired import compared
from proxyq.search.allocate.plan import Plan

IMAGES = 130
NAMES = tuple(
    f"{digit}-{'zero one two three four five six seven eight nine'.split()[digit]}"
    for digit in range(10)
)


@pytest.fixture(scope="module")
def digits() -> Data:
    """Some of the digits, with names of their own."""
    data = load_data("digits", split="test").take(IMAGES)
    return Data(name="some", images=data.images, labels=data.labels, class_names=NAMES)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two plans of the embedded network, 3.5 and 6 bits on average, without correction."""
    folder = tmp_path_factory.mktemp("plans")
    for name, bits in (("small", "3.5bit"), ("large", "6bit")):
        plan = api.search(proxy="sqnr", budget=f"size={bits}", correction="none")
        plan.save(folder / f"{name}.json")
    return folder / "small.json", folder / "large.json"


@pytest.fixture(scope="module")
def evaluated(digits: Data, plans: tuple[Path, Path]) -> api.Evaluation:
    return api.evaluate(
        None, list(map(Plan.load, plans)), None, digits, names=["small", "large"], memory=2**20
    )


def test_every_image_is_kept(digits: Data, plans: tuple[Path, Path], evaluated: api.Evaluation):
    model = api.as_model()
    inputs = model_inputs(model, digits)
    hits = right(np.asarray(model(inputs)), digits.labels)
    np.testing.assert_array_equal(evaluated.float_right, hits)
    assert evaluated.float_top1 == pytest.approx(100 * hits.mean())
    for file, measured in zip(plans, evaluated.plans, strict=True):
        logits = quantize_model(model, Plan.load(file), correction="none").logits(inputs)
        np.testing.assert_array_equal(measured.right, right(logits, digits.labels))
        assert measured.top1 == pytest.approx(100 * measured.right.mean())
    assert len({one.top1 for one in evaluated.plans}) == 2


def test_comparisons(evaluated: api.Evaluation):
    result = evaluated.to_json()
    json.dumps(result, allow_nan=False)
    uniform, (small, large) = evaluated.uniform, evaluated.plans
    assert uniform is not None
    against = [result["uniform"], *result["plans"]]
    family = compared([(evaluated.float_right, one.right) for one in (uniform, small, large)])
    for record, one in zip(against, family, strict=True):
        found = record["versus_float"]
        assert (found["only_float"], found["only_plan"]) == (one.only_first, one.only_second)
        change = record["top1"] - result["float"]["top1"]
        assert found["difference"] == pytest.approx(change, abs=2e-4)
        assert found["interval"] == pytest.approx(one.interval, abs=1e-4)
        assert found["p_value"] == pytest.approx(one.p_value, rel=1e-5)
        assert found["p_holm"] == pytest.approx(one.p_holm, rel=1e-5)
    family = compared([(uniform.right, one.right) for one in (small, large)])
    found = [record["versus_uniform"] for record in result["plans"]]
    assert [one["only_uniform"] for one in found] == [one.only_first for one in family]
    assert [one["p_holm"] for one in found] == pytest.approx([one.p_holm for one in family])
    (between,) = result["comparisons"]
    assert (between["first"], between["second"]) == ("small", "large")
    assert between["only_first"] == np.sum(small.right & ~large.right)
    assert between["only_second"] == np.sum(~small.right & large.right)
    assert between["difference"] == pytest.approx(large.top1 - small.top1, abs=1e-4)


def test_classes(digits: Data, evaluated: api.Evaluation):
    records = evaluated.to_json()["classes"]
    assert [one["name"] for one in records] == list(NAMES)
    assert sum(one["n"] for one in records) == IMAGES
    for one in records:
        of_class = digits.labels == one["class"]
        assert one["n"] == of_class.sum()
        base = 100 * evaluated.float_right[of_class].mean()
        assert one["float"] == pytest.approx(base, abs=1e-4)
        for measured, record in zip(evaluated.plans, one["plans"], strict=True):
            own = 100 * measured.right[of_class].mean()
            assert record["top1"] == pytest.approx(own, abs=1e-4)
            assert record["difference"] == pytest.approx(own - base, abs=2e-4)
    # Classes without images are left out.
    found = class_top1(np.array([True, False, True]), np.array([7, 2, 2]))
    assert found.tolist() == [50.0, 100.0]


def test_speed_changes_nothing_else(
    digits: Data, plans: tuple[Path, Path], evaluated: api.Evaluation
):
    speeds = evaluated.to_json()["images_per_second"]
    assert speeds["float"] > 0 and speeds["uniform"] > 0 and min(speeds["plans"]) > 0
    again = api.evaluate(
        None, list(map(Plan.load, plans)), None, digits, names=["small", "large"], memory=2**20
    )
    one, other = evaluated.to_json(), again.to_json()
    del one["images_per_second"], other["images_per_second"]
    assert json.dumps(one) == json.dumps(other)
    # All images in one batch: what runs is compiled in it, so that nothing can be timed.
    few = api.evaluate(None, [Plan.load(plans[0])], None, digits.take(8))
    assert few.to_json()["images_per_second"] is None and few.float_images_per_second is None


def test_names_are_as_many_as_plans(digits: Data, plans: tuple[Path, Path]):
    with pytest.raises(UsageError, match="one name for each of the 2 plans, got 1"):
        api.evaluate(None, list(map(Plan.load, plans)), None, digits, names=["one"])


# -- the command, and where images are from -------------------------------------------


def without_speed(text: str) -> dict[str, Any]:
    result = json.loads(text)
    del result["images_per_second"]
    return result


@pytest.fixture(scope="module")
def folder(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as image files, a folder for each class."""
    path = tmp_path_factory.mktemp("images")
    assert digits.labels is not None
    for index, label in enumerate(digits.labels):
        place = path / NAMES[label]
        place.mkdir(exist_ok=True)
        Image.fromarray(digits.images[index][..., 0]).save(place / f"{index:03}.png")
    return path


def test_two_plans_on_an_image_folder(
    folder: Path, plans: tuple[Path, Path], evaluated: api.Evaluation
):
    words = ("evaluate", *plans, "--eval-data", f"dir:{folder}", "--memory", "1MiB")
    done = here(*words, "--json")
    assert (done.code, done.err) == (0, ""), done.err
    found, expected = without_speed(done.out), without_speed(json.dumps(evaluated.to_json()))
    for file, one, other in zip(plans, found["plans"], expected["plans"], strict=True):
        assert one["file"] == str(file)
        assert one["versus_float"] == other["versus_float"]
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-4)
    assert found["classes"] == expected["classes"]
    assert found["float"] == expected["float"]

    shown = here(*words)
    assert shown.code == 0, shown.err
    assert max(map(len, shown.out.splitlines())) <= 88
    rows = [line.split() for line in shown.out.splitlines()]
    plan = next(row for row in rows if row[:1] == ["small.json"])
    versus = found["plans"][0]["versus_float"]
    low, high = versus["interval"]
    assert plan[5:8] == [f"{versus['difference']:+.2f}", f"{low:+.2f}", f"{high:+.2f}"]
    assert ["small.json", "large.json"] in [row[:2] for row in rows]
    worst = min(found["classes"], key=lambda one: one["plans"][0]["difference"])
    assert worst["name"] in shown.out and "loses most" in shown.out
    assert "not of a runtime" in shown.out.replace("\n", " ")


def test_two_plans_on_a_hub_data_set(digits: Data, plans: tuple[Path, Path], monkeypatch):
    class Table:
        """What is used of `datasets.Dataset`."""

        def __init__(self) -> None:
            names = type("ClassLabel", (), {"names": list(NAMES)})()
            self.features = {"image": type("Image", (), {})(), "label": names}

        def __len__(self) -> int:
            return IMAGES

        def __getitem__(self, key: Any) -> Any:
            if key == "label":
                return digits.labels
            return {"image": Image.fromarray(digits.images[key][..., 0])}

    hub = types.SimpleNamespace(
        get_dataset_split_names=lambda name: ["train", "test"],
        load_dataset=lambda name, split: Table(),
    )
    monkeypatch.setitem(sys.modules, "datasets", hub)
    done = here("evaluate", *plans, "--eval-data", "hf:me/digits", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert len(found["plans"]) == 2 and len(found["comparisons"]) == 1
    assert [one["name"] for one in found["classes"]] == list(NAMES)
    assert found["float"]["n"] == IMAGES and found["float"]["top1"] > 95
