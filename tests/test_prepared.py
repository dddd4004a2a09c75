"""Data of networks that read no images: archives of tokens, text, noise, and their refusals."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from commandline import here
from flax import nnx

import proxyq
from proxyq.api.inputs import as_data
from proxyq.data.prepared import load_prepared
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.function_import import from_function


class Reader(nnx.Module):
    """Tokens `[batch, 6]` and their mask to logits."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 8, rngs=rngs)
        self.hidden = nnx.Linear(8, 16, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, ids, mask):
        x = self.hidden(self.embed(ids)) * mask[..., None]
        return self.head(nnx.relu(x).sum(1) / mask.sum(1, keepdims=True))


def reader(vocabulary=50):
    """A model with inputs by name."""
    module = Reader(nnx.Rngs(0))
    graph, state = nnx.split(module)
    params = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    params = {name: jnp.asarray(value[...]) for name, value in params.items()}

    def apply(params, inputs):
        flat = [(tuple(name.split(".")), nnx.Param(value)) for name, value in params.items()]
        whole = nnx.merge(graph, nnx.from_flat_state(flat))
        return whole(inputs["input_ids"], inputs["attention_mask"])

    model = from_function(
        apply,
        params,
        {"input_ids": (6,), "attention_mask": (6,)},
        name="reader",
        dtype=jnp.int32,
    )
    return model.replace(identity={**model.identity, "vocabulary": vocabulary})


@pytest.fixture(scope="module")
def model():
    return reader()


@pytest.fixture
def archive(tmp_path):
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 50, (40, 6)), np.ones((40, 6), np.int64)
    mask[::2, 4:] = 0
    path = tmp_path / "tokens.npz"
    np.savez(path, input_ids=ids, attention_mask=mask, labels=rng.integers(0, 4, 40))
    return path, ids, mask


def test_an_archive_goes_by_the_names_of_the_inputs(model, archive):
    path, ids, mask = archive
    data = load_prepared(str(path), model)
    np.testing.assert_array_equal(data.inputs["input_ids"], ids)
    np.testing.assert_array_equal(data.inputs["attention_mask"], mask)
    assert data.inputs["input_ids"].dtype == np.int32  # as the model takes them
    assert len(data) == 40 and data.labels is not None and data.identity["images"] == 40
    assert as_data(str(path), model).identity == data.identity


def test_a_plan_from_an_archive(model, archive):
    path, ids, mask = archive
    by_name = {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}
    plan, same = (
        proxyq.search(model, data, proxy="output-error", budget="size=4bit", correction="none")
        for data in (str(path), by_name)
    )
    assert plan.bits() == same.bits() and set(plan.bits()) == {"hidden", "head"}


def test_one_and_several_unnamed_inputs(tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, 3)).astype(np.float32)
    one = from_function(lambda p, x: x @ p["w"], {"w": weight}, (5,), name="one")
    x, y = rng.normal(size=(2, 7, 5)).astype(np.float32)
    np.savez(tmp_path / "one.npz", anything=x)
    np.testing.assert_array_equal(load_prepared(str(tmp_path / "one.npz"), one).inputs, x)
    two = from_function(
        lambda p, xy: (xy[0] - xy[1]) @ p["w"], {"w": weight}, ((5,), (5,)), name="two"
    )
    np.savez(tmp_path / "two.npz", x, y)
    found = load_prepared(str(tmp_path / "two.npz"), two)
    np.testing.assert_array_equal(found.inputs[0], x)
    np.testing.assert_array_equal(found.inputs[1], y)


