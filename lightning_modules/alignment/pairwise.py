"""Losses of pairs: what two responses to one prompt should weigh against a reference, given which one is better.

In all of them `a` and `b` are log(pi / pi_ref) of the first and of the second response, summed over its tokens (nats),
and have the only gradient. `label` in [0, 1] is the probability that the first is better. The result is a loss per
pair. `beta` > 0 is the strength of the KL regularisation, the `eta` of papers on games is 1 / beta.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Pairs = Float[Tensor, " pair"]

# Of the difference of the two log-ratios: what depends on the prompt alone cancels


def dpo(a: Pairs, b: Pairs, label: Pairs, beta: float, label_smoothing: float = 0.0) -> Pairs:
    """Negative log-likelihood of the preference under Bradley-Terry (arXiv 2305.18290, eq. 7).

        -p log sigmoid(beta (a - b)) - (1 - p) log sigmoid(beta (b - a)),   p = label

    `label_smoothing` in [0, 0.5) is the chance that a label is flipped; above 0 this is conservative DPO (E. Mitchell,
    "A note on DPO with noisy preferences and relationship to IPO", 2023).
    """
    _check("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "in [0, 0.5)")
    flipped = label + label_smoothing * (1 - 2 * label)
    return _log_loss(a - b, flipped, beta)


def robust_dpo(a: Pairs, b: Pairs, label: Pairs, beta: float, label_smoothing: float = 0.1) -> Pairs:
    """DPO's loss of the true labels, estimated without bias from labels that are flipped (arXiv 2403.00409).

    [(1 - eps) l(p) - eps l(1 - p)] / (1 - 2 eps),   l DPO's loss, eps = label_smoothing in [0, 0.5)
    """
    _check("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "in [0, 0.5)")
    kept, flipped = _log_loss(a - b, label, beta), _log_loss(a - b, 1 - label, beta)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(
    a: Pairs, b: Pairs, label: Pairs, lengths: Int[Tensor, "pair 2"], beta: float, length_norm: bool = False
) -> Pairs:
    """Identity preference optimization: the margin regressed onto (2 p - 1) / (2 beta) (arXiv 2310.12036, eq. 17).

    `length_norm` divides each log-ratio by its response's tokens first, which TRL's `ipo` does and which, it says, the
    paper's results used; the right beta then changes by the length. A label between 0 and 1 moves the target; the mean
    over labels drawn with that probability differs from it by a constant.
    """
    _check("beta", beta, beta > 0, "positive")
    if length_norm:
        a, b = a / lengths[:, 0], b / lengths[:, 1]
    return (a - b - (label - 0.5) / beta).square()


def hinge(a: Pairs, b: Pairs, label: Pairs, beta: float) -> Pairs:
    """SLiC's hinge: nothing is asked of a margin beyond 1 / beta (arXiv 2305.10425, normalised as in 2309.06657)."""
    _check("beta", beta, beta > 0, "positive")
    margin = beta * (a - b)
    return label * torch.relu(1 - margin) + (1 - label) * torch.relu(1 + margin)


# Of each log-ratio by itself: a regression onto what the response deserves


def regression(a: Pairs, b: Pairs, targets: Float[Tensor, "pair 2"]) -> Pairs:
    """Half of (a - target_a)^2 + (b - target_b)^2: the mean over the two responses; targets in nats.

    The steps pi proportional to pi_ref exp(target) of mirror descent in a game, the logarithm of whose normaliser is
    put into the target: SPPO, GPO and MPO are this with targets of their own.
    """
    return 0.5 * ((a - targets[:, 0]).square() + (b - targets[:, 1]).square())


def sppo(a: Pairs, b: Pairs, value: Float[Tensor, "pair 2"], beta: float) -> Pairs:
    """Self-play preference optimization (arXiv 2405.00675, eq. 4.7): targets (P - 1/2) / beta.

    `value` is P(response beats the policy that answered), in [0, 1], its mean win rate.
    """
    return _scaled(a, b, value - 0.5, beta)


def sppo_single(a: Pairs, b: Pairs, label: Pairs, beta: float) -> Pairs:
    """SPPO with the probability that one beats the other in the place of mean win rates (SPPO's `sppo_single`)."""
    return _scaled(a, b, torch.stack([label - 0.5, 0.5 - label], 1), beta)


def sppo_hard(a: Pairs, b: Pairs, label: Pairs, beta: float) -> Pairs:
    """SPPO that only knows which one is better: (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2, a sum as in TRL.

    A tie (label 0.5) leaves the policy where the reference is.
    """
    return 2 * sppo_single(a, b, 0.5 + 0.5 * torch.sign(label - 0.5), beta)


def gpo(
    a: Pairs,
    b: Pairs,
    value: Float[Tensor, "pair 2"],
    lengths: Int[Tensor, "pair 2"],
    beta: float,
    score_scale: float = 1.0,
    target_clamp: float = 1000.0,
    gamma: float = 0.0,
) -> Pairs:
    """General preference optimization (arXiv 2410.02197, eq. 5.3): targets score_scale * s / beta.

    `value` is s, the mean score (log-odds of winning) against the policy that answered, its own 0 included.
    `score_scale` is 1 for log-odds and 1/tau for the raw scores of a preference embedding; a table that holds
    s_ij - s_ji has counted them twice. `target_clamp` (nats, ours) bounds the targets. `gamma` > 0 is LN-GPO, which
    divides a log-ratio by its response's tokens to that power (appendix E.2).
    """
    _check("beta", beta, beta > 0, "positive")
    targets = (score_scale * value / beta).clamp(-target_clamp, target_clamp)
    scale = lengths.to(a.dtype).pow(-gamma)
    return regression(a * scale[:, 0], b * scale[:, 1], targets)


def mpo(a: Pairs, b: Pairs, value: Float[Tensor, "pair 2"], beta: float, center: float = 0.0) -> Pairs:
    """The regression of MPO and OMPO (arXiv 2502.12678, eq. 5): targets (Q - center) / beta.

    `value` is Q of each response, for OMPO 2 Q_t - Q_{t-1}. `center` is the value of a tie, which leaves the policy
    unchanged: 1/2 of a step, half the steps that are left of a rollout.
    """
    return _scaled(a, b, value - center, beta)


def _scaled(a: Pairs, b: Pairs, advantages: Float[Tensor, "pair 2"], beta: float) -> Pairs:
    _check("beta", beta, beta > 0, "positive")
    return regression(a, b, advantages / beta)


def _log_loss(margin: Pairs, label: Pairs, beta: float) -> Pairs:
    _check("beta", beta, beta > 0, "positive")
    return -label * F.logsigmoid(beta * margin) - (1 - label) * F.logsigmoid(-beta * margin)


def _check(name: str, value: float, valid: bool, domain: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {domain}, but is {value}; change model.loss.{name}")
