"""The laboratory of discrete diffusion and its learned model: as objects, and as a user runs them."""

import csv
import json
import sys

import pytest
import torch

from datamodules import simulated_categories as targets
from datamodules.simulated_categories import SimulatedCategories
from lightning_modules.processes.ctmc_jumps import Frozen, FrozenMid
from lightning_modules.processes.ctmc_kernels import Absorbing, Uniform
from lightning_modules.processes.ctmc_leaps import Leap, Tweedie
from lightning_modules.processes.ctmc_orders import Ordered
from lightning_modules.processes.ctmc_schedules import Constant, LogLinear
from lightning_modules.processes.exact_law import early_stopping
from lightning_modules.processes.ode import Heun
from lightning_modules.theory.discrete_diffusion import DiscreteDiffusion
from tests.theory.runs import run_folder

QUICK = ("data.dimension=3", "trainer.enable_progress_bar=false", "model.kappa=0.5")


class Lazy(Leap):
    """A sampler of this file: Tweedie's rule, mixed with staying where one is."""

    def transition(self, denoiser, x, t, u):
        stay = torch.nn.functional.one_hot(x, denoiser.process.kernel.size).double()
        return 0.9 * Tweedie().transition(denoiser, x, t, u) + 0.1 * stay


def laboratory(sampler=None, data=None, kernel=Uniform, noise=None, **settings) -> DiscreteDiffusion:
    settings = {
        **{"grid": "uniform", "steps": 16, "kappa": 0.2, "start": 8.0, "delta": 0.0, "tilt": 0.0, "jitter": 0.0},
        **{"against": "steps", "values": [8, 16, 32], "fit": None, "samples": 4000, "denoise": False, "seed": 1},
        **settings,
    }
    made = DiscreteDiffusion(kernel=kernel, noise=noise or Constant(), sampler=sampler or Frozen(), **settings)
    made.meet(data or ring())
    return made


def ring(dimension: int = 3, copies: int = 2, target=targets.ising_ring) -> SimulatedCategories:
    def disordered(d, letters, draw):
        return target(d, letters, draw, disorder=0.2) if target is targets.ising_ring else target(d, letters, draw)

    return SimulatedCategories("x", disordered, dimension, 2, copies, 0, 8, None, 1)


def test_every_point_of_an_axis_keeps_the_bounds():
    for against, values in (
        ("steps", [8, 16]),
        ("dimension", [2, 3]),
        ("tilt", [0.1, 0.4]),
        ("jitter", [0.2]),
        ("start", [1.0, 3.0]),
    ):
        run = laboratory(against=against, values=values)
        for number in range(len(values)):
            found = run.play([number])
            assert (found["kl"] <= found["bound"] + 1e-9).all()
            assert (found["tv"] <= (found["kl"] / 2).sqrt() + 1e-9).all()
            assert len(found["kl"]) == 2


def test_independent_score_noise_costs_hardly_anything_and_a_persistent_one_does():
    settings = {"against": "tilt", "values": [0.2], "start": 6.0, "delta": 0.01, "steps": 50, "data": ring(3, 1)}
    base = laboratory(**{**settings, "values": [0.0]}).play([0])["kl"].mean()
    tilted = laboratory(**settings).play([0])
    noisy = laboratory(**{**settings, "against": "jitter"}).play([0])
    assert tilted["kl"].mean() > 8 * base
    assert noisy["kl"].mean() < 3 * base
    assert noisy["path"].mean() > 0.5 * tilted["path"].mean()


def test_early_stopping_leaves_as_much_as_its_bound():
    data = ring(3, 1, targets.parity)
    run = laboratory(FrozenMid(), data, against="delta", values=[0.1, 0.01], delta=0.1, grid="kappa", kappa=0.4)
    for number, delta in enumerate((0.1, 0.01)):
        assert float(run.play([number])["tv_data"]) <= early_stopping(3, 2, delta) + 5e-3


