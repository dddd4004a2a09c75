"""The joint training of step sizes against plain programs with bits as Python numbers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from networks import mixer, small_net

import proxyq
from proxyq.checkpoint import Checkpoint
from proxyq.data import load_data, model_inputs
from proxyq.engine.step_sizes import make_trainer, train_step_sizes
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.function_import import from_function

KEY = jax.random.key(7)
BITS = (2, 4)


def batch_of(model, number, classes=10, seed=0):
    """Images and labels."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(number, *model.input_shape)).astype(np.float32)
    return images, rng.integers(0, classes, number)


@pytest.fixture(scope="module")
def net():
    return small_net()


def trainer_of(model, *, ends=True, activation_bits=BITS, batch=8):
    return make_trainer(model, batch, BITS, activation_bits, ends, 0.1)


def train(model, data, **options):
    """A short training: 4 batches of 8, twice."""
    own = {"key": KEY, "batch_size": 8, "epochs": 2, **options}
    return train_step_sizes(model, *data, BITS, **own)


def same_bytes(one, other):
    for name in ("weights", "activations", "signed", "losses"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


# --- a step against plain JAX: bits as Python numbers, every copy an array of its own ----------


def naive_quantize(x, s, bits, signed):
    """LSQ with gradients by stopping them in part, as torch implementations write it."""
    lower, upper = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    g = 1 / np.sqrt(x.size * upper)
    s = lax.stop_gradient(s - s * g) + s * g
    v = jnp.clip(x / s, lower, upper)
    return (v + lax.stop_gradient(jnp.round(v) - v)) * s


def naive_small_net(p, x, quantized):
    """`SmallNet` with batch statistics; `quantized(layer, x, w)` gives what a layer multiplies."""

    def conv(x, layer, stride=1, groups=1):
        x, w = quantized(layer, x, p[f"{layer}.kernel"])
        y = lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip
        return y + p.get(f"{layer}.bias", 0.0)

    def norm(x, name):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return (x - mean) / jnp.sqrt(var + 1e-5) * p[f"{name}.scale"] + p[f"{name}.bias"]

    relu = jax.nn.relu
    x = relu(conv(x, "stem"))
    for block, (width, stride) in {"blocks.0": (8, 1), "blocks.1": (12, 2)}.items():
        y = relu(norm(conv(x, f"{block}.conv1", stride), f"{block}.bn1"))
        y = relu(norm(conv(y, f"{block}.depthwise", groups=width), f"{block}.bn2"))
        y = norm(conv(y, f"{block}.conv2"), f"{block}.bn3")
        x = relu(y + (conv(x, f"{block}.shortcut", stride) if stride > 1 else x))
    x, w = quantized("head", x.mean((1, 2)), p["head.kernel"])
    return x @ w + p["head.bias"]


def owner(name):
    """The layer that a scale or a bias of `SmallNet` follows."""
    *block, module, _ = name.split(".")
    before = {"bn1": "conv1", "bn2": "depthwise", "bn3": "conv2"}
    return ".".join([*block, before.get(module, module)])


@pytest.mark.parametrize(
    ("ends", "activation_bits"),
    [
        pytest.param(True, (2, 4), marks=pytest.mark.slow),
        pytest.param(False, (8,), marks=pytest.mark.slow),
        pytest.param(False, (), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_equals_a_plain_program(net, ends, activation_bits):
    trainer = trainer_of(net, ends=ends, activation_bits=activation_bits)
    names = [layer.name for layer in trainer.layers]
    assert len(names) == (9 if ends else 7)
    images, labels = batch_of(net, 8)
    values, signed = trainer.start(jnp.asarray(images))
    signed = np.asarray(signed)
    settings = trainer.settings_of_step(KEY, 3, 1)
    assert settings.shape == (3, len(names))
    assert (settings[:2] == [[0], [1]]).all() and len(set(settings[2])) == 2

    # The same values as a flat dictionary: one entry for every array and copy.
    plain = {}
    for name, value in values.params.items():
        copied = not name.endswith("kernel") and owner(name) in names
        assert (value.ndim > np.asarray(net.params[name]).ndim) == copied
        for k in range(2) if copied else [None]:
            plain[name, k] = value if k is None else value[k]
    for row, layer in enumerate(names):
        for k in range(2):
            plain["weight step", layer, k] = values.weights[row, k]
        for k in range(len(activation_bits)):
            plain["input step", layer, k] = values.activations[row, k]

    def loss(plain, passed):
        chosen = dict(zip(names, passed.tolist(), strict=True))
        p = {
            name: plain.get((name, None), plain.get((name, chosen.get(owner(name)))))
            for name in values.params
        }

        def quantized(layer, x, w):
            if layer not in chosen:
                return x, w
            k, row = chosen[layer], names.index(layer)
            w = naive_quantize(w, plain["weight step", layer, k], BITS[k], True)
            if activation_bits:
                a = k % len(activation_bits)
                s = plain["input step", layer, a]
                x = naive_quantize(x, s, activation_bits[a], bool(signed[row]))
            return x, w

        smooth = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
        logits = naive_small_net(p, images, quantized)
        return optax.softmax_cross_entropy(logits, smooth).mean()

    results = [jax.value_and_grad(loss)(plain, passed) for passed in settings]
    gradient = jax.tree.map(lambda *parts: sum(parts), *[g for _, g in results])

    def decays(tree):
        return {key: np.ndim(value) >= 2 for key, value in tree.items()}

    rule = optax.chain(
        optax.clip(1.0),
        optax.add_decayed_weights(0.1, mask=decays),
        optax.sgd(0.05, momentum=0.9, nesterov=True),
    )
    updates, _ = rule.update(gradient, rule.init(plain), plain)
    expected = optax.apply_updates(plain, updates)
    expected = {
        key: jnp.clip(v, 1e-5, 1.0) if "step" in key[0] else v for key, v in expected.items()
    }

    after, _, losses = trainer.step(
        values, jax.tree.map(jnp.zeros_like, values), signed, settings,
        jnp.asarray(images), jnp.asarray(labels), rate=0.05, momentum=0.9, decay=0.1,
    )  # fmt: skip
    np.testing.assert_allclose(losses, [float(x) for x, _ in results], rtol=1e-5)
    for (name, *rest), value in expected.items():
        if "step" in name:
            table = after.weights if name == "weight step" else after.activations
            got = table[names.index(rest[0]), rest[1]]
        else:
            got = after.params[name] if rest == [None] else after.params[name][rest[0]]
        np.testing.assert_allclose(got, value, atol=1e-5, err_msg=f"{name} {rest}")


# --- three steps against torch: autograd, SGD, modules copied for each bit-width ---------------


def test_a_training_equals_torch():
    torch = pytest.importorskip("torch")
    from torch import nn

    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip
    for norm in (module[1], module[4]):
        # With a shift of zero, sums of few codes meet ReLU's corner exactly, up to the last digit.
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.3, 0.3)
    model = proxyq.from_torch(module, (3, 7, 7))
    images, labels = batch_of(model, 24, classes=5)
    found = train_step_sizes(
        model, images, labels, BITS, key=KEY, batch_size=8, learning_rate=0.02, random_passes=0
    )

    # The naive one: the same batches, everything else from torch.
    order_key, _ = jax.random.split(KEY)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(order_key, 0), 24)).reshape(3, 8)
    batches = [(torch.tensor(images[r]), torch.tensor(labels[r])) for r in order]
    layers, norms = [module[0], module[3], module[7]], {0: module[1], 1: module[4]}

    def fresh(start):
        return [nn.Parameter(torch.tensor(float(x))) for x in start]

    weight_steps = []
    for layer in layers:
        w = layer.weight.detach()
        reach = max(abs(w.mean() - 3 * w.std()), abs(w.mean() + 3 * w.std()))
        weight_steps.append(fresh([reach / 2 ** (b - 1) for b in BITS]))
    input_steps = [fresh([1.0, 1.0]) for _ in layers]

    def copies(arrays):
        return {(i, k): nn.Parameter(a.detach().clone()) for i, a in arrays.items() for k in (0, 1)}

    scales = copies({i: norm.weight for i, norm in norms.items()})
    shifts = copies({i: norm.bias for i, norm in norms.items()})
    biases = copies({i: layers[i].bias for i in (1, 2)})

    def quantize(x, s, lower, upper):
        g = 1 / (x.numel() * upper) ** 0.5
        s = (s - s * g).detach() + s * g
        v = (x / s).clamp(lower, upper)
        return (v + (v.round() - v).detach()) * s

    def forward(x, k, first):
        bits = BITS[k]
        half = 2 ** (bits - 1)
        for i, layer in enumerate(layers):
            lower, upper = (-half, half - 1) if i == 0 else (0, 2**bits - 1)
            if first:  # the first batch, with all layers before rounded already
                input_steps[i][k].data.fill_(2 * x.detach().abs().mean().item() / upper**0.5)
                input_steps[i][k].data.clamp_(1e-5, 1)
            x = quantize(x, input_steps[i][k], lower, upper)
            w = quantize(layer.weight, weight_steps[i][k], -half, half - 1)
            bias = biases.get((i, k))
            if i == 2:
                return torch.nn.functional.linear(x, w, bias)
            x = torch.nn.functional.conv2d(x, w, bias, layer.stride)
            x = torch.nn.functional.batch_norm(
                x, None, None, scales[i, k], shifts[i, k], training=True
            )
            x = torch.relu(x) if i == 0 else torch.relu(x).flatten(1)
        raise AssertionError

    steps = [s for table in (*weight_steps, *input_steps) for s in table]
    vectors = [*scales.values(), *shifts.values(), *biases.values(), *steps]
    optimizer = torch.optim.SGD(
        [{"params": vectors, "weight_decay": 0.0}, {"params": [layer.weight for layer in layers]}],
        lr=0.02, momentum=0.9, nesterov=True, weight_decay=2.5e-5,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3, eta_min=1e-5)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for k in (0, 1):
        forward(batches[0][0], k, True)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        each = [criterion(forward(x, k, False), y) for k in (0, 1)]
        sum(each).backward()
        losses.append([one.item() for one in each])
        for group in optimizer.param_groups:
            nn.utils.clip_grad_value_(group["params"], 1)
        optimizer.step()
        schedule.step()
        for s in steps:
            s.data.clamp_(1e-5, 1)

    assert found.names == ("0", "3", "7") and found.signed.tolist() == [True, False, False]
    np.testing.assert_allclose(found.losses, losses, rtol=2e-5)
    for got, table in ((found.weights, weight_steps), (found.activations, input_steps)):
        np.testing.assert_allclose(got, [[s.item() for s in row] for row in table], atol=1e-5)


# --- what is trained, and what is left alone ----------------------------------------------------


def test_running_statistics_are_not_trained(net):
    trainer = trainer_of(net)
    assert not any(name.endswith(("mean", "var")) for name in trainer.trained)
    names = [layer.name for layer in trainer.layers]
    followed = {name: names[row] for name, row in trainer.follows.items()}
    assert followed["blocks.1.bn2.scale"] == "blocks.1.depthwise"
    assert followed["blocks.1.bn3.bias"] == "blocks.1.conv2"
    assert followed["blocks.1.shortcut.bias"] == "blocks.1.shortcut"
    assert not any(name.endswith("kernel") for name in followed)
    # What follows a layer in floating point has no copies.
    assert not {"stem.bias", "head.bias"} & trainer_of(net, ends=False).follows.keys()


def test_a_setting_uses_its_own_copies_alone(net):
    """One layer at other bits: its own copies and steps get the gradient, no others do."""
    trainer = trainer_of(net)
    images, labels = (jnp.asarray(a) for a in batch_of(net, 8))
    values, signed = trainer.start(images)
    row = [layer.name for layer in trainer.layers].index("blocks.0.depthwise")
    index = jnp.zeros(9, jnp.int32).at[row].set(1)
    slope = jax.jit(jax.grad(trainer.loss))(values, trainer.fixed, signed, index, images, labels)
    for name, follows in trainer.follows.items():
        used = int(follows == row)
        assert not np.asarray(slope.params[name][1 - used]).any(), name
        assert np.asarray(slope.params[name][used]).any(), name
    expected = np.zeros((9, 2), bool)
    expected[np.arange(9), np.asarray(index)] = True
    for table in (slope.weights, slope.activations):
        np.testing.assert_array_equal(np.asarray(table) != 0, expected)


def test_what_has_no_gradient_stays():
    """Neither weight decay nor momentum moves it, also where it moved before."""

    def apply(p, x):
        y = jax.nn.relu(x @ p["first"])
        y = y + p["unused"][:, 0] * 0.0
        return y @ p["last"]

    rng = np.random.default_rng(0)
    shapes = {"first": (6, 5), "unused": (5, 2), "last": (5, 3)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    model = from_function(apply, params, (6,), image_layout=None)
    trainer = trainer_of(model, batch=4)
    images, labels = (jnp.asarray(a) for a in batch_of(model, 4, classes=3))
    values, signed = trainer.start(images)
    moving = jax.tree.map(jnp.ones_like, values)
    after, speed, _ = trainer.step(
        values, moving, signed, trainer.settings_of_step(KEY, 0, 1), images, labels,
        rate=0.1, momentum=0.9, decay=0.5,
    )  # fmt: skip
    np.testing.assert_array_equal(after.params["unused"], values.params["unused"])
    np.testing.assert_array_equal(speed.params["unused"], 1.0)
    assert (np.asarray(after.params["first"]) != np.asarray(values.params["first"])).all()


def test_tied_weights_and_a_model_without_batch_norm():
    model = mixer()
    found = train(model, batch_of(model, 16, classes=8), epochs=1)
    assert found.names == ("embed", "tokens", "query", "key", "value", "out", "tied")
    assert found.weights.shape == found.activations.shape == (7, 2)
    # `tied` reads a signed tensor at its first use and an unsigned one at its second.
    assert found.signed.all()
    assert (found.weights > 0).all() and np.isfinite(found.activations).all()
    assert trainer_of(model).follows == {"gain": 6}


@pytest.mark.slow
def test_pairs_of_bits_and_tables(net):
    data = batch_of(net, 8)
    found = train(net, data, epochs=1, activation_bits=(3, 5, 8), random_passes=0)
    assert found.activations.shape == (9, 3) and found.weights.shape == (9, 2)
    assert found.losses.shape == (1, 3)
    assert trainer_of(net, activation_bits=(3, 5, 8)).settings == ((0, 0), (1, 1), (0, 2))


# --- the same bytes -------------------------------------------------------------------------------


def test_same_key_same_bytes(net):
    data = batch_of(net, 32)
    told = []
    one = train(net, data, progress=lambda *now: told.append(now))
    assert told == [("train step sizes", step + 1, 8) for step in range(8)]
    assert one.losses.shape == (8, 3) and one.signed[0] and not one.signed[1:].any()
    same_bytes(one, train(net, data))
    other = train(net, data, key=jax.random.key(8))
    assert (other.losses != one.losses).any()


class Stop(Exception):
    pass


def stopping(at):
    def progress(stage, done, total):
        if done == at:
            raise Stop

    return progress


def test_a_stopped_run_goes_on(net, tmp_path):
    data = batch_of(net, 32)
    whole = train(net, data)
    checkpoint = Checkpoint(tmp_path, every=0)
    for at in (2, 5):  # stopped twice, in both epochs
        with pytest.raises(Stop):
            train(net, data, checkpoint=checkpoint, progress=stopping(at))
    told = []
    resumed = train(net, data, checkpoint=checkpoint, progress=lambda *now: told.append(now[1]))
    assert told == [6, 7, 8]
    same_bytes(whole, resumed)
    # A finished one has nothing left to do.
    same_bytes(whole, train(net, data, checkpoint=checkpoint, progress=stopping(1)))


def test_another_training_does_not_go_on(net, tmp_path):
    data = batch_of(net, 32)
    checkpoint = Checkpoint(tmp_path, every=0)
    train(net, data, checkpoint=checkpoint)
    for change in ({"learning_rate": 0.02}, {"key": jax.random.key(1)}, {"epochs": 1}):
        with pytest.raises(Stop):
            train(net, data, checkpoint=checkpoint, progress=stopping(1), **change)
    with pytest.raises(Stop):
        train(net, (data[0], 9 - data[1]), checkpoint=checkpoint, progress=stopping(1))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_step_sizes import batch_of, small_net, train
from proxyq.checkpoint import Checkpoint

def progress(stage, done, total):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)

net = small_net()
train(net, batch_of(net, 32), checkpoint=Checkpoint(Path(sys.argv[1]), every=0), progress=progress)
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(net, tmp_path):
    here = str(Path(__file__).parent)
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), here], env=os.environ)
    assert run.returncode == -signal.SIGKILL
    data = batch_of(net, 32)
    told = []
    resumed = train(
        net,
        data,
        checkpoint=Checkpoint(tmp_path, every=0),
        progress=lambda *now: told.append(now[1]),
    )
    assert told == [6, 7, 8]
    same_bytes(train(net, data), resumed)


