"""The loss of flow matching and what is reached without learning, against closed forms."""

import math

import pytest
import torch

from lightning_modules.averaging import average, warmed_up
from lightning_modules.cryo import flow_matching
from lightning_modules.cryo.flow_matching import Spectrum, baselines, linear_loss, spectrum
from lightning_modules.cryo.fourier import filtered, power_spectrum, radius

CPU = torch.device("cpu")


def white(count: int = 4, side: int = 12) -> torch.Tensor:
    return flow_matching.drawn_noise(0, "val", range(count), side, CPU)


def test_baselines_of_unit_variance_are_those_of_the_paper_kit():
    times = (0.1, 0.3, 0.5, 0.7, 0.9)
    voxel = [float(linear_loss(torch.ones(()), t)) for t in times]
    assert voxel == pytest.approx([1.220, 1.724, 2.000, 1.724, 1.220], abs=5e-4)
    assert voxel == pytest.approx([2 - (2 * t - 1) ** 2 / (t**2 + (1 - t) ** 2) for t in times])
    flat = Spectrum(torch.ones(4, dtype=torch.float64), torch.tensor([1.0, 18, 62, 98], dtype=torch.float64))
    for t, expected in zip(times, voxel):
        assert baselines(flat, t) == pytest.approx({"zero": 2.0, "voxel": expected, "shell": expected})


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_best_linear_prediction_by_shells_reaches_the_baseline(t):
    # power 40 at the centre falling to 0.02: v = (t - (1 - t) p) / (t^2 + (1 - t)^2 p) x_t in every Fourier voxel
    power = lambda side: 40 * torch.exp(-radius(side))  # noqa: E731
    data = filtered(white(60).double(), power(12).sqrt())
    noise = flow_matching.drawn_noise(1, "val", range(60), 12, CPU).double()
    gain = (t - (1 - t) * power(12)) / (t**2 + (1 - t) ** 2 * power(12))
    found = flow_matching.loss(lambda x, t: filtered(x, gain), data, noise, torch.full((60,), t)).mean()
    rounded = spectrum(data)
    mean = Spectrum(rounded.power.mean(0), rounded.voxels)
    assert baselines(mean, t)["shell"] == pytest.approx(found.item(), rel=0.02)
    assert baselines(mean, t)["shell"] < baselines(mean, t)["voxel"]


def test_the_loss_of_no_prediction_is_one_and_the_variance():
    data, noise = white(), flow_matching.drawn_noise(1, "val", range(4), 12, CPU)
    found = flow_matching.loss(lambda x, t: torch.zeros_like(x), data, noise, torch.rand(4))
    torch.testing.assert_close(found, (noise - data).square().mean((1, 2, 3)))


def test_the_spectrum_counts_every_voxel_once_out_to_the_corner():
    cubes = white()
    found = spectrum(cubes)
    assert found.voxels.sum() == 12**3
    assert len(found.voxels) == round(math.sqrt(3) * 6) + 1
    total = (found.power * found.voxels).sum(1) / 12**3
    torch.testing.assert_close(total, cubes.double().square().mean((1, 2, 3)))  # Parseval
    torch.testing.assert_close(found.power[:, :7], power_spectrum(cubes) / 12**3)


# What is drawn


def test_draws_of_a_cube_do_not_depend_on_its_batch():
    t, noise = flow_matching.drawn(flow_matching.uniform, 3, [5, 6, 7], 4, CPU)
    again, alone = flow_matching.drawn(flow_matching.uniform, 3, [6], 4, CPU)
    assert torch.equal(t[1:2], again)
    assert torch.equal(noise[1:2], alone)
    assert not torch.equal(noise[1:2], flow_matching.drawn(flow_matching.uniform, 4, [6], 4, CPU)[1])


def test_laws_of_the_time_are_in_thousandths_and_have_their_spread():
    source = torch.Generator().manual_seed(0)
    for law, std in ((flow_matching.uniform, 1 / math.sqrt(12)), (flow_matching.logit_normal, 1.04 * 0.2084)):
        times = torch.stack([law(source) for _ in range(1000)])
        assert times.min() >= 0
        assert times.max() <= 1
        torch.testing.assert_close((times * 1000).round() / 1000, times)
        assert times.mean().item() == pytest.approx(0.5, abs=0.03)
        assert times.std().item() == pytest.approx(std, abs=0.015)


def test_rows_of_repeated_places_count_once():
    places = torch.tensor([2, 0, 1, 0])
    rows = torch.tensor([[2.0], [0.0], [1.0], [9.0]])
    assert flow_matching.per_place(places, rows).flatten().tolist() == [0, 1, 2]


# The mean of the weights


def test_the_first_updates_of_the_mean_forget_faster():
    assert [warmed_up(0.99, n) for n in (1, 2, 10_000)] == [2 / 11, 3 / 12, 0.99]
    assert warmed_up(0.5, 9) == 0.5


def test_the_mean_is_that_of_its_recursion():
    network, mean = (torch.nn.Linear(3, 2) for _ in range(2))
    expected = [0.9 * m + 0.1 * p for m, p in zip(mean.parameters(), network.parameters())]
    average(mean, network, 0.9)
    for ours, theirs in zip(mean.parameters(), expected):
        torch.testing.assert_close(ours, theirs)
