"""Checks of what every proxy must do: run on each of ours, and meant for yours.

With any test runner:

    from proxyq.testing import check_proxy

    def test_my_proxy():
        check_proxy(my_proxy)

or, with pytest, one test for each rule:

    from proxyq.testing import proxy_checks

    @pytest.mark.parametrize("check", proxy_checks(my_proxy), ids=str)
    def test_my_proxy(check):
        check()

A broken rule raises `AssertionError` with a sentence that names proxy and rule. What a proxy
measures is its own tests' business; here it is only whether it keeps its word.
"""

import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine import NEEDS, OF_ALL, Engine, TapOptions, Taps, collect
from proxyq.engine.compared import matrices_bytes
from proxyq.engine.memory import bytes_per_image, tape_bytes_per_image
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.function_import import from_function
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT, network
from proxyq.proxies import COST_CLASSES, COSTS, Proxy, Scores, as_cost
from proxyq.proxies.cost import weight_errors
from proxyq.proxies.proxy import least_cost_class

BITS, ACTIVATION_BITS = (2, 4), (4, 8)
IMAGES = 13
"""A prime, so that no batch size but one and itself divides it."""
TOLERANCE = 2e-3
"""How far batches of another size may move a score, relative to the largest."""


@dataclass(frozen=True, eq=False)
class Check:
    """One rule for one proxy: call it. `rule` says what it demands."""

    name: str
    rule: str
    proxy: str
    function: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.proxy}-{self.name}"

    def __call__(self) -> None:
        """**Raises** `AssertionError` when the rule is broken."""
        told = f"the proxy {self.proxy!r} breaks the rule {self.name!r} ({self.rule})"
        try:
            self.function()
        except AssertionError as error:
            raise AssertionError(f"{told}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error


def check_proxy(
    proxy: Proxy,
    model: Model | None = None,
    *,
    inputs: Any = None,
    labels: Any = None,
    options: Mapping[str, Any] | None = None,
    skip: tuple[str, ...] = (),
) -> None:
    """Check that a proxy keeps all rules; the first broken one is raised.

    **Arguments:**

    - `model`: a network that the proxy must work on, besides three tiny ones (the rules are
      checked on those); without it the embedded network. `inputs`, `labels`: its images,
      which are noise otherwise.
    - `options`: of the proxy, in all runs: to keep a slow one cheap.
    - `skip`: names of rules to leave out; say why where you do.

    **Raises** `AssertionError` with a sentence that names proxy and rule.
    """
    checks = proxy_checks(proxy, model, inputs=inputs, labels=labels, options=options)
    names = [check.name for check in checks]
    if unknown := set(skip) - set(names):
        raise UsageError(f"`skip` names no rule {min(unknown)!r}: known are {', '.join(names)}.")
    for check in checks:
        if check.name not in skip:
            check()


def proxy_checks(
    proxy: Proxy,
    model: Model | None = None,
    *,
    inputs: Any = None,
    labels: Any = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Check, ...]:
    """The checks of `check_proxy` one by one, to be called or given to a test runner."""
    if not isinstance(proxy, Proxy):
        raise UsageError(
            f"`proxy` must be a `Proxy`, got {type(proxy).__name__}: make one from your function "
            "with `proxyq.register` or `make_proxy`."
        )
    subject = Subject(proxy=proxy, model=model, inputs=inputs, labels=labels, options=options or {})
    return tuple(
        Check(
            name=function.__name__.replace("_", "-"),
            rule=(function.__doc__ or "").strip().rstrip("."),
            proxy=proxy.name,
            function=lambda function=function: function(subject),
        )
        for function in RULES
    )


# --- what is scored --------------------------------------------------------------------------


def branched_network(seed: int = 0) -> Model:
    """A convolution, a depthwise one beside a shortcut, a weight used twice, a classifier."""
    rng = np.random.default_rng(seed)
    shapes = {"stem": (3, 3, 2, 4), "depthwise": (3, 3, 1, 4), "tied": (4, 4), "head": (4, 3)}
    params = {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()}

    def apply(p: Any, x: Any) -> Any:
        def conv(x: Any, w: Any, groups: int) -> Any:
            return jax.lax.conv_general_dilated(
                x,
                w,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )

        x = jax.nn.relu(conv(x, p["stem"], 1) + 0.1)
        x = x + jax.nn.relu(conv(x, p["depthwise"], 4))
        x = jnp.mean(x, axis=(1, 2))
        for _ in range(2):
            x = x + jax.nn.relu(x @ p["tied"])
        return x @ p["head"]

    return from_function(apply, params, (5, 5, 2), name="branched")


def single_network(seed: int = 0) -> Model:
    """One linear layer and nothing else."""
    w = np.random.default_rng(seed).normal(size=(6, 3))
    return from_function(lambda p, x: x @ p["only"], {"only": w}, (6,), name="single")


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A proxy, its options and the networks that it is run on; results are kept."""

    proxy: Proxy
    model: Model | None
    inputs: Any
    labels: Any
    options: Mapping[str, Any]

    @cached_property
    def branched(self) -> Model:
        """The network that most rules are checked on."""
        return branched_network()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All options, defaults filled in."""
        return self.proxy.check_options(self.options)

    def images(self, model: Model, number: int = IMAGES) -> Any:
        """Noise, and zeros where a network takes whole numbers."""
        rng = np.random.default_rng(1)

        def draw(leaf: Any) -> np.ndarray:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return np.zeros(leaf.shape, leaf.dtype)
            return rng.normal(size=leaf.shape).astype(leaf.dtype)

        return jax.tree.map(draw, model.example(number))

    def targets(self, model: Model, inputs: Any) -> np.ndarray:
        """Labels of the images, all classes in turn."""
        (logits, *_) = jax.tree.leaves(jax.eval_shape(model.apply, model.params, inputs))
        shape, classes = logits.shape[:-1], logits.shape[-1]
        if logits.ndim == 1 or classes == 1:  # a single logit tells two classes apart
            shape, classes = logits.shape[: max(logits.ndim - 1, 1)], 2
        return np.arange(math.prod(shape)).reshape(shape) % classes

    def score(
        self, model: Model, *, inputs: Any = None, labels: Any = None, **settings: Any
    ) -> Scores:
        """The proxy's scores of a network, as a user gets them."""
        if inputs is None:
            inputs = self.images(model)
        if labels is None:
            labels = self.targets(model, inputs)
        given = {"bits": BITS, **settings, **self.options}
        return self.proxy(model, inputs, labels=labels, **given)

    @cached_property
    def plain(self) -> Scores:
        """Scores of the branched network."""
        return self.score(self.branched)

    def taps(self, model: Model, bits: tuple[int, ...] = BITS) -> Taps:
        """Just what the proxy's record asks for, recorded afresh."""
        inputs = self.images(model) if self.proxy.needs_images else None
        governing = TapOptions(**self.proxy.tap_options(self.settings))
        images = LAYERS_AT if inputs is None else IMAGES
        whole = images if governing.batch_norm == "batch" else None
        return collect(
            Engine.build(model, images, batch_norm=governing.batch_norm, batch_size=whole),
            inputs,
            self.proxy.needs,
            bits,
            labels=None if inputs is None else self.targets(model, inputs),
            options=governing,
        )


# --- the rules ----------------------------------------------------------------------------------


def record(subject: Subject) -> None:
    """the record is complete: name, summary, passes, reference, known needs, shape and cost."""
    proxy = subject.proxy
    # Formulas have the names of their files.
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*|formula:[\w.-]+", proxy.name), (
        f"the name {proxy.name!r} must be lower-case words joined with dashes"
    )
    for field in ("summary", "passes", "reference"):
        text = getattr(proxy, field)
        assert isinstance(text, str) and text.strip() == text != "", f"`{field}` is {text!r}"
        assert "\n" not in text, f"`{field}` must be one line"
    assert proxy.summary.endswith((".", ")")), (
        f"the summary (the docstring's first line) must be a sentence: {proxy.summary!r}"
    )
    assert len(set(proxy.needs)) == len(proxy.needs), f"a need stands twice in {proxy.needs}"
    for need in proxy.needs:
        assert need in NEEDS, f"unknown need {need!r}"
    assert proxy.shape in ("layers", "layers bits"), f"unknown shape {proxy.shape!r}"
    assert proxy.cost in COSTS, f"unknown cost {proxy.cost!r}"
    classes = list(COST_CLASSES)
    assert proxy.cost_class in classes, f"unknown cost class {proxy.cost_class!r}"
    least = least_cost_class(proxy.needs)
    assert classes.index(proxy.cost_class) >= classes.index(least), (
        f"the cost class {proxy.cost_class!r} is cheaper than what it needs, {least!r}"
    )


