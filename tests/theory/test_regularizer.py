"""Exact gaps: the identities behind every regret, and the inequalities that optimism and pessimism rest on."""

import math

import numpy as np
import pytest
import torch

from lightning_modules.theory.regularizer import KL, ChiSquare, water_level

EXACT = {"rtol": 0, "atol": 1e-12}
DIVERGENCES = pytest.mark.parametrize("divergence", [KL(), ChiSquare()], ids=["kl", "chi_square"])


def instances(count: int, actions: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log reference, reward in [0, 1] and another policy of `count` random bandits."""
    draw = torch.Generator().manual_seed(seed)
    log_reference, log_policy = (
        torch.randn(count, actions, generator=draw, dtype=torch.float64).log_softmax(-1) for _ in range(2)
    )
    return log_reference, torch.rand(count, actions, generator=draw, dtype=torch.float64), log_policy


@DIVERGENCES
@pytest.mark.parametrize("eta", [0.3, 3.0, 30.0])
def test_the_gap_is_what_the_objective_lacks_of_its_optimum(divergence, eta):
    log_reference, reward, log_policy = instances(500)
    best = divergence.log_policy(log_reference, reward, eta)
    lacking = divergence.objective(log_reference, reward, best, eta) - divergence.objective(
        log_reference, reward, log_policy, eta
    )
    gap = divergence.gap(log_reference, reward, log_policy, eta)
    torch.testing.assert_close(gap, lacking, **EXACT)
    assert (gap >= 0).all()
    torch.testing.assert_close(divergence.gap(log_reference, reward, best, eta), torch.zeros(500).double(), **EXACT)


@DIVERGENCES
def test_near_the_optimum_the_gap_is_the_quadratic_form_of_the_weights(divergence):
    log_reference, reward, _ = instances(100)
    eta, error = 2.0, 1e-4 * torch.randn(100, 5, generator=torch.Generator().manual_seed(1)).double()
    weights = divergence.weights(log_reference, reward, eta)
    mean = (weights * error).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    form = eta / 2 * (weights * (error - mean) ** 2).sum(-1)
    gap = divergence.gap(log_reference, reward, divergence.log_policy(log_reference, reward + error, eta), eta)
    torch.testing.assert_close(gap, form, rtol=2e-3, atol=0)


@DIVERGENCES
def test_a_function_of_the_context_changes_nothing(divergence):
    log_reference, reward, _ = instances(100)
    moved = divergence.log_policy(log_reference, reward + torch.arange(100.0).double()[:, None], 2.0)
    torch.testing.assert_close(moved, divergence.log_policy(log_reference, reward, 2.0), rtol=0, atol=1e-11)


def test_the_optimum_has_its_limits_in_the_temperature():
    log_reference, reward, _ = instances(100)
    kl = KL()
    policy = log_reference.exp()
    mean = (policy * reward).sum(-1)
    variance = (policy * reward**2).sum(-1) - mean**2
    gain = kl.optimum(log_reference, reward, 1e-4) - mean
    torch.testing.assert_close(gain / 1e-4, variance / 2, rtol=1e-3, atol=0)
    torch.testing.assert_close(kl.log_policy(log_reference, reward, 1e-9), log_reference, rtol=0, atol=1e-8)
    greedy = (reward + log_reference / 1e3).amax(-1)
    torch.testing.assert_close(kl.optimum(log_reference, reward, 1e3), greedy, rtol=0, atol=math.log(5) / 1e3)


def test_nothing_overflows_at_the_largest_temperatures():
    log_reference, reward, log_policy = instances(200)
    one_action = torch.full_like(reward, -torch.inf)
    one_action[:, 0] = 0
    for policy in (log_policy, one_action, KL().log_policy(log_reference, 1 - reward, 1e4)):
        gap = KL().gap(log_reference, reward, policy, 1e4)
        assert gap.isfinite().all()
        assert (gap >= 0).all()
    expected = -KL().log_policy(log_reference, reward, 1e4)[:, 0] / 1e4
    torch.testing.assert_close(KL().gap(log_reference, reward, one_action, 1e4), expected, **EXACT)


def test_small_gaps_keep_their_digits():
    log_reference, reward, _ = instances(50)
    error = 1e-7 * torch.randn(50, 5, generator=torch.Generator().manual_seed(1)).double()
    weights = KL().weights(log_reference, reward, 1.0)
    form = 0.5 * ((weights * error**2).sum(-1) - (weights * error).sum(-1) ** 2)
    gap = KL().gap(log_reference, reward, KL().log_policy(log_reference, reward + error, 1.0), 1.0)
    torch.testing.assert_close(gap, form, rtol=1e-5, atol=0)  # of 1e-14


def test_pessimism_and_optimism_bound_the_gap_by_the_squared_error_and_over_estimation_does_not():
    """Offline, g <= r: gap <= eta E_{pi*} (g - r)^2. Online, f >= r: gap <= eta E_{pi_f} (f - r)^2."""
    log_reference, reward, _ = instances(20_000)
    draw = torch.Generator().manual_seed(2)
    error = 2 * torch.rand(20_000, 5, generator=draw, dtype=torch.float64) ** 2
    eta = torch.rand(20_000, 1, generator=draw, dtype=torch.float64) * 5
    violations = {}
    for name, sign in {"pessimism": -1, "optimism": 1}.items():
        learned = (log_reference + eta * (reward + sign * error)).log_softmax(-1)
        best = (log_reference + eta * reward).log_softmax(-1)
        gap = (learned.exp() * (learned - best)).sum(-1) / eta[:, 0]
        for under, policy in {"pi*": best, "pi_f": learned}.items():
            bound = eta[:, 0] * (policy.exp() * error**2).sum(-1)
            violations[name, under] = int((gap > bound + 1e-12).sum())
    assert violations["pessimism", "pi*"] == 0
    assert violations["optimism", "pi_f"] == 0
    assert violations["optimism", "pi*"] > 100  # the negative control: about one in twenty-five


def test_water_fills_as_the_conditions_of_the_optimum_say():
    log_reference, value, _ = instances(300)
    for eta in (0.1, 2.0, 50.0):
        policy = ChiSquare().log_policy(log_reference, value, eta).exp()
        level = water_level(log_reference.exp(), value, eta)
        slack = value - (policy / log_reference.exp() - 1) / eta - level
        assert policy.sum(-1) == pytest.approx(1, abs=1e-12)
        assert slack[policy > 0].abs().max() < 1e-9
        assert (slack[policy == 0] < 1e-9).all()
    assert (policy == 0).any()


def test_water_filling_is_the_best_policy_of_a_grid():
    reference, value, eta = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([0.9, 0.1, 0.6]).double(), 3.0
    steps = np.linspace(0, 1, 401)
    first, second = np.meshgrid(steps, steps)
    grid = torch.from_numpy(np.stack([first, second, 1 - first - second], -1)[first + second <= 1])
    values = ChiSquare().objective(reference.log(), value, grid.clamp(min=0).log(), eta)
    found = ChiSquare().log_policy(reference.log(), value, eta).exp()
    torch.testing.assert_close(found, grid[values.argmax()], rtol=0, atol=0.005)
    assert ChiSquare().objective(reference.log(), value, found.log(), eta) >= values.max()


def test_little_chi_square_regularisation_is_linear_in_the_reward():
    log_reference, value, _ = instances(100)
    eta, policy = 1e-3, log_reference.exp()
    linear = policy * (1 + eta * (value - (policy * value).sum(-1, keepdim=True)))
    torch.testing.assert_close(ChiSquare().log_policy(log_reference, value, eta).exp(), linear, **EXACT)
