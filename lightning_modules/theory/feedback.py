"""What offline methods learn from: rewards of single actions, or which of two actions won; sufficient statistics.

Statistics of independent data add up. They are drawn at once for any number of samples, so 2,000 data sets of 65,536
samples cost what 17 multinomial draws for each of them do.
"""

import math
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batches import Bandit, BanditLog
from lightning_modules.theory.asymptotics import (
    divergence,
    duelling_divergence,
    linear_rate,
    preference_rate,
    table_rate,
)
from lightning_modules.theory.bonus import Bonus
from lightning_modules.theory.bradley_terry import penalised_fit

Policies = Float[Tensor, "copy context action"]
Streams = Iterable[np.random.Generator]
Shares = list[tuple[float, Float[Tensor, "context action"]]]  # who took which part of the data


class Rewards:
    """A reward of a single action: the number of times it was taken, and the sum of its rewards.

    Means of tables, or least squares where the bandit has features, with a ridge that only keeps it solvable.
    """

    chosen: ClassVar[int] = 1  # actions in a row of a log

    def blank(self, bandit: Bandit, copies: int) -> Float[Tensor, "copy context action two"]:
        """No data."""
        return torch.zeros(copies, *bandit.log_reference.shape, 2, dtype=torch.float64)

    def drawn(
        self, bandit: Bandit, policies: Policies, size: int, streams: Streams
    ) -> Float[Tensor, "copy context action two"]:
        """`size` samples of every copy, each with a policy and a generator of its own."""
        reward, made = bandit.reward.flatten().numpy(), []
        for chances, draw in zip(_chances(bandit.contexts, policies), streams):
            count = draw.multinomial(size, chances).astype(np.float64)
            normal = draw.standard_normal(len(count))
            made.append(np.stack([count, reward * count + bandit.noise * np.sqrt(count) * normal], -1))
        return torch.from_numpy(np.stack(made)).unflatten(1, tuple(bandit.log_reference.shape))

    def logged(self, bandit: Bandit, log: BanditLog, rows: slice) -> Float[Tensor, "1 context action two"]:
        """The statistics of rows of a log."""
        made, outcome = self.blank(bandit, 1), log.outcome[rows]
        place = (torch.zeros_like(log.context[rows]), log.context[rows], log.actions[rows, 0])
        return made.index_put_(place, torch.stack([torch.ones_like(outcome), outcome], -1), accumulate=True)

    def value(
        self, statistics: Float[Tensor, "copy context action two"], bandit: Bandit, bonus: Bonus, behaviour: Tensor
    ) -> Policies:
        """The estimate less its bonus. An action never taken has the lowest value there is, less the range of rewards.

        Without a bonus it has the middle of the range.
        """
        count, total = statistics.unbind(-1)
        radius = self._radius(bandit, bonus, int(count[0].sum()))
        if bandit.features is not None:
            return self._linear(count, total, bandit.features, radius)
        low, high = bandit.reward_range
        unseen = 2 * low - high if radius else (low + high) / 2
        pessimistic = total / count.clamp(min=1) - (radius * count.clamp(min=1).rsqrt() if radius else 0.0)
        return torch.where(count > 0, pessimistic, unseen)

    @staticmethod
    def _linear(count: Tensor, total: Tensor, features: Tensor, radius: float) -> Policies:
        rows, width = features.flatten(0, 1), features.shape[-1]
        gram = torch.einsum("cn,ni,nj->cij", count.flatten(1), rows, rows) + 1e-6 * torch.eye(width, dtype=rows.dtype)
        theta = torch.linalg.solve(gram, (total.flatten(1) @ rows)[..., None])
        estimate = rows @ theta[..., 0].mT
        if radius:
            uncertainty = torch.einsum("ni,cij,nj->nc", rows, torch.linalg.inv(gram), rows).sqrt()
            estimate = estimate - radius * uncertainty
        return estimate.mT.unflatten(1, features.shape[:2])

    @staticmethod
    def _radius(bandit: Bandit, bonus: Bonus, samples: int) -> float:
        cells = bandit.log_reference.numel()
        dimension = cells if bandit.features is None else bandit.features.shape[-1]
        return bonus.rewards(bandit.noise, max(samples, 1), cells, dimension)

    def rate(self, bandit: Bandit, weights: Tensor, shares: Shares, eta: float, bonus: Bonus, samples: int) -> float:
        """lim n E[gap], or its value at n = `samples` where the bonus depends on n."""
        behaviour = sum(share * policy for share, policy in shares)
        radius = self._radius(bandit, bonus, samples)
        if bandit.features is None:
            return table_rate(weights, behaviour, eta, bandit.noise, radius)
        return linear_rate(weights, behaviour, bandit.features, bandit.contexts, eta, bandit.noise, radius)

    def divergence(self, bandit: Bandit, behaviour: Float[Tensor, "context action"]) -> Tensor:
        """D(x, a) of the data's policy."""
        return divergence(behaviour, bandit.contexts, bandit.features)


