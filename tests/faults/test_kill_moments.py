"""kill -9 at random moments, again and again in the same run: what comes out is what an undisturbed run brings, to the
byte, and no answer is sampled twice. The full form, `-m slow`, kills twenty times in each phase."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, without_data

import train
from tessera.checkpoints import VerifiedCheckpointIO, newest_valid, sweep_up, verify

JOB = (
    "model=dqo",
    "data.standin={sft: 64, prompts: 400, val: 24, test: 4, misconception: 0.6, slip: 0.0}",
    *("rollouts.k=4", "rollouts.batch_rows=32", "data.max_response=80", "model.value_warmup=0.2"),
    *("trainer.max_steps=200", "trainer.val_check_interval=10"),
    *("callbacks.checkpoint_every=2", "callbacks.keep=3"),
)
WAYS = {"one": (), "two": ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.grace_minutes=0.1")}
PATIENCE = 300  # seconds


def started(output: Path, *words: str) -> subprocess.Popen:
    """The job in a process group of its own, so that all of it can be killed."""
    command = [sys.executable, train.__file__, *TINY, *JOB, *words, f"output={output}"]
    log = (output.parent / f"{output.name}.log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=log, env=without_data(), start_new_session=True)


def kill(process: subprocess.Popen, output: Path) -> None:
    """kill -9 to every process of the run at once; the ranks are in sessions of their own."""
    pids = subprocess.run(["pgrep", "-f", f"output={output}$"], capture_output=True, text=True).stdout.split()
    for pid in {*map(int, pids), process.pid}:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def steps(output: Path, method: str) -> int:
    """The newest step that the manifest of a method's run confirms, -1 where there is no such run."""
    found = [-1]
    for run in output.glob(f"{method}/*/*/run.json"):
        manifest = run.parent / "checkpoints" / "manifest.json"
        entries = json.loads(manifest.read_text()).values() if manifest.exists() else ()
        found += [entry["step"] for entry in entries]
    return max(found)


def answered(output: Path) -> list[str]:
    """The ids of the prompts whose answers are on the disk."""
    lines = [line for path in output.glob("rollouts/*/part-*.jsonl") for line in path.open() if line.endswith("\n")]
    return [record["prompt_id"] for line in lines for record in json.loads(line) if record["sample"] == 0]


def ended(output: Path, method: str) -> bool:
    return bool(list(output.glob(f"{method}/*/*/results.json")))


def validated(output: Path) -> bool:
    """Whether the run is in a validation, as far as its files show: its newest checkpoint is of a step before one."""
    return steps(output, "dqo") % 10 == 8


def saving(output: Path) -> bool:
    return bool(list(output.glob("*/*/*/checkpoints/.*.part")))


class Moved:
    """Whether the SFT run has saved another step since it was last asked after a kill."""

    def __init__(self) -> None:
        self.before = -1

    def __call__(self, output: Path) -> bool:
        now = steps(output, "sft")
        moved, self.before = now != self.before, now
        return moved


# for each phase: when it is under way, and when it is over
PHASES: dict[str, tuple[Callable[[Path], bool], Callable[[Path], bool]]] = {
    "SFT": (Moved(), lambda output: steps(output, "sft") >= 198),
    "rollouts": (lambda output: bool(list(output.glob("rollouts/*/lock"))), lambda output: len(answered(output)) > 390),
    "DQO": (lambda output: steps(output, "dqo") >= 0, lambda output: steps(output, "dqo") >= 70),
    "validation": (validated, lambda output: steps(output, "dqo") >= 130),
    "save": (saving, lambda output: steps(output, "dqo") >= 198),
}


# seconds from the moment that shows a phase to the kill; in the rollouts and DQO from the start of the process
DELAYS = {"SFT": 0.3, "rollouts": 2.0, "DQO": 2.0, "validation": 0.02, "save": 0.02}


def disturbed(output: Path, kills: int, seed: int, words: tuple[str, ...]) -> dict[str, int]:
    """Kill the job up to `kills` times in each phase, then let it end; how often it was killed in which."""
    chance, count = random.Random(seed), dict.fromkeys(PHASES, 0)
    for phase, (under_way, over) in PHASES.items():
        while count[phase] < kills and not over(output):
            process = started(output, *words)
            deadline = time.monotonic() + PATIENCE
            while not under_way(output) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, DELAYS[phase]))
            still = process.poll() is None
            kill(process, output)
            count[phase] += still
            assert len(answered(output)) == len(set(answered(output)))
    final = started(output, *words)
    assert final.wait(PATIENCE) == 0, (output.parent / f"{output.name}.log").read_text()[-3000:]
    return count


def brought(output: Path) -> dict[str, object]:
    """Everything that a job computes: weights, optimizer state, logged numbers, answers, results."""
    found: dict[str, object] = {"answers": next(output.glob("rollouts/*/trajectories.jsonl")).read_bytes()}
    for method in ("sft", "dqo"):
        (run,) = (path.parent for path in output.glob(f"{method}/*/*/run.json"))
        newest, broken = newest_valid(run / "checkpoints")
        assert not broken
        checkpoint = torch.load(newest, weights_only=True)
        found[f"{method} optimizer"] = flat(checkpoint["optimizer_states"])
        found[f"{method} weights"] = (run / "export" / "model.safetensors").read_bytes()
        found[f"{method} results"] = json.loads((run / "results.json").read_text())["metrics"]
        with (run / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        found[f"{method} metrics"] = [{k: v for k, v in r.items() if not k.startswith("throughput")} for r in rows]
    return found


def flat(value: object) -> object:
    """Nested containers with tensors as bytes, which compare."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: flat(part) for key, part in value.items()}
    return [flat(part) for part in value] if isinstance(value, (list, tuple)) else value


def compare(tmp_path: Path, kills: int, way: str) -> dict[str, int]:
    whole = tmp_path / "whole"
    assert started(whole, *WAYS[way]).wait(PATIENCE) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    counted = disturbed(tmp_path / "killed", kills, seed=kills, words=WAYS[way])
    ours, theirs = brought(tmp_path / "killed"), brought(whole)
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert not list((tmp_path / "killed").rglob("*.part"))
    return counted


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_twenty_kills_in_each_phase_change_nothing(way, tmp_path):
    counted = compare(tmp_path, 20, way)
    print(way, counted)
    assert min(counted.values()) >= 10, counted


# ---- the save alone, at its size


def test_a_save_of_100_mb_killed_at_any_moment_leaves_the_checkpoint_before_it(tmp_path):
    checkpoint = {"global_step": 0, "state_dict": {f"layer{n}": torch.rand(2_500_000) for n in range(10)}}
    VerifiedCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step-000000.ckpt")
    chance, unfinished = random.Random(1), 0
    for step in range(1, 21):
        child = os.fork()
        if child == 0:
            VerifiedCheckpointIO(keep=2).save_checkpoint(
                {**checkpoint, "global_step": step}, tmp_path / f"step-{step:06d}.ckpt"
            )
            os._exit(0)
        time.sleep(chance.uniform(0.0, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += bool(list(tmp_path.glob(".*.part")))
        newest, broken = newest_valid(tmp_path)
        assert newest is not None
        assert not broken
        verify(newest)
        sweep_up(tmp_path)
    assert unfinished
    assert len(list(tmp_path.glob("*.ckpt"))) <= 3
