"""Words for the Tab key: the names that there are, at once, whatever bash does to colons."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import alone, here

from proxyq.cli import completion
from proxyq.export.registry import EXPORTERS
from proxyq.proxies import PROXIES
from proxyq.proxies.formula import available_formulas
from proxyq.search.recipes import available_recipes, load_recipe


def words(offers):
    return [word for word, _ in offers]


# -- the names are those of the registries -----------------------------------------------


def test_proxies_are_those_that_are_registered():
    found = dict(completion.proxy_names())
    assert set(found) == {*PROXIES.available(), *(f"formula:{n}" for n in available_formulas())}
    assert all(found[proxy.name] == proxy.summary for proxy in PROXIES)


def test_recipes_and_formats_are_those_that_are_registered():
    assert words(completion.recipe_names()) == available_recipes()
    assert dict(completion.recipe_names())["ompq"] == load_recipe("ompq").title
    assert completion.format_names() == [(one.name, one.summary) for one in EXPORTERS]


@pytest.mark.slow  # it imports torch
def test_models_are_those_that_are_listed():
    torchvision = pytest.importorskip("proxyq.model.torch_import").import_torchvision
    pytest.importorskip("torch")
    shelf = torchvision().models
    listed = [n for n in shelf.list_models(module=shelf) if not n.startswith("quantized_")]
    assert completion.torchvision_names() == listed


@pytest.mark.slow
def test_models_of_timm_are_those_that_are_listed():
    timm = pytest.importorskip("timm")
    found, listed = set(completion.timm_names()), set(timm.list_models())
    # Some are registered under other names by a function, which no text tells.
    assert found <= listed and len(found) > 0.95 * len(listed)


# -- what is offered ---------------------------------------------------------------------


def test_what_begins_as_the_word_does():
    assert words(completion.proxies("ortho")) == ["orthogonality"]
    assert words(completion.proxies("formula:evolved-")) == [f"formula:evolved-{n}" for n in "123"]
    assert words(completion.recipes("")) == available_recipes()
    assert words(completion.recipes("h")) == ["hawq-v3"]
    assert words(completion.formats("onn")) == ["onnx"]
    assert words(completion.proxies("no such")) == []
    assert words(completion.proxies_or_auto("a"))[0] == "auto"
    assert "auto" not in words(completion.proxies_or_all("a"))


def test_models_by_library():
    assert "digits" in words(completion.models(""))
    assert words(completion.models("dig")) == ["digits"]
    assert words(completion.models("nothing:res")) == []
    if completion.torchvision_names():
        assert "torchvision:" in words(completion.models("torch"))
        assert "torchvision:resnet18" in words(completion.models("torchvision:resnet1"))


def test_nothing_is_offered_where_nothing_can_be_read(monkeypatch, tmp_path):
    monkeypatch.setattr(completion, "_PACKAGE", tmp_path)
    assert completion.formats("") == []
    monkeypatch.setattr(completion, "shelf", lambda folder: tmp_path / folder)
    assert completion.recipes("") == []


def test_no_torchvision_no_models_of_it(monkeypatch):
    monkeypatch.setattr(completion.importlib.util, "find_spec", lambda name: None)
    assert words(completion.models("")) == ["digits"]
    assert words(completion.models("torchvision:")) == []


# -- bash --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["proxyq", "search", "dig"], (["proxyq", "search", "dig"], "")),
        (["proxyq", "search", "torchvision", ":"], (["proxyq", "search", ""], "torchvision:")),
        (["proxyq", "search", "a", ":", "r"], (["proxyq", "search", "r"], "a:")),
        (["proxyq", "search", "a", ":", "r", ""], (["proxyq", "search", "a:r", ""], "")),
        (
            ["proxyq", "search", "f.py", ":", "g", "--to"],
            (["proxyq", "search", "f.py:g", "--to"], ""),
        ),
        (["proxyq", "search", "--proxy", "=", "or"], (["proxyq", "search", "--proxy", "or"], "")),
        (["proxyq", "search", "--proxy", "="], (["proxyq", "search", "--proxy", ""], "")),
        (["proxyq", "--proxy", "=", "formula", ":", "e"], (["proxyq", "--proxy", "e"], "formula:")),
    ],
)
def test_words_are_put_together_again(typed, expected):
    joined, place, before = completion.rejoin(typed, len(typed) - 1)
    assert (joined, before) == expected
    assert place == len(joined) - 1


def test_what_follows_the_cursor_does_not_count():
    assert completion.rejoin(["proxyq", "se", "--json"], 1) == (["proxyq", "se"], 1, "")
    assert completion.rejoin(["proxyq"], 1) == (["proxyq", ""], 1, "")


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """What bash would offer for words as it breaks them, through the function that is installed."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "proxyq"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m proxyq "$@"\n')
    command.chmod(0o755)
    shown = alone(
        "--show-completion",
        "bash",
        cache=folder,
        _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1",
    )
    assert shown.code == 0 and shown.err == "", shown.err

    def offered(*typed: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in ("proxyq", *typed))
        script = (
            f"{shown.out}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(typed)}\n"
            f'_proxyq_completion "{command}"; printf "%s\\n" "${{COMPREPLY[@]}}"'
        )
        done = subprocess.run(
            ["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout.split()

    return offered


def test_bash_completes(bash):
    assert bash("pareto", "--proxy", "formula", ":", "ev") == [f"evolved-{n}" for n in "123"]
    assert "doctor" in bash("")


def test_it_answers_without_what_is_heavy():
    code = """
import os, sys
os.environ.update(_PROXYQ_COMPLETE="complete_bash", COMP_WORDS="proxyq\\nsearch\\n--proxy\\n")
os.environ["COMP_CWORD"] = "3"
from proxyq.cli import main
assert main([]) == 0
heavy = {"jax", "jaxlib", "numpy", "scipy", "torch", "torchvision", "timm", "matplotlib", "flax"}
print("heavy:", sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    *offered, last = done.stdout.splitlines()
    assert last == "heavy: []"
    assert offered[0] == "auto" and "orthogonality" in offered


def test_install_writes_what_the_shell_reads(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "proxyq", "--install-completion", "fish"],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **os.environ,
            "HOME": str(tmp_path),
            "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    written = list(tmp_path.rglob("proxyq.fish"))
    assert len(written) == 1 and "_PROXYQ_COMPLETE" in written[0].read_text()


def test_a_command_that_exits_is_still_told(monkeypatch):
    from proxyq.cli import app

    monkeypatch.setattr(app.typer.main, "get_command", lambda _: _Exits())
    done = here("models")
    assert done.code == 1 and "SystemExit" in done.err


class _Exits:
    def main(self, **_):
        raise SystemExit(3)
