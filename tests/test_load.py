"""Models by name: torchvision, timm, Python files, weights files, and their refusals."""

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from proxyq.errors import MissingExtra, ProxyqError, UsageError
from proxyq.model.load import from_torchvision, load_model, weights
from proxyq.model.model import Model

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cifar_resnet.py"
SMALL = "squeezenet1_1"  # the smallest of torchvision's networks

FLAX = """
import jax
import jax.numpy as jnp
from flax import linen, nnx

from proxyq.model.model import Model


class Net(nnx.Module):
    input_shape = (4,)

    def __init__(self):
        self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dense(x)


def linen_pair():
    net = linen.Dense(3)
    return net, net.init(jax.random.key(0), jnp.zeros((1, 4)))


linen_pair.input_shape = (4,)


def linen_alone():
    return linen.Dense(3)


def plain():
    return Model(
        name="plain",
        apply=lambda params, x: x * params["scale"],
        params={"scale": jnp.ones(4)},
        inputs=jax.ShapeDtypeStruct((4,), jnp.float32),
    )


ready = plain()


def number():
    return 3


def fails():
    raise ValueError("no such dataset\\nsecond line")


constant = 5
"""

TORCH = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(4, 4)
        self.bn = torch.nn.BatchNorm1d(4)
        self.two = torch.nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.bn(self.one(x)))


def net():
    return Net()
"""


@pytest.fixture
def flax_file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(FLAX)
    return path


@pytest.fixture
def torch_file(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "torchnets.py"
    path.write_text(TORCH)
    return path


def one_sentence(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?"))
    return message


def outputs_of(model: Model, batch: int = 2) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((batch, *model.input_shape), np.float32)
    return np.asarray(model(x))


# -- the embedded network and names that there are not ------------------------------------


def test_nothing_and_digits_are_the_embedded_network():
    assert load_model(None).digest() == load_model("digits").digest()
    assert load_model().identity["spec"] == "digits"
    with pytest.raises(UsageError, match=r"`input_shape` is \(3, 8, 8\), but .* leave it out"):
        load_model("digits", input_shape=(3, 8, 8))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet18", "did you mean 'torchvision:resnet18'"),
        ("digit", "did you mean 'digits'"),
        ("hub:resnet18", "a model is named `digits`"),
        ("", "a model is named"),
        ("missing.py:net", "there is no file 'missing.py'"),
    ],
)
def test_unknown_models(spec, words):
    with pytest.raises(UsageError) as caught:
        load_model(spec)
    assert words in one_sentence(caught)


def test_wrong_input_shapes_are_refused():
    with pytest.raises(UsageError, match="positive sizes"):
        load_model("digits", input_shape=(0, 8))


# -- Python files -------------------------------------------------------------------------


def test_factories_of_flax_and_of_models(flax_file):
    for factory in ("Net", "linen_pair", "plain", "ready"):
        model = load_model(f"{flax_file}:{factory}")
        assert isinstance(model, Model) and model.input_shape == (4,)
        assert outputs_of(model).shape[0] == 2
        assert model.identity["spec"] == f"{flax_file}:{factory}"


@pytest.mark.parametrize(
    ("factory", "kind", "words"),
    [
        ("", UsageError, "say which factory"),
        ("plane", UsageError, "did you mean 'plain'"),
        ("constant", UsageError, "is no function but a int"),
        ("number", UsageError, "must return a torch.nn.Module, a Flax module"),
        ("linen_alone", UsageError, "return the pair of the module and its variables"),
        ("fails", ProxyqError, "'fails' in {file} failed (ValueError: no such dataset)"),
    ],
)
def test_factories_that_make_no_model(flax_file, factory, kind, words):
    with pytest.raises(kind) as caught:
        load_model(f"{flax_file}:{factory}" if factory else str(flax_file))
    assert words.format(file=repr(str(flax_file))) in one_sentence(caught)


def test_files_that_cannot_be_imported(tmp_path):
    broken = tmp_path / "broken.py"
    for text, words in [
        ("def net(:\n", "SyntaxError"),
        ("import no_such_module_at_all\n", "No module named 'no_such_module_at_all'"),
    ]:
        broken.write_text(text)
        with pytest.raises(ProxyqError) as caught:
            load_model(f"{broken}:net")
        assert words in one_sentence(caught)
    assert "proxyq_user_broken" not in sys.modules


EXITS = """
import sys

import torch


def factory():
    sys.exit("no data\\nhere")


