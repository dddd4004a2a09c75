"""Paired statistics against enumeration, formulas written out, and published examples."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyq.errors import UsageError
from proxyq.ptq.paired import compared, holm, mcnemar, newcombe

TABLES = st.tuples(*[st.integers(0, 60)] * 4).filter(any)
CAVO = (59, 16, 6, 80)
"""Response before and after therapy (Cavo et al. 2012), the second column before the first.

The results are those of Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables
(2017), chapter 8, as their package `contingencytables` computes them.
"""


def results(both: int, only_first: int, only_second: int, neither: int):
    """Which images two networks get right, for the counts of a table."""
    cells = np.repeat(np.arange(4), (both, only_first, only_second, neither))
    return (cells == 0) | (cells == 1), (cells == 0) | (cells == 2)


# -- the test --------------------------------------------------------------------------


@pytest.mark.parametrize("discordant", [0, 1, 2, 5, 9])
def test_mcnemar_is_the_share_of_fair_coins_that_fall_as_unevenly(discordant: int):
    heads = [sum(coins) for coins in product((0, 1), repeat=discordant)]
    for only_first in range(discordant + 1):
        uneven = abs(2 * only_first - discordant)
        expected = np.mean([abs(2 * k - discordant) >= uneven for k in heads])
        assert mcnemar(only_first, discordant - only_first) == pytest.approx(expected, rel=1e-12)


def test_published_example():
    assert mcnemar(16, 6) == pytest.approx(0.052479, abs=5e-7)
    assert newcombe(*CAVO) == pytest.approx((-0.1186, -0.0046), abs=5e-5)


# -- the interval ----------------------------------------------------------------------


def written_out(e: int, f: int, g: int, h: int) -> tuple[float, float]:
    """Method 10 in the symbols of the paper, for p1 - p2 with p1 = (e + f) / n."""
    n, z = e + f + g + h, 1.959963984540054

    def wilson(r: int) -> tuple[float, float]:
        root = z * math.sqrt(z * z + 4 * r * (n - r) / n)
        return (2 * r + z * z - root) / (2 * (n + z * z)), (2 * r + z * z + root) / (
            2 * (n + z * z)
        )

    (l2, u2), (l3, u3) = wilson(e + f), wilson(e + g)
    dl2, du2 = (e + f) / n - l2, u2 - (e + f) / n
    dl3, du3 = (e + g) / n - l3, u3 - (e + g) / n
    product_of_margins = (e + f) * (g + h) * (e + g) * (f + h)
    numerator = e * h - f * g
    if numerator > n / 2:
        numerator -= n / 2
    elif numerator >= 0:
        numerator = 0
    phi = numerator / math.sqrt(product_of_margins) if product_of_margins else 0.0
    delta = math.sqrt(abs(dl2**2 - 2 * phi * dl2 * du3 + du3**2))
    epsilon = math.sqrt(abs(du2**2 - 2 * phi * du2 * dl3 + dl3**2))
    return (f - g) / n - delta, (f - g) / n + epsilon


@given(TABLES)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_newcombe_is_the_formula_of_the_paper(table: tuple[int, int, int, int]):
    both, only_first, only_second, neither = table
    expected = written_out(both, only_second, only_first, neither)
    assert newcombe(*table) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("images", "shares"),
    [(60, (0.5, 0.2, 0.1, 0.2)), (100, (0.85, 0.05, 0.05, 0.05)), (400, (0.9, 0.04, 0.02, 0.04))],
)
def test_the_interval_covers_the_truth(images: int, shares: tuple[float, ...]):
    draws = np.random.default_rng(0).multinomial(images, shares, 600)
    tables, counts = np.unique(draws, axis=0, return_counts=True)
    truth = shares[2] - shares[1]
    ends = [newcombe(*map(int, table)) for table in tables]
    inside = [low <= truth <= high for low, high in ends]
    # One standard error is 0.9 %.
    assert 0.93 < np.average(inside, weights=counts) < 0.985


# -- families --------------------------------------------------------------------------


@given(TABLES)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_a_comparison_and_its_mirror(table: tuple[int, int, int, int]):
    first, second = results(*table)
    (one,), (mirror,) = compared([(first, second)]), compared([(second, first)])
    assert (one.only_first, one.only_second) == (table[1], table[2])
    assert (mirror.only_first, mirror.only_second) == (table[2], table[1])
    accuracies = 100 * second.mean(), 100 * first.mean()
    assert one.difference == pytest.approx(accuracies[0] - accuracies[1], abs=1e-9)
    assert mirror.difference == -one.difference and mirror.p_value == one.p_value
    low, high = one.interval
    assert -100 <= low <= one.difference <= high <= 100
    assert mirror.interval == pytest.approx((-high, -low), abs=1e-9)
    assert 0 < one.p_value <= 1 and one.p_holm == one.p_value


@given(st.lists(st.floats(0, 1), max_size=8))
@settings(deadline=None, derandomize=True)
def test_holm_rejects_step_by_step(p_values: list[float]):
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    for level in (0.01, 0.05, 0.3):
        # Holm's own words: the least first, as long as it is within level / tests that are left.
        rejected: set[int] = set()
        for i in sorted(range(len(p_values)), key=lambda i: p_values[i]):
            if p_values[i] * (len(p_values) - len(rejected)) > level:
                break
            rejected.add(i)
        assert {i for i, q in enumerate(adjusted) if q <= level} == rejected


def test_a_family_is_adjusted_together():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    pairs = [results(50, 9, 1, 5), results(50, 1, 2, 5), results(50, 3, 12, 5)]
    found = compared(pairs)
    assert [one.p_holm for one in found] == holm([one.p_value for one in found])
    assert found[0].p_holm > found[0].p_value and found[1].p_holm == 1.0
    assert compared([]) == ()


@pytest.mark.parametrize(
    "pair",
    [
        (np.ones(3, bool), np.ones(4, bool)),
        (np.ones(0, bool), np.ones(0, bool)),
        (np.ones((2, 2), bool), np.ones((2, 2), bool)),
    ],
)
def test_other_images_are_refused(pair: tuple[np.ndarray, np.ndarray]):
    with pytest.raises(UsageError, match="two results on the same images"):
        compared([pair])
