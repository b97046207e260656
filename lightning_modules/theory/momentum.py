"""Accelerated preference optimisation where every step is exact (arXiv 2410.06293), on one prompt with V answers.

A round fits pihat to preferences against the reference pi, which is a proximal step in policy space, and extrapolates:
log pi' = log pihat + alpha (log pihat - log pihat before) - log Z. Policies are logarithms, rewards in units of
Bradley-Terry log-odds, `beta` > 0 in DPO's convention.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.theory.bradley_terry import penalised_fit


def extrapolated(
    fitted: Float[Tensor, "*rows answer"], before: Float[Tensor, "*rows answer"], alpha: float
) -> Float[Tensor, "*rows answer"]:
    """log of pihat (pihat / pihat_before)^alpha, normalised."""
    return (fitted + alpha * (fitted - before)).log_softmax(-1)


def check_momentum(alpha: float) -> None:
    """Raise ValueError for a momentum that diverges."""
    if not -1 < alpha < 1:
        raise ValueError(f"alpha={alpha} must lie in (-1, 1): from 1 on the momentum grows without bound")


def acceleration(rounds: int, alpha: float) -> float:
    """c_T: after T rounds log pihat = log pi_ref + c_T r / beta + const; T without momentum, T / (1 - alpha) in the
    long run. c_T = T / (1 - alpha) - alpha (1 - alpha^T) / (1 - alpha)^2."""
    return rounds / (1 - alpha) - alpha * (1 - alpha**rounds) / (1 - alpha) ** 2


def suboptimality_bound(rounds: int, alpha: float, beta: float, log_reference_best: float) -> float:
    """max r - E r <= beta / c_T log(1 / pi_ref(y*)), in units of the reward."""
    return -beta / acceleration(rounds, alpha) * log_reference_best


def exact_fit(
    log_reference: Float[Tensor, "*rows answer"], reward: Float[Tensor, " answer"], beta: float
) -> Float[Tensor, "*rows answer"]:
    """The minimiser of DPO's loss on all pairs with their true Bradley-Terry labels: pi exp(r / beta) / Z."""
    return (log_reference + reward / beta).log_softmax(-1)


def sampled_pairs(
    log_policy: Float[Tensor, "copy answer"], reward: Float[Tensor, " answer"], pairs: int, draw: torch.Generator
) -> tuple[Int[Tensor, "copy pair"], Int[Tensor, "copy pair"]]:
    """(winners, losers) of pairs drawn from a policy and labelled by Bradley-Terry coin flips."""
    answers = torch.multinomial(log_policy.exp(), 2 * pairs, replacement=True, generator=draw)
    first, second = answers.chunk(2, dim=-1)
    chance = torch.rand(first.shape, generator=draw, dtype=reward.dtype)
    wins = chance < torch.sigmoid(reward[first] - reward[second])
    return torch.where(wins, first, second), torch.where(wins, second, first)


def sampled_fit(
    log_reference: Float[Tensor, "copy answer"],
    winners: Int[Tensor, "copy pair"],
    losers: Int[Tensor, "copy pair"],
    beta: float,
    penalty: float = 1e-4,
) -> Float[Tensor, "copy answer"]:
    """The minimiser of DPO's mean loss on labelled pairs plus `penalty` |theta - log pi_ref|^2, by Newton's method.

    Raises FloatingPointError where that does not converge.
    """
    moved = penalised_fit(_win_rates(winners, losers, log_reference), beta, penalty)
    return (log_reference + moved).log_softmax(-1)


def _win_rates(
    winners: Int[Tensor, "copy pair"], losers: Int[Tensor, "copy pair"], like: Float[Tensor, "copy answer"]
) -> Float[Tensor, "copy answer answer"]:
    """The fraction of pairs that answer i won against answer j."""
    answers, share = like.shape[-1], 1 / winners.shape[-1]
    table = like.new_zeros(len(like), answers**2)
    table.scatter_add_(1, winners * answers + losers, torch.full_like(winners, share, dtype=like.dtype))
    return table.unflatten(1, (answers, answers))


def rescaled(beta: float, alpha: float) -> float:
    """The step of plain iterations that go as fast as momentum `alpha` in the long run: beta (1 - alpha)."""
    if not math.isfinite(beta) or beta <= 0:
        raise ValueError(f"model.beta={beta} must be positive")
    return beta * (1 - alpha)
