"""Data: every source, preprocessing against naive versions, sentences for what goes wrong."""

import importlib.util
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from proxyq.data import (
    Data,
    LazyImages,
    balanced_order,
    batches,
    check_fits,
    check_labels,
    load_data,
    model_batches,
    model_inputs,
    prepare,
    sample,
)
from proxyq.data.hub import from_table
from proxyq.data.preprocess import resize
from proxyq.errors import MissingExtra, ProxyqError, UsageError
from proxyq.model.digits import digits_images, load_digits
from proxyq.model.function_import import from_function
from proxyq.model.model import Preprocessing

RNG = np.random.default_rng(0)


def pictures(n, height=8, width=8, channels=3):
    return RNG.integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def network(shape, layout="NHWC", **preprocessing):
    """A function of images of `shape`, for what it says about its inputs."""
    return from_function(
        lambda params, x: x.reshape(len(x), -1)[:, :1] * params["w"],
        {"w": jnp.ones(1)},
        shape,
        name="net",
        image_layout=layout,
        preprocessing=Preprocessing(**preprocessing),
    )


# Data ------------------------------------------------------------------------------------


def test_data_cuts():
    labels = np.array([0, 0, 0, 1, 1, 2])
    data = Data(name="mine", images=pictures(6), labels=labels)
    assert len(data) == 6 and data.classes == 3
    assert repr(data) == "Data('mine', 6 images 8×8×3, 3 classes)"
    np.testing.assert_array_equal(data.take(2).images, data.images[:2])
    assert len(data.take(100)) == 6
    np.testing.assert_array_equal(data.subset([4, 0]).labels, [1, 0])
    np.testing.assert_array_equal(data.subset(slice(None, None, 2)).labels, [0, 0, 1])
    np.testing.assert_array_equal(data.subset(labels == 1).images, data.images[3:5])
    first, rest = data.split(3)
    np.testing.assert_array_equal(first.labels, [0, 1, 2])
    assert len(rest) == 3
    joined = {image.tobytes() for part in (first, rest) for image in part.images}
    assert joined == {image.tobytes() for image in data.images}
    with pytest.raises(UsageError, match="`n` must be between 1 and 5"):
        data.split(6)
    with pytest.raises(UsageError, match="has no image 9"):
        data.subset([9])
    with pytest.raises(UsageError, match="mask has shape"):
        data.subset(np.ones(4, bool))
    with pytest.raises(UsageError, match="at least 1"):
        data.take(0)


def test_data_types():
    assert Data(name="d", images=np.ones((2, 8, 8), bool)).images.max() == 255
    assert Data(name="d", images=np.full((2, 8, 8), 9, np.int32)).images.dtype == np.uint8
    assert Data(name="d", images=np.zeros((2, 8, 8, 1))).images.dtype == np.float32
    column = Data(name="d", images=pictures(2), labels=np.array([[3], [1]], np.uint8))
    np.testing.assert_array_equal(column.labels, [3, 1])
    assert Data(name="d", images=pictures(2)).classes is None
    named = Data(name="d", images=pictures(2), labels=[0, 0], class_names=("cat", "dog"))
    assert named.classes == 2


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), None, "holds no images"),
        (np.zeros((2, 8, 8, 5), np.uint8), None, "1, 3 or 4 channels"),
        (np.zeros((2, 0, 8, 3), np.uint8), None, "are empty"),
        (np.zeros(5, np.uint8), None, "must have shape"),
        (np.full((2, 8, 8), 300), None, "integers from 300 to 300"),
        (np.full((2, 8, 8), np.nan), None, "NaN"),
        (np.full((2, 8, 8), "a"), None, "must be uint8 or float"),
        (np.zeros((2, 8, 8), np.uint8), [1, 2, 3], "has 2 images but 3 labels"),
        (np.zeros((2, 8, 8), np.uint8), [0.5, 1.0], "one integer for each image"),
        (np.zeros((2, 8, 8), np.uint8), np.eye(2, dtype=int), "one integer for each image"),
        (np.zeros((2, 8, 8), np.uint8), [-1, 0], "count from 0"),
    ],
)
def test_data_refuses(images, labels, message):
    with pytest.raises(ProxyqError, match=message):
        Data(name="d", images=images, labels=labels)


