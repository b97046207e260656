"""Checkpoint folders through whole jobs: killed, damaged, forged, and continued by other numbers of processes."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import command, without_data

from tools.export import main as export

STEPS = 8
JOB = (
    *("model=sft", "model._target_=tests.faults.toys.DiesWhileSaving", f"trainer.max_steps={STEPS}"),
    *("trainer.val_check_interval=4", "callbacks.checkpoint_every=2", "callbacks.keep=9"),
)
FOLDERS = ("trainer.accelerator=cpu", "trainer.sharded_checkpoints=true")
TWO = ("trainer=fsdp", "trainer.devices=2", *FOLDERS)
WAYS = {
    "one": ("trainer=cpu",),
    "two": TWO,
    "four": ("trainer=fsdp", "trainer.devices=4", *FOLDERS),
    "two times two": ("trainer=ddp_fsdp", "trainer.devices=4", *FOLDERS),
    "two into one file": ("trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"),
}


def carried_out(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*JOB, *words), capture_output=True, text=True, env={**without_data(), **environment}, timeout=300
    )


def run_of(output: Path) -> Path:
    (record,) = output.glob("sft/*/*/run.json")
    return record.parent


def weights(run: Path) -> bytes:
    return (run / "export" / "model.safetensors").read_bytes()


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def at_step(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run folder as it was after its checkpoint of that step."""
    shutil.copytree(run, copy)
    (copy / "results.json").unlink()
    shutil.rmtree(copy / "export")
    for later in range(step + 1, STEPS + 1):
        path = copy / "checkpoints" / f"step-{later:06d}.ckpt"
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    manifest = copy / "checkpoints" / "manifest.json"
    entries = {name: entry for name, entry in json.loads(manifest.read_text()).items() if entry["step"] <= step}
    manifest.write_text(json.dumps(entries))
    return copy


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The run folder of a job on two processes that nobody touches."""
    output = tmp_path_factory.mktemp("undisturbed")
    done = carried_out(*TWO, f"output={output}")
    assert done.returncode == 0, done.stderr
    return run_of(output)


@pytest.mark.slow
def test_a_job_killed_while_saving_and_then_damaged_ends_as_if_nothing_had_happened(undisturbed, tmp_path):
    killed = carried_out(*TWO, f"output={tmp_path}", DIES_AT="6")
    assert killed.returncode == 1
    assert "process 1 was killed by SIGKILL" in killed.stderr
    run = run_of(tmp_path)
    left = {".step-000006.ckpt.part", "best.ckpt", "manifest.json", "step-000002.ckpt", "step-000004.ckpt"}
    assert set(checkpoints(run)) == left
    assert (run / "checkpoints" / ".step-000006.ckpt.part" / "shard-00001.pt").exists()

    damaged = run / "checkpoints" / "step-000004.ckpt"
    flip(damaged / "shard-00001.pt")
    flip(run / "checkpoints" / "best.ckpt" / "rest.pt")
    done = carried_out(*TWO, f"output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert f"passed over: {damaged / 'shard-00001.pt'} differs from what was written" in done.stderr
    assert f"continuing from {run / 'checkpoints' / 'step-000002.ckpt'}" in done.stdout
    assert weights(run) == weights(undisturbed)
    assert losses(run) == losses(undisturbed)
    assert not [name for name in checkpoints(run) if name.endswith(".part")]


def test_a_run_with_folders_is_exported_as_one_with_files(undisturbed, tmp_path, monkeypatch, capsys):
    for source in (undisturbed, undisturbed / "checkpoints" / f"step-{STEPS:06d}.ckpt"):
        monkeypatch.setattr(sys, "argv", ["export", str(source), "-o", str(tmp_path / source.name)])
        assert export() == 0, capsys.readouterr().err
        assert (tmp_path / source.name / "model.safetensors").read_bytes() == weights(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_other_processes_continue_with_the_same_losses(way, undisturbed, tmp_path):
    run = at_step(undisturbed, 4, tmp_path / "run")
    done = carried_out(*WAYS[way], f"resume={run}", f"output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert f"continuing from {run}/checkpoints/" in done.stdout
    assert losses(run) == pytest.approx(losses(undisturbed), abs=1e-6)
    assert way != "two" or weights(run) == weights(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["one", "two into one file", "two times two"])
def test_two_processes_continue_what_others_began(first, undisturbed, tmp_path):
    done = carried_out(*WAYS[first], f"output={tmp_path / first}")
    assert done.returncode == 0, done.stderr
    run = at_step(run_of(tmp_path / first), 4, tmp_path / "run")
    done = carried_out(*TWO, f"resume={run}", f"output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert losses(run) == pytest.approx(losses(undisturbed), abs=1e-6)


class Bomb:
    """A pickle that touches a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("name", ["rest.pt", "shard-00000.pt", "index.json"])
def test_a_pickle_bomb_in_a_folder_does_not_go_off(name, undisturbed, say, tmp_path):
    folder, target = tmp_path / "theirs.ckpt", tmp_path / "touched"
    shutil.copytree(undisturbed / "checkpoints" / f"step-{STEPS:06d}.ckpt", folder)
    torch.save({"state_dict": {}, "global_step": 3, "bomb": Bomb(target)}, folder / name)
    torch.load(folder / name, weights_only=False)
    assert target.exists(), "the bomb is none"
    target.unlink()
    status, err = say(*JOB, f"ckpt_path={folder}", "resume=never", "stages=[test]")
    assert not target.exists()
    assert status == 1
    assert str(folder / name) in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("trainer=ddp_fsdp", "trainer.devices=3"), "trainer.replicas=2 does not divide the 3 processes"),
        (("trainer=ddp_fsdp", "trainer.replicas=3"), "trainer.replicas=3 does not divide the 4 processes"),
        (("trainer=ddp_fsdp", "trainer.replicas=-2"), "trainer.replicas=-2 does not divide the 4 processes"),
        (("trainer=ddp_fsdp", "trainer.replicas=two"), "trainer.replicas=two: expected a number"),
        (("trainer.sharded_checkpoints=true",), "trainer.sharded_checkpoints=true with trainer.strategy=auto"),
        ((*FOLDERS, "trainer=fsdp", "trainer.devices=2", "callbacks.save_async=true"), "all processes write a folder"),
        (("trainer.sharded_checkpoints=1",), "trainer.sharded_checkpoints=1: expected true or false"),
    ],
)
def test_words_that_do_not_fit_are_refused(words, reason, say, outputs):
    status, err = say("model=sft", *words, "trainer.accelerator=cpu")
    assert status == 1
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert reason in err
    assert not outputs.exists()
