"""The rounds of a simulation: numbers, served a chunk at a time, as training batches are."""

from types import SimpleNamespace
from typing import ClassVar

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import RoundBatch
from datamodules.steps import FromStep


class Chunks(Dataset):
    """Chunk i of the rounds 0, 1, ..., `rounds` - 1, `chunk` of them at a time, the last one what is left."""

    accumulate = 1

    def __init__(self, rounds: int, chunk: int) -> None:
        self.rounds, self.chunk = rounds, chunk

    def __len__(self) -> int:
        return -(-self.rounds // self.chunk)

    def __getitem__(self, number: int) -> RoundBatch:
        begin = number * self.chunk
        return RoundBatch(rounds=torch.arange(begin, min(begin + self.chunk, self.rounds)))


class Doubling(Chunks):
    """Chunks that end at 1, 2, 4, ... rounds until they are `chunk` long, and then after `chunk` more each."""

    def __init__(self, rounds: int, chunk: int) -> None:
        super().__init__(rounds, chunk)
        doubled = [2**power for power in range(min(rounds, chunk).bit_length())]
        self.ends = [n for n in [*doubled, *range(doubled[-1] + chunk, rounds, chunk)] if n < rounds] + [rounds]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> RoundBatch:
        begin = self.ends[number - 1] if number else 0
        return RoundBatch(rounds=torch.arange(begin, self.ends[number]))


class Rounds(L.LightningDataModule):
    """What a simulation plays in: `rounds` of them, `chunk` to a training step, at most `limit`.

    A subclass says in what world: its `name`, where it comes from, and a digest of it. Raises ValueError for numbers
    that are not positive.
    """

    serves: ClassVar[tuple[type, ...]] = (RoundBatch,)
    chunked: ClassVar[type[Chunks]] = Chunks
    standin = False

    def __init__(self, name: str, origin: str, fingerprint: str, rounds: int, chunk: int, limit: int | None) -> None:
        super().__init__()
        for key, value in {"rounds": rounds, "chunk": chunk, "limit": limit}.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{key}={value} must be positive")
        self.name, self.fingerprint, self.source = name, fingerprint, SimpleNamespace(origin=origin)
        self.rounds = min(rounds, limit or rounds)
        self.chunks = self.chunked(self.rounds, chunk)

    def train_dataloader(self) -> DataLoader:
        return _loader(self.chunks, FromStep(self.chunks, lambda: self.trainer.global_step))

    def val_dataloader(self) -> DataLoader:
        return _loader([RoundBatch(rounds=torch.arange(0))], range(1))

    test_dataloader = val_dataloader


def _loader(batches: Dataset | list[RoundBatch], order: FromStep | range) -> DataLoader:
    return DataLoader(batches, batch_size=None, sampler=order, generator=torch.Generator())