def options(subject: Subject) -> None:
    """every option has a default that is plain JSON, and nothing else is accepted."""
    proxy = subject.proxy
    for name, default in proxy.options.items():
        assert default is not inspect.Parameter.empty, f"the option {name!r} has no default"
    assert json.loads(json.dumps(dict(proxy.options))) == dict(proxy.options), (
        f"the defaults must be plain JSON, got {dict(proxy.options)!r}"
    )
    assert proxy.check_options({}) == dict(proxy.options), "the defaults are not accepted"
    for name, default in proxy.options.items():
        if isinstance(default, bool | int | float | str):
            assert _refused(proxy, {name: [1]}), f"{name}=[1] is accepted"
    assert _refused(proxy, {"no_such_option": 1}), "an unknown option is accepted"


def _refused(proxy: Proxy, some: dict[str, Any]) -> bool:
    try:
        proxy.check_options(some)
    except UsageError:
        return True
    return False


def needs(subject: Subject) -> None:
    """what is declared is enough, and every tensor that is declared is read."""
    taps = subject.taps(subject.branched)
    read: set[str] = set()

    class Spied(dict):
        def __getitem__(self, need: str) -> Any:
            read.add(need)
            return super().__getitem__(need)

    whole = {attribute: need for need, attribute in OF_ALL.items()}

    class Watched(Taps):
        def __getattribute__(self, name: str) -> Any:
            read.add(whole.get(name, ""))
            return super().__getattribute__(name)

    parts = {field.name: getattr(taps, field.name) for field in fields(taps)}
    parts["taps"] = tuple(replace(tap, recorded=Spied(tap.recorded)) for tap in taps)
    subject.proxy.on(Watched(**parts), **subject.options)
    unread = set(subject.proxy.needs) - read - {"weight", "engine"}
    assert not unread, f"{', '.join(sorted(unread))} declared and never read: a pass for nothing"


