"""A game through the command line: on two processes as on one."""

import pytest

from tests.parity import curve, launched, residuals

SMALLEST = (
    *("data=chat", "data.name=standin", "data.standin.train=48", "data.standin.val=8", "data.standin.test=8"),
    *("compare=null", "policy.width=32", "policy.layers=1", "policy.hidden=32", "trainer.val_check_interval=0"),
    *("trainer.log_every_n_steps=1", "data.max_response=8", "stages=[fit]"),
)
START = ("model=sft", "trainer.max_steps=100", "data.batch_size=16", "optimizer.lr=1e-2")
GAME = ("model=apo", "model.iterations=2", "trainer.max_steps=6", "data.batch_size=8", "rollouts.k=4")


@pytest.mark.slow
def test_two_processes_play_as_one(tmp_path):
    """Averaged, and sharded, over equal global batches: the same answers, labels and pairs, hence the same losses."""
    (start,) = launched(tmp_path / "start", *SMALLEST, *START).glob("sft/*/*/export")
    one = launched(tmp_path / "one", *SMALLEST, *GAME, f"policy_weights={start}")
    for way in ("ddp", "fsdp"):
        words = (f"trainer={way}", "trainer.accelerator=cpu", "trainer.devices=2")
        two = launched(tmp_path / way, *SMALLEST, *GAME, f"policy_weights={start}", *words)
        for column in ("train/loss", "train/pairs", "grad_norm/policy"):
            pair = curve(two, "apo", column), curve(one, "apo", column)
            assert residuals(*pair)[0] <= 1e-5, f"{way} {column}: {residuals(*pair)}"