# --- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": ()}, "at least one"),
        ({"bits": (1, 2)}, "at least 2"),
        ({"bits": (2, 2)}, "once"),
        ({"bits": (2, 9)}, "1 to 8 or 16"),
        ({"activation_bits": (1,)}, "activation_bits"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 33}, "at least one batch of 33"),
        ({"batch_size": 1}, "batch_size"),
        ({"random_passes": -1}, "random_passes"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": 1e-6}, "final_learning_rate"),
        ({"momentum": 1.5}, "momentum"),
        ({"label_smoothing": "much"}, "label_smoothing"),
        ({"labels": None}, "needs labels"),
        ({"labels": np.zeros(31, int)}, "32 whole numbers"),
        ({"labels": np.zeros(32)}, "whole numbers"),
        ({"labels": np.full(32, 10)}, "0 to 9"),
        ({"labels": np.full(32, -1)}, "0 to 9"),
        ({"inputs": np.zeros((32, 3, 12, 12), np.float32)}, "12, 12, 3"),
    ],
)
def test_wrong_arguments(net, options, words):
    inputs, labels = batch_of(net, 32)
    given = {"inputs": inputs, "labels": labels, "bits": BITS, "batch_size": 8, **options}
    with pytest.raises(UsageError, match=words):
        train_step_sizes(net, key=KEY, **given)


