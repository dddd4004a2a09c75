"""A ResNet and a ViT of flax.nnx and flax.linen, from the user's module to a plan and back."""

from functools import cache, partial
from pathlib import Path

import flax_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax_networks import (
    SHAPE,
    LinenResNet,
    LinenViT,
    ResNet,
    ResNetBlock,
    ViT,
    initialised,
    model_of,
    trained,
)
from test_parameters import only
from test_reconstruct import plan_of

import proxyq
from proxyq.api.inputs import as_data, inputs_of
from proxyq.engine import Engine
from proxyq.errors import ProxyqError, UsageError
from proxyq.export.parameters import to_linen, to_nnx, to_params, unfolded_integers
from proxyq.model.flax_import import from_linen, from_nnx
from proxyq.model.function_import import from_function
from proxyq.model.load.weights import with_weights
from proxyq.model.network import network
from proxyq.model.scanned import apart_params, whole_params
from proxyq.search.allocate.together import fused

NETWORKS = (
    "nnx_resnet",
    "nnx_vit",
    "nnx_looped_vit",
    "linen_resnet",
    "linen_vit",
    "linen_looped_vit",
)


def those(*quick):
    """All networks, those that are not named as slow tests."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]


@cache
def loaded(name):
    """The model as the command line loads it."""
    return proxyq.load_model(f"{Path(flax_networks.__file__)}:{name}")


def images(count=24, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


def native(source, x):
    """The module's own outputs, in inference mode, without proxyq."""
    if isinstance(source, tuple):
        module, variables = source
        return np.asarray(module.apply(variables, jnp.asarray(x), train=False))
    module = nnx.clone(source)
    module.eval()
    return np.asarray(nnx.jit(lambda module, x: module(x))(module, jnp.asarray(x)))


def back(quantized):
    """The module of its author with the quantized network's numbers."""
    source = quantized.model.source
    if isinstance(source, tuple):
        return source[0], to_linen(quantized, source[1])
    return to_nnx(quantized, source)


def leaves(source):
    return jax.tree.leaves(source[1] if isinstance(source, tuple) else nnx.state(source))


def close(found, wanted, tolerance=1e-5):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def attention(block, *names):
    return [f"{block}.{name}" for name in ("query", "key", "value", "out", *names)]


LAYERS = {
    "nnx_resnet": [
        "stem.layers.0",
        *("blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2"),
        *("blocks.1.shortcut.layers.0", "head"),
    ],
    "linen_resnet": [
        "conv_init",
        *("LinenResNetBlock_0.Conv_0", "LinenResNetBlock_0.Conv_1"),
        *("LinenResNetBlock_1.Conv_0", "LinenResNetBlock_1.Conv_1"),
        *("LinenResNetBlock_1.conv_proj", "Dense_0"),
    ],
    "nnx_vit": ["patches", "head"]
    + [
        name
        for i in range(2)
        for name in (
            *attention(f"blocks.{i}.attention"),
            *(f"blocks.{i}.mlp.layers.{place}" for place in (0, 3)),
        )
    ],
    "linen_vit": ["patches", "head"]
    + [
        name
        for i in range(2)
        for name in (
            *attention(f"block_{i}.MultiHeadDotProductAttention_0"),
            *(f"block_{i}.MlpBlock_0.Dense_{place}" for place in (0, 1)),
        )
    ],
}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layers_have_the_names_that_users_know(name):
    graph = proxyq.inspect(loaded(name))
    layers = {layer.name: layer for layer in graph.layers}
    assert sorted(layers) == sorted(LAYERS[name])
    # What `count_params` and a look at the shapes say, by hand.
    if "vit" in name:
        assert {layer.kind for layer in graph.layers} == {"conv", "linear"}
        assert layers["patches"].weights == 4 * 4 * 3 * 8 and layers["patches"].macs == 4 * 384
        query = next(layer for layer in graph.layers if layer.name.endswith("query"))
        assert (query.weights, query.macs, query.channels) == (64, 5 * 64, 8)  # five tokens
        assert query.output_shape == (5, 2, 4)
        siblings = fused(graph.layers)
        assert [len(own) for own in siblings] == [3, 3]
        assert all(own[0].endswith("query") and own[2].endswith("value") for own in siblings)
        out = query.name.replace("query", "out")
        assert layers[out].group == layers["patches"].group  # they feed one residual sum
    else:
        stem, strided, head = (LAYERS[name][i] for i in (0, 3, -1))
        assert layers[stem].macs == 64 * 27 * 8 and layers[stem].output_shape == (8, 8, 8)
        assert layers[strided].macs == 16 * 72 * 12 and layers[head].kind == "linear"
        assert layers[LAYERS[name][4]].group == layers[LAYERS[name][5]].group
        assert all(length > 0 for length in graph.folded[:-1])  # batch norm behind each


