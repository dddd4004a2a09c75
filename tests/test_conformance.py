"""Every registered proxy keeps the rules that are asked of everybody's."""

import itertools

import jax
import numpy as np
import pytest

from proxyq.errors import UsageError
from proxyq.proxies import PROXIES, Result, make_proxy
from proxyq.testing import branched_network, check_proxy, proxy_checks

# What makes slow proxies cheap enough to be run a dozen times.
CHEAP = {
    "limpq": {"batch_size": 6},
    "hessian-trace": {"least": 2, "most": 3},
    "hessian-eigenvalue": {"most": 3},
    "zen": {"images": 4},
}
# Training compiles the whole network, so there the tiny one must do.
MODELS = {"limpq": branched_network()}
CHECKS = [
    check
    for name in PROXIES.available()
    for check in proxy_checks(PROXIES.get(name), MODELS.get(name), options=CHEAP.get(name))
]


# Those that are dear all the same.
DEAR = ("grasp", "limpq", "hessian-eigenvalue", "zen")


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, marks=[pytest.mark.slow] * (check.proxy in DEAR), id=str(check))
        for check in CHECKS
    ],
)
def test_rule(check):
    check()


# --- the rules themselves: a proxy that breaks one is told so -------------------------------------


def proxy_of(kernel, **record):
    record = {"needs": ("weight",), "passes": "none", "reference": "test", **record}
    return make_proxy(kernel, **record)


def sizes(taps):
    """A score that keeps all rules."""
    return np.array([float(tap.layer.weights) for tap in taps])


def good(taps, *, key):
    """The number of weights."""
    del key
    return sizes(taps)


def reads_nothing(taps, *, key):
    """Declares what it does not read."""
    return sizes(taps)


def reads_more(taps, *, key):
    """Reads what it does not declare."""
    return taps.map(lambda tap: tap.pooled.sum())


def no_default(taps, *, key, power):
    """An option that must be given."""
    return sizes(taps)


def odd_default(taps, *, key, powers=(1, 2)):
    """An option that is no JSON."""
    return sizes(taps)


def unnamed(taps, *, key):
    return sizes(taps)


def negative(taps, *, key):
    """Pays for errors."""
    return -sizes(taps)


def short(taps, *, key):
    """A layer is missing."""
    return sizes(taps)[1:]


def few_layers_alone(taps, *, key):
    """Gives up on deep networks."""
    return sizes(taps) / (len(taps) < 6)


def not_a_number_noted(taps, *, key):
    """Notes what JSON has no word for."""
    return Result(sizes(taps), notes={"found": float("nan")})


def array_noted(taps, *, key):
    """Notes an array."""
    return Result(sizes(taps), notes={"found": np.ones(2)})


def table_too(taps, *, key):
    """Gives costs of activations as well."""
    return Result(sizes(taps), np.ones((len(taps), len(taps.activation_bits))))


COUNTER = itertools.count()


def counts(taps, *, key):
    """Another answer every time."""
    return sizes(taps) + next(COUNTER)


def drawn(taps, *, key):
    """Noise from the key."""
    return np.asarray(jax.random.uniform(key, (len(taps),)))


def spoils(taps, *, key):
    """Works in place."""
    for tap in taps:
        tap.gradient[:] = np.abs(tap.gradient)
    return taps.map(lambda tap: tap.gradient.sum())


def by_batch(taps, *, key):
    """Sees how many images run at once."""
    return sizes(taps) + taps.tape_engine.batch_size * np.arange(len(taps))


def by_bits(taps, *, key):
    """Sees which bit-widths are asked for."""
    return taps.table(lambda tap, bits: tap.layer.weights * 2.0**-bits / len(taps.bits))


def forgives(taps, *, key):
    """Takes NaN for nothing."""
    return taps.map(lambda tap: np.nansum(np.asarray(tap.columns) ** 2))


def fails(taps, *, key):
    """Raises an error of its own."""
    return taps.map(lambda tap: 1 / bool(np.isfinite(tap.columns).all()))


BROKEN = [
    ("record", proxy_of(good, name="Good_Name"), "lower-case"),
    ("record", proxy_of(unnamed), "summary"),
    ("record", proxy_of(good, cost="times-dw3"), "unknown cost 'times-dw3'"),
    ("record", proxy_of(good, needs=("kl",), cost_class="forward"), "cheaper than what it needs"),
    ("record", proxy_of(good, needs=("pooled", "pooled")), "twice"),
    ("options", proxy_of(no_default), "power"),
    ("options", proxy_of(odd_default), "plain JSON"),
    ("needs", proxy_of(reads_nothing, needs=("pooled",)), "pooled declared and never read"),
    ("needs", proxy_of(reads_more, needs=("sample",)), r"needs=\('pooled',\)"),
    ("values", proxy_of(negative), "must not be negative"),
    ("values", proxy_of(short), r"must return an array of shape \(4,\)"),
    ("values", proxy_of(good, shape="layers bits"), "layers bits"),
    ("given-network", proxy_of(few_layers_alone), "inf"),
    ("costs", proxy_of(good, cost="times-dw3"), "times-dw3"),
    ("notes", proxy_of(not_a_number_noted), "JSON compliant"),
    ("notes", proxy_of(array_noted), "not JSON serializable"),
    ("activations", proxy_of(table_too), "must say `activations=True`"),
    ("activations", proxy_of(good, activations=True), "and none came"),
    ("same-key", proxy_of(counts), "after"),
    ("other-key", proxy_of(drawn), "must say `random=True`"),
    ("other-key", proxy_of(good, random=True), "the same scores"),
    ("pure", proxy_of(spoils, needs=("gradient",)), "gradient of 'stem' was changed"),
    ("batches", proxy_of(by_batch, needs=("engine",), cost_class="forward"), "batches of"),
    ("one-bit-width", proxy_of(by_bits, shape="layers bits"), r"\(4,\) alone gives"),
    ("spoilt-weights", proxy_of(forgives), "no error"),
    ("spoilt-weights", proxy_of(fails), "ZeroDivisionError"),
]


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(
    ("rule", "proxy", "message"), BROKEN, ids=[f"{rule}-{p.name}" for rule, p, _ in BROKEN]
)
def test_a_broken_rule_is_found(rule, proxy, message):
    (check,) = (check for check in proxy_checks(proxy) if check.name == rule)
    with pytest.raises(AssertionError, match=message) as told:
        check()
    assert f"the proxy {proxy.name!r} breaks the rule {rule!r}" in str(told.value)
    others = [name for name, *_ in BROKEN]
    assert {check.name for check in proxy_checks(proxy)} == set(others)  # none is left untested


def test_all_rules_at_once():
    check_proxy(proxy_of(good))
    check_proxy(proxy_of(negative), skip=tuple({r for r, *_ in BROKEN} - {"record", "options"}))
    with pytest.raises(AssertionError, match="'negative' breaks the rule 'needs'"):
        check_proxy(proxy_of(negative))
    with pytest.raises(UsageError, match="`skip` names no rule 'key'"):
        check_proxy(proxy_of(good), skip=("key",))
    with pytest.raises(UsageError, match="`proxy` must be a `Proxy`, got function"):
        check_proxy(good)
