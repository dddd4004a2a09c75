"""Evolution: operators keep types and limits, runs come again, and what is planted is found."""

import base64
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save, save_file
from scipy.stats import spearmanr

import proxyq
from proxyq import api
from proxyq.api.measured import load_table
from proxyq.checkpoint import Checkpoint
from proxyq.cli import main
from proxyq.errors import ProxyqError, UsageError
from proxyq.executor import executor
from proxyq.proxies.formula import (
    Formula,
    Statistics,
    canonical,
    evaluate,
    grow,
    parse_formula,
    totals,
)
from proxyq.search.evolve import STRUCTURES, Fold, evolve, settings
from proxyq.search.evolve.choose import choose, split
from proxyq.search.evolve.evaluator import arrays_of, evaluator, folds_of
from proxyq.search.evolve.fitness import correlation, ranks, top_k, with_bits
from proxyq.search.evolve.hall import Hall
from proxyq.search.evolve.individual import Individual
from proxyq.search.evolve.operators import MUTATIONS, Trees, crossover, mutate
from proxyq.search.evolve.screen import Measured, measure
from proxyq.search.evolve.selection import PARENTS, SURVIVORS, parents, survivors
from proxyq.search.evolve.structures import structure

LEAVES = ("W", "G", "D", "A", "bits", "macs")
BITS = (2, 3, 4)


def drawn_fold(seed, planted="norm(G) * sum(square(D)) / macs", *, plans=40, again=False):
    """A network of drawn layers, and plans whose accuracy is minus a formula's score."""
    rng = np.random.default_rng(seed)
    layers = {}
    for i in range(8):
        shape = (int(rng.integers(4, 16)), int(rng.integers(4, 9)))
        w = rng.normal(size=shape) * rng.lognormal()
        rounding = [rng.normal(size=shape) * np.abs(w).max() * 2.0 ** (1 - b) for b in BITS]
        layers[f"l{i}"] = {
            "W": w,
            "G": rng.normal(size=shape) * rng.lognormal(),
            "D": np.stack(rounding),
            "A": rng.normal(size=20) * rng.lognormal(),
            "macs": float(rng.integers(100, 10_000)),
        }
    statistics = Statistics.build(layers, BITS, entries=40 if again else None)
    choices = rng.integers(0, len(BITS), (plans, len(layers)))
    (values,) = evaluate([parse_formula(planted)], statistics)
    return Fold(
        name=f"drawn{seed}",
        statistics=statistics,
        choices=choices,
        accuracy=-totals(values, choices, "sum"),
        again=Statistics.build(layers, BITS, entries=40, seed=1) if again else None,
    )


@pytest.fixture(scope="module")
def folds():
    return [drawn_fold(0), drawn_fold(1, plans=30)]


def small(method="default", **changes):
    given = {"leaves": LEAVES, "population": 40, "children": 40, "evaluations": 240, **changes}
    if method == "emq":
        given = {"leaves": ("W", "G", "D", "A"), "evaluations": 240, **changes}
    return settings(method, **given)


def texts(state):
    return [(one.formula, one.fitness) for one in state.hall.everyone]


# -- operators ------------------------------------------------------------------------


def test_operators_keep_types_and_limits():
    rng, trees = random.Random(0), Trees(leaves=LEAVES, nodes=20, levels=6)
    pool = [grow(rng, most=5, leaves=LEAVES, nodes=20) for _ in range(60)]
    changed = dict.fromkeys(MUTATIONS, 0)
    for _ in range(300):
        one, other = rng.choice(pool), rng.choice(pool)
        for child in (crossover(rng, one, other, trees), mutate(rng, one, trees)):
            assert child.type == "layer" and trees.allow(child)
            assert set(child.leaves) <= set(LEAVES)
        for kind in MUTATIONS:
            child = kind(rng, one, trees)
            assert child.type == "layer"
            changed[kind] += child != one
    # Most have something to change in most trees; constants are rare.
    assert all(count > 20 for count in changed.values()), changed


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_give_valid_formulas(name):
    rng, own = random.Random(1), structure(name, LEAVES)
    genes = [own.grow(rng) for _ in range(100)]
    for one, other in itertools.pairwise(genes):
        child = own.mutate(rng, own.cross(rng, one, other))
        node = with_bits(own.node(child))
        assert node.type == "layer" and node.depends_on_bits
        assert parse_formula(str(node)) == node
        assert own.read(json.loads(json.dumps(own.write(child)))) == child


