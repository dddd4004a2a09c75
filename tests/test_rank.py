"""Rankings: coefficients against scipy, intervals against a plain bootstrap, costs against sums."""

import json

import numpy as np
import pytest
from scipy import stats

import proxyq
from proxyq import api
from proxyq.cli import main
from proxyq.errors import ProxyqError, UsageError
from proxyq.proxies import PROXIES
from proxyq.proxies.proxy import make_proxy
from proxyq.search.rank import ranking, regrets
from proxyq.search.table_file import MeasuredTable


def drawn(seed=0, plans=40, ties=True):
    """`(cost, accuracy, size)` that have something to do with each other."""
    rng = np.random.default_rng(seed)
    size = rng.integers(200, 400, plans).astype(float)
    accuracy = 50 + 0.1 * size + rng.normal(0, 5, plans)
    cost = -0.5 * accuracy - 0.02 * size + rng.normal(0, 3, plans)
    return (np.round(v) if ties else v for v in (cost, accuracy, size))


@pytest.mark.parametrize("ties", [True, False])
def test_coefficients_are_those_of_scipy(ties):
    cost, accuracy, size = drawn(ties=ties)
    found = ranking(cost, accuracy, size).correlations
    wanted = {
        "spearman": stats.spearmanr(-cost, accuracy).statistic,
        "kendall": stats.kendalltau(-cost, accuracy).statistic,
        "pearson": stats.pearsonr(-cost, accuracy).statistic,
    }
    for share in (20, 50):
        most = 40 * share // 100
        for label, by in (("", -cost), (" true", accuracy)):
            rows = np.argsort(-by, kind="stable")[:most]
            own = stats.spearmanr(-cost[rows], accuracy[rows]).statistic
            wanted[f"spearman@{share}{label}"] = own
    # What is left of the ranks once a line in the ranks of size is taken from both.
    ranks = [stats.rankdata(v) for v in (-cost, accuracy, size)]
    rest = [v - np.polyval(np.polyfit(ranks[2], v, 1), ranks[2]) for v in ranks[:2]]
    wanted["spearman given size"] = stats.pearsonr(*rest).statistic
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].value == pytest.approx(value, abs=1e-9), name
        assert found[name].low <= found[name].high


def test_intervals_are_those_of_a_plain_bootstrap():
    cost, accuracy, size = drawn()
    found = ranking(cost, accuracy, size, seed=3, resamples=300).correlations
    rng = np.random.default_rng([3, 40])
    rows = rng.integers(0, 40, (300, 40))
    for name, how in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
        each = [how(-cost[r], accuracy[r]).statistic for r in rows]
        low, high = np.percentile(each, (2.5, 97.5))
        assert found[name].low == pytest.approx(low, abs=1e-9)
        assert found[name].high == pytest.approx(high, abs=1e-9)
    again = ranking(cost, accuracy, size, seed=3, resamples=300).correlations
    assert again == found
    assert ranking(cost, accuracy, size, seed=4, resamples=300).correlations != found


def test_closed_forms():
    size = np.arange(20.0)
    perfect = ranking(-size, np.exp(size / 5), size)
    assert perfect.correlations["spearman"].value == pytest.approx(1)
    assert perfect.correlations["kendall"].low == pytest.approx(1)
    assert perfect.mean_regret == perfect.max_regret == 0
    # Size explains all of it: nothing is left.
    assert perfect.correlations["spearman given size"].value is None
    # Costs that say nothing have no correlation, and lose what the largest plan loses.
    nothing = ranking(np.zeros(20), size, size)
    assert nothing.correlations["spearman"].value is None
    assert nothing.correlations["pearson"].value is None and nothing.mean_regret == 0
    huge = ranking(-1e150 * size, size, size)
    assert huge.correlations["pearson"].value == pytest.approx(1)


def test_regret_is_counted_within_every_size():
    cost, accuracy, size = drawn(1)
    found = regrets(cost, accuracy, size)
    for row, limit in enumerate(np.sort(size)):
        within = np.flatnonzero(size <= limit)
        least = within[cost[within] == cost[within].min()]
        largest = least[size[least] == size[least].max()]
        best = accuracy[within].max()
        assert any(found[row] == best - accuracy[one] for one in largest)
    assert (found >= 0).all()


def test_too_little_to_rank():
    with pytest.raises(ProxyqError, match="at least 3 plans"):
        ranking(np.ones(2), np.ones(2), np.ones(2))
    with pytest.raises(ProxyqError, match="the costs of plan 2 is not finite"):
        ranking(np.array([1, np.nan, 2]), np.arange(3.0), np.arange(3.0))


