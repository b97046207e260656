"""The smallest whole job, spoken to in this process or as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train

TRAIN = Path(train.__file__)
TINY = (
    *("data=gsm8k", "data.standin={sft: 64, prompts: 8, val: 4, test: 4, misconception: 0.6, slip: 0.0}"),
    *("policy.width=16", "policy.layers=1", "policy.heads=2", "policy.hidden=32", "data.extract=flexible"),
    *("data.batch_size=8", "data.max_response=64", "rollouts.k=4", "evaluation.k=2", "compare=null"),
    *("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"),
)


@pytest.fixture(autouse=True)
def generated_data(monkeypatch):
    """The stand-in and no network, whatever the machine has."""
    monkeypatch.delenv("TESSERA_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def outputs(tmp_path) -> Path:
    """Where the runs of one test go."""
    return tmp_path / "outputs"


@pytest.fixture
def say(monkeypatch, capfd, outputs):
    """`say("model=sft", ...)` in this process: the exit status and what stood on stderr."""

    def say(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, f"output={outputs}", *words])
        capfd.readouterr()
        status = 0
        try:
            train.main()
        except SystemExit as leaving:
            status = leaving.code
        return status, capfd.readouterr().err

    return say


def command(*words: str) -> list[str]:
    """The same words for a process of its own."""
    return [sys.executable, str(TRAIN), *TINY, *words]


def spoken(*words: str, **options) -> subprocess.CompletedProcess:
    """Run the words in a process of their own to the end."""
    return subprocess.run(command(*words), capture_output=True, text=True, env=os.environ, timeout=300, **options)
