"""Damaged and hostile files: every loader gives a valid object or one sentence, in bounds.

Two kinds of noise: bytes of a good file changed, cut, doubled or taken out; and what is written in
it changed, with the syntax kept: fields missing, of another type, null, huge, negative, NaN, nested
deeply, named twice, of another schema, in other letters or another order. Each draws a seed.
"""

import copy
import io
import json
import math
import random
import resource
import struct
import time
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from commandline import here
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

import proxyq
from proxyq.checkpoint import Checkpoint
from proxyq.data import load_data
from proxyq.data.npz import load_npz
from proxyq.data.prepared import load_prepared
from proxyq.errors import ProxyqError
from proxyq.files import MOST_BYTES, read_bytes, read_json
from proxyq.model.digits import load_digits
from proxyq.model.function_import import from_function
from proxyq.model.load.weights import with_weights
from proxyq.model.model import Model
from proxyq.proxies import PROXIES, Cache
from proxyq.proxies.formula import Formula
from proxyq.ptq import unpack
from proxyq.ptq.packed import load_packed, save_packed
from proxyq.search.allocate.latency import load_latency
from proxyq.search.allocate.plan import Plan
from proxyq.search.evaluation_file import EvaluationFile
from proxyq.search.front_file import Front
from proxyq.search.recipes import Recipe, load_recipe
from proxyq.search.scores_file import ScoreFile
from proxyq.search.table_file import MeasuredTable
from proxyq.shelf import shelf

SECONDS = 10.0
"""For one file, on a machine that does much else; they take milliseconds."""
GROWTH = 512 << 20
"""Bytes by which reading damaged files may enlarge the process."""
MANY = 1000
Loader = Callable[[Path], Any]


@dataclass(frozen=True)
class Kind:
    """A good file's `content`, what reads it, and what a good object must be able to do."""

    suffix: str
    content: bytes
    load: Loader
    use: Callable[[Any], Any] = lambda found: None


def _record(kind: Any) -> Loader:
    return lambda path: kind.load(path)


def _again(found: Any) -> None:
    """What was read can be shown, and written and read again as the same."""
    assert type(found).from_json(json.loads(found.to_json())) == found
    found.to_json().encode()
    assert str(found) and repr(found)


def _use_scores(found: ScoreFile) -> None:
    _again(found)
    for name in found.proxies:
        found.of(name)
    assert len(found.network_layers()) == len(found.layers)
    for read in (found.errors, found.steps):
        read()


def _use_front(found: Front) -> None:
    _again(found)
    assert len(found.plans) == len(found.points)


def _use_table(found: MeasuredTable) -> None:
    _again(found)
    assert found.bits.shape == (len(found.plans), len(found.layers))
    found.column("kl")


def _use_arrays(found: dict[str, np.ndarray]) -> None:
    assert all(isinstance(one, np.ndarray) for one in found.values())