def values(subject: Subject) -> None:
    """one finite float64 for each layer (and bit-width); an importance is not negative."""
    for model in (subject.branched, single_network()):
        scores = subject.plain if model is subject.branched else subject.score(model)
        layers = network(model, LAYERS_AT).layers
        _check_scores(subject.proxy, scores, tuple(layer.name for layer in layers))


def given_network(subject: Subject) -> None:
    """it works on a network of the user's (the embedded one, unless a model is given)."""
    model, inputs, labels = subject.model, subject.inputs, subject.labels
    if model is None:
        model, inputs, labels = _digits()
    scores = subject.score(model, inputs=inputs, labels=labels)
    names = tuple(layer.name for layer in network(model, LAYERS_AT).layers)
    _check_scores(subject.proxy, scores, names)


def _digits() -> tuple[Model, np.ndarray, np.ndarray]:
    from proxyq.model.digits import digits_images, load_digits

    model = load_digits()
    pixels, classes = digits_images("calibration")
    how = model.preprocessing
    inputs = (pixels[:IMAGES] / np.float32(255) - how.mean[0]) / how.std[0]
    return model, inputs.astype(np.float32), classes[:IMAGES]


def _check_scores(proxy: Proxy, scores: Scores, names: tuple[str, ...]) -> None:
    assert scores.proxy == proxy.name, f"the scores call themselves {scores.proxy!r}"
    assert tuple(layer.name for layer in scores.layers) == names, "the layers are not the network's"
    wanted = (len(names),) if proxy.shape == "layers" else (len(names), len(BITS))
    assert scores.shape == proxy.shape, f"the shape is {scores.shape!r}, not {proxy.shape!r}"
    assert scores.values.shape == wanted, f"{scores.values.shape} values, not {wanted}"
    assert scores.values.dtype == np.float64, f"the values are {scores.values.dtype}"
    assert np.isfinite(scores.values).all(), "some values are not finite"
    if proxy.shape == "layers":
        assert scores.values.min() >= 0, "an importance is negative"


