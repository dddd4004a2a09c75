"""The example of a sentence encoder, with the small network of `test_prepared.py`."""

from pathlib import Path

import numpy as np
import pytest
from commandline import here
from test_prepared import folder as folder

import proxyq
from proxyq.api.inputs import as_data

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "sentence_encoder.py"


@pytest.mark.slow
def test_it_searches_on_text(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PROXYQ_ENCODER", str(folder))
    text = tmp_path / "sentences.txt"
    text.write_text("the cat sat on the mat\na dog ran\nthe dog and the cat ran\n" * 4)
    spec, plan = f"{EXAMPLE}:encoder", tmp_path / "plan.json"
    done = here(
        *("search", spec, "--proxy", "kl-delta", "--data", f"text:{text}"),
        *("--budget", "size=4bit", "--out", plan, "--quiet"),
    )
    assert done.code == 0, done.err
    model = proxyq.load_model(spec)
    found = proxyq.Plan.load(plan)
    assert found.size_bits <= 4 * sum(layer.weights for layer in found.layers.values())
    inputs = as_data(f"text:{text}", model).inputs
    vectors = np.asarray(model.apply(model.params, inputs))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 20, rtol=1e-5)


def test_the_folder_must_be_named(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.delenv("PROXYQ_ENCODER", raising=False)
    done = here("inspect", f"{EXAMPLE}:encoder")
    assert done.code == 1 and "PROXYQ_ENCODER" in done.err and done.err.count("\n") == 1
