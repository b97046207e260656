"""Preference models through the command line: on two processes as on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules.alignment.gpm import load
from tests.parity import ROOT, curve, follows, residuals

SMALLEST = (
    *("data=tournaments", "compare=null", "policy.width=16", "policy.heads=2", "policy.hidden=32", "data.pairs=200"),
    *("data.batch_size=8", "trainer.max_steps=20", "trainer.val_check_interval=0", "trainer.log_every_n_steps=1"),
    *("data.held_out=40", "stages=[fit]"),
)


def train(output: Path, *words: str) -> Path:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *SMALLEST, *words, f"output={output}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpm", "bt", "pairpm"])
def test_two_processes_follow_one_and_leave_the_same_judge(model, tmp_path):
    """Averaged, and sharded, over equal global batches."""
    one = train(tmp_path / "one", f"model={model}")
    for way in ("ddp", "fsdp"):
        words = (f"trainer={way}", "trainer.accelerator=cpu", "trainer.devices=2")
        two = train(tmp_path / way, f"model={model}", *words)
        for column in ("train/loss", "grad_norm/policy"):
            pair = curve(two, model, column), curve(one, model, column)
            assert follows(*pair), f"{way} {column}: {residuals(*pair)}"
        ours, theirs = (load(next(output.glob(f"{model}/*/*/export"))) for output in (two, one))
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=name)
