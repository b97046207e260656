"""Rewards regularised towards a reference policy: optimal policies, and the exact gap of any other.

J(pi) = E_x [ <pi, r> - D(pi || pi0) / eta ]. `eta` > 0 is the inverse temperature: the beta of DPO and DQO is 1 / eta.
Policies are logarithms. A divergence says which policy is optimal for a value, what any policy lacks of the optimum,
and which quadratic form this is near the optimum:  gap = eta/2 sum_a w_a (e_a - mean_w e)^2 + O(e^3)  for the policy of
the value r + e, with weights w that need not sum to 1. A value may be changed by any function of the context alone.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Table = Float[Tensor, "*#batch action"]


class KL:
    """D = KL(pi || pi0), whose optimal policy is Gibbs' (arXiv 2502.07460, 2502.06051, 2411.04625)."""

    def log_policy(self, log_reference: Tensor, value: Tensor, eta: float) -> Tensor:
        """log pi_f = log pi0 + eta f - log Z_f."""
        return torch.add(log_reference, value, alpha=eta).log_softmax(-1)

    def gap(self, log_reference: Table, reward: Table, log_policy: Table, eta: float) -> Float[Tensor, "*#batch"]:
        """J(pi*) - J(pi) = KL(pi || pi*) / eta, exactly."""
        return kl(log_policy, self.log_policy(log_reference, reward, eta)) / eta

    def weights(self, log_reference: Table, reward: Table, eta: float) -> Table:
        """w = pi*."""
        return self.log_policy(log_reference, reward, eta).exp()

    def optimum(self, log_reference: Table, reward: Table, eta: float) -> Float[Tensor, "*#batch"]:
        """J(pi*) = log Z_r / eta."""
        return (log_reference + eta * reward).logsumexp(-1) / eta

    def objective(self, log_reference: Table, reward: Table, log_policy: Table, eta: float) -> Float[Tensor, "*#batch"]:
        """J(pi) = <pi, r> - KL(pi || pi0) / eta."""
        return _mean(log_policy, reward) - kl(log_policy, log_reference) / eta


class ChiSquare:
    """D = sum_a pi0 f(pi / pi0) with the strongly convex f(u) = (u - 1)^2 / 2: the f-CB of arXiv 2502.06051, v3."""

    def log_policy(self, log_reference: Tensor, value: Tensor, eta: float) -> Tensor:
        """pi = pi0 max(0, 1 + eta (f - nu)), nu filling the probability up to 1; -inf where it is 0."""
        reference = log_reference.exp().expand_as(value)
        level = water_level(reference, value, eta)
        policy = reference * (1 + eta * (value - level)).clamp(min=0)
        return (policy / policy.sum(-1, keepdim=True)).log()

    def gap(self, log_reference: Table, reward: Table, log_policy: Table, eta: float) -> Float[Tensor, "*#batch"]:
        """J(pi*) - J(pi) = sum_a [ (pi - pi*)^2 / (2 eta pi0) + pi max(0, nu - 1/eta - r) ], exactly.

        The second term is what pi puts on actions that pi* leaves out, where the water is above their level.
        """
        reference, policy = log_reference.exp(), log_policy.exp()
        level = water_level(reference.expand_as(reward), reward, eta)
        height = 1 + eta * (reward - level)
        best = reference * height.clamp(min=0)
        return ((policy - best) ** 2 / (2 * eta * reference) + policy * (-height).clamp(min=0) / eta).sum(-1)

    def weights(self, log_reference: Table, reward: Table, eta: float) -> Table:
        """w = pi0 on the support of pi*."""
        log_best = self.log_policy(log_reference, reward, eta)
        return torch.where(log_best > -torch.inf, log_reference.exp(), 0.0)

    def objective(self, log_reference: Table, reward: Table, log_policy: Table, eta: float) -> Float[Tensor, "*#batch"]:
        """J(pi) = <pi, r> - sum_a pi0 (pi / pi0 - 1)^2 / (2 eta)."""
        ratio = (log_policy - log_reference).exp()
        return _mean(log_policy, reward) - (log_reference.exp() * (ratio - 1) ** 2).sum(-1) / (2 * eta)


Divergence = KL | ChiSquare


def kl(log_p: Table, log_q: Table) -> Float[Tensor, "*#batch"]:
    """KL(p || q) = sum_a p (d + expm1(-d)) with d = log(p/q): no term is negative, and none cancels another one.

    Where p is so much smaller than q that the second factor overflows, the term is q.
    """
    difference = log_p - log_q
    return torch.where(difference > -500, log_p.exp() * (difference + torch.expm1(-difference)), log_q.exp()).sum(-1)


def water_level(reference: Table, value: Table, eta: float) -> Float[Tensor, "*#batch 1"]:
    """nu with sum_a pi0 max(0, 1 + eta (f - nu)) = 1.

    With the actions in the order of their values, the k best ones are the support for the largest k whose own level
    1 + eta (f_k - nu_k) is positive, and nu_k solves the equation on them alone.
    """
    ordered, order = value.sort(-1, descending=True)
    mass = reference.gather(-1, order)
    total, mean = mass.cumsum(-1), (mass * ordered).cumsum(-1)
    levels = (mean + (total - 1) / eta) / total
    size = (1 + eta * (ordered - levels) > 0).sum(-1, keepdim=True)
    return levels.gather(-1, size - 1)


def _mean(log_policy: Table, value: Table) -> Float[Tensor, "*#batch"]:
    return (log_policy.exp() * value).sum(-1)
