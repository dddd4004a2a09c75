"""The HTML page about plans: what is on it, what is refused, and that a browser shows it."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import here

import proxyq
from proxyq.errors import ProxyqError, UsageError
from proxyq.report.charts import coupling_at, normalised
from proxyq.report.markup import Markup, escaped, tag
from proxyq.report.svg import Scale, number, scale_of
from proxyq.search.allocate.plan import Plan
from proxyq.search.evaluation_file import EvaluationFile
from proxyq.search.front_file import Front
from proxyq.search.scores_file import ScoreFile

BITS = [2, 3, 4, 8]
HOSTILE = "<script>alert(1)</script>\" onload='x' &amp; \u0000 ]]> \u202e"
SECTIONS = ["summary", "budgets", "bits", "scores", "coupling", "front", "accuracy", "groups"]


def layer_names(count: int, form: str = "blocks.{}.conv") -> list[str]:
    return [form.format(index) for index in range(count)]


def plan_data(names: list[str], **changes: Any) -> dict[str, Any]:
    """A plan of 2, 3, 4 and 8 bits in turn, the first layer pinned, the first two one group."""
    layers = {
        name: {
            "weight_bits": BITS[(index + 2) % 4],
            "activation_bits": (4, 8)[index % 2],
            "weights": 1024 * (index + 1),
            "macs": 4096 * (index + 1),
            "group": "sum" if index < 2 else None,
            "pinned": index == 0,
        }
        for index, name in enumerate(names)
    }
    return {
        "schema": "proxyq/plan/1",
        "model": {"name": "network", "digest": "ab" * 32},
        "method": {"proxy": "clado", "bits": BITS, "cost": "given", "options": {}},
        "layers": layers,
        "budgets": [{"name": "size", "asked": 5, "achieved": 4.5, "unit": "bit"}],
        "solver": {
            "name": "iqp",
            "status": "feasible",
            "objective": 0.5,
            "bound": 0.4,
            "gap": 0.2,
            "seconds": 1.5,
        },
        "provenance": {"versions": {"jax": "1.2.3"}, "seed": 7},
        **changes,
    }


def matrix(count: int) -> np.ndarray:
    """A coupling in which neighbouring layers work against each other."""
    moves = np.zeros((count * len(BITS), count + 1))
    for layer in range(count):
        for column in range(len(BITS)):
            moves[layer * len(BITS) + column, layer : layer + 2] = (2.0**-column, -(2.0**-column))
    return moves @ moves.T


def scores_data(names: list[str]) -> dict[str, Any]:
    """A pairwise proxy's costs, one of them negative, and an importance."""
    coupling = matrix(len(names))
    costs = {name: [0.5, 0.1, 0.01, -1e-6 if i == 0 else 1e-5] for i, name in enumerate(names)}
    return {
        "schema": "proxyq/scores/1",
        "model": {"name": "network"},
        "bits": BITS,
        "layers": {
            name: {
                "kind": "conv",
                "parameter": f"{name}.weight",
                "weights": 1024 * (index + 1),
                "macs": 4096 * (index + 1),
                "channels": 4,
                "output_shape": [4, 8, 8],
            }
            for index, name in enumerate(names)
        },
        "scores": [
            {
                "proxy": "clado",
                "shape": "layers bits",
                "images": True,
                "values": costs,
                "coupling": [row[i:].tolist() for i, row in enumerate(coupling)],
            },
            {
                "proxy": "snip",
                "shape": "layers",
                "cost": "linear-bits",
                "images": True,
                "values": {name: float(index) for index, name in enumerate(names)},
            },
        ],
        "weight_errors": {
            "squared": {name: [1.0, 0.5, 0.1, 0.0] for name in names},
            "energy": dict.fromkeys(names, 2.0),
        },
        "rounding": {"method": "mse", "extra_code": "negative"},
        "samples": 64,
    }


def front_data(names: list[str], measured: bool = True) -> dict[str, Any]:
    """Three points, the last of them dominated."""
    plan = plan_data(names)
    points = []
    for index, cost in enumerate((0.9, 0.5, 0.6)):
        point = {
            "asked": [4.0 + index],
            "achieved": 3.9 + index,
            "unit": "bit",
            "predicted": cost,
            "dominated": index == 2,
            "solver": "iqp",
            "status": "optimal",
            "bound": cost,
            "gap": 0.0,
            "average_bits": 3.9 + index,
            "size_bits": 4096 * (index + 1),
            "bits": dict.fromkeys(names, 4),
            "activation_bits": dict.fromkeys(names),
        }
        if measured:
            point["measured"] = {
                "top1": 80.0 + index,
                "kl": 0.1 / (index + 1),
                "correction": "none",
            }
        points.append(point)
    return {
        "schema": "proxyq/front/1",
        "model": plan["model"],
        "method": plan["method"],
        "budget": {"name": "size", "unit": "bit", "first": 4, "last": 6, "points": 4},
        "notes": ["1 budget could not be met"],
        "points": points,
        "layers": {
            name: {key: layer[key] for key in ("weights", "macs", "group", "pinned")}
            for name, layer in plan["layers"].items()
        },
        **({"measured": {"float": {"top1": 90.0, "n": 500}}} if measured else {}),
    }