class Net(torch.nn.Module):
    def forward(self, x):
        sys.exit()
"""


def test_files_that_call_sys_exit(tmp_path):
    """While imported, in the factory, and in the network that the factory makes."""
    pytest.importorskip("torch")
    file = tmp_path / "leaves.py"
    file.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(ProxyqError, match=r"leaves\.py' called `sys\.exit\(3\)` while") as caught:
        load_model(f"{file}:net")
    assert "`if __name__ == '__main__':`" in one_sentence(caught)
    assert "proxyq_user_leaves" not in sys.modules
    file.write_text(EXITS)
    for factory, call in [("factory", r"sys.exit('no data\nhere')"), ("Net", "sys.exit()")]:
        with pytest.raises(ProxyqError) as caught:
            load_model(f"{file}:{factory}", input_shape=(4,))
        assert f"`{call}`" in one_sentence(caught)


def test_file_may_import_its_neighbours_and_leaves_the_path_alone(tmp_path, flax_file):
    (tmp_path / "outer.py").write_text("from nets import plain\n")
    before = list(sys.path)
    try:
        assert load_model(f"{tmp_path / 'outer.py'}:plain").name == "plain"
    finally:
        sys.modules.pop("nets", None)
    assert sys.path == before


def test_missing_input_shape_is_asked_for(torch_file):
    with pytest.raises(UsageError) as caught:
        load_model(f"{torch_file}:net")
    assert "give `--input-shape`" in one_sentence(caught)
    assert load_model(f"{torch_file}:net", input_shape=(4,)).input_shape == (4,)


def test_random_weights_of_a_factory_are_the_same_every_time(torch_file):
    import torch

    before = torch.random.get_rng_state()
    first, second = (load_model(f"{torch_file}:net", input_shape=(4,)) for _ in range(2))
    assert first.digest() == second.digest()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.data
def test_the_example_with_real_weights(cifar):
    pytest.importorskip("torch")
    model = load_model(f"{EXAMPLE}:resnet20", weights=cifar / "cifar10_resnet20.safetensors")
    assert model.input_shape == (3, 32, 32) and model.image_layout == "NCHW"
    assert model.identity["weights"] == "cifar10_resnet20.safetensors"
    assert "torch" in model.identity
    with np.load(cifar / "cifar10.npz") as archive:
        pixels, labels = archive["x_test"][:100], archive["y_test"][:100]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = ((pixels / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    logits = jax.jit(model.apply)(model.params, x)
    assert (np.asarray(logits).argmax(axis=1) == labels).mean() >= 0.88


# -- weights files ------------------------------------------------------------------------


@pytest.fixture
def state(torch_file):
    """Weights for `net`, other than the random ones."""
    import torch

    generator = torch.Generator().manual_seed(7)
    state = {
        "one.weight": torch.randn(4, 4, generator=generator),
        "one.bias": torch.randn(4, generator=generator),
        "bn.weight": torch.ones(4),
        "bn.bias": torch.zeros(4),
        "bn.running_mean": torch.zeros(4),
        "bn.running_var": torch.ones(4),
    }
    return state | {"two.weight": state["one.weight"]}


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "module.", "both", "safetensors"])
def test_weights_files_of_torch(torch_file, state, tmp_path, wrap):
    import torch

    path = tmp_path / ("w.safetensors" if wrap == "safetensors" else "w.pth")
    saved = dict(state)
    if wrap in ("module.", "both"):
        saved = {f"module.{key}": value for key, value in saved.items()}
    if wrap in ("state_dict", "both"):
        saved = {"epoch": 3, "state_dict": saved}
    if wrap == "safetensors":
        # Only one name of a tied weight can stand in such a file.
        save_file({k: v.numpy() for k, v in state.items() if k != "two.weight"}, path)
    else:
        torch.save(saved, path)
    model = load_model(f"{torch_file}:net", weights=path, input_shape=(4,))
    np.testing.assert_array_equal(model.params["one.weight"], state["one.weight"])
    assert "two.weight" not in model.params
    assert model.identity["weights"] == path.name


class Unpickled:
    """What a weights file must never be able to make."""


def test_weights_files_that_do_not_fit(torch_file, state, tmp_path):
    import torch

    def message(content, name="w.pt"):
        torch.save(content, tmp_path / name)
        return refusal(name)

    def refusal(name, kind=ProxyqError):
        with pytest.raises(kind) as caught:
            load_model(f"{torch_file}:net", weights=tmp_path / name, input_shape=(4,))
        return one_sentence(caught)

    short = {k: v for k, v in state.items() if not k.startswith("bn.r")}
    assert "does not fit Net: it lacks 'bn.running_mean', 'bn.running_var'." in message(short)
    extra = {**state, **{f"head.{i}": torch.ones(1) for i in range(5)}}
    text = message(extra)
    assert "it holds 'head.0', 'head.1', 'head.2' and 2 more, which it does not have" in text
    text = message({**state, "one.bias": torch.ones(5)})
    assert "'one.bias' has the shape (5,) instead of (4,)" in text
    text = message({**state, "one.bias": torch.full((4,), float("nan"))})
    assert "'one.bias' holds NaN" in text
    assert "holds more than tensors" in message({**state, "odd": Unpickled()})
    assert "holds no tensors by name" in message([1, 2])
    assert "holds no tensors by name" in message({"epoch": 3})

    torch.save(state, tmp_path / "cut.pt")
    content = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    assert "damaged or cut short" in refusal("cut.pt")
    (tmp_path / "empty.pth").write_bytes(b"")
    assert "damaged or cut short" in refusal("empty.pth")
    save_file({k: v.numpy() for k, v in state.items()}, tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-20])
    assert "damaged or cut short" in refusal("cut.safetensors")
    assert "there is no weights file" in refusal("nowhere.pt", UsageError)
    assert "must be a .safetensors" in refusal("w.bin", UsageError)


def test_weights_by_name_for_flax_and_for_models(flax_file, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"scale": np.arange(4, dtype=np.float32)}, path)
    for factory in ("plain", "ready"):
        model = load_model(f"{flax_file}:{factory}", weights=path)
        np.testing.assert_array_equal(outputs_of(model)[:, 0], 0)
    with pytest.raises(ProxyqError) as caught:
        load_model(f"{flax_file}:Net", weights=path)
    assert "lacks" in one_sentence(caught) and "'dense.kernel'" in str(caught.value)
    save_file({"scale": np.ones(5, np.float32)}, path)
    with pytest.raises(ProxyqError, match=r"'scale' has the shape \(5,\) instead of \(4,\)"):
        load_model(f"{flax_file}:plain", weights=path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ProxyqError, match="damaged or cut short"):
        load_model(f"{flax_file}:plain", weights=path)


def test_weights_of_torch_for_a_model_by_name(flax_file, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"scale": torch.arange(4.0)}, tmp_path / "w.pt")
    model = load_model(f"{flax_file}:plain", weights=tmp_path / "w.pt")
    np.testing.assert_array_equal(model.params["scale"], np.arange(4))


# -- torchvision --------------------------------------------------------------------------


def test_torchvision_with_random_weights():
    torch = pytest.importorskip("torch")
    before = torch.random.get_rng_state()
    model = load_model(f"torchvision:{SMALL}@none")
    assert model.digest() == load_model(f"torchvision:{SMALL}@none").digest()
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.name == SMALL and model.input_shape == (3, 224, 224)
    assert model.preprocessing.mean == (0.485, 0.456, 0.406)
    assert (model.preprocessing.resize, model.preprocessing.size) == (256, (224, 224))
    assert model.identity["weights"] == "random"
    assert {"spec", "torch", "torchvision"} <= set(model.identity)

    small = load_model(f"torchvision:{SMALL}@none", input_shape=(3, 64, 64))
    assert (small.preprocessing.resize, small.preprocessing.size) == (73, (64, 64))
    assert outputs_of(small).shape == (2, 1000)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("torchvision:resnet19", "did you mean 'resnet18'"),
        ("torchvision:resnet50@IMAGENET_V1", "did you mean 'IMAGENET1K_V1'"),
        ("torchvision:quantized_resnet18", "name the float network, 'torchvision:resnet18'"),
        ("torchvision:mnasnet0_5@nothing", "has no weights 'nothing' of mnasnet0_5"),
        ("torchvision:raft_small@none", "the input shape of torchvision:raft_small is unknown"),
    ],
)
def test_torchvision_names_that_there_are_not(spec, words):
    pytest.importorskip("torch")
    with pytest.raises(UsageError) as caught:
        load_model(spec)
    assert words in one_sentence(caught)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch's downloads, and no network."""
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub_home"))

    def offline(*_, **__):
        from urllib.error import URLError

        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    folder = tmp_path / "hub_home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def _small_module(seed):
    import torch

    from proxyq.model.torch_import import import_torchvision

    models = import_torchvision().models
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models, models.get_model(SMALL, weights=None)


