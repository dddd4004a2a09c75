"""Names for the shell's Tab key: read from files, so that nothing heavy is imported.

`proxyq --install-completion` sets it up. Each function takes what has been typed of a word and
returns the words that it may become, most with a sentence about them. They must answer at once and
never fail: where nothing can be read there is nothing to offer.
"""

import ast
import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from pathlib import Path

from proxyq.errors import ProxyqError
from proxyq.shelf import shelf

Offer = tuple[str, str]
"""A word and a sentence about it."""

VARIABLE = "_PROXYQ_COMPLETE"
"""What the shell's function sets to ask for words instead of running a command."""
_PACKAGE = Path(__file__).resolve().parents[1]
_TORCHVISION = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
_TIMM = re.compile(r"^@register_model\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
_before = ""
"""What bash has cut off the word that is being typed (see `rejoin`)."""


def _fitting(incomplete: str, offers: Callable[[str], Iterable[Offer]]) -> list[Offer]:
    """What begins as the word does; no error ever."""
    typed = _before + incomplete
    try:
        found = [offer for offer in offers(typed) if offer[0].startswith(typed)]
    except (OSError, ValueError, SyntaxError, ProxyqError):
        return []
    return [(word.removeprefix(_before), about) for word, about in found]


# -- what there is ---------------------------------------------------------------------


def proxy_names() -> list[Offer]:
    """Every proxy, those of installed packages and the formulas on the shelf, sorted.

    A proxy is a function under `@register`; its name is the function's with dashes.
    """
    found: dict[str, str] = {}
    for file in (_PACKAGE / "proxies").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "@register" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and any(map(_registers, node.decorator_list)):
                name = _given_name(node) or node.name.replace("_", "-")
                found[name] = (ast.get_docstring(node) or "").partition("\n")[0]
    for name in _plugins("proxyq.proxies"):
        found.setdefault(name, "From an installed package.")
    for part in ("proxies/published", "proxies/evolved"):
        for file in shelf(part).glob("*.json"):
            found[f"formula:{file.stem}"] = "A formula on the shelf."
    return sorted(found.items())


def _registers(node: ast.expr) -> bool:
    called = node.func if isinstance(node, ast.Call) else node
    return isinstance(called, ast.Name) and called.id == "register"


def _given_name(node: ast.FunctionDef) -> str | None:
    for call in node.decorator_list:
        for given in getattr(call, "keywords", ()):
            if given.arg == "name" and isinstance(given.value, ast.Constant):
                return str(given.value.value)
    return None


def recipe_names() -> list[Offer]:
    """Every recipe on the shelf, sorted, with its title."""
    import tomllib

    files = sorted(shelf("search/recipes").glob("*.toml"))
    return [(file.stem, tomllib.loads(file.read_text("utf-8")).get("title", "")) for file in files]


def format_names() -> list[Offer]:
    """Every format that `proxyq export` writes, those of installed packages last."""
    text = (_PACKAGE / "export" / "registry.py").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_OURS":
            found = {name: about for name, (_, about) in ast.literal_eval(node.value).items()}
    for name in _plugins("proxyq.exporters"):
        found.setdefault(name, "from an installed package")
    return list(found.items())


def torchvision_names() -> list[str]:
    """The models that `proxyq models` lists of torchvision, from the text of its modules."""
    return _registered("torchvision", _TORCHVISION)


def timm_names() -> list[str]:
    """The same of timm."""
    return _registered("timm", _TIMM)


def _registered(package: str, pattern: re.Pattern[str]) -> list[str]:
    spec = importlib.util.find_spec(package)  # of a whole package: nothing is run
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    return sorted(
        name
        for folder in folders
        for file in (Path(folder) / "models").glob("*.py")
        for name in pattern.findall(file.read_text(encoding="utf-8"))
    )


def _plugins(group: str) -> list[str]:
    from importlib.metadata import entry_points

    return sorted({entry.name for entry in entry_points(group=group)})


# -- what may stand in an option -------------------------------------------------------


def proxies(incomplete: str) -> list[Offer]:
    """A proxy's name; a formula's file is left to the shell."""
    return _fitting(incomplete, lambda _: proxy_names())


def proxies_or_auto(incomplete: str) -> list[Offer]:
    """`--proxy` of `search`."""
    auto = ("auto", "Tries several and keeps the plan that measures best.")
    return _fitting(incomplete, lambda _: [auto, *proxy_names()])


def proxies_or_all(incomplete: str) -> list[Offer]:
    """`--proxy` where all may be asked for."""
    every = ("all", "Every one that neither trains nor runs pairs of layers.")
    return _fitting(incomplete, lambda _: [every, *proxy_names()])


def recipes(incomplete: str) -> list[Offer]:
    """`--recipe`; a file of one's own is left to the shell."""
    return _fitting(incomplete, lambda _: recipe_names())


def formats(incomplete: str) -> list[Offer]:
    """`--to` of `export`."""
    return _fitting(incomplete, lambda _: format_names())


def models(incomplete: str) -> list[Offer]:
    """MODEL: its library first, then its name; files are left to the shell."""
    return _fitting(incomplete, _models)


def _models(typed: str) -> list[Offer]:
    library, colon, _ = typed.partition(":")
    listed = {"torchvision": torchvision_names, "timm": timm_names}
    if colon:
        names = listed[library]() if library in listed else []
        return [(f"{library}:{name}", "") for name in names]
    found = [("digits", "The embedded network.")]
    for prefix, package in (*((name, name) for name in listed), ("hf", "transformers")):
        if importlib.util.find_spec(package) is not None:
            found.append((f"{prefix}:", f"A model of {package}."))
    return found


# -- bash ------------------------------------------------------------------------------


def rejoin(words: list[str], place: int) -> tuple[list[str], int, str]:
    """Words as they were typed, from those that bash makes of them.

    Bash ends words at colons and equals signs (its `COMP_WORDBREAKS`), so that `torchvision:res`
    is three of them, and puts what it gets in the place of the last. `place` is the number of the
    word with the cursor. **Returns** the words up to there, the last of them without what stands
    before its last colon, its number, and what stands before that colon. `--proxy=NAME` becomes
    `--proxy NAME`.
    """
    joined: list[str] = []
    glued = False
    words = [*words, *[""] * (place + 1 - len(words))][: place + 1]
    for index, word in enumerate(words):
        colons = word != "" and not word.strip(":")
        if word == "=" and joined and joined[-1].startswith("--"):
            if index == place:
                joined.append("")
        elif joined and (glued or colons):
            joined[-1] += word
        else:
            joined.append(word)
        glued = colons
    head, colon, joined[-1] = joined[-1].rpartition(":")
    return joined, len(joined) - 1, head + colon


def prepare(environment: MutableMapping[str, str] | None = None) -> None:
    """Undo what bash does to words with colons, where it is bash that asks."""
    global _before
    environment = os.environ if environment is None else environment
    _before = ""
    if environment.get(VARIABLE) != "complete_bash":
        return
    with contextlib.suppress(KeyError, ValueError):
        # One word a line, as the shell's function hands them over (its IFS is a line's end).
        words, place = environment["COMP_WORDS"].split("\n"), int(environment["COMP_CWORD"])
        words, place, _before = rejoin(words, place)
        environment["COMP_WORDS"] = "\n".join(words)
        environment["COMP_CWORD"] = str(place)


def asked(arguments: Sequence[str] | None) -> bool:
    """Whether this process answers a shell, or sets one up, and runs no command."""
    words = sys.argv[1:] if arguments is None else arguments
    return VARIABLE in os.environ or bool({"--install-completion", "--show-completion"} & {*words})
