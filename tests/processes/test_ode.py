"""Samplers: equivalences, exact steps, orders of convergence, per-sample times, what happens at the ends."""

import inspect
import math

import pytest
import torch

from lightning_modules.processes import ode
from lightning_modules.processes.grids import exponential_decay, karras, log_snr, uniform
from lightning_modules.processes.ode import (
    DDIM,
    DPM2,
    RK4,
    VEDDIM,
    DPMpp2M,
    EDMHeun,
    Euler,
    ExponentialIntegrator,
    Heun,
    Midpoint,
    Sampler,
    encode,
    sample,
)
from lightning_modules.processes.paths import VE, VP, Linear
from lightning_modules.processes.prediction import Prediction
from tests.processes.densities import mixture_noise, mixture_score

SAMPLERS = [Euler, ExponentialIntegrator, DDIM, VEDDIM, Heun, EDMHeun, DPM2, DPMpp2M, Midpoint, RK4]
X = torch.linspace(-3, 3, 41, dtype=torch.float64)


def exact(path, kind="noise"):
    return Prediction(path, {"noise": mixture_noise, "score": mixture_score}[kind](path), kind)


def test_every_sampler_has_a_word():
    classes = {c for _, c in inspect.getmembers(ode, inspect.isclass) if issubclass(c, Sampler)}
    assert classes - {Sampler, ode.Guarded} == set(SAMPLERS)


def test_ddim_is_the_step_with_frozen_noise_and_the_first_step_of_dpm_solver():
    path, t, u = VP(), *torch.tensor([1.3, 0.4], dtype=torch.float64)
    prediction = exact(path)
    noise = prediction.noise(X, t)
    frozen_noise = path.alpha(u) / path.alpha(t) * X
    frozen_noise = frozen_noise + (path.sigma(u) - path.alpha(u) * path.sigma(t) / path.alpha(t)) * noise
    frozen_data = path.alpha(u) * prediction.data(X, t) + path.sigma(u) * noise
    for found in (DDIM(), VEDDIM(), DPMpp2M()):
        step, _ = found.step(prediction, X, t, u, None)
        torch.testing.assert_close(step, frozen_noise, rtol=0, atol=1e-12)
        torch.testing.assert_close(step, frozen_data, rtol=0, atol=1e-12)


def test_ddim_on_any_path_is_euler_on_the_straight_one():
    """With z = (1 - tau) x / alpha and tau = ratio / (1 + ratio), ratio = sigma / alpha."""
    path, grid = VP(), log_snr(VP(), 9, 4.0, 1e-2)
    ratio = path.sigma(grid) / path.alpha(grid)
    tau = ratio / (1 + ratio)
    z = (1 - tau[0]) * X / path.alpha(grid[0])
    straight = sample(Euler(), exact(Linear()), z, tau)
    curved = sample(DDIM(), exact(path), X, grid)
    torch.testing.assert_close(straight, (1 - tau[-1]) * curved / path.alpha(grid[-1]), rtol=0, atol=1e-12)


def test_ddim_does_not_depend_on_the_path():
    grid = log_snr(VP(), 9, 4.0, 1e-2)
    ratio = VP().sigma(grid) / VP().alpha(grid)
    spread = sample(DDIM(), exact(VE()), X / VP().alpha(grid[0]), ratio)
    torch.testing.assert_close(spread, sample(DDIM(), exact(VP()), X, grid) / VP().alpha(grid[-1]), rtol=0, atol=1e-12)


def test_the_two_methods_called_exponential_differ():
    """In the step 1.3 -> 0.4 of the mixture by about a tenth of |x|."""
    t, u = torch.tensor([1.3, 0.4], dtype=torch.float64)
    steps = [sampler.step(exact(VP()), X, t, u, None)[0] for sampler in (ExponentialIntegrator(), DDIM())]
    assert float((steps[0] - steps[1]).abs().max()) == pytest.approx(0.317, abs=0.001)


