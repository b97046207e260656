"""Measurements against closed forms, counts and each other (cryofm.md, checks 6 and 8)."""

import math

import pytest
import torch

from lightning_modules.cryo.fourier import (
    auc,
    filtered,
    fsc,
    inverse,
    multiplicity,
    on_shells,
    power_spectrum,
    radius,
    shaped_noise,
    shell_mean,
    transform,
)
from lightning_modules.cryo.operators import (
    FourierOperator,
    Microscope,
    Operator,
    Projections,
    Spectra,
    amplified,
    anisotropic_noise,
    estimated,
    logistic_fsc,
    missing_wedge,
    noise_for,
    spectral_noise,
    tilted,
)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def blobs(rng: torch.Generator, side: int, count: int = 12) -> torch.Tensor:
    """A sparse density: Gaussian blobs about the centre."""
    line = torch.arange(side, dtype=torch.float64)
    volume = torch.zeros(side, side, side, dtype=torch.float64)
    for centre in torch.randn(count, 3, generator=rng, dtype=torch.float64) * side / 8 + side / 2:
        z, y, x = (torch.exp(-((line - c) ** 2) / 4) for c in centre)
        volume += z[:, None, None] * y[:, None] * x
    return volume


@pytest.mark.parametrize(("tilt", "fraction"), [(60.0, 0.6666), (45.0, 0.5163), (30.0, 0.3338), (15.0, 0.1675)])
def test_a_tilt_series_keeps_its_share_of_the_nyquist_sphere(tilt, fraction):
    inside = (radius(64) <= 32) * multiplicity(64)
    kept = (tilted(64, tilt) * inside).sum() / inside.sum()
    assert float(kept) == pytest.approx(fraction, abs=6e-4)


def test_a_wedge_is_the_same_at_opposite_frequencies(rng):
    """The whole mask that the half stands for is even, so a masked transform is that of a real map."""
    for side, axis, beam in ((16, "y", "z"), (15, "x", "z"), (16, "z", "x")):
        operator = missing_wedge(side, 50.0, axis, beam)
        volume = torch.randn(side, side, side, generator=rng, dtype=torch.float64)
        masked = operator(volume)
        torch.testing.assert_close(transform(masked), transform(volume) * operator.gain)
        torch.testing.assert_close(operator(masked), masked)
        assert operator.mask[0, 0, 0]


def test_wedges_of_wrong_axes_and_angles_are_refused():
    with pytest.raises(ValueError, match="not along the beam"):
        missing_wedge(16, 60.0, "z", "z")
    with pytest.raises(ValueError, match="tilt=120"):
        missing_wedge(16, 120.0)


def test_a_measurement_has_its_mean_and_its_noise(rng):
    side = 12
    power = torch.linspace(50.0, 2.0, 7, dtype=torch.float64)
    operator = spectral_noise(power, side)
    truth = blobs(rng, side)
    noise = operator.measure(truth.expand(300, -1, -1, -1), rng) - truth
    assert (power_spectrum(noise).mean(0) / power - 1)[1:].abs().max() < 0.05


def test_anisotropic_noise_keeps_the_radial_spectrum_and_its_ratio():
    power = torch.linspace(50.0, 2.0, 9, dtype=torch.float64)
    operator = anisotropic_noise(power, amplified(16, 30.0, 50.0))
    torch.testing.assert_close(shell_mean(operator.noise_power, 16), power)
    shell, inside = radius(16).round() == 6, tilted(16, 30.0)
    quiet, loud = operator.noise_power[shell & inside], operator.noise_power[shell & ~inside]
    torch.testing.assert_close(loud, 50 * quiet[0].expand_as(loud))


def test_misfit_is_the_negative_log_likelihood_of_white_noise(rng):
    side, sigma = 8, 0.3
    operator = spectral_noise(torch.full((5,), sigma**2 * side**3, dtype=torch.float64), side)
    truth, measured = torch.randn(2, 3, side, side, side, generator=rng, dtype=torch.float64)
    expected = 0.5 * (truth - measured).square().sum((-3, -2, -1)) / sigma**2
    torch.testing.assert_close(operator.misfit(truth, measured), expected)
    widened = 0.5 * (truth - measured).square().sum((-3, -2, -1)) / (sigma**2 + 0.5)
    torch.testing.assert_close(operator.misfit(truth, measured, 0.5), widened)


