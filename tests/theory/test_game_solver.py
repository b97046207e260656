"""Simulations on the platform: what a run leaves, and that an interrupted one ends with the same bytes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from lightning_modules.theory.simulation import slope
from tests.waiting import until

JOB = (
    "model=markov_game",
    "data=rps2",
    "data.rounds=3000",
    "callbacks.checkpoint_every=10",
    "trainer.val_check_interval=0",
)


@pytest.fixture
def say(told, tmp_path):
    """`say("data=rps", ...)` in this process: the exit status and what stood on stderr."""
    return lambda *words: told(f"output={tmp_path}", *words)


def run_folder(output: Path) -> Path:
    return next(output.glob("*/*/*/run.json")).parent


def test_a_run_leaves_curves_a_figure_and_the_table(say, tmp_path):
    assert say("model=markov_game", "data=random_games", "data.rounds=200", "data.game.games=3")[0] == 0
    folder = run_folder(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    assert set(results["table"]) == {
        "average@100",
        "average@200",
        "last@100",
        "last@200",
        "average_slope",
        "last_slope",
    }
    assert results["headline"]["value"] == results["metrics"]["test/average"] < 0.1
    assert (folder / "figures" / "curves.png").stat().st_size
    rows = list(csv.DictReader((folder / "export" / "curves.csv").open()))
    assert [int(row["round"]) for row in rows] == list(range(10, 201, 10))


def test_runs_that_are_compared_are_drawn_over_one_another(say, tmp_path):
    words = ("data=rps2", "data.rounds=30", "+compare={MPO: ['model=markov_game','algorithm=mpo']}")
    assert say("model=markov_game", *words, "label=OMPO")[0] == 0
    assert len(list(tmp_path.glob("*/*/*/figures/compared.png"))) == 1


def test_what_does_not_fit_is_refused(say):
    for words, reason in (
        (("optimizer=mars",), "makes its updates itself"),
        (("data=bandit",), "has no game"),
        (("data.rounds=0",), "data.rounds=0 must be positive"),
        (("trainer.accumulate_grad_batches=2",), "take trainer.devices=1 and"),
        (("trainer.devices=2",), "take trainer.devices=1 and"),
    ):
        status, said = say("model=markov_game", *words)
        assert status == 1
        assert reason in said
    assert "optimizer=none" in say("model=sft", "data=gsm8k", "optimizer=none")[1]


def test_a_slope_is_fitted_until_rounding_takes_over():
    rounds = list(range(10, 2001, 10))
    values = 3.0 / np.array(rounds, dtype=float)
    assert slope(rounds, values) == pytest.approx(-1)
    values[150:] = 1e-16
    assert slope(rounds, values) == pytest.approx(-1)
    assert np.isnan(slope(rounds[:9], values[:9]))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(output: Path) -> list[str]:
        return [sys.executable, train.__file__, *JOB, f"output={output}"]

    subprocess.run(command(tmp_path / "whole"), env=environment, check=True, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "killed"), env=environment, stdout=subprocess.DEVNULL)
    until(lambda: list((tmp_path / "killed").glob("*/*/*/checkpoints/step-000[12]*.ckpt")))
    process.kill()
    assert process.wait() == -9
    again = subprocess.run(command(tmp_path / "killed"), env=environment, check=True, capture_output=True, text=True)
    assert "continuing from" in again.stdout
    whole, killed = (run_folder(tmp_path / name) for name in ("whole", "killed"))
    for name in ("export/curves.csv", "metrics.csv"):
        assert without_throughput(whole / name) == without_throughput(killed / name)
    tables = [json.loads((folder / "results.json").read_text())["table"] for folder in (whole, killed)]
    assert tables[0] == tables[1]


def without_throughput(path: Path) -> list[dict[str, str]]:
    rows = csv.DictReader(path.open())
    return [{name: value for name, value in row.items() if not name.startswith("throughput")} for row in rows]
