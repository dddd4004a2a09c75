"""The command line on the embedded network: results, purity of stdout, exit codes."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commandline import Finished, alone, here

from proxyq import api
from proxyq.cli.arguments import byte_count, key_values, numbers, positive_numbers
from proxyq.cli.models import load
from proxyq.cli.plans import model_and_plans
from proxyq.errors import UsageError
from proxyq.proxies import PROXIES
from proxyq.proxies.formula import available_formulas
from proxyq.search.allocate.plan import Plan
from proxyq.search.recipes import available_recipes
from proxyq.version import __version__

COMMANDS = (
    *("search", "score", "allocate", "pareto", "evaluate", "quantize", "export"),
    *("table", "rank", "evolve", "report", "inspect", "proxies", "models", "recipes"),
    "doctor",
)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    """The main job, once: a search with accuracy, plan file and picture."""
    folder = tmp_path_factory.mktemp("searched")
    done = here(
        *("search", "--budget", "size=3bit", "--evaluate", "--json"),
        *("--out", folder / "plan.json", "--plot", folder / "plan.svg"),
    )
    assert done.code == 0, done.err
    return done, folder


# -- help ------------------------------------------------------------------------------


def test_help_is_complete_and_imports_nothing_heavy():
    code = f"""
import contextlib, io, sys
from proxyq.cli import main
for words in [["--help"], [], ["--version"], *([name, "--help"] for name in {COMMANDS})]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0, words
    assert out.getvalue().strip()
