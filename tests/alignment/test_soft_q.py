import inspect
import math
from functools import partial

import pytest
import torch
from torch import Tensor
from tree_mdp import TreeMDP, random_policy, trajectory_batch

from datamodules.batches import TrajectoryBatch
from lightning_modules.alignment.soft_q import (
    dqo,
    dro,
    first_token,
    full_kl,
    importance_weights,
    k3,
    last_token,
    masked_sum,
    shaped_rewards,
    soft_returns,
    weighted_square,
)

BETA = 0.3
LAMBDAS = [0.0, 0.3, 0.7, 1.0]


def ragged(seed: int = 0, rows: int = 6, steps: int = 9) -> tuple[Tensor, Tensor, TrajectoryBatch]:
    """Log-probabilities, values and a batch with prompts and responses of unequal length, float64."""
    torch.manual_seed(seed)
    start = torch.randint(0, 3, (rows, 1))
    length = torch.randint(1, steps - 3, (rows, 1))
    position = torch.arange(steps)
    mask = (position >= start) & (position < start + length)
    log_probs, lp_mu, lp_ref = (torch.randn(3, rows, steps, dtype=torch.float64) * 0.4 - 1) * mask
    values, rewards = torch.randn(2, rows, steps, dtype=torch.float64) * mask
    outcome = torch.tensor([1.0, 0.0] * (rows // 2), dtype=torch.float64)
    return log_probs, values, trajectory_batch(rewards, lp_mu, lp_ref, mask, outcome)


def losses_and_gradients(objective, log_probs: Tensor, values: Tensor, batch: TrajectoryBatch) -> list[Tensor]:
    log_probs, values = log_probs.clone().requires_grad_(), values.clone().requires_grad_()
    losses = objective(log_probs=log_probs, values=values, batch=batch)
    (policy_gradient,) = torch.autograd.grad(losses.policy, log_probs)
    (value_gradient,) = torch.autograd.grad(losses.value, values)
    return [losses.policy.detach(), losses.value.detach(), policy_gradient, value_gradient]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# the optimum


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("policy_target", ["paper", "td"])
def test_residuals_vanish_at_the_closed_form_optimum(lam: float, policy_target: str) -> None:
    tree = TreeMDP.random()
    optimal_values, log_pi = tree.soft_optimum(BETA)
    states, actions = tree.paths()
    at = (states, actions)
    assert len(states) == 27
    for path in range(27):
        mu = random_policy(*tree.rewards.shape)
        row = tuple(index[path : path + 1] for index in at)
        batch = trajectory_batch(tree.rewards[row], mu[row], tree.log_ref[row])
        losses = dqo(log_pi[row], optimal_values[row[0]], batch, beta=BETA, lam=lam, policy_target=policy_target)
        assert losses.policy.sqrt() < 1e-12
        assert losses.value.sqrt() < 1e-12


def behaviour_of_sixty_fourths(tree: TreeMDP, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A policy whose path probabilities are multiples of 1/64: a batch that repeats paths is its exact expectation."""
    torch.manual_seed(seed)
    order = torch.rand(tree.rewards.shape).argsort(1)
    log_mu = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)[order].log()
    copies = (64 * tree.path_probabilities(log_mu)).round().long()
    assert copies.sum() == 64
    return log_mu, copies


def gradient_descent(tree: TreeMDP, beta: float, iterations: int, **hyperparameters) -> tuple[Tensor, Tensor]:
    """Tabular values and log-policy after steps of 0.5 per state on the expected losses."""
    log_mu, copies = behaviour_of_sixty_fourths(tree)
    states, actions = (index.repeat_interleave(copies, 0) for index in tree.paths())
    batch = trajectory_batch(*(table[states, actions] for table in (tree.rewards, log_mu, tree.log_ref)))
    # undoes the weight of a state in the losses, which is its visits over the horizon
    step = 0.5 * tree.horizon / (2 * tree.visitation(log_mu))
    values = torch.zeros(len(tree.rewards), dtype=torch.float64, requires_grad=True)
    logits = tree.log_ref.clone().requires_grad_()
    for _ in range(iterations):
        log_pi = logits.log_softmax(1)[states, actions]
        losses = dqo(log_pi, values[states], batch, beta=beta, **hyperparameters)
        (policy_gradient,) = torch.autograd.grad(losses.policy, logits)
        (value_gradient,) = torch.autograd.grad(losses.value, values)
        with torch.no_grad():
            logits -= step[:, None] / beta**2 * policy_gradient
            values -= step * value_gradient
    return values.detach(), logits.detach().log_softmax(1)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gradient_steps_converge_to_the_closed_form(lam: float) -> None:
    tree = TreeMDP.random()
    optimal_values, optimal_log_pi = tree.soft_optimum(BETA)
    values, log_pi = gradient_descent(tree, BETA, 1500, lam=lam, weights="none")
    assert (log_pi.exp() - optimal_log_pi.exp()).abs().max() < 1e-6
    assert (values[0] - optimal_values[0]).abs() < 1e-6


def regularised_value(tree: TreeMDP, log_pi: Tensor, beta: float) -> Tensor:
    at = tree.paths()
    mask = torch.ones_like(at[0], dtype=torch.bool)
    log_ratios = (log_pi - tree.log_ref)[at]
    returns = soft_returns(tree.rewards[at], log_ratios, torch.zeros_like(log_ratios), mask, beta, 1.0)
    return tree.path_probabilities(log_pi) @ returns[:, 0]


def test_truncated_weights_learn_what_the_optimal_policy_visits() -> None:
    tree = TreeMDP.random()
    optimal_values, optimal_log_pi = tree.soft_optimum(BETA)
    _, log_pi = gradient_descent(tree, BETA, 1500, lam=1.0, weights="both")
    distance = (log_pi.exp() - optimal_log_pi.exp()).abs().amax(1)
    assert optimal_values[0] - regularised_value(tree, log_pi, BETA) < 1e-3
    assert tree.visitation(optimal_log_pi) @ distance / tree.horizon < 1e-3


def test_suboptimality_is_the_divergence_from_the_optimal_policy() -> None:
    tree = TreeMDP.random(seed=3)
    optimal_values, optimal_log_pi = tree.soft_optimum(BETA)
    log_pi = random_policy(*tree.rewards.shape)
    divergence = (log_pi.exp() * (log_pi - optimal_log_pi)).sum(1)
    gap = optimal_values[0] - regularised_value(tree, log_pi, BETA)
    torch.testing.assert_close(gap, BETA * tree.visitation(log_pi) @ divergence, rtol=0, atol=1e-12)


# returns


def golden_vector() -> tuple[Tensor, Tensor, TrajectoryBatch]:
    d, values, rewards = torch.tensor([[[0.2, -0.1, 0.3]], [[0.5, 0.6, 0.7]], [[0.0, 0, 1]]], dtype=torch.float64)
    reference = torch.full_like(d, -1.5)
    return reference + d, values, trajectory_batch(rewards, reference + d, reference)


@pytest.mark.parametrize(
    ("lam", "returns", "value_loss", "policy_loss"),
    [
        (0.0, [0.58, 0.71, 0.97], 0.03046667, 0.08446667),
        (0.5, [0.7025, 0.845, 0.97], 0.05797708, 0.10764167),
        (0.95, [0.928175, 0.9665, 0.97], 0.13018536, 0.13888742),
        (1.0, [0.96, 0.98, 0.97], 0.14296667, 0.14296667),
    ],
)
@pytest.mark.parametrize("normalise", ["sequence", "token"])
def test_golden_vector(lam: float, returns: list[float], value_loss: float, policy_loss: float, normalise: str) -> None:
    log_probs, values, batch = golden_vector()
    log_ratios = log_probs - batch["lp_ref"]
    G = soft_returns(batch["rewards"], log_ratios, values, batch["mask"], 0.1, lam)
    assert G.tolist() == [pytest.approx([*returns, 0.0], abs=1e-12)]
    losses = dqo(log_probs, values, batch, beta=0.1, lam=lam, normalise=normalise)
    assert losses.value.item() == pytest.approx(value_loss, abs=5e-9)
    assert losses.policy.item() == pytest.approx(policy_loss, abs=5e-9)


def n_step_return(rewards, log_ratios, values, beta: float, h: int, n: int):
    """G^(n)(s_h) of one response, with V(s_T) = 0."""
    bootstrap = values[h + n] if h + n < len(values) else 0.0
    return sum(rewards[h + i] - beta * log_ratios[h + i] for i in range(n)) + bootstrap


@pytest.mark.parametrize("lam", LAMBDAS)
def test_returns_are_the_mixture_of_n_step_returns(lam: float) -> None:
    log_probs, values, batch = ragged()
    mask, log_ratios = batch["mask"], log_probs - batch["lp_ref"]
    G = soft_returns(batch["rewards"], log_ratios, values, mask, BETA, lam)
    for i in range(len(mask)):
        r, d, V = (x[i][mask[i]] for x in (batch["rewards"], log_ratios, values))
        T = len(r)
        for h in range(T):
            n_step = [n_step_return(r, d, V, BETA, h, n) for n in range(1, T - h + 1)]
            mixture = sum((1 - lam) * lam ** (n - 1) * n_step[n - 1] for n in range(1, T - h))
            mixture = mixture + lam ** (T - h - 1) * n_step[-1]
            torch.testing.assert_close(G[i, :-1][mask[i]][h], mixture, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_returns_are_values_plus_generalised_advantages(lam: float) -> None:
    log_probs, values, batch = ragged()
    mask, log_ratios = batch["mask"], log_probs - batch["lp_ref"]
    G = soft_returns(batch["rewards"], log_ratios, values, mask, BETA, lam)
    for i in range(len(mask)):
        r, d, V = (x[i][mask[i]] for x in (batch["rewards"], log_ratios, values))
        temporal_differences = r - BETA * d + torch.cat([V[1:], V.new_zeros(1)]) - V
        powers = lam ** torch.arange(len(V), dtype=torch.float64)
        advantages = torch.stack([temporal_differences[h:] @ powers[: len(V) - h] for h in range(len(V))])
        torch.testing.assert_close(G[i, :-1][mask[i]], V + advantages, rtol=0, atol=1e-12)


def test_returns_are_zero_outside_the_response() -> None:
    log_probs, values, batch = ragged()
    G = soft_returns(batch["rewards"], log_probs - batch["lp_ref"], values, batch["mask"], BETA, 0.7)
    assert (G[:, :-1][~batch["mask"]] == 0).all()
    assert (G[:, -1] == 0).all()


def test_td_target_makes_both_losses_equal_at_any_lambda() -> None:
    log_probs, values, batch = ragged()
    for lam in LAMBDAS:
        losses = dqo(log_probs, values, batch, beta=BETA, lam=lam, policy_target="td")
        torch.testing.assert_close(losses.policy, losses.value, rtol=0, atol=1e-12)


# importance weights


def test_weights_are_truncated_at_e_and_never_from_below() -> None:
    sums = torch.tensor([-2.0, 0, 0.5, 1, 3])
    log_ratios = torch.stack([sums - 7, torch.full_like(sums, 7.0)], dim=1)
    weights = importance_weights(log_ratios, torch.zeros_like(log_ratios), torch.ones(5, 2, dtype=torch.bool))
    assert weights.tolist() == pytest.approx([0.135335, 1, 1.648721, 2.718282, 2.718282], abs=1e-6)


def test_weights_survive_huge_ratios_and_garbage_outside_the_mask() -> None:
    log_probs = torch.tensor([[-1e4, math.nan], [1e4, math.inf]], requires_grad=True)
    mask = torch.tensor([[True, False]] * 2)
    weights = importance_weights(log_probs, torch.zeros(2, 2), mask)
    assert weights.tolist() == pytest.approx([0.0, math.e])
    assert not weights.requires_grad


def test_weights_are_one_on_the_sampler_itself() -> None:
    log_probs, _, batch = ragged()
    assert (importance_weights(log_probs, log_probs, batch["mask"]) == 1).all()


@pytest.mark.parametrize(
    ("given", "summed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_weights_are_summed_in_single_precision_or_better(given: torch.dtype, summed: torch.dtype) -> None:
    log_probs = torch.full((1, 300), -0.001, dtype=given)
    weights = importance_weights(log_probs, torch.zeros_like(log_probs), log_probs < 0)
    assert weights.dtype == summed
    assert weights.item() == pytest.approx(math.exp(-0.3), rel=2e-3)


def test_weights_scale_the_losses_they_are_asked_to() -> None:
    log_probs, values, batch = ragged(rows=2)
    batch["lp_mu"] = log_probs - 5.0 * batch["mask"]  # every weight is the cap
    weighted, policy_only, plain = (
        dqo(log_probs, values, batch, beta=BETA, weights=weights, cap=3.0) for weights in ("both", "policy", "none")
    )
    torch.testing.assert_close(weighted.policy, 3 * plain.policy)
    torch.testing.assert_close(weighted.value, 3 * plain.value)
    torch.testing.assert_close(policy_only.policy, 3 * plain.policy)
    torch.testing.assert_close(policy_only.value, plain.value)


# reductions


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_one_step_dqo_is_twice_dro(lam: float) -> None:
    log_probs, values, batch = ragged(rows=8)
    batch["mask"] = first_token(batch["mask"])
    once = losses_and_gradients(partial(dqo, beta=BETA, lam=lam, weights="none"), log_probs, values, batch)
    twice = losses_and_gradients(partial(dro, beta=BETA), log_probs, values, batch)
    assert_same(once, [2 * x for x in twice])


def test_dro_regresses_the_whole_response_on_its_reward() -> None:
    log_probs, values, batch = ragged(rows=4)
    squares = []
    for i in range(4):
        on = batch["mask"][i]
        r, d, V = batch["rewards"][i][on], (log_probs - batch["lp_ref"])[i][on], values[i][on]
        squares.append(0.5 * (r.sum() - V[0] - BETA * d.sum()) ** 2)
    losses = dro(log_probs, values, batch, beta=BETA)
    torch.testing.assert_close(losses.policy, sum(squares) / 4, rtol=0, atol=1e-12)
    torch.testing.assert_close(losses.value, losses.policy, rtol=0, atol=0)


def oreo(log_probs: Tensor, values: Tensor, batch: TrajectoryBatch, beta: float) -> tuple[Tensor, Tensor]:
    """Token losses of arXiv 2412.16145, eq. 8 and 9 without the KL term, a token at a time."""
    policy = value = 0.0
    for i in range(len(log_probs)):
        tokens = batch["mask"][i].nonzero().flatten().tolist()
        for position, t in enumerate(tokens):
            reward = sum(batch["rewards"][i, u] for u in tokens[position:])
            ratio = log_probs[i, t] - batch["lp_ref"][i, t]
            future = sum((log_probs[i, u] - batch["lp_ref"][i, u]).detach() for u in tokens[position + 1 :])
            share = len(tokens) * len(log_probs)
            policy = policy + (values[i, t].detach() - reward + beta * (ratio + future)) ** 2 / share
            value = value + (values[i, t] - reward + beta * (ratio + future).detach()) ** 2 / share
    return policy, value


def test_dqo_at_lambda_one_without_weights_is_oreo() -> None:
    log_probs, values, batch = ragged()
    ours = losses_and_gradients(partial(dqo, beta=BETA, lam=1.0, weights="none"), log_probs, values, batch)
    log_probs, values = log_probs.requires_grad_(), values.requires_grad_()
    policy, value = oreo(log_probs, values, batch, BETA)
    gradients = [*torch.autograd.grad(policy, log_probs), *torch.autograd.grad(value, values)]
    assert_same(ours, [policy.detach(), value.detach(), *gradients])


def test_infinite_beta_keeps_the_reference_and_values_its_reward() -> None:
    tree = TreeMDP.random(seed=2)
    closed_values, closed_log_pi = tree.soft_optimum(1e7)
    torch.testing.assert_close(closed_values, tree.reference_values(), rtol=0, atol=1e-6)
    torch.testing.assert_close(closed_log_pi, tree.log_ref, rtol=0, atol=1e-6)
    values, log_pi = gradient_descent(tree, 1e5, 300, lam=1.0, weights="none")
    torch.testing.assert_close(values, tree.reference_values(), rtol=0, atol=1e-4)
    torch.testing.assert_close(log_pi, tree.log_ref, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("beta", "value", "chance", "ratio_right", "ratio_wrong"),
    [
        (0.1, 0.903249, 0.999926, 0.9675, -9.0325),
        (0.3, 0.726697, 0.944997, 0.911, -2.4223),
        (1.0, 0.50256, 0.624912, None, None),
    ],
)
def test_two_answers_have_the_closed_form(beta, value, chance, ratio_right, ratio_wrong) -> None:
    log_ref = torch.tensor([[0.38, 0.62]], dtype=torch.float64).log()
    answers = TreeMDP(torch.tensor([[1.0, 0.0]], dtype=torch.float64), log_ref, horizon=1)
    values, log_pi = answers.soft_optimum(beta)
    assert values.item() == pytest.approx(beta * math.log(0.38 * math.exp(1 / beta) + 0.62), abs=1e-12)
    assert values.item() == pytest.approx(value, abs=1e-6)
    assert log_pi[0, 0].exp().item() == pytest.approx(chance, abs=1e-6)
    ratios = log_pi - log_ref
    if ratio_right is not None:
        assert ratios[0].tolist() == pytest.approx([ratio_right, ratio_wrong], abs=5e-5)
    batch = trajectory_batch(answers.rewards.T, log_ref.T, log_ref.T)
    for objective in (dqo, dro):
        losses = objective(log_pi.T, values.expand(2, 1), batch, beta=beta)
        assert losses.policy.sqrt() < 1e-12
        assert losses.value.sqrt() < 1e-12


# masking and invariance

OBJECTIVES = {
    "dqo by sequence": partial(dqo, beta=BETA, lam=0.7),
    "dqo by token": partial(dqo, beta=BETA, lam=0.7, normalise="token"),
    "dqo with td target": partial(dqo, beta=BETA, lam=0.7, policy_target="td"),
    "dro": partial(dro, beta=BETA),
}
over_objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())


def on_steps(change, batch: TrajectoryBatch) -> TrajectoryBatch:
    """The batch with `change` applied to every tensor over tokens."""
    changed = {key: change(batch[key]) for key in ("ids", "mask", "rewards", "lp_mu", "lp_ref")}
    return TrajectoryBatch(**{**batch, **changed})


@over_objectives
def test_right_padding_changes_nothing(objective) -> None:
    log_probs, values, batch = ragged()

    def pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 4))

    expected = losses_and_gradients(objective, log_probs, values, batch)
    padded = losses_and_gradients(objective, pad(log_probs), pad(values), on_steps(pad, batch))
    assert_same(padded, [expected[0], expected[1], pad(expected[2]), pad(expected[3])])


@over_objectives
def test_the_order_of_rows_changes_nothing(objective) -> None:
    log_probs, values, batch = ragged()
    order = torch.randperm(len(values))
    shuffled = TrajectoryBatch(**{key: x[order] if x.ndim else x for key, x in batch.items()})
    expected = losses_and_gradients(objective, log_probs, values, batch)
    actual = losses_and_gradients(objective, log_probs[order], values[order], shuffled)
    assert_same(actual, [expected[0], expected[1], expected[2][order], expected[3][order]])


@over_objectives
@pytest.mark.parametrize("garbage", [1e4, math.inf, -math.inf, math.nan])
def test_garbage_outside_the_response_changes_nothing(objective, garbage: float) -> None:
    log_probs, values, batch = ragged()

    def soil(x: Tensor) -> Tensor:
        return x.masked_fill(~batch["mask"], garbage)

    soiled = on_steps(lambda x: soil(x) if x.is_floating_point() else x, batch)
    soiled["ids"] = torch.randint(1, 262, batch["ids"].shape)
    clean = losses_and_gradients(objective, log_probs, values, batch)
    assert_same(losses_and_gradients(objective, soil(log_probs), soil(values), soiled), clean, 0.0)
    logs = objective(log_probs=log_probs, values=values, batch=batch).logs
    soiled_logs = objective(log_probs=soil(log_probs), values=soil(values), batch=soiled).logs
    assert_same(list(soiled_logs.values()), list(logs.values()), 0.0)


@over_objectives
def test_rewards_of_prompt_tokens_change_nothing(objective) -> None:
    log_probs, values, batch = ragged()
    changed = TrajectoryBatch(**{**batch, "rewards": batch["rewards"] + 5.0 * ~batch["mask"]})
    expected = losses_and_gradients(objective, log_probs, values, batch)
    assert_same(losses_and_gradients(objective, log_probs, values, changed), expected)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_a_token_feels_only_its_own_residual(lam: float) -> None:
    log_probs, values, batch = ragged()
    mask, n = batch["mask"], batch["mask"].sum(1, keepdim=True)
    log_ratios = log_probs - batch["lp_ref"]
    G = soft_returns(batch["rewards"], log_ratios, values, mask, BETA, lam)
    scale = 2 * importance_weights(log_probs, batch["lp_mu"], mask)[:, None] * mask / (n * len(n))
    residual = values + BETA * log_ratios - batch["rewards"] - G[:, 1:]
    *_, policy_gradient, value_gradient = losses_and_gradients(
        partial(dqo, beta=BETA, lam=lam), log_probs, values, batch
    )
    assert_same([policy_gradient, value_gradient], [BETA * scale * residual, scale * (values - G[:, :-1])])


@over_objectives
def test_policy_and_value_losses_train_their_own_network(objective) -> None:
    log_probs, values, batch = ragged()
    log_probs, values = log_probs.requires_grad_(), values.requires_grad_()
    losses = objective(log_probs=log_probs, values=values, batch=batch)
    assert torch.autograd.grad(losses.policy, values, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(losses.value, log_probs, retain_graph=True, allow_unused=True) == (None,)


def test_a_constant_reward_moves_the_optimal_values_and_no_probability() -> None:
    tree = TreeMDP.random()
    values, log_pi = tree.soft_optimum(BETA)
    final = torch.arange(len(tree.rewards)) >= len(tree.rewards) - tree.actions ** (tree.horizon - 1)
    moved_values, moved_log_pi = TreeMDP(tree.rewards + 2.0 * final[:, None], tree.log_ref, 3).soft_optimum(BETA)
    assert_same([moved_values, moved_log_pi.exp()], [values + 2.0, log_pi.exp()], 1e-14)


@over_objectives
def test_a_constant_reward_is_absorbed_by_the_values(objective) -> None:
    log_probs, values, batch = ragged()
    moved = TrajectoryBatch(**{**batch, "rewards": batch["rewards"] + 2.0 * last_token(batch["mask"])})
    expected = losses_and_gradients(objective, log_probs, values, batch)
    assert_same(losses_and_gradients(objective, log_probs, values + 2.0, moved), expected)


def test_potential_shaping_moves_the_optimal_values_and_no_probability() -> None:
    tree = TreeMDP.random()
    values, log_pi = tree.soft_optimum(BETA)
    potential = torch.randn(len(tree.rewards), dtype=torch.float64)
    states, actions = tree.paths()
    shaped = shaped_rewards(tree.rewards[states, actions], potential[states], torch.ones_like(states, dtype=torch.bool))
    rewards = torch.empty_like(tree.rewards).index_put((states, actions), shaped)
    shaped_values, shaped_log_pi = TreeMDP(rewards, tree.log_ref, 3).soft_optimum(BETA)
    assert_same([shaped_values, shaped_log_pi.exp()], [values - potential, log_pi.exp()], 1e-14)


@over_objectives
def test_potential_shaping_is_absorbed_by_the_values(objective) -> None:
    log_probs, values, batch = ragged()
    potential = torch.randn_like(values)
    rewards = shaped_rewards(batch["rewards"], potential.masked_fill(~batch["mask"], math.nan), batch["mask"])
    expected = losses_and_gradients(objective, log_probs, values, batch)
    shaped = TrajectoryBatch(**{**batch, "rewards": rewards})
    assert_same(losses_and_gradients(objective, log_probs, values - potential, shaped), expected)
    assert torch.equal(rewards[~batch["mask"]], batch["rewards"][~batch["mask"]])


def test_shaping_telescopes_to_the_potential_of_the_prompt() -> None:
    _, potential, batch = ragged()
    mask = batch["mask"]
    gained = masked_sum(shaped_rewards(batch["rewards"], potential, mask) - batch["rewards"], mask)
    torch.testing.assert_close(gained, -masked_sum(potential, first_token(mask)), rtol=0, atol=1e-12)


def test_micro_batches_average_to_the_whole_batch() -> None:
    log_probs, values, batch = ragged(rows=8)
    objective = OBJECTIVES["dqo by token"]
    whole = losses_and_gradients(objective, log_probs, values, batch)
    parts = []
    for rows in (slice(0, 3), slice(3, 8)):
        part = TrajectoryBatch(**{key: x[rows] if x.ndim else x / 2 for key, x in batch.items()})
        parts.append(losses_and_gradients(objective, log_probs[rows], values[rows], part))
    losses = [(a + b) / 2 for a, b in zip(parts[0][:2], parts[1][:2])]
    gradients = [torch.cat([a, b]) / 2 for a, b in zip(parts[0][2:], parts[1][2:])]
    assert_same([*losses, *gradients], whole)


def test_a_row_without_a_response_counts_as_zero() -> None:
    log_probs, values, batch = ragged(rows=2)
    objective = OBJECTIVES["dqo by sequence"]
    whole = objective(log_probs=log_probs, values=values, batch=batch)
    emptied = TrajectoryBatch(**{**batch, "mask": batch["mask"] & torch.tensor([[True], [False]])})
    first = TrajectoryBatch(**{key: x[:1] if x.ndim else x for key, x in batch.items()})
    half = objective(log_probs=log_probs, values=values, batch=emptied)
    alone = objective(log_probs=log_probs[:1], values=values[:1], batch=first)
    torch.testing.assert_close(half.policy, alone.policy / 2)
    assert half.policy != whole.policy


# divergences


def test_full_kl_is_the_mean_divergence_of_the_response() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    logits, reference = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    pi, ref = logits.softmax(-1), reference.softmax(-1)
    expected = [(pi[i][mask[i]] * (pi[i][mask[i]] / ref[i][mask[i]]).log()).sum(-1).mean() for i in range(2)]
    torch.testing.assert_close(full_kl(logits[mask], reference[mask], mask), torch.stack(expected), rtol=0, atol=1e-12)
    assert full_kl(logits[mask], logits[mask], mask).tolist() == [0.0, 0.0]


def test_full_kl_ignores_the_padding_and_its_gradient() -> None:
    mask = torch.tensor([[True, False]])
    logits = torch.tensor([[[0.0, 1.0], [math.nan, math.inf]]], requires_grad=True)
    kl = full_kl(logits[mask], torch.zeros(1, 2, 2)[mask], mask)
    kl.sum().backward()
    assert kl.isfinite().all()
    assert logits.grad.isfinite().all()
    assert (logits.grad[~mask] == 0).all()


def test_k3_is_an_unbiased_estimate_of_the_full_kl() -> None:
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 1, 1, 7, dtype=torch.float64)
    log_ratios = (logits.log_softmax(-1) - reference.log_softmax(-1)).reshape(7, 1)
    one_token = torch.ones(1, 1, dtype=torch.bool)
    estimates = k3(log_ratios, one_token.expand(7, 1))
    assert (estimates >= 0).all()
    expectation = logits.softmax(-1).flatten() @ estimates
    exact = full_kl(logits[one_token], reference[one_token], one_token)[0]
    torch.testing.assert_close(expectation, exact, rtol=0, atol=1e-12)


# diagnostics and refusals


def test_logs_tell_right_from_wrong_answers() -> None:
    d = torch.tensor([[0.5, 0.5], [0.25, 0.0], [-2.0, -1.0], [0.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    rewards = torch.tensor([[0.0, 1], [1, 0], [0, 0], [0, 0]])
    lp_mu = torch.zeros(4, 2)
    values = torch.tensor([[0.5, 1.0], [1.0, 9.0], [0.25, 0.0], [0.25, 0.0]])
    logs = dqo(d, values, trajectory_batch(rewards, lp_mu, torch.zeros(4, 2), mask), beta=BETA, cap=2.0).logs
    expected = {
        "weight": (2 + math.exp(0.25) + math.exp(-3) + 1) / 4,
        "weight_clipped": 0.25,
        "log_ratio_correct": (1 + 0.25) / 2,
        "log_ratio_wrong": -3 / 2,
        "correct": 0.5,
        "kl": sum(math.exp(-x) - 1 + x for x in (0.5, 0.5, 0.25, -2, -1)) / 7,
        "value_start": 0.5,
        "reward": 0.5,
        "explained_variance": 1.0,
    }
    assert {name: value.item() for name, value in logs.items()} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("outcome", [0.0, 1.0])
@over_objectives
def test_logs_are_complete_and_finite_when_a_class_is_absent(objective, outcome: float) -> None:
    log_probs, values, batch = ragged()
    batch["outcome"] = torch.full_like(batch["outcome"], outcome)
    batch["rewards"] = outcome * last_token(batch["mask"]).double()
    logs = objective(log_probs=log_probs.requires_grad_(), values=values, batch=batch).logs
    assert logs["correct"] == outcome
    assert logs["log_ratio_wrong" if outcome else "log_ratio_correct"] == 0
    assert logs["explained_variance"] == 0
    assert all(value.isfinite() and value.ndim == 0 and not value.requires_grad for value in logs.values())


@pytest.mark.parametrize(
    ("name", "value"), [("beta", 0.0), ("beta", math.inf), ("lam", -0.1), ("lam", 1.1), ("cap", 0.0)]
)
def test_a_hyperparameter_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    log_probs, values, batch = ragged()
    with pytest.raises(ValueError, match=rf"{name} must be .*{value}.*objective\.{name}"):
        dqo(log_probs, values, batch, **{"beta": BETA, name: value})


@pytest.mark.parametrize("name", ["weights", "policy_target", "normalise"])
def test_an_unknown_choice_is_refused_with_the_known_ones(name: str) -> None:
    log_probs, values, batch = ragged()
    # without the import hook of the tests, which would refuse the type first
    call = partial(inspect.unwrap(dqo), log_probs, values, batch, beta=BETA, **{name: "sometimes"})
    if name == "normalise":
        call = partial(inspect.unwrap(weighted_square), values, values[:, 0], batch, "sometimes")
    with pytest.raises(ValueError, match=rf"{name} must be one of \w+, .*'sometimes'.*objective\.{name}"):
        call()
