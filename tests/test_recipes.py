"""Recipes on the shelf, recipes from files, and the shelves inside a wheel."""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from proxyq.errors import ProxyqError, UsageError
from proxyq.search.allocate import SOLVERS, build_problem, shared_by, solve
from proxyq.search.recipes import available_recipes, load_recipe
from proxyq.shelf import SHELVES, shelf

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class PlainLayer:
    name: str
    weights: int
    macs: int
    group: str | None = None
    shares_input: str | None = None


def test_every_recipe_on_the_shelf_loads() -> None:
    names = available_recipes()
    assert {"ompq", "csmpq", "clado", "hawq-v3", "limpq"} <= set(names)
    for name in names:
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.reference and recipe.note
        assert recipe.solver in ("auto", "iqp") or recipe.solver in SOLVERS


def test_the_published_settings() -> None:
    ompq = load_recipe("ompq")
    assert (ompq.proxy, ompq.bits, ompq.solver) == ("orthogonality", [2, 3, 4], "lp")
    assert ompq.solver_options() == {"rounding": "closest-below"}
    assert ompq.options["batch_norm"] == "batch" and ompq.options["suffix_mean"] is True
    assert ompq.ties == ["same-feature"]
    csmpq = load_recipe("csmpq")
    assert (csmpq.proxy, csmpq.options["form"]) == ("separability", "exp")
    assert csmpq.samples == 32 and csmpq.correction == "none"


def test_the_recipes_that_choose_activations() -> None:
    hawq = load_recipe("hawq-v3")
    assert (hawq.proxy, hawq.bits, hawq.activation_bits) == ("hessian-trace", [4, 8], "weights")
    assert hawq.ties == ["same-input"]
    assert (hawq.pins, hawq.outliers) == (["@first=8", "@last=8"], "keep")
    clado = load_recipe("clado")
    assert (clado.proxy, clado.solver, clado.bits) == ("clado", "iqp", [2, 4, 8])
    assert clado.options == {"pair_loss": "cross-entropy", "psd": True}
    limpq = load_recipe("limpq")
    assert (limpq.proxy, limpq.activation_bits) == ("limpq", [2, 3, 4, 5, 6])
    assert limpq.pins == ["@first=8/8", "@last=8/8"] and limpq.ties == []
    assert (limpq.outliers, limpq.options) == ("erase", {"alpha": 2.0, "ends": False})


@pytest.mark.parametrize("name", available_recipes())
def test_every_recipe_makes_a_problem(name: str) -> None:
    """Pins, ties and bits of a recipe fit together, whatever its proxy measures."""
    recipe = load_recipe(name)
    layers = [
        PlainLayer("stem", 432, 442_368),
        PlainLayer("block.conv1", 2304, 2_359_296, shares_input="block.conv1"),
        PlainLayer("block.down", 512, 131_072, shares_input="block.conv1"),
        PlainLayer("head", 640, 640),
    ]
    beside = recipe.activation_bits
    chosen = np.zeros((4, len(beside))) if isinstance(beside, list) else None
    problem = build_problem(
        layers,
        -np.ones((4, 1)) * recipe.bits,
        recipe.bits,
        ["bops=60%", "size=50%"],
        pins=recipe.pins,
        shared=shared_by(layers, "shares_input") if "same-input" in recipe.ties else (),
        activation_bits=beside,
        activation_cost=chosen,
    )
    answer = solve(problem, recipe.solver, **recipe.solver_options())
    if recipe.pins:
        assert (answer.bits[0], answer.bits[-1]) == (8, 8)
    if "same-input" in recipe.ties:
        assert answer.bits[1] == answer.bits[2]
    if beside == "weights":
        assert answer.activation_bits == answer.bits


