"""Bounds on memory: fewer images at once give the same numbers, and what has no room is refused."""

import json

import numpy as np
import pytest
from commandline import here
from networks import mixer, small_net
from test_reconstruct import images, plan_of

from proxyq.api import quantize_model
from proxyq.engine import Engine, collect
from proxyq.engine.memory import (
    amount,
    bytes_per_image,
    bytes_per_image_beside,
    images_beside_each_other,
)
from proxyq.engine.pieces import block_pieces
from proxyq.errors import UsageError
from proxyq.model.features import features
from proxyq.model.network import LAYERS_AT, network
from proxyq.ptq.reconstruct import Learning, held_bytes


def of_feature(model):
    found = network(model, LAYERS_AT)
    return found, list(features(found, "output").values())


@pytest.mark.parametrize("make", [pytest.param(small_net, marks=pytest.mark.slow), mixer])
@pytest.mark.parametrize("need", ["gram", "codes"])
@pytest.mark.parametrize("room", [pytest.param(2, marks=pytest.mark.slow), 7, 12])
def test_images_compared_in_blocks_are_compared_alike(make, need, room):
    """Blocks of one, three and six of 13 images: the last is not whole."""
    model, x = make(), images(make(), 13)
    found, own = of_feature(model)
    memory = int(room * bytes_per_image_beside(found, own)) + 1
    assert images_beside_each_other(found, own, memory) == room
    ticks = []
    engine = Engine.build(model, 13, batch_size=4)

    def matrices(bound, progress=lambda *_: None):
        taps = collect(engine, x, (need,), (4,), memory=bound, progress=progress)
        return [np.asarray(getattr(tap, need)) for tap in taps]

    whole = matrices(None)
    blocks = matrices(memory, lambda stage, done, total: ticks.append((done, total)))
    for one, other in zip(whole, blocks, strict=True):
        assert other.shape == (13, 13) and np.array_equal(other, other.T)
        scale = np.abs(one).max()
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * scale)
        if need == "codes":
            np.testing.assert_array_equal(other, one)
    # Every block alone for the means, then every pair of blocks.
    parts, means = -(-13 // (room // 2)), need == "gram"
    walks = parts * means + parts * (parts + 1) // 2
    assert ticks[-1] == (walks * len(engine.network.sites),) * 2


def test_what_cannot_be_compared_is_refused_with_what_it_takes():
    model = small_net()
    engine, x = Engine.build(model, 4, batch_size=4), images(model, 4)
    found, own = of_feature(model)
    least = amount(2 * bytes_per_image_beside(found, own))
    with pytest.raises(UsageError, match=f"two images layer by layer takes {least}") as caught:
        collect(engine, x, ("gram",), (4,), memory=1000)
    assert f"give at least {least}." in str(caught.value)


@pytest.mark.slow
def test_orthogonality_under_a_bound_orders_layers_alike():
    words = ("score", "--proxy", "orthogonality", "--samples", "40", "--json", "--quiet")
    whole, bounded = (here(*words, *more) for more in ((), ("--memory", "200KB")))
    assert whole.code == bounded.code == 0, bounded.err
    found = [json.loads(one.out)["scores"][0]["values"] for one in (whole, bounded)]
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4)


@pytest.mark.slow
def test_outputs_times_choices_are_bounded():
    """A batch's logits for every choice, which are many for a vocabulary."""
    model = small_net()
    x, bits = images(model, 12), (2, 3, 4, 8)
    engine = Engine.build(model, 12, batch_size=12)
    needs = ("kl", "coupling")
    whole = collect(engine, x, needs, bits)
    choices, outputs = len(engine.network.names) * len(bits), 10
    per_image = 2 * bytes_per_image(engine.network.graph) + (4 * choices + 96) * outputs
    bounded = collect(engine, x, needs, bits, memory=5 * per_image)
    assert bounded.correlation is not None and whole.correlation is not None
    np.testing.assert_allclose(bounded.correlation, whole.correlation, rtol=1e-3, atol=1e-3)
    with pytest.raises(UsageError, match=f"give at least {amount(per_image)}, or fewer --bits"):
        collect(engine, x, needs, bits, memory=per_image - 1)


@pytest.mark.slow
def test_reconstruction_is_refused_where_there_is_no_room():
    model = small_net()
    x, learning = images(model, 32), Learning(steps=2, batch_size=8)
    engine = Engine.build(model, 32, batch_size=8)
    one = held_bytes(engine, block_pieces(engine.network), learning)
    weighed = Learning(steps=2, batch_size=8, weighting="image")
    assert held_bytes(engine, block_pieces(engine.network), weighed) > one

    def learn(memory):
        return quantize_model(
            model, plan_of(model, 3), x, reconstruction="block", learning=learning, memory=memory
        )

    with pytest.raises(UsageError, match=r"give at most 24 images \(--samples\)") as caught:
        learn(31 * one)
    assert amount(32 * one) in str(caught.value) and amount(31 * one) in str(caught.value)
    with pytest.raises(UsageError, match="give a smaller batch_size"):
        learn(7 * one)
    learn(32 * one)
