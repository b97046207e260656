"""Accelerated Preference Optimization: an iterative game with momentum in policy space (arXiv 2410.06293)."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.batches import Trajectory
from lightning_modules.alignment.extrapolation import (
    check_momentum,
    extrapolate_,
    extrapolated_log_probs,
    fitted_weights,
)
from lightning_modules.alignment.iterative import Iterative, with_weights
from lightning_modules.alignment.logit_extrapolation import extrapolated
from lightning_modules.alignment.policy import Policy, unsharded

MODES, CONTROLS = ("weights", "logits", "reference_only"), ("none", "beta_rescaled")


class APO(Iterative):
    """After every fit the policy is extrapolated away from the previous fit by `alpha`; the next one begins there.

    `weights` extrapolates the parameters, from which the next iteration answers, is referred to and learns on.
    `logits` answers from and refers to the extrapolated softmax of every token, and learns on from the fitted weights.
    `reference_only` extrapolates nothing but the reference's log-probabilities, which is exact where the loss sees
    their difference only. `control=beta_rescaled` is the same game without momentum at beta (1 - alpha), which reaches
    as far in the limit: no claim about momentum holds without it. The policy that a run leaves is the one last fitted.
    """

    def __init__(self, loss: Callable[..., Tensor], alpha: float, mode: str, control: str, **iterative: Any) -> None:
        check_momentum(alpha)
        for name, value, known in (("mode", mode, MODES), ("control", control, CONTROLS)):
            if value not in known:
                raise ValueError(f"model.{name}={value}: there are {', '.join(known)}")
        if control == "beta_rescaled":
            loss, alpha = functools.partial(loss, beta=(1 - alpha) * loss.keywords["beta"]), 0.0
        super().__init__(loss=loss, **iterative)
        self.alpha, self.mode = alpha, mode
        if alpha and self.reference != "previous":
            raise ValueError(f"model.reference={self.reference}: the momentum is away from the previous policy's fit")
        if alpha and mode == "weights" and self.policy.adapted:
            raise ValueError(
                "model.mode=weights: an extrapolated adapter (B A) has twice its rank and is none; take "
                "model.mode=reference_only or logits, or policy.lora=null"
            )
        if alpha and mode == "reference_only" and not self._sees_differences_only():
            raise ValueError(
                "model.mode=reference_only: this loss regresses each log-ratio by itself, and the extrapolated "
                "reference lacks its normalisation; take model.mode=weights, or pairwise=dpo, ipo or hinge"
            )

    def _sees_differences_only(self) -> bool:
        """Whether adding the same number to both log-ratios of a pair leaves the loss as it is."""
        a, b, lengths = torch.tensor([0.3]), torch.tensor([-0.2]), torch.tensor([[2, 3]])
        batch = {"label": torch.ones(1), "value": torch.tensor([[0.7, 0.4]])}
        there, here = self.losses(a + 1, b + 1, batch, lengths), self.losses(a, b, batch, lengths)
        return torch.allclose(there, here, rtol=1e-4)

    def advance(self, number: int) -> None:
        if not self.alpha:
            return
        fitted = fitted_weights(self.policy)
        before = self.kept.get("fitted", fitted)
        if self.mode == "weights":
            extrapolate_(self.policy, before, self.alpha)
        self.kept = {"fitted": fitted, "before": before}

    def sampler(self) -> Policy:
        if not self.alpha or self.mode != "logits":
            return self.policy
        return extrapolated(unsharded(self.policy), with_weights(self.policy, self.kept["before"]), self.alpha)

    def reference_log_probs(self, trajectories: list[Trajectory], cache: Path) -> list[list[float]]:
        own = super().reference_log_probs(trajectories, cache)
        if not self.alpha or self.mode != "reference_only":
            return own
        before = self.log_probs_of("before", trajectories, cache)
        return [_combined(mine, theirs, self.alpha) for mine, theirs in zip(own, before)]


def _combined(fitted: list[float], previous: list[float], alpha: float) -> list[float]:
    return extrapolated_log_probs(torch.tensor(fitted), torch.tensor(previous), alpha).tolist()
