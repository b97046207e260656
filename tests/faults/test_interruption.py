"""A whole job that is killed in every phase, damaged and interrupted ends as if nothing had happened."""

import csv
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import command, without_data

from tests.waiting import until

STEPS, PROMPTS = 40, 400
JOB = (
    "model=dqo",
    f"data.standin={{sft: 64, prompts: {PROMPTS}, val: 4, test: 4, misconception: 0.6, slip: 0.0}}",
    *("rollouts.k=4", "data.max_response=80", "model.value_warmup=0.2"),
    *(f"trainer.max_steps={STEPS}", "trainer.val_check_interval=7"),
    *("callbacks.checkpoint_every=3", "callbacks.keep=3"),
)
PATIENCE = 120  # seconds


@dataclass
class Attempt:
    """One process that was stopped or ended, and what was on the disk then."""

    status: int
    out: str
    err: str
    runs: dict[str, Path] = field(default_factory=dict)
    answered: int = 0


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint of a run folder, 0 without one."""
    manifest = run / "checkpoints" / "manifest.json"
    entries = json.loads(manifest.read_text()).values() if manifest.exists() else []
    return max((entry["step"] for entry in entries), default=0)


def runs(output: Path, method: str) -> list[Path]:
    return sorted(path.parent for path in output.glob(f"{method}/*/*/run.json"))


def answered(output: Path) -> int:
    """Prompts whose answers are on the disk."""
    lines = [line for path in output.glob("rollouts/*/part-*.jsonl") for line in path.open() if line.endswith("\n")]
    return len({record["prompt_id"] for line in lines for record in json.loads(line)})


def checkpointed(output: Path, method: str, step: int) -> bool:
    return any(newest_step(run) >= step for run in runs(output, method))


def stopped(output: Path, when: Callable[[], bool], with_signal: int) -> Attempt:
    """Start the job, stop it once `when` holds, and look at what it left."""
    process = start(output)
    deadline = time.monotonic() + PATIENCE
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(with_signal)
    attempt = ended(process)
    attempt.answered = answered(output)
    assert not list(output.glob("dqo/*/*/results.json")), "the job was over before it could be stopped"
    return attempt


def start(output: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command(*JOB, f"output={output}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=without_data(),
    )


def ended(process: subprocess.Popen) -> Attempt:
    out, err = process.communicate(timeout=PATIENCE)
    return Attempt(process.returncode, out, err)


def started_twice(output: Path) -> tuple[subprocess.Popen, subprocess.Popen]:
    """The job, and the same job while the first one holds the run; the first goes on when the second waits."""
    first = start(output)
    until(lambda: any(f"process {first.pid} " in lock.read_text() for lock in output.glob("dqo/*/.*.lock")))
    first.send_signal(signal.SIGSTOP)
    second = start(output)
    waiting = re.compile(rf"-> FLOCK .* {second.pid} ")
    until(lambda: waiting.search(Path("/proc/locks").read_text()) or second.poll() is not None)
    first.send_signal(signal.SIGCONT)
    return first, second


def newest_file(output: Path) -> Path:
    """The newest checkpoint file of the DQO run."""
    (run,) = runs(output, "dqo")
    return max(run.glob("checkpoints/step-*.ckpt"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The output of a job that nobody touches."""
    output = tmp_path_factory.mktemp("undisturbed")
    attempt = ended(start(output))
    assert attempt.status == 0, attempt.err
    return output