def test_torchvision_with_pretrained_weights_from_the_cache(hub, capsys):
    import torch

    models, module = _small_module(1)
    entry = models.get_model_weights(SMALL).DEFAULT
    cached = hub / entry.url.rpartition("/")[2]
    torch.save(module.state_dict(), cached)
    model = load_model(f"torchvision:{SMALL}", input_shape=(3, 64, 64))
    key = "features.0.weight"
    np.testing.assert_array_equal(model.params[key], module.state_dict()[key])
    assert model.identity["weights"] == entry.name == "IMAGENET1K_V1"
    assert capsys.readouterr().out == ""

    cached.write_bytes(cached.read_bytes()[:1000])
    with pytest.raises(ProxyqError) as caught:
        load_model(f"torchvision:{SMALL}@IMAGENET1K_V1")
    assert "delete the file and try again" in one_sentence(caught)


def test_torchvision_without_network(hub):
    with pytest.raises(ProxyqError) as caught:
        load_model(f"torchvision:{SMALL}")
    message = one_sentence(caught)
    assert f"'torchvision:{SMALL}@none'" in message and "`--weights`" in message


def test_a_weights_file_replaces_the_download(hub, tmp_path):
    import torch

    _, module = _small_module(2)
    torch.save(module.state_dict(), tmp_path / "mine.pth")
    model = load_model(
        f"torchvision:{SMALL}", weights=tmp_path / "mine.pth", input_shape=(3, 64, 64)
    )
    key = "features.0.weight"
    np.testing.assert_array_equal(model.params[key], module.state_dict()[key])
    assert model.preprocessing.mean == (0.485, 0.456, 0.406)
    assert model.identity["weights"] == "mine.pth"


