"""Bradley-Terry: how often answer i beats answer j is sigmoid(s_i - s_j), and which scores explain wins best."""

import torch
from jaxtyping import Float
from torch import Tensor

STEPS = 100


def penalised_fit(
    wins: Float[Tensor, "*batch answer answer"], beta: float, penalty: float, longest: float = torch.inf
) -> Float[Tensor, "*batch answer"]:
    """The minimiser of sum_ij wins_ij -log sigmoid(beta (s_i - s_j)) + `penalty` |s|^2, by Newton's method.

    `wins` are fractions of all pairs. A step moves no score by more than `longest`, which fits need that start far from
    their end, as where an answer never loses. Raises FloatingPointError where that does not converge.
    """
    scores = torch.zeros_like(wins[..., 0])
    eye = torch.eye(scores.shape[-1], dtype=scores.dtype)
    for _ in range(STEPS):
        wrong = torch.sigmoid(-beta * (scores[..., :, None] - scores[..., None, :]))
        pull = wins * wrong
        gradient = beta * (pull.sum(-2) - pull.sum(-1)) + 2 * penalty * scores
        if gradient.abs().max() < 1e-12:
            return scores
        weight = beta**2 * pull * (1 - wrong)
        weight = weight + weight.mT
        hessian = torch.diag_embed(weight.sum(-1)) - weight + 2 * penalty * eye
        step = torch.linalg.solve(hessian, gradient)
        scores = scores - step / (step.abs().amax(-1, keepdim=True) / longest).clamp(min=1)
    raise FloatingPointError(
        f"the fit did not converge, its gradient is {float(gradient.abs().max()):.1e}: raise model.beta or model.pairs"
    )