def test_slots_cross_and_mutate_as_emq_says():
    rng, tree = random.Random(2), structure("tree", LEAVES)
    genes = tree.grow(rng)
    assert all(tree.cross(rng, genes, genes) == genes for _ in range(20))
    kept = [np.equal(tree.mutate(rng, genes), genes) for _ in range(2000)]
    # A slot that is drawn anew has the old name again now and then: 1/21 of the unaries.
    assert np.mean(kept, axis=0)[2:6] == pytest.approx(0.5 + 0.5 / 21, abs=0.06)
    one, other = ("W", "G", "log", "abs", "exp", "sqrt", "add"), ("D", "A", *("neg",) * 4, "mul")
    child = [np.equal(tree.cross(rng, one, other), one) for _ in range(2000)]
    assert np.mean(child, axis=0) == pytest.approx([0.5] * 6 + [0.2], abs=0.05)


@pytest.mark.parametrize(
    ("name", "genes", "text"),
    [
        ("tree", "V W abslog softmax relu sqrt mul", "mean(softmax(abslog(V)) * sqrt(relu(W)))"),
        ("tree", "W A keep keep keep keep add", "mean(W) + mean(A)"),
        ("tree", "W G norm softmax keep keep mul", "mean(norm(W) * G)"),
        ("chain", "G abs log mean std", "mean(log(abs(G)))"),
        (
            "graph",
            "W G keep abs keep keep exp log neg keep keep",
            "mean(W + abs(G)) + mean(W + G + exp(W + abs(G)))"
            " + mean(log(W) + -G + (W + abs(G)) + (W + G + exp(W + abs(G))))",
        ),
    ],
)
def test_slots_stand_for_formulas(name, genes, text):
    found = structure(name, ("W", "G", "V", "A")).node(tuple(genes.split()))
    assert found == parse_formula(text)


# -- fitness --------------------------------------------------------------------------


def test_ranks_and_correlations_are_scipys():
    rng = np.random.default_rng(3)
    for _ in range(30):
        a, b = rng.integers(0, 6, 25) * 0.1, rng.normal(size=25).round(1)
        assert correlation(ranks(a), ranks(b)) == pytest.approx(spearmanr(a, b)[0], abs=1e-14)
    assert correlation(ranks(np.ones(5)), ranks(np.arange(5.0))) == 0
    # What is apart by rounding is a tie, at any size.
    for size in (1e-300, 1.0, 1e300):
        wobbly = size * np.array([0.3, 0.1 + 0.2, 0.5, -0.3])
        assert ranks(wobbly).tolist() == [0, 0, 3, -3]


def test_top_k_is_among_the_plans_that_are_liked():
    predicted, accuracy = ranks(np.arange(20.0)), np.arange(20.0)
    accuracy[16:] = accuracy[16:][::-1]
    # The first 4 are in reverse, of the first 10 those again.
    wanted = np.mean([spearmanr(np.arange(k), accuracy[-k:])[0] for k in (4, 10, 20)])
    assert top_k(predicted, ranks(accuracy)) == pytest.approx(wanted, abs=1e-12)


def test_a_formula_without_bits_is_weighted_by_them(folds):
    node = with_bits(parse_formula("l1(G)"))
    assert node == canonical(parse_formula("bits * l1(G)"))
    (found,) = measure([node], folds[:1])
    (values,) = evaluate([parse_formula("l1(G)")], folds[0].statistics)
    score = (np.array(BITS)[folds[0].choices] * values).sum(axis=1)
    assert found.sign == 1
    assert found.fitness == pytest.approx(spearmanr(score, folds[0].accuracy)[0])


def test_the_sign_is_one_for_all_tables(folds):
    flipped = replace(folds[1], accuracy=-folds[1].accuracy)
    planted = parse_formula("norm(G) * sum(square(D)) / macs")
    (found,) = measure([planted], folds)
    assert (found.sign, found.folds) == (-1, (1.0, 1.0))
    (torn,) = measure([planted], [folds[0], flipped])
    assert torn.folds == (1.0, -1.0) and torn.fitness == 0


def test_the_screen_rejects_and_knows_what_behaves_alike():
    fold = drawn_fold(5, again=True)
    names = (
        *(
            "exp(80 + abs(A)) * exp(80 + bits) * exp(80) * exp(80) * exp(80) * exp(80) * exp(80)"
            " * exp(80) * exp(80) * exp(80)",
            "macs * 0 + bits * 0",
            "sum(invert(D))",
        ),
        *("sum(D * D)", "-sum(D * D)"),
    )
    found = measure([with_bits(parse_formula(text)) for text in names], [fold])
    assert found[:2] == ["not finite", "too few values"]
    assert found[2] == "unstable"
    assert isinstance(found[3], Measured) and found[3].behaviour == found[4].behaviour
    assert (found[3].sign, found[4].sign) == (-1, 1)


