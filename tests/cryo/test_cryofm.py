"""The prior through the platform: it learns, samples, goes on after a kill, and is one on any number of processes."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import lightning as L
import mrcfile
import pytest
import torch
from safetensors.torch import load_file

import train
from lightning_modules.cryo import prior
from lightning_modules.cryo.cryofm import CryoFM
from lightning_modules.cryo.unet import UNet
from lightning_modules.optimizers.schedules import warmup_constant
from lightning_modules.processes.ode import Heun, Sampler, moved
from tests.waiting import until

TINY = (
    *("model=cryofm", "data=emdb_sim", "data.box=8", "data.voxel_size=6.0", "data.simulation.resolution=16.0"),
    *("data.simulation.train=16", "data.simulation.val=3", "data.simulation.test=3", "data.batch_size=4"),
    *("data.shift=1", "model.trials=null"),
    *("trainer.max_steps=24", "trainer.val_check_interval=12", "trainer.log_every_n_steps=1", "scheduler.warmup=4"),
    *("callbacks.checkpoint_every=5", "model.samples={count: 3, steps: 4, batch: 2}"),
)
# with one channel in each of the 8 groups of a norm, the bias before it has no gradient but rounding, of which Adam
# makes whole steps
UNET_TOY = ("model.network.widths=[16,24]", "model.network.time_width=16")
HDIT_TOY = (
    "network@model.network=hdit_mini",
    "model.network.widths=[24,24]",
    "model.network.head=12",
    "model.network.patch=2",
)
TWO = ("trainer.accelerator=cpu", "trainer.devices=2")


def _sized(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words, with a small network where they name none."""
    return words if any(word.startswith("network@") for word in words) else (*UNET_TOY, *words)


def run_here(output: Path, *words: str) -> int:
    """The exit status of `train.py` in this process."""
    with patch.object(sys, "argv", ["train.py", *TINY, *_sized(words), f"output={output}"]):
        try:
            train.main()
        except SystemExit as leaving:
            return leaving.code
    return 0


def carried_out(output: Path, *words: str) -> Path:
    """The folder of a finished run, made in this process."""
    assert run_here(output, *words) == 0
    (results,) = output.glob("cryofm/*/*/results.json")
    return results.parent


def start(output: Path, *words: str) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, train.__file__, *TINY, *_sized(words), f"output={output}"], env=environment
    )


