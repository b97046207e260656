"""Kahneman-Tversky Optimization on scored responses (arXiv 2402.01306)."""

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from datamodules.batches import TrajectoryBatch
from lightning_modules.alignment.kahneman_tversky import kto, reference_point
from lightning_modules.alignment.policy_method import PolicyMethod
from lightning_modules.alignment.soft_q import masked_mean


def mismatched(batch: TrajectoryBatch) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length-1"]]:
    """Every prompt of the batch followed by the next row's response, padded with zeros, and the response mask."""
    prompts, lengths = batch["prompt_length"].tolist(), batch["mask"].sum(1).tolist()
    following = [(i + 1) % len(prompts) for i in range(len(prompts))]
    width = max(prompts[i] + lengths[j] for i, j in enumerate(following))
    ids = batch["ids"].new_zeros(len(prompts), width)
    mask = batch["mask"].new_zeros(len(prompts), width - 1)
    for i, j in enumerate(following):
        ids[i, : prompts[i]] = batch["ids"][i, : prompts[i]]
        ids[i, prompts[i] : prompts[i] + lengths[j]] = batch["ids"][j, prompts[j] : prompts[j] + lengths[j]]
        mask[i, prompts[i] - 1 : prompts[i] + lengths[j] - 1] = True
    return ids, mask


class KTO(PolicyMethod):
    """Right answers above, wrong ones below a reference point, the mean log-ratio of mismatched pairs."""

    batch_type: ClassVar[type] = TrajectoryBatch

    def __init__(self, beta: float, lambda_desirable: float, lambda_undesirable: float, **policy_method: Any) -> None:
        super().__init__(**policy_method)
        self.beta, self.lambdas = beta, (lambda_desirable, lambda_undesirable)
        # outside the module tree: a frozen copy has no place in checkpoints, optimizers or sharding
        self._reference = [self.policy.frozen()]

    def on_fit_start(self) -> None:
        if isinstance(self._reference[0], torch.nn.Module):
            self._reference[0].to(self.device)

    def training_step(self, batch: TrajectoryBatch, batch_idx: int) -> Tensor:
        log_ratio = self.policy(batch["ids"], batch["mask"]).log_probs - batch["lp_ref"]
        log_ratio = log_ratio.masked_fill(~batch["mask"], 0.0).sum(1)
        origin = self._reference_point(batch)
        loss = kto(log_ratio, batch["outcome"], origin, self.beta, *self.lambdas).mean()
        right = batch["outcome"] > 0
        self.log_step(
            loss,
            reference_point=origin,
            log_ratio_correct=masked_mean(log_ratio, right),
            log_ratio_wrong=masked_mean(log_ratio, ~right),
        )
        return loss

    @torch.no_grad()
    def _reference_point(self, batch: TrajectoryBatch) -> Float[Tensor, ""]:
        ids, mask = mismatched(batch)
        log_ratio = self.policy(ids, mask).log_probs - self._reference[0](ids, mask).log_probs
        # the clip at zero belongs after the mean over all processes
        return reference_point(self.all_gather(log_ratio.sum(1)).reshape(-1))