@pytest.mark.parametrize("name", those("nnx_resnet"))
def test_outputs_are_the_modules_own(name):
    model, x = loaded(name), images()
    wanted = native(model.source, x)
    close(model(x), wanted)
    close(Engine.build(model, len(x)).logits(x), wanted)  # with batch norm folded


@pytest.mark.parametrize("name", ["nnx_resnet", "linen_resnet"])
def test_folding_against_batch_norm_by_hand(name):
    model = loaded(name)
    engine = Engine.build(model, 24)
    conv, norm = {
        "nnx_resnet": ("blocks.1.conv1", "blocks.1.bn1"),
        "linen_resnet": ("LinenResNetBlock_1.Conv_0", "LinenResNetBlock_1.BatchNorm_0"),
    }[name]
    (index,) = engine.network.sites_of(conv)
    old = model.params
    factor = old[f"{norm}.scale"] / np.sqrt(old[f"{norm}.var"] + 1e-5)
    np.testing.assert_allclose(engine.weight(index), old[f"{conv}.kernel"] * factor, rtol=1e-5)


@pytest.mark.parametrize("name", those("nnx_resnet"))
def test_a_plan_applied_and_put_back(name):
    model, x = loaded(name), images()
    proxy = "sqnr" if "nnx" in name else "weight-mse"
    plan = proxyq.search(model, proxy=proxy, budget="size=3.6bit", bits=(2, 3, 4, 6))
    assert plan.budgets[0].achieved <= 3.6
    bits = plan.bits()
    assert len(set(bits.values())) > 1
    for own in fused(proxyq.inspect(model).layers):
        assert len({bits[layer] for layer in own}) == 1
    structure = jax.tree.structure(leaves(model.source))
    outputs = {}
    for correction in ("none", "statistics"):
        made = proxyq.quantize_model(model, plan, x, correction=correction)
        outputs[correction] = made.logits(x)
        source = back(made)
        close(native(source, x), outputs[correction], 2e-5)
        found = leaves(source)
        assert jax.tree.structure(found) == structure
        for new, old in zip(found, leaves(model.source), strict=True):
            assert new.shape == old.shape and new.dtype == old.dtype
    # Each channel's mean is the float network's again, which rounding alone had moved.
    exact, plain, corrected = (
        o.mean(axis=0) for o in (native(model.source, x), outputs["none"], outputs["statistics"])
    )
    assert np.abs(corrected - exact).max() < 0.05 * np.abs(plain - exact).max()
    for own in unfolded_integers(made).values():
        assert own.codes.max() < 2**own.bits


def test_what_an_nnx_user_does_with_modes_stays():
    """Left in training mode, with its own statistics; `eval()` is ours to call."""
    module = trained(ResNet(rngs=nnx.Rngs(0)))
    module.train()
    model = from_nnx(module, SHAPE)
    assert module.blocks[0].bn1.use_running_average is False
    assert module.dropout.deterministic is False
    assert type(module.dropout) is nnx.Dropout and type(module.blocks[0].bn1) is nnx.BatchNorm
    x = images(4)
    close(model(x), native(module, x))
    module.eval()
    close(module(jnp.asarray(x)), model(x))


# --- loops over layers --------------------------------------------------------------------------


def test_a_loop_over_layers_is_the_network_written_out():
    model = loaded("nnx_looped_vit")
    plain = from_nnx(ViT(rngs=nnx.Rngs(1)), SHAPE)
    assert sorted(model.params) == sorted(plain.params) and not plain.stacks
    plain = plain.replace(params=dict(model.params))
    x = images(4)
    close(model(x), plain(x))
    found, wanted = proxyq.inspect(model), proxyq.inspect(plain)
    assert found.layers == wanted.layers
    assert fused(found.layers) == fused(wanted.layers)
    kernel = model.source.blocks.attention.query.kernel[...]
    for step in range(2):
        own = model.params[f"blocks.{step}.attention.query.kernel"]
        np.testing.assert_array_equal(own, kernel[step])
    whole = whole_params(model.params, model.stacks)
    np.testing.assert_array_equal(whole["blocks.attention.query.kernel"], kernel)
    again = apart_params(whole, model.stacks)
    assert again.keys() == model.params.keys()
    assert all(np.array_equal(again[name], model.params[name]) for name in again)


