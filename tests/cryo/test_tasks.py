"""Tasks, baselines and the protocol they are tried by; figures of what comes out."""

import pytest
import torch

from lightning_modules.cryo import baselines
from lightning_modules.cryo.fourier import auc, fsc, inverse, on_shells, power_spectrum, transform
from lightning_modules.cryo.map_figures import beside, fsc_curves, half_map_report
from lightning_modules.cryo.operators import missing_wedge
from lightning_modules.cryo.posterior import PiGDM
from lightning_modules.cryo.restoration import seeded
from lightning_modules.cryo.tasks import Anisotropic, Denoise, NoisyWedge, Task, Trials, Wedge
from lightning_modules.processes.ode import Euler
from lightning_modules.processes.paths import Linear
from lightning_modules.processes.prediction import Prediction

SIDE = 16


def blob(seed: int = 0, side: int = SIDE) -> torch.Tensor:
    """Rods through a sphere: compact, positive, and not isotropic."""
    rng = torch.Generator().manual_seed(seed)
    line = torch.arange(side, dtype=torch.float32) - side // 2
    centre = torch.randn(3, generator=rng)
    z, y, x = torch.meshgrid(*(line - c for c in centre), indexing="ij")
    rods = [torch.exp(-(a**2 + b**2) / 2 - c**2 / 18) for a, b, c in ((z, y, x), (x, y - 3, z), (x + 3, z, y))]
    return sum(rods) / 2


def gaussian_prior(power: torch.Tensor) -> Prediction:
    """The exact velocity of N(0, diag power)."""
    variance = power / SIDE**3

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.reshape(-1, 1, 1, 1)
        return inverse(transform(x) * ((t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)).to(x.dtype), SIDE)

    return Prediction(Linear(), velocity, "velocity")


def trials(**tasks: Task) -> Trials:
    return Trials(tasks, PiGDM(), Euler(), steps=8)


TASKS = {"denoise": Denoise(), "anisotropic": Anisotropic(), "wedge": Wedge(), "noisy_wedge": NoisyWedge()}


@pytest.mark.parametrize("name", TASKS)
def test_a_trial_reports_observation_and_baselines_beside_the_restoration(name):
    truths = torch.stack([blob(seed) for seed in range(3)])
    power = on_shells(power_spectrum(truths.double()).mean(0), SIDE)
    units = (float(truths.mean()), float(truths.std()))
    found = trials(**TASKS)(name, gaussian_prior(power / units[1] ** 2), units, truths, [0, 1, 2], seed=0)
    others = {"positivity"} if name == "wedge" else {"wiener", "soft_mask"}
    assert set(found.scores) == {"observed", "restored"} | others
    assert all(score.shape == (3,) and score.isfinite().all() for score in found.scores.values())
    if name in ("denoise", "anisotropic"):
        torch.testing.assert_close(found.scores["wiener"], found.scores["observed"], atol=2e-3, rtol=0)
    if name == "wedge":
        mask = missing_wedge(SIDE, 60.0).mask
        kept = [transform(found.maps[kind])[:, mask] for kind in ("truth", "restored")]
        assert (kept[0] - kept[1]).abs().max() < 1e-3 * kept[0].abs().max()


def test_what_happens_to_a_map_does_not_depend_on_the_others():
    truths = torch.stack([blob(seed) for seed in range(3)])
    prior = gaussian_prior(torch.full((SIDE, SIDE, SIDE // 2 + 1), float(SIDE**3)))
    run = trials(denoise=Denoise())
    together = run("denoise", prior, (0.0, 0.1), truths, [4, 5, 6], seed=3)
    alone = run("denoise", prior, (0.0, 0.1), truths[1:2], [5], seed=3)
    torch.testing.assert_close(together.maps["restored"][1:2], alone.maps["restored"], atol=1e-4, rtol=1e-3)
    other = run("denoise", prior, (0.0, 0.1), truths[1:2], [5], seed=4)
    assert not torch.allclose(other.maps["observed"], alone.maps["observed"])


def test_a_soft_mask_raises_the_correlation_of_a_compact_map():
    truth = blob(side=24)
    halves = Denoise().measure(truth, seeded(0))[None]
    found = Denoise().baselines(halves, Denoise().operator(halves))
    observed, masked = (auc(fsc(maps, truth[None])) for maps in (halves.mean(1), found["soft_mask"]))
    assert masked > observed + 0.05


def test_positivity_fills_a_part_of_the_wedge_and_keeps_what_was_measured():
    truth, wedge = blob(), missing_wedge(SIDE, 50.0)
    observed = wedge(truth)
    filled = baselines.positive(observed, wedge)
    assert auc(fsc(filled, truth)) > auc(fsc(observed, truth)) + 0.02
    torch.testing.assert_close(wedge(filled), observed, atol=1e-5, rtol=1e-4)


def test_trials_refuse_numbers_without_meaning():
    with pytest.raises(ValueError, match=r"model\.trials\.steps=0"):
        Trials({}, PiGDM(), Euler(), steps=0)


def test_figures_show_every_map_and_every_curve():
    truth = blob()
    maps = {"truth": truth, "observed": truth + 0.1 * torch.randn(truth.shape), "restored": truth}
    figure = beside(maps, "a map")
    assert len(figure.axes) == 12
    curves = {name: fsc(volume, truth)[None] for name, volume in maps.items()}
    assert len(fsc_curves(curves, SIDE, 3.0, "curves").axes[0].get_legend().get_texts()) == 3
    report = half_map_report(curves["observed"][0], curves["observed"][0], SIDE, 1.0, 3.0)
    assert "finer than the prior" in " ".join(text.get_text() for text in report.axes[0].get_legend().get_texts())