def test_digest_sees_pixels_and_labels_but_not_names():
    images = pictures(3)
    data = Data(name="a", images=images, labels=[0, 1, 2])
    assert data.digest() == Data(name="b", images=images.copy(), labels=[0, 1, 2]).digest()
    other = images.copy()
    other[1, 2, 3, 0] ^= 1
    assert data.digest() != Data(name="a", images=other, labels=[0, 1, 2]).digest()
    assert data.digest() != Data(name="a", images=images, labels=[0, 1, 1]).digest()
    assert data.digest() != Data(name="a", images=images).digest()
    assert data.identity == {"name": "a", "images": 3, "digest": data.digest()}


def naive_balanced(labels):
    """Classes in order of appearance, taking turns, as a loop."""
    queues: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        queues.setdefault(label, []).append(index)
    order = []
    while any(queues.values()):
        for queue in queues.values():
            if queue:
                order.append(queue.pop(0))
    return order


def test_balanced_order():
    for seed in range(5):
        labels = np.random.default_rng(seed).integers(0, 5, 40)
        assert balanced_order(labels).tolist() == naive_balanced(labels)
        drawn = balanced_order(labels, seed=seed)
        assert sorted(drawn) == list(range(40))
        counts = np.bincount(labels, minlength=5)
        for n in range(1, 41):
            taken = np.bincount(labels[drawn[:n]], minlength=5)
            assert (taken == np.minimum(counts, taken.max())).sum() >= 1
            short = taken < taken.max() - 1
            assert (taken[short] == counts[short]).all()  # a class lags only when it ran out
    alternating = np.arange(30) % 10
    np.testing.assert_array_equal(balanced_order(alternating), np.arange(30))


def test_sample():
    labels = np.repeat(np.arange(3), 10)  # sorted by class: the leading slice is one class
    data = Data(name="d", images=pictures(30), labels=labels)
    assert np.bincount(sample(data, 9).labels).tolist() == [3, 3, 3]
    one, same, other = sample(data, 9, 1), sample(data, 9, 1), sample(data, 9, 2)
    assert one.digest() == same.digest() != other.digest()
    assert np.bincount(one.labels).tolist() == [3, 3, 3]
    assert len(sample(data, 99)) == 30
    plain = Data(name="d", images=pictures(30))
    np.testing.assert_array_equal(sample(plain, 4).images, plain.images[:4])
    assert sample(plain, 4, 0).digest() == sample(plain, 4, 0).digest()
    with pytest.raises(UsageError, match="at least 1"):
        sample(data, 0)


def test_check_labels():
    data = Data(name="d", images=pictures(2), labels=[0, 9])
    check_labels(data, 10)
    with pytest.raises(UsageError, match="labels up to 9, but the network tells only 5"):
        check_labels(data, 5)
    with pytest.raises(UsageError, match="has no labels"):
        check_labels(Data(name="d", images=pictures(2)), 5)


# Preprocessing ---------------------------------------------------------------------------


def naive(image, how, layout):
    """One image by Pillow and float64."""
    image = Image.fromarray(image.squeeze())
    if how.resize is not None:
        width, height = image.size
        short = min(width, height)
        scale = [int(how.resize * side / short) for side in (width, height)]
        image = image.resize(scale, Image.Resampling.BILINEAR)
    if how.size is not None:
        left = round((image.width - how.size[1]) / 2)
        top = round((image.height - how.size[0]) / 2)
        image = image.crop((left, top, left + how.size[1], top + how.size[0]))
    x = np.asarray(image, np.float64).reshape(image.height, image.width, -1)
    x = (x / 255 - np.array(how.mean)) / np.array(how.std)
    return x.transpose(2, 0, 1) if layout == "NCHW" else x


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"mean": (0.4,), "std": (0.2,)},
        {"resize": 12},
        {"resize": 7, "size": (7, 5)},
        {"size": (9, 6)},
        {"resize": 24, "size": (24, 24), "mean": (0.5,), "std": (0.25,)},
    ],
)
def test_preprocessing_is_the_naive_one(how, channels, layout):
    how = Preprocessing(**how)
    images = pictures(3, 10, 17, channels)
    out = prepare(Data(name="d", images=images), how, layout)
    assert out.dtype == np.float32 and out.flags.c_contiguous
    expected = np.stack([naive(image, how, layout) for image in images])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    lazy = LazyImages((0, 1, 2), lambda i: images[i], lambda i: images[i].tobytes())
    np.testing.assert_array_equal(prepare(Data(name="d", images=lazy), how, layout), out)


