"""Finite-horizon processes with a reference policy: soft values, occupancies, the exact gap, its closed-form rate.

J(pi) = E sum_h [ r_h - log(pi_h / pi0_h) / eta ]. Tables are (..., step, state, action), policies are logarithms, and
the state after step h is drawn from `transition[h, s, a]`. Everything in the precision of the tables (float64).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batches import Bandit, DecisionProcess
from lightning_modules.theory.regularizer import kl

Table = Float[Tensor, "*#batch step state action"]


def as_process(bandit: Bandit) -> DecisionProcess:
    """A bandit as a process of one step, its contexts the states."""
    nothing = bandit.reward.new_zeros(0, *bandit.log_reference.shape, len(bandit.contexts))
    return DecisionProcess(
        bandit.name, bandit.reward[None], nothing, bandit.log_reference[None], bandit.contexts, bandit.noise
    )


def soft_value(log_reference: Tensor, q: Tensor, eta: float) -> Tensor:
    """V(s) = log sum_a pi0 exp(eta Q) / eta."""
    return torch.add(log_reference, q, alpha=eta).logsumexp(-1) / eta


def optimal(process: DecisionProcess, eta: float) -> tuple[Table, Table]:
    """Q*_h = r_h + P_h V*_{h+1} and log pi*_h = log pi0_h + eta (Q*_h - V*_h)."""
    value, values = None, []
    for step in reversed(range(len(process.reward))):
        q = process.reward[step] if value is None else process.reward[step] + process.transition[step] @ value
        value = soft_value(process.log_reference[step], q, eta)
        values.append(q)
    q = torch.stack(values[::-1])
    return q, (process.log_reference + eta * q).log_softmax(-1)


def occupancy(process: DecisionProcess, log_policy: Table) -> Table:
    """d_h(s, a) of a policy; sums to 1 at every step."""
    policy = log_policy.exp()
    state, visits = process.start.expand(*policy.shape[:-3], -1), []
    for step in range(policy.shape[-3]):
        if step:
            state = torch.einsum("...sa,sat->...t", visits[-1], process.transition[step - 1])
        visits.append(state[..., None] * policy[..., step, :, :])
    return torch.stack(visits, -3)


def gap(process: DecisionProcess, log_policy: Table, log_best: Table, eta: float) -> Float[Tensor, "*#batch"]:
    """J(pi*) - J(pi) = E_{s_h ~ pi} sum_h KL(pi_h || pi*_h) / eta, exactly."""
    states = occupancy(process, log_policy).sum(-1)
    return (states * kl(log_policy, log_best)).sum((-1, -2)) / eta


def objective(process: DecisionProcess, log_policy: Table, eta: float) -> Float[Tensor, "*#batch"]:
    """J(pi)."""
    paid = process.reward - (log_policy - process.log_reference) / eta
    return (occupancy(process, log_policy) * paid).sum((-1, -2, -3))


def best_reward(process: DecisionProcess) -> float:
    """max_pi E sum_h r_h, without regularisation."""
    value = torch.zeros_like(process.start)
    for step in reversed(range(len(process.reward))):
        after = process.transition[step] @ value if step < len(process.transition) else 0
        value = (process.reward[step] + after).amax(-1)
    return float(process.start @ value)


def growth(process: DecisionProcess, eta: float, radius: float = 0.0) -> float:
    """lim t E[gap of episode t]: what regret has per unit of log T in the long run (a derivation of ours).

    Where pi* is played, n_h(s, a) is t d*_h(s, a). The error of Q* to first order is e_h = f_h + A_h e_{h+1}, A_h the
    transition under pi* and f_h the error of least squares: random with variance (sigma^2 + Var_P V*_{h+1}) / n and,
    for a bonus radius / sqrt(n), a bias. The gap is eta/2 sum_h E_{d*_h(s)} Var_{pi*_h}(e_h). Pairs that pi* never
    reaches count nothing, and have no error here.
    """
    q, log_best = optimal(process, eta)
    visits, policy = occupancy(process, log_best), log_best.exp()
    second, bias, rate = None, None, 0.0
    for step in reversed(range(len(q))):
        counted = torch.where(visits[step] > 0, 1 / visits[step], 0.0).flatten()
        variance, pull = torch.full_like(counted, process.noise**2), radius * counted.sqrt()
        covariance = torch.zeros(len(counted), len(counted), dtype=q.dtype)
        if second is not None:
            moves = process.transition[step].flatten(0, 1)
            value = soft_value(process.log_reference[step + 1], q[step + 1], eta)
            variance = variance + moves @ value**2 - (moves @ value) ** 2
            forward = (moves[..., None] * policy[step + 1]).flatten(1) * (counted > 0)[:, None]
            covariance, pull = forward @ second @ forward.T, pull + forward @ bias
        second, bias = covariance + torch.diag(variance * counted), pull
        rate += _spread(visits[step], second + bias[:, None] * bias)
    return eta / 2 * rate


def _spread(visits: Float[Tensor, "state action"], second: Float[Tensor, "pair pair"]) -> float:
    """E_{d(s)} Var_pi(e) from the second moments of e over pairs of states and actions."""
    states, actions = visits.shape
    blocks = second.reshape(states, actions, states, actions)[range(states), :, range(states)]
    policy = visits / visits.sum(-1, keepdim=True).clamp(min=1e-300)
    inner = torch.einsum("sa,saa->s", policy, blocks) - torch.einsum("sa,sab,sb->s", policy, blocks, policy)
    return float(visits.sum(-1) @ inner)
