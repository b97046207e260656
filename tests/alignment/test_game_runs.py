"""A game through the command line: on two processes as on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity import ROOT, curve, residuals

SMALLEST = (
    *("data=chat", "data.name=standin", "data.standin.train=48", "data.standin.val=8", "data.standin.test=8"),
    *("compare=null", "policy.width=32", "policy.layers=1", "policy.hidden=32", "trainer.val_check_interval=0"),
    *("trainer.log_every_n_steps=1", "data.max_response=8", "stages=[fit]"),
)
START = ("model=sft", "trainer.max_steps=100", "data.batch_size=16", "optimizer.lr=1e-2")
GAME = ("model=apo", "model.iterations=2", "trainer.max_steps=6", "data.batch_size=8", "rollouts.k=4")


def train(output: Path, *words: str) -> Path:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *SMALLEST, *words, f"output={output}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
def test_two_processes_play_as_one(tmp_path):
    """Averaged, and sharded, over equal global batches: the same answers, labels and pairs, hence the same losses."""
    (start,) = train(tmp_path / "start", *START).glob("sft/*/*/export")
    one = train(tmp_path / "one", *GAME, f"policy_weights={start}")
    for way in ("ddp", "fsdp"):
        words = (f"trainer={way}", "trainer.accelerator=cpu", "trainer.devices=2")
        two = train(tmp_path / way, *GAME, f"policy_weights={start}", *words)
        for column in ("train/loss", "train/pairs", "grad_norm/policy"):
            pair = curve(two, "apo", column), curve(one, "apo", column)
            assert residuals(*pair)[0] <= 1e-5, f"{way} {column}: {residuals(*pair)}"