def test_what_keeps_divisions_finite_must_not_decide():
    fold = drawn_fold(5)
    sparse = np.maximum(fold.statistics.leaves["A"], 0)
    sparse[:20] = 1.0  # the first layer reads no zeros
    statistics = replace(fold.statistics, leaves={**fold.statistics.leaves, "A": sparse})
    fold = replace(fold, statistics=statistics)
    counted = "bits * sum(sigmoid(invert(A)))"  # of zeros, whatever they are divided by
    names = ("bits * std(invert(A))", "bits * mean(1 / square(A))", counted)
    found = measure([parse_formula(text) for text in names], [fold])
    assert found[:2] == ["by the guard", "by the guard"]
    assert isinstance(found[2], Measured)


def test_more_bits_must_not_be_worse_in_any_layer():
    fold = drawn_fold(5)
    names = ("sum(D * D)", "sum(D * D) * (macs - 5000)", "bits * (macs - 5000)", "bits * macs")
    found = measure([parse_formula(text) for text in names], [fold])
    assert found[1:3] == ["not monotone", "not monotone"]
    assert isinstance(found[0], Measured) and isinstance(found[3], Measured)


def test_tables_go_to_workers_and_back():
    fold = drawn_fold(5, again=True)
    (same,) = folds_of(arrays_of([fold]))
    nodes = [with_bits(grow(random.Random(i), leaves=LEAVES)) for i in range(30)]
    assert measure(nodes, [same]) == measure(nodes, [fold])
    # Alone or with others, whose parts it shares: the same to the last bit.
    assert measure(nodes, [fold]) == [measure([node], [fold])[0] for node in nodes]


@pytest.mark.slow
def test_workers_stay_for_several_lots(folds):
    nodes = [with_bits(grow(random.Random(i), leaves=LEAVES)) for i in range(70)]
    wanted = measure(nodes, folds)
    with evaluator(folds, "spearman", executor("process:2")) as evaluate:
        assert evaluate(nodes) == wanted
        assert evaluate(nodes[:3]) == wanted[:3]
    setup = {
        "tables": base64.b64encode(save(arrays_of(folds))).decode(),
        "objective": "spearman",
    }
    texts = [[str(node)] for node in nodes]
    with executor("process:2").session("proxyq.search.evolve.evaluator:worker", setup) as work:
        next(started := work(texts))
        started.close()  # answers that nobody awaits must not come later
        answers = dict(work(texts[:4]))
    own = [answers[i][0] for i in range(4)]
    assert [one if isinstance(one, str) else one[0] for one in own] == [
        one if isinstance(one, str) else one.fitness for one in wanted[:4]
    ]


# -- selection ------------------------------------------------------------------------


