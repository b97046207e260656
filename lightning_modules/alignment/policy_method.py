"""What every method that trains a language policy shares: answering problems and scoring the answers."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from datamodules.batches import PreferenceBatch, Prompt, PromptBatch, TokenBatch, Trajectory, TrajectoryBatch
from lightning_modules.alignment.answer_evaluation import AnswerEvaluation
from lightning_modules.alignment.generation import Sample, Sampling, generate
from lightning_modules.alignment.policy import Policy, unsharded
from lightning_modules.alignment.reply_evaluation import ReplyEvaluation
from lightning_modules.alignment.rollout import (
    cache_key,
    load,
    monte_carlo_rewards,
    rollout,
    score_responses,
    stored,
)
from lightning_modules.method import Method


def per_cent(value: float) -> str:
    """A fraction as it stands in the table."""
    return f"{100 * value:.1f}"


class PolicyMethod(Method):
    """A method whose result is a policy. Validation answers greedily; the test also samples K answers per problem.

    The datamodule brings the problems and `scorer`, which says what a response answers and whether that is right.
    """

    headline: ClassVar[tuple[str, str]] = ("val/greedy", "max")
    columns: ClassVar[dict[str, Callable[[float], str]]] = {
        name: per_cent for name in ("greedy", "sampled", "maj@", "pass@", "auc", "reward", "format_rate")
    }
    caption: ClassVar[str] = "per cent of held-out problems, 95 % bootstrap intervals over problems"
    # the headline where no answer can be checked: something of held-out pairs
    unchecked: ClassVar[tuple[str, str]] = ("val/loss", "min")
    leaves: ClassVar[str] = (
        "The policy in `export/` loads with `AutoModelForCausalLM.from_pretrained`; `samples.jsonl` has every answer."
    )
    imitates_solutions = False  # whether the data's own solutions join the sampled answers
    labels: ClassVar[bool] = False  # whether it samples pairs of responses and has its oracle label them, `iterate`
    steps_per_iteration: int | None = None  # of one that `labels`: optimizer steps with what one `iterate` returned
    judges: ClassVar[bool] = False  # whether evaluation also brings scored held-out responses, as a second loader

    def __init__(
        self,
        policy: Policy,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., float],
        evaluation: dict[str, Any],
        rollouts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.policy = policy
        evaluation = dict(evaluation)
        self.k, self.batch_rows = evaluation.pop("k"), evaluation.pop("batch_rows")
        self.sampling = Sampling(**evaluation)
        self.rollouts = dict(rollouts or {})
        self.samples: list[dict[str, Any]] = []
        self.started_from: str | None = None
        self.restored = False  # whether the weights are those of a checkpoint

    def networks(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    def shard_units(self) -> list[nn.Module]:
        return self.policy.shard_units()

    def count(self, batch: Any) -> int:
        return int(batch["mask"].sum())

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # problems are lists; the generator moves their tokens
        return batch if "prompts" in batch else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def keep(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """The sampled responses that this method learns from."""
        return trajectories

    def meet(self, data: L.LightningDataModule) -> None:
        """What is measured depends on whether the data can check an answer."""
        super().meet(data)
        if data.scorer is None:
            shares = dict.fromkeys(("pair_accuracy", "beats_data", "unfinished_rate"), per_cent)
            self.headline = self.unchecked
            self.columns = {**shares, **dict.fromkeys(("margin", "loss", "mean_length"), "{:.3g}".format)}
            self.caption = "held-out pairs and replies, shares in per cent, 95 % bootstrap intervals over prompts"

    def setup(self, stage: str) -> None:
        """Note which weights the run starts from: a checkpoint is restored, and sharding done, only after this."""
        if self.started_from is None:
            self.started_from = self.policy.fingerprint()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A test of a checkpoint alone must find what was computed with the weights that its run started from."""
        checkpoint["started_from"] = self.started_from

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.started_from, self.restored = checkpoint.get("started_from"), True

    def rollout(self, prompts: list[Prompt], identity: dict[str, Any], folder: Path) -> list[Trajectory]:
        """K scored answers to every prompt from the policy that the run starts from, cached under `folder`.

        Once the policy has moved, in a resumed run as well, they come from the cache or not at all.
        """
        if self.trainer.global_step:
            return load(folder / cache_key(self.started_from, prompts, self.rollouts["k"], self.behaviour, identity))
        return rollout(
            self.policy,
            prompts,
            self.rollouts["k"],
            self.behaviour,
            self.scorer,
            folder,
            identity=identity,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            barrier=self.trainer.strategy.barrier,
            batch_rows=self.rollouts["batch_rows"],
        )

    @property
    def behaviour(self) -> Sampling:
        """How answers to learn from are sampled."""
        return Sampling(**{name: value for name, value in self.rollouts.items() if name not in ("k", "batch_rows")})

    def with_log_probs(self, trajectories: list[Trajectory], folder: Path) -> list[Trajectory]:
        """Trajectories of unknown origin with the starting policy's log-probabilities as reference and as behaviour.

        OREO does the same (arXiv 2412.16145); importance weights then start at 1 and measure the distance moved.
        """
        pairs = [(t.prompt_ids, t.response_ids) for t in trajectories]
        values = self._stored("log_probs", pairs, lambda: score_responses(unsharded(self.policy), pairs), folder)
        return [replace(t, lp_mu=lp, lp_ref=lp) for t, lp in zip(trajectories, values)]

    def monte_carlo_rewards(self, trajectories: list[Trajectory], folder: Path) -> list[list[float]]:
        """Step rewards by continuing from the end of every step, as often as the rollouts sample."""
        k = self.rollouts["k"]
        inputs = [k, asdict(self.behaviour), [(t.prompt_ids, t.response_ids, t.gold) for t in trajectories]]

        def compute() -> list[list[float]]:
            return monte_carlo_rewards(unsharded(self.policy), trajectories, k, self.behaviour, self.scorer)

        return self._stored("monte_carlo", inputs, compute, folder)

    def _stored(self, name: str, inputs: Any, compute: Callable, folder: Path) -> list[list[float]]:
        moved = self.trainer.global_step > 0 or self.restored
        rank, barrier = self.trainer.global_rank, self.trainer.strategy.barrier
        return stored(folder, name, [self.started_from, inputs], None if moved else compute, rank, barrier)

    @property
    def scorer(self) -> Any:
        """The datamodule's judge of answers."""
        return self.trainer.datamodule.scorer

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        self.begin_evaluation(k=0)

    def on_test_epoch_start(self) -> None:
        self.begin_evaluation(self.k)

    def validation_step(
        self,
        batch: PromptBatch | TrajectoryBatch | PreferenceBatch | TokenBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate(batch)

    test_step = validation_step

    def on_predict_epoch_start(self) -> None:
        self.begin_evaluation(self.k)

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch)

    def on_predict_epoch_end(self) -> None:
        self._write_samples()

    def on_validation_epoch_end(self) -> None:
        self.end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self.end_evaluation("test")
        self._write_samples()

    def begin_evaluation(self, k: int) -> None:
        """Before the first batch; `k` answers are sampled beside the greedy one."""
        self.evaluation = (AnswerEvaluation if self.scorer else ReplyEvaluation)(self, k)
        self.answering = unsharded(self.policy)
        self.samples = []

    def judge(self, batch: TrajectoryBatch | PreferenceBatch | TokenBatch) -> None:
        """Look at held-out responses: scored ones, of a method that `judges`, else pairs and replies."""
        raise NotImplementedError

    def end_evaluation(self, stage: str) -> None:
        """After the last batch, on every process."""
        self.answering = None
        for name, value in self.evaluation.results(stage).items():
            self.log(self.metric(f"{stage}/{name}"), value)

    def _evaluate(self, batch: PromptBatch | TrajectoryBatch | PreferenceBatch | TokenBatch) -> None:
        if "prompts" in batch:
            self.samples += self.evaluation.answer(batch["prompts"])
        else:
            self.judge(batch)

    def answers(self, prompts: list[Prompt], k: int, greedy: bool = False) -> list[list[Sample]]:
        """`k` answers to each prompt as the evaluation samples them, or the greedy one."""
        sampling = Sampling(temperature=0.0, max_new=self.sampling.max_new) if greedy else self.sampling
        keys = [prompt.id for prompt in prompts]
        ids = [prompt.ids for prompt in prompts]
        answers = dict(generate(self.answering, ids, k, sampling, keys, self.batch_rows))
        return [answers[position] for position in range(len(prompts))]

    def text(self, sample: Sample) -> str:
        """What the policy said, without its end token."""
        return self.policy.tokenizer.decode(sample.ids, skip_special_tokens=True)

    def _write_samples(self) -> None:
        samples = _gathered(self.samples)
        if self.trainer.is_global_zero:
            lines = [json.dumps(sample, ensure_ascii=False) for sample in sorted(samples, key=lambda s: s["id"])]
            path = Path(self.trainer.default_root_dir, "samples.jsonl")
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def export(self, folder: Path) -> None:
        policy = unsharded(self.policy)
        if self.trainer.is_global_zero:
            policy.export(folder)


def token_mean(per_token: Float[Tensor, "batch steps"], token_share: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The mean over the tokens of the global batch, once micro-batches are averaged (see `TokenBatch`)."""
    return per_token.sum() / token_share


def reply_nll(policy: Policy, batch: TokenBatch | PreferenceBatch) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Cross-entropy (nats per token) of replies, of a pair that of the better one, and the number of its tokens."""
    ids, mask = batch["ids"], batch["mask"]
    if "label" in batch:
        rows, better = torch.arange(len(ids), device=ids.device), (batch["label"] < 0.5).long()
        ids, mask = ids[rows, better], mask[rows, better]
    return -policy(ids, mask).log_probs.sum() / mask.sum(), mask.sum()


def _gathered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not dist.is_initialized():
        return rows
    parts: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