@pytest.mark.parametrize("sampler", [DDIM(), VEDDIM(), DPM2(), DPMpp2M(), EDMHeun()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("path", [VP(), VE(), Linear()], ids=lambda path: type(path).__name__)
def test_a_point_mass_is_reached_in_one_step(sampler, path):
    prediction = Prediction(path, lambda x, t: torch.full_like(x, 0.7), "data")
    for stop in (0.0, 0.2):
        x = sample(sampler, prediction, X, torch.tensor([0.9, stop]))
        data = (x - path.sigma(torch.tensor(stop)) * prediction.noise(X, torch.tensor(0.9))) / path.alpha(
            torch.tensor(stop)
        )
        torch.testing.assert_close(data, torch.full_like(X, 0.7), rtol=0, atol=1e-6 if stop else 0)


def test_every_step_on_a_gaussian_is_the_product_of_its_matrices():
    """With a linear score s = -P x each method is a polynomial in the matrix of the equation, which commutes."""
    path, t, u = VP(), *torch.tensor([0.9, 0.6], dtype=torch.float64)
    scales = torch.tensor([0.25, 0.5, 2.0], dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]

    def factors(t):
        return path.alpha(t) ** 2 * scales**2 + path.sigma(t) ** 2

    def matrix(values):
        return rotation @ torch.diag(values) @ rotation.T

    def score(x, t):
        return -x @ matrix(1 / factors(t[0]))

    h, lam, m = t - u, path.log_snr, (t + u) / 2
    a = {time: 1 - 1 / factors(time) for time in (t, m, u)}  # -dx/dt = a x
    eps = {time: path.sigma(time) / factors(time) for time in (t, u, path.time((lam(t) + lam(u)) / 2))}
    ratio = path.alpha(u) / path.alpha(t)
    middle = next(time for time in eps if time not in (t, u))
    ei = torch.exp(h) - torch.expm1(h) / factors(t)
    ddim = ratio - path.sigma(u) * torch.expm1(lam(u) - lam(t)) * eps[t]
    span = path.sigma(u) - ratio * path.sigma(t)
    half = path.alpha(middle) / path.alpha(t) - path.sigma(middle) * torch.expm1((lam(u) - lam(t)) / 2) * eps[t]
    rk = (a[t], k2 := a[m] * (1 + h / 2 * a[t]), k3 := a[m] * (1 + h / 2 * k2), a[u] * (1 + h * k3))
    expected = {
        Euler: 1 + h * a[t],
        ExponentialIntegrator: ei,
        DDIM: ddim,
        VEDDIM: ddim,
        DPMpp2M: ddim,
        Heun: 1 + h / 2 * (a[t] + a[u] * (1 + h * a[t])),
        EDMHeun: ratio + span / 2 * (eps[t] + eps[u] * (ratio + span * eps[t])),
        DPM2: ratio - path.sigma(u) * torch.expm1(lam(u) - lam(t)) * eps[middle] * half,
        Midpoint: 1 + h * a[m] * (1 + h / 2 * a[t]),
        RK4: 1 + h / 6 * (rk[0] + 2 * rk[1] + 2 * rk[2] + rk[3]),
    }
    x = torch.randn(5, 3, dtype=torch.float64)
    for sampler, values in expected.items():
        found, _ = sampler().step(Prediction(path, score, "score"), x, t, u, None)
        torch.testing.assert_close(found, x @ matrix(values), rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def truth():
    return sample(RK4(), exact(VP()), X[10:31:5], log_snr(VP(), 240, 3.0, 5e-2))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_errors_fall_with_the_order_that_the_sampler_states(sampler, truth):
    grids = [log_snr(VP(), steps, 3.0, 5e-2) for steps in (30, 60)]
    errors = [float((sample(sampler(), exact(VP()), X[10:31:5], grid) - truth).abs().max()) for grid in grids]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(sampler.order, abs=0.2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_evaluations_are_counted_as_stated(sampler):
    calls = []
    prediction = Prediction(VP(), lambda x, t: calls.append(1) or 0.1 * x, "noise")
    sample(sampler(), prediction, X, uniform(VP(), 3, 2.0, 0.1))
    assert len(calls) == 3 * sampler.evaluations


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_way_to_noise_and_back_returns_up_to_the_error_of_the_method(sampler):
    prediction, errors = exact(VP()), []
    for steps in (15, 30):
        grid = log_snr(VP(), steps, 2.0, 5e-2)
        there = encode(sampler(), prediction, X[10:31], grid)
        errors.append(float((sample(sampler(), prediction, there, grid) - X[10:31]).abs().max()))
    assert errors[1] < 0.2
    assert math.log2(errors[0] / errors[1]) > sampler.order - 0.3


@pytest.mark.parametrize("sampler", [*SAMPLERS[2:4], *SAMPLERS[5:8]])
def test_the_last_step_onto_the_data_is_the_prediction_of_the_data(sampler):
    prediction, t = exact(VP()), torch.tensor(0.3, dtype=torch.float64)
    found, _ = sampler().step(prediction, X, t, 0 * t, None)
    torch.testing.assert_close(found, prediction.data(X, t), rtol=0, atol=1e-13)


def test_the_last_step_of_two_step_extrapolation_does_not_extrapolate():
    prediction, grid = exact(VP()), torch.tensor([2.0, 1.0, 0.3, 0.0])
    before, at = sample(DPMpp2M(), prediction, X, grid, trajectory=True)[-2:]
    torch.testing.assert_close(at, prediction.data(before, grid[2].double()), rtol=0, atol=1e-13)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["noise", "score"])
def test_all_samplers_reach_the_data_on_a_grid_that_ends_at_zero(sampler, kind):
    for path, start in ((VP(), 8.0), (VE(), 20.0)):
        x = sample(sampler(), exact(path, kind), X * path.sigma(torch.tensor(start)), karras(path, 20, start, 0.0))
        assert x.isfinite().all()
        assert (x.sort()[0] == x).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_velocity_is_integrated_from_pure_noise_to_data(sampler):
    noise = mixture_noise(Linear())

    def velocity(x, t):
        """(eps - x_0), with the limits of the mixture: x_0 is its mean at t = 1."""
        at_end = t >= 1
        safe = t.clamp(max=1 - 1e-6)
        eps = noise(x, safe)
        return torch.where(at_end, x, eps) - torch.where(at_end, torch.zeros_like(x), (x - safe * eps) / (1 - safe))

    x = sample(sampler(), Prediction(Linear(), velocity, "velocity"), X, uniform(Linear(), 20, 1.0, 0.0))
    assert x.isfinite().all()
    assert x.abs().max() < 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sample_may_have_times_of_its_own(sampler):
    """Each goes its way as if it were alone, also where only one of them falls back to a lower order."""
    prediction = exact(VP())
    grids = torch.stack([uniform(VP(), 6, 2.0, 0.0), log_snr(VP(), 6, 3.0, 1e-2), uniform(VP(), 6, 1.0, 0.2)], dim=1)
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = sample(sampler(), prediction, x, grids)
    alone = [sample(sampler(), prediction, x[i : i + 1], grids[:, i]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_states_stay_single_and_coefficients_stay_double(sampler):
    prediction, grid = exact(VP()), exponential_decay(VP(), 40, 8.0, 1e-3)
    single = sample(sampler(), prediction, X.float(), grid)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), sample(sampler(), prediction, X, grid), rtol=0, atol=2e-4)


def test_a_trajectory_has_all_states_and_progress_is_told():
    told, grid = [], uniform(VP(), 5, 2.0, 0.1)
    states = sample(
        Heun(), exact(VP()), X, grid, trajectory=True, progress=lambda done, steps: told.append((done, steps))
    )
    assert states.shape == (6, 41)
    assert told == [(k, 5) for k in range(1, 6)]
    torch.testing.assert_close(states[-1], sample(Heun(), exact(VP()), X, grid))


def test_guidance_reaches_every_sampler():
    for sampler in SAMPLERS:
        pulled = Prediction(VP(), mixture_noise(VP()), "noise", lambda x, t, data, velocity: velocity - 0.5)
        x, y = (sample(sampler(), p, X, log_snr(VP(), 6, 3.0, 0.05)) for p in (pulled, exact(VP())))
        assert (x > y + 0.05).all()


def test_times_that_rise_are_refused_before_anything_is_evaluated():
    def never(x, t):
        raise AssertionError

    with pytest.raises(ValueError, match="must fall strictly"):
        sample(DDIM(), Prediction(VP(), never, "noise"), X, torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="ends at t=0"):
        encode(DDIM(), Prediction(VP(), never, "noise"), X, torch.tensor([0.2, 0.0]))
