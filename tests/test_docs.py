"""The site's pages: every public name is described, every page is reached, nothing has moved."""

import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import proxyq
from proxyq.export.registry import EXPORTERS
from proxyq.proxies import PROXIES
from proxyq.search.recipes import available_recipes

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def described():
    """What the API pages take from docstrings, as written."""
    return [
        path
        for page in sorted((DOCS / "api").glob("*.md"))
        for path in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def test_every_public_name_is_described():
    names = [path.rpartition(".")[2] for path in described()]
    assert len(set(names)) == len(names)
    public = {*proxyq._HOME, "search", "ProxyqError", "UsageError"}
    assert public <= set(names)


@pytest.mark.parametrize("path", described())
def test_what_is_described_is_there_and_has_a_docstring(path):
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert found.__module__ == module, "it is defined elsewhere"
    assert found.__doc__ and not found.__doc__.startswith(f"{name}(")


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nav():
    """The pages that `mkdocs.yml` names, without a reader of YAML."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    return re.findall(r": ([\w/]+\.md)$", text, re.MULTILINE)


def test_every_page_in_a_folder_is_in_the_navigation_and_there():
    named = nav()
    assert len(set(named)) == len(named)
    assert all((DOCS / page).is_file() for page in named)
    # Pages at the top are added by themselves.
    deeper = {str(p.relative_to(DOCS)) for p in PAGES if p.parent != DOCS}
    assert deeper <= set(named)


def test_pages_that_nothing_names_come_last_among_the_guides(hooks, tmp_path):
    for name in ("index", "named", "scale", "other"):
        (tmp_path / f"{name}.md").write_text("# x")
    config = {
        "docs_dir": str(tmp_path),
        "nav": [{"Home": "index.md"}, {"Guides": [{"Named": "named.md"}]}, {"API": ["a/b.md"]}],
    }
    assert hooks.on_config(config)["nav"][1] == {
        "Guides": [{"Named": "named.md"}, "other.md", "scale.md"]
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_links_and_snippets_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).is_file(), target
    for file in re.findall(r'^--8<-- "(.+)"$', text, re.MULTILINE):
        assert (ROOT / file).is_file(), file


def test_every_proxy_recipe_and_format_has_its_place():
    methods = "\n".join(
        page.read_text(encoding="utf-8") for page in (DOCS / "methods").glob("*.md")
    )
    methods += (DOCS / "which_proxy.md").read_text(encoding="utf-8")
    baselines = {proxy.name for proxy in PROXIES if proxy.baseline}
    for name in set(PROXIES.available()) - baselines:
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", methods), name
    for name in available_recipes():
        assert name in methods, name
    guides = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(one.name in guides for one in EXPORTERS)


def test_the_extra_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    names = {re.split(r"[\[>]", one)[0] for one in project["optional-dependencies"]["docs"]}
    assert names <= pinned