@pytest.mark.slow
def test_one_step_of_a_loop_can_stay_float():
    model, x = loaded("linen_looped_vit"), images()
    kept = "blocks.1.MlpBlock_0.Dense_0"
    plan = only(plan_of(model, 3), *[n for n in plan_of(model, 3).layers if n != kept])
    made = proxyq.quantize_model(model, plan, x, correction="none")
    module, variables = back(made)
    close(native((module, variables), x), made.logits(x), 2e-5)
    new, old = (
        v["params"]["blocks"]["MlpBlock_0"]["Dense_0"]["kernel"]
        for v in (variables, model.source[1])
    )
    assert new.shape == (8, 2, 16)  # stacked along the second axis
    np.testing.assert_array_equal(new[:, 1], old[:, 1])
    # 3 bits give each channel at most eight values; the float ones are of eight rows, all apart.
    assert not any(len(np.unique(old[:, 0, c])) < 8 for c in range(16))
    assert max(len(np.unique(new[:, 0, c])) for c in range(16)) < 8


def test_a_weights_file_of_stacked_parameters(tmp_path):
    from safetensors.numpy import save_file

    model = loaded("nnx_looped_vit")
    doubled = {name: 2 * np.asarray(value) for name, value in model.params.items()}
    save_file(whole_params(doubled, model.stacks), tmp_path / "whole.safetensors")
    save_file(doubled, tmp_path / "apart.safetensors")
    for name in ("whole", "apart"):
        read = with_weights(model, tmp_path / f"{name}.safetensors")
        assert all(np.array_equal(read.params[key], doubled[key]) for key in doubled)
    wrong = whole_params(doubled, model.stacks)
    wrong["blocks.norm1.scale"] = wrong["blocks.norm1.scale"][:1]
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ProxyqError, match=r"holds 'blocks\.norm1\.scale'"):
        with_weights(model, tmp_path / "wrong.safetensors")


