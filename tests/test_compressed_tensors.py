"""compressed-tensors: it reads our integers bit for bit; what it cannot hold or fuse is told."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from torch_networks import SmallTransformer, Tied, made_of, plan_of, resnet, run_of, weight_of

from proxyq.api import quantize_model
from proxyq.engine import Engine
from proxyq.errors import MissingExtra, ProxyqError
from proxyq.export import compressed_tensors
from proxyq.export.compressed_tensors import (
    check_fused,
    export_compressed_tensors,
    load_compressed_tensors,
)
from proxyq.export.torch_module import largest_difference, to_torch
from proxyq.model.layers import Layer
from proxyq.model.network import network
from proxyq.model.torch_import import import_torchvision
from proxyq.ptq.deploy import deployed_layers
from proxyq.ptq.quantized import with_weights
from proxyq.search.allocate.plan import PlannedBudget

torch = pytest.importorskip("torch")
import_torchvision()  # transformers asks for it
pytest.importorskip("compressed_tensors")
nn = torch.nn


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def equal_siblings(model, cycle=(3, 8, 1, 5, 4, 2, 7, 6)):
    """Bits of a cycle, equal for layers that are fused."""
    names = [layer.name for layer in network(model, 2).layers]
    kinds = {}
    for name in names:
        kind = name.replace("q_proj", "k_proj").replace("v_proj", "k_proj")
        kinds.setdefault(kind, cycle[len(kinds) % len(cycle)])
    return {
        name: kinds[name.replace("q_proj", "k_proj").replace("v_proj", "k_proj")] for name in names
    }


@pytest.fixture(scope="module")
def transformer():
    module, quantized, _, inputs = made_of(SmallTransformer, (6, 16))
    plan = plan_of(quantized.model, equal_siblings(quantized.model))
    return module, quantize_model(quantized.model, plan, inputs), plan, inputs


def check_weights(quantized, module):
    for layer in deployed_layers(quantized):
        found = weight_of(module, layer).detach().numpy()
        np.testing.assert_array_equal(found, layer.weight.values())


def test_integers_outputs_and_files(transformer, tmp_path):
    module, quantized, plan, inputs = transformer
    done = export_compressed_tensors(quantized, tmp_path, module=module, plan=plan, inputs=inputs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    ones = {name: (1, 2) for name, bits in plan.bits().items() if bits == 1}
    assert ones and done.raised == ones  # with the same values
    back = load_compressed_tensors(tmp_path, SmallTransformer())
    check_weights(quantized, back)
    assert largest_difference(quantized, run_of(back), inputs) < 1e-5
    weights = {name: layer.weights for name, layer in plan.layers.items()}
    assert done.planned_bits == plan.size_bits
    assert done.size_bits == plan.size_bits + sum(weights[name] for name in ones)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["format"] == "pack-quantized" and written["quant_method"] == "compressed-tensors"
    by_name = {
        name: group["weights"]["num_bits"]
        for group in written["config_groups"].values()
        for name in group["targets"]
    }
    assert by_name == {name: max(bits, 2) for name, bits in plan.bits().items()}


def test_codes_in_the_file_are_ours(transformer, tmp_path):
    """Unpacked by hand: a row is one long number, the first code in its lowest bits."""
    from safetensors.numpy import load_file

    module, quantized, _, _ = transformer
    export_compressed_tensors(quantized, tmp_path, module=module)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in deployed_layers(quantized):
        if layer.bits == 1:
            continue
        words = tensors[f"{layer.name}.weight_packed"].view(np.uint32)
        for row, codes in zip(words, layer.weight.codes, strict=True):
            number = sum(int(word) << (32 * i) for i, word in enumerate(row))
            found = [number >> (layer.bits * i) & (2**layer.bits - 1) for i in range(len(codes))]
            assert found == codes.tolist()
        scale = tensors[f"{layer.name}.weight_scale"]
        np.testing.assert_array_equal(scale, np.broadcast_to(layer.weight.scale, scale.shape))


def test_the_library_reads_the_folder_as_its_users_do(transformer, tmp_path):
    """As transformers loads a checkpoint, without proxyq."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import load_file

    module, quantized, _, inputs = transformer
    export_compressed_tensors(quantized, tmp_path, module=module)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(written)
    fresh = SmallTransformer().eval()
    apply_quantization_config(fresh, config)
    compressor = ModelCompressor(quantization_config=config)
    for one in fresh.modules():
        if hasattr(one, "quantization_scheme"):
            nn.init.ones_(one.weight_scale)
    compressor.compress_model(fresh)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    compressor.decompress_model(fresh)
    check_weights(quantized, fresh)
    assert largest_difference(quantized, run_of(fresh), inputs) < 1e-5