def test_mean_per_channel_and_float_images():
    how = Preprocessing(mean=(0.1, 0.2, 0.3), std=(1, 2, 4))
    images = pictures(2)
    out = prepare(Data(name="d", images=images), how, "NHWC")
    expected = (images.astype(np.float32) / 255 - np.float32([0.1, 0.2, 0.3])) / [1, 2, 4]
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    floats = Data(name="d", images=images.astype(np.float32) / 255)
    np.testing.assert_array_equal(prepare(floats, how, "NHWC"), out)
    # The caller's array must not be normalised in place.
    assert floats.images.max() <= 1 and floats.images.min() >= 0
    smooth = prepare(floats, Preprocessing(resize=4), "NHWC")
    np.testing.assert_allclose(
        smooth, prepare(Data(name="d", images=images), Preprocessing(resize=4), "NHWC"), atol=3e-3
    )
    normalised = Data(name="d", images=RNG.normal(size=(2, 8, 8, 3)))
    np.testing.assert_array_equal(prepare(normalised, Preprocessing(), "NHWC"), normalised.images)
    with pytest.raises(UsageError, match="must lie between 0 and 1"):
        prepare(normalised, how, "NHWC")
    with pytest.raises(UsageError, match="`mean` has 3 values, but the images have 1 channel:"):
        prepare(Data(name="d", images=pictures(2, channels=1)), how, "NHWC")


