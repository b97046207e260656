"""Preference models through the command line: on two processes as on one."""

import pytest
import torch

from lightning_modules.alignment.judge_export import load
from tests.parity import curve, follows, launched, residuals

SMALLEST = (
    *("data=tournaments", "compare=null", "policy.width=16", "policy.heads=2", "policy.hidden=32", "data.pairs=200"),
    *("data.batch_size=8", "trainer.max_steps=20", "trainer.val_check_interval=0", "trainer.log_every_n_steps=1"),
    *("data.held_out=40", "stages=[fit]"),
)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpm", "bt", "pairpm"])
def test_two_processes_follow_one_and_leave_the_same_judge(model, tmp_path):
    """Averaged, and sharded, over equal global batches."""
    one = launched(tmp_path / "one", *SMALLEST, f"model={model}")
    for way in ("ddp", "fsdp"):
        words = (f"trainer={way}", "trainer.accelerator=cpu", "trainer.devices=2")
        two = launched(tmp_path / way, *SMALLEST, f"model={model}", *words)
        for column in ("train/loss", "grad_norm/policy"):
            pair = curve(two, model, column), curve(one, model, column)
            assert follows(*pair), f"{way} {column}: {residuals(*pair)}"
        ours, theirs = (load(next(output.glob(f"{model}/*/*/export"))) for output in (two, one))
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=name)
