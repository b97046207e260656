"""The laboratory and the learned score as runs of the platform."""

import csv
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules.processes.ode import Sampler, moved
from lightning_modules.processes.paths import Path as ProbabilityPath
from lightning_modules.theory.sampler_studies import Orders
from tests.waiting import until

SMALL = ("model.points=101", "model.study.beside=null", "model.study.steps=[12,24]")


class HalfEuler(Sampler):
    """Two Euler steps for one: a sampler that the project does not know."""

    order, evaluations = 1, 2

    def step(self, prediction, x, t, u, memory):
        middle = (t + u) / 2
        x = moved(x, middle - t, prediction.drift(x, t))
        return moved(x, u - middle, prediction.drift(x, middle)), None


class Cosine(ProbabilityPath):
    """alpha = cos(pi t / 2): a path that the project does not know."""

    def alpha(self, t):
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(math.pi / 2 * t)


def finished(output: Path, model: str) -> tuple[Path, dict]:
    folder = next(output.glob(f"{model}/*/*/results.json")).parent
    return folder, json.loads((folder / "results.json").read_text())


OWN = (
    "sampler=own",
    f"model.sampler._target_={__name__}.HalfEuler",
    f"model.path._target_={__name__}.Cosine",
    "model.start=0.95",
    "model.stop=0.05",
)


def test_a_sampler_and_a_path_of_ones_own_are_certified(say, tmp_path):
    status, said = say("model=ode_samplers", *SMALL, "model.study.steps=[64,128]", *OWN)
    assert status == 0, said
    folder, results = finished(tmp_path, "ode_samplers")
    assert results["metrics"]["test/certified"] == 1
    assert results["metrics"]["test/slope/log_snr/HalfEuler"] == pytest.approx(1, abs=0.15)
    rows = list(csv.DictReader((folder / "export" / "table.csv").open()))
    assert [row["line"] for row in rows] == ["HalfEuler"] * 4
    assert {path.name for path in (folder / "figures").iterdir()} >= {"orders.png", "orders_kl.png"}


def test_the_same_sampler_and_path_serve_the_learned_score(say, tmp_path):
    small = ("model.points=21", "model.beside=null", "model.steps=[6]", "model.width=16", "trainer.max_steps=20")
    assert say("model=learned_score", *small, *OWN) == (0, "")
    folder, results = finished(tmp_path, "learned_score")
    assert {"test/bound", "test/initial", "test/discretisation", "test/floor"} <= set(results["metrics"])
    assert (folder / "figures" / "total_variation.png").stat().st_size
    rows = list(csv.DictReader((folder / "export" / "table.csv").open()))
    assert [(row["sampler"], row["score"]) for row in rows] == [("HalfEuler", "exact"), ("HalfEuler", "learned")]
    (curve,) = csv.DictReader((folder / "export" / "curves.csv").open())
    assert curve["evaluations of the score"] == "12"
    assert float(curve["tv"]) == pytest.approx(results["metrics"]["test/tv@6"], rel=1e-5)


def test_the_sampler_and_the_path_of_the_page_run_as_they_are_written(say, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text()
    (tmp_path / "my_samplers.py").write_text(re.search(r"```python\n(.*?)```", page, re.S).group(1))
    monkeypatch.syspath_prepend(tmp_path)
    words = shlex.split(re.search(r"^python train\.py (model=ode_samplers sampler=own .*)$", page, re.M).group(1))
    status, said = say(*words, *SMALL, "model.study.steps=[16,32]")
    assert status == 0, said
    _, results = finished(tmp_path, "ode_samplers")
    assert results["metrics"]["test/slope/exponential_decay/Ralston"] == pytest.approx(2, abs=0.15)
    assert results["metrics"]["test/certified"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model.start=0.001",), "expected 0 <= stop < start"),
        (("path=linear",), "model.start=8.0, model.stop=0.01: expected 0 <= stop < start <= 1"),
        (("model.study.steps=[0,8]",), "steps=0: a grid has at least one step"),
        (("model.study.steps=[64]",), "needs at least two numbers of steps"),
        (("model.prediction=eps",), "model.prediction=eps: there are noise, data, velocity, score"),
        (("model.stop=0.0",), "infinite at the ends of the path"),
        (("data.covariances=[0,0.1]", "model.stop=0.0", "study=orders_to_zero"), "model.stop=0 with a point mass"),
        (("data=rps2",), "data=rps2 has no density"),
        (("data=four_modes", "study=dimension"), "takes a density on the line"),
        (("sampler=own",), "model.sampler._target_ needs a value"),
        (("sampler=own", "model.sampler._target_=torch.nn.Identity"), "does not step in a space of real numbers"),
        (("trainer.devices=2",), "take trainer.devices=1"),
    ],
)
def test_what_cannot_be_measured_is_refused(say, words, said):
    status, stderr = say("model=ode_samplers", *words)
    assert status == 1
    assert said in stderr


def test_the_experiment_of_score_errors_resolves_its_frequencies(say, tmp_path):
    words = ("experiment=score_and_divergence", "model.study.steps=40", "model.study.times=3")
    status, said = say(*words)
    assert status == 0, said
    found = finished(tmp_path, "ode_samplers")[1]["metrics"]
    assert found["test/tv@A=0.02,omega=16"] > 2 * found["test/tv@A=0.02,omega=4"]


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_with_the_same_table(tmp_path):
    words = ("model=ode_samplers", *SMALL, "sampler=heun", "callbacks.checkpoint_every=1")
    job = [sys.executable, "train.py", *words]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*job, f"output={whole}"], check=True, capture_output=True)
    first = subprocess.Popen([*job, f"output={broken}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: list(broken.glob("*/*/*/checkpoints/step-*.ckpt")))
    os.kill(first.pid, 9)
    first.wait()
    subprocess.run([*job, f"output={broken}"], check=True, capture_output=True)
    tables = [next(where.glob("*/*/*/export/table.csv")).read_bytes() for where in (whole, broken)]
    assert tables[0] == tables[1]
    assert len(list(broken.glob("*/*/*/run.json"))) == 1


@pytest.mark.slow
def test_a_learned_score_stays_below_its_bound_and_has_a_floor(say, tmp_path):
    assert say("model=learned_score")[0] == 0
    found = {
        name.removeprefix("test/"): value for name, value in finished(tmp_path, "learned_score")[1]["metrics"].items()
    }
    assert found["floor"] <= found["initial"] + found["discretisation"] + found["bound"]
    assert found["tv@10"] > 2 * found["discretisation"]
    assert found["floor"] > 5 * found["discretisation"]  # the score's error, which more steps do not lower


def test_studies_are_axes_of_their_own():
    assert Orders(None, {}, [8, 16]).beside == {}