def test_resize_keeps_planes_apart():
    image = pictures(1, 9, 6, 4)[0]
    out = resize(image, (5, 7))
    assert out.shape == (5, 7, 4)
    for channel in range(4):
        plane = Image.fromarray(image[..., channel]).resize((7, 5), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(out[..., channel], np.asarray(plane))


def test_batches_are_full_and_masked():
    data = Data(name="d", images=pictures(7), labels=np.arange(7))
    got = list(batches(data, Preprocessing(), "NCHW", 3))
    assert [batch.size for batch in got] == [3, 3, 1]
    assert all(batch.inputs.shape == (3, 3, 8, 8) for batch in got)
    assert all(batch.mask.shape == batch.labels.shape == (3,) for batch in got)
    whole = prepare(data, Preprocessing(), "NCHW")
    np.testing.assert_array_equal(np.concatenate([b.inputs[b.mask] for b in got]), whole)
    np.testing.assert_array_equal(np.concatenate([b.labels[b.mask] for b in got]), np.arange(7))
    (only,) = batches(Data(name="d", images=pictures(2)), Preprocessing(), "NHWC", 5)
    assert only.inputs.shape == (5, 8, 8, 3) and only.size == 2 and only.labels is None
    np.testing.assert_array_equal(only.inputs[4], only.inputs[0])
    with pytest.raises(UsageError, match="`batch_size`"):
        batches(data, Preprocessing(), "NHWC", 0)
    with pytest.raises(UsageError, match="`layout` must be"):
        batches(data, Preprocessing(), None, 2)


def test_check_fits():
    data = Data(name="mine", images=pictures(2))
    check_fits(data, network((8, 8, 3)))
    check_fits(data, network((3, 8, 8), "NCHW"))
    check_fits(data, network((4, 4, 3), resize=6, size=(4, 4)))
    with pytest.raises(
        UsageError, match=r"of 'mine' are 8×8 but the network 'net' takes 16×16: give `--size 16`"
    ):
        check_fits(data, network((16, 16, 3)))
    with pytest.raises(UsageError, match=r"are 5×5 \(from 8×8\)"):
        check_fits(data, network((16, 16, 3), resize=5))
    with pytest.raises(UsageError, match="have 3 channels but the network 'net' takes 1"):
        check_fits(data, network((8, 8, 1)))
    with pytest.raises(UsageError, match="which are no images"):
        check_fits(data, network((8,)))
    with pytest.raises(UsageError, match="`std` has 2 values"):
        check_fits(data, network((8, 8, 3), std=(1.0, 2.0)))
    with pytest.raises(UsageError, match="too small to cut out 9×9"):
        prepare(data, Preprocessing(size=(9, 9)), "NHWC")


def test_grey_images_serve_a_colour_network():
    data = Data(name="d", images=pictures(2, channels=1))
    out = model_inputs(network((3, 8, 8), "NCHW", mean=(0.0, 0.1, 0.2)), data)
    assert out.shape == (2, 3, 8, 8)
    np.testing.assert_allclose(out[:, 0] - 0.2, out[:, 2], atol=1e-6)


def test_lazy_images_of_many_sizes():
    sizes = [(8, 12, 3), (20, 10, 1), (9, 9, 3)]
    images = [RNG.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    lazy = LazyImages((0, 1, 2), lambda i: images[i], lambda i: images[i].tobytes())
    data = Data(name="d", images=lazy)
    assert repr(data) == "Data('d', 3 images, no labels)"
    out = model_inputs(network((6, 6, 3), resize=6, size=(6, 6)), data)
    assert out.shape == (3, 6, 6, 3)
    assert prepare(data, Preprocessing(resize=6, size=(6, 6)), "NHWC").shape == (3, 6, 6, 3)
    with pytest.raises(UsageError, match=r"differ in size .* give `--size`"):
        prepare(data, Preprocessing(), "NHWC")
    assert len(list(batches(data, Preprocessing(resize=6, size=(6, 6)), "NHWC", 2))) == 2


# Sources ---------------------------------------------------------------------------------


def test_digits():
    data = load_data("digits")
    assert data.name == "digits:calibration" and len(data) == 256 and data.classes == 10
    np.testing.assert_array_equal(data.images, digits_images("calibration")[0])
    assert len(load_data("digits", split="test")) == 400
    assert len(load_data("digits:validation", split="test")) == 144
    part = load_data("digits", samples=50)
    assert np.bincount(part.labels).tolist() == [5] * 10
    model = load_digits()
    check_fits(data, model)
    hits = real = 0
    for batch in model_batches(model, load_data("digits:test"), 128):
        right = np.asarray(model(batch.inputs)).argmax(-1) == batch.labels
        hits, real = hits + (right & batch.mask).sum(), real + batch.size
    assert real == 400 and hits == 396  # 99.00 %
    with pytest.raises(UsageError, match="no split 'tset': did you mean 'test'"):
        load_data("digits:tset")
    with pytest.raises(UsageError, match="must name a split"):
        load_data("digits:")


def test_random():
    data = load_data("random", shape=(8, 6, 3), samples=5, seed=3)
    assert data.images.shape == (5, 8, 6, 3) and data.labels is None
    assert data.digest() == load_data("random", shape=(8, 6, 3), samples=5, seed=3).digest()
    assert data.digest() != load_data("random", shape=(8, 6, 3), samples=5, seed=4).digest()
    with pytest.raises(UsageError, match="needs the `shape`"):
        load_data("random")


@pytest.fixture
def archive(tmp_path):
    def save(name="data.npz", **arrays):
        np.savez_compressed(tmp_path / name, **arrays)
        return str(tmp_path / name)

    return save


def test_npz_guesses(archive):
    test, train = pictures(6), pictures(9)
    file = archive(x_test=test, y_test=np.arange(6), x_train=train, y_train=np.arange(9))
    data = load_data(file)
    assert data.name == "data.npz:x_train,y_train"
    np.testing.assert_array_equal(data.images, train)
    np.testing.assert_array_equal(load_data(file, split="test").images, test)
    assert load_data(file + ":x_test").labels is None
    swapped = load_data(file + ":x_test, y_test")
    np.testing.assert_array_equal(swapped.labels, np.arange(6))

    one = load_data(archive("one.npz", images=test, labels=np.arange(6)[:, None], note=np.ones(2)))
    np.testing.assert_array_equal(one.labels, np.arange(6))
    plain = load_data(archive("plain.npz", x=test.astype(np.float64) / 255))
    assert plain.labels is None and plain.images.dtype == np.float32
    assert len(load_data(file, samples=4)) == 4


def test_npz_layouts(archive):
    colour, grey = pictures(5, 8, 6), pictures(5, 8, 6, 1)
    channels_first = colour.transpose(0, 3, 1, 2)
    for arrays in (colour, channels_first):
        np.testing.assert_array_equal(load_data(archive(x=arrays)).images, colour)
    for arrays in (grey, grey[..., 0], grey.transpose(0, 3, 1, 2)):
        np.testing.assert_array_equal(load_data(archive(x=arrays)).images, grey)
    both = archive("both.npz", x=pictures(5, 3, 8, 3))
    with pytest.raises(UsageError, match="both the second and the last"):
        load_data(both)
    assert load_data(both, layout="NCHW").images.shape == (5, 8, 3, 3)
    assert load_data(both, layout="NHWC").images.shape == (5, 3, 8, 3)
    with pytest.raises(UsageError, match="neither the second nor the last"):
        load_data(archive("none.npz", x=np.zeros((5, 8, 8, 8), np.uint8)))


def test_npz_reads_only_what_is_asked(archive, tmp_path):
    """An array of objects, which would have to be unpickled, does no harm unless asked for."""
    file = archive(x=pictures(3), y=np.arange(3), notes=np.array([{"a": 1}, None], object))
    assert len(load_data(file)) == 3
    with pytest.raises(ProxyqError, match=r"not an intact \.npz archive of plain arrays"):
        load_data(file + ":notes")


def test_npz_sentences(archive, tmp_path):
    file = archive(x_test=pictures(6), y_test=np.arange(6))
    with pytest.raises(UsageError, match="no array 'x_tset': did you mean 'x_test'"):
        load_data(file + ":x_tset")
    with pytest.raises(UsageError, match="at most one of labels"):
        load_data(file + ":a,b,c")
    with pytest.raises(UsageError, match="must name one array"):
        load_data(file + ":")
    with pytest.raises(UsageError, match="has 6 images but 4 labels"):
        load_data(archive("odd.npz", x=pictures(6), y=np.arange(4)) + ":x,y")
    odd = archive("odd.npz", x=pictures(6), y=np.arange(4))
    with pytest.raises(UsageError, match="has 6 images in 'x' but 4 labels in 'y': store one"):
        load_data(odd, split="test")
    assert load_data(odd + ":x").labels is None
    # Labels of other images, and integers that are not called labels, are no mistake.
    mixed = archive("mixed.npz", x_train=pictures(9), x_test=pictures(6), y_test=np.arange(6))
    assert load_data(mixed).labels is None and load_data(mixed, split="test").labels is not None
    assert load_data(archive("ids.npz", x=pictures(6), year=np.arange(4))).labels is None
    with pytest.raises(UsageError, match=r"several arrays may be the images .*a \(6, 8, 8, 3\)"):
        load_data(archive("two.npz", a=pictures(6), b=pictures(6)))
    with pytest.raises(UsageError, match="several arrays may be the labels"):
        load_data(archive("labels.npz", x=pictures(6), a=np.arange(6), b=np.arange(6)))
    with pytest.raises(UsageError, match="no array has the shape of the images"):
        load_data(archive("flat.npz", y=np.arange(6)))
    with pytest.raises(UsageError, match="holds no arrays"):
        load_data(archive("nothing.npz"))
    with pytest.raises(ProxyqError, match=r"cannot read the data file .*No such file"):
        load_data(str(tmp_path / "absent.npz"))
    whole = (tmp_path / "data.npz").read_bytes()
    for name, content in {
        "cut.npz": whole[: len(whole) // 2],
        "empty.npz": b"",
        "text.npz": b"not an archive",
        "rotten.npz": whole[:200] + bytes(64) + whole[264:],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ProxyqError, match=r"not an intact \.npz archive"):
            load_data(str(tmp_path / name))


@pytest.fixture
def folder(tmp_path):
    """Two classes, three and two images of different sizes and modes."""
    for index, (name, mode, size) in enumerate(
        [
            ("cat/a.png", "RGB", (8, 8)),
            ("cat/b.jpg", "L", (10, 8)),
            ("cat/deep/c.png", "P", (8, 9)),
            ("dog/a.png", "RGBA", (12, 8)),
            ("dog/b.PNG", "I;16", (8, 8)),
        ]
    ):
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if mode == "I;16":
            image = Image.fromarray(np.full((8, 8), 51 << 8, np.uint16))
        else:
            image = Image.fromarray(np.full((size[1], size[0], 3), 40 * index, np.uint8))
            image = image.convert(mode)
        image.save(path)
    (tmp_path / "pets" / "cat" / "readme.txt").write_text("no image")
    (tmp_path / "pets" / ".hidden").mkdir()
    return tmp_path / "pets"


def test_folder(folder, monkeypatch):
    data = load_data(f"dir:{folder}")
    assert data.name == "dir:pets" and data.class_names == ("cat", "dog") and len(data) == 5
    assert data.labels.tolist() == [0, 1, 0, 1, 0]  # the classes take turns
    assert data.images[3].shape == (8, 8, 1) and data.images[3].max() == 51  # 16-bit grey
    out = model_inputs(network((8, 8, 3), resize=8, size=(8, 8)), data)
    assert out.shape == (5, 8, 8, 3)
    np.testing.assert_allclose(out[1], 120 / 255, atol=1e-6)  # dog/a.png
    same = load_data(f"dir:{folder}")
    assert data.digest() == same.digest() != data.take(4).digest()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "dog" / "a.png")
    assert load_data(f"dir:{folder}").digest() != data.digest()

    decoded = []
    from proxyq.data import folder as module

    monkeypatch.setattr(module, "read_image", lambda file: decoded.append(file))
    few = load_data(f"dir:{folder}", samples=2)
    assert few.labels.tolist() == [0, 1] and decoded == []


def test_folder_without_classes_and_with_splits(folder, tmp_path):
    flat = load_data(f"dir:{folder / 'dog'}")
    assert flat.labels is None and len(flat) == 2
    (tmp_path / "set").mkdir()
    folder.rename(tmp_path / "set" / "train")
    assert len(load_data(f"dir:{tmp_path / 'set'}")) == 5
    with pytest.raises(UsageError, match="none of them for test"):
        load_data(f"dir:{tmp_path / 'set'}", split="test")


def test_folder_sentences(folder, tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        load_data(f"dir:{tmp_path / 'absent'}")
    with pytest.raises(UsageError, match="must have the form `dir:PATH`"):
        load_data("dir:")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        load_data(f"dir:{tmp_path / 'bare'}")
    good = (folder / "cat" / "a.png").read_bytes()
    (folder / "stray.png").write_bytes(good)
    with pytest.raises(UsageError, match="both directly and in sub-folders"):
        load_data(f"dir:{folder}")
    (folder / "stray.png").unlink()
    (folder / "cat" / "a.png").write_bytes(good[: len(good) // 2])
    data = load_data(f"dir:{folder}")
    with pytest.raises(ProxyqError, match=r"cannot read the image .*a\.png"):
        prepare(data, Preprocessing(resize=8, size=(8, 8)), "NHWC")


def test_unknown_data(tmp_path):
    with pytest.raises(UsageError, match="unknown data 'digitz': did you mean 'digits'"):
        load_data("digitz")
    with pytest.raises(UsageError, match=r"known are digits, FILE\.npz, dir:PATH"):
        load_data("zzz")
    with pytest.raises(UsageError, match="a folder of images is `dir:"):
        load_data(str(tmp_path))
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(UsageError, match=r"reads \.npz archives"):
        load_data(str(tmp_path / "x.h5"))
    with pytest.raises(UsageError, match="unknown split 'tests'"):
        load_data("digits", split="tests")
    with pytest.raises(UsageError, match="arrays go into `Data"):
        load_data(pictures(2))
    with pytest.raises(UsageError, match="`samples`"):
        load_data("digits", samples=0)


# Optional sources ------------------------------------------------------------------------


def fake_torchvision(monkeypatch, **kinds):
    """torchvision with our own data sets: the real ones want files that nobody may ship."""
    from proxyq.model import torch_import

    module = types.SimpleNamespace(datasets=types.SimpleNamespace(**kinds))
    monkeypatch.setattr(torch_import, "import_torchvision", lambda: module)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name == "torchvision" or found(name)
    )


class InMemory:
    """Like CIFAR: bytes and labels in memory, `train`, download."""

    asked: list = []  # noqa: RUF012

    def __init__(self, root, train=True, download=False):
        self.asked.append((root, train, download))
        if not download and "full" not in root:
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        if download and "offline" in root:
            raise OSError("<urlopen error>")
        print("talkative")
        self.data = np.full((4, 6, 8, 3), 1 if train else 2, np.uint8)
        self.targets = [0, 1, 0, 1]
        self.classes = ["cat", "dog"]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        return Image.fromarray(self.data[index]), self.targets[index]


def test_torchvision_in_memory(monkeypatch, capsys):
    pytest.importorskip("torch")
    fake_torchvision(monkeypatch, CIFAR10=InMemory)
    InMemory.asked.clear()
    data = load_data("torchvision:CIFAR10@/full")
    assert data.name == "torchvision:CIFAR10" and data.class_names == ("cat", "dog")
    assert data.images.shape == (4, 6, 8, 3) and data.images.max() == 1
    assert load_data("torchvision:CIFAR10@/full", split="test").images.max() == 2
    assert InMemory.asked == [("/full", True, False), ("/full", False, False)]
    InMemory.asked.clear()
    load_data("torchvision:CIFAR10@/elsewhere")  # files missing: a download is tried
    assert InMemory.asked[-1] == ("/elsewhere", True, True)
    with pytest.raises(ProxyqError, match=r"is not in '/offline' and cannot be downloaded"):
        load_data("torchvision:CIFAR10@/offline")
    with pytest.raises(UsageError, match="no data set 'CIFAR': did you mean 'CIFAR10'"):
        load_data("torchvision:CIFAR@/full")
    with pytest.raises(UsageError, match="the form `torchvision:NAME@ROOT`"):
        load_data("torchvision:CIFAR10")
    assert capsys.readouterr().out == ""  # standard output belongs to results


def test_torchvision_other_forms(monkeypatch, folder):
    pytest.importorskip("torch")

    class ChannelsFirst(InMemory):
        def __init__(self, root, split="train"):
            if split not in ("train", "val"):
                raise ValueError(f"Unknown value '{split}' for argument split.")
            self.data = np.arange(2 * 3 * 6 * 8, dtype=np.uint8).reshape(2, 3, 6, 8)
            self.labels = np.array([1, 0])

        def __getitem__(self, index):
            return Image.fromarray(self.data[index].transpose(1, 2, 0)), int(self.labels[index])

    class Files(InMemory):
        def __init__(self, root):
            files = sorted((folder / "cat").glob("*.*"))
            self.samples = [(str(f), 1) for f in files if f.suffix != ".txt"]

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, index):
            with Image.open(self.samples[index][0]) as image:
                return image.convert("RGB"), self.samples[index][1]

    class Computed(InMemory):
        def __init__(self):
            pass

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return Image.fromarray(np.full((4, 4), index, np.uint8)), index

    class Detection(Computed):
        def __getitem__(self, index):
            return Image.fromarray(np.zeros((4, 4), np.uint8)), {"boxes": []}

    fake_torchvision(
        monkeypatch, SVHN=ChannelsFirst, Files=Files, Computed=Computed, Detection=Detection
    )
    first = load_data("torchvision:SVHN@.", split="test")
    assert first.images.shape == (2, 6, 8, 3) and first.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(first.images[0, ..., 2].ravel()[:3], [96, 97, 98])
    files = load_data("torchvision:Files@.")
    assert files.labels.tolist() == [1, 1] and files.images[0].shape == (8, 8, 3)
    computed = load_data("torchvision:Computed@.")
    assert computed.labels.tolist() == [0, 1, 2] and computed.images[2].max() == 2
    assert computed.digest() == load_data("torchvision:Computed@.").digest()
    with pytest.raises(UsageError, match="not one image and one class each"):
        load_data("torchvision:Detection@.")


def test_torchvision_absent(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'proxyq\[torch\]'"):
        load_data("torchvision:CIFAR10@/full")


class Feature(types.SimpleNamespace):
    """Stands for a column type of the package `datasets`, which tells its kind by its class."""


class Table:
    """What we use of `datasets.Dataset`."""

    def __init__(self, columns, **features):
        kinds = {"Image": {}, "ClassLabel": {"names": ["cat", "dog"]}, "Value": {"dtype": "int64"}}
        self.features = {
            key: type(kind, (Feature,), {})(**kinds[kind]) for key, kind in features.items()
        }
        self.columns = columns
        self._fingerprint = "abc"

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: column[key] for name, column in self.columns.items()}


def test_hub_columns():
    pillows = [Image.fromarray(image) for image in pictures(3)]
    table = Table(
        {"img": pillows, "coarse": [0, 0, 0], "label": [0, 1, 1]},
        img="Image",
        coarse="ClassLabel",
        label="ClassLabel",
    )
    data = from_table(table, name="hf:x")
    assert data.labels.tolist() == [0, 1, 1] and data.class_names == ("cat", "dog")
    np.testing.assert_array_equal(data.images[1], np.asarray(pillows[1]))
    assert data.digest() == from_table(table, name="hf:y").digest() != data.take(2).digest()
    integers = Table({"img": pillows, "label": [0, 1, 5]}, img="Image", label="Value")
    assert from_table(integers, name="d").classes == 6
    untold = Table({"img": pillows, "label": [-1, -1, -1]}, img="Image", label="ClassLabel")
    assert from_table(untold, name="d").labels is None
    assert from_table(Table({"img": pillows}, img="Image"), name="d").labels is None
    with pytest.raises(UsageError, match="no column of images among label"):
        from_table(Table({"label": [1]}, label="ClassLabel"), name="d")
    with pytest.raises(UsageError, match=r"several columns of classes \(a, b\)"):
        from_table(Table({"i": pillows}, i="Image", a="ClassLabel", b="ClassLabel"), name="d")


def test_hub(monkeypatch):
    table = Table({"img": [Image.fromarray(pictures(1)[0])]}, img="Image")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return table

    def get_dataset_split_names(name):
        if name == "absent":
            raise ConnectionError("Couldn't reach the hub\nsecond line")
        return ["train", "test"]

    module = types.SimpleNamespace(
        load_dataset=load_dataset, get_dataset_split_names=get_dataset_split_names
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert len(load_data("hf:me/pets")) == 1
    load_data("hf:me/pets", split="validation")
    load_data("hf:me/pets@test")
    assert asked == [("me/pets", "train"), ("me/pets", "test"), ("me/pets", "test")]
    with pytest.raises(UsageError, match="no part 'tset': did you mean 'test'"):
        load_data("hf:me/pets@tset")
    with pytest.raises(ProxyqError, match=r"cannot load .* \(Couldn't reach the hub\)"):
        load_data("hf:absent")
    with pytest.raises(UsageError, match="the form `hf:ID`"):
        load_data("hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'proxyq\[hf\]'"):
        load_data("hf:me/pets")


@pytest.mark.data
def test_cifar(cifar):
    data = load_data(str(cifar / "cifar10.npz"), split="test")
    assert data.name == "cifar10.npz:x_test,y_test" and len(data) == 10_000
    few = load_data(str(cifar / "cifar10.npz"), split="test", samples=1005)
    np.testing.assert_array_equal(few.images, data.images[:1005])  # the leading slice
    how = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    out = prepare(few, how, "NCHW")
    x = few.images.astype(np.float32) / 255
    x = (x - np.float32(how.mean)) / np.float32(how.std)
    np.testing.assert_array_equal(out, x.transpose(0, 3, 1, 2))
