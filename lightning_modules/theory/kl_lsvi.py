"""KL-LSVI-UCB: optimistic least-squares value iteration for KL-regularised processes (arXiv 2502.07460)."""

import math

import lightning as L
import torch
from torch import Tensor

from datamodules.batches import Bandit, DecisionProcess
from lightning_modules.theory.bonus import Bonus
from lightning_modules.theory.decisions import regularized
from lightning_modules.theory.kl_bandits import Decision
from lightning_modules.theory.randomness import normal, sampled, uniforms
from lightning_modules.theory.regret import Regret
from lightning_modules.theory.simulation import Measured
from lightning_modules.theory.soft_mdp import as_process, best_reward, gap, growth, occupancy, optimal, soft_value
from lightning_modules.theory.worlds import ACTION, CONTEXT, NOISE, REST


class KLLSVIUCB(Regret):
    """Plan backwards with a bonus, Q_h = min(least squares of r + V_{h+1} + b_h, H - h + 1), and play an episode of it.

    A round is an episode; `copies` runs side by side. With tables of states and actions least squares are means. A pair
    that was never visited has the value H - h + 1. A bandit is a process of one step, on which this is KL-UCB.
    """

    def __init__(
        self, eta: float, bonus: Bonus, decision: Decision, copies: int, seed: int, fit_from: int, at: list[int]
    ) -> None:
        super().__init__(eta, copies, seed, fit_from, at)
        self.bonus, self.decision = bonus, decision

    def meet(self, data: L.LightningDataModule) -> None:
        """Take the process from the data; a bandit with rewards in [0, 1] is one too."""
        super().meet(data)
        process = getattr(data, "instance", None)
        if isinstance(process, Bandit) and not process.horizons and process.reward_range == (0.0, 1.0):
            process = as_process(process)
        if not isinstance(process, DecisionProcess):
            raise ValueError(f"data={data.name} is no process with rewards in [0, 1]: take data=bandit instance=mdp")
        if data.log is not None:
            raise ValueError("data.log is for offline methods (model=kl_pcb, kl_pcdb, f_cb): online ones need rewards")
        self.problem, self.process, shape = process.name, process, process.reward.shape
        self.radius = self.bonus.process(process.noise, data.rounds, tuple(shape))
        self.q, self.log_best = optimal(process, self.eta)
        self.best_reward = best_reward(process)
        for name, size in {"visits": shape, "total": shape, "moves": process.transition.shape}.items():
            self.register_buffer(name, torch.zeros(self.copies, *size, dtype=torch.float64))
        if self.decision is regularized:
            self.predicted = math.log(2) * growth(process, self.eta, self.radius)
        self.begin(self.copies)

    def play(self, rounds: list[int]) -> Measured:
        steps = len(self.process.reward)
        draws = uniforms(self.seed, self.copies, rounds[0], len(rounds), REST * steps)
        draws = draws.unflatten(-1, (steps, REST))
        noise = self.process.noise * normal(draws[..., NOISE])
        played = torch.empty(len(rounds), *self.visits.shape, dtype=torch.float64)
        for r in range(len(rounds)):
            played[r] = self.plan()
            self._episode(played[r], draws[r], noise[r])
        gaps = gap(self.process, played, self.log_best, self.eta)
        reward = (occupancy(self.process, played) * self.process.reward).sum((-1, -2, -3))
        return self.add(gaps, self.best_reward - reward)

    def plan(self) -> Tensor:
        """log pi_h(a|s) for the optimistic Q_h, of every copy: copy, step, state, action."""
        steps, eta, seen = self.visits.shape[1], self.eta, self.visits.clamp(min=1)
        value, planned = None, [None] * steps
        for step in reversed(range(steps)):
            ahead = self.total[:, step]
            if value is not None:
                ahead = ahead + (self.moves[:, step] @ value[:, None, :, None])[..., 0]
            q = ahead / seen[:, step]
            if self.radius:
                width = (self.radius * self.visits[:, step].rsqrt()).clamp(max=steps - step)
                q = (q + width).clamp(max=steps - step)
            reference = self.process.log_reference[step]
            value = soft_value(reference, q, eta)
            policy = torch.add(reference, q, alpha=eta).log_softmax(-1)
            planned[step] = self.decision(policy, self.log_best[step], reference, q)
        return torch.stack(planned, 1)

    def _episode(self, log_policy: Tensor, chance: Tensor, noise: Tensor) -> None:
        copies, process = torch.arange(self.copies), self.process
        state = sampled(process.start.log().expand(self.copies, -1), chance[:, 0, CONTEXT, None])[:, 0]
        for step in range(len(process.reward)):
            action = sampled(log_policy[copies, step, state], chance[:, step, ACTION, None])[:, 0]
            self.visits[copies, step, state, action] += 1
            self.total[copies, step, state, action] += process.reward[step, state, action] + noise[:, step]
            if step < len(process.transition):
                moves = process.transition[step, state, action].log()
                after = sampled(moves, chance[:, step + 1, CONTEXT, None])[:, 0]
                self.moves[copies, step, state, action, after] += 1
                state = after
