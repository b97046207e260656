"""Momentum in policy space: closed forms, and what a module's parameters do."""

import math

import pytest
import torch
from torch import nn

from lightning_modules.alignment.extrapolation import (
    check_momentum,
    extrapolate_,
    extrapolated_log_probs,
    fitted_weights,
    plain_steps,
)

ALPHAS = [-0.3, 0.3, 0.5, 0.9]


class Tabular(nn.Module):
    """A softmax over a table of logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def log_probs(self):
        return self.logits.log_softmax(-1)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_extrapolated_weights_of_a_tabular_softmax_are_the_sequence_formula(alpha):
    previous, fitted = Tabular(normal(6, seed=1)), Tabular(normal(6, seed=2))
    expected = extrapolated_log_probs(fitted.log_probs(), previous.log_probs(), alpha).log_softmax(-1)
    extrapolate_(fitted, fitted_weights(previous), alpha)
    torch.testing.assert_close(fitted.log_probs(), expected, rtol=0, atol=1e-12)


def test_extrapolated_weights_of_a_deep_network_are_not():
    def policy(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()

    x, previous, fitted = normal(3, 4), policy(1), policy(2)
    logs = [net(x).log_softmax(-1) for net in (fitted, previous)]
    expected = extrapolated_log_probs(*logs, 0.5).log_softmax(-1)
    extrapolate_(fitted, fitted_weights(previous), 0.5)
    assert (fitted(x).log_softmax(-1) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("alpha", [0.0, *ALPHAS])
def test_exact_rounds_with_momentum_follow_the_closed_form(alpha):
    reward, reference, beta = normal(20, seed=1), normal(20, seed=2).log_softmax(-1), 10.0
    policy, previous = Tabular(reference), fitted_weights(Tabular(reference))
    for step in range(1, 31):
        with torch.no_grad():
            policy.logits += reward / beta  # the exact minimiser of DPO under Bradley-Terry preferences
        expected = (reference + plain_steps(alpha, step) * reward / beta).log_softmax(-1)
        torch.testing.assert_close(policy.log_probs(), expected, rtol=0, atol=1e-9)
        fitted = fitted_weights(policy)
        extrapolate_(policy, previous, alpha)
        previous = fitted


def test_the_number_of_plain_steps():
    assert plain_steps(0.0, 200) == 200
    assert plain_steps(0.3, 200) == pytest.approx(285.10, abs=0.005)
    assert plain_steps(0.5, 200) == pytest.approx(398.0, abs=0.005)
    assert plain_steps(0.7, 5) == pytest.approx(sum((1 - 0.7**t) / 0.3 for t in range(1, 6)))


def test_no_momentum_touches_no_bit():
    module = nn.Linear(3, 3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    extrapolate_(module, {}, 0.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("alpha", [1.0, 1.5, -1.0, math.nan])
def test_a_momentum_that_diverges_is_refused(alpha):
    with pytest.raises(ValueError, match=r"model\.alpha="):
        check_momentum(alpha)


def test_tied_weights_move_once_and_buffers_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("angles", torch.arange(3.0))
            self.register_buffer("count", torch.tensor(3))

    module = Tied()
    previous = fitted_weights(module)
    with torch.no_grad():
        module.head.weight += 1.0
    fitted = module.head.weight.clone()
    module.angles += 1.0
    extrapolate_(module, previous, 0.5)
    torch.testing.assert_close(module.head.weight, fitted + 0.5)
    assert module.head.weight is module.embedding.weight
    assert module.angles.tolist() == [1.0, 2.0, 3.0]
    assert module.count == 3


def test_the_momentum_of_a_small_learning_rate_survives_in_float32_and_bfloat16_weights_are_refused():
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    previous = fitted_weights(module)
    with torch.no_grad():
        module.weight += 5e-7
    step = (module.weight - 1).item()
    extrapolate_(module, previous, 0.5)
    assert module.weight.item() - 1 == pytest.approx(1.5 * step, abs=1.2e-7)
    with pytest.raises(ValueError, match=r"policy\.dtype=float32"):
        extrapolate_(module.bfloat16(), previous, 0.5)


def test_weights_of_another_model_are_refused():
    with pytest.raises(ValueError, match="of another model, bias is in one only"):
        extrapolate_(nn.Linear(2, 2), fitted_weights(nn.Linear(2, 2, bias=False)), 0.5)


def dpo(a, b, beta=0.5):
    return -nn.functional.logsigmoid(beta * (a - b)).mean()


def test_a_reference_without_its_normalisation_is_exact_for_differences_and_not_for_points():
    fitted, previous, alpha = normal(5, seed=3).log_softmax(-1), normal(5, seed=4).log_softmax(-1), 0.6
    loose = extrapolated_log_probs(fitted, previous, alpha)
    whole = loose.log_softmax(-1)
    better, worse = [0, 1, 3], [2, 4, 0]
    results = []
    for reference in (whole, loose):
        policy = normal(5, seed=5).requires_grad_()
        logs = policy.log_softmax(-1)
        loss = dpo(logs[better] - reference[better], logs[worse] - reference[worse])
        results.append((loss, *torch.autograd.grad(loss, policy)))
    for exact, cheap in zip(*results):
        torch.testing.assert_close(exact, cheap, rtol=0, atol=1e-12)
    log_z = loose.logsumexp(0)
    points = [(normal(5, seed=5).log_softmax(-1) - reference)[better] for reference in (whole, loose)]
    torch.testing.assert_close(points[0] - points[1], log_z.expand(3))
    assert log_z.abs() > 1e-2
