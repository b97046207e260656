"""kill -9 in the middle of a game's rollouts and of its training: the same answers, labels and weights in the end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import without_data

import train
from tests.waiting import PATIENCE

SMALLEST = (
    *("data=chat", "data.name=standin", "data.standin.train=64", "data.standin.val=4", "data.standin.test=4"),
    *("compare=null", "policy.width=32", "policy.layers=1", "policy.hidden=32", "trainer.val_check_interval=0"),
    *("data.max_response=8", "data.batch_size=8", "stages=[fit]", "callbacks.checkpoint_every=1"),
)
START = ("model=sft", "trainer.max_steps=100", "optimizer.lr=1e-2")
EACH = 6  # steps of an iteration
GAME = ("model.iterations=2", f"trainer.max_steps={2 * EACH}", "rollouts.k=4", "rollouts.batch_rows=16")


def started(output: Path, *words: str) -> subprocess.Popen:
    log = (output.parent / f"{output.name}.log").open("a")
    command = [sys.executable, train.__file__, *SMALLEST, *words, f"output={output}"]
    return subprocess.Popen(command, stdout=log, stderr=log, env=without_data(), start_new_session=True)


def ended(process: subprocess.Popen, output: Path) -> None:
    assert process.wait(PATIENCE) == 0, (output.parent / f"{output.name}.log").read_text()[-3000:]


def step(output: Path) -> int:
    return max((int(path.stem[-6:]) for path in output.glob("*/*/*/checkpoints/step-*.ckpt")), default=0)


def being_sampled(output: Path) -> bool:
    """Whether a batch of answers is on the disk and others of its set are not."""
    return any(not (part.parent / "manifest.json").exists() for part in output.glob("rollouts/*/part-*.jsonl"))


# moments of the first and of the second iteration
MOMENTS: tuple[Callable[[Path], bool], ...] = (
    being_sampled,
    lambda output: 1 <= step(output) < EACH,
    lambda output: step(output) == EACH and being_sampled(output),
    lambda output: step(output) > EACH + 1,
)


def killed(output: Path, moment: Callable[[Path], bool], *words: str) -> bool:
    """Whether the job was killed at that moment, before its end."""
    process, deadline = started(output, *words), time.monotonic() + PATIENCE
    while process.poll() is None and not moment(output):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def brought(output: Path) -> dict[str, object]:
    """Weights, answers by the name of their set, labels with what was asked; nothing is there twice."""
    labels = [json.loads(line) for path in output.rglob("labels-*.jsonl") for line in path.read_text().split("\n")[:-1]]
    assert len({label[0] for label in labels}) == len(labels)
    (weights,) = output.glob("*/*/*/export/model.safetensors")
    answers = {path.parent.name: path.read_bytes() for path in output.glob("rollouts/*/trajectories.jsonl")}
    return {"weights": weights.read_bytes(), "answers": answers, "labels": sorted(map(str, labels))}


@pytest.mark.slow
@pytest.mark.parametrize("game", ["apo", "sppo", "ompo"])
def test_a_killed_game_samples_and_asks_nothing_twice_and_ends_with_the_same_weights(game, tmp_path):
    ended(started(tmp_path / "start", *START), tmp_path / "start")
    (start,) = (tmp_path / "start").glob("sft/*/*/export")
    words = (f"model={game}", *GAME, f"policy_weights={start}")
    ended(started(tmp_path / "whole", *words), tmp_path / "whole")
    times = [killed(tmp_path / "killed", moment, *words) for moment in MOMENTS]
    ended(started(tmp_path / "killed", *words), tmp_path / "killed")
    assert sum(times) >= 3, times
    assert brought(tmp_path / "killed") == brought(tmp_path / "whole")