def test_samplers_without_a_law_are_sampled_beside_the_floor_of_noise():
    run = laboratory(Ordered(), kernel=Absorbing, noise=LogLinear(0.0), start=1.0, values=[3])
    found = run.play([0])
    assert set(found) == {"tv", "tv_data", "floor", "evaluations"}
    assert (found["tv"] < 2.5 * found["floor"]).all()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: laboratory(Heun()), "Heun moves points, and the states here are letters: take sampler=frozen"),
        (lambda: laboratory(against="width"), "model.against=width: there are steps"),
        (lambda: laboratory(values=[]), "model.values is empty"),
        (lambda: laboratory(values=[8, 0]), "steps=0"),
        (lambda: laboratory(start=-1.0), "start=-1.0"),
        (lambda: laboratory(grid="log"), "model.grid=log"),
        (lambda: laboratory(grid="kappa", against="kappa", values=[0.1, 2.0], delta=0.1), "kappa=2.0"),
        (lambda: laboratory(against="dimension", values=[3, 30]), "1,073,741,824 states"),
        (lambda: laboratory(data=ring(3, 1, targets.parity)), "4 of 8 states have probability zero"),
        (lambda: laboratory(Ordered()), "absorbing kernel"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_measured(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_a_run_leaves_curves_a_figure_and_slopes(say, tmp_path):
    assert say("model=ctmc", *QUICK, "model.values=[16,32,64]", "data.copies=2")[0] == 0
    folder = run_folder(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"]["test/kl_slope"] == pytest.approx(-2, abs=0.4)
    assert {"kl@16", "kl@32", "kl@64", "path@64", "tv_data@64", "path_slope"} <= set(results["table"])
    rows = list(csv.DictReader((folder / "export" / "curves.csv").open()))
    assert [float(row["steps"]) for row in rows] == [16, 32, 64]
    assert (folder / "figures" / "curves.png").stat().st_size


def test_words_that_do_not_fit_are_refused_in_a_sentence(say):
    for words, reason in (
        (("model=ctmc", "sampler=heun"), "Heun moves points"),
        (("model=ctmc", "data=bandit"), "data=simulated_categories"),
        (("model=ctmc", "sampler=ancestral", "against=start", "kernel=absorbing"), "end of the schedule"),
        (("model=ctmc", "target=parity"), "probability zero: stop early"),
        (("model=learned_ctmc", "sampler=heun"), "Heun moves points"),
        (("model=learned_ctmc", "model.predicts=score"), "does not train model.predicts=score"),
    ):
        status, said = say(*words)
        assert status == 1
        assert reason in said


@pytest.mark.parametrize("model", ["ctmc", "learned_ctmc"])
def test_a_sampler_of_ones_own_file_runs_in_every_module(model, say, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_samplers", sys.modules[__name__])
    short = {"ctmc": ("model.values=[4,8]",), "learned_ctmc": ("trainer.max_steps=20", "trainer.val_check_interval=0")}
    words = (f"model={model}", *QUICK, *short[model], "model.sampler._target_=my_samplers.Lazy", "sampler=tweedie")
    status, said = say(*words)
    assert status == 0, said
    results = json.loads((run_folder(tmp_path) / "results.json").read_text())
    assert 0 < results["metrics"]["test/tv_data"] < 1
    assert (run_folder(tmp_path) / "figures").glob("*.png")


@pytest.mark.parametrize(
    "words",
    [
        ("kernel=absorbing", "sampler=ancestral", "model.grid=uniform", "model.delta=0.0", "model.loss=nelbo"),
        ("model.predicts=score", "model.loss=score_entropy"),
        ("kernel=absorbing", "sampler=order_sampled", "model.grid=uniform", "model.delta=0.0", "model.loss=rdm_linear"),
        ("model.loss=flow_matching", "sampler=dfm", "model.denoise=true"),
    ],
    ids=lambda words: words[0],
)
def test_every_loss_trains_and_is_sampled_from(words, say, tmp_path):
    status, said = say(
        "model=learned_ctmc",
        *QUICK,
        *words,
        "trainer.max_steps=60",
        "trainer.val_check_interval=0",
        "model.samples=2000",
        "model.low=0.01",
    )
    assert status == 0, said
    results = json.loads((run_folder(tmp_path) / "results.json").read_text())
    assert results["metrics"]["test/tv_data"] < 0.9


@pytest.mark.slow
def test_a_learned_posterior_gives_a_law_below_its_bound(say, tmp_path):
    status, said = say("model=learned_ctmc", "data.target.disorder=0.0", "trainer.enable_progress_bar=false")
    assert status == 0, said
    folder = run_folder(tmp_path)
    rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row.get("val/kl")]
    assert len(rows) == 12
    assert all(float(row["val/kl"]) <= float(row["val/bound"]) + 1e-9 for row in rows)
    assert float(rows[-1]["val/kl"]) < 5e-3
    assert float(rows[-1]["val/bits"]) >= float(rows[-1]["val/entropy"]) - 0.02
