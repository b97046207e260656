"""Windows of a stream of tokens, as a function of the step in training and each exactly once in evaluation."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batches import WindowBatch
from datamodules.shards import Stream

ROUNDS = 6
SPAN = 64  # steps whose windows are looked up together, because a look-up costs the same for one and for hundreds


class Shuffle:
    """A permutation of 0..size-1 that is computed at the places one asks for, and so costs no memory.

    An alternating Feistel network on the next power of two, keyed by (seed, epoch); what it sends outside of the range
    is sent on until it falls inside (Black and Rogaway, CT-RSA 2002).
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self.low_bits, self.high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
        *self.keys, self.spare = np.random.SeedSequence((seed % 2**63, epoch)).generate_state(ROUNDS + 1, np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        values = self._once(places.astype(np.uint64))
        while (outside := np.flatnonzero(values >= self.size)).size:
            values[outside] = self._once(values[outside])
        return values.astype(np.int64)

    def _once(self, values: np.ndarray) -> np.ndarray:
        low_mask, high_mask = ((np.uint64(1) << bits) - np.uint64(1) for bits in (self.low_bits, self.high_bits))
        low, high = values & low_mask, values >> self.low_bits
        for odd, key in enumerate(self.keys):
            if odd % 2:
                high ^= _hashed(low, key) & high_mask
            else:
                low ^= _hashed(high, key) & low_mask
        return high << self.low_bits | low


def _hashed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """The output function of SplitMix64 (Steele et al., OOPSLA 2014), modulo 2^64."""
    mixed = values ^ key
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)


