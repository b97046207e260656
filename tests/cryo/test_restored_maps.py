"""What minutes of training restore (cryofm.md, sections 6 and 7): the results that the project promises. Slow."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from datamodules.simulated_maps import bundle_maps
from lightning_modules.cryo import prior as priors
from lightning_modules.cryo.posterior import Normalised, PiGDM, draw
from lightning_modules.cryo.restoration import seeded
from lightning_modules.cryo.tasks import Denoise, Trials
from lightning_modules.processes.ode import DPMpp2M, Euler, Sampler

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """450 steps of the small U-Net on simulated maps, and its test."""
    output = tmp_path_factory.mktemp("out")
    words = ("model=cryofm", "data=emdb_sim", "seed=0", f"output={output}")
    subprocess.run([sys.executable, train.__file__, *words], check=True)
    (results,) = output.glob("cryofm/*/*/results.json")
    return results.parent


@pytest.fixture
def prior(run) -> priors.DensityPrior:
    return priors.load(run / "export")


def scores(run: Path, task: str) -> dict[str, torch.Tensor]:
    """FSC-AUC by kind, of every map."""
    found: dict[str, list[float]] = {}
    with (run / "trials.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["task"] == task:
                found.setdefault(row["kind"], []).append(float(row["fsc_auc"]))
    return {kind: torch.tensor(values) for kind, values in found.items()}


def trial(prior: priors.DensityPrior, sampler: Sampler, steps: int, guidance=None) -> torch.Tensor:
    """FSC-AUC of 8 maps that were restored from noise."""
    maps = bundle_maps("test", 8, prior.box, prior.voxel_size, 8.0, 0)
    truths = torch.stack([torch.from_numpy(volume.density) for volume in maps])
    trials = Trials({"denoise": Denoise()}, guidance or Normalised(), sampler, steps)
    return trials("denoise", prior.prediction, (prior.mean, prior.std), truths, list(range(8)), 0).scores["restored"]


def test_restored_maps_are_better_than_observed_and_masked_ones(run):
    found = scores(run, "denoise")
    assert len(found["restored"]) == 16
    assert found["restored"].mean() > found["observed"].mean() + 0.10
    assert found["restored"].mean() > found["soft_mask"].mean()
    assert (found["restored"] > found["observed"]).sum() >= 12
    torch.testing.assert_close(found["wiener"], found["observed"], atol=1e-4, rtol=0)


def test_every_task_leaves_its_figures(run):
    for task in ("denoise", "anisotropic", "wedge"):
        for name in (f"restored_{task}.png", f"fsc_{task}.png"):
            assert (run / "figures" / name).stat().st_size > 10_000, name


def test_a_missing_wedge_is_filled(run):
    found = scores(run, "wedge")
    assert found["restored"].mean() > found["observed"].mean() + 0.03
    assert (found["restored"] > found["observed"]).sum() >= 14
    assert "positivity" in found


def test_guidance_does_not_depend_on_the_number_of_steps(prior):
    assert abs(trial(prior, Euler(), 100).mean() - trial(prior, Euler(), 50).mean()) < 0.02


def test_a_map_is_restored_the_same_alone_and_in_company_by_a_network(prior):
    halves = torch.stack([seeded_noise(place, prior.box) for place in range(4)])
    operator = Denoise().operator(halves[:, None].expand(-1, 2, -1, -1, -1) + 0.1 * halves.flip(0)[:, None])
    noise, times = halves.flip(1), torch.linspace(1, 0, 11, dtype=torch.float64)
    operator = operator.to("cpu", torch.float32)
    for guidance in (Normalised(), PiGDM()):
        together = draw(prior.prediction, guidance, operator, halves, noise, DPMpp2M(), times)
        single = type(operator)(operator.gain, operator.noise_power[1:2])
        alone = draw(prior.prediction, guidance, single, halves[1:2], noise[1:2], DPMpp2M(), times)
        assert (together[1] - alone[0]).abs().max() < 1e-4


def seeded_noise(place: int, side: int) -> torch.Tensor:
    return torch.randn(side, side, side, generator=seeded("map", place))
