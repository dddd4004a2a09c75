"""Measured tables: what is measured is what `evaluate` measures, whoever does the work."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import proxyq
from proxyq import api
from proxyq.cli import main
from proxyq.errors import ProxyqError, UsageError
from proxyq.executor import Processes, Ray, Serial, executor
from proxyq.proxies import Cache
from proxyq.ptq.measure import right
from proxyq.search.draw import DRAWS, draw_plans
from proxyq.search.table_file import MeasuredTable

SMALL = {"plans": 6, "samples": 64, "eval_samples": 100}


@pytest.fixture(scope="module")
def small():
    return api.table(**SMALL)


# -- drawing --------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 60), st.sampled_from(DRAWS), st.integers(0, 99))
def test_plans_are_different_and_come_again(layers, how, seed):
    plans = draw_plans(layers, (2, 3, 4), 20, how=how, seed=seed)
    assert len(set(plans)) == 20 and {len(plan) for plan in plans} == {layers}
    assert {b for plan in plans for b in plan} <= {2, 3, 4}
    assert plans == draw_plans(layers, (4, 3, 2), 20, how=how, seed=seed)
    # A longer table begins with the shorter one.
    assert draw_plans(layers, (2, 3, 4), 25, how=how, seed=seed)[:20] == plans


def test_sizes_are_spread_evenly():
    sizes = np.mean(draw_plans(40, (2, 3, 4, 8), 2000, how="size"), axis=1)
    shares = np.histogram(sizes, bins=6, range=(2, 8))[0] / len(sizes)
    assert np.abs(shares - 1 / 6).max() < 0.04
    close = np.mean(draw_plans(40, (2, 3, 4, 8), 2000, how="uniform"), axis=1)
    assert close.std() < sizes.std() / 3
    # No layer is told from another.
    by_layer = np.mean(draw_plans(40, (2, 3, 4, 8), 2000, how="size"), axis=0)
    assert np.ptp(by_layer) < 0.6


def test_all_plans_of_a_small_network_are_found():
    for how in DRAWS:
        assert len(draw_plans(3, (2, 4), 8, how=how)) == 8
    with pytest.raises(UsageError, match="at most 8"):
        draw_plans(3, (2, 4), 9)
    with pytest.raises(UsageError, match="must be one of uniform, size"):
        draw_plans(3, (2, 4), 2, how="other")


# -- measuring ------------------------------------------------------------------------


@pytest.mark.parametrize("correction", ["none", "statistics"])
def test_a_row_is_what_evaluate_measures(correction):
    table = api.table(plans=3, correction=correction, samples=64, activation_bits=6)
    model = api.as_model()
    plan = proxyq.search(proxy="sqnr", budget="size=4bit", activation_bits=6, samples=64)
    for row in table.plans:
        layers = {
            layer.name: plan.layers[layer.name].model_copy(update={"weight_bits": bits})
            for layer, bits in zip(table.layers, row.bits, strict=True)
        }
        same = plan.model_copy(update={"layers": layers})
        (found,) = api.evaluate(model, [same], correction=correction, samples=64).plans
        assert row.top1 == pytest.approx(found.top1, abs=1e-3)
        # The plan is run from its integers, whose last digits may turn roundings of inputs.
        rel = 1e-4 if correction == "none" else 2e-3
        assert row.kl == pytest.approx(found.kl, rel=rel)
        assert row.size_bits == same.size_bits
        macs = {layer.name: layer.macs for layer in table.layers}
        assert row.bops == sum(macs[n] * one.weight_bits * 6 for n, one in layers.items())
        assert 0 <= row.rescaled <= row.kl and row.loss > 0
    assert table.method["correction"] == correction and table.method["samples"] == 64


def test_the_file_comes_back(small, tmp_path):
    small.save(tmp_path / "table.json")
    again = MeasuredTable.load(tmp_path / "table.json")
    assert again == small and again.to_json() == small.to_json()
    assert again.bits.shape == (6, len(again.layers))
    assert (again.average_bits >= 2).all() and (again.average_bits <= 4).all()
    record = json.loads(small.to_json())
    how = api.as_model().preprocessing
    assert record["images"] == {
        **{"shape": [8, 8, 1], "resize": None, "size": None},
        **{"mean": list(how.mean), "std": list(how.std)},
    }
    with pytest.raises(ProxyqError, match=r"images\.std"):
        MeasuredTable.from_json({**record, "images": {**record["images"], "std": [0]}})
    for rounding in ("mse", [1], {"foo": 1}, {"method": "other"}):
        with pytest.raises(ProxyqError, match=r"'method\.rounding' must hold"):
            MeasuredTable.from_json(
                {**record, "method": {**record["method"], "rounding": rounding}}
            )
    layers = [{**record["layers"][0], "weights": 10**30}, *record["layers"][1:]]
    with pytest.raises(ProxyqError, match="weights"):
        MeasuredTable.from_json({**record, "layers": layers})
    (tmp_path / "long.json").write_text('{"schema": 1' + "0" * 5000 + "}")
    with pytest.raises(ProxyqError, match="too many digits"):
        MeasuredTable.load(tmp_path / "long.json")
    record["plans"][0]["bits"] = [2]
    with pytest.raises(ProxyqError, match="plan 1 has bits for 1 layers"):
        MeasuredTable.from_json(record)
    with pytest.raises(ProxyqError, match="holds no table"):
        MeasuredTable.from_json({"schema": "proxyq/plan/1"})


def test_processes_measure_the_same(small):
    assert api.table(**SMALL, executor="process:2").to_json() == small.to_json()


def test_a_killed_run_goes_on(small, tmp_path):
    class Killed(Exception):
        pass

    cache = Cache(tmp_path, every=0)
    table = api.table(**{**SMALL, "plans": 9})
    seen = []

    def killed(stage, done, total):
        seen.append(done)
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        api.table(**{**SMALL, "plans": 9}, cache_dir=cache, progress=killed)
    assert seen == [4, 8] and list(tmp_path.rglob("table.safetensors"))
    seen.clear()
    again = api.table(
        **{**SMALL, "plans": 9},
        cache_dir=cache,
        progress=lambda stage, done, total: seen.append(done),
    )
    assert seen == [9] and again.to_json() == table.to_json()
    assert again.plans[:6] == small.plans
    # What is whole is kept until it is written, and asked for again it is there.
    seen.clear()
    last = api.table(**{**SMALL, "plans": 9}, cache_dir=cache, progress=killed)
    assert last.to_json() == table.to_json() and not seen
    # Images prepared in another way make it another table.
    model = api.as_model()
    how = replace(model.preprocessing, mean=(0.5,))
    api.table(
        model.replace(preprocessing=how),
        **SMALL,
        cache_dir=cache,
        progress=lambda *step: seen.append(step),
    )
    assert len(seen) == 2


def test_what_is_not_finite_is_told_first():
    model = api.as_model()
    params = {**model.params, "head.bias": np.full_like(model.params["head.bias"], np.nan)}
    seen = []
    with pytest.raises(ProxyqError, match="logits that are not finite on 100 of 100 images"):
        api.table(model.replace(params=params), **SMALL, progress=lambda *step: seen.append(step))
    assert not seen
    logits = np.array([[np.nan, np.nan], [2.0, 1.0], [0.0, np.inf]])
    assert right(logits, np.array([0, 0, 1])).tolist() == [False, True, False]


def test_whole_numbers_of_numpy_are_whole_numbers(small):
    found = api.table(**{**SMALL, "plans": np.int64(6)}, bits=np.arange(2, 5), seed=np.int64(0))
    assert found.to_json() == small.to_json()
    for wrong in ({"seed": -1}, {"seed": 0.5}, {"plans": 2.5}, {"activation_bits": "8"}):
        with pytest.raises(UsageError, match="must be"):
            api.table(**{**SMALL, **wrong})


def test_given_plans_and_wrong_arguments():
    given = api.table(plans=[[3] * 12, [8] * 12], samples=64, eval_samples=50)
    assert [plan.bits for plan in given.plans] == [[3] * 12, [8] * 12]
    assert given.method["draw"] == "given" and given.method["bits"] == [3, 8]
    with pytest.raises(UsageError, match="the network's 12 layers, got 2"):
        api.table(plans=[[3, 3]])
    with pytest.raises(UsageError, match="bits of a plan"):
        api.table(plans=[[99] * 12])
    with pytest.raises(UsageError, match="the same for all"):
        api.table(correction="auto")
    with pytest.raises(UsageError, match="must be text for an executor"):
        api.table(api.as_model(), executor="process:2")
    with pytest.raises(UsageError, match="`eval_samples`"):
        api.table(plans=2, eval_samples=0)


# -- executors ------------------------------------------------------------------------


def doubling(setup):
    """A worker for the tests."""

    def work(task):
        print("libraries print")
        if task == setup.get("bad"):
            raise UsageError("this task is bad.")
        if task == setup.get("deadly"):
            import os

            os._exit(9)
        return 2 * task

    return work


@pytest.fixture
def worker(monkeypatch):
    """The worker above under a name within proxyq, here and in new processes."""
    import proxyq.testing as home

    monkeypatch.setattr(home, "doubling", doubling, raising=False)
    return "proxyq.testing:doubling"


def test_serial_runs_here(worker):
    assert dict(Serial().run(worker, {}, [1, 2, 3])) == {0: 2, 1: 4, 2: 6}
    with pytest.raises(UsageError, match="this task is bad"):
        list(Serial().run(worker, {"bad": 2}, [1, 2]))


def test_executors_are_named():
    assert isinstance(executor(None), Serial) and isinstance(executor("serial"), Serial)
    found = executor("process:3")
    assert isinstance(found, Processes) and found.count == 3 and executor(found) is found
    assert isinstance(executor("ray:2"), Ray)
    for wrong in ("process:0", "process:x", "threads", "process:", "ray:-1"):
        with pytest.raises(UsageError, match="`executor`"):
            executor(wrong)


def test_only_workers_of_proxyq_are_run():
    for name in ("os:system", "proxyq.executor:__import__('os')", "proxyq.executor"):
        with pytest.raises(UsageError, match="a worker is named"):
            list(Serial().run(name, None, [1]))


def test_errors_of_processes_are_told():
    with pytest.raises(UsageError, match="no-such"):
        list(Processes(1).run("proxyq.api.table:worker", bad_setup(), [[2]]))


def bad_setup():
    model = {"name": "no-such:model", "weights": None, "input_shape": None, "preprocessing": {}}
    return {"model": model, "data": None, "eval_data": None, "setting": {}}


def test_files_of_the_current_folder_are_no_modules_of_workers(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise SystemExit('taken for the module of that name')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no-such"):
        list(Processes(1).run("proxyq.api.table:worker", bad_setup(), [[2]]))


def test_unexpected_errors_of_processes_are_told():
    with pytest.raises(ProxyqError, match=r"unexpected TypeError.*this is a bug"):
        list(Processes(1).run("proxyq.api.table:worker", 3, [[2]]))


def test_no_process_outlives_a_run_that_failed(monkeypatch):
    import proxyq.executor as module

    started, lock = [], threading.Lock()

    def start():
        with lock:
            number = len(started)
            started.append(None)
        if number:
            time.sleep(0.3)  # meanwhile the first fails
        code = "import sys; sys.stdin.readline(); sys.exit(3)" if number == 0 else "input()"
        started[number] = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return started[number]

    monkeypatch.setattr(module, "_start", start)
    with pytest.raises(ProxyqError, match="exit code 3"):
        list(Processes(2).run("proxyq.api.table:worker", {}, [1, 2, 3]))
    deadline = time.monotonic() + 10
    while any(one is not None and one.poll() is None for one in started):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.02)


def test_a_process_that_dies_is_told(monkeypatch):
    import proxyq.executor as module

    def dead():
        return subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.exit(3)"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    monkeypatch.setattr(module, "_start", dead)
    with pytest.raises(ProxyqError, match="exit code 3"):
        list(Processes(1).run("proxyq.api.table:worker", {}, [1]))


class FakeJax:
    """What `_surroundings` reads of JAX, on a machine with GPUs."""

    class config:
        jax_platforms = None

    def __init__(self, backend, devices):
        self.default_backend = lambda: backend
        self.local_device_count = lambda: devices


def test_workers_use_the_platform_they_are_told_and_a_gpu_each(monkeypatch):
    """Of GPUs on paper: no test here has one."""
    import sys

    from proxyq.executor import _gpu_share, _surroundings

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    monkeypatch.setitem(sys.modules, "jax", FakeJax("gpu", 2))
    plain = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    assert _surroundings() == plain
    assert [_surroundings(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [_surroundings(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["4", "7", "4"]
    monkeypatch.setitem(sys.modules, "jax", FakeJax("cpu", 1))
    monkeypatch.setattr(FakeJax.config, "jax_platforms", "cpu")
    on_cpu = {**plain, "JAX_PLATFORMS": "cpu"}
    assert _surroundings(0) == on_cpu
    monkeypatch.delitem(sys.modules, "jax")
    assert _surroundings(0) == plain
    assert [_gpu_share(g, 4, plain) for g in (0.0, 1.0, 2.0, 4.0, 8.0)] == [0, 0.25, 0.5, 1, 1]
    assert _gpu_share(2.0, 3, plain) == 0.5 and _gpu_share(8.0, 4, on_cpu) == 0


# -- the command ----------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    out = tmp_path / "table.json"
    arguments = ["table", "--plans", "3", "--samples", "64", "--eval-samples", "50"]
    assert main([*arguments, "--out", str(out), "--no-cache"]) == 0
    shown = capsys.readouterr()
    assert "3 plans of digits on 50 images" in shown.out
    table = MeasuredTable.load(out)
    assert main([*arguments, "--json", "--no-cache"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(table.to_json())
    assert main(["table", "--activation-bits", "4,8"]) == 2
    assert "one number or float" in capsys.readouterr().err
    assert main(["table", "--executor", "threads"]) == 2
    assert "`executor` must be" in capsys.readouterr().err