def test_noise(model):
    first, second = (load_prepared("random", model, samples=300, seed=s) for s in (1, 2))
    ids = first.inputs["input_ids"]
    assert ids.shape == (300, 6) and ids.min() >= 0 and ids.max() == 49
    assert (first.inputs["attention_mask"] == 1).all()
    assert (ids != second.inputs["input_ids"]).any()
    again = load_prepared("random", model, samples=300, seed=1)
    assert again.identity == first.identity


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input_ids": None}, "holds no 'input_ids' for 'reader'"),
        ({"input_ids": np.zeros((40, 7), np.int64)}, r"the shape \[\(6,\), \(6,\)\]"),
        ({"input_ids": np.zeros((39, 6), np.int64)}, "equally many"),
        ({"input_ids": np.full((40, 6), 0.5)}, "must be int32, got float64"),
        ({"input_ids": np.full((40, 6), "a")}, "must be int32"),
    ],
)
def test_archives_that_do_not_fit(model, archive, change, says):
    path, *_ = archive
    with np.load(path) as file:
        arrays = {**file, **change}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(UsageError, match=says):
        load_prepared(str(path), model)


def test_files_that_cannot_be_read(model, archive, tmp_path):
    path, *_ = archive
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ProxyqError, match=r"not an intact \.npz archive"):
        load_prepared(str(path), model)
    with pytest.raises(ProxyqError, match=r"none\.npz"):
        load_prepared(str(tmp_path / "none.npz"), model)
    ids, objects = np.ones((3, 6), int), np.array([object()] * 3)
    np.savez(path, input_ids=ids, attention_mask=objects)
    with pytest.raises(ProxyqError, match="Python objects"):
        load_prepared(str(path), model)
    with pytest.raises(UsageError, match=r"must be FILE\.npz, text:FILE or random, got 'dir:x'"):
        load_prepared("dir:x", model)
    with pytest.raises(UsageError, match="has no tokenizer"):
        load_prepared("text:lines.txt", model)
    with pytest.raises(UsageError, match="its vocabulary is not known"):
        load_prepared("random", model.replace(identity={}))


# -- networks of transformers ----------------------------------------------------------------

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a cat dog sat ran on mat hill and".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BERT with a tokenizer, as `save_pretrained` leaves it."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from proxyq.model.torch_import import import_torchvision

    import_torchvision()
    import transformers

    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=3,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)}).save_pretrained(path)
    return path


def test_a_folder_of_transformers(folder, tmp_path):
    import torch
    import transformers

    model = proxyq.load_model(f"hf:{folder}")
    assert {key: x.shape for key, x in model.inputs.items()} == {
        "input_ids": (32,),
        "attention_mask": (32,),
    }
    lines = tmp_path / "lines.txt"
    lines.write_text("the cat sat on the mat\n\na dog ran\nthe dog and the cat\n" * 3)
    data = load_prepared(f"text:{lines}", model)
    assert len(data) == 9  # empty lines are none
    ids = data.inputs["input_ids"]
    assert WORDS[ids[0, 1]] == "the" and (data.inputs["attention_mask"][1].sum()) == 5
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = theirs(**{k: torch.from_numpy(v).long() for k, v in data.inputs.items()}).logits
    ours = np.asarray(model.apply(model.params, data.inputs)["logits"])
    np.testing.assert_allclose(ours, wanted.numpy(), atol=2e-6)
    plan = tmp_path / "plan.json"
    done = here(
        *("search", f"hf:{folder}", "--proxy", "sqnr", "--data", f"text:{lines}"),
        *("--budget", "size=4bit", "--out", plan, "--input-shape", "8", "--quiet"),
    )
    assert done.code == 0, done.err
    bits = json.loads(plan.read_text())["layers"]
    own = [bits[f"bert.encoder.layer.0.attention.self.{w}"] for w in ("query", "key", "value")]
    assert len({one["weight_bits"] for one in own}) == 1  # runtimes fuse them


def test_random_weights_and_refusals(folder, tmp_path):
    first, second = (proxyq.load_model(f"hf:{folder}@none", input_shape=(4,)) for _ in range(2))
    assert first.digest() == second.digest() != proxyq.load_model(f"hf:{folder}").digest()
    with pytest.raises(UsageError, match="number of tokens"):
        proxyq.load_model(f"hf:{folder}", input_shape=(3, 4, 4))
    with pytest.raises(UsageError, match="must name a repository or a folder"):
        proxyq.load_model("hf:")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ProxyqError, match="could not be loaded by transformers"):
        proxyq.load_model(f"hf:{tmp_path}")