def draw(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def layers_of(model):
    """The names of a model's layers, after its graph has given the outputs of its function."""
    x = draw(2, *model.input_shape)
    graph = network(model, 2)
    close(graph.graph(model.params, x), model(x))
    return list(graph.names)


def test_names_of_the_steps():
    def stacked(h, params):
        return jax.lax.scan(lambda h, p: (jnp.tanh(h @ p["w"] + p["b"]), None), h, params)[0]

    block = {"w": draw(3, 4, 4), "b": draw(3, 4)}
    # The number follows what the step's parameters have in common.
    model = from_function(lambda p, x: stacked(x, p["net"]["body"]), {"net": {"body": block}}, (4,))
    assert layers_of(model) == [f"net.{i}.body.w" for i in range(3)]
    two = {"net": {"body": block, "head": draw(4, 2)}}
    model = from_function(lambda p, x: stacked(x, p["net"]["body"]) @ p["net"]["head"], two, (4,))
    assert layers_of(model) == [*(f"net.body.{i}.w" for i in range(3)), "net.head"]
    model = from_function(lambda p, x: stacked(x, p), block, (4,))
    assert layers_of(model) == [f"w.{i}" for i in range(3)]
    taken = {**block, "w.1": draw(4, 4)}
    model = from_function(
        lambda p, x: stacked(x @ p["w.1"], {"w": p["w"], "b": p["b"]}), taken, (4,)
    )
    assert layers_of(model) == ["w.1", *(f"w[{i}]" for i in range(3))]


def test_loops_inside_loops_backwards_and_twice():
    params = {"outer": {"w": draw(2, 4, 4), "inner": {"w": draw(2, 3, 4, 4)}}, "head": draw(4, 3)}

    def apply(p, x):
        def inner(h, q):
            return jnp.tanh(h @ q["w"]), h.sum(axis=1)

        def outer(h, q):
            h, sums = jax.checkpoint(lambda h: jax.lax.scan(inner, h, q["inner"]))(h)
            return jax.jit(lambda h: jnp.tanh(h @ q["w"]))(h), sums

        h, sums = jax.lax.scan(outer, x, p["outer"], reverse=True)
        h, _ = jax.lax.scan(outer, h, p["outer"])  # the same weights again
        return h @ p["head"] + sums.sum(axis=(0, 1))[:, None]

    model = from_function(apply, params, (4,))
    block = [[*(f"outer.{i}.inner.{j}.w" for j in range(3)), f"outer.{i}.w"] for i in range(2)]
    assert layers_of(model) == [*block[1], *block[0], "head"]
    assert {layer.macs for layer in network(model, 2).layers} == {2 * 16, 12}
    whole = whole_params(model.params, model.stacks)
    np.testing.assert_array_equal(whole["outer.inner.w"], params["outer"]["inner"]["w"])


class NormedBlock(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        y = nn.BatchNorm(use_running_average=not self.train, name="norm")(y)
        return x + nn.relu(y), None


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        blocks = nn.scan(
            NormedBlock,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = blocks(train, name="blocks")(nn.Dense(4, name="stem")(x), None)
        return nn.Dense(5, name="head")(x.mean(axis=(1, 2)))


class NnxNormed(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return ResNetBlock(3, 3, rngs=rngs)

        self.blocks = create(rngs)
        self.head = nnx.Linear(3, 5, rngs=rngs)

    def __call__(self, x):
        run = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.head(run(self.blocks, x).mean(axis=(1, 2)))


@pytest.mark.parametrize("kind", [pytest.param("nnx", marks=pytest.mark.slow), "linen"])
def test_batch_norm_in_a_loop(kind):
    """Folded step by step; and with the statistics of the batch, as in training."""
    x = images(6)
    if kind == "linen":
        module, variables = initialised(Normed())
        model = model_of(module, variables)
        trained_on, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
        convs = [f"blocks.{step}.conv" for step in range(2)]
        assert network(model, 2).names == ("stem", *convs, "head")
    else:
        looped = trained(NnxNormed(nnx.Rngs(0)))
        model = from_nnx(looped, SHAPE)
        training = nnx.clone(looped)
        training.train()
        trained_on = training(jnp.asarray(x))
        convs = [f"blocks.{step}.conv{place}" for step in range(2) for place in (1, 2)]
        assert network(model, 2).names == (*convs, "head")
    graph = network(model, 6)
    assert [length > 0 for length in graph.folded] == [name in convs for name in graph.names]
    close(graph.graph(model.params, x), native(model.source, x))
    assert model.batch_statistics_apply is not None
    close(model.batch_statistics_apply(model.params, x), trained_on)
    assert {name.rpartition(".")[2] for name in model.frozen} == {"mean", "var"}


def test_loops_of_rematerialised_loops():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.Dense(4)(x))

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(nn.remat_scan(Block, lengths=(2, 2))(name="deep")(x))

    variables = Deep().init(jax.random.key(0), draw(1, 4))
    model = from_linen(Deep(), variables, (4,))
    assert layers_of(model) == [
        *(f"deep.{i}.{j}.Dense_0" for i in range(2) for j in range(2)),
        "head",
    ]
    whole = whole_params(model.params, model.stacks)
    np.testing.assert_array_equal(
        whole["deep.Dense_0.kernel"], variables["params"]["deep"]["Dense_0"]["kernel"]
    )


def test_a_recurrent_network_has_one_layer_for_all_times():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.RNN(nn.SimpleCell(4), name="rnn")(x)[:, -1])

    module = Net()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 5, 3)))
    model = from_linen(module, variables, (5, 3))
    names = layers_of(model)
    assert len(names) == 3 and not model.stacks
    x = draw(2, 5, 3)
    close(model(x), module.apply(variables, x))
    recurrent = network(model, 2).layer(next(name for name in names if name.endswith(".h")))
    assert recurrent.macs == 4 * 16  # the first of five steps starts from zeros


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_calls_inside_modules_are_seen_through(kind):
    if kind == "nnx":

        class Net(nnx.Module):
            def __init__(self, rngs):
                self.first = nnx.Linear(4, 4, rngs=rngs)
                self.second = nnx.Linear(4, 3, rngs=rngs)

            def __call__(self, x):
                x = nnx.remat(lambda layer, x: nnx.relu(layer(x)))(self.first, x)
                return nnx.jit(lambda layer, x: layer(x))(self.second, x)

        net = Net(nnx.Rngs(0))
        model, x = from_nnx(net, (4,)), draw(2, 4)
        assert layers_of(model) == ["first", "second"]
        close(model(x), net(x))
        return

    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.remat(nn.Dense)(4, name="first")(x))
            return nn.jit(nn.Dense)(3, name="second")(jax.jit(jnp.tanh)(x))

    variables = Other().init(jax.random.key(0), jnp.zeros((1, 4)))
    model, x = from_linen(Other(), variables, (4,)), draw(2, 4)
    assert layers_of(model) == ["first", "second"]
    close(model(x), Other().apply(variables, x))


