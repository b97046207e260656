"""The oracle of the losses: a token MDP small enough to solve in closed form, and batches without a model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.batches import TrajectoryBatch


def trajectory_batch(
    rewards: Tensor, lp_mu: Tensor, lp_ref: Tensor, mask: Tensor | None = None, outcome: Tensor | None = None
) -> TrajectoryBatch:
    """A batch as the data wing would make it, of one process and one micro-batch."""
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    return TrajectoryBatch(
        ids=torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.long),
        mask=mask,
        token_share=mask.sum().to(rewards.dtype),
        rewards=rewards,
        lp_mu=lp_mu,
        lp_ref=lp_ref,
        outcome=(rewards * mask).sum(1) if outcome is None else outcome,
        prompt_length=mask.int().argmax(1) + 1,
    )


@dataclass
class TreeMDP:
    """Every sequence of `horizon` actions is a path of a tree; state s has the children s * actions + 1 + a.

    `rewards` and `log_ref` have shape (states, actions), leaves excluded; float64.
    """

    rewards: Tensor
    log_ref: Tensor
    horizon: int

    @classmethod
    def random(cls, horizon: int = 3, actions: int = 3, seed: int = 0) -> "TreeMDP":
        torch.manual_seed(seed)
        states = sum(actions**h for h in range(horizon))
        rewards = torch.randn(states, actions, dtype=torch.float64)
        return cls(rewards, random_policy(states, actions), horizon)

    @property
    def actions(self) -> int:
        return self.rewards.shape[1]

    def paths(self) -> tuple[Tensor, Tensor]:
        """States and actions of all paths, each of shape (actions ** horizon, horizon)."""
        actions = torch.cartesian_prod(*[torch.arange(self.actions)] * self.horizon)
        states = torch.zeros_like(actions)
        for h in range(1, self.horizon):
            states[:, h] = states[:, h - 1] * self.actions + 1 + actions[:, h - 1]
        return states, actions

    def soft_optimum(self, beta: float) -> tuple[Tensor, Tensor]:
        """V* = beta log E_ref[exp((r + V*(s + a)) / beta)], and log pi* = log pi_ref + (r + V*(s + a) - V*) / beta."""
        values = torch.zeros(len(self.rewards) * self.actions + 1, dtype=torch.float64)
        log_pi = torch.empty_like(self.rewards)
        for s in reversed(range(len(self.rewards))):
            children = values[s * self.actions + 1 : (s + 1) * self.actions + 1]
            scores = self.log_ref[s] + (self.rewards[s] + children) / beta
            values[s] = beta * scores.logsumexp(0)
            log_pi[s] = scores.log_softmax(0)
        return values[: len(self.rewards)], log_pi

    def reference_values(self) -> Tensor:
        """Expected reward to go under the reference policy."""
        values = torch.zeros(len(self.rewards) * self.actions + 1, dtype=torch.float64)
        for s in reversed(range(len(self.rewards))):
            children = values[s * self.actions + 1 : (s + 1) * self.actions + 1]
            values[s] = self.log_ref[s].exp() @ (self.rewards[s] + children)
        return values[: len(self.rewards)]

    def path_probabilities(self, log_pi: Tensor) -> Tensor:
        return log_pi[self.paths()].sum(1).exp()

    def visitation(self, log_pi: Tensor) -> Tensor:
        """Probability of passing through each state."""
        states, _ = self.paths()
        weights = self.path_probabilities(log_pi)[:, None].expand(states.shape)
        visits = torch.zeros(len(self.rewards), dtype=torch.float64)
        return visits.index_put((states,), weights, accumulate=True)


def random_policy(states: int, actions: int) -> Tensor:
    """Log-probabilities drawn from a flat Dirichlet distribution."""
    return torch.distributions.Dirichlet(torch.ones(actions, dtype=torch.float64)).sample((states,)).log()