def test_a_composite_knows_its_noise_and_its_mask(rng):
    """A wedge of a noisy map: what is outside neither has noise nor counts; the order of noise and gain matters."""
    side = 12
    power = torch.full((7,), 4.0, dtype=torch.float64)
    noise, wedge = spectral_noise(power, side), missing_wedge(side, 60.0)
    both = wedge @ noise
    assert torch.equal(both.mask, wedge.mask)
    assert torch.equal(both.noise_power[both.mask], noise.noise_power[both.mask])
    assert not both.exact
    assert wedge.exact
    truth = torch.randn(side, side, side, generator=rng, dtype=torch.float64)
    outside = filtered(truth, (~wedge.mask).double())
    torch.testing.assert_close(both.misfit(truth + 5 * outside, truth), both.misfit(truth, truth))
    half = FourierOperator(torch.full_like(wedge.gain, 0.5), torch.zeros_like(wedge.gain))
    assert torch.equal((half @ noise).noise_power, 0.25 * noise.noise_power)
    assert torch.equal((noise @ half).noise_power, noise.noise_power)
    twice = wedge @ (noise @ noise)
    assert torch.equal(twice.noise_power[wedge.mask], 2 * noise.noise_power[wedge.mask])
    with pytest.raises(ValueError, match="do not compose"):
        wedge @ missing_wedge(8, 60.0)


def test_hard_replacement_puts_the_measured_voxels_in(rng):
    wedge = missing_wedge(12, 60.0)
    truth, guess = torch.randn(2, 12, 12, 12, generator=rng, dtype=torch.float64)
    put = transform(wedge.replaced(guess, wedge(truth)))
    torch.testing.assert_close(put[wedge.mask], transform(truth)[wedge.mask])
    torch.testing.assert_close(put[~wedge.mask], transform(guess)[~wedge.mask])


def test_standardised_measurements_are_measurements_of_standardised_maps(rng):
    side, shift, scale = 12, 0.04, 0.09
    operator = missing_wedge(side, 60.0) @ spectral_noise(torch.full((7,), 4.0, dtype=torch.float64), side)
    truth = torch.randn(side, side, side, generator=rng, dtype=torch.float64)
    measured, inner = operator.standardised(operator.measure(truth, rng), shift, scale)
    other = torch.randn(side, side, side, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(
        inner.misfit((other - shift) / scale, measured), operator.misfit(other, measured * scale + shift)
    )


def test_noise_estimated_from_half_maps_is_the_noise_that_was_added(rng):
    """Within 15 % in all shells, over the mean of 8 maps; signal and noise are all of the power."""
    side, ratios = 24, []
    for _ in range(8):
        truth = blobs(rng, side)
        power = noise_for(truth, logistic_fsc(side))
        operator = spectral_noise(power, side)
        halves = operator.measure(truth.expand(2, -1, -1, -1), rng)
        found = estimated(*halves)
        measured = (power_spectrum(halves[0]) + power_spectrum(halves[1])) / 2
        torch.testing.assert_close(found.signal + found.noise, measured, rtol=1e-12, atol=0)
        ratios.append(found.noise / power)
    mean = torch.stack(ratios).mean(0)[1:]
    assert ((mean > 0.85) & (mean < 1.15)).all(), mean
    assert ((found.data_weight >= 0) & (found.data_weight <= 1)).all()


def test_the_mean_density_is_not_taken_for_known_without_noise(rng):
    """One voxel always correlates to 1; taken at its word it would outweigh all others in a gradient."""
    halves = torch.randn(2, 16, 16, 16, generator=rng, dtype=torch.float64) + 3
    found = estimated(*halves)
    assert found.noise[0] / (found.signal[0] + found.noise[0]) > 0.1


def test_wiener_filtering_by_shell_cannot_raise_the_correlation(rng):
    """So what is gained over the observation comes from a prior or a mask."""
    truth = blobs(rng, 24)
    operator = spectral_noise(noise_for(truth, logistic_fsc(24)), 24)
    halves = operator.measure(truth.expand(2, -1, -1, -1), rng)
    observed = halves.mean(0)
    wiener = filtered(observed, on_shells(estimated(*halves, smallest=1e-3).data_weight, 24))
    assert abs(auc(fsc(wiener, truth)) - auc(fsc(observed, truth))) < 1e-9


def test_projections_along_the_axes_are_sums(rng):
    """With the contrast transfer function, which multiplies the image's transform."""
    side, voxel = 16, 2.0
    truth = blobs(rng, side)
    turn = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]], dtype=torch.float64)
    scope = Microscope(defocus=8000.0)
    operator = Projections(torch.stack([torch.eye(3, dtype=torch.float64), turn]), 0.1, voxel, scope)
    assert isinstance(operator, Operator)
    k = torch.fft.fftfreq(side, voxel, dtype=torch.float64)
    ctf = scope.ctf((k[:, None] ** 2 + k**2).sqrt())
    along_z, along_x = operator(truth)
    expected = torch.fft.ifftn(torch.fft.fftn(truth.sum(0)) * ctf).real
    torch.testing.assert_close(along_z, expected, atol=1e-9, rtol=0)
    turned = truth.flip(0).roll(1, 0).sum(2).T  # z' = -x, x' = z about the voxel n // 2
    either = [torch.fft.ifftn(torch.fft.fftn(image) * ctf).real for image in (turned, truth.sum(2).T)]
    assert min((along_x - image).abs().max() for image in either) < 1e-9
    with pytest.raises(ValueError, match="guidance=normalised"):
        operator.misfit(truth, operator(truth), 0.3)


