"""Shells, correlation, filters and masks against closed forms and a public package (emdb_data.md, section 7)."""

import math

import numpy as np
import pytest
import torch

from lightning_modules.cryo.fourier import (
    auc,
    filtered,
    fsc,
    local_fsc,
    low_pass,
    masked_fsc,
    multiplicity,
    on_shells,
    phases_randomised,
    power_spectrum,
    radius,
    resolution,
    shaped_noise,
    shell_count,
    shell_of,
    shell_sum,
    signal_to_noise,
    soft_mask,
    to_truth,
    transform,
)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def white(rng, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=rng, dtype=dtype)


def test_shells_are_those_of_the_whole_spectrum():
    assert shell_count(32)[:5].tolist() == [1, 18, 62, 98, 210]
    for side in (9, 12, 49):
        k = np.rint(np.fft.fftfreq(side) * side)
        whole = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2)
        for name, rule in (("round", np.rint), ("ceil", np.ceil), ("floor", np.floor)):
            counted = np.bincount(rule(whole).astype(int).ravel())[: side // 2 + 1]
            assert np.array_equal(shell_count(side, binning=name).numpy(), counted), (side, name)
        assert multiplicity(side).sum() == side**3


def test_half_the_spectrum_has_the_power_of_the_whole(rng):
    for side in (11, 16):
        volume = white(rng, side, side, side)
        power = transform(volume).abs().square() * multiplicity(side)
        torch.testing.assert_close(power.sum(), side**3 * volume.square().sum())


def test_correlation_of_a_map_with_itself_its_negative_and_its_multiple(rng):
    a = white(rng, 2, 16, 16, 16)
    one = torch.ones(2, 9, dtype=torch.float64)
    torch.testing.assert_close(fsc(a, a), one)
    torch.testing.assert_close(fsc(a, -a), -one)
    torch.testing.assert_close(fsc(a, 3.7 * a), one)


def test_no_radial_filter_of_either_map_changes_their_correlation(rng):
    a, b = white(rng, 24, 24, 24), white(rng, 24, 24, 24)
    gain = on_shells(torch.rand(13, generator=rng, dtype=torch.float64) + 1e-3, 24)
    b = a + b
    assert (fsc(a, filtered(b, gain)) - fsc(a, b)).abs().max() < 1e-12
    assert (fsc(filtered(a, gain), b) - fsc(a, b)).abs().max() < 1e-12


def test_independent_noise_has_the_standard_deviation_of_its_count(rng):
    curves = fsc(white(rng, 120, 24, 24, 24, dtype=torch.float32), white(rng, 120, 24, 24, 24, dtype=torch.float32))
    ratio = (curves.std(0) * shell_count(24).sqrt())[2:].mean()
    assert abs(ratio - 1) < 0.1, ratio


def test_correlation_with_the_truth_follows_from_that_of_half_maps(rng):
    truth, first, second = (white(rng, 32, 32, 32) for _ in range(3))
    first, second = truth + first, truth + second
    many = slice(4, None)  # the shells with enough voxels
    assert abs(fsc(truth, first)[many].mean() - 1 / math.sqrt(2)) < 0.01
    assert abs(fsc(first, second)[many].mean() - 0.5) < 0.02
    predicted, measured = to_truth(fsc(first, second))[many].mean(), fsc(truth, (first + second) / 2)[many].mean()
    assert abs(predicted - measured) < 0.015
    assert torch.equal(to_truth(torch.tensor([-0.2, 1.0])), torch.tensor([0.0, 1.0]))


def test_shifting_both_maps_changes_nothing_and_shifting_one_lowers_the_correlation(rng):
    truth = white(rng, 24, 24, 24)
    noisy = truth + 0.3 * white(rng, 24, 24, 24)
    there, one = fsc(truth, noisy), fsc(truth, noisy.roll(1, 0))
    torch.testing.assert_close(fsc(truth.roll(2, 1), noisy.roll(2, 1)), there)
    assert auc(one) < auc(there) - 0.02


def test_linear_bins_are_those_of_the_public_package(rng):
    """To 1e-5 where both look at the whole spectrum; its shortcut counts the plane kx = 0 twice."""
    package = pytest.importorskip("torch_fourier_shell_correlation")
    for side in (16, 25):
        falling = torch.exp(-0.3 * radius(side))  # smooth maps, as densities are
        a = filtered(white(rng, 3, side, side, side), falling)
        b = a + 0.3 * filtered(white(rng, 3, side, side, side), falling)
        whole = [torch.fft.fftn(x, dim=(-3, -2, -1)) for x in (a, b)]
        theirs = package.fourier_correlation(*whole, a.shape[-3:], rfft=False)
        assert (fsc(a, b, "linear") - theirs)[:, 1:].abs().max() < 1e-5
        assert (fsc(a, b) - package.fourier_shell_correlation(a, b))[:, 1:].abs().max() < 0.05


def test_a_shell_without_power_is_left_out_of_the_mean(rng):
    a = filtered(white(rng, 16, 16, 16), (shell_of(16) != 5).double())
    a = a - a.mean()
    curve = fsc(torch.zeros_like(a), a)
    assert curve.isnan().all()
    curve = fsc(a, a)
    curve[5] = torch.nan
    assert auc(curve) == pytest.approx(1)


def test_resolution_is_interpolated_between_shells_and_says_when_it_is_outside():
    falling = torch.tensor([1.0, 0.9, 0.7, 0.3, 0.1])
    found = resolution(falling, 8, 2.0, threshold=0.5)
    assert found.angstroms == pytest.approx(16 / 2.5)
    assert found.outside == ""
    assert resolution(torch.ones(5), 8, 2.0) == (4.0, "beyond Nyquist")
    assert resolution(torch.zeros(5), 8, 2.0) == (16.0, "beyond the box")


def test_signal_to_noise_stays_representable():
    ratio = signal_to_noise(torch.tensor([0.5, 1.0, 0.0, -0.3, torch.nan], dtype=torch.float64))
    assert ratio[0] == 1
    assert ratio[1] < 1e6 * 1.001
    assert ratio[2:].tolist() == [1e-3] * 3


def test_noise_is_real_centred_and_has_its_spectrum(rng):
    side, power = 16, torch.linspace(3.0, 0.1, 9, dtype=torch.float64) ** 2 * 100
    noise = shaped_noise(on_shells(power, side).expand(400, -1, -1, -1).clone(), side, rng)
    assert noise.is_floating_point()
    measured = power_spectrum(noise).mean(0)
    assert (measured / power - 1)[1:].abs().max() < 0.05
    assert noise.mean(0).abs().mean() < 3 * noise.std() / 20


def test_random_phases_keep_amplitudes_and_what_is_below(rng):
    volume = white(rng, 16, 16, 16)
    mixed = phases_randomised(volume, 4, rng)
    torch.testing.assert_close(power_spectrum(mixed), power_spectrum(volume))
    curve = fsc(volume, mixed)
    torch.testing.assert_close(curve[:4], torch.ones(4, dtype=torch.float64))
    assert curve[4:].abs().max() < 0.4


def test_a_mask_alone_correlates_and_is_corrected_for(rng):
    """Two pure noises agree under one mask; random phases find that, and the corrected curve is near zero again."""
    inside = torch.zeros(32, 32, 32)
    inside[13:19, 13:19, 13:19] = 1
    mask = soft_mask(inside, 0.5, dilate=1, edge=3).double()
    common = low_pass(white(rng, 32, 32, 32) * mask, 12.0, 1.0) * 30
    a, b = common + white(rng, 32, 32, 32), common + white(rng, 32, 32, 32)
    curves = masked_fsc(a, b, mask, rng)
    late = slice(11, None)
    assert curves.masked[1:5].min() > 0.9
    assert curves.corrected[late].mean().abs() < 0.15
    assert (curves.masked[1:3] == curves.corrected[1:3]).all()
    torch.testing.assert_close(curves.unmasked, fsc(a, b))


def test_the_better_side_of_a_map_is_found_by_windows(rng):
    truth = white(rng, 32, 32, 32)
    noise = torch.linspace(0.1, 3.0, 32, dtype=torch.float64)[:, None, None]
    local = local_fsc(truth + noise * white(rng, 32, 32, 32), truth + noise * white(rng, 32, 32, 32), 12, 4)
    assert local.shape == (6, 6, 6, 7)
    by_slab = auc(local).mean((1, 2))
    assert (by_slab.diff() < 0).all()


def test_low_pass_keeps_what_is_coarse_and_removes_what_is_fine(rng):
    volume = white(rng, 32, 32, 32)
    power = power_spectrum(low_pass(volume, 4.0, 1.0)) / power_spectrum(volume)
    assert power[:7].min() > 0.999
    assert power[10:].max() < 1e-6


def test_a_soft_mask_falls_off_with_the_euclidean_distance():
    volume = torch.zeros(21, 21, 21)
    volume[10, 10, 10] = 1
    mask = soft_mask(volume, 0.5, dilate=2, edge=4)
    distance = ((torch.arange(21) - 10.0)[:, None, None] ** 2 + (torch.arange(21) - 10.0)[:, None] ** 2
                + (torch.arange(21) - 10.0) ** 2).sqrt()  # fmt: skip
    assert (mask[distance <= 2] == 1).all()
    assert (mask[distance >= 7] == 0).all()
    expected = 0.5 * (1 + torch.cos(math.pi * ((distance - 2) / 5).clamp(0, 1)))
    torch.testing.assert_close(mask, expected)
    with pytest.raises(ValueError, match="at least 3"):
        soft_mask(volume, 0.5, edge=2)


def test_sums_do_not_lose_what_float32_would(rng):
    """A shell of a large box holds numbers whose float32 sum would drift."""
    values = torch.full((24, 24, 13), 0.1, dtype=torch.float32)
    exact = shell_count(24) * float(torch.tensor(0.1))
    torch.testing.assert_close(shell_sum(values, 24), exact, rtol=1e-14, atol=0)
    assert radius(24).dtype == torch.float64
