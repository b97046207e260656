"""Two processes, sharded or not, and gradient accumulation do what one process does with the same global batch."""

import csv
import json
import subprocess
from pathlib import Path

import pytest
from conftest import command, without_data
from safetensors.torch import load_file

JOB = ("model=dqo", "model.value_warmup=0.2", "trainer.max_steps=12", "trainer.val_check_interval=6")
TWO = ("trainer.accelerator=cpu", "trainer.devices=2")
FOUR = ("trainer.accelerator=cpu", "trainer.devices=4", "trainer.replicas=2", "trainer.sharded_checkpoints=true")
WAYS = {
    "ddp": ("trainer=ddp", *TWO),
    "fsdp": ("trainer=fsdp", *TWO),
    "ddp_fsdp": ("trainer=ddp_fsdp", *FOUR),
    "accumulation": ("trainer.accumulate_grad_batches=2",),
}


def carried_out(output: Path, *words: str) -> Path:
    done = subprocess.run(
        command(*words, f"output={output}"), capture_output=True, text=True, env=without_data(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "rror" in line]
    return output


def answers(path: Path) -> Path:
    """Right and wrong answers, with rewards between: the smallest policy samples none that are right."""
    rows = []
    for n in range(2, 14):
        question = f"Tom has {n} pens and buys {n + 1}. How many?"
        rows.append({"question": question, "response": f"{n} + {n + 1} = {2 * n + 1}\n#### {2 * n + 1}", "reward": 1})
        rows.append({"question": question, "response": f"{n} + {n} is {2 * n}\n#### {2 * n}", "reward": n % 3 / 4})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory) -> str:
    return f"data.trajectories={answers(tmp_path_factory.mktemp('data') / 'answers.jsonl')}"


@pytest.fixture(scope="module")
def alone(trajectories, tmp_path_factory) -> Path:
    """SFT and DQO on one process."""
    return carried_out(tmp_path_factory.mktemp("alone"), *JOB, trajectories)


@pytest.fixture(
    scope="module", params=[pytest.param(way, marks=pytest.mark.slow) if way == "ddp_fsdp" else way for way in WAYS]
)
def other(request, trajectories, tmp_path_factory) -> Path:
    """The same job another way."""
    return carried_out(tmp_path_factory.mktemp(request.param), *JOB, trajectories, *WAYS[request.param])


def of(output: Path, method: str, name: str) -> Path:
    return next(output.glob(f"{method}/*/*/{name}"))


def column(output: Path, method: str, name: str) -> list[float]:
    with of(output, method, "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize("method", ["sft", "dqo"])
def test_the_losses_are_those_of_one_process(method, other, alone):
    ours, theirs = column(other, method, "train/loss"), column(alone, method, "train/loss")
    assert len(ours) == len(theirs) == 12
    assert max(theirs) > 0.5
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(("method", "network"), [("sft", "policy"), ("dqo", "policy"), ("dqo", "value")])
def test_the_gradient_norms_are_those_of_one_process(method, network, other, alone):
    ours, theirs = (column(output, method, f"grad_norm/{network}") for output in (other, alone))
    assert max(theirs) > 0.1
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("method", ["sft", "dqo"])
def test_the_weights_are_those_of_one_process(method, other, alone):
    ours, theirs = (load_file(of(output, method, "export/model.safetensors")) for output in (other, alone))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-5


@pytest.mark.parametrize("method", ["sft", "dqo"])
def test_every_problem_is_tested_once(method, other, alone):
    ours, theirs = (
        [json.loads(line)["id"] for line in of(output, method, "samples.jsonl").open()] for output in (other, alone)
    )
    assert len(ours) == len(set(ours))
    assert ours == theirs


def test_two_processes_sample_the_answers_of_one(alone, tmp_path, say, outputs):
    words = ("model=dqo", f"policy_weights={of(alone, 'sft', 'export')}", "trainer.max_steps=1", "stages=[fit]")
    words += ("data.standin={sft: 64, prompts: 300, val: 4, test: 4, misconception: 0.6, slip: 0.0}",)
    ours = carried_out(tmp_path / "two", *words, *WAYS["ddp"])
    status, err = say(*words)
    assert status == 0, err
    sampled = [next(output.glob("rollouts/*/trajectories.jsonl")).read_bytes() for output in (ours, outputs)]
    assert sampled[0].count(b"\n") == 300 * 4
    assert sampled[0] == sampled[1]
