"""APO with exact steps and with sampled labels, at the numbers of the derivation."""

import pytest
import torch

from datamodules.bandit import Bandits
from datamodules.bandit_instances import random_answers
from lightning_modules.theory.momentum import (
    acceleration,
    exact_fit,
    extrapolated,
    sampled_fit,
    sampled_pairs,
    suboptimality_bound,
)
from lightning_modules.theory.preference_bandit import PreferenceBandit

TABLE = {  # what exact APO lacks of the best reward after 1, 10, 30, 100, 400 rounds
    0.0: (0.4504, 0.3365, 0.1678, 0.05330, 0.01781),
    0.3: (0.4504, 0.2958, 0.1180, 0.04103, 0.01339),
    0.5: (0.4504, 0.2535, 0.0850, 0.03183, 0.00979),
    0.9: (0.4504, 0.1206, 0.0299, 0.00834, 1.6e-5),
}
SAMPLED = {  # mean reward after 1, 2, 3, 5, 8 rounds: (alpha, control)
    (0.0, "none"): (2.793, 3.237, 3.410, 3.526, 3.589),
    (0.3, "none"): (2.793, 3.308, 3.464, 3.562, 3.619),
    (0.6, "none"): (2.793, 3.359, 3.508, 3.599, 3.652),
    (0.3, "beta_rescaled"): (3.016, 3.389, 3.490, 3.570, 3.620),
    (0.6, "beta_rescaled"): (3.318, 3.517, 3.570, 3.628, 3.659),
}
AT = [1, 2, 3, 5, 8]


def bandit(scale: float, rounds: int) -> Bandits:
    return Bandits("bandit", random_answers(20, scale, problem=0), log=None, rounds=rounds, chunk=1, limit=None)


def method(**settings) -> PreferenceBandit:
    settings = {"beta": 2.0, "alpha": 0.0, "pairs": 2000, "copies": 20, "control": "none", "seed": 1} | settings
    return PreferenceBandit(**settings, at=AT)


@pytest.mark.parametrize("alpha", TABLE)
def test_exact_rounds_lack_of_the_best_reward_what_the_table_says(alpha):
    run = method(beta=10.0, alpha=alpha, pairs=0)
    run.meet(bandit(1.0, 400))
    lacks = [float(run.play([number])["suboptimality"]) for number in range(400)]
    assert [lacks[n - 1] for n in (1, 10, 30, 100, 400)] == pytest.approx(TABLE[alpha], rel=0.01)


@pytest.mark.parametrize("alpha", [-0.3, 0.0, 0.3, 0.5, 0.9])
def test_momentum_multiplies_the_rounds(alpha):
    data, beta = bandit(1.0, 1), 10.0
    reward = data.instance.reward[0]
    policy = before = data.instance.log_reference[0]
    for number in range(1, 201):
        fitted = exact_fit(policy, reward, beta)
        policy, before = extrapolated(fitted, before, alpha), fitted
        closed = (data.instance.log_reference[0] + acceleration(number, alpha) * reward / beta).log_softmax(-1)
        torch.testing.assert_close(fitted, closed, rtol=0, atol=1e-9)
        lacks = reward.max() - fitted.exp() @ reward
        assert lacks <= suboptimality_bound(number, alpha, beta, float(data.instance.log_reference[0, 0]))


def test_the_rounds_that_momentum_is_worth():
    assert acceleration(200, 0.3) == pytest.approx(285.10, abs=0.005)
    assert acceleration(200, 0.5) == pytest.approx(398.0, abs=0.005)
    assert acceleration(200, 0.0) == 200


def test_a_fit_to_many_labels_is_nearly_the_exact_one():
    data, draw = bandit(1.0, 1), torch.Generator().manual_seed(0)
    reference, reward = data.instance.log_reference, data.instance.reward[0]
    pairs = sampled_pairs(reference, reward, 1_000_000, draw)
    found = sampled_fit(reference, *pairs, beta=2.0, penalty=0.0)
    torch.testing.assert_close(found, exact_fit(reference, reward, 2.0), rtol=0, atol=0.02)


def test_sampled_labels_reach_the_rewards_of_the_table_and_the_control_is_as_good_as_momentum():
    reached = {}
    for alpha, control in SAMPLED:
        run = method(alpha=alpha, control=control)
        run.meet(bandit(4.0, 8))
        rewards = [run.play([number])["reward"].mean().item() for number in range(8)]
        reached[alpha, control] = [rewards[n - 1] for n in AT]
        assert reached[alpha, control] == pytest.approx(SAMPLED[alpha, control], abs=0.02)
    plain = reached[0.0, "none"]
    for alpha in (0.3, 0.6):
        momentum, control = reached[alpha, "none"], reached[alpha, "beta_rescaled"]
        assert all(m > p for m, p in zip(momentum[1:], plain[1:]))
        assert all(c > m - 0.003 for c, m in zip(control, momentum))


def test_a_momentum_that_diverges_is_refused():
    with pytest.raises(ValueError, match=r"alpha=1.0 must lie"):
        method(alpha=1.0)
    with pytest.raises(ValueError, match=r"beta=-1.0 must be positive"):
        method(beta=-1.0)