def costs(subject: Subject) -> None:
    """every mapping makes finite costs of an importance; costs for each bit-width stay theirs."""
    scores, errors = subject.plain, weight_errors(subject.branched, BITS)
    for cost in ("auto", *COSTS) if subject.proxy.shape == "layers" else ("auto",):
        table = as_cost(scores, cost, errors=errors)
        assert table.shape == (len(scores.layers), len(BITS)), f"cost={cost!r}: {table.shape}"
        assert np.isfinite(table).all(), f"cost={cost!r} is not finite"


def notes(subject: Subject) -> None:
    """what is noted is plain JSON, without NaN and infinite numbers."""
    found = dict(subject.plain.notes)
    assert json.loads(json.dumps(found, allow_nan=False)) == found, f"got {found!r}"


def activations(subject: Subject) -> None:
    """costs of rounding what layers read come when asked for, exactly if that is declared."""
    scores = subject.score(subject.branched, activation_bits=ACTIVATION_BITS)
    _check_scores(subject.proxy, scores, tuple(layer.name for layer in subject.plain.layers))
    assert subject.plain.activations is None, "they come without activation_bits"
    if not subject.proxy.activations:
        assert scores.activations is None, "the record must say `activations=True`"
        return
    assert scores.activations is not None, "the record says `activations=True`, and none came"
    wanted = (len(scores.layers), len(ACTIVATION_BITS))
    assert scores.activations.shape == wanted, f"{scores.activations.shape}, not {wanted}"
    assert np.isfinite(scores.activations).all(), "some are not finite"


def same_key(subject: Subject) -> None:
    """the same key gives the same bytes, with taps recorded afresh."""
    again = subject.score(subject.branched)
    assert again.values.tobytes() == subject.plain.values.tobytes(), (
        f"{again.values.tolist()} after {subject.plain.values.tolist()}"
    )


def other_key(subject: Subject) -> None:
    """another key changes the scores if the record says `random=True`, and nothing otherwise."""
    other = [subject.score(subject.branched, seed=seed).values for seed in (1, 2)]
    changed = any(values.tobytes() != subject.plain.values.tobytes() for values in other)
    if subject.proxy.random:
        assert changed, "it is declared random, and two other keys give the same scores"
    else:
        assert not changed, "the scores change with the key: the record must say `random=True`"


def pure(subject: Subject) -> None:
    """taps and images are left as they are."""
    taps = subject.taps(subject.branched)
    before = _contents(taps)
    subject.proxy.on(taps, **subject.options)
    after = _contents(taps)
    assert before.keys() == after.keys(), "something was added to the taps, or taken away"
    for where, value in before.items():
        assert value == after[where], f"{where} was changed"