def test_downloads_are_checked_by_their_hash(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save({"w": torch.ones(3)}, tmp_path / "net.pth")
    digest = hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()[:8]
    good = (tmp_path / "net.pth").rename(tmp_path / f"net-{digest}.pth")
    loaded = from_torchvision._download(good.as_uri(), "net")
    assert torch.equal(loaded["w"], torch.ones(3))
    bad = good.rename(tmp_path / "net-01234567.pth")
    with pytest.raises(ProxyqError, match=r"could not be downloaded .*hash"):
        from_torchvision._download(bad.as_uri(), "net")
    assert capsys.readouterr().out == ""


def test_old_names_of_densenet():
    torch = pytest.importorskip("torch")
    from proxyq.model.torch_import import import_torchvision

    models = import_torchvision().models
    module = models.DenseNet(4, (1, 1), 4, num_classes=3)
    state = {key: torch.ones_like(value) for key, value in module.state_dict().items()}
    dotted = {}
    for key, value in state.items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            if "denselayer" in key:
                key = key.replace(part, f"{part[:-1]}.{part[-1]}")
        dotted[key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in dotted
    weights.load_into(module, dotted, "the file")
    assert all(bool((value == 1).all()) for value in module.state_dict().values())


# -- timm ---------------------------------------------------------------------------------


def test_timm_missing_says_how_to_install_it():
    pytest.importorskip("torch")
    if importlib.util.find_spec("timm") is not None:
        pytest.skip("timm is installed")
    with pytest.raises(MissingExtra, match=r"pip install 'proxyq\[timm\]'"):
        load_model("timm:resnet18@none")


def test_timm_with_random_weights():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    model = load_model("timm:resnet18@none")
    assert model.input_shape == (3, 224, 224) and model.identity["weights"] == "random"
    assert model.preprocessing.mean == (0.485, 0.456, 0.406)
    assert model.digest() == load_model("timm:resnet18@none").digest()
    for spec, words in [
        ("timm:resnet19@none", "timm has no model 'resnet19'"),
        ("timm:resnet18@a1_in2k", "did you mean 'a1_in1k'"),
    ]:
        with pytest.raises(UsageError) as caught:
            load_model(spec)
        assert words in one_sentence(caught)


def test_proxyq_imports_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['torchvision'] = None\n"
        "from proxyq.model.load import load_model\n"
        "import proxyq.model.torch_import as t\n"
        "load_model()\n"
        "try: load_model('torchvision:resnet18@none')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MissingExtra Reading a torch model needs the package 'torch'")
    assert "pip install 'proxyq[torch]'" in done.stdout
