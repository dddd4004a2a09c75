"""Real networks on real images: the accuracies that must come out, and those of plans.

Skipped where the CIFAR-10 images and networks are not at hand.
"""

import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.stats import spearmanr

import proxyq
from proxyq.api import evaluate
from proxyq.data import load_data
from proxyq.proxies import output_error, restored_error
from proxyq.search.allocate.plan import Plan

pytestmark = pytest.mark.data
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cifar_resnet.py"
PREPROCESSING = proxyq.Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def load(folder: Path, name: str) -> proxyq.Model:
    pytest.importorskip("torch")
    model = proxyq.load_model(f"{EXAMPLE}:{name}", weights=folder / f"cifar10_{name}.safetensors")
    return model.replace(preprocessing=PREPROCESSING)


@pytest.fixture(scope="module")
def resnet20(cifar):
    return load(cifar, "resnet20")


@pytest.fixture(scope="module")
def images(cifar):
    file = cifar / "cifar10.npz"
    return load_data(f"{file}:x_train,y_train"), load_data(f"{file}:x_test,y_test")


def plan_of(model, bits) -> Plan:
    """A plan with given bits, from a search that can choose nothing else."""
    pins = [f"{name}={b}" for name, b in bits.items()]
    return proxyq.search(model, proxy="params", budget=[], bits=[8], pins=pins, correction="none")


def test_layers_of_resnet20(resnet20):
    found = proxyq.inspect(resnet20)
    assert len(found.layers) == 20
    # All parameters but the batch norms' and the classifier's bias.
    assert sum(layer.weights for layer in found.layers) == 268_336
    assert found.layer("layer2.0.conv1").macs == 16 * 16 * 32 * 9 * 16


@pytest.mark.slow
@pytest.mark.parametrize(("name", "top1"), [("resnet20", 91.73), ("resnet56", 93.39)])
def test_float_accuracy_through_the_bridge(cifar, images, name, top1):
    model, test = load(cifar, name), images[1]
    logits = jax.jit(model.apply)
    right = 0
    for start in range(0, len(test), 1000):
        batch = test.subset(slice(start, start + 1000))
        found = logits(model.params, proxyq.data.model_inputs(model, batch))
        right += int(np.sum(np.argmax(found, axis=1) == batch.labels))
    assert right == pytest.approx(100 * top1, abs=1)


def test_correction_rescues_three_bits(resnet20, images):
    """Uniform 3 bit: 55.7 % of all test images without correction, 89.1 % with."""
    plan = plan_of(resnet20, dict.fromkeys(proxyq.inspect(resnet20).names, 3))
    train, test = images[0], images[1].subset(slice(None, None, 20))
    found = {
        correction: evaluate(
            resnet20, [plan], train, test, correction=correction, samples=samples
        ).plans[0]
        for correction, samples in (("none", 1), ("weights", 1), ("statistics", 1024))
    }
    # Without correction the figure hangs on the last digits of the rounding's scales.
    assert found["none"].top1 == pytest.approx(55.7, abs=8)
    assert found["weights"].top1 == pytest.approx(86.0, abs=4)
    assert found["statistics"].top1 == pytest.approx(88.9, abs=3)
    kl = [found[name].kl for name in ("none", "weights", "statistics")]
    assert kl[0] > kl[1] > kl[2]


@pytest.mark.slow
def test_search_at_three_bits(resnet20, images):
    train, test = images[0], images[1].take(4000)
    plan = proxyq.search(
        resnet20,
        train,
        proxy="output-error",
        budget="size=3bit",
        bits=(2, 3, 4, 6),
        correction="none",
    )
    assert plan.solver.status == "optimal" and plan.size_bits <= 3 * 268_336
    for correction, figure in (("none", 82.8), ("statistics", 89.8)):
        result = evaluate(resnet20, [plan], train, test, correction=correction, samples=1024)
        # The figures are of 10,000 images; one standard error of 4,000 is 0.5 to 0.6 points.
        assert result.plans[0].top1 == pytest.approx(figure, abs=2)


@pytest.mark.slow
def test_auto_correction_is_chosen_on_training_images_and_helps(resnet20, images):
    plan = plan_of(resnet20, dict.fromkeys(proxyq.inspect(resnet20).names, 3))
    quantized = proxyq.quantize_model(
        resnet20,
        plan,
        np.asarray(proxyq.data.model_inputs(resnet20, images[0].take(256))),
        correction="auto",
    )
    assert quantized.correction == "statistics"
    kl = quantized.notes["held_back_rescaled"]
    assert kl["statistics"] < 0.2 * kl["none"]


@pytest.mark.slow
def test_restored_error_orders_corrected_plans(cifar, resnet20, images):
    """Of 101 random plans of ResNet-20 whose accuracy was measured elsewhere, corrected."""
    file = cifar.parent / "reference" / "mqbench_resnet20.json"
    if not file.exists():
        pytest.skip("the table of measured plans is not beside the images")
    plans = json.loads(file.read_text())["plans"]
    names = proxyq.inspect(resnet20).names
    bits = np.array([[plan["bits"][name] for name in names] for plan in plans])
    accuracy = np.array([plan["top1_corrected"] for plan in plans])
    x = np.asarray(proxyq.data.model_inputs(resnet20, images[0].take(256)))
    found = {}
    for proxy in (restored_error, output_error):
        values = proxy(resnet20, x, bits=(2, 3, 4)).values
        cost = values[np.arange(len(names)), bits - 2].sum(axis=1)
        found[proxy.name] = -spearmanr(cost, accuracy).statistic
    assert found["restored-error"] > 0.92
    assert found["restored-error"] > found["output-error"] + 0.08


def test_no_warning_reaches_the_user(cifar):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(cifar, "resnet20")


@pytest.mark.slow
def test_the_pair_matrix_equals_full_passes(resnet20, images):
    """All pairs of ResNet-20 at two bit-widths, each by one full forward pass: within 1e-4."""
    from proxyq.engine import Engine
    from proxyq.engine.alternatives import choices
    from proxyq.engine.divergence import kl_divergence
    from proxyq.proxies import clado

    x = np.asarray(proxyq.data.model_inputs(resnet20, images[0].take(64)))
    scores = clado(resnet20, x, bits=(2, 4), psd=False)
    engine = Engine.build(resnet20, len(x))
    own = choices(engine, x, (2, 4))
    flat = [edits for name in engine.network.names for edits in own[name]]
    reference = engine.logits(x)

    def loss(edits):
        return kl_divergence(reference, engine.logits(x, edits)).mean()

    e = [loss(edits) for edits in flat]
    naive = np.diag(e)
    for a in range(len(flat)):
        for b in range(a // 2 * 2 + 2, len(flat)):
            naive[a, b] = naive[b, a] = (loss({**flat[a], **flat[b]}) - e[a] - e[b]) / 2
    assert np.linalg.norm(scores.coupling - naive) < 1e-4 * np.linalg.norm(naive)
