"""Restoring whole maps: tiles, draws, and going on after a cut."""

import itertools

import pytest
import torch
from torch import Tensor

from lightning_modules.cryo.operators import spectral_noise
from lightning_modules.cryo.posterior import PiGDM
from lightning_modules.cryo.restoration import Restoration, State
from lightning_modules.cryo.tiling import Tiling
from lightning_modules.processes.ode import Euler, Heun
from lightning_modules.processes.paths import Linear
from lightning_modules.processes.prediction import Prediction


def unit_gaussian(x: Tensor, t: Tensor) -> Tensor:
    t = t.reshape(-1, 1, 1, 1)
    return (2 * t - 1) / ((1 - t) ** 2 + t**2) * x


def restoration(**changes) -> Restoration:
    settings = {
        "prior": Prediction(Linear(), unit_gaussian, "velocity"),
        "guidance": PiGDM(),
        "sampler": Euler(),
        "grid": torch.linspace(1, 0, 5, dtype=torch.float64),
        "tiling": Tiling(20, 12, 4),
        "draws": 2,
        "batch": 3,
    }
    return Restoration(**{**settings, **changes})


def measured(variance: float, tile: int = 12) -> tuple:
    """An operator for tiles, the truth, and its noisy halves."""
    rng = torch.Generator().manual_seed(1)
    truth = torch.randn(20, 20, 20, generator=rng)
    halves = truth + variance**0.5 * torch.randn(2, 20, 20, 20, generator=rng)
    power = torch.full((tile // 2 + 1,), variance * tile**3, dtype=torch.float64)
    return spectral_noise(power, tile), truth, halves


def last(states) -> State:
    for state in states:
        found = state
    return found


def test_the_batch_of_tiles_does_not_change_the_map():
    operator, _, halves = measured(0.5)
    one, four = (last(restoration(batch=batch)(operator, halves)) for batch in (1, 4))
    torch.testing.assert_close(one.mean, four.mean, atol=1e-6, rtol=1e-5)


def test_a_restoration_that_was_cut_off_goes_on_to_the_same_map():
    operator, _, halves = measured(0.5)
    job = restoration()
    whole = last(job(operator, halves))
    for cut in (1, 7, len(job.batches(2)) - 1):
        states = job(operator, halves)
        for _ in range(cut):
            kept = next(states).tensors()
        kept = {name: tensor.clone() for name, tensor in kept.items()}
        rest = last(job(operator, halves, State.of(kept)))
        assert torch.equal(rest.mean, whole.mean)
        assert torch.equal(rest.squares, whole.squares)
    assert whole.draws == 2


def test_mean_and_deviation_are_those_of_the_draws():
    operator, _, halves = measured(0.5)
    seen, before = [], 0
    job = restoration(draws=3, tiling=Tiling(20, 20, 0), batch=1)
    operator = measured(0.5, 20)[0]
    for state in job(operator, halves):
        if state.draws > before:
            before = state.draws
            seen.append(state.mean.clone() * before)
    draws = torch.stack([seen[0], *(later - earlier for earlier, later in itertools.pairwise(seen))])
    torch.testing.assert_close(state.mean, draws.mean(0))
    torch.testing.assert_close(state.deviation, draws.std(0))


def test_many_draws_approach_the_posterior_mean_of_both_halves():
    """Each half's posterior mean is y / (1 + s), and the halves are averaged; tiles do not show."""
    operator, _, halves = measured(0.5)
    times = torch.linspace(1, 0, 17, dtype=torch.float64)
    found = last(restoration(draws=4, sampler=Heun(), grid=times, batch=8)(operator, halves)).mean
    expected = halves.mean(0) / 1.5
    slope = float((found * expected).sum() / expected.square().sum())
    assert slope == pytest.approx(1, abs=0.03)
    seam = (found - expected)[11:13].square().mean() / (found - expected)[3:8].square().mean()
    assert 0.4 < seam < 1.6


def test_another_seed_is_another_draw_and_the_same_seed_the_same():
    operator, _, halves = measured(0.5)
    first, again, other = (last(restoration(seed=seed)(operator, halves)).mean for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)
    with pytest.raises(ValueError, match="draws=0"):
        restoration(draws=0)
