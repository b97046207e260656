"""Simulations on the platform: what a run leaves, and that an interrupted one ends with the same bytes."""

import csv
import json

import numpy as np
import pytest

from lightning_modules.theory.simulation import slope
from tests.theory.runs import check_that_a_killed_run_ends_with_the_same_bytes, run_folder

JOB = (
    "model=markov_game",
    "data=rps2",
    "data.rounds=3000",
    "callbacks.checkpoint_every=10",
    "trainer.val_check_interval=0",
)


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
    check_that_a_killed_run_ends_with_the_same_bytes(tmp_path, JOB, "step-000[12]*.ckpt")