def test_loops_that_cannot_be_unrolled():
    weight = {"w": draw(4, 4)}

    def data_decides(p, x):
        return jax.lax.while_loop(lambda h: h.sum() > 1e6, lambda h: h @ p["w"], x)

    def branches(p, x):
        return jax.lax.cond(x.sum() > 0, lambda h: h @ p["w"], lambda h: h, x)

    def too_many(p, x):
        return jax.lax.fori_loop(0, 257, lambda i, h: h @ p["w"], x)

    for function, told in (
        (data_decides, r"layers inside a `while`, whose number of steps its data decide: give"),
        (branches, "layers inside a `cond`, whose branch its data decide: choose"),
        (too_many, "a loop of 257 steps, and proxyq unrolls at most 256: shorten"),
    ):
        with pytest.raises(ProxyqError, match=told):
            network(from_function(function, weight, (4,)), 2)
    with pytest.raises(ProxyqError, match=r"one image of the batch after the other"):
        from_function(lambda p, x: jax.lax.map(lambda row: row @ p["w"], x), weight, (4,))


# --- bfloat16 -----------------------------------------------------------------------------------

HALF = 2.0**-8
"""How far bfloat16 rounds: half a step of 8 bits."""


@pytest.mark.slow
def test_bfloat16_parameters():
    """They are float32 numbers here, exactly; going back rounds each weight to bfloat16."""
    module, variables = initialised(LinenViT(depth=1, param_dtype=jnp.bfloat16))
    model, x = model_of(module, variables), images()
    assert variables["params"]["head"]["kernel"].dtype == jnp.bfloat16
    assert all(value.dtype == jnp.float32 for value in model.params.values())
    close(model(x), native((module, variables), x))
    plan = proxyq.search(model, proxy="sqnr", budget="size=4bit")
    made = proxyq.quantize_model(model, plan, x, correction="none")
    assert all(own.scale.dtype == np.float32 for own in made.integers.values())
    exact = to_params(made)
    found = to_linen(made, variables)
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(variables), strict=True):
        assert new.dtype == old.dtype and new.shape == old.shape
    kernel = found["params"]["block_0"]["MlpBlock_0"]["Dense_0"]["kernel"]
    wanted = exact["block_0.MlpBlock_0.Dense_0.kernel"]
    close(model.apply(exact, x), made.logits(x), 2e-5)
    assert (np.abs(np.asarray(kernel, np.float32) - wanted) <= HALF * np.abs(wanted)).all()
    assert not np.array_equal(np.asarray(kernel, np.float32), wanted)
    # Each of some ten layers in a row adds its own.
    close(native((module, found), x), made.logits(x), 10 * HALF)


@pytest.mark.parametrize("kind", [pytest.param("nnx", marks=pytest.mark.slow), "linen"])
def test_networks_that_compute_in_bfloat16(kind):
    """Batch norm is folded all the same, and all goes back; the precision is that of bfloat16."""
    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    if kind == "nnx":
        model = from_nnx(trained(ResNet(rngs=nnx.Rngs(0), **half)), SHAPE)
    else:
        module, variables = initialised(LinenResNet(dtype=jnp.bfloat16))
        assert variables["params"]["Dense_0"]["kernel"].dtype == jnp.float32
        model = model_of(module, variables)
    x = images()
    assert all(length > 0 for length in network(model, 2).folded[:-1])
    wanted = native(model.source, x)
    close(model(x), wanted, 4 * HALF)
    engine = Engine.build(model, len(x))
    assert engine.weight(0).dtype == jnp.bfloat16 and engine.columns(0).dtype == jnp.float32
    assert engine.logits(x).dtype == np.float32
    close(engine.logits(x), wanted, 10 * HALF)
    made = proxyq.quantize_model(model, plan_of(model, 4), x, correction="statistics")
    assert all(own.scale.dtype == np.float32 for own in made.integers.values())
    source = back(made)
    close(native(source, x), made.logits(x), 10 * HALF)
    for new, old in zip(leaves(source), leaves(model.source), strict=True):
        assert new.dtype == old.dtype