def evaluation_data(plan: Plan, file: str = "plan.json", *, statistics: bool = True) -> Any:
    row = {
        "file": file,
        "top1": 88.5,
        "size_bits": plan.size_bits,
        "average_bits": plan.average_bits,
        "kl": 0.05,
        "correction": "statistics",
    }
    found: dict[str, Any] = {
        "float": {"top1": 90.0, "n": 500},
        "uniform": {**row, "bits": 4, "top1": 87.0},
        "plans": [row],
    }
    if statistics:
        row["versus_float"] = {
            "only_float": 11,
            "only_plan": 3,
            "difference": -1.5,
            "interval": [-2.75, -0.25],
            "p_value": 0.0001,
            "p_holm": 0.031,
        }
        pair = {"first": file, "second": "other.json", "difference": 0.5, "p_value": 0.2}
        found["comparisons"] = [pair]
        part = {"top1": 88.0, "difference": -2.0}
        row["versus_uniform"] = {"difference": 1.5, "p_value": 0.5}
        found["classes"] = [
            {"class": k, "name": "seven", "n": 9, "float": 90.0, "uniform": None, "plans": [part]}
            for k in range(25)
        ]
    return found


class Reader(HTMLParser):
    """The structure of a page: elements with attributes, text, what is still open."""

    VOID = frozenset({"meta", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.section, []).append(data)

    def said(self, section: str) -> str:
        return " ".join("".join(self.text[section]).split())

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] or "" for name, attributes in self.elements if name == "section"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """All that a page can show, in files."""
    names = layer_names(6)
    plan = plan_data(names)
    record = {
        "plan": plan,
        "scores": scores_data(names),
        "front": front_data(names),
        "evaluation": evaluation_data(Plan.from_json(plan)),
    }
    paths = {}
    for name, data in record.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(data))
    return paths


def written(tmp_path: Path, plans: Any, **options: Any) -> str:
    return proxyq.write_report(plans, tmp_path / "page.html", **options).read_text()


def all_of(files: dict[str, Path]) -> dict[str, Any]:
    return {name: files[name] for name in ("scores", "front", "evaluation")}


# -- what is on the page ---------------------------------------------------------------


def test_every_section_is_there_and_in_order(files: dict[str, Path], tmp_path: Path):
    page = Reader(written(tmp_path, files["plan"], **all_of(files)))
    assert page.sections == [*SECTIONS, "plan", "provenance"]
    said = page.said
    assert "2 times" not in said("summary") and "feasible, not proven best (iqp)" in said("summary")
    assert "88.50 %" in said("summary") and "gap20 %" in said("summary").replace(" 20", "20")
    assert "5 bit" in said("budgets") and "90.0 %" in said("budgets")
    assert "pinned" in said("bits") and "bits of the layer's input" in said("bits")
    assert "clado · cost for each bit-width" in said("scores")
    assert "snip · importance" in said("scores") and "≤ 0" in said("scores")
    assert "blocks.1.conv" in said("coupling") and "−0." in said("coupling")
    assert "point 3: size 5.9 bit, cost 0.6, dominated" in said("front")
    assert "1 budget could not be met" in said("front") and "float" in said("front")
    assert "−2.75 to −0.25" in said("accuracy") and "< 0.001" in said("accuracy")
    assert "seven990.088.0 (−2.0)" in said("accuracy").replace(" 88", "88")
    assert "the 20 of 25 classes" in said("accuracy") and "other.json" in said("accuracy")
    assert "11 and 3" in said("accuracy") and "differ" in said("groups")
    assert "versions.jax" in said("provenance") and "ab" * 32 in said("provenance")
    for name in layer_names(6):
        assert name in said("plan")