def test_unknown_names_get_near_misses() -> None:
    with pytest.raises(UsageError, match="did you mean 'ompq'"):
        load_recipe("ompk")
    with pytest.raises(UsageError, match="ompq"):
        load_recipe("zzz")
    with pytest.raises(ProxyqError, match="cannot read the recipe"):
        load_recipe("missing.toml")


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    text = 'name = "mine"\nreference = "me"\nproxy = "snip"\nbits = [2, 8]\nties = ["a.*"]\n'
    path = tmp_path / "mine.toml"
    path.write_text(text)
    recipe = load_recipe(path)
    assert recipe.solver == "auto" and recipe.solver_options() == {}
    assert recipe.ties == ["a.*"]
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bits = [2, 9]", "'bits'.*1 to 8 or 16, got 9"),
        ("bits = []", "'bits'.*at least one"),
        ("bits = 4", "'bits'"),
        ('bits = ["4"]', r"'bits\.0'"),
        ('rounding = "closest"', "'rounding'.*did you mean 'closest-below'"),
        ("samples = 0", "'samples'"),
        ('correction = "some"', "'correction'"),
        ('activation_bits = "weight"', "'activation_bits': must be .*'weights', got 'weight'"),
        ("activation_bits = 9", "'activation_bits'.*1 to 8 or 16, got 9"),
        ("activation_bits = [2, 9]", "'activation_bits'.*1 to 8 or 16, got 9"),
        ("activation_bits = []", "'activation_bits'.*at least one"),
        ("activation_bits = 2.5", "'activation_bits'"),
        ('activation_bits = ["4"]', "'activation_bits"),
        ('outliers = "remove"', "'outliers'.*'keep' or 'erase'"),
        ("colour = 1", "'colour': no such field"),
        ("proxy = 3", "'proxy'"),
        ("proxy =", "not valid TOML"),
        ("[options]\nbeta = [1]", r"'options\.beta"),
    ],
)
def test_a_bad_recipe_is_named_in_one_sentence(tmp_path: Path, line: str, words: str) -> None:
    keys = {"name": '"mine"', "reference": '"me"', "proxy": '"snip"', "bits": "[2, 4]"}
    keys.pop(line.split(" =")[0], None)
    path = tmp_path / "mine.toml"
    path.write_text("\n".join([*(f"{key} = {value}" for key, value in keys.items()), line, ""]))
    with pytest.raises(ProxyqError, match=words) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_shelves_hold_no_python_and_a_readme() -> None:
    for name in SHELVES:
        assert (shelf(name) / "README.md").is_file()
        assert not list(shelf(name).rglob("*.py"))
    with pytest.raises(ProxyqError, match="missing"):
        shelf("tests")
    with pytest.raises(ProxyqError, match="missing"):
        shelf("search/nothing")


def test_a_wheel_carries_the_shelves_and_one_name(tmp_path: Path) -> None:
    """Built from a copy of the tracked kinds of files, so the checkout stays clean."""
    import shutil

    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("proxyq", *SHELVES):
        ignored = shutil.ignore_patterns("__pycache__", "*.npz", "*.safetensors")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for command in ("wheel", "sdist"):
        build = (
            f"import setuptools.build_meta as b, sys; print(b.build_{command}({str(tmp_path)!r}))"
        )
        subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"proxyq"}
    for recipe in available_recipes():
        assert f"proxyq/_shelf/search/recipes/{recipe}.toml" in names
    for name in SHELVES:
        assert f"proxyq/_shelf/{name}/README.md" in names
    # The installed package finds them, with the checkout out of sight.
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import proxyq.search.recipes as r; print(r.__file__); "
        "print(r.load_recipe('ompq').name, *r.available_recipes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=site,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    where, listed = done.stdout.splitlines()
    assert where.startswith(str(site))
    assert listed.split()[0] == "ompq"
    # So does a wheel made from the source distribution.
    import tarfile

    (archive,) = tmp_path.glob("*.tar.gz")
    inside = tarfile.open(archive).getnames()  # noqa: SIM115
    assert any(name.endswith("/search/recipes/ompq.toml") for name in inside)
    assert any(name.endswith("/setup.py") for name in inside)
