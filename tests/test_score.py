"""Scores in a file, bits from it without the model, and what the cache and a kill do to them."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commandline import alone, here
from networks import mixer, small_net

import proxyq
from proxyq import api
from proxyq.engine.engine import Engine
from proxyq.errors import ProxyqError, UsageError
from proxyq.proxies import PROXIES, Cache, Result, as_cost, make_proxy
from proxyq.search.allocate.plan import Plan
from proxyq.search.scores_file import ScoreFile

THREE = ("orthogonality", "sqnr", "activation-mse")


@pytest.fixture(scope="module")
def scored() -> ScoreFile:
    """Three proxies of the embedded network: an importance, a cost, one of activations too."""
    return api.score(proxies=THREE, samples=32, activation_bits=(4, 8))


def without_seconds(plan: Plan) -> dict:
    record = json.loads(plan.to_json())
    del record["solver"]["seconds"]
    return record


# -- the file --------------------------------------------------------------------------


def test_the_file_holds_what_was_measured_to_the_last_digit(scored: ScoreFile, tmp_path: Path):
    scored.save(tmp_path / "scores.json")
    again = ScoreFile.load(tmp_path / "scores.json")
    assert again == scored and again.to_json() == scored.to_json()
    assert again.network_layers() == proxyq.inspect().layers
    assert again.same_feature == [
        ["blocks.2.conv2", "blocks.2.shortcut"],
        ["blocks.3.conv2", "blocks.3.shortcut"],
    ]
    for name in THREE:
        first, second = scored.of(name), again.of(name)
        assert first.values.dtype == second.values.dtype == np.float64
        assert np.array_equal(first.values, second.values)
    mse = again.of("activation-mse")
    assert mse.activations is not None and mse.activations.shape == (12, 2)
    assert again.of("sqnr").activations is None
    assert "seconds" not in scored.to_json()
    assert again.provenance["data"]["name"] == "digits:calibration" and again.samples == 32


def test_scores_are_those_of_the_proxy(scored: ScoreFile):
    model = proxyq.load_model()
    inputs = api.inputs_of(api.as_data(None, model), model, 32, None)
    alone = PROXIES.get("orthogonality")(model, inputs)
    np.testing.assert_allclose(scored.of("orthogonality").values, alone.values, rtol=1e-6)
    errors = scored.errors()
    assert errors is not None and errors.squared.shape == (12, 4)
    weights = np.asarray(model.params["head.kernel"], np.float64)
    assert errors.energy[-1] == pytest.approx((weights**2).sum(), rel=1e-6)


def test_only_importances_need_rounding_errors():
    file = api.score(proxies="sqnr")
    assert file.weight_errors is None and file.samples == 0
    assert "data" not in file.provenance


def test_proxies_with_options_records_and_all(monkeypatch: pytest.MonkeyPatch):
    sqnr = PROXIES.get("sqnr")
    asked = [("orthogonality", {"beta": 2.0}), sqnr, (PROXIES.get("params"), {})]
    file = api.score(proxies=asked, samples=16)
    assert file.proxies == ("orthogonality", "sqnr", "params")
    assert file.record("orthogonality").options["beta"] == 2.0
    with pytest.raises(UsageError, match="given twice"):
        api.score(proxies=["sqnr", sqnr])
    with pytest.raises(UsageError, match="at least one proxy"):
        api.score(proxies=[])
    with pytest.raises(UsageError, match="pairs of either"):
        api.score(proxies=[3])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="calibration images are needed by 'kl-delta'"):
        api.score(small_net(), proxies=["sqnr", "kl-delta"])


def test_all_leaves_out_what_trains_and_what_cannot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def nowhere(taps, *, key):
        del key
        return np.full(len(taps), np.nan)

    record = {"passes": "none", "reference": "here"}
    broken = make_proxy(nowhere, needs=("weight",), **record)
    fixed = {"batch_norm": "batch"}  # the statistics of a batch, where there is no batch norm
    batch = make_proxy(nowhere, name="batch", needs=("pooled",), fixed=fixed, **record)
    few = {name: PROXIES.get(name) for name in ("sqnr", "orthogonality", "limpq")}
    monkeypatch.setattr(PROXIES, "_records", {**few, "nowhere": broken, "batch": batch})
    model = mixer()
    x = np.random.default_rng(0).normal(size=(16, *model.input_shape)).astype(np.float32)
    with caplog.at_level(logging.INFO, "proxyq"):
        file = api.score(model, x, proxies="all")
    assert file.proxies == ("sqnr", "orthogonality")
    assert "left out nowhere: the proxy 'nowhere' gives nan for layer" in caplog.text
    assert "left out batch: the model" in caplog.text
    with pytest.raises(ProxyqError, match="gives nan for layer"):
        api.score(model, x, proxies=["sqnr", broken])
    monkeypatch.setattr(PROXIES, "_records", {"nowhere": broken})
    with pytest.raises(ProxyqError, match="gives nan for layer"):
        api.score(model, x, proxies="all")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schema": "proxyq/scores/7"}, "'proxyq/scores/7', which this version does not read"),
        ({"schema": "proxyq/plan/1"}, "holds no scores"),
        ({"bits": [2, 3]}, "must be 2 finite numbers"),
        ({"bits": [2, 3, 4, 12]}, "'bits': a bit-width"),
        ({"layers": {}}, "'layers'"),
        ({"scores": []}, "'scores'"),
        ({"rounding": {"method": "best"}}, "'rounding': `method` of the rounding"),
        ({"activation_bits": "many"}, "'activation_bits': must be a bit-width"),
        ({"weight_errors": None}, "need 'weight_errors'"),
        ({"same_feature": [["nobody"]]}, "'nobody', which is not there"),
        ({"extra": 1}, "no such field is known"),
        ({"samples": -1}, "'samples'"),
    ],
)
def test_wrong_files_are_told_in_a_sentence(scored: ScoreFile, change: dict, text: str):
    data = {**json.loads(scored.to_json()), **change}
    with pytest.raises(ProxyqError) as caught:
        ScoreFile.from_json(data)
    assert text in str(caught.value) and caught.value.exit_code == 1
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("proxy", "value", "text"),
    [
        (0, None, "must be a finite number of at least 0 for the layer 'stem', got None"),
        (0, -1.0, "must be a finite number of at least 0 for the layer 'stem', got -1.0"),
        (0, True, "got True"),
        (0, 1e200, "got 1e+200"),
        (1, [1.0, 2.0], "must be 4 finite numbers for the layer 'stem'"),
        (1, [1.0, 2.0, "x", 3.0], "must be 4 finite numbers for the layer 'stem'"),
    ],
)
def test_wrong_scores_name_layer_and_proxy(scored: ScoreFile, proxy: int, value, text: str):
    data = json.loads(scored.to_json())
    data["scores"][proxy]["values"]["stem"] = value
    with pytest.raises(ProxyqError, match=THREE[proxy]) as caught:
        ScoreFile.from_json(data)
    assert text in str(caught.value)


# -- bits from scores ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"proxy": "orthogonality", "budget": "size=3bit"},
        {"proxy": "orthogonality", "budget": "size=3bit", "cost": "times-dw2"},
        {"proxy": "sqnr", "budget": ["size=20KiB", "bops=90M"], "activation_bits": 8},
        {"proxy": "sqnr", "budget": "bops=50%", "activation_bits": "weights"},
        {"proxy": "activation-mse", "budget": ["size=60%", "bops=40M"], "activation_bits": [4, 8]},
        {
            "proxy": "orthogonality",
            "budget": "size=4bit",
            "pins": ["stem=8", "@last=8"],
            "ties": ["blocks.0.*"],
            "candidates": ["blocks.3.*=4,8"],
            "solver": "greedy",
            "correction": "none",
        },
    ],
)
def test_the_plan_is_the_one_of_search(options: dict):
    options = dict(options)
    proxy, beside = options.pop("proxy"), options.pop("activation_bits", None)
    plan = api.search(proxy=proxy, samples=32, seed=2, activation_bits=beside, **options)
    file = api.score(proxies=proxy, samples=32, seed=2, activation_bits=beside)
    budget = options.pop("budget")
    ours = api.allocate(file, budget, **options)
    assert without_seconds(ours) == without_seconds(plan)


def test_one_file_serves_every_question(scored: ScoreFile, tmp_path: Path):
    file = scored.save(tmp_path / "scores.json")
    plan = api.allocate(file, "size=3bit", proxy="sqnr", activation_bits="float")
    assert plan.layers["stem"].activation_bits is None
    chosen = api.allocate(file, "bops=20M", proxy="activation-mse")
    assert {layer.activation_bits for layer in chosen.layers.values()} == {4, 8}
    four = api.allocate(file, "bops=20M", proxy="activation-mse", activation_bits=[4])
    assert {layer.activation_bits for layer in four.layers.values()} == {4}
    tied = api.allocate(
        file,
        "size=3bit",
        proxy="orthogonality",
        activation_bits=8,
        ties=["same-feature", "same-input"],
    ).bits()
    assert tied["blocks.3.conv1"] == tied["blocks.3.shortcut"] == tied["blocks.3.conv2"]
    with pytest.raises(UsageError, match="several proxies: name one of orthogonality, sqnr"):
        api.allocate(file, "size=3bit")
    with pytest.raises(UsageError, match="no scores of 'sqnrr': did you mean 'sqnr'"):
        api.allocate(file, "size=3bit", proxy="sqnrr")
    with pytest.raises(UsageError, match="no cost of 6 activation bits, only of 4, 8"):
        api.allocate(file, "size=3bit", proxy="activation-mse", activation_bits=[4, 6])
    with pytest.raises(UsageError, match="tells nothing of activations"):
        api.allocate(file, "size=3bit", proxy="sqnr")
    with pytest.raises(UsageError, match="gives a cost for each bit-width already"):
        api.allocate(file, "size=3bit", proxy="sqnr", cost="exponential", activation_bits=8)
    with pytest.raises(UsageError, match="at least one budget"):
        api.allocate(file, [], proxy="sqnr")


def test_a_plugin_that_is_gone_can_still_be_allocated(scored: ScoreFile):
    data = json.loads(scored.to_json())
    data["scores"][0]["proxy"] = "from-elsewhere"
    data["activation_bits"] = None
    for one in data["scores"]:
        one["activations"] = None
    file = ScoreFile.from_json(data)
    plan = api.allocate(file, "size=3bit", proxy="from-elsewhere")
    costs = as_cost(file.of("from-elsewhere"))
    column = {bits: index for index, bits in enumerate(file.bits)}
    total = sum(costs[i, column[bits]] for i, bits in enumerate(plan.bits().values()) if bits)
    assert plan.solver is not None and plan.solver.objective == pytest.approx(total)


def test_latency(scored: ScoreFile, tmp_path: Path):
    layers = {
        name: [
            {"weight_bits": b, "activation_bits": 8, "seconds": layer.macs * b * 1e-10}
            for b in scored.bits
        ]
        for name, layer in scored.layers.items()
    }
    table = tmp_path / "latency.json"
    table.write_text(json.dumps({"schema": "proxyq/latency/1", "layers": layers}))
    scored.save(tmp_path / "scores.json")
    words = ("--budget", "latency=0.3ms", "--activation-bits", "8", "--latency-table", table)
    done = here("allocate", tmp_path / "scores.json", "--proxy", "sqnr", *words)
    assert done.code == 0, done.err
    assert "latency: " in done.out and "by the latency table: all 12 layers" in done.out
    share = here(
        *("allocate", tmp_path / "scores.json", "--proxy", "sqnr", "--budget", "latency=50%"),
        *("--activation-bits", "8", "--latency-table", table, "--out", tmp_path / "plan.json"),
    )
    assert "the way from 0.1623 ms (0 %) to 0.6491 ms (100 %)" in share.out, share.out
    searched = here("search", "--proxy", "sqnr", *words, "--json")
    assert searched.code == 0, searched.err
    ours = json.loads(
        here("allocate", tmp_path / "scores.json", "--proxy", "sqnr", *words, "--json").out
    )
    assert ours["layers"] == json.loads(searched.out)["layers"]
    measured = here("evaluate", tmp_path / "plan.json", "--latency-table", table, "--json")
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["uniform"] is not None
    bare = here("evaluate", tmp_path / "plan.json", "--json")
    assert json.loads(bare.out)["uniform"] is None


# -- the command line ------------------------------------------------------------------


def test_score_and_allocate_in_the_terminal(tmp_path: Path):
    file, plan = tmp_path / "scores.json", tmp_path / "plan.json"
    done = here(
        *("score", "digits", "--proxy", "orthogonality", "--proxy", "sqnr"),
        *("--option", "beta=2", "--option", "orthogonality.suffix-mean=false"),
        *("--samples", "16", "--out", file),
    )
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split() == ["layer", "orthogonality", "sqnr"]
    assert max(map(len, lines)) <= 88
    assert lines[-1] == "rank 1: the most sensitive layer; of costs at 2 bits"
    assert f"proxyq: wrote {file}" in done.err and " s: passes for" in done.err
    options = ScoreFile.load(file).record("orthogonality").options
    assert options["beta"] == 2 and options["suffix_mean"] is False

    words = ("allocate", file, "--proxy", "sqnr", "--budget", "size=3bit")
    shown = here(*words, "--out", plan, "--plot", tmp_path / "plan.svg")
    assert shown.code == 0, shown.err
    assert shown.err.splitlines() == [
        f"proxyq: wrote {plan}",
        f"proxyq: wrote {tmp_path / 'plan.svg'}",
    ]
    assert "optimal, proven" in shown.out and "conv" in shown.out
    printed = here(*words, "--json", "--quiet")
    assert printed.err == ""
    assert without_seconds(Plan.from_json(json.loads(printed.out))) == without_seconds(
        Plan.load(plan)
    )
    evaluated = here("evaluate", plan, "--json")
    assert evaluated.code == 0 and json.loads(evaluated.out)["plans"][0]["top1"] > 90


def test_one_proxy_is_shown_with_its_numbers_and_json_is_the_file(tmp_path: Path):
    words = ("score", "--proxy", "sqnr", "--bits", "8,2,4", "--quiet")
    done = here(*words)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0].split() == ["layer", *"2 bit 4 bit 8 bit".split(), "rank"]
    assert done.out.splitlines()[-1].startswith("sqnr; rank 1")
    printed = here(*words, "--json", "--out", tmp_path / "scores.json")
    assert printed.err == ""
    assert printed.out == (tmp_path / "scores.json").read_text(encoding="utf-8")


def test_all_on_the_command_line(monkeypatch: pytest.MonkeyPatch):
    few = ("sqnr", "orthogonality", "limpq")
    monkeypatch.setattr(PROXIES, "_records", {name: PROXIES.get(name) for name in few})
    done = here("score", "--proxy", "all", "--samples", "16", "--option", "beta=3", "--json")
    assert done.code == 0, done.err
    file = ScoreFile.from_json(json.loads(done.out))
    assert set(file.proxies) == {"sqnr", "orthogonality"}
    assert file.record("orthogonality").options["beta"] == 3


@pytest.mark.slow
def test_the_cache_answers_and_says_so(tmp_path: Path):
    words = ("score", "--proxy", "kl-delta", "--proxy", "orthogonality", "--samples", "8")
    first = alone(*words, "--out", tmp_path / "a.json", cache=tmp_path / "c", PYTHONHASHSEED="0")
    second = alone(*words, "--out", tmp_path / "b.json", cache=tmp_path / "c", PYTHONHASHSEED="1")
    words = (*words, "--no-cache")
    fresh = alone(*words, "--out", tmp_path / "d.json", cache=tmp_path / "no", PYTHONHASHSEED="1")
    assert first.code == second.code == fresh.code == 0, first.err + second.err
    assert "from the cache" not in first.err
    assert "proxyq: from the cache: kl-delta, orthogonality\n" in second.err
    bytes_of = {(tmp_path / name).read_bytes() for name in ("a.json", "b.json", "d.json")}
    assert len(bytes_of) == 1
    assert not (tmp_path / "no").exists()


def test_what_was_cached_with_others_is_not_taken_for_one_alone(tmp_path: Path):
    # Sums that are made together are made in another order: the last digits may differ.
    cache = Cache(tmp_path)
    together = api.score(proxies=["kl-delta", "logit-mse"], samples=16, cache_dir=cache)
    alone = api.score(proxies="kl-delta", samples=16)
    cached = api.score(proxies="kl-delta", samples=16, cache_dir=cache)
    assert cached.to_json() == alone.to_json()
    again = api.score(proxies=["kl-delta", "logit-mse"], samples=16, cache_dir=tmp_path)
    assert again.to_json() == together.to_json()


def test_the_cache_keeps_within_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from proxyq.cli import runtime

    folder = tmp_path / "scores" / "unfinished" / "key"
    folder.mkdir(parents=True)
    for age, name in enumerate(("new", "old")):
        (folder / name).write_bytes(b"x" * 600)
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(runtime, "CACHE_BYTES", 1000)
    kept = runtime.score_cache(str(tmp_path), no_cache=False)
    assert kept is not None and kept.folder == tmp_path / "scores"
    assert [file.name for file in folder.iterdir()] == ["new"]
    assert runtime.score_cache(str(tmp_path), no_cache=True) is None


def test_a_checkpoint_that_cannot_be_written_stops_nothing(tmp_path: Path):
    (tmp_path / "scores").write_text("a file where a folder should be")
    cache = Cache(tmp_path / "scores", every=0.0)
    file = api.score(proxies="kl-delta", samples=8, cache_dir=cache)
    assert file.to_json() == api.score(proxies="kl-delta", samples=8).to_json()


# -- what would break a solver ---------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (lambda t: np.where(np.arange(len(t)) == 3, np.nan, 1.0), "nan for layer 'blocks.1.conv1'"),
        (lambda t: np.where(np.arange(len(t)) == 3, np.inf, 1.0), "inf for layer 'blocks.1.conv1'"),
        (lambda t: np.where(np.arange(len(t)) == 3, 1e200, 1.0), "1e+200 for layer 'blocks.1.conv"),
        (lambda t: np.where(np.arange(len(t)) == 3, -2.0, 1.0), "-2 for layer 'blocks.1.conv1'"),
        (lambda t: np.ones(len(t)), "1 for every layer, from 'stem' on"),
        (lambda t: np.ones(len(t) - 1), "must return an array of shape (12,)"),
        (lambda t: Result(np.arange(len(t)), notes={"a": {1, 2}}), "cannot be written: 'notes'"),
    ],
)
@pytest.mark.parametrize("command", ["score", "search"])
def test_scores_that_break_solvers_are_refused(
    command: str, values, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if "notes" in text and command == "search":
        pytest.skip("notes are not in plans")

    def kernel(taps, *, key):
        del key
        return values(taps)

    proxy = make_proxy(kernel, name="broken", needs=("weight",), passes="none", reference="here")
    monkeypatch.setattr(PROXIES, "_records", {"broken": proxy})
    done = here(command, "--proxy", "broken", "--out", tmp_path / "out.json")
    assert done.code == 1 and done.out == ""
    assert done.err.count("\n") <= 2 and done.err.splitlines()[-1].startswith("proxyq: error: ")
    assert "'broken'" in done.err and text in done.err and "bug" not in done.err
    assert not list(tmp_path.iterdir())


def test_an_overflow_of_the_mapping_names_layer_and_proxy(scored: ScoreFile, tmp_path: Path):
    data = json.loads(scored.to_json())
    data["scores"][0]["values"]["head"] = 1e150
    data["weight_errors"]["squared"]["head"] = [1e150] * 4
    data["weight_errors"]["energy"]["head"] = 1e-30
    (tmp_path / "scores.json").write_text(json.dumps(data))
    done = here(
        *("allocate", tmp_path / "scores.json", "--budget", "size=3bit", "--proxy"),
        *("orthogonality", "--cost", "times-relative-dw2", "--activation-bits", "8"),
    )
    assert done.code == 1 and "'orthogonality'" in done.err and "'head'" in done.err, done


# -- killed and run again --------------------------------------------------------------


@pytest.mark.parametrize(
    ("proxy", "options"),
    [
        pytest.param("kl-delta", (), marks=pytest.mark.slow),
        pytest.param(
            "hessian-trace",
            ("--option", "least=40", "--option", "most=40"),
            marks=pytest.mark.slow,
        ),
        pytest.param("clado", (), marks=pytest.mark.slow),
    ],
)
def test_killed_and_run_again_gives_the_same_bytes(
    proxy: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ("score", "--proxy", proxy, *options, "--samples", "64", "--seed", "4")
    cache, out = tmp_path / "cache", tmp_path / "killed.json"
    whole = alone(*words, "--out", tmp_path / "whole.json", cache=cache)
    assert whole.code == 0, whole.err
    shutil.rmtree(cache / "scores")  # all but what is compiled

    environment = {"PROXYQ_CACHE_DIR": str(cache), "PROXYQ_CHECKPOINT_SECONDS": "0"}
    running = subprocess.Popen(
        [sys.executable, "-m", "proxyq", *words, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    unfinished = cache / "scores" / "unfinished"
    deadline = time.monotonic() + 240
    while not list(unfinished.rglob("*.safetensors")):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert list(unfinished.rglob("*.safetensors")) and not out.exists()
    assert not list((cache / "scores").glob("*.safetensors"))
    shutil.copytree(cache / "scores", tmp_path / "again")

    resumed = alone(*words, "--out", out, cache=cache)
    assert resumed.code == 0, resumed.err
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not list(unfinished.rglob("*.safetensors"))

    # The same in this process, where the steps can be counted.
    settings = {"least": 40, "most": 40} if options else {}
    steps: list[str] = []
    resume = Engine.resume
    monkeypatch.setattr(Engine, "resume", lambda *args: [steps.append("run"), resume(*args)][1])

    def work(folder: Path | None) -> tuple[str, int]:
        steps.clear()
        file = api.score(
            proxies=[(proxy, settings)],
            samples=64,
            seed=4,
            cache_dir=folder,
            progress=lambda stage, done, total: steps.append(stage),
        )
        return file.to_json(), steps.count("probe" if settings else "run")

    text, fewer = work(tmp_path / "again")
    _, all_of_them = work(None)
    assert text == out.read_text(encoding="utf-8")
    assert 0 < fewer < all_of_them


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_the_checkpoint_interval_is_checked(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PROXYQ_CHECKPOINT_SECONDS", text)
    done = here("score", "--proxy", "sqnr")
    assert done.code == 2 and "PROXYQ_CHECKPOINT_SECONDS must be" in done.err