class TrainWindows(Dataset):
    """Micro-batch m of this process, for any m >= 0: optimizer step m // accumulate of the endless row of windows.

    A pass over the stream begins at a seeded shift below `context`, takes the disjoint windows from there on (fewer
    than 2 `context` tokens at both ends are left out, others in every pass) and puts them into a seeded order. A window
    is `context` tokens and the next one. What a step sees depends on the seed alone; it is dealt out evenly over
    `world * accumulate` micro-batches.

    `align` moves a window on to the first `end` token within it. `document_mask` gives every document `positions` of
    its own and does not ask for its first token. Both need `end`, the token between documents.
    """

    def __init__(
        self,
        stream: Stream,
        context: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        end: int | None = None,
        document_mask: bool = False,
        align: bool = False,
    ) -> None:
        shares = world * accumulate
        if batch_size % shares:
            raise ValueError(
                f"data.batch_size={batch_size} cannot be dealt out to {world} processes x {accumulate} accumulation "
                f"steps: take a multiple of {shares}"
            )
        self.stream, self.context, self.batch_size, self.seed = stream, context, batch_size, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.end, self.document_mask, self.align = end, document_mask, align
        self.windows = max(1, (len(stream) - context) // context)
        self._looked_up: tuple[int, np.ndarray | None] = (-1, None)

    def __len__(self) -> int:
        """Micro-batches of one pass over the stream."""
        return max(1, self.windows // self.batch_size) * self.accumulate

    def __getitem__(self, micro: int) -> WindowBatch:
        step, part = divmod(micro, self.accumulate)
        begins, shares = self.begins(step), self.world * self.accumulate
        tokens = self._targets(begins) / shares
        ids = self.stream.windows(begins[part * self.world + self.rank :: shares], self.context + 1)
        return window_batch(ids, tokens, self.end if self.document_mask else None)

    def begins(self, step: int) -> np.ndarray:
        """Where the windows of an optimizer step begin in the stream, over all processes."""
        span, place = divmod(step, SPAN)
        if self._looked_up[0] != span:
            self._looked_up = (span, self._span(span))
        begins = self._looked_up[1][place]
        return self._aligned(begins) if self.align else begins

    def _span(self, span: int) -> np.ndarray:
        places = span * SPAN * self.batch_size + np.arange(SPAN * self.batch_size)
        epochs, within = np.divmod(places, self.windows)
        parts = [self._pass(epoch, within[epochs == epoch]) for epoch in np.unique(epochs).tolist()]
        return np.concatenate(parts).reshape(SPAN, self.batch_size)

    def _pass(self, epoch: int, places: np.ndarray) -> np.ndarray:
        shuffle = Shuffle(self.windows, self.seed, epoch)
        shifts = min(self.context, len(self.stream) - self.windows * self.context)
        return int(shuffle.spare) % shifts + shuffle(places) * self.context

    def _aligned(self, begins: np.ndarray) -> np.ndarray:
        """Moved on to the first end token among the next `context` tokens, where there is one and room behind it."""
        last = len(self.stream) - self.context - 1
        found = np.array([_first(self.stream.read(b, b + self.context), self.end) for b in begins.tolist()])
        return np.where(begins + found <= last, begins + found, begins)

    def _targets(self, begins: np.ndarray) -> int:
        """Targets of the whole step that count."""
        targets = len(begins) * self.context
        if self.document_mask:
            read = (self.stream.read(b, b + self.context) for b in begins.tolist())
            targets -= sum(int(np.count_nonzero(window == self.end)) for window in read)
        return targets


def _first(tokens: np.ndarray, end: int | None) -> int:
    ends = tokens == end
    return int(ends.argmax()) if ends.any() else 0


class EvalWindows(Dataset):
    """A whole stream as consecutive disjoint windows, batch by batch; process `rank` of `world` has every world-th.

    Every token but the first is a target exactly once, on any number of processes; each has the same number of batches
    of `rows` windows, filled up with windows in which nothing counts. `token_share` is the targets of the batch, at
    least 1.
    """

    def __init__(
        self,
        stream: Stream,
        context: int,
        rows: int,
        rank: int = 0,
        world: int = 1,
        end: int | None = None,
        document_mask: bool = False,
    ) -> None:
        self.stream, self.context, self.rows, self.rank, self.world = stream, context, rows, rank, world
        self.end = end if document_mask else None
        self.targets = len(stream) - 1

    def __len__(self) -> int:
        return -(-self.targets // (self.context * self.rows * self.world))

    def __getitem__(self, number: int) -> WindowBatch:
        if number >= len(self):
            raise IndexError(number)
        length = self.context * self.rows
        begin = (number * self.world + self.rank) * length
        there = max(0, min(length, self.targets - begin))
        ids = np.zeros((self.rows, self.context + 1), np.int64)
        if there:
            ids = _overlapping(self.stream.read(begin, begin + there + 1), self.rows, self.context)
        counted = (np.arange(length) < there).reshape(self.rows, self.context)
        return window_batch(ids, None, self.end, counted)


def _overlapping(tokens: np.ndarray, rows: int, context: int) -> np.ndarray:
    """`rows` windows of context + 1 tokens, the last of one the first of the next; zeros beyond the end."""
    padded = np.zeros(rows * context + 1, np.int64)
    padded[: len(tokens)] = tokens
    return np.lib.stride_tricks.sliding_window_view(padded, context + 1)[::context].copy()


def window_batch(
    ids: np.ndarray, token_share: float | None, end: int | None = None, counted: np.ndarray | None = None
) -> WindowBatch:
    """The batch of windows (rows, context + 1), with positions per document where `end` is given.

    `counted` (rows, context) leaves targets out; a `token_share` of None is the number of targets that remain.
    """
    mask = np.ones((len(ids), ids.shape[1] - 1), bool) if counted is None else counted
    mask = mask & (ids[:, :-1] != end) if end is not None else mask
    share = max(1, np.count_nonzero(mask)) if token_share is None else token_share
    batch = WindowBatch(
        ids=torch.from_numpy(ids), mask=torch.from_numpy(mask), token_share=torch.tensor(share, dtype=torch.float32)
    )
    return batch if end is None else batch | {"positions": _positions(ids, end)}


def _positions(ids: np.ndarray, end: int) -> Tensor:
    """0, 1, ... from the first token of a window, and anew from every token after `end`."""
    places = np.arange(ids.shape[1])
    begins = np.zeros_like(ids)
    begins[:, 1:] = np.where(ids[:, :-1] == end, places[1:], 0)
    return torch.from_numpy(places - np.maximum.accumulate(begins, axis=1))
