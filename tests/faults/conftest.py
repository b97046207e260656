"""The smallest whole job, spoken to in this process or as a process of its own."""

import os
import sys
from pathlib import Path

import pytest

import train

TINY = (
    *("data=gsm8k", "data.standin={sft: 64, prompts: 8, val: 4, test: 4, misconception: 0.6, slip: 0.0}"),
    *("policy.width=16", "policy.layers=1", "policy.heads=2", "policy.hidden=32", "data.extract=flexible"),
    *("data.batch_size=8", "data.max_response=64", "rollouts.k=4", "evaluation.k=2", "compare=null"),
    *("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"),
)


def command(*words: str) -> list[str]:
    """The smallest job with these words, for a process of its own."""
    return [sys.executable, train.__file__, *TINY, *words]


def without_data() -> dict[str, str]:
    """The environment of a machine that has no data and no network: the problems are generated."""
    environment = {name: value for name, value in os.environ.items() if name != "TESSERA_DATA"}
    return {**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def outputs(tmp_path) -> Path:
    """Where the runs of one test go."""
    return tmp_path / "outputs"


@pytest.fixture
def say(monkeypatch, told, outputs):
    """`say("model=sft", ...)` is the smallest job in this process: the exit status and what stood on stderr."""
    monkeypatch.delenv("TESSERA_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda *words: told(*TINY, f"output={outputs}", *words)