def _unpacked(path: Path) -> Any:
    """The reader that stands alone has `ValueError`s for sentences."""
    try:
        return unpack.load(path)
    except ValueError as error:
        raise ProxyqError(str(error)) from None


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """A good file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    digits = load_digits()

    def run(*words: object) -> None:
        done = here(*words, "--quiet")
        assert done.code == 0, done.err

    proxies = ("--proxy", "params", "--proxy", "sqnr", "--bits", "2,4")
    run("search", "--proxy", "params", "--budget", "size=4bit", "--out", folder / "plan.json")
    run("score", *proxies, "--activation-bits", "8", "--out", folder / "scores.json")
    run(
        *("pareto", folder / "scores.json", "--proxy", "sqnr", "--budget", "size=2bit..4bit"),
        *("--points", "3", "--out", folder / "front.json"),
    )
    table = json.loads((shelf("search/tables") / "digits.json").read_text())
    table["plans"] = table["plans"][:6]
    measured = {"top1": 90.5, "size_bits": 1000, "average_bits": 3.5, "kl": 0.25}
    versus = {"difference": -1.0, "interval": [-2, 0.5], "p_value": 0.5, "only_float": 3}
    evaluation = {
        "float": {"top1": 99.0, "n": 400},
        "uniform": {**measured, "bits": 4, "versus_float": versus},
        "plans": [{**measured, "file": "plan.json", "correction": "none"}],
        "comparisons": [{"first": "a", "second": "b", "p_holm": 0.25}],
        "classes": [
            {"class": 0, "n": 40, "float": 98, "plans": [{"top1": 90, "difference": -8}]},
        ],
    }
    latency = {
        "schema": "proxyq/latency/1",
        "device": "none",
        "other_seconds": 1e-4,
        "layers": {
            "stem": [{"weight_bits": b, "activation_bits": None, "seconds": b / 7} for b in (2, 4)]
        },
    }
    test = load_data("digits:test")
    images = io.BytesIO()
    np.savez(images, x=np.asarray(test.images)[:12], y=np.asarray(test.labels)[:12])
    squeezed = io.BytesIO()
    np.savez_compressed(squeezed, x=np.asarray(test.images)[:12], y=np.asarray(test.labels)[:12])
    arrays = {name: np.array(value) for name, value in digits.params.items()}

    made = proxyq.quantize_model(digits, Plan.load(folder / "plan.json"), correction="none")
    save_packed(made, folder / "packed.safetensors")

    def content(name: str) -> bytes:
        return (folder / name).read_bytes()

    def npz(path: Path) -> Any:
        return load_npz(path, (), split="test", layout=None, name="data")

    packed = content("packed.safetensors")
    return {
        "plan": Kind(".json", content("plan.json"), _record(Plan), _again),
        "scores": Kind(".json", content("scores.json"), _record(ScoreFile), _use_scores),
        "front": Kind(".json", content("front.json"), _record(Front), _use_front),
        "table": Kind(".json", json.dumps(table).encode(), _record(MeasuredTable), _use_table),
        "evaluation": Kind(".json", json.dumps(evaluation).encode(), _record(EvaluationFile)),
        "formula": Kind(
            ".json",
            (shelf("proxies") / "published/emq.json").read_bytes(),
            _record(Formula),
            _again,
        ),
        "latency": Kind(".json", json.dumps(latency).encode(), load_latency),
        "recipe": Kind(".toml", (shelf("search/recipes") / "clado.toml").read_bytes(), load_recipe),
        "npz": Kind(".npz", images.getvalue(), npz),
        "compressed npz": Kind(".npz", squeezed.getvalue(), npz),
        "weights": Kind(".safetensors", save(arrays), lambda path: with_weights(digits, path)),
        "packed": Kind(".safetensors", packed, lambda path: load_packed(path, digits)),
        "packed alone": Kind(".safetensors", packed, _unpacked, _use_arrays),
    }


# -- noise -----------------------------------------------------------------------------


def noisy(content: bytes, rng: random.Random) -> bytes:
    """`content` with a few of its bytes changed, taken out, doubled or cut off."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        # Headers are where the harm is: half of the noise goes to the first bytes.
        most = len(data) if rng.random() < 0.5 else min(len(data), 400)
        at, size = rng.randrange(most + 1), rng.choice((1, 1, 2, 8, 64, 1000))
        how = rng.randrange(6)
        if how == 0:
            del data[at:]
        elif how == 1:
            del data[at : at + size]
        elif how == 2:
            data[at:at] = data[at : at + size]
        elif how == 3:
            data[at:at] = rng.randbytes(size)
        elif how == 4:
            data[at : at + 1] = rng.choice((b"\x00", b"\xff", b'"', b"[" * 2000, b"{", b"-", b"9"))
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


LONG, INFINITE, TWICE = "@long number@", "@infinite number@", "@twice@"
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 16, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40),
    *(LONG, INFINITE, 10**400, 0.0, -0.5, 1e-300, 1e300, -1e308, math.nan, math.inf, -math.inf),
    *("", "x", "params", "2", "proxyq/plan/9", "é", "\ud800", "\x00", "a\nb", "x" * 5000, "re:("),
    *([], {}, [None], [1], [1, 1], [[1]], {"x": 1}, {"": None}, [[]] * 3, ["stem"]),
)


