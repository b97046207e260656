"""Paths: their coefficients, and conversions between what networks predict."""

import itertools
import math

import pytest
import torch

from lightning_modules.processes.paths import KINDS, VE, VP, Linear, Path
from lightning_modules.processes.prediction import Prediction

PATHS = [VP(), VE(), Linear()]
TIMES = torch.tensor([1e-3, 0.1, 0.5, 0.9, 1 - 1e-3], dtype=torch.float64)


class Cosine(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): all that a user writes."""

    def alpha(self, t):
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(math.pi / 2 * t)


@pytest.mark.parametrize("path", [*PATHS, Cosine()], ids=lambda path: type(path).__name__)
def test_what_a_path_knows_in_closed_form_follows_from_alpha_and_sigma(path):
    t, u = TIMES, 0.6 * TIMES
    torch.testing.assert_close(path.log_snr(t), torch.log(path.alpha(t) / path.sigma(t)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path.time(path.log_snr(t)), t, rtol=1e-12, atol=0)
    for closed, derived in zip(path.rates(t), Path.rates(path, t)):
        torch.testing.assert_close(closed, derived, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(path.diffusion(t), Path.diffusion(path, t), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(path.score_gain(t, u), Path.score_gain(path, t, u), rtol=1e-9, atol=1e-13)


def test_the_variance_of_the_vp_path_keeps_its_digits_at_small_times():
    t = torch.tensor([1e-9, 1e-6, 1e-4], dtype=torch.float64)
    torch.testing.assert_close(VP().sigma(t) ** 2, 2 * t - 2 * t**2 + 4 * t**3 / 3, rtol=1e-12, atol=0)
    assert VP().log_snr(torch.tensor(0.0).double()) == math.inf
    assert VP().time(torch.tensor(-math.inf).double()) == math.inf


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize(("source", "target"), itertools.permutations(KINDS, 2))
def test_conversions_are_inverse_pairs_and_agree_with_data_and_noise(path, source, target):
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    x = path.sample(data, noise, TIMES)
    there = path.convert(x, path.target(source, data, noise, TIMES), TIMES, source, target)
    torch.testing.assert_close(there, path.target(target, data, noise, TIMES), rtol=1e-10, atol=1e-10)
    back = path.convert(x, there, TIMES, target, source)
    torch.testing.assert_close(back, path.target(source, data, noise, TIMES), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize(("source", "target"), itertools.permutations(KINDS, 2))
def test_conversions_return_within_1e_5_in_single_precision(path, source, target):
    """Or within what rounding the other form to 24 bits leaves of it: 6e-8 sigma / alpha, or its inverse."""
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(5, 100, generator=generator) for _ in range(2))
    x, value = path.sample(data, noise, TIMES), path.target(source, data, noise, TIMES)
    back = path.convert(x, path.convert(x, value, TIMES, source, target), TIMES, target, source)
    assert back.dtype == torch.float32
    ratio = path.sigma(TIMES) / path.alpha(TIMES)
    allowed = torch.maximum(torch.tensor(1e-5), 1.2e-6 * torch.maximum(ratio, 1 / ratio))
    error = (back - value).abs() / (1 + value.abs().amax(1, keepdim=True))
    assert (error.amax(1) <= allowed).all(), error.amax(1)


def test_the_drift_of_every_kind_is_the_same():
    for path in [*PATHS, Cosine()]:
        data, noise = torch.randn(2, 5, 3, dtype=torch.float64)
        x = path.sample(data, noise, TIMES)
        for kind in KINDS:
            drift = path.convert(x, path.target(kind, data, noise, TIMES), TIMES, kind, "drift")
            torch.testing.assert_close(drift, path.target("drift", data, noise, TIMES), rtol=1e-9, atol=1e-9)


def test_what_is_not_determined_at_an_end_of_the_path_is_refused():
    x, one = torch.zeros(2, 3), torch.tensor(1.0)
    with pytest.raises(ValueError, match="a noise prediction does not determine the data at t=1 of the path Linear"):
        Prediction(Linear(), lambda x, t: x, "noise").data(x, one)
    assert Prediction(Linear(), lambda x, t: x, "velocity").data(x, one).isfinite().all()
    assert not Prediction(VP(), lambda x, t: x, "noise").determines("drift", 0 * one)
    assert Prediction(VP(), lambda x, t: x, "score").determines("drift", 0 * one)
    with pytest.raises(ValueError, match="no prediction of kind 'eps': take one of noise, data, velocity, score"):
        Prediction(VP(), lambda x, t: x, "eps")


def test_guidance_changes_the_velocity_and_everything_that_follows_from_it():
    path, t = Linear(), torch.tensor(0.25, dtype=torch.float64)
    seen = []

    def guide(x, t, data, velocity):
        seen.append((t, data))
        return velocity + 2

    x = torch.randn(4, 3)
    plain, guided = (Prediction(path, lambda x, t: x * 0.5, "noise", g) for g in (None, guide))
    torch.testing.assert_close(guided.velocity(x, t), plain.velocity(x, t) + 2)
    torch.testing.assert_close(guided.data(x, t), plain.data(x, t) - 0.25 * 2)  # x_0 = x - t v
    torch.testing.assert_close(guided.noise(x, t), plain.noise(x, t) + 0.75 * 2)  # eps = x + (1 - t) v
    torch.testing.assert_close(seen[0][1], plain.data(x, t))
    assert seen[0][0].shape == (4,)


def test_networks_see_times_in_single_precision_even_where_the_state_is_half():
    seen = []
    x = torch.randn(3, 2, dtype=torch.bfloat16)
    answer = Prediction(VP(), lambda x, t: seen.append(t) or x, "noise").data(x, torch.tensor(0.3).double())
    assert seen[0].dtype == torch.float32
    assert answer.dtype == torch.bfloat16
