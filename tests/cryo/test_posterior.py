"""Posterior sampling against priors whose posterior is known (cryofm.md, checks 3, 5 and 10)."""

import pytest
import torch

from lightning_modules.cryo.fourier import inverse, on_shells, power_spectrum, shaped_noise, transform
from lightning_modules.cryo.operators import Projections, missing_wedge, spectral_noise
from lightning_modules.cryo.posterior import Normalised, PiGDM, Replacement, conditioned, draw
from lightning_modules.processes.ode import DDIM, Euler, Heun, sample
from lightning_modules.processes.paths import Linear
from lightning_modules.processes.prediction import Prediction

SIDE = 12


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def gaussian_prior(power: torch.Tensor) -> Prediction:
    """The exact velocity of N(0, diag power) in Fourier space, power = E|F x|^2 on the half spectrum."""
    side = power.shape[0]
    variance = power / side**3

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.reshape(-1, 1, 1, 1).double()
        gain = (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)
        return inverse(transform(x) * gain.to(x.dtype), side)

    return Prediction(Linear(), velocity, "velocity")


def white(rng: torch.Generator, count: int, side: int = SIDE) -> torch.Tensor:
    return torch.randn(count, side, side, side, generator=rng, dtype=torch.float64)


def grid(steps: int) -> torch.Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def test_the_exact_flow_draws_its_prior(rng):
    """The power of 1000 draws in every shell, within 3 %."""
    power = torch.logspace(2, -1, 5, dtype=torch.float64) * 8**3
    drawn = sample(Heun(), gaussian_prior(on_shells(power, 8)), white(rng, 1000, 8), grid(30))
    assert (power_spectrum(drawn).mean(0) / power - 1)[1:].abs().max() < 0.03


@pytest.mark.parametrize("variance", [0.1, 1.0, 4.0])
def test_pigdm_is_exact_for_unit_gaussians(rng, variance):
    """Wiener slope 1 / (1 + s) and posterior variance s / (1 + s) to 0.01; the capped direction alone has neither."""
    unit = torch.full((SIDE // 2 + 1,), float(SIDE**3), dtype=torch.float64)
    operator = spectral_noise(variance * unit, SIDE)
    truth = white(rng, 6)
    measured = operator.measure(truth, rng)
    drawn = draw(gaussian_prior(on_shells(unit, SIDE)), PiGDM(), operator, measured, white(rng, 6), Heun(), grid(40))
    slope = float((drawn * measured).sum() / measured.square().sum())
    assert slope == pytest.approx(1 / (1 + variance), abs=0.01)
    assert float((drawn - slope * measured).var()) == pytest.approx(variance / (1 + variance), abs=0.012)


def test_a_tomogram_keeps_its_measured_voxels_and_fills_the_rest_with_the_prior(rng):
    power = on_shells(torch.logspace(1, 0, 7, dtype=torch.float64) * SIDE**3, SIDE)
    wedge = missing_wedge(SIDE, 60.0)
    truth = shaped_noise(power.expand(16, -1, -1, -1), SIDE, rng)
    for sampler in (Euler(), Heun(), DDIM()):
        filled = draw(gaussian_prior(power), Replacement(), wedge, wedge(truth), white(rng, 16), sampler, grid(25))
        difference = (transform(filled) - transform(truth))[..., wedge.mask].abs().max()
        assert difference < 1e-4, type(sampler).__name__
        outside = transform(filled)[..., ~wedge.mask].abs().square() / power[~wedge.mask]
        assert 0.85 < outside.mean() < 1.15, type(sampler).__name__


def test_normalised_guidance_moves_by_kappa_whatever_the_number_of_steps(rng):
    """The added velocity has the length kappa w sqrt(d) for every map by itself, also where the misfit is tiny."""
    unit = torch.full((SIDE // 2 + 1,), float(SIDE**3), dtype=torch.float64)
    prior, operator = gaussian_prior(on_shells(unit, SIDE)), spectral_noise(unit, SIDE)
    measured, x = white(rng, 3), white(rng, 3)
    measured[1] *= 1e-6
    for t, weight in ((0.5, 1.0), (0.75, 3.0), (0.99, 5.0)):
        times = torch.full((3,), t, dtype=torch.float64)
        bent = conditioned(prior, Normalised(kappa=1.5), operator, measured).velocity(x, times)
        added = (bent - prior.velocity(x, times)).flatten(1).norm(dim=1)
        torch.testing.assert_close(added, torch.full_like(added, 1.5 * weight * SIDE**1.5))


def test_a_map_is_restored_the_same_alone_and_in_company(rng):
    unit = torch.full((SIDE // 2 + 1,), float(SIDE**3), dtype=torch.float64)
    prior, operator = gaussian_prior(on_shells(unit, SIDE)), spectral_noise(unit, SIDE)
    measured, noise = white(rng, 4), white(rng, 4)
    for guidance in (Normalised(), PiGDM()):
        # below t = 1, where a state tells nothing of the data and the direction of its gradient is rounding
        times = torch.linspace(0.98, 0, 11, dtype=torch.float64)
        together = draw(prior, guidance, operator, measured, noise, Euler(), times)
        alone = draw(prior, guidance, operator, measured[2:3], noise[2:3], Euler(), times)
        assert (together[2] - alone[0]).abs().max() < 1e-10


def test_guidance_pulls_towards_what_was_measured(rng):
    """And nothing remembers how: no graph is left, and the network's parameters have no gradients."""
    unit = torch.full((SIDE // 2 + 1,), float(SIDE**3), dtype=torch.float64)
    prior, operator = gaussian_prior(on_shells(unit, SIDE)), spectral_noise(0.1 * unit, SIDE)
    measured = white(rng, 2)
    for guidance in (Normalised(), PiGDM()):
        drawn = draw(prior, guidance, operator, measured, white(rng, 2), Euler(), grid(30))
        assert operator.misfit(drawn, measured).mean() < 0.2 * operator.misfit(white(rng, 2), measured).mean()
        assert not drawn.requires_grad


def test_projections_guide_too(rng):
    """Experimental: three orthogonal projections bring a draw nearer to what they show."""
    turns = torch.stack([torch.eye(3), torch.eye(3)[[2, 1, 0]] * torch.tensor([1.0, 1.0, -1.0])]).double()
    operator = Projections(turns, 0.5, 2.0)
    unit = torch.full((SIDE // 2 + 1,), float(SIDE**3), dtype=torch.float64)
    prior, truth, noise = gaussian_prior(on_shells(unit, SIDE)), white(rng, 1), white(rng, 1)
    images = operator.measure(truth, rng)
    free = sample(Euler(), prior, noise, grid(20))
    bent = draw(prior, Normalised(), operator, images, noise, Euler(), grid(20))
    assert operator.misfit(bent, images) < 0.5 * operator.misfit(free, images)
    with pytest.raises(ValueError, match="Projections measures others"):
        draw(prior, Replacement(), operator, images, noise, Euler(), grid(4))


def test_an_exact_measurement_cannot_be_weighed(rng):
    prior = gaussian_prior(torch.full((SIDE, SIDE, SIDE // 2 + 1), float(SIDE**3), dtype=torch.float64))
    with pytest.raises(ValueError, match="guidance=replacement"):
        draw(prior, Normalised(), missing_wedge(SIDE, 60.0), white(rng, 1), white(rng, 1), Euler(), grid(4))
    with pytest.raises(ValueError, match=r"guidance\.kappa=-1"):
        Normalised(kappa=-1.0)