def people(count, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        order = tuple(ranks(rng.normal(size=9)).tolist())
        one = Measured(round(float(rng.random()), 2), (0.0,), 1, order)
        size = int(rng.integers(1, 9))
        found.append(Individual(genes=str(i), formula=f"W * {i}", size=size, measured=one))
    return sorted(found, key=lambda one: one.order)


@pytest.mark.parametrize("how", SURVIVORS)
def test_the_best_live_on(how):
    old, new = people(20), people(10, seed=1)
    kept = survivors(old, new, 20, how)
    assert len(kept) == 20 and kept == sorted(kept, key=lambda one: one.order)
    best = min([*old, *new], key=lambda one: one.order)
    assert kept[0].fitness == best.fitness
    if how == "nsga2":
        shortest = min(one.size for one in [*old, *new])
        assert min(one.size for one in kept) == shortest
    if how == "worst-out":
        assert all(one in kept for one in new)


@pytest.mark.parametrize("how", PARENTS)
def test_parents_are_better_than_most(how):
    rng, living = random.Random(4), people(40)
    firsts = [living.index(parents(rng, living, how)[0]) for _ in range(200)]
    assert np.mean(firsts) < 12
    if how.startswith("top"):
        assert max(firsts) < 20


def test_the_hall_keeps_one_of_those_alike():
    living = people(30)
    hall = Hall(5, living)
    assert hall.best == tuple(living[:5])
    shorter = replace(living[0], size=0, formula="W")
    hall.add(shorter)
    assert hall.best[0] == shorter and living[0] not in hall.best
    sizes, fitness = zip(*((one.size, one.fitness) for one in hall.front), strict=True)
    assert list(sizes) == sorted(set(sizes)) and list(fitness) == sorted(fitness)
    fitter = replace(living[3].measured, fitness=2.0, sign=-1)
    hall.add(replace(living[3], formula="G", measured=fitter))
    assert hall.best[0].formula == "G" and living[3] not in hall.best
    own = structure("chain", ("W",))
    again = Hall.from_json(json.loads(json.dumps(hall.to_json(own))), 5, own)
    assert again.to_json(own) == hall.to_json(own)


# -- runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["default", "emq", "random"])
def test_the_best_never_falls_and_runs_come_again(folds, method):
    state = evolve(folds, small(method))
    best = [row["best"] for row in state.logbook if row["best"] is not None]
    assert best == sorted(best) and state.evaluations == 240
    assert state.logbook[-1]["evaluations"] == 240
    assert texts(evolve(folds, small(method))) == texts(state)
    assert texts(evolve(folds, small(method, seed=1))) != texts(state)


def test_what_is_planted_is_found_and_not_by_luck(folds):
    found = {}
    for method in ("default", "random"):
        runs = [evolve(folds, small(method, evaluations=1200, seed=s)) for s in range(3)]
        found[method] = [state.hall.best[0].fitness for state in runs]
    assert np.mean(found["default"]) > np.mean(found["random"]) + 0.02, found
    assert max(found["default"]) > 0.97, found


@pytest.mark.parametrize(("method", "restarts"), [("default", 2), ("emq", 0)])
def test_a_run_that_stops_goes_on_to_the_same_end(folds, tmp_path, method, restarts):
    rules = small(method, patience=1, restarts=restarts)
    whole = evolve(folds, rules)
    kept = Checkpoint(tmp_path / "run", every=0.0)

    def stop(stage, done, total):
        if done >= 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolve(folds, rules, checkpoint=kept, progress=stop)
    steps = []
    again = evolve(folds, rules, checkpoint=kept, progress=lambda *step: steps.append(step[1]))
    assert 80 < min(steps) <= 121  # what was kept before the stop was not done again
    assert json.dumps(again.to_json(rules.space())) == json.dumps(whole.to_json(rules.space()))
    assert (whole.restarts > 0) == (restarts > 0)


def test_a_small_space_is_used_up(folds, monkeypatch):
    monkeypatch.setattr("proxyq.search.evolve.structures.CHAIN", 1)
    state = evolve(folds, small(structure="chain", leaves=("W", "D"), fresh=0.5))
    assert state.finished and 20 < state.evaluations <= 38


def test_plans_without_differences_are_told(folds):
    flat = replace(folds[0], choices=np.zeros_like(folds[0].choices))
    with pytest.raises(ProxyqError, match="none of 80 formulas"):
        evolve([flat], small(evaluations=80))


def test_the_choice_is_the_shortest_that_is_as_good(folds):
    state = evolve(folds, small())
    first, last = split(40, 0.25, 0, 0)
    assert sorted([*first, *last]) == list(range(40)) and len(last) == 10
    hall = state.hall.everyone
    place, entries = choose(hall, folds, [folds[1]], seed=0)
    means = [np.mean(entry.validation) for entry in entries]
    assert hall[place].size <= hall[int(np.argmax(means))].size
    assert means[place] > max(means) - 0.2
    assert entries[0].holdout == pytest.approx(
        [abs(hall[0].measured.folds[1])]
    )  # the same plans: what the evolution saw
    assert choose(hall, [], [], seed=0)[0] == 0


def test_wrong_settings_are_told():
    for wrong, message in (
        ({"method": "emk"}, "did you mean 'emq'"),
        ({"structure": "forest"}, "unknown structure"),
        ({"objective": "kendall"}, "unknown objective"),
        ({"population": 1}, "`population` must be at least 2"),
        ({"leaves": ("W", "Q")}, "unknown statistic 'Q'"),
        ({"leaves": ("bits",)}, "at least one statistic of weights or activations"),
        ({"populations": 9}, "did you mean 'population'"),
        ({"crossover": 2.0}, "`crossover` must be from 0 to 1"),
    ):
        with pytest.raises(UsageError, match=message):
            settings(**wrong)


# -- the command ----------------------------------------------------------------------

RUN = ("evolve", "--table", "digits", "--leaves", "W,D,G,bits", "--entries", "256")
RUN = (*RUN, "--evaluations", "600", "--population", "40")


def run(folder, *options, cache, kill=False, **environment):
    """`proxyq evolve` in a process of its own, killed when it has kept its first state."""
    folder.mkdir(exist_ok=True)
    files = ("--out", str(folder / "found.json"), "--logbook", str(folder / "log.json"))
    process = subprocess.Popen(
        [sys.executable, "-m", "proxyq", *RUN, *options, *files, "--cache-dir", str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PROXYQ_CHECKPOINT_SECONDS": "0", **environment},
    )
    if kill:
        while not list(cache.rglob("evolution.safetensors")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return None
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, (folder / "found.json").read_bytes(), (folder / "log.json").read_bytes()


def test_hash_seeds_processes_and_kills_change_no_byte(tmp_path):
    cache = tmp_path / "cache"
    first = run(tmp_path / "a", cache=cache, PYTHONHASHSEED="0")
    shutil.rmtree(cache / "scores")  # all but what is compiled
    other = {"cache": cache, "PYTHONHASHSEED": "1"}
    run(tmp_path / "b", kill=True, **other)
    assert not (tmp_path / "b" / "found.json").exists()
    assert run(tmp_path / "b", "--executor", "process:2", **other) == first
    # What was found is a proxy by the name of its file.
    file = tmp_path / "a" / "found.json"
    (scores,) = [proxyq.score(proxies=str(file)).of("formula:found")]
    assert scores.values.shape[0] == 12
    formula = Formula.load(file)
    assert formula.node.depends_on_bits
    assert formula.origin["settings"]["seed"] == 0 and formula.origin["fitness"] > 0.6


def test_holdouts_decide_nothing(tmp_path):
    table = load_table("digits")
    worse = [plan.model_copy(update={"top1": 100 - plan.top1}) for plan in table.plans]
    turned = table.model_copy(update={"plans": worse})
    given = {"evaluations": 80, "population": 40, "leaves": ("W", "D", "bits"), "entries": 64}
    alone = api.evolve(table, **given)
    beside = api.evolve(table, [turned], **given)
    same = [entry.individual for entry in alone.entries]
    assert [entry.individual for entry in beside.entries] == same
    assert beside.chosen == alone.chosen and beside.logbook == alone.logbook
    assert all(entry.holdout[0] is not None for entry in beside.entries)
    assert beside.best.holdout[0] < 0 < beside.best.validation[0]


def test_the_command_shows_draws_and_prints(tmp_path, capsys):
    small = ["--evaluations", "80", "--population", "40", "--leaves", "W,D", "--no-cache"]
    plot = tmp_path / "run.svg"
    assert main(["evolve", "--table", "digits", *small, "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "held back" in out and "* written" in out
    assert max(map(len, out.splitlines())) <= 88
    assert plot.read_bytes().startswith(b"<?xml")
    assert main(["evolve", "--table", "digits", *small, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["schema"] == "proxyq/evolution/1" and len(record["logbook"]) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "give the measured plans (--table TABLE.json)"),
        (["--table", "digits", "--method", "emk"], "unknown method 'emk'"),
        (["--table", "digits", "--structure", "bush"], "unknown structure 'bush'"),
        (["--table", "digits", "--leaves", "W,Q"], "unknown statistic 'Q'"),
        (["--table", "digits", "--table", "digits"], "given twice"),
        (["--table", "digits", "--validation", "1.5"], "`validation` must be a share"),
        (["--table", "digits", "--validation", "0.01"], "held back"),
        (["--table", "digits", "--executor", "threads"], "`executor` must be"),
        (["--table", "digits", "--out", "found.txt"], "ends in .json"),
        (["--table", "digits", "--out", "-x.json"], "--out names the formula '-x'"),
        (["--table", "digits", "--entries", "0"], "--entries must be at least 1"),
        (["--table", "digits", "--evaluations", "0"], "`evaluations` must be at least 1"),
        (["--table", "digits", "--data", "digits", "--data", "digits"], "--data) must be given"),
    ],
)
def test_wrong_use_is_one_sentence(options, sentence, capsys):
    assert main(["evolve", "--no-cache", *options]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.startswith("proxyq: ") and err.count("\n") == 1


FACTORY = """
import jax.numpy as jnp
import numpy as np
from proxyq import from_function

def narrow():
    rng = np.random.default_rng(0)
    params = {f"layer{i}/w": rng.normal(size=(6, 6)).astype("float32") for i in range(4)}

    def apply(params, x):
        x = x.mean((1, 3))
        for i in range(4):
            x = jnp.tanh(x @ params[f"layer{i}/w"])
        return x

    return from_function(apply, params, (6, 6, 1), name="narrow")
"""


def test_networks_are_loaded_as_their_tables_say(tmp_path, capsys):
    code, own = tmp_path / "net.py", tmp_path / "narrow.safetensors"
    code.write_text(FACTORY)
    model = proxyq.load_model(f"{code}:narrow")
    changed = {name: np.asarray(value) * 2 for name, value in model.params.items()}
    save_file(changed, own)
    rng = np.random.default_rng(1)
    images = rng.random((64, 6, 6, 1)).astype("float32")
    np.savez(tmp_path / "x.npz", images=images, labels=rng.integers(0, 6, 64))
    spec = api.ModelSpec(
        name=f"{code}:narrow", weights=str(own), preprocessing={"mean": (0.3,), "std": (0.2,)}
    )
    data = str(tmp_path / "x.npz")
    api.table(spec, data, data, plans=40, bits=(2, 3, 4, 8)).save(tmp_path / "t.json")
    given = ["--table", str(tmp_path / "t.json"), "--holdout", "digits", "--evaluations", "60"]
    given += ["--population", "30", "--leaves", "W,D,A", "--no-cache", "--json"]
    # A table is data: it does not decide which code is run.
    assert main(["evolve", *given, "--data", data, "--data", "digits"]) == 2
    assert "name the file if you trust it (--code FILE.py)" in capsys.readouterr().err
    moved = tmp_path / "elsewhere" / "net.py"
    moved.parent.mkdir()
    code.rename(moved)
    given += ["--code", str(moved)]
    record = json.loads((tmp_path / "t.json").read_text())
    for name in (f"{code}", f"x:{code}", f"{moved}:", "elsewhere/net.py:a.b", "no-such:model"):
        text = json.dumps({**record, "model": {**record["model"], "spec": name}})
        (tmp_path / "o.json").write_text(text)
        other = ["evolve", "--table", str(tmp_path / "o.json"), "--no-cache", "--data", data]
        assert main([*other, "--code", str(moved)]) == 2
        assert "name the file if you trust it" in capsys.readouterr().err
    assert main(["evolve", *given, "--data", data, "--data", "digits"]) == 2
    assert "is of another network" in capsys.readouterr().err  # the factory's own weights
    given += ["--weights", str(tmp_path / "{}.safetensors")]
    assert main(["evolve", *given, "--data", data, "--data", "digits"]) == 0
    record = json.loads(capsys.readouterr().out)
    (table,), (holdout,) = record["tables"], record["holdouts"]
    assert (table["model"]["name"], holdout["model"]["name"]) == ("narrow", "digits")
    assert len(record["entries"][0]["holdout_by_table"]) == 1
    # Images are prepared for each network as they were when its table was measured.
    images = {"data": [data, "digits"], "evaluations": 60, "population": 30, "leaves": ("W", "A")}
    settings = {**images, "code": str(moved), "weights": str(tmp_path / "{}.safetensors")}
    files = ([str(tmp_path / "t.json")], ["digits"])
    found = api.evolve(*files, **settings)
    models = [replace(spec, name=f"{moved}:narrow"), api.ModelSpec(name="digits")]
    assert found.to_json() == api.evolve(*files, models=models, **images).to_json()
    loading = api.ModelSpec(preprocessing={"std": (0.4,)})
    other = api.evolve(*files, loading=loading, **settings)
    assert [one.holdout for one in other.entries] != [one.holdout for one in found.entries]


def test_a_table_of_another_network_is_told(tmp_path, capsys):
    table = load_table("digits")
    other = table.model_copy(update={"model": {**table.model, "digest": "0" * 64}})
    other.save(tmp_path / "other.json")
    assert main(["evolve", "--no-cache", "--table", str(tmp_path / "other.json")]) == 2
    assert "is of another network" in capsys.readouterr().err


def test_plans_of_one_accuracy_are_refused(tmp_path, capsys):
    table = load_table("digits")
    flat = [plan.model_copy(update={"top1": 10.0}) for plan in table.plans]
    table.model_copy(update={"plans": flat}).save(tmp_path / "flat.json")
    assert main(["evolve", "--no-cache", "--table", str(tmp_path / "flat.json")]) == 2
    assert "1 different accuracies" in capsys.readouterr().err
