"""The main job's first 50 steps are the committed ones; `python -m tests.test_reference_curve --write` renews those.

The answers that DQO learns from are committed as well, because a sampled token may flip with the last bit of a
probability; losses may differ in that bit too, which is why they are compared as in `tests/parity.py`.
"""

import csv
import json
import sys
import tempfile
from pathlib import Path

import pytest

from tests.parity import ANSWERS, curve, follows, residuals, train

CURVE = ANSWERS.with_name("main_job_curve.csv")
JOB = ("model=dqo", f"data.trajectories={ANSWERS}", "trainer.max_steps=50", "data.batch_size=16")


def committed() -> dict[str, list[float]]:
    """The curves by method."""
    with CURVE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {method: [float(row[method]) for row in rows] for method in ("sft", "dqo")}


@pytest.mark.slow
def test_a_fresh_main_job_follows_the_committed_curve(tmp_path):
    train(tmp_path, *JOB)
    for method, theirs in committed().items():
        ours = curve(tmp_path, method)
        assert follows(ours, theirs), f"{method}: {residuals(ours, theirs)}"


def test_the_committed_curves_go_somewhere():
    sft, dqo = committed().values()
    assert sft[0] > 6 > 3 > sft[-1]
    assert len(set(dqo)) == 50


def write(folder: Path) -> None:
    """Train a start, let it answer 60 problems four times, and record the losses of the job that learns from that."""
    train(folder / "start", "model=sft")
    weights = next((folder / "start").glob("sft/*/*/export"))
    problems = "data.standin={sft: 64, prompts: 60, val: 4, test: 4, misconception: 0.6, slip: 0.0}"
    train(folder / "answers", "model=dqo", f"policy_weights={weights}", "trainer.max_steps=1", "rollouts.k=4", problems)
    sampled = next((folder / "answers").glob("rollouts/*/trajectories.jsonl")).read_text().splitlines()
    rows = [{name: json.loads(line)[name] for name in ("question", "response", "reward")} for line in sampled]
    ANSWERS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(folder / "job", *JOB)
    with CURVE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "sft", "dqo"))
        writer.writerows(zip(range(50), curve(folder / "job", "sft"), curve(folder / "job", "dqo")))


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
