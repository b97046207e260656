"""Direct Q-function optimisation (arXiv 2410.09302) and its relatives, as functions of token log-probabilities.

The token MDP is deterministic and undiscounted: state s_h is the prompt with the first h response tokens, action a_h is
the next token, s_T is terminal with V(s_T) = 0. On every path the optimum of E[sum_h r_h - beta log(pi/pi_ref)] has

    V(s_h) + beta log(pi(a_h|s_h) / pi_ref(a_h|s_h)) = r_h + V(s_{h+1}),

so that a policy and a value function are enough: Q = V + beta log(pi/pi_ref). The reference enters through this
log-ratio and nowhere else. A tensor of shape (batch, steps) speaks at position t about the token predicted there: its
log-probability, its reward, the value of the state before it. `mask` is True on the response, one contiguous run per
row; what the other positions hold, NaN included, has no influence.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from datamodules.batches import TrajectoryBatch


class Losses(NamedTuple):
    """Scalar losses of the two networks, and detached scalars to log (see `diagnostics`)."""

    policy: Float[Tensor, ""]
    value: Float[Tensor, ""]
    logs: dict[str, Tensor]


def dqo(
    log_probs: Float[Tensor, "batch steps"],
    values: Float[Tensor, "batch steps"],
    batch: TrajectoryBatch,
    *,
    beta: float,
    lam: float = 1.0,
    weights: Literal["both", "policy", "none"] = "both",
    cap: float = math.e,
    normalise: Literal["sequence", "token"] = "sequence",
    policy_target: Literal["paper", "td"] = "paper",
) -> Losses:
    """Squared soft Bellman residuals of value and policy (arXiv 2410.09302, eq. 4.6 and 4.7).

        L_V  = mean_i w_i mean_h ( V(s_h) - sg[G(s_h)] )^2
        L_pi = mean_i w_i mean_h ( sg[V(s_h)] + beta log(pi/pi_ref) - r_h - sg[G(s_{h+1})] )^2

    with G of `soft_returns` and w of `importance_weights`. Of L_V only V has a gradient, of L_pi only the log-ratio of
    the current step. `beta` > 0 is in nats per unit of reward, `lam` in [0, 1]; `weights` names the losses that are
    importance weighted, `cap` > 0 is the upper bound of the weights. `normalise="token"` divides the sum over tokens by
    `batch["token_share"]`, exact under accumulation and on many processes; "sequence" is the mean over rows of row
    means (a row without response counts as zero). `policy_target="td"` puts (1 - lam) V + lam G in the place of
    G(s_{h+1}): the paper's target is a two-step return at lam = 0, this one is the value's own.

    Raises ValueError for a hyperparameter outside its range.
    """
    _check_range("beta", beta, 0 < beta < math.inf, "in (0, inf)")
    _check_choice("weights", weights, ("both", "policy", "none"))
    _check_choice("policy_target", policy_target, ("paper", "td"))
    mask, rewards = batch["mask"], batch["rewards"]
    log_ratios = log_probs - batch["lp_ref"]
    returns = soft_returns(rewards, log_ratios, values, mask, beta, lam)
    successors = returns[:, 1:]
    if policy_target == "td":
        successors = (1 - lam) * next_values(values, mask).detach() + lam * successors

    w = importance_weights(log_probs, batch["lp_mu"], mask, cap)
    w_policy = w if weights != "none" else torch.ones_like(w)
    w_value = w if weights == "both" else torch.ones_like(w)
    policy = weighted_square(values.detach() + beta * log_ratios - rewards - successors, w_policy, batch, normalise)
    value = weighted_square(values - returns[:, :-1], w_value, batch, normalise)
    return Losses(policy, value, diagnostics(log_probs, values, batch, cap))


def dro(
    log_probs: Float[Tensor, "batch steps"],
    values: Float[Tensor, "batch steps"],
    batch: TrajectoryBatch,
    *,
    beta: float,
) -> Losses:
    """Direct reward optimisation with a value network, DRO-V (arXiv 2405.19107): the whole response is one action.

        L = mean_i 1/2 ( R - V(s_0) - beta sum_h log(pi/pi_ref) )^2,

    where R is the sum of the row's rewards and s_0 the prompt. The policy's loss holds V fixed, the value's loss the
    log-ratio. On responses of one token both are half of `dqo` without weights. Raises ValueError unless `beta` is in
    (0, inf).
    """
    _check_range("beta", beta, 0 < beta < math.inf, "in (0, inf)")
    mask = batch["mask"]
    reward = masked_sum(batch["rewards"], mask)
    penalty = beta * masked_sum(log_probs - batch["lp_ref"], mask)
    value_start = masked_sum(values, first_token(mask))
    policy = 0.5 * (reward - value_start.detach() - penalty).square().mean()
    value = 0.5 * (reward - value_start - penalty.detach()).square().mean()
    return Losses(policy, value, diagnostics(log_probs, values, batch))


@torch.no_grad()
def soft_returns(
    rewards: Float[Tensor, "batch steps"],
    log_ratios: Float[Tensor, "batch steps"],
    values: Float[Tensor, "batch steps"],
    mask: Bool[Tensor, "batch steps"],
    beta: float,
    lam: float,
) -> Float[Tensor, "batch steps+1"]:
    """Lambda returns of the KL-regularised reward (arXiv 2410.09302, section 4.2), without gradient.

        G(s_h) = r_h - beta log(pi/pi_ref)_h + (1 - lam) V(s_{h+1}) + lam G(s_{h+1}),    G(s_T) = V(s_T) = 0,

    which is the mixture (1 - lam) sum_n lam^{n-1} G^(n) of n-step returns, and V plus the generalised advantage of the
    reward r - beta log(pi/pi_ref). At `lam` = 1 it is the Monte-Carlo return, at 0 the one-step target. The last column
    stands for s_T when a response fills its row; returns are zero outside the mask. Raises ValueError unless `lam` is
    in [0, 1].
    """
    _check_range("lam", lam, 0 <= lam <= 1, "in [0, 1]")
    one_step = rewards - beta * log_ratios + (1 - lam) * next_values(values, mask)
    returns = [torch.zeros_like(one_step[:, 0])]
    for t in reversed(range(mask.shape[1])):
        returns.append(torch.where(mask[:, t], one_step[:, t] + lam * returns[-1], 0.0))
    return torch.stack(returns[::-1], dim=1)


def importance_weights(
    log_probs: Float[Tensor, "batch steps"],
    behaviour_log_probs: Float[Tensor, "batch steps"],
    mask: Bool[Tensor, "batch steps"],
    cap: float = math.e,
) -> Float[Tensor, " batch"]:
    """Truncated importance weight of each trajectory, min(cap, prod_h pi/mu) (arXiv 2410.09302, section 4.3).

    No gradient, no lower bound. The product is a sum of logs in float32 (float64 when given), bounded before the
    exponential so that nothing overflows. Raises ValueError unless `cap` is positive.
    """
    log_weights = _log_weights(log_probs, behaviour_log_probs, mask)
    return log_weights.clamp(max=_log_cap(cap)).exp()


def full_kl(
    logits: Float[Tensor, "masked vocabulary"],
    reference_logits: Float[Tensor, "masked vocabulary"],
    mask: Bool[Tensor, "batch steps"],
) -> Float[Tensor, " batch"]:
    """Mean over a response of KL(pi(.|s_h) || pi_ref(.|s_h)) in nats, over the whole vocabulary.

    The regulariser of OREO (arXiv 2412.16145, eq. 8 and 9). The logits are those of the masked positions only, in
    row-major order, as `Policy` gives them; computed in float32 or better.
    """
    precision = torch.promote_types(logits.dtype, torch.float32)
    log_pi = logits.log_softmax(-1, dtype=precision)
    log_ref = reference_logits.log_softmax(-1, dtype=precision)
    kl = (log_pi.exp() * (log_pi - log_ref)).sum(-1)
    per_token = torch.zeros(mask.shape, dtype=precision, device=mask.device).masked_scatter(mask, kl)
    return masked_mean(per_token, mask)


def k3(log_ratios: Float[Tensor, "batch steps"], mask: Bool[Tensor, "batch steps"]) -> Float[Tensor, " batch"]:
    """Mean over a response of exp(-d) - 1 + d, an estimate of KL(pi || pi_ref) in nats; d is log(pi/pi_ref) of a token.

    Non-negative. Unbiased where the tokens were sampled from pi; on stored responses it is an indicator of drift.
    """
    d = log_ratios.masked_fill(~mask, 0.0)
    return masked_mean(torch.expm1(-d) + d, mask)


def shaped_rewards(
    rewards: Float[Tensor, "batch steps"], potential: Float[Tensor, "batch steps"], mask: Bool[Tensor, "batch steps"]
) -> Float[Tensor, "batch steps"]:
    """Rewards r_h + Phi(s_{h+1}) - Phi(s_h) with Phi(s_T) = 0, which have the same optimal policy (Ng et al., 1999).

    `potential` is placed as the values are: Phi of the state before the token. The optimal value becomes V - Phi.
    Rewards outside the mask are returned as they came.
    """
    return torch.where(mask, rewards + next_values(potential, mask) - potential, rewards)


@torch.no_grad()
def diagnostics(
    log_probs: Float[Tensor, "batch steps"],
    values: Float[Tensor, "batch steps"],
    batch: TrajectoryBatch,
    cap: float = math.e,
) -> dict[str, Tensor]:
    """What to watch while training, as scalars; all keys are always there, so that processes agree on what they reduce.

    - `weight`, `weight_clipped`: mean importance weight, and the fraction that exceeds `cap`;
    - `log_ratio_correct`, `log_ratio_wrong`: mean over rows with positive, other outcome of sum_h log(pi/pi_ref), and
      `correct`: the fraction of rows with positive outcome. A mean over an empty class is 0; averages over many batches
      are exact with weights `correct` and 1 - `correct`;
    - `kl`: the `k3` estimate per token;
    - `value_start`, `reward`: means of V(s_0) and of the summed rewards, equal where V is calibrated and pi = pi_ref;
    - `explained_variance`: 1 - Var(r - V) / Var(r) at the last token, in (-inf, 1]; 0 when all r are equal.
    """
    mask, log_ratios = batch["mask"], log_probs - batch["lp_ref"]
    log_weights = _log_weights(log_probs, batch["lp_mu"], mask)
    log_ratio, correct = masked_sum(log_ratios, mask), batch["outcome"] > 0
    last = last_token(mask)
    return {
        "weight": log_weights.clamp(max=_log_cap(cap)).exp().mean(),
        "weight_clipped": (log_weights > _log_cap(cap)).to(log_weights.dtype).mean(),
        "log_ratio_correct": masked_mean(log_ratio, correct),
        "log_ratio_wrong": masked_mean(log_ratio, ~correct),
        "correct": correct.to(log_ratio.dtype).mean(),
        "kl": (k3(log_ratios, mask) * mask.sum(1)).sum() / mask.sum().clamp(min=1),
        "value_start": masked_sum(values, first_token(mask)).mean(),
        "reward": masked_sum(batch["rewards"], mask).mean(),
        "explained_variance": _explained_variance(masked_sum(values, last), masked_sum(batch["rewards"], last)),
    }


def weighted_square(
    residuals: Float[Tensor, "batch steps"],
    weights: Float[Tensor, " batch"],
    batch: TrajectoryBatch,
    normalise: Literal["sequence", "token"],
) -> Float[Tensor, ""]:
    """Average over the response tokens of w_i residual^2, by sequence or by token as in `dqo`."""
    _check_choice("normalise", normalise, ("sequence", "token"))
    squares = residuals.masked_fill(~batch["mask"], 0.0).square()
    if normalise == "token":
        return (weights * squares.sum(1)).sum() / batch["token_share"]
    return (weights * masked_mean(squares, batch["mask"])).mean()


def next_values(
    values: Float[Tensor, "batch steps"], mask: Bool[Tensor, "batch steps"]
) -> Float[Tensor, "batch steps"]:
    """V(s_{h+1}) at the position of token h; zero after the last token, whose successor is terminal."""
    return F.pad(values.masked_fill(~mask, 0.0), (0, 1))[:, 1:]


def first_token(mask: Bool[Tensor, "batch steps"]) -> Bool[Tensor, "batch steps"]:
    """True at the first response token of each row, where `values` holds V(s_0)."""
    return mask & ~F.pad(mask, (1, 0))[:, :-1]


def last_token(mask: Bool[Tensor, "batch steps"]) -> Bool[Tensor, "batch steps"]:
    """True at the last response token of each row."""
    return mask & ~F.pad(mask, (0, 1))[:, 1:]


def masked_sum(x: Float[Tensor, "*rows steps"], mask: Bool[Tensor, "*rows steps"]) -> Float[Tensor, "*rows"]:
    """Sum along the last axis where the mask is True."""
    return x.masked_fill(~mask, 0.0).sum(-1)


def masked_mean(x: Float[Tensor, "*rows steps"], mask: Bool[Tensor, "*rows steps"]) -> Float[Tensor, "*rows"]:
    """Mean along the last axis where the mask is True; 0 where it never is."""
    return masked_sum(x, mask) / mask.sum(-1).clamp(min=1)


@torch.no_grad()
def _log_weights(log_probs: Tensor, behaviour_log_probs: Tensor, mask: Tensor) -> Tensor:
    precision = torch.promote_types(log_probs.dtype, torch.float32)
    return masked_sum(log_probs.to(precision) - behaviour_log_probs.to(precision), mask)


def _log_cap(cap: float) -> float:
    _check_range("cap", cap, cap > 0, "positive")
    return math.log(cap)


def _explained_variance(prediction: Tensor, target: Tensor) -> Tensor:
    variance, error = target.var(correction=0), (target - prediction).var(correction=0)
    return torch.where(variance > 0, 1 - error / variance, 0.0)


def _check_range(name: str, value: float, valid: bool, domain: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {domain}, but is {value}; change objective.{name}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but is {value!r}; change objective.{name}")
