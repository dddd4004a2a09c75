"""Pairwise terms: losses of pairs against full runs, CLADO's matrix, logit coupling, PSD step."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from networks import mixer, small_net

import proxyq
from proxyq.api.problem import problem_from
from proxyq.checkpoint import Checkpoint
from proxyq.engine import Edit, Engine, single_layer_sweep
from proxyq.engine.alternatives import beside_each_other, choices, join, spread
from proxyq.engine.divergence import (
    cross_entropy_of,
    kl_divergence,
    log_softmax,
    rescaled_divergence,
)
from proxyq.engine.gram import Gram
from proxyq.engine.pairs import pair_row, pair_sweep, pairs_by_row
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.function_import import from_function
from proxyq.proxies import clado, kl_delta, logit_coupling, rescaled_coupling, score
from proxyq.proxies._clado import coupling_of
from proxyq.psd import nearest_psd
from proxyq.search.allocate import solve
from proxyq.search.scores_file import ScoreFile

BITS = (2, 4)


def images(model, count=6, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *model.input_shape)).astype(np.float32)


def kl(reference, start):
    return lambda logits: kl_divergence(reference, logits)


def single_kl(reference, logits, start):
    return kl_divergence(reference, logits)


def together(*edits):
    """Edits of several choices at once: the first to say something of a field has its way."""
    joined = {}
    for one in edits:
        for site, edit in one.items():
            old = joined.get(site, Edit())
            joined[site] = Edit(*(b if a is None else a for a, b in zip(old, edit, strict=True)))
    return joined


@pytest.mark.parametrize("build", [small_net, mixer])
@pytest.mark.parametrize(
    ("activation_bits", "correction"), [((), "none"), ((3,), "none"), ((3,), "statistics")]
)
def test_pairs_equal_a_full_run_for_each(build, activation_bits, correction):
    model = build()
    x = images(model)
    engine = Engine.build(model, 6, batch_size=4)
    own = choices(engine, x, BITS, activation_bits, correction=correction)
    inside = beside_each_other(len(BITS), len(activation_bits))
    found = pair_sweep(engine, x, own, kl, inside=inside)
    flat = [edits for name in engine.network.names for edits in own[name]]
    each = len(flat) // len(engine.network.names)
    reference = engine.logits(x)
    naive = np.zeros((len(flat), len(flat)))
    known = np.zeros(naive.shape, bool)
    singles = np.zeros(len(flat))
    for a, one in enumerate(flat):
        singles[a] = kl_divergence(reference, engine.logits(x, one)).mean()
        for b, other in enumerate(flat):
            same = a // each == b // each
            if same and tuple(sorted((a % each, b % each))) not in inside:
                continue
            # Of a layer's own choices the weight comes first, and stays rounded.
            both = together(one, other) if a < b else together(other, one)
            naive[a, b] = kl_divergence(reference, engine.logits(x, both)).mean()
            known[a, b] = True
    assert found.float == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(found.singles, singles, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found.pairs, naive, rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(found.pairs, found.pairs.T)
    np.testing.assert_array_equal(found.known, known)


def quadratic_toy(layers=4, width=5, seed=0):
    """A network whose KL to float is quadratic: a tiny sum of its layers' weights, as logits.

    With logits z of tiny range, KL(z, z + d) = |d - mean d|^2 / (2 classes) up to the third order.
    """
    rng = np.random.default_rng(seed)
    params = {f"w{i}.weight": rng.normal(size=(width, 3)).astype(np.float32) for i in range(layers)}

    def apply(p, x):
        return 1e-3 * sum(x[:, i] @ p[f"w{i}.weight"] for i in range(layers))

    return from_function(apply, params, (layers, width), name="quadratic")


def test_quadratic_toy_has_exact_couplings():
    """Off-diagonals are dw_i' H dw_j, and 1/2 a' (2 G) a the true rise for every selection."""
    model = quadratic_toy()
    x = images(model, 8)
    engine = Engine.build(model, 8)
    own = choices(engine, x, BITS)
    found = pair_sweep(engine, x, own, kl)
    matrix = coupling_of(found)
    reference = engine.logits(x)
    flat = [edits for name in engine.network.names for edits in own[name]]
    change = np.stack([np.float64(engine.logits(x, one)) - reference for one in flat])
    change -= change.mean(axis=-1, keepdims=True)
    # KL of nearly equal probabilities p = 1/3: sum_k d_k^2 / (2 * 3)
    exact = np.einsum("ank,bnk->ab", change, change) / (2 * 3 * len(x))
    layer = np.arange(len(flat)) // len(BITS)
    between = layer[:, None] != layer[None]
    np.testing.assert_allclose(matrix[between], exact[between], atol=5e-3 * exact.max())
    np.testing.assert_allclose(np.diag(matrix), np.diag(exact), rtol=1e-2)
    assert (matrix[~between & ~np.eye(len(flat), dtype=bool)] == 0).all()
    rng = np.random.default_rng(0)
    for _ in range(20):
        plan = rng.integers(0, len(BITS), 4)
        edits = together(*(own[n][k] for n, k in zip(engine.network.names, plan, strict=True)))
        true = kl_divergence(reference, engine.logits(x, edits)).mean()
        rows = np.arange(4) * len(BITS) + plan
        assert matrix[np.ix_(rows, rows)].sum() == pytest.approx(true, rel=2e-2)
    # Here logit coupling is the same matrix, same-layer entries and all.
    scores = logit_coupling(model, x, bits=BITS)
    np.testing.assert_allclose(scores.coupling, exact, atol=1e-2 * exact.max())


def test_layers_that_do_not_meet_are_not_coupled():
    """Two heads on separate inputs and classes' axis halves: block-diagonal, so separable."""

    def apply(p, x):
        # Each layer moves the logits of its own images alone.
        return jnp.where(x[:, :1] > 0, x @ p["a.weight"], x @ p["b.weight"])

    rng = np.random.default_rng(0)
    params = {f"{k}.weight": rng.normal(size=(4, 3)).astype(np.float32) for k in "ab"}
    model = from_function(apply, params, (4,), name="apart")
    x = images(model, 12)
    for proxy in (clado, logit_coupling):
        scores = proxy(model, x, bits=BITS)
        np.testing.assert_allclose(scores.coupling[:2, 2:], 0, atol=1e-8)
        coupled = solve(problem_from(scores.layers, scores, "size=3bit"))
        separable = kl_delta(model, x, bits=BITS)
        assert coupled.bits == solve(problem_from(scores.layers, separable, "size=3bit")).bits


