"""train.py under a sweep and under Hydra's own -m: a trial is one run, and its processes train with the same values."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.faults.conftest import TINY, command, without_data
from tests.waiting import alive, until
from tools.sweep_format import TRAIN

pytest_plugins = ["tests.tools.places"]
WITNESS = ("model=sft", "model._target_=tests.tools.toys.Witness")
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


@pytest.fixture
def trains(place, monkeypatch):
    """`trains(...)` writes the sweep of the smallest job."""
    for name, value in without_data().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TESSERA_DATA", raising=False)

    def write(*words: str, **content):
        words = (*TINY, f"output={place.path / 'outputs'}", *words)
        given = ["${env}", "${interpreter}", "${program}", *words, "${args_no_hyphens}"]
        metric = {"name": "val-standin/greedy", "goal": "maximize"}
        return place.write(program=str(TRAIN), command=given, metric=metric, **content)

    return write


def runs(place) -> list[Path]:
    """The folders of the trials' runs, as the study knows them."""
    return [Path(trial.user_attrs["run"]) for trial in place.trials]


def processes(run: Path) -> list[dict]:
    """What the processes of a run said about themselves."""
    return [json.loads(path.read_text()) for path in sorted(run.glob("process-*.json"))]


@pytest.mark.slow
def test_a_sweep_over_train_py_finds_each_trials_main_run_and_its_metric(place, trains):
    trains("model=dqo", method="grid", parameters={"model.value_lr": {"values": [1e-3, 1e-4]}})
    status, out, err = place.sweep()
    assert status == 0, out + err
    assert place.states() == ["COMPLETE"] * 2
    assert [run.parents[1].name for run in runs(place)] == ["dqo", "dqo"]  # not the SFT run that they start from
    rates = [yaml.safe_load((run / "config.yaml").read_text())["model"]["value_lr"] for run in runs(place)]
    assert rates == [1e-3, 1e-4]
    assert len(list(place.path.glob("outputs/sft/*/*/results.json"))) == 1
    assert all("val-standin/greedy" in (run / "metrics.csv").read_text() for run in runs(place))
    assert "record" not in json.loads((runs(place)[0] / "results.json").read_text())["command"]


@pytest.mark.slow
def test_the_processes_of_a_trial_have_the_same_hyperparameters(place, trains):
    """Random values would differ between processes if each of them drew its own."""
    axes = {"optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2}}
    trains(*WITNESS, *TWO, "stages=[fit]", parameters=axes)
    status, out, err = place.sweep("--trials", "2")
    assert status == 0, out + err
    for trial, run in zip(place.trials, runs(place)):
        first, second = processes(run)
        assert first["pid"] != second["pid"]
        assert first["words"] == second["words"]
        assert first["lr"] == second["lr"] == trial.params["optimizer.lr"]
    assert len({trial.params["optimizer.lr"] for trial in place.trials}) == 2


@pytest.mark.slow
def test_hydras_own_grid_gives_one_run_a_job_and_the_same_values_to_its_processes(tmp_path):
    words = command(*WITNESS, *TWO, f"output={tmp_path}", "stages=[fit]", "optimizer.lr=1e-3,1e-4")
    words.insert(2, "-m")
    done = subprocess.run(words, capture_output=True, text=True, env=without_data(), cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [processes(path.parent) for path in tmp_path.glob("sft/*/*/run.json")]
    assert sorted(first["lr"] for first, _ in found) == [1e-4, 1e-3]
    assert all(first["words"] == second["words"] and first["lr"] == second["lr"] for first, second in found)


@pytest.mark.slow
def test_an_interrupted_trial_goes_on_from_its_checkpoint(place, trains):
    long = ("trainer.max_steps=400", "trainer.val_check_interval=400", "callbacks.checkpoint_every=5")
    trains("model=sft", *long, method="grid", parameters={"seed": {"values": [1]}})
    process = place.start()
    until(lambda: any(place.path.glob("outputs/sft/*/*/checkpoints/step-*.ckpt")))
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 143, out
    assert not any(alive(pid) for pid in place.agents())
    assert place.sweep()[0] == 0
    assert place.states() == ["COMPLETE"]
    assert "continuing from" in (place.path / "study" / "trials" / "0.log").read_text()
    assert len(list(place.path.glob("outputs/sft/*/*/run.json"))) == 1


def test_a_program_that_is_called_by_hand_may_be_asked_for_its_folder_by_a_word(tmp_path):
    words = [sys.executable, str(TRAIN), *TINY, "model=sft", f"output={tmp_path}", f"record={tmp_path / 'folder'}"]
    subprocess.run(words, check=True, env=without_data(), capture_output=True)
    assert (Path((tmp_path / "folder").read_text()) / "results.json").exists()
