"""Kahneman-Tversky optimisation: a policy from responses that are each only marked good or bad (arXiv 2402.01306)."""

import torch
from jaxtyping import Float
from torch import Tensor


def kto(
    log_ratio_sum: Float[Tensor, " batch"],
    outcome: Float[Tensor, " batch"],
    reference_point: Float[Tensor, ""],
    beta: float,
    lambda_desirable: float = 1.0,
    lambda_undesirable: float = 1.0,
) -> Float[Tensor, " batch"]:
    """Loss of human utility relative to a reference point z0, per response (arXiv 2402.01306, section 4).

        desirable (outcome > 0):  lambda_D ( 1 - sigmoid(beta (d - z0)) )
        undesirable:              lambda_U ( 1 - sigmoid(beta (z0 - d)) )

    `log_ratio_sum` is d = sum_h log(pi/pi_ref) in nats and has the only gradient. `beta` > 0 is the aversion to risk,
    the lambdas >= 0 balance classes of unequal size; a response loses between 0 and its lambda.
    """
    margin = beta * (log_ratio_sum - reference_point.detach())
    # sigmoid(-x) is 1 - sigmoid(x) with its digits kept in the tail
    desirable_loss = lambda_desirable * torch.sigmoid(-margin)
    undesirable_loss = lambda_undesirable * torch.sigmoid(margin)
    return torch.where(outcome > 0, desirable_loss, undesirable_loss)


@torch.no_grad()
def reference_point(mismatched_log_ratio_sum: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Reference point z0 in nats: max(0, mean), an estimate of KL(pi || pi_ref) from mismatched prompts and responses.

    `mismatched_log_ratio_sum` is sum_h log(pi/pi_ref) of responses set under another row's prompt of the same batch
    (arXiv 2402.01306, section 4). Biased, and noisy in small batches; no gradient passes. On many processes, gather the
    rows first: the clip belongs after the mean.
    """
    return mismatched_log_ratio_sum.mean().clamp(min=0.0)
