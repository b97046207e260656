"""KL-UCB: optimism for KL-regularised contextual bandits, whose regret is logarithmic (arXiv 2502.07460).

Not the index policy of the same name (Garivier and Cappe, 2011): there KL is a confidence bound, here the objective.
"""

import math
from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor

from datamodules.batches import Bandit, FreshFeatures
from lightning_modules.theory.asymptotics import linear_rate, table_rate
from lightning_modules.theory.bonus import Bonus
from lightning_modules.theory.decisions import regularized
from lightning_modules.theory.learners import Linear, Tabular
from lightning_modules.theory.randomness import normal, sampled, uniforms
from lightning_modules.theory.regret import Regret
from lightning_modules.theory.regularizer import Divergence
from lightning_modules.theory.simulation import Measured
from lightning_modules.theory.worlds import ACTION, NOISE, Fresh, Scene, Tables

SAMPLE = 10_000  # contexts by which the rate of new features is integrated
Decision = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class KLUCB(Regret):
    """In each round play the regularised optimum for estimate plus bonus, and learn from the reward of its action.

    `copies` runs side by side. A round's regret is the exact gap of the policy played in it, averaged over contexts;
    with features that are new each round, the gap in this round's context. `plain_regret` is what its mean reward lacks
    of the best action's. With several horizons there are `copies` for each, whose regret ends with its horizon.
    """

    def __init__(
        self,
        eta: float,
        bonus: Bonus,
        decision: Decision,
        regularizer: Divergence,
        ridge: float,
        copies: int,
        seed: int,
        fit_from: int,
        at: list[int],
    ) -> None:
        super().__init__(eta, copies, seed, fit_from, at)
        if not ridge > 0:
            raise ValueError(f"model.ridge={ridge} must be positive")
        self.bonus, self.decision, self.regularizer, self.ridge = bonus, decision, regularizer, ridge

    def meet(self, data: L.LightningDataModule) -> None:
        """Take the bandit from the data, and make a learner for what is known of its rewards."""
        super().meet(data)
        bandit = getattr(data, "instance", None)
        if not isinstance(bandit, Bandit | FreshFeatures):
            raise ValueError(f"data={data.name} is no bandit: take data=bandit with instance=uniform, linear, ...")
        if data.log is not None:
            raise ValueError("data.log is for offline methods (model=kl_pcb, kl_pcdb, f_cb): online ones need rewards")
        self.problem, self.noise = bandit.name, bandit.noise
        self.horizons = tuple(n for n in getattr(bandit, "horizons", ()) if n <= data.rounds)
        ends = torch.tensor(self.horizons or (data.rounds,), dtype=torch.float64).repeat_interleave(self.copies)
        known = isinstance(bandit, Bandit)
        self.world = Tables(bandit, list(self.horizons), self.copies) if known else Fresh(bandit, self.copies)
        self.register_buffer("ends", ends, persistent=False)
        self.learner = self._learner(bandit, ends[:, None, None])
        self.predicted = self._predict()
        self.begin(len(ends))

    def _learner(self, bandit: Bandit | FreshFeatures, horizon: Tensor) -> Tabular | Linear:
        low, high = bandit.reward_range
        if isinstance(bandit, Bandit) and bandit.features is None:
            radius = self.bonus.table(self.noise, horizon, bandit.log_reference.numel())
            return Tabular((len(horizon), *bandit.log_reference.shape), radius, low, high)
        features = (bandit.features if isinstance(bandit, Bandit) else bandit.theta).shape[-1]
        radius = self.bonus.linear(self.noise, horizon, features, self.ridge)
        return Linear(len(horizon), features, radius, high - low, self.ridge)

    def _predict(self) -> float | None:
        """What a doubling of T adds in the long run, where the regularised optimum of one bandit is played.

        Features that are new in each round are those of `SAMPLE` rounds here, which are not the rounds played.
        """
        if self.horizons or self.decision is not regularized:
            return None
        reward, features, contexts = self.world.context_sample(self.seed, SAMPLE)
        problem = (self.world.log_reference.expand_as(reward), reward, self.eta)
        weights, policy = self.regularizer.weights(*problem), self.regularizer.log_policy(*problem).exp()
        if not (policy > 0).all():
            return None
        radius = float(self.learner.radius[0, 0, 0])
        if features is None:
            return math.log(2) * table_rate(weights, policy, self.eta, self.noise, radius)
        return math.log(2) * linear_rate(weights, policy, features, contexts, self.eta, self.noise, radius)

    def play(self, rounds: list[int]) -> Measured:
        world = self.world
        draws = uniforms(self.seed, len(self.ends), rounds[0], len(rounds), world.numbers)
        scene = world.scene(draws)
        played = self._rounds(scene, draws[..., ACTION, None], self.noise * normal(draws[..., NOISE, None]))
        going = torch.tensor(rounds)[:, None] < self.ends
        gaps = self.regularizer.gap(world.log_reference, scene.reward, played, self.eta)
        plain = scene.reward.amax(-1) - (played.exp() * scene.reward).sum(-1)
        return self.add(*((lost * world.contexts).sum(-1) * going for lost in (gaps, plain)))

    def _rounds(self, scene: Scene, chance: Tensor, noise: Tensor) -> Tensor:
        """Play these rounds, and return the logarithms of the policies: round, copy, context, action."""
        reference, actions = self.world.log_reference, scene.reward.shape[-1]
        best = self.regularizer.log_policy(reference, scene.reward, self.eta)
        copies, played = torch.arange(scene.reward.shape[1]), torch.empty_like(best)
        for r, context in enumerate(scene.context):
            features = None if scene.features is None else scene.features[r]
            value = self.learner.value(features)
            planned = self.regularizer.log_policy(reference, value, self.eta)
            played[r] = self.decision(planned, best[r], reference, value)
            cell = context[:, None] * actions + sampled(played[r, copies, context], chance[r])
            chosen = None if features is None else features.flatten(1, 2)[copies, cell[:, 0]]
            self.learner.learn(cell, chosen, scene.reward[r].flatten(1).gather(1, cell) + noise[r])
        return played