def _contents(taps: Taps) -> dict[str, bytes]:
    def arrays() -> Iterator[tuple[str, Any]]:
        yield from ((f"image array {i}", x) for i, x in enumerate(jax.tree.leaves(taps.inputs)))
        yield "labels", taps.labels
        for tap in taps:
            yield f"the weight of {tap.name!r}", tap.weight
            yield f"the columns of {tap.name!r}", tap.columns
            for need, value in tap.recorded.items():
                parts = value.items() if isinstance(value, Mapping) else [("", value)]
                yield from ((f"{need} of {tap.name!r} {part}".strip(), x) for part, x in parts)

    return {where: np.asarray(value).tobytes() for where, value in arrays() if value is not None}


def batches(subject: Subject) -> None:
    """the size of batches changes nothing but rounding, whether or not it divides the images."""
    model = subject.branched
    found = network(model, LAYERS_AT)
    # A few images at once in all passes, those that keep tapes and those that do not.
    memory = 2 * max(2 * bytes_per_image(found.graph), tape_bytes_per_image(found))
    sizes = [
        Engine.build(model, IMAGES, memory=memory, tape=tape).batch_size for tape in (False, True)
    ]
    assert all(1 < size < IMAGES for size in sizes), f"batches of {sizes}: a fault of this check"
    if subject.settings.get("batch_norm") == "batch" or "batch_norm" in subject.proxy.fixed:
        return  # all images at once, by its method
    if subject.proxy.cost_class == "training":
        return  # so are its batches
    compared = len({"gram", "codes"} & set(subject.proxy.needs))
    if compared:  # what relates all images to each other is held beside them
        feature = {**subject.settings, **subject.proxy.fixed}.get("feature", TapOptions().feature)
        memory += matrices_bytes(Engine.build(model, IMAGES), IMAGES, compared, feature)
    scores = subject.score(model, memory=memory)
    scale = np.abs(subject.plain.values).max()
    wrong = np.abs(scores.values - subject.plain.values).max() / scale
    assert wrong <= TOLERANCE, (
        f"batches of {sizes} images move scores by {wrong:.2g} of the largest: "
        f"{scores.values.tolist()}, in one batch {subject.plain.values.tolist()}"
    )


def one_bit_width(subject: Subject) -> None:
    """a bit-width's costs do not depend on what else was asked; an importance on none of them."""
    if subject.proxy.cost_class == "training":
        return  # all bit-widths are trained together
    alone = subject.score(subject.branched, bits=BITS[1:]).values
    plain = subject.plain.values
    expected = plain if subject.proxy.shape == "layers" else plain[:, 1:]
    wrong = np.abs(alone - expected).max() / np.abs(plain).max()
    assert wrong <= TOLERANCE, (
        f"{BITS[1:]} alone gives {alone.tolist()}, beside {expected.tolist()}"
    )


def spoilt_weights(subject: Subject) -> None:
    """NaN in a weight ends in a `ProxyqError` of one sentence, or does not touch the scores."""
    model = subject.branched
    params = {name: np.array(value) for name, value in model.params.items()}
    params["tied"][0, 0] = np.nan
    try:
        scores = subject.score(model.replace(params=params))
    except ProxyqError as error:
        assert "\n" not in str(error), f"more than a sentence: {error}"
    else:
        assert scores.values.tobytes() == subject.plain.values.tobytes(), (
            "scores of a network with NaN in a weight, and no error"
        )


RULES: tuple[Callable[[Subject], None], ...] = (
    record,
    options,
    needs,
    values,
    given_network,
    costs,
    notes,
    activations,
    same_key,
    other_key,
    pure,
    batches,
    one_bit_width,
    spoilt_weights,
)


def place(setup: Any) -> Callable[[Any], list[Any]]:
    """A worker for tests of executors (see `proxyq.executor`): says where it works.

    Every task's answer is the process's number and, of a Ray worker, its node.
    """
    del setup
    ray = sys.modules.get("ray")
    node = ray.get_runtime_context().get_node_id() if ray is not None else None
    return lambda task: [os.getpid(), node]
