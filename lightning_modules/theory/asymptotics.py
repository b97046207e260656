"""What the theorems leave as an order, in closed form for Gaussian noise: lim n E[gap] once every action has been seen.

Near the optimum gap = eta/2 sum_x d0(x) sum_a w(a|x) (e(x, a) - mean_w e)^2, with the weights w of the divergence
(`regularizer`). The error e is the noise of the estimate, whose covariance is known, and the bonus, which is not
random. All of these are derivations of ours; the tests hold simulations beside them. Online, the policy that takes the
data tends to pi*, and the sum of constant / t over the rounds is the constant times log T.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Table = Float[Tensor, "context action"]
Features = Float[Tensor, "context action feature"]


def table_rate(weights: Table, behaviour: Table, eta: float, noise: float, radius: float = 0.0) -> float:
    """For tables of means: eta/2 sum_x [ sigma^2 sum_a w (1 - w/W) / q + radius^2 W Var_{w/W}(q^-1/2) ].

    `behaviour` is q, `radius` that of a bonus radius / sqrt(n(x, a)), W = sum_a w. The probabilities of the contexts
    cancel: who comes rarely is estimated badly, and counts little.
    """
    total = weights.sum(-1, keepdim=True)
    spread = (weights * (1 - weights / total) / behaviour).sum()
    return float(eta / 2 * (noise**2 * spread + radius**2 * _spread(weights, behaviour.rsqrt()).sum()))


def linear_rate(
    weights: Table,
    behaviour: Table,
    features: Features,
    contexts: Float[Tensor, " context"],
    eta: float,
    noise: float,
    radius: float = 0.0,
) -> float:
    """For least squares on features: eta/2 [ sigma^2 tr(E_x Cov_w(phi) G^-1) + radius^2 E_x Var_w(|phi|_{G^-1}) ].

    G = E_x E_{a~q} phi phi^T. With one feature for every context and action this is `table_rate`.
    """
    inverse = torch.linalg.inv(moments(contexts[:, None] * behaviour, features))
    total = weights.sum(-1, keepdim=True)
    centred = features - (weights / total)[..., None].mul(features).sum(1, keepdim=True)
    spread = moments(contexts[:, None] * weights, centred)
    width = ((features @ inverse) * features).sum(-1).sqrt()
    bias = (contexts * _spread(weights, width)).sum()
    return float(eta / 2 * (noise**2 * (spread * inverse).sum() + radius**2 * bias))


def preference_rate(
    weights: Table,
    behaviours: list[tuple[float, Table]],
    reward: Table,
    eta: float,
    radius: Float[Tensor, "context action"] | None = None,
) -> float:
    """For Bradley-Terry maximum likelihood: eta/2 sum_x tr( (diag(w) - w w^T / W) I^+ ), W = sum_a w.

    I is the Fisher information of a pair drawn independently from q; `behaviours` are such policies with the share of
    the pairs that each of them drew. `radius` is n^1/2 times what is subtracted from the estimate as pessimism, times
    the square root of the context's probability.
    """
    information = sum(share * fisher(policy, reward) for share, policy in behaviours)
    total = weights.sum(-1, keepdim=True)
    local = torch.diag_embed(weights) - weights[..., :, None] * (weights / total)[..., None, :]
    rate = (local * torch.linalg.pinv(information, hermitian=True)).sum()
    return float(eta / 2 * (rate + (0.0 if radius is None else _spread(weights, radius).sum())))


def fisher(policy: Table, reward: Table) -> Float[Tensor, "context action action"]:
    """The information of one pair: diag(h 1) - h with h_ij = 2 q_i q_j sigmoid'(r_i - r_j) off the diagonal.

    Two draws of the same action tell nothing.
    """
    chance = torch.sigmoid(reward[..., :, None] - reward[..., None, :])
    met = 2 * policy[..., :, None] * policy[..., None, :] * chance * (1 - chance)
    met = met - torch.diag_embed(met.diagonal(dim1=-2, dim2=-1))
    return torch.diag_embed(met.sum(-1)) - met


def moments(weights: Table, features: Features) -> Float[Tensor, "feature feature"]:
    """sum_xa w phi phi^T."""
    return torch.einsum("xa,xai,xaj->ij", weights, features, features)


def coverage(log_policy: Table, log_reference: Table) -> float:
    """C = max pi/pi0."""
    return float((log_policy - log_reference).amax().exp())


def mean_divergence(policy: Table, divergence: Table, contexts: Float[Tensor, " context"]) -> float:
    """D2 = E_{x, a ~ pi} D^2(x, a)."""
    return float((contexts[:, None] * policy * divergence**2).sum())


def divergence(
    behaviour: Table, contexts: Float[Tensor, " context"], features: Features | None = None
) -> Float[Tensor, "context action"]:
    """D with D^2(x, a) = sup_{g, h} (g - h)^2(x, a) / E_{x, a ~ q} (g - h)^2.

    For tables that is 1 / (d0 q), for functions linear in features |phi|_{G^-1}^2.
    """
    if features is None:
        return (contexts[:, None] * behaviour).rsqrt()
    inverse = torch.linalg.inv(moments(contexts[:, None] * behaviour, features))
    return ((features @ inverse) * features).sum(-1).sqrt()


def duelling_divergence(behaviour: Table, contexts: Float[Tensor, " context"]) -> Table:
    """D with D^2(x, a) = sup_{g, h} inf_b (g - h - b(x))^2 / E_x Var_q(g - h) = (1/q(a|x) - 1) / d0(x) for tables."""
    return ((1 / behaviour - 1) / contexts[:, None]).sqrt()


def _spread(weights: Table, values: Table) -> Float[Tensor, " context"]:
    """W Var_{w/W}(values) of every context."""
    total = weights.sum(-1, keepdim=True)
    mean = (weights * values).sum(-1, keepdim=True) / total
    return (weights * (values - mean) ** 2).sum(-1)
