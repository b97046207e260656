"""Direct Q-function Optimization (arXiv 2410.09302) and the methods that share its tensors: DRO-V, OREO."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from datamodules.batches import TrajectoryBatch
from lightning_modules.alignment.policy import Scores
from lightning_modules.alignment.policy_method import PolicyMethod
from lightning_modules.alignment.soft_q import Losses, full_kl, last_token
from lightning_modules.alignment.value import ValueHead, ValueNetwork
from lightning_modules.alignment.value_figures import reward_histogram, value_along_solutions


class DQO(PolicyMethod):
    """A policy that is its own Q-function, Q = V + beta log(pi / pi_ref), learned from stored scored responses.

    `objective(log_probs, values, batch)` gives the two losses (`soft_q.dqo`, `soft_q.dro`). The policy and the value
    are stepped together by one optimizer with a learning rate, a schedule and a gradient norm for each; for the first
    `value_warmup` of all steps (a fraction) only the value moves. `kl` adds the full-vocabulary KL(policy || reference)
    of OREO (arXiv 2412.16145, eq. 9), the only case in which the reference model is needed: its log-probabilities come
    with the responses.
    """

    batch_type: ClassVar[type] = TrajectoryBatch
    judges: ClassVar[bool] = True

    def __init__(
        self,
        objective: Callable[..., Losses],
        value: str,
        value_lr: float,
        value_warmup: float,
        kl: float = 0.0,
        **policy_method: Any,
    ) -> None:
        super().__init__(**policy_method)
        if value not in ("separate", "shared"):
            raise ValueError(f"model.value={value}: use separate or shared")
        if not 0 <= value_warmup <= 1:
            raise ValueError(f"model.value_warmup={value_warmup} is a fraction of the steps: use 0 to 1")
        self.objective, self.kl, self.value_lr, self.value_warmup = objective, kl, value_lr, value_warmup
        self.value = ValueNetwork(self.policy) if value == "separate" else ValueHead(self.policy.width)
        # outside the module tree: a frozen copy has no place in checkpoints, optimizers or sharding
        self._reference = [self.policy.frozen()] if kl else []

    def networks(self) -> dict[str, nn.Module]:
        return {"policy": self.policy, "value": self.value}

    def network_options(self, name: str) -> dict[str, Any]:
        return {"lr": self.value_lr} if name == "value" else {"delay": self.warmup_steps}

    @property
    def warmup_steps(self) -> int:
        """Steps before the policy moves."""
        return int(self.value_warmup * self.trainer.estimated_stepping_batches)

    def shard_units(self) -> list[nn.Module]:
        inner = self.value.shard_units() if isinstance(self.value, ValueNetwork) else [self.value]
        return super().shard_units() + inner

    def values(self, batch: TrajectoryBatch, scores: Scores) -> Float[Tensor, "batch steps"]:
        """V of the state before each predicted token."""
        return self.value(batch["ids"]) if isinstance(self.value, ValueNetwork) else self.value(scores.hidden)

    def training_step(self, batch: TrajectoryBatch, batch_idx: int) -> Tensor:
        scores = self.policy(batch["ids"], batch["mask"], logits=bool(self.kl))
        losses = self.objective(log_probs=scores.log_probs, values=self.values(batch, scores), batch=batch)
        policy_loss = losses.policy + self.kl * self._reference_kl(batch, scores) if self.kl else losses.policy
        loss = policy_loss + losses.value
        self.log_step(loss, policy_loss=policy_loss, value_loss=losses.value, **losses.logs)
        return loss

    def _reference_kl(self, batch: TrajectoryBatch, scores: Scores) -> Float[Tensor, ""]:
        reference = self._reference[0](batch["ids"], batch["mask"], logits=True)
        return full_kl(scores.logits, reference.logits, batch["mask"]).mean()

    def on_fit_start(self) -> None:
        for reference in self._reference:
            if isinstance(reference, nn.Module):
                reference.to(self.device)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """While the value warms up the policy is not stepped at all: no momentum, no step count, no decay."""
        if self.global_step < self.warmup_steps:
            for parameter in self.policy.parameters():
                parameter.grad = None

    # The value as a judge: can it tell right from wrong before the end?

    def begin_evaluation(self, k: int) -> None:
        super().begin_evaluation(k)
        self.separation = BinaryAUROC().to(self.device)

    def judge(self, batch: TrajectoryBatch) -> None:
        values = self.values(batch, self.policy(batch["ids"], batch["mask"]))
        self.separation.update(values[last_token(batch["mask"])], (batch["outcome"] > 0).long())

    def end_evaluation(self, stage: str) -> None:
        super().end_evaluation(stage)
        if self.trainer.datamodule.held_out:
            self.log(self.metric(f"{stage}/auc"), self.separation.compute())

    def figures(self) -> dict[str, Figure]:
        trajectories = self.trainer.datamodule.trajectories
        if not trajectories:
            return {}
        return {
            "value_along_solutions": value_along_solutions(self, trajectories),
            "rewards": reward_histogram(trajectories),
        }
