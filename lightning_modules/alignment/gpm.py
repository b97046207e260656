"""Models of pairwise preference: GPM (arXiv 2410.02197), with Bradley-Terry and PairPM as baselines on one backbone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from datamodules.batches import Pair, PreferenceBatch
from lightning_modules import sharding
from lightning_modules.alignment import judge_export, reward_bench
from lightning_modules.alignment.judge_figures import circles, reliability, tables
from lightning_modules.alignment.judge_heads import new_head
from lightning_modules.alignment.judges import EmbeddingJudge, Judge
from lightning_modules.alignment.pair_accuracy import intervals, measure
from lightning_modules.alignment.policy import Policy, unsharded
from lightning_modules.alignment.policy_method import per_cent
from lightning_modules.method import Method


class PreferenceModel(Method):
    """A judge of two answers, `judge(policy)` of `judges`, fitted to pairs; its result can be the oracle of a game.

    The datamodule may bring its held-out pairs in several loaders and their names in `subsets`; where those are
    RewardBench's, its sections are reported (`reward_bench`, the weights of rewardbench 0.1.4). `head_lr` is the
    learning rate of a new head, where it is not the trunk's.
    """

    batch_type: ClassVar[type] = PreferenceBatch
    headline: ClassVar[tuple[str, str]] = ("val/pair_accuracy", "max")
    columns: ClassVar[dict[str, Callable[[float], str]]] = {
        "pair_accuracy": per_cent,
        "reward_bench": per_cent,
        "nll": "{:.3f}".format,
        "ece": "{:.3f}".format,
    }
    caption: ClassVar[str] = "per cent of held-out pairs, 95 % Wilson intervals; nll and ece as they are"
    leaves: ClassVar[str] = "The judge in `export/` is an oracle of the preference games; its trunk loads by itself."
    labels: ClassVar[bool] = False  # it samples nothing

    def __init__(
        self,
        policy: Policy,
        judge: Callable[[Policy], Judge],
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., float],
        head_lr: float | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.judge, self.head_lr = judge(policy), head_lr
        self.judged: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @property
    def policy(self) -> Policy:
        """The trunk, by the name that datamodules know."""
        return self.judge.policy

    def length(self, prompt: int, answers: list[int]) -> int:
        """Tokens of the longest sequence that is read of a pair, see `Judge.length`."""
        return self.judge.length(prompt, answers)

    def networks(self) -> dict[str, nn.Module]:
        return self.judge.networks()

    def network_options(self, name: str) -> dict[str, Any]:
        return {"lr": self.head_lr} if name == "head" and self.head_lr else {}

    def shard_units(self) -> list[nn.Module]:
        return self.judge.shard_units()

    def count(self, batch: PreferenceBatch) -> int:
        return int(batch["mask"].sum())

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # prompts to answer are not asked about
        return batch if "prompts" in batch else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def with_reference(self, pairs: list[Pair], folder: Path) -> list[Pair]:
        """The pairs as they are: there is no reference."""
        return pairs

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        losses, log_odds = self.judge.fit(batch["ids"], batch["mask"], batch["label"])
        loss = losses.mean()
        self.log_step(loss, size=log_odds.abs().mean())
        return loss

    # Evaluation: every process judges all held-out pairs, because the networks may be sharded

    def on_validation_epoch_start(self) -> None:
        self.judged = {}

    def on_test_epoch_start(self) -> None:
        self.judged = {}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._judge(batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._judge(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _judge(self, batch: Any, dataloader_idx: int) -> None:
        if "label" not in batch:  # prompts to answer, replies to imitate
            return
        names = getattr(self.trainer.datamodule, "subsets", ())
        log_odds = self.judge(batch["ids"], batch["mask"]).float().cpu()
        name = names[dataloader_idx] if names else "all"
        self.judged.setdefault(name, []).append((log_odds, batch["label"].cpu()))

    def _report(self, stage: str) -> None:
        subsets = self.held_out
        if not subsets:
            raise ValueError("there is no held-out pair to judge: give the data more pairs, or stages=[fit]")
        whole = [torch.cat(column) for column in zip(*subsets.values())]
        found = measure(*whole)
        bounds = intervals(*whole)
        accuracies = {name: measure(*columns)["pair_accuracy"] for name, columns in subsets.items()}
        if len(subsets) > 1:
            found |= {f"pair_accuracy/{name}": value for name, value in accuracies.items()}
            bounds |= {f"{name}/{subset}": b for subset, c in subsets.items() for name, b in intervals(*c).items()}
        if accuracies.keys() == reward_bench.SUBSETS:
            sections = reward_bench.aggregate(accuracies)
            found |= {f"reward_bench/{section}": value for section, value in sections.items()}
        if stage == "test":
            found |= {f"{name}_{end}": value for name, b in bounds.items() for end, value in zip(("low", "high"), b)}
        self.log_dict({self.metric(f"{stage}/{name}"): value for name, value in found.items()})

    @property
    def held_out(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(log-odds, label) of the pairs judged in the last evaluation, by subset."""
        return {name: tuple(map(torch.cat, zip(*parts))) for name, parts in self.judged.items()}

    def figures(self) -> dict[str, Figure]:
        data = self.trainer.datamodule
        games, ceilings = getattr(data, "tournaments", []), getattr(data, "ceilings", {})
        made = {"accuracy": reliability(self.held_out, ceilings)} if self.judged else {}
        if games:
            made["score_matrices"] = tables(self.judge, games)
        if games and isinstance(self.judge, EmbeddingJudge):
            made["embeddings"] = circles(self.judge, games)
        return made

    def export(self, folder: Path) -> None:
        policy, head = unsharded(self.policy), self.judge.networks().get("head")
        if head is not None:
            head = sharding.unsharded(head, lambda: new_head(head.settings, self.policy.width))
        if self.trainer.is_global_zero:
            judge_export.export(self.judge.about, policy, head, folder)