@pytest.mark.parametrize("extra_code", ["negative", "either"])
def test_rounded_inputs_and_codes_on_either_side(extra_code, transformer, tmp_path):
    module, before, _, inputs = transformer
    bits = {name: (8 if "mlp" in name else 4) for name in before.bits}
    bits["head"] = 8
    plan = plan_of(before.model, bits, 8)
    method = {"correction": "statistics", "rounding": {"extra_code": extra_code}}
    plan = plan.model_copy(update={"method": method})
    quantized = quantize_model(before.model, plan, inputs)
    export_compressed_tensors(quantized, tmp_path, module=module, plan=plan, inputs=inputs)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["format"] == "mixed-precision"
    groups = written["config_groups"].values()
    assert all(group["input_activations"]["num_bits"] == 8 for group in groups)
    symmetric = {group["weights"]["symmetric"] for group in groups}
    assert symmetric == ({True} if extra_code == "negative" else symmetric - {True} | {False})
    back = load_compressed_tensors(tmp_path, SmallTransformer())
    check_weights(quantized, back)
    same = run_of(to_torch(quantized, module))(inputs)
    np.testing.assert_allclose(run_of(back)(inputs), same, atol=1e-5 * np.abs(same).max())


def test_convolutions_stay_float_and_budgets_are_counted_again(tmp_path):
    module, quantized, _, inputs = made_of(resnet, (3, 32, 32), (4,))
    budget = PlannedBudget(name="size", asked=4, achieved=4, unit="bit")
    plan = plan_of(quantized.model, (4,), budgets=[budget])
    done = export_compressed_tensors(quantized, tmp_path, module=module, plan=plan, inputs=inputs)
    assert set(done.raised) == set(plan.layers) - {"linear"}
    assert set(done.raised.values()) == {(4, 32)}
    assert any("more than the plan's budget of 4 bit" in note for note in done.notes)
    back = load_compressed_tensors(tmp_path, resnet())
    check_weights(quantized, back)
    assert largest_difference(quantized, run_of(back), inputs) < 1e-5
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["ignore"] == [name for name in plan.layers if name != "linear"]
    with pytest.raises(ProxyqError, match=r"cannot store all layers as planned: 'conv1' \(4 bits"):
        export_compressed_tensors(quantized, tmp_path / "no", module=module, strict=True)
    assert not (tmp_path / "no").exists()


def test_fused_siblings_need_equal_bits(transformer, tmp_path):
    module, quantized, plan, inputs = transformer
    name = "attention.1.v_proj"
    layers = dict(plan.layers)
    layers[name] = layers[name].model_copy(update={"weight_bits": 6})
    other = quantize_model(quantized.model, plan.model_copy(update={"layers": layers}), inputs)
    with pytest.raises(ProxyqError, match=r"fuse attention.1.q_proj .*v_proj 6 bits") as error:
        export_compressed_tensors(other, tmp_path / "no", module=module)
    assert r"--tie 're:attention\.1\.(q_proj|k_proj|v_proj)'" in str(error.value)
    assert not (tmp_path / "no").exists()