# -- proxies --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    return api.table(plans=16, samples=64, eval_samples=200)


def test_costs_are_those_of_the_plans(table):
    result = api.rank(
        table=table,
        proxies=["sqnr", "orthogonality", "logit-coupling", "kl-delta"],
        samples=64,
        resamples=100,
    )
    names = [row.name for row in result.rows]
    looped = {"logit-coupling, in loop", "kl-delta, in loop"}
    trivial = {"size", "bops", "sum of bits"}
    assert set(names) == {"sqnr", "orthogonality", "logit-coupling", "kl-delta"} | looped | trivial
    file = api.score(
        proxies=["sqnr", ("kl-delta", {"correction": "statistics"}), "logit-coupling"],
        bits=(2, 3, 4),
        samples=64,
    )
    bits = np.array([2, 3, 4])
    for name, label in (("sqnr", "sqnr"), ("kl-delta", "kl-delta, in loop")):
        values = file.of(name).values
        wanted = [
            sum(values[layer, b - 2] for layer, b in enumerate(plan.bits)) for plan in table.plans
        ]
        np.testing.assert_allclose(result[label].costs, wanted, rtol=1e-6)
    coupling = file.of("logit-coupling").coupling
    for cost, plan in zip(result["logit-coupling"].costs, table.plans, strict=True):
        x = (np.array(plan.bits)[:, None] == bits).ravel().astype(float)
        assert cost == pytest.approx(x @ coupling @ x, rel=1e-6)
    values = [row.ranking.correlations["spearman"].value for row in result.rows]
    assert values == sorted(values, reverse=True)
    size = -table.column("size_bits")
    np.testing.assert_array_equal(result["size"].costs, size)
    # An importance is ranked by the costs that it stands for.
    assert result["orthogonality"].cost == "linear-bits"
    from_file = api.rank(file, table=table, resamples=100)
    np.testing.assert_allclose(from_file["sqnr"].costs, result["sqnr"].costs)


def test_a_proxy_of_ones_own_is_ranked(table):
    def sized(taps, *, key):
        return taps.map(lambda tap: tap.layer.weights)

    own = make_proxy(sized, needs=("weight",), passes="none", reference="a test")
    result = api.rank(table=table, proxies=[own, "params"], resamples=50)
    np.testing.assert_allclose(result["sized"].costs, result["params"].costs)
    assert "sized" not in PROXIES


def test_the_table_must_be_of_this_network(table):
    record = json.loads(table.to_json())
    record["layers"][0]["name"] = "other"
    with pytest.raises(UsageError, match="of another network"):
        api.rank(table=MeasuredTable.from_json(record), proxies="sqnr")
    file = api.score(proxies="sqnr", bits=(2, 4))
    with pytest.raises(UsageError, match=r"no costs at 3 bits.*bits=\[2, 3, 4\]"):
        api.rank(file, table=table)


def test_the_command(table, tmp_path, capsys):
    table.save(tmp_path / "t.json")
    arguments = ["rank", "--table", str(tmp_path / "t.json"), "--proxy", "sqnr", "--no-cache"]
    out, plot = tmp_path / "rank.json", tmp_path / "rank.png"
    assert main([*arguments, "--out", str(out), "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "sqnr" in shown and "size *" in shown and "16 plans of digits" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(out.read_text()) and record["schema"] == "proxyq/rank/1"
    assert main(["rank"]) == 2
    assert "--table" in capsys.readouterr().err


def test_the_table_on_the_shelf():
    result = proxyq.rank(table="digits", proxies=["sqnr", "output-error"], samples=64)
    assert len(result.table.plans) == 101
    assert result["output-error"].ranking.correlations["spearman"].value > 0.5


def test_other_weights_are_another_network():
    model = api.as_model()
    params = {name: np.asarray(value) * np.float32(1.1) for name, value in model.params.items()}
    other = model.replace(params=params)
    with pytest.raises(UsageError, match="is of another network"):
        api.rank(other, table="digits", proxies="sqnr")
    scores = api.score(other, proxies="sqnr", bits=(2, 3, 4))
    with pytest.raises(UsageError, match="is of another network"):
        api.rank(scores, table="digits")
    scores = api.score(proxies="sqnr", bits=(2, 3, 4), extra_code="either")
    with pytest.raises(UsageError, match="score again"):
        api.rank(scores, table="digits")
    for wrong in ({"seed": -1}, {"resamples": 0}):
        with pytest.raises(UsageError, match="must be at least"):
            api.rank(table="digits", proxies="sqnr", **wrong)
