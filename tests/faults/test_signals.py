"""A run that is asked to stop, loses a process or hangs: what it saves, what it says, what is left running."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TINY, command, without_data

import train

LONG = ("model=sft", "trainer.max_steps=100000", "trainer.val_check_interval=50000", "trainer.log_every_n_steps=1")
TWO = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.grace_minutes=0.2")
PATIENCE = 120  # seconds


@dataclass
class Running:
    """A run in processes of its own."""

    process: subprocess.Popen
    output: Path

    def rank(self, number: int) -> int:
        """The pid of one of the processes that the launcher started."""
        for child in subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True).stdout.split():
            environment = Path(f"/proc/{int(child)}/environ").read_bytes().split(b"\0")
            if f"RANK={number}".encode() in environment:
                return int(child)
        raise AssertionError(f"there is no process {number}")

    def step(self) -> int:
        """The last step that is in metrics.csv."""
        lines = [path.read_text().splitlines()[-1] for path in self.output.glob("*/*/*/metrics.csv")]
        return max((int(line.split(",")[0]) for line in lines if line[:1].isdigit()), default=-1)

    def until(self, happened: Callable[[], bool]) -> "Running":
        deadline = time.monotonic() + PATIENCE
        while not happened() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert happened(), self.process.communicate()[1]
        return self

    def left_behind(self) -> list[int]:
        """Processes of this run that are still there."""
        found = subprocess.run(["pgrep", "-f", f"output={self.output}"], capture_output=True).stdout.split()
        return [int(pid) for pid in found]

    def ended(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, err


@pytest.fixture
def start(outputs):
    """`start("model=sft", ...)` is a run in the background; nothing of it outlives the test."""
    started = []

    def start(*words: str, environment: dict[str, str] | None = None, run: list[str] | None = None) -> Running:
        process = subprocess.Popen(
            [*(run or [sys.executable, train.__file__]), *TINY, f"output={outputs}", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**without_data(), **(environment or {})},
        )
        started.append(Running(process, outputs))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()
        for pid in running.left_behind():
            os.kill(pid, signal.SIGKILL)


def steps_saved(output: Path) -> list[int]:
    manifests = [json.loads(path.read_text()) for path in output.glob("*/*/*/checkpoints/manifest.json")]
    return sorted(entry["step"] for manifest in manifests for entry in manifest.values())


def last_row(output: Path) -> int:
    (path,) = output.glob("*/*/*/metrics.csv")
    with path.open(newline="") as file:
        return int(list(csv.DictReader(file))[-1]["step"])


STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


@pytest.mark.parametrize(
    ("words", "number", "whom"),
    [
        ((), signal.SIGTERM, None),
        (("trainer=ddp", *TWO), signal.SIGINT, None),
        (("trainer=ddp", *TWO), signal.SIGTERM, 1),
        (("trainer=fsdp", *TWO), signal.SIGTERM, None),
    ],
    ids=["one", "ddp-ctrl-c", "ddp-one-of-two", "fsdp"],
)
def test_a_signal_saves_the_step_and_leaves_with_its_status(words, number, whom, start, outputs):
    running = start(*LONG, *words)
    running.until(lambda: running.step() >= 5)
    os.kill(running.process.pid if whom is None else running.rank(whom), number)
    status, err = running.ended()
    assert status == STATUS[number]
    assert "Traceback" not in err
    assert "the same command continues from the last checkpoint" in err.splitlines()[-1]
    assert steps_saved(outputs) == [last_row(outputs) + 1]
    assert not running.left_behind()
    again = start(*LONG, *words)
    again.until(lambda: running.step() > last_row(outputs) - 1 and again.process.poll() is None)


def test_a_slurm_job_warned_of_its_end_is_saved_and_queued_again(start, outputs, tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "job"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    running = start(*LONG, environment=slurm)
    running.until(lambda: running.step() >= 5).process.send_signal(signal.SIGUSR1)
    status, err = running.ended()
    assert status == 143
    assert "job 77 is queued again" in err
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert steps_saved(outputs) == [last_row(outputs) + 1]


def test_a_killed_process_is_named_and_takes_the_others_with_it(start, outputs):
    running = start(*LONG, "trainer=ddp", *TWO, "callbacks.checkpoint_every=3")
    running.until(lambda: len(steps_saved(outputs)) > 0)
    began = time.monotonic()
    os.kill(running.rank(1), signal.SIGKILL)
    status, err = running.ended()
    assert status == 1
    assert time.monotonic() - began < 30
    assert err.splitlines()[-1].startswith("error: process 1 was killed by SIGKILL")
    assert not running.left_behind()
    assert steps_saved(outputs)


@pytest.mark.slow
def test_a_process_that_hangs_is_named_with_where_it_was(start):
    running = start(*LONG, "trainer=ddp", *TWO, "trainer.timeout_minutes=0.1", "trainer.grace_minutes=0.05")
    running.until(lambda: running.step() >= 5)
    os.kill(running.rank(1), signal.SIGSTOP)
    status, err = running.ended()
    assert status == 1
    said = (
        r"error: trainer.timeout_minutes is over: waited for process 1 \(silent for \d+ s; pid \d+ on \S+, last seen "
    )
    assert re.match(said, err.splitlines()[-1]), err
    assert not running.left_behind()


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_leave(start, outputs):
    running = start(*LONG, "trainer=ddp", *TWO)
    running.until(lambda: running.step() >= 5).process.kill()
    deadline = time.monotonic() + PATIENCE
    while running.left_behind() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running.left_behind()
    # a fast run may have come to a step that is saved anyway before it noticed
    assert steps_saved(outputs)[-1] == last_row(outputs) + 1


@pytest.mark.slow
def test_a_run_started_again_after_a_failure_continues_from_its_checkpoint(start, outputs):
    running = start(*LONG, "trainer=ddp", *TWO, "trainer.restarts=1", "callbacks.checkpoint_every=3")
    running.until(lambda: len(steps_saved(outputs)) > 1)
    killed, before = running.rank(1), last_row(outputs)
    os.kill(killed, signal.SIGKILL)
    running.until(lambda: running.step() > before + 10)
    assert running.rank(1) != killed
    assert len(list(outputs.glob("sft/*/*/run.json"))) == 1
    running.process.send_signal(signal.SIGTERM)
    assert running.ended()[0] == 143


def test_a_signal_during_rollouts_costs_no_answer_that_is_on_the_disk(start, outputs):
    words = ("model=dqo", "data.standin={sft: 64, prompts: 2000, val: 4, test: 4, misconception: 0.6, slip: 0.0}")
    words += ("rollouts.batch_rows=16",)

    def parts() -> list[str]:
        return [line for path in outputs.glob("rollouts/*/part-0.jsonl") for line in path.open() if line.endswith("\n")]

    running = start(*words)
    running.until(lambda: len(parts()) >= 3).process.send_signal(signal.SIGTERM)
    status, err = running.ended()
    assert status == 143
    assert "the answers sampled so far" in err.splitlines()[-1]
    kept = len(parts())
    again = start(*words)
    again.until(lambda: len(parts()) > kept).process.send_signal(signal.SIGINT)
    assert again.ended()[0] == 130
    sampled = [record["prompt_id"] for line in parts() for record in json.loads(line) if record["sample"] == 0]
    assert len(sampled) == len(set(sampled))


def test_a_full_disk_ends_the_run_in_a_sentence_and_keeps_what_was_saved(outputs):
    limited = ["bash", "-c", 'ulimit -f 60; exec "$@"', "bash", *command("model=sft", f"output={outputs}")]
    done = subprocess.run(limited, capture_output=True, text=True, env=without_data())
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert re.match(
        r"error: .*/checkpoints/[\w-]+.ckpt could not be written: it needs [\d,]+ bytes, and [\d,]+ are free", said
    )
    assert not list(outputs.rglob("*.part"))
    assert len(list(outputs.rglob("metrics.csv"))) == 1
