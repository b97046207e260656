"""Training batches as a function of the step: what step i sees depends on the seed and on i, and on nothing else.

A resumed run, or one on another number of processes with the same global batch, therefore sees the same data.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import Dataset, Sampler

WINDOW = 8  # steps whose rows are sorted by length together, so that a batch needs little padding


class StepIndexed(Dataset):
    """Micro-batch m of this process, for any m >= 0: optimizer step m // accumulate, of the endless row stream.

    The stream is one seeded permutation of the rows after another. Eight steps' rows are sorted by length and dealt out
    as eight batches in a seeded order; each batch is dealt over the `world * accumulate` micro-batches of its step.
    `cook(rows, token_share)` makes the batch; `token_share` is as in `datamodules.batches.TokenBatch`. With `steps` a
    pass has that many, however many rows there are, and each pass begins the stream anew: its rows are its own.

    Raises ValueError when the global batch cannot be dealt out evenly or there are no rows.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens: Sequence[int],
        batch_size: int,
        seed: int,
        cook: Callable[[list[int], float], Any],
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        steps: int | None = None,
    ) -> None:
        shares = world * accumulate
        if not lengths:
            raise ValueError(
                "there is no row to train on; raise data.limit, data.max_prompt or data.max_response, or check the file"
            )
        if batch_size % shares:
            raise ValueError(
                f"data.batch_size={batch_size} cannot be dealt out to {world} processes x {accumulate} accumulation "
                f"steps: take a multiple of {shares}"
            )
        self.lengths, self.tokens, self.batch_size, self.seed = lengths, tokens, batch_size, seed
        self.cook, self.rank, self.world, self.accumulate = cook, rank, world, accumulate
        self.steps = steps
        self._permutation = lru_cache(maxsize=4)(self._permutation)

    def __len__(self) -> int:
        """Micro-batches of one pass over the rows."""
        return (self.steps or max(1, len(self.lengths) // self.batch_size)) * self.accumulate

    def __getitem__(self, micro: int) -> Any:
        step, part = divmod(micro, self.accumulate)
        rows, shares = self.rows(step), self.world * self.accumulate
        token_share = sum(self.tokens[row] for row in rows) / shares
        return self.cook(rows[part * self.world + self.rank :: shares], token_share)

    def rows(self, step: int) -> list[int]:
        """The rows of an optimizer step, over all processes."""
        window, place = divmod(step % self.steps if self.steps else step, WINDOW)
        first = window * WINDOW * self.batch_size
        rows = [self._row(position) for position in range(first, first + WINDOW * self.batch_size)]
        rows.sort(key=lambda row: self.lengths[row])
        order = torch.randperm(WINDOW, generator=self._generator("order", window)).tolist()
        begin = order[place] * self.batch_size
        return rows[begin : begin + self.batch_size]

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, len(self.lengths))
        return self._permutation(epoch)[index]

    def _permutation(self, epoch: int) -> list[int]:
        return torch.randperm(len(self.lengths), generator=self._generator("rows", epoch)).tolist()

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        # distinct streams for distinct purposes, from one seed
        mixed = (self.seed * 2 + (purpose == "order")) * 1_000_003 + number
        return torch.Generator().manual_seed(mixed)


@runtime_checkable
class MicroBatches(Protocol):
    """Micro-batches by their number: `accumulate` of them make a step, `len` of them a pass."""

    accumulate: int

    def __len__(self) -> int: ...


class FromStep(Sampler[int]):
    """Indices of the rest of the current pass, from the optimizer step that `current_step()` says."""

    def __init__(self, batches: MicroBatches, current_step: Callable[[], int]) -> None:
        self.batches, self.current_step = batches, current_step

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[int]:
        size = len(self.batches)
        first = self.current_step() * self.batches.accumulate
        return iter(range(first, (first // size + 1) * size))