def killed(output: Path, step: int, *words: str) -> None:
    """A run that is killed once it has a checkpoint of that step."""
    process = start(output, *words)
    until(lambda: list(output.glob(f"cryofm/*/*/checkpoints/step-{step:06d}.ckpt")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(output.glob("cryofm/*/*/results.json")), "the run was over before it could be killed"


def column(run: Path, name: str = "train/loss") -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def weights(run: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_file(run / "export" / "model.safetensors").values()])


def samples(run: Path) -> torch.Tensor:
    return torch.stack([torch.from_numpy(mrcfile.read(path).copy()) for path in sorted(run.glob("samples/*.mrc"))])


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return carried_out(tmp_path_factory.mktemp("alone"))


def test_it_learns_and_leaves_results_figures_samples_and_a_prior(alone):
    results = json.loads((alone / "results.json").read_text())
    losses = column(alone, "val/loss")
    assert losses[-1] < losses[0] < 2.5
    assert results["headline"]["metric"] == "test/loss"
    assert set(results["table"]) >= {"loss", "shell", "t0.1_loss", "t0.9_loss", "sample_std", "log_power"}
    figures = {path.stem for path in (alone / "figures").glob("*.png")}
    assert figures >= {"learning_curves", "loss_by_time", "samples", "spectra"}
    assert samples(alone).shape == (3, 8, 8, 8)
    assert prior.load(alone / "export").box == 8


def test_the_exported_prior_is_the_mean_that_was_tested_and_a_run_can_start_from_it(alone, tmp_path):
    again = carried_out(tmp_path / "again", f"model.weights={alone / 'export'}", "stages=[test]", "sampler=heun")
    assert column(again, "test/loss") == column(alone, "test/loss")
    assert torch.equal(samples(again), samples(alone))
    other = carried_out(tmp_path / "other", f"model.weights={alone / 'export'}", "stages=[predict]", "sampler=ddim")
    assert samples(other).shape == (3, 8, 8, 8)
    assert not torch.equal(samples(other), samples(alone))


def test_a_run_that_broke_off_goes_on_to_the_same_weights_and_samples(alone, tmp_path):
    step = CryoFM.optimizer_step

    def breaks(self, *arguments, **keywords):
        if self.global_step == 13:
            raise OSError("the disk is full")
        step(self, *arguments, **keywords)

    with patch.object(CryoFM, "optimizer_step", breaks):
        assert run_here(tmp_path) != 0
    again = carried_out(tmp_path)
    assert column(again) == column(alone)
    assert torch.equal(weights(again), weights(alone))
    assert torch.equal(samples(again), samples(alone))


@pytest.mark.slow
def test_begun_on_two_sharded_processes_and_finished_on_one(alone, tmp_path):
    killed(tmp_path / "two", 10, "trainer=fsdp", *TWO)
    again = carried_out(tmp_path / "two")
    assert column(again) == pytest.approx(column(alone), abs=1e-5)
    assert column(again, "val/loss") == pytest.approx(column(alone, "val/loss"), abs=1e-5)
    torch.testing.assert_close(weights(again), weights(alone), atol=1e-5, rtol=0)


def method(**changes) -> CryoFM:
    settings = {"times": "uniform", "decay": 0.99, "samples": {"count": 1, "steps": 1, "batch": 1}, "sampler": Heun()}
    network = partial(UNet, [8, 16], time_width=16)
    return CryoFM(network, optimizer=torch.optim.SGD, scheduler=warmup_constant, seed=1, **settings | changes)


def data(**known) -> L.LightningDataModule:
    found = L.LightningDataModule()
    vars(found).update(known)
    return found


def test_sizes_and_laws_that_do_not_fit_are_refused(tmp_path):
    for changes, sentence in (
        ({"times": "cosine"}, "model.times=cosine: there are uniform, logit_normal"),
        ({"decay": 1.0}, "model.decay=1.0: the mean of the weights needs a decay in [0, 1)"),
        ({"samples": {"steps": 0}}, "model.samples.steps=0 must be positive"),
        ({"weights": str(tmp_path)}, "holds no prior (it has no config.json)"),
        ({"weights": str(tmp_path / "absent")}, "is no file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)):
            method(**changes)
    with pytest.raises(ValueError, match=r"data\.box=10: the network makes one of 4 voxels"):
        method().meet(data(box=10))


def test_a_sampler_of_categories_is_refused():
    class Categorical(Sampler):
        space = "categorical"

    for sampler in (Categorical(), torch.nn.Identity()):
        with pytest.raises(TypeError, match="does not step in a space of real numbers: take euler"):
            method(sampler=sampler)


class Ralston(Sampler):
    """Ralston's method of second order, which the project does not know."""

    order, evaluations = 2, 2

    def step(self, prediction, x, t, u, memory):
        slope = prediction.drift(x, t)
        ahead = prediction.drift(moved(x, 2 / 3 * (u - t), slope), t + 2 / 3 * (u - t))
        return moved(x, u - t, (slope + 3 * ahead) / 4), None


def test_a_sampler_of_ones_own_draws_densities(tmp_path):
    own = ("sampler=own", f"model.sampler._target_={__name__}.Ralston")
    drawn = samples(carried_out(tmp_path, *own, "trainer.max_steps=2", "trainer.val_check_interval=2"))
    assert drawn.isfinite().all()
    assert drawn.std() > 0


def test_cubes_of_other_data_are_brought_into_the_units_of_the_prior():
    prior_of = method()
    prior_of.meet(data(box=8, voxel_size=3.0, normalisation=SimpleNamespace(mean=0.04, std=0.09)))
    density = torch.rand(2, 8, 8, 8)
    other = {"voxels": (density - 0.1) / 0.2, "mean": torch.tensor(0.1), "std": torch.tensor(0.2)}
    torch.testing.assert_close(prior_of._standardised(other), (density - 0.04) / 0.09, rtol=1e-5, atol=1e-5)
    own = {"voxels": density, "mean": torch.tensor(0.04), "std": torch.tensor(0.09)}
    assert torch.equal(prior_of._standardised(own), density)


@pytest.mark.slow
def test_killed_and_started_again_it_is_equal_to_the_byte(alone, tmp_path):
    killed(tmp_path / "cut", 10)
    again = carried_out(tmp_path / "cut")
    assert column(again) == column(alone)
    assert torch.equal(weights(again), weights(alone))
    assert torch.equal(samples(again), samples(alone))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("trainer=ddp",), ("trainer=fsdp",), ("trainer=ddp", "optimizer=mars"), ("trainer=fsdp", *HDIT_TOY)]
)
def test_two_processes_are_one(words, tmp_path):
    one = carried_out(tmp_path / "one", *words[1:])
    assert start(tmp_path / "two", *words, *TWO).wait(600) == 0
    (two,) = (path.parent for path in (tmp_path / "two").glob("cryofm/*/*/results.json"))
    for name in ("train/loss", "val/loss", "test/loss"):
        assert column(two, name) == pytest.approx(column(one, name), abs=1e-5)
    torch.testing.assert_close(samples(two), samples(one), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_450_steps_beat_the_shell_wiener_prediction_at_every_time(told, tmp_path):
    status, err = told("model=cryofm", "data=emdb_sim", f"output={tmp_path}")
    assert status == 0, err
    (results,) = tmp_path.glob("cryofm/*/*/results.json")
    metrics = json.loads(results.read_text())["metrics"]
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert metrics[f"test/t{t}_loss"] < metrics[f"test/t{t}_shell"]
    assert metrics["test/log_power"] < 0.6
