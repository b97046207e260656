"""Supervised fine-tuning, on given solutions or on the model's own correct ones."""

from typing import Any, ClassVar

from torch import Tensor

from datamodules.batches import PreferenceBatch, TokenBatch, Trajectory, TrajectoryBatch
from lightning_modules.alignment.policy_method import PolicyMethod, reply_nll, token_mean


class SFT(PolicyMethod):
    """Cross-entropy on the answer tokens of worked solutions."""

    batch_type: ClassVar[type] = TokenBatch
    packs: ClassVar[bool] = True

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        log_probs = self.policy(batch["ids"], batch["mask"], batch.get("positions")).log_probs
        loss = token_mean(-log_probs, batch["token_share"])
        self.log_step(loss)
        return loss

    def judge(self, batch: TokenBatch | PreferenceBatch) -> None:
        nll, tokens = reply_nll(self.policy, batch)
        self.evaluation.add(tokens, loss=nll)


class RFT(SFT):
    """Rejection-sampling fine-tuning: cross-entropy on the unique correct answers sampled (arXiv 2308.01825).

    Also known as STaR (arXiv 2203.14465) and RAFT (arXiv 2304.06767), here one round of it. `solutions` adds the data's
    own solutions of the same problems, as 2308.01825 does.
    """

    batch_type: ClassVar[type] = TrajectoryBatch

    def __init__(self, solutions: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.imitates_solutions = solutions

    packs: ClassVar[bool] = False

    def keep(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        unique = {(t.prompt_id, tuple(t.response_ids)): t for t in reversed(trajectories) if t.reward > 0}
        if not unique:
            raise ValueError("no sampled answer is correct: raise rollouts.k or start from a better policy")
        return list(reversed(unique.values()))
