"""Everything that users get wrong: the exit code, one sentence, and no file touched."""

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from commandline import Finished, alone, here
from safetensors.numpy import save_file

from proxyq.data import load_data
from proxyq.model.digits import load_digits

FACTORIES = """
import numpy as np
import proxyq

def poisoned():
    digits = proxyq.load_model()
    params = {name: np.asarray(value).copy() for name, value in digits.params.items()}
    params["head.kernel"][0, 0] = np.inf
    return digits.replace(name="poisoned", params=params)

def failing():
    raise RuntimeError("nobody can build this")

def number():
    return 7

def another():
    return proxyq.load_model().replace(name="another")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of file that is not as it should be."""
    folder = tmp_path_factory.mktemp("files")
    digits = load_digits()
    arrays = {name: np.array(value) for name, value in digits.params.items()}
    save_file(arrays, folder / "good.safetensors")
    whole = (folder / "good.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({**arrays, "stem.kernel": arrays["stem.kernel"] * np.nan}, folder / "nan.safetensors")
    save_file({**arrays, "stem.kernel": arrays["stem.kernel"][:1]}, folder / "shape.safetensors")
    few = {name: array for name, array in arrays.items() if name != "stem.kernel"}
    save_file(few, folder / "few.safetensors")

    test = load_data("digits:test")
    images, labels = np.asarray(test.images), np.asarray(test.labels)
    np.savez(folder / "good.npz", x=images, y=labels)
    whole = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(folder / "classes.npz", x=images, y=labels + 90)
    np.savez(folder / "negative.npz", x=images, y=labels - 5)
    np.savez(folder / "fewer.npz", x=images, y=labels[:7])
    np.savez(folder / "unlabelled.npz", x=images)
    np.savez(folder / "large.npz", x=np.zeros((4, 32, 32, 1), np.uint8), y=labels[:4])
    np.savez(folder / "none.npz", x=images[:0], y=labels[:0])
    np.savez(folder / "nan.npz", x=images.astype(np.float32) * np.nan, y=labels)
    (folder / "text.npz").write_text("not an archive")
    (folder / "empty").mkdir()

    done = here("search", "--proxy", "params", "--budget", "size=4bit", "--json", "--quiet")
    assert done.code == 0, done.err
    (folder / "good.json").write_text(done.out)
    (folder / "cut.json").write_text(done.out[: len(done.out) // 2])
    plan = json.loads(done.out)
    (folder / "schema.json").write_text(json.dumps({**plan, "schema": "proxyq/plan/9"}))
    (folder / "list.json").write_text("[1, 2]")
    renamed = {f"features.{name}": layer for name, layer in plan["layers"].items()}
    (folder / "renamed.json").write_text(json.dumps({**plan, "layers": renamed}))
    plan["layers"]["head"]["weights"] += 1
    (folder / "grown.json").write_text(json.dumps(plan))
    plan["layers"]["head"] |= {"weights": 320, "weight_bits": 12}
    (folder / "bits.json").write_text(json.dumps(plan))

    plan["layers"]["head"]["weight_bits"] = 4
    plan["method"]["rounding"] = {"method": "best", "extra_code": "negative"}
    (folder / "rounding.json").write_text(json.dumps(plan))
    plan["method"]["rounding"] = {}
    plan["layers"]["head"]["group_size"] = 64
    (folder / "groups.json").write_text(json.dumps(plan))
    plan["layers"]["head"]["group_size"] = 48
    (folder / "parts.json").write_text(json.dumps(plan))

    words = ("--proxy", "params", "--proxy", "sqnr", "--json", "--quiet")
    done = here("score", *words)
    assert done.code == 0, done.err
    (folder / "scores.json").write_text(done.out)
    (folder / "cut_scores.json").write_text(done.out[: len(done.out) // 2])
    scores = json.loads(done.out)
    (folder / "later.json").write_text(json.dumps({**scores, "schema": "proxyq/scores/2"}))
    scores["scores"][1]["values"]["head"][0] = None
    (folder / "hole.json").write_text(json.dumps(scores))
    moved = {**json.loads(done.out), "rounding": {"method": "absmax", "extra_code": "negative"}}
    (folder / "moved.json").write_text(json.dumps(moved))
    latency = {"schema": "proxyq/latency/1", "layers": {"stem": [{"weight_bits": 2, "seconds": 1}]}}
    (folder / "latency.json").write_text(json.dumps(latency))

    (folder / "endless.json").write_text("[" * 5000 + "]" * 5000)
    (folder / "twice.json").write_text('{"layers": {}, "layers": {}}')
    (folder / "halves.json").write_text('{"schema": "\\ud800"}')
    np.savez(folder / "objects.npz", x=np.array([[[{}]]], object))
    np.savez(folder / "promise.npz", x=images, y=labels)
    with zipfile.ZipFile(folder / "promise.npz", "w") as archive:
        shape = {"descr": "|u1", "fortran_order": False, "shape": (2**40, 8, 8, 1)}
        with archive.open("x.npy", "w") as entry:
            np.lib.format.write_array_header_1_0(entry, shape)
    (folder / "promise.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    (folder / "endless.toml").write_text("bits = " + "[" * 5000 + "]" * 5000)

    (folder / "factories.py").write_text(FACTORIES)
    (folder / "syntax.py").write_text("def factory(:\n")
    (folder / "recipe.toml").write_text('name = "mine"\nproxy = ')
    (folder / "field.toml").write_text(
        'name = "m"\nreference = "r"\nproxy = "params"\nbits = [2]\nsolvr = "ilp"\n'
    )
    return folder


# What is wrong: arguments, exit code, what the sentence must hold. `{f}` is the folder of the
# files above, `{o}` the folder for results.
CASES: dict[str, tuple[str, int, str]] = {
    # the command line itself
    "unknown proxy to list": ("proxies sqnrr", 2, "did you mean 'sqnr'"),
    "unknown command": ("serch", 2, "did you mean 'search'"),
    "unknown option": ("search --bugdet size=3bit", 2, "did you mean '--budget'"),
    "option without value": ("search --budget", 2, "--budget"),
    "no whole number": ("search --samples many", 2, "--samples"),
    "two models": ("search digits digits", 2, "unexpected"),
    "negative seed": ("search --seed -1", 2, "--seed"),
    "unknown device": ("search --device gpi", 2, "did you mean 'gpu'"),
    "memory": ("search --memory lots", 2, "--memory"),
    # models
    "unknown model": ("search resnet18", 2, "torchvision:resnet18"),
    "misspelt model": ("search digit", 2, "did you mean 'digits'"),
    "missing file of a factory": ("search {o}/gone.py:factory", 2, "gone.py"),
    "missing factory": ("search {f}/factories.py:factori", 2, "factori"),
    "file without a factory": ("search {f}/factories.py", 2, "factories.py"),
    "file with a syntax error": ("search {f}/syntax.py:factory", 1, "syntax.py"),
    "failing factory": ("search {f}/factories.py:failing", 1, "nobody can build this"),
    "factory of a number": ("search {f}/factories.py:number", 2, "int"),
    "infinite weights": ("search {f}/factories.py:poisoned", 1, "'head.kernel'"),
    "NaN weights": ("search --weights {f}/nan.safetensors", 1, "'stem.kernel'"),
    "truncated weights": ("search --weights {f}/cut.safetensors", 1, "cut.safetensors"),
    "weights of another shape": ("search --weights {f}/shape.safetensors", 1, "'stem.kernel'"),
    "missing weight": ("search --weights {f}/few.safetensors", 1, "'stem.kernel'"),
    "missing weights file": ("search --weights {f}/gone.safetensors", 2, "gone.safetensors"),
    "unknown kind of weights": ("search --weights {f}/good.npz", 2, ".safetensors"),
    "input shape of a finished model": ("inspect --input-shape 3,8,8", 2, "(8, 8, 1)"),
    "input shape of words": ("inspect --input-shape large", 2, "--input-shape"),
    "input shape of zeros": ("inspect --input-shape 0,8,8", 2, "--input-shape"),
    # proxies and recipes
    "unknown proxy": ("search --proxy orthogonalty", 2, "did you mean 'orthogonality'"),
    "unknown recipe": ("search --recipe ompqq", 2, "did you mean 'ompq'"),
    "proxy and recipe": ("search --proxy params --recipe ompq", 2, "not both"),
    "recipe that is no TOML": ("search --recipe {f}/recipe.toml", 1, "recipe.toml"),
    "recipe with an unknown field": ("search --recipe {f}/field.toml", 1, "'solvr'"),
    "missing recipe": ("search --recipe {f}/gone.toml", 1, "gone.toml"),
    "unknown option of a proxy": (
        "search --proxy orthogonality --option bta=3",
        2,
        "did you mean 'beta'",
    ),
    "option without equals sign": ("search --option beta", 2, "KEY=VALUE"),
    "option twice": ("search --option beta=1 --option beta=2", 2, "twice"),
    "text for a number": ("search --proxy orthogonality --option beta=big", 2, "'big'"),
    "number for a truth": ("search --proxy orthogonality --option centre=3", 2, "true or false"),
    "unknown choice of an option": ("search --proxy separability --option form=log", 2, "'log'"),
    "unknown feature": ("search --proxy orthogonality --option feature=pre", 2, "'pre'"),
    "unknown batch norm": ("search --proxy output-error --option batch-norm=off", 2, "'off'"),
    # budgets, bits, solver
    "unknown budget": ("search --budget sise=3bit", 2, "did you mean 'size'"),
    "memory in bits": ("search --budget activation-memory=3bit", 2, "unknown unit 'bit'"),
    "memory too small": ("search --budget activation-memory=3B", 1, "smallest reachable is 1.2"),
    "latency without a table": ("search --budget latency=3ms", 2, "--latency-table"),
    "latency of some layers": (
        "search --budget latency=3s --latency-table {f}/latency.json",
        2,
        "says nothing of layer 'stem' at 3 weight bits",
    ),
    "missing latency table": (
        "search --budget latency=3s --latency-table {f}/gone.json",
        1,
        "gone.json",
    ),
    "latency table that is none": (
        "evaluate {f}/good.json --latency-table {f}/list.json",
        1,
        "no latency table",
    ),
    "unknown unit": ("search --budget size=3bats", 2, "did you mean 'bit'"),
    "unit in another case": ("search --budget bops=90K", 2, "did you mean 'k'"),
    "letters of another case": ("search --budget size=30kib", 2, "did you mean 'KiB'"),
    "share of more than all": ("search --budget size=120%", 2, "0% to 100%"),
    "no unit": ("search --budget size=3", 2, "unit"),
    "negative budget": ("search --budget size=-3bit", 2, "positive"),
    "no budget at all": ("search --budget size=0bit", 2, "more than zero"),
    "budget without amount": ("search --budget size", 2, "size=3bit"),
    "infeasible budget": (
        "search --budget size=1.5bit",
        1,
        "smallest reachable is 2 bit and the largest 8 bit",
    ),
    "infeasible for a pin": (
        "search --budget size=9KiB --pin blocks.3*=8",
        1,
        "the pin 'blocks.3*=8' causes it",
    ),
    "infeasible together": (
        "search --budget size=2.2bit --budget bops=60M --pin stem=8 --activation-bits 8"
        " --candidates blocks.0.conv1=8 --candidates blocks.2.conv2=8",
        1,
        "cannot",
    ),
    "bits that are no numbers": ("search --bits few", 2, "--bits"),
    "negative bits": ("search --bits -2,4", 2, "-2"),
    "no bits": ("search --bits 0,4", 2, "got 0"),
    "nine bits": ("search --bits 2,9", 2, "got 9"),
    "activation bits": ("search --activation-bits 0", 2, "activation_bits"),
    "attention bits": ("search --attention-bits 4,8", 2, "one bit-width or 'float'"),
    "attention bits of a network without": (
        "search --proxy sqnr --attention-bits 8",
        2,
        "has none: leave it out",
    ),
    "activation bits of words": ("search --activation-bits weigths", 2, "'weights' or 'float'"),
    "activation bits unmeasured": (
        "search --proxy snip --activation-bits 4,8 --budget bops=50M",
        2,
        "tells nothing of activations",
    ),
    "unknown cost": (
        "search --proxy params --cost times-dw",
        2,
        "did you mean 'times-dw2'",
    ),
    "cost of a cost": ("search --proxy sqnr --cost exponential", 2, "leave out"),
    "unknown solver": ("search --solver ipl", 2, "did you mean 'iqp' or 'ilp'"),
    "dp for two budgets": ("search --solver dp --budget size=3bit --budget bops=90M", 2, "dp"),
    "no time": ("search --time-limit 0", 2, "time_limit"),
    "group size of words": ("search --group-size channel,big", 2, "--group-size must be"),
    "group size of few": ("search --group-size channel,4", 2, "at least 8, such as"),
    "group size named twice": ("search --group-size 64,64", 2, "names 64 twice"),
    "group sizes by bits alone": (
        "search --proxy snip --cost linear-bits --group-size channel,16",
        2,
        "times-dw2",
    ),
    "group sizes by what tells none": (
        "search --proxy uniform --group-size channel,16",
        1,
        "cannot tell groups of weights",
    ),
    "pin on groups of a convolution": ("search --pin stem=8g16", 2, "groups of 16 weights"),
    "pin on groups without a size": ("search --pin head=8g", 2, "must end in bit-widths"),
    "pin on groups of few": ("search --pin head=8g4", 2, "at least 8, such as"),
    "pin that matches nothing": ("search --pin layer9*=8", 2, "'layer9*'"),
    "pin without bits": ("search --pin stem", 2, "PATTERN=8"),
    "pins that contradict": ("search --tie blocks.0* --pin *0.conv1=8 --pin *0.conv2=4", 2, "pin"),
    "tie that matches nothing": ("search --tie layer9*", 2, "'layer9*'"),
    "broken expression": ("search --tie re:(", 2, "re:("),
    "candidates out of bits": ("search --bits 2,4 --candidates stem=8", 2, "stem=8"),
    # scores
    "nothing to score": ("score", 2, "--proxy"),
    "unknown proxy to score": ("score --proxy params --proxy sqnrr", 2, "did you mean 'sqnr'"),
    "proxy twice": ("score --proxy params --proxy params", 2, "twice"),
    "option of no proxy": (
        "score --proxy orthogonality --proxy sqnr --option bta=2",
        2,
        "did you mean 'beta'",
    ),
    "option of one proxy": ("score --proxy orthogonality --option bta=2", 2, "did you mean 'beta'"),
    "option of an absent proxy": (
        "score --proxy sqnr --option orthogonality.beta=2",
        2,
        "'orthogonality', which is not asked for",
    ),
    "scores without images": ("score {f}/factories.py:another --proxy kl-delta", 2, "--data"),
    "scores of no bits": ("score --proxy params --bits 0,4", 2, "got 0"),
    "scores nowhere": ("score --proxy params --out {o}/sub/scores.json", 1, "does not exist"),
    "scores of NaN weights": (
        "score --proxy params --weights {f}/nan.safetensors",
        1,
        "'stem.kernel'",
    ),
    "allocate nothing": ("allocate", 2, "SCORES.json"),
    "no budget to allocate": ("allocate {f}/scores.json --proxy sqnr", 2, "--budget"),
    "whose scores": ("allocate {f}/scores.json --budget size=3bit", 2, "one of params, sqnr"),
    "no scores of this": (
        "allocate {f}/scores.json --budget size=3bit --proxy parms",
        2,
        "did you mean 'params'",
    ),
    "missing scores": ("allocate {f}/gone.json --budget size=3bit", 1, "gone.json"),
    "truncated scores": ("allocate {f}/cut_scores.json --budget size=3bit", 1, "cut short"),
    "scores of another version": (
        "allocate {f}/later.json --budget size=3bit",
        1,
        "'proxyq/scores/2'",
    ),
    "plan for scores": ("allocate {f}/good.json --budget size=3bit", 1, "holds no scores"),
    "scores with a hole": (
        "allocate {f}/hole.json --budget size=3bit --proxy params",
        1,
        "the scores of 'sqnr' must be 4 finite numbers for the layer 'head'",
    ),
    "infeasible by scores": (
        "allocate {f}/scores.json --budget size=1bit --proxy sqnr",
        1,
        "smallest reachable is 2 bit",
    ),
    "pin of no scored layer": (
        "allocate {f}/scores.json --budget size=3bit --proxy sqnr --pin layer9*=8",
        2,
        "'layer9*'",
    ),
    # data
    "missing data": ("search --data {f}/gone.npz", 1, "gone.npz"),
    "unknown data": ("search --data imagenet", 2, "unknown data"),
    "unknown split": ("search --data digits:tset", 2, "did you mean 'test'"),
    "truncated archive": ("search --data {f}/cut.npz", 1, "cut.npz"),
    "archive that is none": ("search --data {f}/text.npz", 1, "text.npz"),
    "unknown array": ("search --data {f}/good.npz:images", 2, "'images'"),
    "images of another size": ("search --data {f}/large.npz", 2, "--size 8"),
    "no images": ("search --data {f}/none.npz", 2, "no images"),
    "images of NaN": ("search --data {f}/nan.npz", 1, "NaN"),
    "empty folder": ("search --data dir:{f}/empty", 2, "empty"),
    "missing folder": ("search --data dir:{f}/gone", 2, "gone"),
    "missing calibration images": ("search {f}/factories.py:another", 2, "--data"),
    "no samples": ("search --samples 0", 2, "samples"),
    "labels out of range": ("search --eval-data {f}/classes.npz", 2, "labels up to 99"),
    "negative labels": ("search --eval-data {f}/negative.npz", 2, "-5"),
    "too few labels": ("search --eval-data {f}/fewer.npz:x,y", 2, "7 labels"),
    "no labels": ("search --eval-data {f}/unlabelled.npz", 2, "labels"),
    "means of three channels": ("search --mean 0.4,0.5,0.6", 2, "--mean has 3 values"),
    "mean of words": ("search --mean half", 2, "--mean"),
    "infinite mean": ("search --mean inf", 2, "--mean"),
    "no deviation": ("search --std 0", 2, "--std must be positive"),
    "size of three": ("search --size 8,8,8", 2, "--size"),
    "no size": ("search --size 0", 2, "--size"),
    # results
    "missing folder of results": ("search --out {o}/sub/plan.json", 1, "does not exist"),
    "file for a folder": ("search --out {o}/kept.json/plan.json", 1, "kept.json"),
    "folder for a file": ("search --out {o}", 1, "folder"),
    "unknown kind of picture": ("search --plot {o}/plan.bmp", 2, ".png, .svg or .pdf"),
    "picture without suffix": ("search --plot {o}/plan", 2, ".png"),
    "picture nowhere": ("search --plot {o}/sub/plan.png", 1, "does not exist"),
    "unknown correction": ("search --correction al", 2, "'al'"),
    # plans
    "no plan": ("evaluate digits", 2, "at least one plan"),
    "nothing to evaluate": ("evaluate", 2, "PLAN.json"),
    "models beside plans": ("evaluate a b {f}/good.json", 2, "one model"),
    "missing plan": ("evaluate {f}/gone.json", 1, "gone.json"),
    "truncated plan": ("evaluate {f}/cut.json", 1, "cut short"),
    "plan that is none": ("evaluate {f}/list.json", 1, "not a plan"),
    "plan of another version": ("evaluate {f}/schema.json", 1, "proxyq/plan/9"),
    "plan of 12 bits": ("evaluate {f}/bits.json", 1, "layers.head.weight_bits"),
    "plan of unknown rounding": ("evaluate {f}/rounding.json", 1, "'method.rounding'"),
    "plan of groups that are none": ("evaluate {f}/groups.json", 1, "groups of 64 weights"),
    "plan of parts of groups": ("evaluate {f}/parts.json", 1, "no whole number of groups"),
    "plan of another model": ("evaluate {f}/renamed.json", 1, "another model"),
    "plan of another size": ("evaluate {f}/grown.json", 1, "321"),
    "one bad plan of two": ("evaluate {f}/good.json {f}/renamed.json", 1, "another model"),
    "plan without accuracy": (
        "evaluate {f}/good.json {f}/factories.py:another",
        2,
        "--eval-data",
    ),
    "unlabelled accuracy": ("evaluate {f}/good.json --eval-data {f}/unlabelled.npz", 2, "labels"),
    "unknown correction of plans": ("evaluate {f}/good.json --correction no", 2, "'no'"),
    # fronts
    "front without a budget": ("pareto {f}/scores.json --proxy sqnr", 2, "size=2.5bit..6bit"),
    "front without a range": ("pareto {f}/scores.json --proxy sqnr --budget size=3bit", 2, "range"),
    "range that falls": (
        "pareto {f}/scores.json --proxy sqnr --budget size=6bit..2bit",
        2,
        "size=6bit..2bit",
    ),
    "range of two units": (
        "pareto {f}/scores.json --proxy sqnr --budget size=2bit..1MiB",
        2,
        "size=2bit..1MiB",
    ),
    "front of one point": (
        "pareto {f}/scores.json --proxy sqnr --budget size=2bit..4bit --points 1",
        2,
        "at least 2",
    ),
    "front out of reach": (
        "pareto {f}/scores.json --proxy sqnr --budget size=1bit..1.5bit",
        1,
        "smallest reachable is 2 bit",
    ),
    "scores that are measured again": (
        "pareto {f}/scores.json --proxy sqnr --budget size=2bit..4bit --bits 2,4",
        2,
        "bits",
    ),
    "weights of scores": (
        "pareto {f}/scores.json --budget size=2bit..4bit --weights {f}/good.safetensors",
        2,
        "--weights is for a model",
    ),
    "front of auto": ("pareto --proxy auto --budget size=2bit..4bit", 2, "'logit-coupling'"),
    "truncated scores of a front": (
        "pareto {f}/cut_scores.json --budget size=2bit..4bit",
        1,
        "cut short",
    ),
    "plans of a front for a file": (
        "pareto {f}/scores.json --proxy sqnr --budget size=2bit..4bit --plans {o}/kept.json",
        1,
        "no folder",
    ),
    # measured tables
    "table of no plans": ("table --plans 0", 2, "`plans` must be at least 1"),
    "table of too many plans": ("table --plans 9 --bits 2", 2, "at most 1"),
    "table drawn in no known way": ("table --draw evenly", 2, "uniform, size"),
    "table of two activation widths": ("table --activation-bits 4,8", 2, "one number or float"),
    "table of two group sizes": ("table --group-size channel,16", 2, "must be one size"),
    "table corrected as it comes": ("table --correction auto", 2, "the same for all plans"),
    "table of nine bits": ("table --bits 2,9", 2, "9"),
    "table by nobody": ("table --executor threads:2", 2, "'threads:2'"),
    "table by no process": ("table --executor process:0", 2, "at least 1 worker"),
    "table of no images": ("table --eval-samples 0", 2, "`eval_samples` must be at least 1"),
    "table without labels": ("table --eval-data {f}/unlabelled.npz", 2, "labels"),
    "table nowhere": ("table --out {o}/sub/table.json", 1, "does not exist"),
    # ranking
    "rank without a table": ("rank --proxy sqnr", 2, "--table"),
    "missing table": ("rank --proxy sqnr --table {f}/gone.json", 1, "gone.json"),
    "plan for a table": ("rank --proxy sqnr --table {f}/good.json", 1, "holds no table"),
    "table of another network": (
        "rank {f}/factories.py:poisoned --proxy sqnr --table digits",
        1,
        "'head.kernel'",
    ),
    "unknown proxy to rank": (
        "rank --proxy sqnrr --table digits",
        2,
        "did you mean 'sqnr'",
    ),
    "scores of other rounding to rank": (
        "rank {f}/moved.json --proxy sqnr --table digits",
        2,
        "rounding",
    ),
    "rank drawn in no format": ("rank --table digits --plot {o}/rank.bmp", 2, ".png, .svg or .pdf"),
    # evolution
    "evolution without a table": ("evolve", 2, "--table"),
    "evolution of a plan": ("evolve --table {f}/good.json", 1, "holds no table"),
    "evolution of a cut table": ("evolve --table {f}/cut.json", 1, "cut short"),
    "unknown method": ("evolve --table digits --method emqq", 2, "did you mean 'emq'"),
    "unknown structure": ("evolve --table digits --structure tre", 2, "did you mean 'tree'"),
    "unknown leaf": ("evolve --table digits --leaves W,Q", 2, "'Q'"),
    "population of one": ("evolve --table digits --population 1", 2, "at least 2"),
    "no evaluations": ("evolve --table digits --evaluations 0", 2, "at least 1"),
    "all plans held back": ("evolve --table digits --validation 1", 2, "below 1"),
    "no entries": ("evolve --table digits --entries 0", 2, "--entries must be at least 1"),
    "table that is held out too": ("evolve --table digits --holdout digits", 2, "twice"),
    "formula without a name": ("evolve --table digits --out {o}/formula.txt", 2, ".json"),
    "logbook nowhere": ("evolve --table digits --logbook {o}/sub/log.json", 1, "does not exist"),
    # quantized networks
    "nothing to quantize": ("quantize", 2, "PLAN.json"),
    "two plans to quantize": ("quantize {f}/good.json {f}/bits.json", 2, "name one plan"),
    "missing plan to quantize": ("quantize {f}/gone.json --out {o}/net", 1, "gone.json"),
    "plan of another model to quantize": (
        "quantize {f}/renamed.json --out {o}/net",
        1,
        "another model",
    ),
    "unknown reconstruction": (
        "quantize {f}/good.json --reconstruct blok --out {o}/net",
        2,
        "'blok'",
    ),
    "no steps": (
        "quantize {f}/good.json --reconstruct block --steps 0 --out {o}/net",
        2,
        "at least 1",
    ),
    "too few images to learn from": (
        "quantize {f}/good.json --reconstruct block --samples 0 --out {o}/net",
        2,
        "0",
    ),
    "quantized for a file": ("quantize {f}/good.json --out {o}/kept.json", 1, "no folder"),
    "quantized nowhere": ("quantize {f}/good.json --out {o}/sub/net", 1, "does not exist"),
    # exports
    "nothing to export": ("export --to onnx --out {o}/net.onnx", 2, "at least one plan"),
    "export to nowhere": ("export {f}/good.json --to onnx", 2, "--out PATH"),
    "export to nothing": ("export {f}/good.json --out {o}/net.onnx", 2, "--to onnx"),
    "unknown format": (
        "export {f}/good.json --to onxx --out {o}/net.onnx",
        2,
        "did you mean 'onnx'",
    ),
    "packed network that is none": (
        "export --packed {f}/good.safetensors --to onnx --out {o}/net.onnx",
        1,
        "no packed network",
    ),
    "missing packed network": (
        "export --packed {f}/gone.safetensors --to onnx --out {o}/net.onnx",
        1,
        "gone.safetensors",
    ),
    "plan of another model to export": (
        "export {f}/renamed.json --to onnx --out {o}/net.onnx",
        1,
        "another model",
    ),
    "truncated plan to export": ("export {f}/cut.json --to onnx --out {o}/n.onnx", 1, "cut short"),
    # pages
    "page of nothing": ("report --out {o}/page.html", 2, "PLAN.json"),
    "page that is written nowhere": ("report {f}/good.json", 2, "--out"),
    "page over a plan": ("report {f}/good.json --out {o}/kept.json", 2, "ends in .html"),
    "page of a missing plan": ("report {f}/gone.json --out {o}/page.html", 1, "gone.json"),
    "page of scores that are a plan": (
        "report {f}/good.json --scores {f}/good.json --out {o}/page.html",
        1,
        "holds no scores",
    ),
    "page of an evaluation that is a list": (
        "report {f}/good.json --evaluation {f}/list.json --out {o}/page.html",
        1,
        "no measured accuracy",
    ),
    "page of a front that is a plan": (
        "report {f}/good.json --front {f}/good.json --out {o}/page.html",
        1,
        "holds no front",
    ),
    "page of two models": (
        "report {f}/good.json {f}/renamed.json --out {o}/page.html",
        1,
        "of different models",
    ),
    "page in a missing folder": (
        "report {f}/good.json --out {o}/sub/page.html",
        1,
        "does not exist",
    ),
    # listings
    "listing with an argument": ("models resnet18", 2, "unexpected"),
    "listing of recipes by name": ("recipes ompq", 2, "unexpected"),
    "listing with an unknown option": ("models --jsn", 2, "did you mean '--json'"),
    "listing of recipes with an unknown option": ("recipes --jso", 2, "did you mean '--json'"),
    "proxies of a formula that is missing": ("proxies {f}/gone.json", 1, "gone.json"),
    "proxies of a plan": ("proxies {f}/good.json", 1, "holds no formula"),
    "inspect a plan": ("inspect {f}/good.json", 2, "good.json"),
    "inspect with weights that are cut": (
        "inspect --weights {f}/cut.safetensors",
        1,
        "cut.safetensors",
    ),
    # files that are made to do harm
    "plan without an end": ("evaluate {f}/endless.json", 1, "nested too deeply"),
    "plan that says it twice": ("evaluate {f}/twice.json", 1, "gives the field 'layers' twice"),
    "plan of halves of signs": ("evaluate {f}/halves.json", 1, "UTF-8 cannot write"),
    "images of objects": ("search --data {f}/objects.npz:x", 1, "Python objects"),
    "images of another length": ("search --data {f}/promise.npz", 1, "is damaged"),
    "weights of a promise": ("search --weights {f}/promise.safetensors", 1, "promise.safetensors"),
    "recipe without an end": ("search --recipe {f}/endless.toml", 1, "nested too deeply"),
}
COMMANDS = (
    *("search", "score", "allocate", "pareto", "evaluate", "table", "rank", "evolve"),
    *("quantize", "export", "report", "inspect", "proxies", "models", "recipes"),
)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder for results in which one file lies already."""
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "kept.json").write_text("kept")
    return folder


def refused(done: Finished, code: int, text: str) -> None:
    """Exit code, one sentence on stderr, nothing on stdout."""
    assert done.code == code, done
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("proxyq: error: "), done.err
    assert text in done.err
    assert done.err.endswith((".\n", "?\n")), done.err
    assert "Traceback" not in done.err and "this is a bug" not in done.err


def arguments_of(line: str, files: Path, results: Path) -> list[str]:
    """The words of a case; a search writes over the file that is there already."""
    words = line.format(f=files, o=results).split()
    if words[0] in ("search", "score", "allocate") and not {"--out", "--plot"} & set(words):
        words[1:1] = ["--out", str(results / "kept.json")]
    return words


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_command_is_asked_for_what_it_cannot_do():
    """At least three things each, the listings two."""
    asked = [line.split()[0] for line, _, _ in CASES.values()]
    for command in COMMANDS:
        least = 2 if command in ("models", "recipes") else 3
        assert asked.count(command) >= least, command
    assert len({line for line, _, _ in CASES.values()}) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_refused_in_one_sentence(case: str, files: Path, results: Path):
    line, code, text = CASES[case]
    before = content(results)
    done = here(*arguments_of(line, files, results))
    refused(done, code, text)
    assert content(results) == before


@pytest.mark.parametrize(
    "case", ["unknown option", "NaN weights", "infeasible budget", "truncated archive"]
)
def test_wrong_input_in_a_process_of_its_own(case: str, files: Path, results: Path, tmp_path: Path):
    line, code, text = CASES[case]
    before = content(results)
    done = alone(*arguments_of(line, files, results), cache=tmp_path / "cache")
    refused(done, code, text)
    assert content(results) == before


def test_the_files_that_are_made_here_are_good_otherwise(files: Path):
    done = here(
        *("evaluate", files / "good.json", "--weights", files / "good.safetensors"),
        *("--eval-data", files / "good.npz", "--quiet"),
    )
    assert done.code == 0, done.err