def test_wrong_models(net):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 3)).astype(np.float32)}
    line = from_function(lambda p, x: x @ p["w"], params, (4,), image_layout=None)
    with pytest.raises(UsageError, match="1 layers in all"):
        train(line, batch_of(line, 16, classes=3), ends=False)
    wide = from_function(lambda p, x: x @ p["w"], params, (6, 4), image_layout=None)
    with pytest.raises(UsageError, match="classifier"):
        train(wide, batch_of(wide, 16, classes=3))


def test_divergence_is_told(net):
    images, labels = batch_of(net, 32)
    images[5] = np.nan
    with pytest.raises(ProxyqError, match=r"diverged at step \d of 8 .*learning_rate"):
        train(net, (images, labels))


# --- a real network -------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.slow
def test_a_few_steps_on_resnet20(cifar):
    pytest.importorskip("torch")
    example = Path(__file__).resolve().parents[1] / "examples" / "cifar_resnet.py"
    model = proxyq.load_model(f"{example}:resnet20", weights=cifar / "cifar10_resnet20.safetensors")
    model = model.replace(
        preprocessing=proxyq.Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    )
    data = load_data(f"{cifar / 'cifar10.npz'}:x_train,y_train").take(96)
    inputs = np.asarray(model_inputs(model, data))
    found = train_step_sizes(model, inputs, data.labels, (2, 3, 4, 6), key=KEY, batch_size=32)
    assert found.losses.shape == (3, 5)
    for table in (found.weights, found.activations):
        assert table.shape == (20, 4)
        assert np.isfinite(table).all() and (table > 0).all()
        assert (np.diff(table, axis=1) < 0).mean() > 0.9
    assert found.signed.tolist() == [True] + [False] * 19
    # The untrained network is the better the more bits it has.
    assert found.losses[0, 3] < found.losses[0, 0]
