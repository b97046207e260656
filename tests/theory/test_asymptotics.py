"""Coverage and closed-form rates against their definitions: suprema, pseudo-inverses, simulations of the errors."""

import math

import pytest
import torch

from datamodules.bandit_instances import linear, mdp, skewed
from lightning_modules.theory.asymptotics import (
    coverage,
    divergence,
    duelling_divergence,
    fisher,
    linear_rate,
    mean_divergence,
    preference_rate,
    table_rate,
)
from lightning_modules.theory.regularizer import KL
from lightning_modules.theory.soft_mdp import as_process, gap, growth, objective, occupancy, optimal


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def policies(draw: torch.Generator, contexts: int, actions: int) -> torch.Tensor:
    return torch.randn(contexts, actions, generator=draw, dtype=torch.float64).softmax(-1)


def generic(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sup over functions, as |phi|^2 in the pseudo-inverse of the weighted second moments."""
    moments = rows.T @ (weights[:, None] * rows)
    return ((rows @ torch.linalg.pinv(moments, hermitian=True)) * rows).sum(-1)


def test_the_divergence_of_tables_and_of_features_is_the_supremum(draw):
    contexts, policy = policies(draw, 1, 3)[0], policies(draw, 3, 4)
    weights = (contexts[:, None] * policy).flatten()
    closed = divergence(policy, contexts).flatten() ** 2
    torch.testing.assert_close(closed, generic(torch.eye(12).double(), weights), rtol=1e-9, atol=0)
    features = torch.randn(3, 4, 2, generator=draw, dtype=torch.float64)
    closed = divergence(policy, contexts, features).flatten() ** 2
    torch.testing.assert_close(closed, generic(features.flatten(0, 1), weights), rtol=1e-9, atol=0)
    functions = torch.randn(20_000, 2, generator=draw, dtype=torch.float64) @ features.flatten(0, 1).T
    ratios = functions**2 / (weights * functions**2).sum(-1, keepdim=True)
    assert (ratios.amax(0) <= closed + 1e-9).all()
    torch.testing.assert_close(ratios.amax(0), closed, rtol=0.01, atol=0)


def test_the_duelling_divergence_is_the_supremum_up_to_a_shift(draw):
    policy = policies(draw, 1, 6)
    centred = torch.eye(6).double() - policy  # row a is what is left of e_a without its mean under the policy
    squared = ((centred @ torch.linalg.pinv(centred.T @ (policy.T * centred), hermitian=True)) * centred).sum(-1)
    closed = duelling_divergence(policy, torch.ones(1).double())[0] ** 2
    torch.testing.assert_close(closed, squared, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(closed, 1 / policy[0] - 1)


def test_features_of_single_actions_are_tables(draw):
    contexts, policy, behaviour = policies(draw, 1, 3)[0], policies(draw, 3, 4), policies(draw, 3, 4)
    features = torch.eye(12).double().unflatten(0, (3, 4))
    rate = linear_rate(policy, behaviour, features, contexts, eta=2.0, noise=0.7, radius=0.3)
    assert rate == pytest.approx(table_rate(policy, behaviour, eta=2.0, noise=0.7, radius=0.3), rel=1e-10)


def test_rates_at_the_numbers_of_the_derivation():
    def rate(p: float, radius: float = 0.0) -> float:
        bandit = skewed([0.6, 0.4], p, None, 4.0, 0.5)
        return table_rate(
            KL().weights(bandit.log_reference, bandit.reward, 4.0), bandit.log_reference.exp(), 4.0, 0.5, radius
        )

    assert rate(0.5) == pytest.approx(0.428, abs=5e-4)
    assert rate(0.1) == pytest.approx(0.883, abs=5e-4)
    assert rate(0.1, radius=0.5 * math.sqrt(2 * math.log(4 / 0.05))) == pytest.approx(3.98, abs=5e-3)


def test_online_a_plug_in_pays_for_every_action_but_one(draw):
    policy = policies(draw, 1, 5)
    assert table_rate(policy, policy, eta=2.0, noise=0.5) == pytest.approx(2.0 * 0.25 * 4 / 2, rel=1e-12)


def test_the_information_of_pairs_is_the_curvature_of_their_likelihood(draw):
    policy, reward = policies(draw, 1, 4), torch.rand(1, 4, generator=draw, dtype=torch.float64)
    chance = torch.sigmoid(reward[0, :, None] - reward[0, None, :]) * policy[0, :, None] * policy[0, None, :]

    def loss(scores: torch.Tensor) -> torch.Tensor:
        return -2 * (chance * torch.nn.functional.logsigmoid(scores[:, None] - scores[None, :])).sum()

    hessian = torch.autograd.functional.hessian(loss, reward[0])
    torch.testing.assert_close(fisher(policy, reward)[0], hessian, rtol=0, atol=1e-12)


def test_the_rate_of_pairs_is_the_mean_gap_of_gaussian_scores(draw):
    bandit = skewed([1.0, 0.4, 0.2, 0.0], 0.25, None, 3.0, 0.5)
    weights = KL().weights(bandit.log_reference, bandit.reward, 3.0)
    policy = bandit.log_reference.exp()
    covariance = torch.linalg.pinv(fisher(policy, bandit.reward)[0], hermitian=True)
    values, vectors = torch.linalg.eigh(covariance)
    error = torch.randn(50_000, 4, generator=draw, dtype=torch.float64) * values.clamp(min=0).sqrt() @ vectors.T
    learned = KL().log_policy(bandit.log_reference, bandit.reward + 1e-3 * error, 3.0)
    mean = KL().gap(bandit.log_reference, bandit.reward, learned, 3.0).mean() / 1e-6
    rate = preference_rate(weights, [(1.0, policy)], bandit.reward, 3.0)
    assert rate == pytest.approx(5.25, abs=0.005)
    assert float(mean) == pytest.approx(rate, rel=0.02)


def test_a_coverage_can_be_asked_for_and_is_then_there():
    bandit = skewed([1.0, 0.4, 0.2, 0.0], None, 16.0, 6.0, 0.5)
    log_best = KL().log_policy(bandit.log_reference, bandit.reward, 6.0)
    assert coverage(log_best, bandit.log_reference) == pytest.approx(16.0, rel=1e-12)
    distance = mean_divergence(log_best.exp(), divergence(bandit.log_reference.exp(), bandit.contexts), bandit.contexts)
    assert distance <= 4 * 16.0


def test_the_gap_of_a_process_is_what_its_objective_lacks(draw):
    process, eta = mdp(3, 4, 3, 0.25, 0), 2.0
    _, log_best = optimal(process, eta)
    log_policy = torch.randn(200, 3, 4, 3, generator=draw, dtype=torch.float64).log_softmax(-1)
    lacking = objective(process, log_best, eta) - objective(process, log_policy, eta)
    torch.testing.assert_close(gap(process, log_policy, log_best, eta), lacking, rtol=0, atol=1e-12)
    assert (lacking >= 0).all()
    assert occupancy(process, log_policy).sum((-1, -2)).flatten().numpy() == pytest.approx(1)


def test_the_growth_of_a_process_of_one_step_is_that_of_a_bandit(draw):
    bandit, eta = skewed([0.9, 0.4, 0.2, 0.0], 0.3, None, 2.0, 0.5), 2.0
    best = KL().weights(bandit.log_reference, bandit.reward, eta)
    assert growth(as_process(bandit), eta, 0.3) == pytest.approx(table_rate(best, best, eta, 0.5, 0.3), rel=1e-10)


def test_the_growth_of_a_process_is_the_mean_gap_of_least_squares_with_those_counts(draw):
    """Rewards and successors of every pair are estimated from n d*_h(s, a) visits, then planned with."""
    process, eta, n = mdp(2, 3, 2, 0.25, 1), 2.0, 20_000
    _, log_best = optimal(process, eta)
    count = (n * occupancy(process, log_best)).clamp(min=1e-9)
    runs = 4000
    reward = process.reward + 0.25 * count.rsqrt() * torch.randn(runs, 2, 3, 2, generator=draw, dtype=torch.float64)
    moved = torch.distributions.Dirichlet(process.transition[0] * count[0][..., None] + 1e-12)
    torch.manual_seed(0)
    transition = moved.sample((runs,))
    last = (process.log_reference[1] + eta * reward[:, 1]).logsumexp(-1) / eta
    first = reward[:, 0] + torch.einsum("rsat,rt->rsa", transition, last)
    learned = (process.log_reference + eta * torch.stack([first, reward[:, 1]], 1)).log_softmax(-1)
    learned = torch.where(count > 1, learned, log_best)
    mean = n * gap(process, learned, log_best, eta).mean()
    assert float(mean) == pytest.approx(growth(process, eta), rel=0.05)


def test_linear_instances_lie_on_the_sphere():
    bandit = linear(20, 5, 4, 0.5, 0)
    assert bandit.features.norm(dim=-1).flatten().numpy() == pytest.approx(1)
    assert bandit.contexts.sum() == pytest.approx(1)
