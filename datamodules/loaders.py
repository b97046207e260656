"""Loaders over what was read: training steps for all processes, and each process's share of the problems to answer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import Prompt, PromptBatch
from datamodules.steps import FromStep, StepIndexed

PROMPTS_AT_ONCE = 64


def batch_loader(batches: Dataset, order: FromStep | range, workers: int, seed: int) -> DataLoader:
    """What a data set of whole batches has, in an order of their numbers."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # its own: the workers' seeds that a loader draws must not move the generator of the run
        generator=torch.Generator().manual_seed(seed),
    )


def training_loader(
    rows: Sequence[tuple],
    cook: Callable[[list[tuple], float], Any],
    trainer: Any,
    batch_size: int,
    seed: int,
    workers: int = 0,
) -> DataLoader:
    """The rest of the pass over rows (prompt tokens, response tokens, ...) from the step that the trainer is at.

    `cook(rows, token_share)` makes a batch, see `StepIndexed`.
    """
    batches = StepIndexed(
        lengths=[len(row[0]) + len(row[1]) for row in rows],
        tokens=[len(row[1]) for row in rows],
        batch_size=batch_size,
        seed=seed,
        cook=lambda numbers, share: cook([rows[number] for number in numbers], share),
        rank=trainer.global_rank,
        world=trainer.world_size,
        accumulate=trainer.accumulate_grad_batches,
        steps=getattr(trainer.lightning_module, "steps_per_iteration", None),
    )
    sampler = FromStep(batches, lambda: trainer.global_step)
    return DataLoader(batches, batch_size=None, sampler=sampler, num_workers=workers)


def prompt_loader(prompts: list[Prompt], trainer: Any) -> DataLoader:
    """This process's share, prompts of similar length together; none is dealt out twice."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))[trainer.global_rank :: trainer.world_size]
    cut = [ordered[i : i + PROMPTS_AT_ONCE] for i in range(0, len(ordered), PROMPTS_AT_ONCE)]
    return DataLoader([PromptBatch(prompts=part) for part in cut], batch_size=None)
