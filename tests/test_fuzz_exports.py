"""Damaged and hostile folders of exports, and weights of torch: a module, or one sentence."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_fuzz_files import altered, fuzz, noisy, sentence, written

from proxyq.errors import ProxyqError
from proxyq.export.qwix import RULES, _record
from proxyq.export.torch_folder import CONFIG, WEIGHTS, read_config, restructured

torch = pytest.importorskip("torch")
nn = torch.nn

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::DeprecationWarning"
)
examples_of = pytest.mark.parametrize(
    "examples", [30, pytest.param(1000, marks=pytest.mark.slow)], ids=["some", "many"]
)


def taken(load: Callable[[], Any], folder: Path) -> bool:
    """Whether it was loaded; what is refused is refused in a sentence."""
    try:
        load()
    except ProxyqError as error:
        sentence(str(error), folder)
        return False
    return True


@examples_of
def test_configurations_of_folders_that_were_changed(examples: int, tmp_path: Path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2))
    facts = {
        "schema": "proxyq/torchao/1",
        "model": {"name": "small"},
        "folded": ["1"],
        "biases": {"0.bias": [4]},
        "inputs": {"2": {"bits": 8, "scale": 0.05, "zero": 3}},
    }

    def load() -> Any:
        config = read_config(tmp_path, "proxyq/torchao/1")
        return restructured(module, config["proxyq"], tmp_path)

    (tmp_path / CONFIG).write_text(json.dumps({"proxyq": facts}))
    assert tuple(load()[0].bias.shape) == (4,)

    def run(rng: random.Random) -> None:
        config = {"quantization_config": {}, "proxyq": altered(json.loads(json.dumps(facts)), rng)}
        (tmp_path / CONFIG).write_bytes(written(config))
        taken(load, tmp_path)

    fuzz(examples, run)


@examples_of
def test_rules_for_qwix_that_were_changed(examples: int, tmp_path: Path):
    record = {
        "schema": "proxyq/qwix/1",
        "rules": [{"module_path": "head", "weight_qtype": "int4", "act_qtype": None}],
        "layers": {"head": {"parameter": "head.kernel", "bits": 4}},
        "notes": [],
    }

    def run(rng: random.Random) -> None:
        (tmp_path / RULES).write_bytes(written(altered(json.loads(json.dumps(record)), rng)))
        if taken(lambda: _record(tmp_path), tmp_path):
            found = _record(tmp_path)
            assert isinstance(found["rules"], list) and isinstance(found["layers"], dict)

    fuzz(examples, run)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchao", "compressed-tensors", "qwix"])
def test_folders_that_were_changed(kind: str, tmp_path: Path):
    """As they are loaded, by the libraries that they are for."""
    examples, files = (
        {"torchao": 400, "compressed-tensors": 200, "qwix": 40}[kind],
        [CONFIG, WEIGHTS],
    )
    if kind == "qwix":
        pytest.importorskip("qwix")
        import jax.numpy as jnp
        from test_qwix import attention, images, plan_of

        from proxyq.api import quantize_model
        from proxyq.export.qwix import PARAMETERS, export_qwix, load_qwix

        module, model = attention()
        export_qwix(
            quantize_model(model, plan_of(model, 4), images(model)), tmp_path, module=module
        )
        files = [RULES, PARAMETERS]

        def load() -> Any:
            return load_qwix(tmp_path, module, jnp.zeros((1, 6, 4)))
    else:
        from proxyq.model.torch_import import import_torchvision

        import_torchvision()  # transformers asks for it
        pytest.importorskip(kind.replace("-", "_"))
        from torch_networks import SmallTransformer, made_of, resnet

        if kind == "torchao":
            from proxyq.export.torchao import export_torchao as export
            from proxyq.export.torchao import load_torchao as read

            make, shape = resnet, (3, 32, 32)
        else:
            from proxyq.export.compressed_tensors import export_compressed_tensors as export
            from proxyq.export.compressed_tensors import load_compressed_tensors as read

            make, shape = SmallTransformer, (6, 16)
        module, quantized, *_ = made_of(make, shape, (4,), correction="none")
        export(quantized, tmp_path, module=module)

        def load() -> Any:
            return read(tmp_path, make())

    assert load() is not None
    good = {name: (tmp_path / name).read_bytes() for name in files}

    def run(rng: random.Random) -> None:
        for name, content in good.items():
            (tmp_path / name).write_bytes(content)
        name = rng.choice(files)
        content = good[name]
        if name.endswith(".json"):
            content = written(altered(json.loads(content), rng))
        elif rng.random() < 0.5:
            content = noisy(content, rng)
        else:
            (length,) = struct.unpack("<Q", content[:8])
            header = written(altered(json.loads(content[8 : 8 + length]), rng))
            content = struct.pack("<Q", len(header)) + header + content[8 + length :]
        (tmp_path / name).write_bytes(content)
        taken(load, tmp_path)

    fuzz(examples, run)


@pytest.mark.slow
def test_weights_of_torch_that_were_changed(tmp_path: Path):
    """`.pt` files, of the archive and of the older kind: nothing is unpickled but tensors."""
    from proxyq.model.digits import load_digits
    from proxyq.model.load.weights import with_weights

    digits = load_digits()
    state = {name: torch.tensor(np.array(value)) for name, value in digits.params.items()}
    good = []
    for new in (True, False):
        torch.save(state, tmp_path / "good.pt", _use_new_zipfile_serialization=new)
        assert with_weights(digits, tmp_path / "good.pt").digest() == digits.digest()
        good.append((tmp_path / "good.pt").read_bytes())
    file = tmp_path / "strange.pt"

    def run(rng: random.Random) -> None:
        file.write_bytes(noisy(rng.choice(good), rng))
        taken(lambda: with_weights(digits, file), tmp_path)

    fuzz(1000, run)


@pytest.mark.parametrize("value", [3, "text", torch.ones(3, 3).to_sparse(), None])
def test_what_is_no_plain_tensor_is_named(value: Any, tmp_path: Path):
    from proxyq.model.digits import load_digits
    from proxyq.model.load.weights import with_weights

    digits = load_digits()
    state: dict[str, Any] = {
        name: torch.tensor(np.array(value)) for name, value in digits.params.items()
    }
    torch.save({**state, "stem.kernel": value}, tmp_path / "odd.pt")
    with pytest.raises(ProxyqError, match=r"odd\.pt.* no plain tensor under 'stem\.kernel'"):
        with_weights(digits, tmp_path / "odd.pt")
    torch.save({**state, 7: torch.ones(1)}, tmp_path / "odd.pt")
    with pytest.raises(ProxyqError, match="holds '7', which it does not have"):
        with_weights(digits, tmp_path / "odd.pt")