@pytest.mark.parametrize("correction", ["none", "weights", "statistics"])
def test_logit_coupling_is_what_it_says(correction):
    model = small_net()
    x = images(model, 8)
    scores = logit_coupling(model, x, bits=BITS, correction=correction)
    engine = Engine.build(model, 8)
    own = choices(engine, x, BITS, correction=correction)
    flat = [edits for name in engine.network.names for edits in own[name]]
    reference = np.float64(engine.logits(x))
    logits = [engine.logits(x, one) for one in flat]
    k = np.array([kl_divergence(reference, z).mean() for z in logits])
    d = np.stack([(z - reference) - (z - reference).mean(axis=1, keepdims=True) for z in logits])
    d = d.reshape(len(flat), -1)
    rho = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in d] for a in d])
    np.testing.assert_allclose(scores.values.ravel(), k, rtol=1e-4)
    expected = rho * np.sqrt(np.outer(k, k))
    np.testing.assert_allclose(scores.coupling, expected, rtol=1e-3, atol=1e-5 * k.max())
    assert np.linalg.eigvalsh(scores.coupling).min() > -1e-9 * k.max()


@pytest.mark.parametrize("correction", ["none", "statistics"])
def test_rescaled_coupling_is_what_it_says(correction):
    model = small_net()
    x = images(model, 8)
    scores = rescaled_coupling(model, x, bits=BITS, correction=correction)
    engine = Engine.build(model, 8)
    own = choices(engine, x, BITS, correction=correction)
    flat = [edits for name in engine.network.names for edits in own[name]]
    exact = np.float64(engine.logits(x))
    logits = [np.float64(engine.logits(x, one)) for one in flat]
    k = np.array([rescaled_divergence(exact, z).mean() for z in logits])
    np.testing.assert_allclose(scores.values.ravel(), k, rtol=1e-4, atol=1e-9)
    d = np.zeros((len(flat), *exact.shape))
    for a, z in enumerate(logits):
        for i, row in enumerate(exact):
            u = row - row.mean()
            change = (z[i] - z[i].mean()) - u
            d[a, i] = change - u * (u @ change) / (u @ u)
    d = d.reshape(len(flat), -1)
    rho = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in d] for a in d])
    expected = rho * np.sqrt(np.outer(k, k))
    np.testing.assert_allclose(scores.coupling, expected, rtol=1e-3, atol=1e-4 * k.max())
    assert np.linalg.eigvalsh(scores.coupling).min() > -1e-9 * k.max()