heavy = {{name.split(".")[0] for name in sys.modules}}
print(sorted(heavy & {{"jax", "jaxlib", "torch", "scipy", "matplotlib", "numpy", "flax"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_help_lists_the_commands_that_work_and_no_other():
    done = here("--help")
    rows = [line for line in done.out.splitlines() if line.startswith("│ ") and line[2] != " "]
    found = [line.split()[1] for line in rows]
    assert [word for word in found if word.isalpha()][: len(COMMANDS)] == list(COMMANDS)
    assert here("search", "--help").out.count("[@WEIGHTS]") == 2


def test_version():
    assert here("--version") == Finished(0, f"proxyq {__version__}\n", "")


# -- search ----------------------------------------------------------------------------


def test_search_prints_the_plan_alone(searched: tuple[Finished, Path]):
    done, folder = searched
    plan = json.loads(done.out)
    assert done.err == ""
    assert plan["schema"] == "proxyq/plan/1"
    assert next(iter(plan["layers"])) == "stem" and len(plan["layers"]) == 12
    assert plan["solver"]["status"] == "optimal"
    assert plan["budgets"][0]["achieved"] <= 3
    assert plan["method"]["proxy"] == api.AUTO
    assert plan["measured"]["float"] == {"top1": 99.0, "n": 400}
    assert plan["measured"]["plans"][0]["top1"] > 95
    # What is not the same twice, or as long as the classes are many, stays out of the file.
    assert set(plan["measured"]) == {"float", "uniform", "plans"}
    assert (folder / "plan.json").read_text(encoding="utf-8") == done.out
    assert Plan.load(folder / "plan.json").to_json() == done.out
    picture = (folder / "plan.svg").read_text(encoding="utf-8")
    assert picture.startswith("<?xml") and picture.rstrip().endswith("</svg>")


def test_search_is_the_library_call(searched: tuple[Finished, Path]):
    plan = api.search(budget="size=3bit", evaluate=True)
    ours, theirs = json.loads(searched[0].out), json.loads(plan.to_json())
    for record in (ours, theirs):
        del record["solver"]["seconds"]
    assert ours == theirs


def test_search_in_the_terminal(tmp_path: Path):
    done = here("search", "--evaluate", "--pin", "head=8", "--out", tmp_path / "plan.json")
    assert done.code == 0, done.err
    assert done.err.splitlines() == [
        "proxyq: no --budget given: took size=4bit.",
        f"proxyq: wrote {tmp_path / 'plan.json'}",
    ]
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 88 and "\x1b" not in done.out
    assert lines[0].split() == ["layer", "kind", "bits", "weights", "KiB", "cost"]
    assert any(line.split()[:3] == ["head", "linear", "8*████████"] for line in lines)
    for text in ("* pinned", "optimal, proven", "solver ilp", "gap 0 %", "of 4 bit"):
        assert text in done.out
    assert "weights of the 11 searched layers; not scales, biases, pinned layers" in done.out
    words = [line.split()[0] for line in lines if line]
    first = words.index("float")
    assert words[first : first + 4] == ["float", "uniform", "plan", "on"]


def test_search_takes_all_its_options(tmp_path: Path):
    done = here(
        *("search", "digits", "--proxy", "orthogonality", "--option", "beta=2"),
        *("--option", "suffix-mean=false", "--bits", "2,4,8", "--activation-bits", "8"),
        *("--budget", "size=16KiB", "--budget", "bops=25M", "--budget", "macs-bits=4M"),
        *("--pin", "stem=8", "--tie", "blocks.0.*", "--candidates", "blocks.3.*=4,8"),
        *("--solver", "greedy", "--time-limit", "5", "--data", "digits", "--samples", "16"),
        *("--correction", "weights", "--mean", "0.3", "--std", "0.4", "--size", "8"),
        *("--resize", "8", "--seed", "3", "--memory", "64MiB", "--device", "cpu"),
        *("--eval-data", "digits:validation", "--json", "--quiet"),
    )
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["method"]["options"]["beta"] == 2 and not plan["method"]["options"]["suffix_mean"]
    assert plan["method"]["samples"] == 16 and plan["provenance"]["seed"] == 3
    layers = plan["layers"]
    assert layers["stem"]["weight_bits"] == 8 and layers["stem"]["pinned"]
    assert layers["blocks.0.conv1"]["weight_bits"] == layers["blocks.0.conv2"]["weight_bits"]
    assert all(layers[f"blocks.3.{x}"]["weight_bits"] >= 4 for x in ("conv1", "conv2", "shortcut"))
    assert {layer["activation_bits"] for layer in layers.values()} == {8}
    assert all(budget["achieved"] <= budget["asked"] for budget in plan["budgets"])
    assert plan["measured"]["float"]["n"] == 144
    assert plan["measured"]["plans"][0]["correction"] == "weights"


@pytest.mark.parametrize("recipe", ["ompq", "csmpq"])
def test_recipes(recipe: str):
    done = here("search", "--recipe", recipe, "--budget", "size=3bit", "--evaluate", "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["method"]["recipe"] == recipe and plan["method"]["correction"] == "none"
    assert plan["solver"]["name"] == "lp"
    assert plan["budgets"][0]["achieved"] <= 3
    assert {layer["activation_bits"] for layer in plan["layers"].values()} == {8}
    assert plan["measured"]["plans"][0]["top1"] > 50


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_pictures(suffix: str, tmp_path: Path):
    file = tmp_path / f"plan.{suffix}"
    assert here("search", "--proxy", "params", "--plot", file, "--quiet").code == 0
    assert file.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"%PDF")


def test_same_seed_same_bytes_with_and_without_a_warm_cache(tmp_path: Path):
    words = ("search", "--evaluate", "--seed", "5", "--budget", "size=3bit", "--json")
    words = (*words, "--proxy", "output-error")
    results, programs = [], []
    for hash_seed in ("1", "2"):
        done = alone(*words, cache=tmp_path, PYTHONHASHSEED=hash_seed)
        assert done.code == 0, done
        cached = "proxyq: from the cache: output-error\n" if hash_seed == "2" else ""
        assert done.err == cached
        assert json.loads(done.out)["solver"]["seconds"] >= 0
        results.append([line for line in done.out.splitlines() if '"seconds":' not in line])
        programs.append({path.name for path in tmp_path.rglob("*") if path.is_file()})
    assert results[0] == results[1]
    assert len(programs[0]) > 50 and programs[0] == programs[1]


def test_processes_share_a_cold_cache(tmp_path: Path):
    words = ("search", "--proxy", "params", "--budget", "size=3bit", "--quiet")

    def run(_: int) -> Finished:
        return alone(*words, cache=tmp_path)

    with ThreadPoolExecutor() as pool:
        first, second = pool.map(run, range(2))
    assert (first.code, first.err) == (second.code, second.err) == (0, "")
    assert first.out.splitlines()[:12] == second.out.splitlines()[:12]
    assert any(path.is_file() for path in tmp_path.rglob("*"))


def test_pins_without_effect_are_told():
    words = ("search", "--proxy", "params", "--budget", "size=5bit", "--json")
    done = here(*words, "--pin", "stem=8", "--pin", "stem=4")
    assert json.loads(done.out)["layers"]["stem"]["weight_bits"] == 4
    assert done.err == (
        "proxyq: the pin 'stem=8' has no effect: the later 'stem=4' holds its layers.\n"
    )
    # A later pin may well refine an earlier one.
    assert here(*words, "--pin", "blocks.*=4", "--pin", "blocks.0.*=8").err == ""
    assert here(*words, "--pin", "stem=4", "--pin", "s*=4").err == ""


def test_search_takes_costs_latency_and_several_activation_bits(tmp_path: Path):
    words = ("search", "--samples", "16", "--json", "--quiet")
    done = here(
        *(*words, "--proxy", "params", "--cost", "exponential", "--budget", "size=50%"),
        *("--activation-bits", "weights"),
    )
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["method"]["cost"] == "exponential"
    assert all(one["weight_bits"] == one["activation_bits"] for one in plan["layers"].values())
    done = here(
        *(*words, "--proxy", "activation-mse", "--budget", "bops=20M"),
        *("--activation-bits", "4,8", "--candidates", "*=4,8"),
    )
    assert done.code == 0, done.err
    layers = json.loads(done.out)["layers"].values()
    assert {layer["activation_bits"] for layer in layers} == {4, 8}


# -- evaluate --------------------------------------------------------------------------


def test_evaluate_two_plans(searched: tuple[Finished, Path], tmp_path: Path):
    plan, other = searched[1] / "plan.json", tmp_path / "other.json"
    words = ("--proxy", "params", "--budget", "size=2.5bit", "--correction", "none")
    assert here("search", *words, "--out", other, "--quiet").code == 0
    done = here("evaluate", plan, other, "--json")
    assert (done.code, done.err) == (0, ""), done.err
    result = json.loads(done.out)
    assert result["float"] == {"top1": 99.0, "n": 400}
    assert result["uniform"]["bits"] == 3
    assert [(one["first"], one["second"]) for one in result["comparisons"]] == [
        (str(plan), str(other))
    ]
    assert sum(one["n"] for one in result["classes"]) == 400
    assert [one["file"] for one in result["plans"]] == [str(plan), str(other)]
    assert set(result["plans"][0]) >= {"top1", "size_bits", "average_bits", "kl", "correction"}
    measured = json.loads(searched[0].out)["measured"]
    assert result["plans"][0]["top1"] == measured["plans"][0]["top1"]
    assert result["plans"][1]["correction"] == "none"

    shown = here("evaluate", "digits", other, "--correction", "weights", "--samples", "32")
    assert shown.code == 0, shown.err
    assert "uniform 2 bit" in shown.out and "weights" in shown.out
    assert "on 400 images" in shown.out


# -- inspect and listings --------------------------------------------------------------


def test_inspect():
    done = here("inspect", "--json")
    assert (done.code, done.err) == (0, "")
    layers = json.loads(done.out)["layers"]
    assert layers["stem"] == {
        "kind": "conv",
        "weights": 144,
        "macs": 9216,
        "output_shape": [8, 8, 16],
        "group": "stem",
        "shares_input": None,
        "fused": None,
    }
    shared = layers["blocks.2.conv1"]["shares_input"]
    assert shared is not None and shared == layers["blocks.2.shortcut"]["shares_input"]
    table = here("inspect", "digits").out
    assert "35,600" in table and "811 k" in table and "12 layers" in table


def test_inspect_a_file_that_prints(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "import proxyq\nprint('hello')\n\ndef net():\n    print('built')\n"
        "    return proxyq.load_model()\n"
    )
    done = here("inspect", f"{tmp_path / 'mine.py'}:net", "--json")
    assert len(json.loads(done.out)["layers"]) == 12
    assert done.err == "hello\nbuilt\n"


def test_proxies():
    records = json.loads(here("proxies", "--json").out)
    formulas = [f"formula:{name}" for name in available_formulas()]
    names = [*(p.name for p in PROXIES), *formulas]
    assert sorted(record["name"] for record in records) == sorted(names)
    classes = [record["cost_class"] for record in records]
    assert classes[0] == "weights" and classes[-1] == "training"
    assert {"name", "direction", "needs", "passes", "shape", "reference", "summary"} <= set(
        records[0]
    )
    by_name = {record["name"]: record for record in records}
    assert by_name["hessian-trace"]["cost"] == "times-dw2"
    assert by_name["hessian-trace"]["cost_class"] == "curvature"
    assert by_name["kl-delta"]["cost"] is None and by_name["kl-delta"]["needs"] == ["kl"]
    assert by_name["orthogonality"]["options"]["beta"] == 1.0
    table = here("proxies").out
    assert all(record["name"] in table for record in records)
    assert max(map(len, table.splitlines())) <= 88
    assert "of all: higher is more sensitive" in table and "curvature" in table


def test_one_proxy_in_full():
    shown = here("proxies", "hessian-trace").out
    assert max(map(len, shown.splitlines())) <= 88
    for text in ("curvature=gauss-newton", "times-dw2", "arXiv:1911.03852", "Hutchinson"):
        assert text in shown
    record = json.loads(here("proxies", "hessian-trace", "--json").out)
    assert record["name"] == "hessian-trace" and "Hutchinson" in record["docs"]
    done = here("proxies", "hesian-trace")
    assert done.code == 2 and "did you mean 'hessian-trace'" in done.err


def test_recipes_are_listed():
    found = json.loads(here("recipes", "--json").out)
    assert [recipe["name"] for recipe in found] == available_recipes()
    assert "ompq" in here("recipes").out


def test_models():
    done = here("models")
    assert done.code == 0
    assert done.out.splitlines()[0] == "digits"
    assert done.out.splitlines()[-1] == "path/to/file.py:factory"
    assert json.loads(here("models", "--json", "--quiet").out) == done.out.splitlines()[:-1]


def test_torchvision_models_are_listed():
    pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    found = here("models").out.splitlines()
    assert "torchvision:resnet18" in found
    assert not any("quantized" in name or "segmentation" in name for name in found)


def test_every_command_takes_what_all_take():
    for name in ("inspect", "proxies", "models", "recipes"):
        words = ("--seed", "1", "--json", "--quiet", "--device", "cpu", "--cache-dir", ".")
        done = here(name, *words)
        assert (done.code, done.err) == (0, ""), done
        json.loads(done.out)


# -- what surrounds a command ----------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ZeroDivisionError("by zero"), 1, "error: unexpected ZeroDivisionError: by zero; this is"),
        (MemoryError(), 1, "error: out of memory: give --memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: 5GiB"), 1, "error: out of memory: give --memory"),
        (OSError(28, "No space left on device"), 1, "error: no space is left"),
        (PermissionError(13, "Permission denied", "/x"), 1, "refuses '/x': Permission denied."),
        (KeyboardInterrupt(), 130, "interrupted."),
    ],
)
def test_what_nobody_expects(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(api, "search", fail)
    done = here("search")
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("proxyq: ") and text in done.err
    assert done.err.count("\n") == 1
    monkeypatch.setenv("PROXYQ_DEBUG", "1")
    debugged = here("search").err
    assert debugged.splitlines()[-1] == done.err.strip()
    assert "Traceback" in debugged or isinstance(error, KeyboardInterrupt)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early(unbuffered: str):
    started = subprocess.Popen(
        [sys.executable, "-m", "proxyq", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    assert started.stdout is not None and started.stderr is not None
    started.stdout.close()
    errors = started.stderr.read().decode()
    started.stderr.close()
    assert (started.wait(timeout=120), errors) == (0, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_take_nothing_down(closed: str, tmp_path: Path):
    plan = tmp_path / "plan.json"
    words = f"search --proxy params --budget size=3bit --json --out {plan} {closed}"
    done = subprocess.run(
        f"{sys.executable} -m proxyq {words}",
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PROXYQ_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert (done.returncode, done.stderr) == (0, "")
    text = plan.read_text(encoding="utf-8")
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else text)
    Plan.load(plan)


def test_json_is_utf8_and_text_is_replaced_where_the_terminal_cannot(tmp_path: Path):
    words = ("search", "--proxy", "params", "--budget", "size=4bit")
    done = alone(*words, cache=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.code, done.err) == (0, "")
    assert "8 ????????" in done.out


def test_compiled_programs_are_found_in_a_copied_cache(tmp_path: Path):
    code = (
        "import sys, jax; from proxyq.cli.runtime import working\n"
        "with working(cache_dir=sys.argv[1], quiet=True): jax.jit(lambda x: x * 3 + 1)(2.0)"
    )

    def compiled(folder: Path) -> set[str]:
        # The tests' own processes are told to leave paths out.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        environment.pop("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", None)
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)
        return {file.name for file in folder.rglob("*-cache")}

    first = compiled(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    assert compiled(tmp_path / "second") == first != set()


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = alone("inspect", "--json", cache=tmp_path / "file" / "cache")
    assert done.code == 0 and len(json.loads(done.out)["layers"]) == 12
    assert done.err.startswith("proxyq: no cache: the folder ") and done.err.count("\n") == 1


def test_a_device_that_is_not_there():
    done = here("inspect", "--device", "tpu")
    assert done.code == 1 and done.out == ""
    assert done.err.startswith("proxyq: error: no tpu can be used") and done.err.count("\n") == 1


# -- text to values --------------------------------------------------------------------


def test_values():
    assert numbers("2, 3,4", "--bits") == (2, 3, 4)
    assert numbers("0.5,1e-2", "--mean", kind=float) == (0.5, 0.01)
    assert positive_numbers("3x224x224", "--input-shape") == (3, 224, 224)
    assert byte_count("1.5GiB", "--memory") == 3 << 29
    assert byte_count("512mb", "--memory") == 512_000_000
    assert byte_count("4096", "--memory") == 4096
    given = ["a=1", "b=1e-3", "c=True", "d=post-activation", "with-dash=x=y"]
    assert key_values(given, "--option") == {
        "a": 1,
        "b": 0.001,
        "c": True,
        "d": "post-activation",
        "with_dash": "x=y",
    }
    named = model_and_plans(["a.json", "m.py:f", "b.json"], "evaluate")
    assert named == ("m.py:f", ["a.json", "b.json"])
    with pytest.raises(UsageError, match="at least one plan to apply: plans are files that end in"):
        model_and_plans(["digits"], "apply")
    for text in ("0", "-1GiB", "GiB", "4XiB", "", "1e3MB"):
        with pytest.raises(UsageError, match="--memory"):
            byte_count(text, "--memory")


def test_preprocessing_from_the_options():
    model = load("digits", mean="0.5", std="0.25", size="8")
    assert model.preprocessing.mean == (0.5,) and model.preprocessing.std == (0.25,)
    assert (model.preprocessing.resize, model.preprocessing.size) == (8, (8, 8))
    model = load("digits", size="6,8", resize=9)
    assert (model.preprocessing.resize, model.preprocessing.size) == (9, (6, 8))
    plain = load(None)
    assert load(None, std="1").preprocessing.mean == plain.preprocessing.mean


@pytest.mark.parametrize("delay", [0.05, 0.6, 1.2])
def test_interrupted_leaves_one_line_and_no_file(tmp_path, delay):
    import signal
    import time

    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "proxyq", "search", "--proxy", "sqnr", "--no-cache"]
    run = subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    # Not before the command has begun, or Python itself would be interrupted.
    time.sleep(1.5 + delay)
    run.send_signal(signal.SIGINT)
    stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 130, stderr
    assert stderr.strip() == "proxyq: interrupted." and not stdout
    assert not list(tmp_path.iterdir())


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    import os

    from proxyq.errors import ProxyqError
    from proxyq.files import check_writable, write_atomic

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for attempt in (lambda: check_writable(pipe), lambda: write_atomic(pipe, "x")):
        with pytest.raises(ProxyqError, match="no regular file"):
            attempt()
    assert pipe.is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_a_broken_plugin_takes_nothing_down_and_is_told(monkeypatch):
    from importlib.metadata import EntryPoint

    from proxyq import registry

    broken = EntryPoint(name="broken", value="nowhere_to_be_found:proxy", group="proxyq.proxies")
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    fresh = registry.Registry("proxy", group="proxyq.proxies")
    monkeypatch.setattr("proxyq.proxies.PROXIES", fresh)
    done = here("proxies")
    assert done.code == 0 and done.err.count("'broken'") == 1 and "left out" in done.err