def test_a_plan_alone_has_no_empty_sections(tmp_path: Path):
    data = plan_data(layer_names(3), budgets=[], provenance={}, method={}, model={})
    del data["solver"]
    data["layers"] = {name: {**one, "group": None} for name, one in data["layers"].items()}
    page = Reader(written(tmp_path, Plan.from_json(data)))
    assert page.sections == ["summary", "bits", "plan"]


def test_tables_and_pictures_are_named(files: dict[str, Path], tmp_path: Path):
    page = Reader(written(tmp_path, files["plan"], **all_of(files)))
    for name, attributes in page.elements:
        if name == "th":
            assert attributes.get("scope") in ("col", "row")
        if name == "svg" and "role" in attributes:
            assert attributes["aria-label"]
    heads = {attributes["id"] for name, attributes in page.elements if name == "h2"}
    for name, attributes in page.elements:
        if name == "section":
            assert attributes["aria-labelledby"] in heads
        if name == "a":
            assert (attributes["href"] or "")[1:] in page.sections


def test_nothing_is_fetched_and_no_script_runs(files: dict[str, Path], tmp_path: Path):
    text = written(tmp_path, files["plan"], **all_of(files))
    page = Reader(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {n for n, _ in page.elements}
    for _, attributes in page.elements:
        assert not {key for key in attributes if key.startswith("on")}
        assert not {"src", "srcset", "style", "xlink:href"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"https?:|//|url\(|@import", text.partition("</style>")[0])
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a) or ""
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
    assert "unsafe" not in policy


def test_the_same_input_gives_the_same_bytes(files: dict[str, Path], tmp_path: Path):
    first = written(tmp_path, files["plan"], **all_of(files))
    assert written(tmp_path, files["plan"], **all_of(files)) == first
    loaded = {
        "scores": ScoreFile.load(files["scores"]),
        "front": Front.load(files["front"]),
        "evaluation": json.loads(files["evaluation"].read_text()),
        "names": ["plan.json"],
    }
    assert written(tmp_path, Plan.load(files["plan"]), **loaded) == first


def test_text_from_files_is_escaped(tmp_path: Path):
    names = [HOSTILE, *layer_names(3)]
    data = plan_data(names)
    data["layers"][HOSTILE]["group"] = data["layers"][names[1]]["group"] = HOSTILE
    data["model"] = {"name": HOSTILE, HOSTILE: HOSTILE}
    data["method"] = {**data["method"], "proxy": HOSTILE}
    data["budgets"][0]["name"] = data["solver"]["name"] = HOSTILE
    data["predicted"] = {
        "auto": {"candidates": [{"proxy": HOSTILE, "kl": 0.1}, HOSTILE], "chosen": HOSTILE}
    }
    plan = Plan.from_json(data)
    evaluation = evaluation_data(plan, HOSTILE)
    evaluation["classes"][0].update({"class": HOSTILE, "name": HOSTILE})
    page = Reader(
        written(
            tmp_path,
            [plan, plan],
            names=[HOSTILE, "other"],
            scores=ScoreFile.from_json(scores_data(names)),
            front=Front.from_json(front_data(names)),
            evaluation=evaluation,
            title=HOSTILE,
        )
    )
    assert "script" not in {name for name, _ in page.elements}
    assert not [1 for _, attributes in page.elements if "onload" in attributes]
    assert page.said("plan").count("<script>alert(1)</script>") == 1
    assert "<script>alert(1)</script>" in page.said("")  # the headline


def test_several_plans_are_told_apart(files: dict[str, Path], tmp_path: Path):
    other = plan_data(layer_names(6), method={"proxy": "sqnr", "bits": BITS})
    other["layers"]["blocks.3.conv"]["weight_bits"] = None
    path = tmp_path / "second.json"
    path.write_text(json.dumps(other))
    page = Reader(written(tmp_path, [files["plan"], path], **all_of(files)))
    assert "chosen by plan B" in page.said("scores")
    assert "second.json: size" in page.said("front") and "by another cost" in page.said("front")
    assert "bits B" in page.said("plan") and "float" in page.said("plan")
    assert "All of them" in page.said("provenance")
    many = Reader(written(tmp_path, [files["plan"]] * 30, names=[f"p{i}" for i in range(30)]))
    assert "bits 30" in many.said("plan")