def test_siblings_are_known_where_each_converts_its_input():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(x)  # float32, which query, key and value make bfloat16 of
            return nn.MultiHeadDotProductAttention(num_heads=2, dtype=jnp.bfloat16)(x, x)

    variables = Net().init(jax.random.key(0), jnp.zeros((1, 5, 8)))
    layers = proxyq.inspect(from_linen(Net(), variables, (5, 8))).layers
    assert [[name.rpartition(".")[2] for name in own] for own in fused(layers)] == [
        ["query", "key", "value"]
    ]


# --- qwix ---------------------------------------------------------------------------------------


def of_qwix(test):
    """It calls what Flax has renamed."""
    for told in ("The 'm.iter_modules", "'VariableState' was removed"):
        test = pytest.mark.filterwarnings(f"ignore:{told}:DeprecationWarning")(test)
    return test


@of_qwix
@pytest.mark.parametrize(
    "name",
    [
        "nnx_resnet",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("linen_vit", "linen_looped_vit")),
    ],
)
def test_there_and_back_through_qwix(name, tmp_path):
    pytest.importorskip("qwix")
    from proxyq.export.qwix import export_qwix, load_qwix

    model, x = loaded(name), images()
    fixed = {} if "nnx" in name else {"train": False}
    made = proxyq.quantize_model(model, plan_of(model, 4), x, correction="statistics")
    done = export_qwix(made, tmp_path / "out", inputs=x, apply_kwargs=fixed)
    assert done.difference is not None and done.difference < 2e-5
    floats = {layer for layer, (_, stored) in done.raised.items() if stored == 32}
    if "looped" in name:
        assert floats == {layer for layer in made.bits if layer not in ("head",)}
        assert any("all steps of a loop over layers" in note for note in done.notes)
    else:
        assert floats == {
            layer.name for layer in proxyq.inspect(model).layers if layer.kind == "conv"
        }
    again = load_qwix(tmp_path / "out", model.source, jnp.asarray(x[:1]), apply_kwargs=fixed)
    if isinstance(again, tuple):
        outputs = again[0].apply(again[1], jnp.asarray(x), train=False)
    else:
        outputs = again(jnp.asarray(x))
    close(outputs, made.logits(x), 2e-5)


@of_qwix
@pytest.mark.slow
def test_bfloat16_through_qwix(tmp_path):
    pytest.importorskip("qwix")
    from proxyq.export.qwix import export_qwix, load_qwix

    source = initialised(LinenViT(depth=1, param_dtype=jnp.bfloat16))
    model, x = model_of(*source), images()
    made = proxyq.quantize_model(model, plan_of(model, 4), x, correction="statistics")
    fixed = {"train": False}
    done = export_qwix(made, tmp_path / "out", inputs=x, apply_kwargs=fixed)
    assert done.difference is not None and done.difference < 4 * HALF
    assert any("bfloat16" in note for note in done.notes)
    module, variables = load_qwix(tmp_path / "out", source, jnp.asarray(x[:1]), apply_kwargs=fixed)
    close(module.apply(variables, jnp.asarray(x), train=False), made.logits(x), 4 * HALF)


# --- what users stumble over --------------------------------------------------------------------


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 400
    return text


def test_linen_variables_without_their_statistics():
    module, variables = initialised(LinenResNet())
    with pytest.raises(
        UsageError, match="needs the collection 'batch_stats', which `variables`"
    ) as e:
        from_linen(module, {"params": variables["params"]}, SHAPE, apply_kwargs={"train": False})
    assert "`module.init` returned" in one_sentence(e)


