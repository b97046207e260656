"""Constant-sum games with a finite horizon, solved as tables (arXiv 2502.12678).

A policy is log pi_h(a|s), an occupancy d_h(s, a) the probability of being there under it. The two players move in
independent copies of one process, so a fixed opponent with occupancy d' turns the game into a decision process with the
reward rbar_h(s, a) = E_{(t,b) ~ d'_h} r_h(s, a, t, b), and no pairwise dynamic program is ever needed. All functions
take one game or a batch of games in the leading dimensions, in the precision of their tables (float64).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batches import Game

Table = Float[Tensor, "*games stage state action"]
# V_h(s) from the stage, counted from 0, and Q_h(s, a)
ValueOf = Callable[[int, Float[Tensor, "*games state action"]], Float[Tensor, "*games state"]]


def uniform(game: Game) -> Table:
    """The policy that takes every action equally often, as logarithms."""
    shape = game.payoff.shape[:-2]
    return game.payoff.new_full(shape, -torch.tensor(float(shape[-1])).double().log())


def occupancy(game: Game, log_policy: Table) -> Table:
    """d_h(s, a) of a policy from state 0 on; sums to 1 at every stage."""
    policy = log_policy.exp()
    state = torch.zeros_like(policy[..., 0, :, 0])
    state[..., 0] = 1
    visits = []
    for stage in range(policy.shape[-3]):
        if stage:
            state = torch.einsum("...sa,...sat->...t", visits[-1], game.transition[..., stage - 1, :, :, :])
        visits.append(state[..., None] * policy[..., stage, :, :])
    return torch.stack(visits, -3)


def mean_payoff(game: Game, opponent: Table) -> Table:
    """rbar_h(s, a), the payoff against an opponent's occupancy."""
    rows = game.payoff.flatten(-4, -3).flatten(-2, -1)
    return (rows @ opponent.flatten(-2, -1)[..., None])[..., 0].unflatten(-1, opponent.shape[-2:])


def q_values(game: Game, reward: Table, log_policy: Table) -> Table:
    """Q_h(s, a) of a policy in the decision process with that reward: now and, under the policy, later."""
    policy = log_policy.exp()
    return backward(game, reward, lambda stage, q: (policy[..., stage, :, :] * q).sum(-1))


def best_response_value(game: Game, reward: Table) -> Float[Tensor, "*games"]:
    """max_pi of the summed reward from state 0, by dynamic programming."""
    return backward(game, reward, lambda stage, q: q.amax(-1))[..., 0, 0, :].amax(-1)


def exploitability(game: Game, played: Table) -> Float[Tensor, "*games"]:
    """max_pi V(pi, mu) - H/2 >= 0 of the policy mu with this occupancy; half of the duality gap, 0 at equilibrium."""
    return best_response_value(game, mean_payoff(game, played)) - played.shape[-3] / 2


def policy_of(played: Table) -> Table:
    """log pi of an occupancy, which may be a sum over policies; uniform in states that are never reached."""
    states = played.sum(-1, keepdim=True)
    return torch.where(states > 0, played / states, 1 / played.shape[-1]).log()


def pairwise_q(
    game: Game, log_policy: Table, log_opponent: Table
) -> Float[Tensor, "*games stage state action state action"]:
    """Q_h(s, a, t, b) of both players' pairs of states, which learning never needs; the identities are tested on it."""
    joint = torch.einsum("...sa,...tb->...satb", log_policy.exp(), log_opponent.exp())
    value, values = None, []
    for stage in reversed(range(joint.shape[-5])):
        q = game.payoff[..., stage, :, :, :, :]
        if value is not None:
            moves = game.transition[..., stage, :, :, :]
            q = q + torch.einsum("...sax,...tby,...xy->...satb", moves, moves, value)
        value = (joint[..., stage, :, :, :, :] * q).sum((-1, -3))
        values.append(q)
    return torch.stack(values[::-1], -5)


def backward(game: Game, reward: Table, value_of: ValueOf) -> Table:
    """Q_h = reward_h + E V_{h+1} from the last stage on, with V_h = value_of(h, Q_h)."""
    value, values = None, []
    for stage in reversed(range(reward.shape[-3])):
        q = reward[..., stage, :, :]
        if value is not None:
            q = q + torch.einsum("...sat,...t->...sa", game.transition[..., stage, :, :, :], value)
        value = value_of(stage, q)
        values.append(q)
    return torch.stack(values[::-1], -3)