def test_rescaled_divergence_is_the_least_over_the_scale():
    rng = np.random.default_rng(0)
    reference = 3 * rng.normal(size=(40, 10))
    noise = rng.normal(size=reference.shape) * rng.choice([0.01, 1, 5], size=(40, 1))
    logits = 0.4 * reference + noise
    found = rescaled_divergence(reference, logits)
    for own, p, z in zip(found, reference, logits, strict=True):
        scales = np.concatenate([np.linspace(0, 6, 6001), np.linspace(6, 64, 600)])
        rows = np.broadcast_to(p, (len(scales), 10))
        least = kl_divergence(rows, scales[:, None] * z).min()
        assert own <= least + 1e-12 and own == pytest.approx(least, rel=1e-3, abs=1e-6)
    # The scale alone costs nothing; logits of nothing, or of the contrary, cost what no logits do.
    np.testing.assert_allclose(rescaled_divergence(reference, 0.2 * reference), 0, atol=1e-9)
    none = kl_divergence(reference, 0 * reference)
    for against in (0 * reference, -reference):
        np.testing.assert_allclose(rescaled_divergence(reference, against), none, rtol=1e-9)
    # One logit, the log-odds of two classes; and predictions for each of several tokens.
    np.testing.assert_allclose(
        rescaled_divergence(reference[:, 0], 0.1 * reference[:, 0]), 0, atol=1e-9
    )
    tokens = rescaled_divergence(reference.reshape(8, 5, 10), logits.reshape(8, 5, 10))
    np.testing.assert_allclose(tokens, found.reshape(8, 5).mean(axis=1))


def test_corrected_alternatives_match_single_layers():
    """A layer that is rounded alone and corrected has the float network's statistics."""
    model = small_net()
    x = images(model, 16)
    engine = Engine.build(model, 16)
    for name, edits in choices(engine, x, (2,), correction="statistics").items():
        site = engine.network.sites_of(name)[0]
        state = engine.start(x)
        for index in range(site):
            state, _ = engine.step(state, index)
        where = engine.network.sites[site]
        found, exact = (
            np.asarray(where.output_columns(engine.site_output(state, site, edit), 16))
            for edit in (edits[0][site], Edit())
        )
        channels = where.channel_shape[0]
        found, exact = found.reshape(-1, channels), exact.reshape(-1, channels)
        np.testing.assert_allclose(found.mean(axis=0), exact.mean(axis=0), atol=1e-4)
        raw = engine.site_output(state, site, choices(engine, x, (2,))[name][0][site])
        raw = np.asarray(where.output_columns(raw, 16)).reshape(-1, channels)
        # Ratios are shrunk by their standard error, so the deviation is met less exactly.
        far, near = (np.abs(y.std(axis=0) - exact.std(axis=0)).sum() for y in (raw, found))
        assert near < 0.5 * far


def test_clado_takes_what_the_loss_says():
    model = small_net()
    x, labels = images(model, 6), np.array([0, 1, 2, 0, 1, 2])
    engine = Engine.build(model, 6)
    own = choices(engine, x, BITS)

    def cross_entropy(reference, start):
        return lambda logits: cross_entropy_of(logits, labels[start : start + len(logits)])

    found = pair_sweep(engine, x, own, cross_entropy)
    expected = cross_entropy_of(engine.logits(x), labels).mean()
    assert found.float == pytest.approx(expected, rel=1e-6)
    matrix = coupling_of(found)
    plain = clado(model, x, labels=labels, bits=BITS, psd=False, pair_loss="cross-entropy")
    np.testing.assert_allclose(plain.coupling, matrix, atol=1e-9)
    cut, removed = nearest_psd(matrix)
    projected = clado(model, x, labels=labels, bits=BITS, pair_loss="cross-entropy")
    np.testing.assert_allclose(projected.coupling, cut, atol=1e-9)
    assert projected.notes["removed_mass"] == pytest.approx(removed, abs=1e-6)
    warm = clado(model, x, bits=BITS, psd=False, temperature=4.0)
    p, q = (log_softmax(z, 4.0) for z in (engine.logits(x), engine.logits(x, own["stem"][0])))
    assert warm.values[0, 0] == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-4)


def test_the_psd_step():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(9, 9))
    matrix = matrix + matrix.T
    values = np.linalg.eigvalsh(matrix)
    found, removed = nearest_psd(matrix)
    assert np.linalg.eigvalsh(found).min() > -1e-12 * values.max()
    gone = values[values < 0]
    assert np.linalg.norm(found - matrix) == pytest.approx(np.linalg.norm(gone))
    assert removed == pytest.approx(-gone.sum() / np.abs(values).sum())
    definite = rng.normal(size=(9, 4))
    definite = definite @ definite.T
    same, nothing = nearest_psd(definite)
    assert nothing == 0 and same is definite