class Preferences:
    """Which of two actions, drawn independently, won under Bradley-Terry: the number of wins of i over j.

    Maximum likelihood with a small ridge, in the gauge in which the reference policy's mean is 0, within the range that
    rewards can have there, which is B in the papers.
    """

    chosen: ClassVar[int] = 2
    ridge: ClassVar[float] = 1e-3

    def blank(self, bandit: Bandit, copies: int) -> Float[Tensor, "copy context action action"]:
        """No data."""
        m, k = bandit.log_reference.shape
        return torch.zeros(copies, m, k, k, dtype=torch.float64)

    def drawn(
        self, bandit: Bandit, policies: Policies, size: int, streams: Streams
    ) -> Float[Tensor, "copy context action action"]:
        """`size` pairs of every copy; those of an action with itself say nothing and are left out."""
        m, k = bandit.log_reference.shape
        chance = torch.sigmoid(bandit.reward[..., :, None] - bandit.reward[..., None, :]).numpy()
        first, second = np.triu_indices(k, 1)
        pairs, made = _pairs(policies, first, second), []
        for chances, draw in zip(_chances(bandit.contexts, pairs), streams):
            count = draw.multinomial(size, chances).reshape(m, -1)[:, :-1]
            won, wins = draw.binomial(count, chance[:, first, second]), np.zeros((m, k, k))
            wins[:, first, second], wins[:, second, first] = won, count - won
            made.append(wins)
        return torch.from_numpy(np.stack(made))

    def logged(self, bandit: Bandit, log: BanditLog, rows: slice) -> Float[Tensor, "1 context action action"]:
        """The statistics of rows of a log."""
        made, won = self.blank(bandit, 1), log.outcome[rows]
        context, (first, second) = log.context[rows], log.actions[rows].T
        winner, loser = torch.where(won > 0, first, second), torch.where(won > 0, second, first)
        place = (torch.zeros_like(context), context, winner, loser)
        made.index_put_(place, (winner != loser).double(), accumulate=True)
        return made

    def value(
        self, statistics: Float[Tensor, "copy context action action"], bandit: Bandit, bonus: Bonus, behaviour: Tensor
    ) -> Policies:
        """Scores less the bonus beta D, with D up to a shift of the context."""
        samples = statistics[0].sum().clamp(min=1)
        scores = penalised_fit(statistics / samples, 1.0, float(self.ridge / (2 * samples)), longest=1.0)
        low, high = bandit.reward_range
        scores = scores - (bandit.log_reference.exp() * scores).sum(-1, keepdim=True)
        radius = self._radius(bandit, bonus, int(samples))
        return scores.clamp(low - high, high - low) - radius * self.divergence(bandit, behaviour)

    @staticmethod
    def _radius(bandit: Bandit, bonus: Bonus, samples: int) -> float:
        return bonus.preferences(samples, bandit.log_reference.numel(), bandit.reward_range[1] - bandit.reward_range[0])

    def rate(self, bandit: Bandit, weights: Tensor, shares: Shares, eta: float, bonus: Bonus, samples: int) -> float:
        """lim n E[gap] of pairs; the divergence of the bonus is that of the first share's policy."""
        radius = self._radius(bandit, bonus, samples) * math.sqrt(samples)
        width = self.divergence(bandit, shares[0][1]) * bandit.contexts[:, None].sqrt()
        return preference_rate(weights, shares, bandit.reward, eta, radius * width)

    def divergence(self, bandit: Bandit, behaviour: Float[Tensor, "context action"]) -> Tensor:
        """D(x, a) of the data's policy, up to a shift of the context."""
        return duelling_divergence(behaviour, bandit.contexts)


Feedback = Rewards | Preferences


def _chances(contexts: Float[Tensor, " context"], rows: Float[Tensor, "copy context cell"]) -> np.ndarray:
    """The distribution over contexts and cells of every copy."""
    chances = (contexts[:, None] * rows).flatten(1)
    return (chances / chances.sum(-1, keepdim=True)).numpy()


def _pairs(policies: Policies, first: np.ndarray, second: np.ndarray) -> Float[Tensor, "copy context cell"]:
    """The probability of every unordered pair of different actions, and last of all others together."""
    met = 2 * policies[..., first] * policies[..., second]
    return torch.cat([met, (1 - met.sum(-1, keepdim=True)).clamp(min=0)], -1)