def altered(value: Any, rng: random.Random) -> Any:
    """Parsed JSON with one to three of its parts changed."""
    root = [value]
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder: Any = root
        place: Any = 0
        while rng.random() < 0.8:
            inner = holder[place]
            if isinstance(inner, dict) and inner:
                holder, place = inner, rng.choice(list(inner))
            elif isinstance(inner, list) and inner:
                holder, place = inner, rng.randrange(len(inner))
            else:
                break
        _alter(holder, place, rng)
    return root[0]


def _alter(holder: Any, place: Any, rng: random.Random) -> None:
    old, how = holder[place], rng.randrange(9)
    if how == 0 and isinstance(holder, dict):
        del holder[place]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(("x", "é", "", "\udc80", "a\nb", place.upper()))] = holder.pop(place)
    elif how == 2 and isinstance(holder, dict):
        holder[TWICE + place] = rng.choice((old, copy.deepcopy(rng.choice(ODD))))
    elif how == 3:
        deep: Any = old
        for _ in range(rng.choice((1, 30, 200, 5000))):
            deep = [deep] if rng.random() < 0.9 else {"x": deep}
        holder[place] = deep
    elif how == 4 and isinstance(old, dict):
        names = list(old)
        rng.shuffle(names)
        holder[place] = {name: old[name] for name in names}
    elif how == 5 and isinstance(old, list) and old:
        rng.choice((old.reverse, old.pop, lambda: old.append(old[0]), lambda: old.extend(old)))()
    elif how == 6 and isinstance(old, (int, float)) and abs(old) < 1e300:
        holder[place] = rng.choice((-old, old + 1, old * 1000, float(old), str(old), [old]))
    elif how == 7 and isinstance(old, str):
        holder[place] = rng.choice((old + "x", old[:-1], old.upper(), old * 100, old + "\n", [old]))
    else:
        holder[place] = copy.deepcopy(rng.choice(ODD))  # or it would be altered for good


def written(value: Any) -> bytes:
    """JSON as no writer makes it: names twice, numbers of any length, no end of levels."""
    parts: list[str] = []
    stack: list[Any] = [value]
    while stack:  # not recursive: values may be nested thousands deep
        one = stack.pop()
        if isinstance(one, _Text):
            parts.append(one)
        elif isinstance(one, dict):
            stack.append(_Text("}"))
            for index, (name, item) in reversed(list(enumerate(one.items()))):
                comma = "," if index else ""
                stack += [item, _Text(f"{comma}{json.dumps(name.removeprefix(TWICE))}: ")]
            stack.append(_Text("{"))
        elif isinstance(one, list):
            stack.append(_Text("]"))
            for index, item in reversed(list(enumerate(one))):
                stack += [item, _Text("," if index else "")]
            stack.append(_Text("["))
        elif one == LONG:
            parts.append("9" * 5000)
        elif one == INFINITE:
            parts.append("1e999")
        else:
            parts.append(json.dumps(one))
    return "".join(parts).encode()


class _Text(str):
    """Text that goes to the file as it is."""


def toml_written(value: dict[str, Any]) -> bytes:
    """Much of what JSON can say as TOML, whose strings, numbers and lists look alike."""
    lines = []
    for name, item in value.items():
        if item is None:
            continue
        text = written(item).decode().replace("NaN", "nan").replace("Infinity", "inf")
        lines.append(f"{json.dumps(name.removeprefix(TWICE))} = {text.replace(': ', ' = ')}")
    return "\n".join(lines).encode(errors="surrogatepass")


# -- what must hold --------------------------------------------------------------------


def check(kind: Kind, content: bytes, folder: Path) -> bool:
    """Whether a file is taken; refused or not, it is as it must be."""
    path = folder / f"strange{kind.suffix}"
    path.write_bytes(content)
    started = time.perf_counter()
    try:
        found = kind.load(path)
    except ProxyqError as error:
        sentence(str(error), path)
        return False
    finally:
        assert time.perf_counter() - started < SECONDS
    assert found is not None
    kind.use(found)
    return True


def sentence(text: str, path: Path) -> None:
    """One line that names the file or a field, and is not as long as the file."""
    assert text.strip() and "\n" not in text and "\r" not in text, repr(text)
    assert path.name in text or "'" in text, text
    assert len(text) < 1500, text[:2000]
    text.encode()  # can be printed