def test_activations_are_choices_of_their_own():
    """A column of weight and input bits has both diagonals and their coupling."""
    model = small_net()
    x = images(model, 6)
    (scores,) = score(model, [(logit_coupling, {})], x, bits=BITS, activation_bits=(3, 8))
    layers = len(scores.layers)
    each = len(BITS) + 2
    problem = problem_from(scores.layers, scores, "size=3bit", activation_bits=[3, 8])
    assert problem.bits == (2, 2, 4, 4) and problem.activation_bits == (3, 8, 3, 8)
    rng = np.random.default_rng(0)
    for _ in range(5):
        plan = rng.integers(0, 4, layers)
        rows = np.concatenate(
            [[i * each + k // 2, i * each + 2 + k % 2] for i, k in enumerate(plan)]
        )
        columns = np.arange(layers) * 4 + plan
        assert problem.coupling[np.ix_(columns, columns)].sum() == pytest.approx(
            scores.coupling[np.ix_(rows, rows)].sum()
        )
    table = np.arange(layers * each)
    assert (join(*spread(table, layers, 2)) == table).all()


def test_a_killed_pair_sweep_goes_on_to_the_same_bytes(tmp_path):
    model = mixer()
    x = images(model, 6)
    engine = Engine.build(model, 6, batch_size=4)
    own = choices(engine, x, BITS)
    whole = pair_sweep(engine, x, own, kl)
    steps = []
    pair_sweep(engine, x, own, kl, progress=lambda stage, done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] and sorted(steps) == steps

    class Killed(Exception):
        pass

    for stop in (1, len(steps) // 2, len(steps) - 1):
        seen = []

        def progress(stage, done, total, stop=stop, seen=seen):
            seen.append(done)
            if len(seen) > stop:
                raise Killed

        kept = Checkpoint(tmp_path / str(stop), every=0)
        with pytest.raises(Killed):
            pair_sweep(engine, x, own, kl, checkpoint=kept, progress=progress)
        left = []

        def count(stage, done, total, left=left):
            left.append(done)

        resumed = pair_sweep(engine, x, own, kl, checkpoint=kept, progress=count)
        assert len(left) == len(steps) - stop
        for one, other in zip(whole, resumed, strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_killed_sweep_with_couplings_goes_on_to_the_same_bytes(tmp_path):
    model = mixer()
    x = images(model, 6)
    engine = Engine.build(model, 6, batch_size=4)
    own = choices(engine, x, BITS)

    class Killed(Exception):
        pass

    def run(checkpoint=None, stop=None):
        gram, seen = Gram(len(own) * len(BITS)), []

        def progress(stage, done, total):
            seen.append(done)
            if len(seen) == stop:
                raise Killed

        table = single_layer_sweep(
            engine, x, own, single_kl, grams=[gram], checkpoint=checkpoint, progress=progress
        )
        return table.tobytes() + gram.correlation().tobytes()

    whole = run()
    for stop in (3, len(engine.network.sites), len(engine.network.sites) + 2):
        kept = Checkpoint(tmp_path / str(stop), every=0)
        with pytest.raises(Killed):
            run(kept, stop)
        assert run(kept) == whole


def test_scores_with_couplings_survive_the_file(tmp_path):
    model = small_net()
    x = images(model, 6)
    file = proxyq.score(model, x, proxies="logit-coupling", bits=BITS, activation_bits=[3, 8])
    file.save(tmp_path / "scores.json")
    again = ScoreFile.load(tmp_path / "scores.json").of()
    direct = logit_coupling(model, x, bits=BITS, activation_bits=(3, 8)).coupling
    np.testing.assert_array_equal(direct, direct.T)
    np.testing.assert_array_equal(again.coupling, direct)
    for beside in (None, [8], 8, "float"):
        plan = proxyq.allocate(tmp_path / "scores.json", "size=3bit", activation_bits=beside)
        assert plan.solver.name == "iqp"
    text = (tmp_path / "scores.json").read_text()
    broken = text.replace('"coupling": [', '"coupling": [[1.0], ', 1)
    (tmp_path / "broken.json").write_text(broken)
    with pytest.raises(ProxyqError, match="must have a 'coupling' of"):
        ScoreFile.load(tmp_path / "broken.json")


@pytest.mark.parametrize("beside", [None, 8, "weights", [4, 8]])
@pytest.mark.parametrize("proxy", ["logit-coupling", "auto"])
def test_pins_of_both_bits_go_with_couplings(proxy, beside):
    model = small_net()
    plan = proxyq.search(
        model,
        images(model, 24),
        proxy=proxy,
        pins=["stem=8/4"],
        activation_bits=beside,
        budget="size=3bit",
        bits=(2, 3, 4),
        correction="none",
    )
    stem = plan.layers["stem"]
    assert (stem.weight_bits, stem.activation_bits) == (8, 4)


def test_order_of_activation_bits_in_a_file_is_no_matter(tmp_path):
    model = small_net()
    found = []
    for beside in ([3, 8], [8, 3]):
        file = proxyq.score(
            model, images(model), proxies="logit-coupling", bits=BITS, activation_bits=[3, 8]
        )
        if beside == [8, 3]:  # as another program may write it
            (one,) = file.scores
            matrix = file.of().coupling
            each, layers = 4, len(file.layers)
            order = (np.arange(layers)[:, None] * each + np.array([0, 1, 3, 2])).ravel()
            matrix = matrix[np.ix_(order, order)]
            one = one.model_copy(
                update={
                    "activations": {n: v[::-1] for n, v in one.activations.items()},
                    "coupling": [row[i:].tolist() for i, row in enumerate(matrix)],
                }
            )
            file = file.model_copy(update={"scores": [one], "activation_bits": beside})
        plan = proxyq.allocate(file, ["size=3bit", "bops=60%"], activation_bits=[3, 8])
        found.append((plan.solver.objective, plan.bits()))
    assert found[0][1] == found[1][1] and found[0][0] == pytest.approx(found[1][0])


def test_what_clado_removes_is_told():
    model = small_net()
    plan = proxyq.search(model, images(model), proxy="clado", bits=BITS, budget="size=3bit")
    assert 0 <= plan.predicted["notes"]["removed_mass"] < 1
    with pytest.raises(UsageError, match="`temperature` goes with pair_loss='kl'"):
        clado(model, images(model), bits=BITS, pair_loss="cross-entropy", temperature=2.0)
    with pytest.raises(UsageError, match="`time_budget` is for 'auto'"):
        proxyq.search(model, images(model), proxy="clado", time_budget=1.0)


def test_solvers_that_do_not_couple_say_so():
    model = small_net()
    with pytest.raises(UsageError, match="couples layers, which the solver 'dp' does not take"):
        proxyq.search(model, images(model), proxy="clado", solver="dp", budget="size=3bit")


# -- rows that others measure ----------------------------------------------------------


def test_rows_that_others_measure_give_the_same_table(tmp_path):
    """In any order, over JSON, and after a worker was lost for good."""
    model = mixer()
    x = images(model)
    engine = Engine.build(model, 6, batch_size=4)
    own = choices(engine, x, BITS, (3,))
    inside = beside_each_other(len(BITS), 1)
    asked, lost = [], 5

    def work(rows):
        asked.append(list(rows))
        for place in reversed(range(len(rows))):
            if len(asked) == 1 and len(rows) - place > lost:
                raise ProxyqError("a worker was lost.")
            single, pairs = pair_row(engine, x, own, kl, rows[place], inside=inside)
            yield place, json.loads(json.dumps([float(single), pairs.tolist()]))

    kept = {"inside": inside, "checkpoint": Checkpoint(tmp_path, every=0.0)}
    with pytest.raises(ProxyqError, match="was lost"):
        pairs_by_row(engine, x, own, kl, work, **kept)
    found = pairs_by_row(engine, x, own, kl, work, **kept)
    assert len(asked[0]) - len(asked[1]) == lost
    serial = pair_sweep(engine, x, own, kl, inside=inside)
    for one, other in zip(found, serial, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_pairs_in_several_processes():
    settings = {"proxies": "clado", "bits": BITS, "samples": 24}
    here, there = (
        proxyq.score("digits", executor=how, **settings) for how in ("serial", "process:2")
    )
    one, other = here.of("clado"), there.of("clado")
    # Processes that share the cores split sums in another way.
    scale = np.abs(one.coupling).max()
    np.testing.assert_allclose(other.coupling, one.coupling, atol=1e-6 * scale)


def test_an_executor_without_pairs_is_refused():
    with pytest.raises(UsageError, match="none is asked for"):
        proxyq.score("digits", proxies="sqnr", executor="process:2")
    with pytest.raises(UsageError, match="`model` must be text"):
        proxyq.score(mixer(), proxies="clado", executor="process:2")