def test_accuracy_and_scores_that_plans_hold(tmp_path: Path):
    names = layer_names(3)
    data = plan_data(names)
    measured = evaluation_data(Plan.from_json(data), statistics=False)
    data["measured"] = measured
    data["predicted"] = {"scores": {name: [0.4, 0.2, 0.1, 0.0] for name in names}}
    page = Reader(written(tmp_path, Plan.from_json(data), names=["mine.json"]))
    assert "88.50" in page.said("accuracy") and "mine.json" in page.said("accuracy")
    assert "clado (mine.json)" in page.said("scores")
    for scores in (
        {"scores": []},
        {"scores": {names[0]: 1}},
        {"scores": dict.fromkeys(names, "x")},
    ):
        data["predicted"] = scores
        assert "scores" not in Reader(written(tmp_path, Plan.from_json(data))).sections
    data["measured"] = {"float": {"top1": "high", "n": 3}, "plans": []}
    with pytest.raises(ProxyqError, match=r"accuracy in the plan 'plan 1' .*'float.top1'"):
        written(tmp_path, Plan.from_json(data))


@pytest.mark.parametrize("count", [1, 2, 60, 200])
def test_any_number_of_layers(tmp_path: Path, count: int):
    names = layer_names(count, "model.encoder.layers.{}.attention.self.query_projection.linear")
    text = written(
        tmp_path,
        Plan.from_json(plan_data(names)),
        scores=ScoreFile.from_json(scores_data(names)),
        front=Front.from_json(front_data(names, measured=False)),
    )
    page = Reader(text)
    assert ("coupling" in page.sections) == (count > 1)
    assert names[-1] in page.said("plan") and len(text) < 1_500_000
    assert "nan" not in re.findall(r'="(nan|inf|-inf)', text)


# -- arithmetic ------------------------------------------------------------------------


def test_couplings_are_those_of_the_plan():
    names = layer_names(4)
    plan = Plan.from_json(plan_data(names))
    found = coupling_at(ScoreFile.from_json(scores_data(names)).of("clado"), plan)
    whole = matrix(4)
    for a, one in enumerate(plan.layers.values()):
        for b, other in enumerate(plan.layers.values()):
            i, j = (4 * k + BITS.index(x.weight_bits) for k, x in ((a, one), (b, other)))
            assert found[a, b] == whole[i, j]
    alike = normalised(found)
    assert np.allclose(np.diag(alike), 1) and np.allclose(np.diag(alike, 1), -0.5)
    assert np.isnan(normalised(np.zeros((2, 2)))).all()


def test_scales_and_numbers():
    assert Scale(0, 10)(2.5) == 0.25 and Scale(0.01, 100, True)(1) == pytest.approx(0.5)
    assert scale_of([1e-5, 1.0], log=True).log and not scale_of([1, 5], log=True).log
    assert scale_of([3, 7], zero=True)(0) == 0 and scale_of([]).ticks()
    assert Scale(0, 1).ticks(5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert Scale(0.5, 2000, True).ticks() == [1, 10, 100, 1000]
    for extreme in ([1e308, -1e308], [5e-324, 1e300], [0.0], [1e-320, 2e-320], [1e16, 1e16 + 2]):
        for log in (False, True):
            assert len(scale_of(extreme, log=log, zero=log).ticks()) < 20
    assert scale_of([2.0, 2.0])(2.0) == pytest.approx(0.5)
    assert [number(v) for v in (-1.5, 1e-5, 2.5e-7)] == ["−1.5", "10⁻⁵", "2.5×10⁻⁷"]
    assert tag("p", "a<b", Markup("<i>"), class_='x"') == '<p class="x&quot;">a&lt;b<i></p>'
    assert escaped("\ud800\u0000") == "\ufffd\ufffd"


# -- what is refused -------------------------------------------------------------------


def test_files_of_different_models_are_refused(files: dict[str, Path], tmp_path: Path):
    stranger = Plan.from_json(plan_data(layer_names(6, "other.{}")))
    with pytest.raises(ProxyqError, match=r"different models: .* has a layer 'blocks.0.conv'"):
        written(tmp_path, [files["plan"], stranger])
    with pytest.raises(ProxyqError, match=r"the scores and the plan .* of different models"):
        written(tmp_path, stranger, scores=files["scores"])
    with pytest.raises(ProxyqError, match=r"the front and the plan .* of different models"):
        written(tmp_path, stranger, front=files["front"])
    wider = plan_data(layer_names(6))
    wider["layers"]["blocks.2.conv"]["weights"] = 5
    with pytest.raises(ProxyqError, match=r"'blocks.2.conv' has 3,072 weights in the one and 5"):
        written(tmp_path, Plan.from_json(wider), scores=files["scores"])
    evaluation = json.loads(files["evaluation"].read_text())
    evaluation["plans"][0]["size_bits"] = 8
    with pytest.raises(ProxyqError, match=r"the evaluation is of another plan than 'plan.json'"):
        written(tmp_path, Plan.load(files["plan"]), names=["plan.json"], evaluation=evaluation)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "holds no measured accuracy: it must be the JSON object"),
        ({"schema": "proxyq/plan/1"}, "proxyq evaluate --json"),
        ({"float": {"top1": 101, "n": 3}, "plans": [{}]}, "'float.top1'"),
        ({"float": {"top1": 9, "n": 3}, "plans": []}, "'plans'"),
        ({"float": {"top1": 9, "n": 3}, "plans": [{"file": 3}]}, "'plans.0.top1': it is missing"),
        (
            {
                "float": {"top1": 9, "n": 3},
                "plans": [{"file": "a", "top1": 9, "size_bits": 8, "average_bits": 2}],
                "classes": [{"class": 5, "n": 3, "float": 9, "plans": []}],
            },
            "is wrong: the class 5 must hold 1 plans",
        ),
        ({"float": {"top1": float("nan"), "n": 3}, "plans": []}, "'float.top1'"),
    ],
)
def test_bad_evaluations_get_one_sentence(data: Any, says: str):
    with pytest.raises(ProxyqError, match=re.escape(says)) as caught:
        EvaluationFile.from_json(data, "evaluation 'e.json'")
    assert str(caught.value).startswith("the evaluation 'e.json' ") and caught.value.exit_code == 1


