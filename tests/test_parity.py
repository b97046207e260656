"""Every way to compute the same 50 steps follows one loss trajectory, through the command line (docs/parity.md)."""

from pathlib import Path

import pytest

from tests.parity import ANSWERS, curve, follows, residuals, train

SMALLEST = (
    *("policy.width=16", "policy.layers=2", "policy.heads=2", "policy.hidden=32", "data.batch_size=8"),
    "data.standin={sft: 200, prompts: 8, val: 4, test: 4, misconception: 0.6, slip: 0.0}",
    f"data.trajectories={ANSWERS}",
)
TWO = ("trainer.accelerator=cpu", "trainer.devices=2")
WAYS = {
    "8x1": ("trainer.accumulate_grad_batches=8",),
    "ddp2": ("trainer=ddp", *TWO),
    "fsdp2": ("trainer=fsdp", *TWO),
    "checkpointing": ("policy.checkpointing=true",),
    "padded": ("data.pad_to_multiple=64",),
    "packed": ("data.packed=true",),
}
TOGETHER = ("8x1 padded", "ddp2", "fsdp2 checkpointing", "packed")  # what differs from 1x8 is in one of these
COLUMNS = {
    "sft": ("train/loss", "grad_norm/policy"),
    "dqo": ("train/loss", "grad_norm/policy", "grad_norm/value"),
}


def carried_out(output: Path, ways: str) -> Path:
    """DQO and the SFT that it starts from; SFT alone where rows are packed, which DQO refuses."""
    model = "sft" if "packed" in ways else "dqo"
    words = [word for way in ways.split() for word in WAYS[way]]
    train(output, f"model={model}", *SMALLEST, *words, "trainer.max_steps=50")
    return output


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    """1x8: one process, the whole batch at once."""
    output = carried_out(tmp_path_factory.mktemp("1x8"), "")
    losses = curve(output, "sft", "train/loss")
    assert losses[0] - losses[-1] > 1
    return output


def check(ours: Path, theirs: Path) -> None:
    for method in ("sft",) if ours.name == "packed" else ("sft", "dqo"):
        for column in COLUMNS[method]:
            pair = curve(ours, method, column), curve(theirs, method, column)
            print(f"{ours.name:20} {method} {column:16} max %.1e, mean %.1e" % residuals(*pair))
            assert follows(*pair), f"{method} {column}: {residuals(*pair)}"


@pytest.mark.parametrize("ways", TOGETHER)
def test_losses_and_gradient_norms_are_those_of_one_process_with_the_whole_batch(ways, reference, tmp_path):
    check(carried_out(tmp_path / ways, ways), reference)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_each_way_by_itself_follows_one_process_with_the_whole_batch(way, reference, tmp_path):
    check(carried_out(tmp_path / way, way), reference)


def test_a_bias_that_stays_below_the_greatest_difference_is_seen():
    curve = [2.0 - step / 50 for step in range(50)]
    assert follows([loss + 1e-4 * (-1) ** step for step, loss in enumerate(curve)], curve)
    assert not follows([loss + 1e-4 for loss in curve], curve)
    assert not follows([*curve[:-1], curve[-1] + 2e-3], curve)
