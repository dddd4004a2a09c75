"""The tutorial, word for word: every command does what the page shows, to the numbers."""

import re
import shlex
from pathlib import Path

import pytest
from commandline import here

DOCS = Path(__file__).resolve().parents[1] / "docs"
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")
# How long something took is another thing on every machine.
SECONDS = re.compile(r"\d+(?:\.\d+)? s\b")


def steps():
    """The commands of the page, each with what it shows below it."""
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    found = re.findall(r"^```sh\n(.*?)^```\n\n```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(found) == text.count("```sh\n"), "a command without its output"
    return found


def arguments(command):
    """Of `proxyq`, as a shell would split them."""
    program, *rest = shlex.split(command.replace("\\\n", " "))
    assert program == "proxyq"
    return rest


def skeleton(text):
    """The text without its numbers, blanks and bars, and the numbers."""
    text = SECONDS.sub("seconds", text)
    numbers = [float(number.replace(",", "")) for number in NUMBER.findall(text)]
    words = " ".join(re.sub(r"[█─]+", " ", NUMBER.sub("#", text)).split())
    return words, numbers


def test_it_starts_at_the_installation_and_ends_with_an_export():
    assert [arguments(command)[0] for command, _ in steps()] == [
        *("inspect", "search", "evaluate", "quantize", "search", "export"),
    ]
    assert "pip install" in (DOCS / "tutorial.md").read_text(encoding="utf-8").split("```sh")[0]


def test_numbers_and_words_are_told_apart():
    shown = "stem   8 ████████  1,300  0.5 KiB\n─────\ncost -8.2e-06, 0.03 s, size=2.5bit\n"
    words, numbers = skeleton(shown)
    assert words == "stem # # # KiB cost #, seconds, size=#bit"
    assert numbers == [8, 1300, 0.5, -8.2e-06, 2.5]


@pytest.mark.slow
def test_every_command_prints_what_the_page_shows(tmp_path, monkeypatch):
    pytest.importorskip("qwix")
    monkeypatch.chdir(tmp_path)
    for command, shown in steps():
        done = here(*arguments(command))
        assert done.code == 0, done.err
        words, numbers = skeleton(done.out + done.err)
        expected_words, expected = skeleton(shown)
        assert words == expected_words, command
        # A hair more or less of accuracy is the processor's; a bit more or less is not.
        assert numbers == pytest.approx(expected, rel=0.02, abs=0.3), command
