"""What online bandit methods play in: contexts, features and mean rewards of a stretch of rounds, for many copies."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from datamodules.batches import Bandit, FreshFeatures
from lightning_modules.theory.randomness import normal, streams

# Which of the random numbers of a round, or of a step of it, is for what; what is drawn beside these comes after them
CONTEXT, ACTION, NOISE, REST = 0, 1, 2, 4


class Scene(NamedTuple):
    """A stretch of rounds: the context met, the rewards and features of all contexts that the regret averages over."""

    context: Int[Tensor, "round copy"]
    reward: Float[Tensor, "round copy context action"]
    features: Float[Tensor, "round copy context action feature"] | None


class Contexts(NamedTuple):
    """Contexts with their probabilities, over which a mean can be taken."""

    reward: Float[Tensor, "context action"]
    features: Float[Tensor, "context action feature"] | None
    probability: Float[Tensor, " context"]


class Tables:
    """A bandit whose contexts are finitely many; `copies` of it, or for each of its horizons."""

    numbers = REST  # random ones that a round needs

    def __init__(self, bandit: Bandit, horizons: list[int], copies: int) -> None:
        self.log_reference, self.contexts, self.features = bandit.log_reference, bandit.contexts, bandit.features
        tables = bandit.reward.reshape(-1, *bandit.log_reference.shape)[: len(horizons) or None]
        self.reward = tables.repeat_interleave(copies, 0)

    def scene(self, chance: Float[Tensor, "round copy number"]) -> Scene:
        """The rounds with these random numbers."""
        context = (chance[..., CONTEXT, None] > self.contexts.cumsum(0)[:-1]).sum(-1)
        reward = self.reward.expand(len(chance), -1, -1, -1)
        features = self.features
        return Scene(context, reward, features if features is None else features.expand(*reward.shape, -1))

    def context_sample(self, seed: int, size: int) -> Contexts:
        """All contexts of the first bandit."""
        return Contexts(self.reward[0], self.features, self.contexts)


class Fresh:
    """New features in every round: each has a single context, this one."""

    def __init__(self, bandit: FreshFeatures, copies: int) -> None:
        self.theta, self.shape = bandit.theta, (1, bandit.actions, len(bandit.theta))
        self.numbers = REST + math.prod(self.shape)
        self.log_reference = torch.full((1, bandit.actions), -math.log(bandit.actions), dtype=torch.float64)
        self.contexts = torch.ones(1, dtype=torch.float64)

    def scene(self, chance: Float[Tensor, "round copy number"]) -> Scene:
        """The rounds with these random numbers, of which normal vectors are made, and from these directions."""
        vectors = normal(chance[..., REST : self.numbers]).unflatten(-1, self.shape)
        features = vectors / vectors.norm(dim=-1, keepdim=True)
        return Scene(torch.zeros(chance.shape[:2], dtype=torch.int64), (features * self.theta).sum(-1), features)

    def context_sample(self, seed: int, size: int) -> Contexts:
        """`size` contexts from a stream that no round draws from."""
        draw = next(iter(streams(seed, 1, [0, 0, 0, 1])))
        vectors = torch.from_numpy(draw.standard_normal((size, *self.shape[1:])))
        features = vectors / vectors.norm(dim=-1, keepdim=True)
        return Contexts((features * self.theta).sum(-1), features, torch.full((size,), 1 / size, dtype=torch.float64))


World = Tables | Fresh
