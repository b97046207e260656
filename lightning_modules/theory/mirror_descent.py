"""Ways to learn a game from exact payoffs, one update at a time (arXiv 2502.12678 and its neighbours).

Both players of these games are the same, so one policy plays itself. An algorithm has `begin(game)`, the state of the
first round, and is called with the state of a round and the occupancy that was played in it for that of the next one.
"""

import math
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from datamodules.batches import Game
from lightning_modules.theory.markov_game import Table, backward, mean_payoff, occupancy, q_values, uniform
from lightning_modules.theory.momentum import check_momentum, extrapolated

THEOREM_OMPO = 1 / math.sqrt(2)  # largest step of theorem 5, the divergence being 1-strongly convex


class State(NamedTuple):
    """The policy that plays a round, and what the algorithm keeps of the round before (nothing: zeros)."""

    log_policy: Table
    memory: Table


@runtime_checkable
class Algorithm(Protocol):
    """A way to learn a game."""

    def begin(self, game: Game) -> State: ...

    def __call__(self, game: Game, state: State, played: Table) -> State: ...


class MirrorDescent:
    """MPO and OMPO: log pi^{t+1} = log pi^t + beta Q^t - log Z in every state (algorithms 1 and 3).

    Q^t is the averaged value of the round, E Q^{pi^t, pi^t}. With `optimistic` (OMPO) the reward against the current
    policy counts twice and that against the previous one is taken off, 2 rbar^t - rbar^{t-1}. `backup="soft"` solves
    the entropy-regularised step over occupancies exactly (theorem 8, beta_h = beta / (H - h + 1)), "standard" is the
    ordinary Bellman backup (theorem 9). `returns="one_step"` leaves the future out, which is SPPO (arXiv 2405.00675)
    in every turn by itself; with one stage this is multiplicative weights, plain or optimistic.

    `beta` > 0; None is the step of theorem 4, sqrt(log(1 / pi_min) / (T H^2)) for a uniform start, which needs the
    number of rounds T beforehand.
    """

    def __init__(
        self,
        beta: float | None,
        rounds: int,
        optimistic: bool = False,
        backup: Literal["standard", "soft"] = "standard",
        returns: Literal["rollout", "one_step"] = "rollout",
    ) -> None:
        if beta is not None and not beta > 0:
            raise ValueError(f"model.algorithm.beta={beta} must be positive, or null for the theorem's")
        for key, value, known in (
            ("backup", backup, ("standard", "soft")),
            ("returns", returns, ("rollout", "one_step")),
        ):
            if value not in known:
                raise ValueError(f"model.algorithm.{key}={value}: there are {', '.join(known)}")
        self.beta, self.rounds = beta, rounds
        self.optimistic, self.backup, self.returns = optimistic, backup, returns

    def begin(self, game: Game) -> State:
        start = uniform(game)
        return State(start, mean_payoff(game, occupancy(game, start)))

    def __call__(self, game: Game, state: State, played: Table) -> State:
        log_policy, before = state
        reward = mean_payoff(game, played)
        counted = 2 * reward - before if self.optimistic else reward
        beta = self.beta or theorem_step(log_policy, self.rounds)
        if self.backup == "soft":
            return State(soft_step(game, counted, log_policy, beta), reward)
        q = counted if self.returns == "one_step" else q_values(game, counted, log_policy)
        return State((log_policy + beta * q).log_softmax(-1), reward)


class Accelerated:
    """Exact SPPO fits with momentum, APO (arXiv 2410.06293): log pihat = log pi + beta Q - log Z, then
    log pi' = log pihat + alpha (log pihat - log pihat before) - log Z'. At `alpha` = 0 this is MPO.

    `memory` is log pihat. Raises ValueError for alpha >= 1, with which the momentum grows without bound.
    """

    def __init__(self, beta: float, alpha: float) -> None:
        check_momentum(alpha)
        self.beta, self.alpha = beta, alpha

    def begin(self, game: Game) -> State:
        return State(uniform(game), uniform(game))

    def __call__(self, game: Game, state: State, played: Table) -> State:
        log_policy, before = state
        reward = mean_payoff(game, played)
        fitted = (log_policy + self.beta * q_values(game, reward, log_policy)).log_softmax(-1)
        return State(extrapolated(fitted, before, self.alpha), fitted)


class Extragradient:
    """A step against the policy of a trial step (mirror-prox): two evaluations of the game for each update."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def begin(self, game: Game) -> State:
        return State(uniform(game), torch.zeros_like(uniform(game)))

    def __call__(self, game: Game, state: State, played: Table) -> State:
        trial = self._step(game, state.log_policy, state.log_policy, played)
        return State(self._step(game, state.log_policy, trial, occupancy(game, trial)), state.memory)

    def _step(self, game: Game, start: Table, point: Table, played: Table) -> Table:
        q = q_values(game, mean_payoff(game, played), point)
        return (start + self.beta * q).log_softmax(-1)


class NashMD:
    """Nash-MD (arXiv 2312.00886): a step from, and against, the policy mixed geometrically with the uniform one.

    log pi' = (1 - beta tau) log pi + beta Q - log Z. It converges to the equilibrium of the game with a KL penalty of
    weight `tau` > 0, not to that of the game; beta tau in (0, 1].
    """

    def __init__(self, beta: float, tau: float) -> None:
        if not 0 < beta * tau <= 1:
            raise ValueError(f"model.algorithm: beta * tau = {beta * tau} must lie in (0, 1]; lower beta or tau")
        self.beta, self.tau = beta, tau

    def begin(self, game: Game) -> State:
        return State(uniform(game), torch.zeros_like(uniform(game)))

    def __call__(self, game: Game, state: State, played: Table) -> State:
        mixed = ((1 - self.beta * self.tau) * state.log_policy).log_softmax(-1)
        reward = mean_payoff(game, occupancy(game, mixed))
        return State((mixed + self.beta * q_values(game, reward, mixed)).log_softmax(-1), state.memory)


def soft_step(game: Game, reward: Table, log_policy: Table, beta: float) -> Table:
    """argmax_d beta <d, reward> - sum_h D_h(d, d^t) over occupancies, D_h the KL of trajectories up to h (app. E.2).

    V_h = log E_{pi^t} exp(beta_h Q_h) / beta_h and pi' = pi^t exp(beta_h (Q_h - V_h)), with beta_h = beta / (H - h + 1)
    for h = 1..H: the recursion printed in theorem 8 has its stages shifted by one.
    """
    stages = reward.shape[-3]
    steps = [beta / (stages - stage) for stage in range(stages)]

    def value(stage: int, q: Tensor) -> Tensor:
        return (log_policy[..., stage, :, :] + steps[stage] * q).logsumexp(-1) / steps[stage]

    q = backward(game, reward, value)
    return (log_policy + q.new_tensor(steps)[:, None, None] * q).log_softmax(-1)


def theorem_step(log_policy: Table, rounds: int) -> float:
    """beta of theorem 4, from a uniform start: pi_min is 1 over the number of actions."""
    return math.sqrt(math.log(log_policy.shape[-1]) / rounds) / log_policy.shape[-3]
