"""Losses of pairs and games through the command line: on two processes as on one."""

import pytest

from tests.parity import curve, launched, residuals

SMALLEST = (
    *("data=chat", "data.name=standin", "data.standin.train=48", "data.standin.val=8", "data.standin.test=8"),
    *("compare=null", "policy.width=32", "policy.layers=1", "policy.hidden=32", "trainer.val_check_interval=0"),
    *("trainer.log_every_n_steps=1", "data.max_response=8", "stages=[fit]"),
)
START = ("model=sft", "trainer.max_steps=100", "data.batch_size=16", "optimizer.lr=1e-2")
STEPS = ("trainer.max_steps=6", "data.batch_size=8")
GAME = ("model.iterations=2", "rollouts.k=4")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A policy that has learned to reply."""
    (export,) = launched(tmp_path_factory.mktemp("start"), *SMALLEST, *START).glob("sft/*/*/export")
    return export


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "ways"), [("dpo", ["ddp"]), ("apo", ["ddp", "fsdp"]), ("sppo", ["ddp"]), ("ompo", ["fsdp"])]
)
def test_two_processes_play_as_one(model, ways, start, tmp_path):
    """Averaged, or sharded, over equal global batches: the same answers, labels and pairs, hence the same losses."""
    words = (*SMALLEST, f"model={model}", *STEPS, f"policy_weights={start}", *(() if model == "dpo" else GAME))
    one = launched(tmp_path / "one", *words)
    columns = ["train/loss", "grad_norm/policy", *([] if model == "dpo" else ["train/pairs"])]
    for way in ways:
        two = launched(tmp_path / way, *words, f"trainer={way}", "trainer.accelerator=cpu", "trainer.devices=2")
        for column in columns:
            theirs = curve(one, model, column)
            # the losses of SPPO and OMPO are squares of nats, and large where 1 / beta is
            scale = max(1.0, *map(abs, theirs))
            greatest, _ = residuals(curve(two, model, column), theirs)
            assert len(theirs) == 6
            assert greatest <= 1e-5 * scale, f"{way} {column}: {greatest}, at most {scale}"