def test_linen_modules_in_training_mode():
    module, variables = initialised(LinenResNet())
    with pytest.raises(UsageError, match=r"training mode \(it updates 'batch_stats'") as e:
        from_linen(module, variables, SHAPE)
    assert "`apply_kwargs`, such as {'train': False}" in one_sentence(e)
    with pytest.raises(UsageError, match="random numbers of the stream 'dropout', as in") as e:
        from_linen(*initialised(LinenViT()), SHAPE)
    assert "`apply_kwargs`, such as {'train': False}" in one_sentence(e)

    class Required(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic):
            return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(3)(x))

    variables = Required().init(jax.random.key(0), jnp.zeros((1, 4)), True)
    with pytest.raises(UsageError, match="is called without 'deterministic': give fixed") as e:
        from_linen(Required(), variables, (4,))
    assert "{'deterministic': True}" in one_sentence(e)
    assert from_linen(Required(), variables, (4,), apply_kwargs={"deterministic": True})


def test_random_numbers_that_belong_to_a_module():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x + jax.random.normal(self.make_rng("noise"), x.shape))

    variables = Noisy().init({"params": jax.random.key(0), "noise": jax.random.key(1)}, draw(1, 4))
    with pytest.raises(UsageError, match="random numbers of the stream 'noise'") as e:
        from_linen(Noisy(), variables, (4,))
    assert "{'rngs': {'noise': jax.random.key(0)}}" in one_sentence(e)
    keys = {"noise": jax.random.key(0)}
    model = from_linen(Noisy(), variables, (4,), apply_kwargs={"rngs": keys})
    close(model(draw(2, 4)), Noisy().apply(variables, draw(2, 4), rngs=keys))


class Told(nnx.Module):
    """Its flag stands in the call, where `module.eval()` does not reach."""

    def __init__(self, rngs, *, norm=True, rate=0.5):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, train: bool = True):
        x = self.linear(x)
        if self.norm is not None:
            x = self.norm(x, use_running_average=not train)
        return self.dropout(x, deterministic=not train)


@pytest.mark.parametrize("norm", [True, False])
def test_nnx_modules_told_to_train_in_the_call(norm):
    module = Told(nnx.Rngs(0), norm=norm)
    with pytest.raises(UsageError, match="the module runs in training mode") as e:
        from_nnx(module, (4,))
    text = one_sentence(e)
    assert ("batch norm takes the statistics of the batch" in text) == norm
    assert "`apply_kwargs`, such as {'train': False}" in text
    model = from_nnx(module, (4,), apply_kwargs={"train": False})
    assert (model.batch_statistics_apply is not None) == norm
    close(model(draw(3, 4)), module(draw(3, 4), train=False))
    if not norm:  # what is never dropped needs no flag
        assert from_nnx(Told(nnx.Rngs(0), norm=False, rate=0.0), (4,))
    else:
        assert model.batch_statistics_apply is not None
        centred = model.batch_statistics_apply(model.params, draw(30, 4))
        np.testing.assert_allclose(centred.mean(axis=0), 0, atol=1e-5)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_shapes_with_channels_first(kind):
    if kind == "nnx":
        bring = partial(from_nnx, ResNet(rngs=nnx.Rngs(0)))
    else:
        bring = partial(from_linen, *initialised(LinenResNet()), apply_kwargs={"train": False})
    with pytest.raises(UsageError, match="reads images with channels last, as Flax does") as e:
        bring((3, 8, 16))
    assert one_sentence(e).endswith("give input_shape=(8, 16, 3), not (3, 8, 16).")
    with pytest.raises(UsageError, match=r"does not run on a batch of inputs of shape \(8, 8, 5\)"):
        bring((8, 8, 5))


def test_images_with_channels_first():
    """Images may lie in either layout; prepared inputs are as the model reads them."""
    model, x = loaded("linen_resnet"), images(8)
    turned = x.transpose(0, 3, 1, 2)
    for given in (x, turned):
        data = as_data(given, model)
        assert data is not None
        np.testing.assert_array_equal(inputs_of(data, model, 8, None), x)
    plan = plan_of(model, 4)
    with pytest.raises(UsageError, match=r"the channels last\.$") as e:
        proxyq.quantize_model(model, plan, turned, correction="statistics")
    assert "(8, 8, 3) for each example, got (3, 8, 8)" in one_sentence(e)
    with pytest.raises(UsageError, match=r"for each example, got \(8, 8, 4\)\.$"):
        proxyq.quantize_model(model, plan, np.zeros((8, 8, 8, 4)), correction="statistics")