def test_projections_of_a_standardised_map_are_standardised(rng):
    operator = Projections(torch.eye(3, dtype=torch.float64)[None], 0.1, 2.0)
    truth = blobs(rng, 12)
    measured, inner = operator.standardised(operator(truth), 0.04, 0.09)
    assert inner.misfit((truth - 0.04) / 0.09, measured) < 1e-12


def test_the_transfer_function_is_that_of_weak_phase_objects():
    scope = Microscope(defocus=15000.0, voltage=300.0, cs=2.7, amplitude=0.07)
    assert float(scope.ctf(torch.zeros(()))) == pytest.approx(-0.07)
    wavelength = 0.0196875  # angstrom at 300 kV
    k = 0.1
    phase = math.pi * wavelength * k**2 * (15000 - 0.5 * 2.7e7 * wavelength**2 * k**2) + math.asin(0.07)
    assert float(scope.ctf(torch.tensor(k, dtype=torch.float64))) == pytest.approx(-math.sin(phase), abs=1e-4)


def test_noise_of_half_maps_gives_the_curve_it_was_made_for(rng):
    truth = blobs(rng, 32, 30)
    curve = logistic_fsc(32, 8.0)
    halves = spectral_noise(noise_for(truth, curve), 32).measure(truth.expand(2, -1, -1, -1), rng)
    assert (fsc(*halves) - curve)[3:].abs().mean() < 0.05
    assert inverse(transform(halves), 32).dtype == torch.float64


def test_noise_of_cubes_cut_from_a_map_and_of_coarser_voxels_is_predicted(rng):
    """White and coloured noise of a box of 32 in cubes of 16, and after Fourier cropping to half as many voxels."""
    power = torch.linspace(9.0, 3.0, 17, dtype=torch.float64) * 32**3
    noise = shaped_noise(on_shells(power, 32).expand(60, -1, -1, -1), 32, rng)
    whole = Spectra(torch.ones_like(power), power, power)
    cut = power_spectrum(noise[:, :16, 8:24, 16:]).mean(0)
    assert (cut / whole.on(16).noise - 1)[2:].abs().max() < 0.1
    spectrum = torch.fft.fftshift(torch.fft.fftn(noise, dim=(1, 2, 3)), dim=(1, 2, 3))[:, 8:24, 8:24, 8:24] / 8
    coarse = torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=(1, 2, 3)), dim=(1, 2, 3)).real
    cropped = power_spectrum(coarse).mean(0)
    assert (cropped / whole.on(16, 2.0).noise - 1)[1:-1].abs().max() < 0.1
    assert torch.equal(whole.of_mean.noise, power / 2)
