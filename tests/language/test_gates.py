"""The byte language model reaches with each optimizer what it must; not which of them is best."""

import json
import math

import pytest

from tessera.run import main

UNIGRAM = 3.13  # nats, of the bytes of the standard library


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "gate"),
    [
        (["optimizer=adamw", "optimizer.lr=3e-3"], 2.30),
        (["optimizer=mars"], 2.30),
        (["optimizer=muon"], 2.30),
        (["optimizer=adam_pp"], 2.40),
    ],
    ids=["adamw", "mars", "muon", "adam_pp"],
)
def test_the_byte_model_learns_with_every_optimizer(words, gate, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["model=gpt2", "data=text", *words, f"output={tmp_path}"]) == 0
    (path,) = tmp_path.glob("gpt2/*/*/results.json")
    loss = json.loads(path.read_text())["headline"]["value"]
    print(" ".join(words), f"{loss:.4f}")
    assert math.isfinite(loss)
    assert loss <= gate < UNIGRAM