def layer(name, shares=None):
    return Layer(
        name=name,
        kind="linear",
        parameter=f"{name}.weight",
        weights=4,
        macs=4,
        channels=2,
        output_shape=(2,),
        shares_input=shares,
    )


def test_innocent_siblings_are_not_fused():
    bits = {"a.q_proj": 4, "a.k_proj": 4, "a.v_proj": 8, "a.conv1": 2, "a.conv2": 3}
    # Cross-attention: keys and values read another tensor than queries.
    crossed = [layer("a.q_proj"), layer("a.k_proj", "a.k_proj"), layer("a.v_proj", "a.k_proj")]
    with pytest.raises(ProxyqError, match=r"fuse a.k_proj 4, a.v_proj 8 bits"):
        check_fused(crossed, bits, {})
    check_fused([layer("a.conv1", "a.conv1"), layer("a.conv2", "a.conv1")], bits, {})
    apart = [layer("a.q_proj", "a.q_proj"), layer("b.k_proj", "a.q_proj")]
    check_fused(apart, {"a.q_proj": 2, "b.k_proj": 3}, {})
    with pytest.raises(ProxyqError, match="fuse w1 4/8, w3 4/float bits"):
        check_fused([layer("w1", "w1"), layer("w3", "w1")], {"w1": 4, "w3": 4}, {"w1": 8})


def test_weights_that_two_layers_share(tmp_path):
    module, quantized, _, inputs = made_of(Tied, (6,), (3,))
    export_compressed_tensors(quantized, tmp_path, module=module, inputs=inputs)
    back = load_compressed_tensors(tmp_path, Tied())
    assert largest_difference(quantized, run_of(back), inputs) < 1e-5


def test_zero_points_that_are_no_codes_stay_float(transformer, tmp_path):
    module, before, plan, inputs = transformer
    quantized = quantize_model(before.model, plan, inputs, correction="weights")
    with pytest.raises(ProxyqError, match="its zero points are no codes"):
        export_compressed_tensors(quantized, tmp_path / "no", module=module)
    # One layer alone: those that are fused with it go along.
    moved = {**before.integers}
    at = [layer.name for layer in deployed_layers(before)].index("attention.0.k_proj")
    moved[at] = quantized.integers[at]
    engine = Engine.build(before.model, 8)
    mixed = replace(before, integers=moved, edits=with_weights(engine, moved))
    done = export_compressed_tensors(mixed, tmp_path, module=module, inputs=inputs)
    fused = {f"attention.0.{kind}_proj" for kind in "qkv"}
    assert {name for name, (_, stored) in done.raised.items() if stored == 32} == fused
    assert any("is fused with 'attention.0.k_proj'" in note for note in done.notes)


def test_other_modules_and_damaged_files_are_refused(transformer, tmp_path):
    module, quantized, _, _ = transformer
    export_compressed_tensors(quantized, tmp_path, module=module)
    with pytest.raises(ProxyqError, match="is of another module"):
        load_compressed_tensors(tmp_path, Tied())
    with pytest.raises(ProxyqError, match="has the shape"):
        load_compressed_tensors(tmp_path, SmallTransformer(32))
    with pytest.raises(ProxyqError, match="no parameter"):
        export_compressed_tensors(quantized, tmp_path / "no", module=Tied())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = "many"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ProxyqError, match="cannot read the configuration"):
        load_compressed_tensors(tmp_path, SmallTransformer())


def test_networks_without_linear_layers_are_refused(tmp_path):
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x).mean(dim=(2, 3))

    module, quantized, _, _ = made_of(Convolutions, (3, 8, 8))
    with pytest.raises(ProxyqError, match="holds Linear layers and no Conv2d"):
        export_compressed_tensors(quantized, tmp_path, module=module)


def test_without_the_package_the_install_line_is_told(monkeypatch):
    compressed_tensors._compressed_tensors.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] == "compressed_tensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingExtra, match=r"pip install 'proxyq\[compressed-tensors\]'"):
        compressed_tensors._compressed_tensors()