def test_wrong_arguments(files: dict[str, Path], tmp_path: Path):
    with pytest.raises(UsageError, match=r"a report is a file that ends in \.html or \.htm"):
        proxyq.write_report(files["plan"], tmp_path / "plan.json")
    with pytest.raises(UsageError, match="at least one plan"):
        written(tmp_path, [])
    with pytest.raises(UsageError, match="as many as the plans, 1, got 2"):
        written(tmp_path, files["plan"], names=["a", "b"])


# -- the command -----------------------------------------------------------------------


def test_command(files: dict[str, Path], tmp_path: Path):
    out = tmp_path / "report.html"
    options = [word for name, file in all_of(files).items() for word in (f"--{name}", file)]
    done = here("report", files["plan"], *options, "--title", "Ours & theirs", "--out", out)
    assert (done.code, done.out) == (0, "") and done.err == f"proxyq: wrote {out}\n"
    page = Reader(out.read_text())
    assert page.said("").startswith("Ours & theirs") and "coupling" in page.sections
    done = here("report", files["plan"], "--out", out, "--json")
    assert json.loads(done.out) == {"file": str(out), "bytes": out.stat().st_size}


def test_command_refuses(files: dict[str, Path], tmp_path: Path):
    out = tmp_path / "report.html"
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    plan = files["plan"]
    for code, says, words in (
        (2, "missing option '--out'", [plan]),
        (2, "ends in .html", [plan, "--out", plan]),
        (2, "missing argument", ["--out", out]),
        (1, "cannot read the plan", [tmp_path / "absent.json", "--out", out]),
        (1, "is not valid JSON", [broken, "--out", out]),
        (1, "holds no scores", [plan, "--scores", plan, "--out", out]),
        (1, "holds no front", [plan, "--front", plan, "--out", out]),
        (1, "holds no measured accuracy", [plan, "--evaluation", plan, "--out", out]),
        (1, "does not exist", [plan, "--out", tmp_path / "no" / "report.html"]),
    ):
        done = here("report", *words)
        assert (done.code, done.out) == (code, ""), done.err
        assert says in done.err and done.err.count("\n") == 1, done.err
    assert not out.exists()


# -- in a browser ----------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_a_browser_shows_it(files: dict[str, Path], tmp_path: Path):
    from PIL import Image

    page = proxyq.write_report(files["plan"], tmp_path / "page.html", **all_of(files))
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [
            *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--enable-logging=stderr", "--dump-dom", "--hide-scrollbars"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"),
            *("--window-size=1280,4000", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        # Without a bus to ask for settings it would wait for one.
        env={**os.environ, "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
    )
    assert done.returncode == 0, done.stderr
    # What a page does wrong, a policy that is broken included, is said on the console.
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert Reader(done.stdout).sections == [*SECTIONS, "plan", "provenance"]
    with Image.open(picture) as image:
        assert image.size == (1280, 4000)
        colours = image.convert("RGB").getcolors(1 << 24) or []
    shares = sorted((count / (1280 * 4000) for count, _ in colours), reverse=True)
    assert len(colours) > 100 and shares[0] < 0.95
    # Bits are coloured as the style says, so the style was applied.
    assert {(47, 111, 163), (42, 157, 154)} <= {colour for _, colour in colours}