@dataclass
class Story:
    """The same job with a kill in every phase, broken checkpoints, Ctrl-C, and twice at once at the end."""

    output: Path
    in_sft: Attempt
    in_rollouts: Attempt
    in_dqo: Attempt
    truncated: Path
    by_ctrl_c: Attempt
    flipped: Path
    last: tuple[Attempt, Attempt]


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory) -> Story:
    output = tmp_path_factory.mktemp("disturbed")
    in_sft = stopped(output, lambda: checkpointed(output, "sft", 3), signal.SIGKILL)
    assert not list(output.glob("sft/*/*/results.json"))
    in_rollouts = stopped(output, lambda: answered(output) > 0, signal.SIGKILL)
    in_dqo = stopped(output, lambda: checkpointed(output, "dqo", 9), signal.SIGKILL)
    truncated = newest_file(output)
    os.truncate(truncated, truncated.stat().st_size // 2)
    by_ctrl_c = stopped(output, lambda: checkpointed(output, "dqo", step_of(truncated) + 6), signal.SIGINT)
    flipped = newest_file(output)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    first, second = started_twice(output)
    return Story(output, in_sft, in_rollouts, in_dqo, truncated, by_ctrl_c, flipped, (ended(first), ended(second)))


@pytest.mark.slow
def test_a_killed_job_is_taken_up_again_in_its_folders(disturbed):
    assert disturbed.in_sft.status == disturbed.in_rollouts.status == disturbed.in_dqo.status == -signal.SIGKILL
    assert [attempt.status for attempt in disturbed.last] == [0, 0]
    (sft,), (dqo,) = runs(disturbed.output, "sft"), runs(disturbed.output, "dqo")
    assert f"continuing from {sft}/checkpoints/" in disturbed.in_rollouts.out
    assert f"continuing from {dqo}/checkpoints/" in disturbed.by_ctrl_c.out


@pytest.mark.parametrize("method", ["sft", "dqo"])
@pytest.mark.slow
def test_the_weights_of_a_disturbed_job_are_those_of_an_undisturbed_one_to_the_byte(method, disturbed, undisturbed):
    ours, theirs = (
        runs(output, method)[0] / "export" / "model.safetensors" for output in (disturbed.output, undisturbed)
    )
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("method", ["sft", "dqo"])
@pytest.mark.slow
def test_the_results_of_a_disturbed_job_are_those_of_an_undisturbed_one(method, disturbed, undisturbed):
    ours, theirs = (
        json.loads((runs(output, method)[0] / "results.json").read_text())["metrics"]
        for output in (disturbed.output, undisturbed)
    )
    assert ours == theirs


@pytest.mark.parametrize("method", ["sft", "dqo"])
@pytest.mark.slow
def test_every_step_is_logged_once_with_the_numbers_of_an_undisturbed_job(method, disturbed, undisturbed):
    ours, theirs = logged(runs(disturbed.output, method)[0]), logged(runs(undisturbed, method)[0])
    assert [row["step"] for row in ours] == [str(step) for step in range(STEPS + 1)]
    assert ours == theirs


def logged(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("throughput")} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_no_answer_is_sampled_twice(disturbed):
    before = disturbed.in_rollouts.answered
    assert 0 < before < PROMPTS
    assert f"rollout: {PROMPTS - before} of {PROMPTS - before} prompts" in disturbed.in_dqo.err
    assert "rollout: " not in disturbed.by_ctrl_c.err + disturbed.last[0].err + disturbed.last[1].err
    (cache,) = disturbed.output.glob("rollouts/*/trajectories.jsonl")
    rows = [json.loads(line) for line in cache.open()]
    assert len({(row["prompt_id"], row["sample"]) for row in rows}) == len(rows) == PROMPTS * 4


@pytest.mark.slow
def test_the_answers_of_a_killed_rollout_are_those_of_an_undisturbed_one(disturbed, undisturbed):
    (ours,), (theirs,) = (output.glob("rollouts/*/trajectories.jsonl") for output in (disturbed.output, undisturbed))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_ctrl_c_ends_with_status_130_and_says_how_to_go_on(disturbed):
    assert disturbed.by_ctrl_c.status == 130
    assert "Traceback" not in disturbed.by_ctrl_c.err
    assert disturbed.by_ctrl_c.err.splitlines()[-1].startswith("interrupted: the same command continues from the last")


@pytest.mark.slow
def test_a_truncated_checkpoint_is_named_and_an_older_one_taken(disturbed):
    assert f"warning: passed over: {disturbed.truncated} has " in disturbed.by_ctrl_c.err
    assert "it is truncated" in disturbed.by_ctrl_c.err
    assert str(disturbed.truncated) not in disturbed.by_ctrl_c.out


@pytest.mark.slow
def test_a_checkpoint_with_a_flipped_bit_is_named_and_an_older_one_taken(disturbed):
    said = [attempt for attempt in disturbed.last if "passed over" in attempt.err]
    assert len(said) == 1
    assert f"warning: passed over: {disturbed.flipped} differs from what was written" in said[0].err
    assert "continuing from " in said[0].out
    assert str(disturbed.flipped) not in said[0].out


@pytest.mark.slow
def test_of_two_same_commands_at_once_one_waits_and_takes_the_results_of_the_other(disturbed):
    waited = [attempt for attempt in disturbed.last if "waiting for process" in attempt.err]
    assert len(waited) == 1
    assert len(runs(disturbed.output, "dqo")) == 1
    tables = [attempt.out[attempt.out.index("┏") :] for attempt in disturbed.last]
    assert tables[0] == tables[1]