def fuzz(examples: int, run: Callable[[random.Random], Any]) -> None:
    """`run` with `examples` generators; the process must not grow much."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**32 - 1))
    def each(seed: int) -> None:
        run(random.Random(seed))

    each()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWTH


NAMES = (
    *("plan", "scores", "front", "table", "evaluation", "formula", "latency", "recipe"),
    *("npz", "compressed npz", "weights", "packed", "packed alone"),
)
JSON_NAMES = NAMES[:7]
examples_of = pytest.mark.parametrize(
    "examples", [12, pytest.param(MANY, marks=pytest.mark.slow)], ids=["some", "many"]
)


@pytest.mark.parametrize("name", NAMES)
def test_good_files_are_taken(name: str, kinds: dict[str, Kind], tmp_path: Path):
    assert check(kinds[name], kinds[name].content, tmp_path)


@examples_of
@pytest.mark.parametrize("name", NAMES)
def test_bytes_that_were_changed(name: str, examples: int, kinds: dict[str, Kind], tmp_path: Path):
    kind = kinds[name]
    fuzz(examples, lambda rng: check(kind, noisy(kind.content, rng), tmp_path))


@examples_of
@pytest.mark.parametrize("name", JSON_NAMES)
def test_fields_that_were_changed(name: str, examples: int, kinds: dict[str, Kind], tmp_path: Path):
    kind = kinds[name]

    def run(rng: random.Random) -> None:
        check(kind, written(altered(json.loads(kind.content), rng)), tmp_path)

    fuzz(examples, run)


@examples_of
def test_recipes_that_were_changed(examples: int, kinds: dict[str, Kind], tmp_path: Path):
    kind = kinds["recipe"]
    good = {**tomllib.loads(kind.content.decode()), "options": {"bias": 1.5}, "activation_bits": 8}

    def run(rng: random.Random) -> None:
        value = altered(json.loads(json.dumps(good)), rng)
        if isinstance(value, dict):
            check(kind, toml_written(value), tmp_path)

    assert isinstance(load_recipe("clado"), Recipe)
    fuzz(examples, run)


@examples_of
@pytest.mark.parametrize("name", ["weights", "packed", "packed alone"])
def test_headers_of_tensors_that_were_changed(
    name: str, examples: int, kinds: dict[str, Kind], tmp_path: Path
):
    """The JSON before the tensors, and in it that of a packed network."""
    kind = kinds[name]
    (length,) = struct.unpack("<Q", kind.content[:8])
    header, data = kind.content[8 : 8 + length], kind.content[8 + length :]

    def run(rng: random.Random) -> None:
        table = json.loads(header)
        if "__metadata__" in table and rng.random() < 0.6:
            inner = altered(json.loads(table["__metadata__"]["proxyq"]), rng)
            table["__metadata__"]["proxyq"] = written(inner).decode()
        else:
            table = altered(table, rng)
        text = written(table)
        size = rng.choice((len(text),) * 8 + (0, 2**31, 2**60, 2**64 - 1))
        check(kind, struct.pack("<Q", size) + text + data, tmp_path)

    fuzz(examples, run)


@examples_of
def test_what_is_kept_is_taken_as_it_was_or_not_at_all(
    examples: int, kinds: dict[str, Kind], tmp_path: Path
):
    """Checkpoints and scores in the cache: a wrong number in them would be nobody's to see."""
    del kinds
    digits = load_digits()
    kept = Checkpoint(tmp_path / "kept")
    arrays = {"a": np.arange(50.0), "b": np.ones((3, 2), np.int32)}
    kept.save("state", arrays)
    cache, (scores,) = Cache(tmp_path), [PROXIES.get("sqnr")(digits)]
    cache.save("key", scores)
    files = {tmp_path / "kept/state.safetensors": None, tmp_path / "key.safetensors": None}
    files = {file: file.read_bytes() for file in files}
    before, known = kept.load("state"), cache.load("key", digits)
    assert before is not None and np.array_equal(before["a"], arrays["a"])
    assert known is not None and np.array_equal(known.values, scores.values)

    def run(rng: random.Random) -> None:
        for file, content in files.items():
            file.write_bytes(noisy(content, rng))
        found, again = kept.load("state"), cache.load("key", digits)
        if found is not None:
            assert found.keys() == arrays.keys()
            assert all(np.array_equal(found[name], one) for name, one in arrays.items())
        if again is not None:
            assert np.array_equal(again.values, scores.values) and again.notes == scores.notes

    fuzz(examples, run)


# -- what is made to fill memory, or to run something ----------------------------------


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, content in entries.items():
            made.writestr(f"{name}.npy", content)
    return file.getvalue()


def header_of(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": kind, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def sequences() -> Model:
    """A network that reads no images, so that its archives go another way."""
    return from_function(lambda params, x: x @ params["w"], {"w": jnp.eye(4)}, (8, 4))


def test_archives_that_are_made_to_fill_memory(kinds: dict[str, Kind], tmp_path: Path):
    kind = kinds["npz"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    promised = archive({"x": header_of((2**40, 2**10, 2**10, 1)) + bytes(1000)})
    assert not check(kind, promised, tmp_path)
    # 160 MiB of zeros in 160 KiB.
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as made, made.open("x.npy", "w") as entry:
        entry.write(header_of((160, 2**10, 2**10, 1)))
        for _ in range(160):
            entry.write(bytes(1 << 20))
    assert len(bomb.getvalue()) < 1 << 18
    with pytest.raises(ProxyqError, match="unpacks to 167,772,288 bytes"):
        path = tmp_path / "bomb.npz"
        path.write_bytes(bomb.getvalue())
        load_npz(path, (), split="test", layout=None, name="bomb")
    with pytest.raises(ProxyqError, match="unpacks to 167,772,288 bytes"):
        load_prepared(str(path), sequences())
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWTH
    # What is only large, and what is only even, are both images.
    plain = archive({"x": header_of((4, 512, 512, 1)) + bytes(1 << 20)})
    assert check(kind, plain, tmp_path)


@pytest.mark.parametrize("keys", [(), ("x",)])
def test_archives_of_objects_are_not_unpickled(keys: tuple[str, ...], tmp_path: Path):
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    np.savez(tmp_path / "evil.npz", x=np.array([[[Evil()]]], object))
    with pytest.raises(ProxyqError, match=r"Python objects|the shape of"):
        load_npz(tmp_path / "evil.npz", keys, split="test", layout=None, name="evil")
    with pytest.raises(ProxyqError, match="Python objects"):
        load_prepared(str(tmp_path / "evil.npz"), sequences())
    assert not (tmp_path / "ran").exists()


def test_tensors_that_are_promised_and_not_there(kinds: dict[str, Kind], tmp_path: Path):
    """2^60 bytes, by the length of the header, the place of a tensor or its shape."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    entry = {"dtype": "F32", "shape": [2**58], "data_offsets": [0, 2**60]}
    text = json.dumps({"stem.kernel": entry}).encode()
    for content in (
        struct.pack("<Q", 2**60) + text,
        struct.pack("<Q", len(text)) + text,
        struct.pack("<Q", len(text)) + text.replace(b"[0, 1152921504606846976]", b"[0, 0]"),
    ):
        for name in ("weights", "packed", "packed alone"):
            assert not check(kinds[name], content, tmp_path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWTH


def test_files_without_an_end():
    for load in (Plan.load, ScoreFile.load, load_latency):
        with pytest.raises(ProxyqError, match=f"at most {MOST_BYTES:,} bytes"):
            load("/dev/zero")
    with pytest.raises(ProxyqError, match="no regular file"):
        Formula.load("/dev/zero")
    with pytest.raises(ProxyqError, match="at most 10 bytes"):
        read_bytes("/dev/zero", most=10)
    with pytest.raises(ProxyqError, match="cannot read the plan"):
        Plan.load("plan\0.json")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "gives the field 'a' twice"),
        ("[" * 60 + "]" * 60, "nested too deeply: 50 levels"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": "\\ud800"}', "text that UTF-8 cannot write"),
        ("9" * 5000, "too many digits"),
    ],
)
def test_json_that_python_reads_and_nobody_means(text: str, told: str, tmp_path: Path):
    file = tmp_path / "odd.json"
    file.write_text(text)
    with pytest.raises(ProxyqError, match=r"odd\.json") as caught:
        read_json(file)
    assert told in str(caught.value)
    file.write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(file) == {"a": "😀"}
