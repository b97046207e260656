"""Laws on [S]^d that are known exactly: what discrete diffusion is measured on, and trained on, without a data set.

A target is a function (d, letters, draw, ...) -> tensor (S,) * d of probabilities in float64; `draw` is the generator
of its disorder, so that copies of a target differ as samples of a random medium do.
"""

import hashlib
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import CategoryBatch, RoundBatch
from datamodules.rounds import Chunks, Rounds
from datamodules.steps import FromStep

LIMIT = 2**22  # states that are enumerated
HELD_OUT = 4096  # rows
PASS = 1000  # steps of training; there are no fewer rows than one wants
Law = Float[Tensor, "..."]
Target = Callable[[int, int, torch.Generator], Law]


def product(d: int, letters: int, draw: torch.Generator, first: float = 0.8, disorder: float = 0.0) -> Law:
    """Independent coordinates: letter 0 with probability `first`, the others equally likely; logits disordered."""
    _probability("first", first)
    weights = torch.full((letters,), (1 - first) / (letters - 1), dtype=torch.float64)
    weights[0] = first
    logits = weights.log() + disorder * torch.randn(d, letters, generator=draw, dtype=torch.float64)
    return _outer(logits.softmax(-1))


def ising_ring(
    d: int, letters: int, draw: torch.Generator, J: float = 0.5, h: float = 0.2, disorder: float = 0.0
) -> Law:
    """p ~ exp(sum J_i s_i s_(i+1) + sum h_i s_i) on a ring of spins -1, +1 (letters 0, 1).

    J_i and h_i are normal around `J` and `h` with the standard deviation `disorder`.
    """
    if letters != 2:
        raise ValueError(f"data.letters={letters}: ising_ring has two, take target=potts_ring for more")
    spins = 2.0 * _states(d, 2).double() - 1
    bonds, fields = (mean + disorder * torch.randn(d, generator=draw, dtype=torch.float64) for mean in (J, h))
    return _gibbs(spins * spins.roll(-1, 1) @ bonds + spins @ fields, d, 2)


def potts_ring(
    d: int, letters: int, draw: torch.Generator, J: float = 1.0, h: float = 0.2, disorder: float = 0.0
) -> Law:
    """p ~ exp(sum J_i 1[x_i = x_(i+1)] + sum h_i 1[x_i = 0]) on a ring; disorder as in `ising_ring`."""
    x = _states(d, letters)
    bonds, fields = (mean + disorder * torch.randn(d, generator=draw, dtype=torch.float64) for mean in (J, h))
    return _gibbs((x == x.roll(-1, 1)).double() @ bonds + (x == 0).double() @ fields, d, letters)


def parity(d: int, letters: int, draw: torch.Generator) -> Law:
    """Uniform on the states whose letters sum to a multiple of S: most states have probability zero."""
    even = (_states(d, letters).sum(1) % letters == 0).double()
    return (even / even.sum()).reshape((letters,) * d)


def two_point_mixture(d: int, letters: int, draw: torch.Generator, error: float = 0.05, disorder: float = 0.0) -> Law:
    """Two codewords, all 0 and all 1, each letter wrong with probability `error`; the weights' logits disordered."""
    _probability("error", error)
    noise = error / (letters - 1)
    words = torch.full((2, letters), noise, dtype=torch.float64)
    words[0, 0] = words[1, 1] = 1 - error
    weights = (disorder * torch.randn(2, generator=draw, dtype=torch.float64)).softmax(0)
    return sum(weight * _outer(word.expand(d, -1)) for weight, word in zip(weights, words))


def markov_chain(d: int, letters: int, draw: torch.Generator, order: int = 2, sharpness: float = 1.5) -> Law:
    """A stationary chain of this order with random transitions, logits normal with deviation `sharpness`."""
    if not 1 <= order < d:
        raise ValueError(f"data.target.order={order} must be at least 1 and below the dimension {d}")
    shape = (letters,) * (order + 1)
    moves = (sharpness * torch.randn(shape, generator=draw, dtype=torch.float64)).softmax(-1)
    start = torch.full(shape[:-1], letters**-order, dtype=torch.float64)
    for _ in range(10_000):
        before, start = start, (start[..., None] * moves).sum(0)
        if (start - before).abs().max() < 1e-15:
            break
    law = start
    for _ in range(order, d):
        law = law[..., None] * moves.reshape((1,) * (law.ndim - order) + shape)
    return law / law.sum()


class SimulatedCategories(Rounds):
    """Exactly known data: as the world of a simulation, or as rows to learn from.

    `copies` instances of the target differ by its disorder, drawn at `problem`. A method that is trained gets
    `batch_size` rows of the first copy a step, drawn from its law. A simulation says by `points` how many rounds there
    are.
    """

    serves: ClassVar[tuple[type, ...]] = (RoundBatch, CategoryBatch)

    def __init__(
        self,
        name: str,
        target: Target,
        dimension: int,
        letters: int,
        copies: int,
        problem: int,
        batch_size: int,
        limit: int | None,
        seed: int,
    ) -> None:
        for key, value in {"dimension": dimension, "copies": copies, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"data.{key}={value} must be positive")
        if letters < 2:
            raise ValueError(f"data.letters={letters}: an alphabet has at least two")
        self.target, self.dimension, self.letters, self.copies = target, dimension, letters, copies
        self.problem, self.batch_size, self.limit, self.seed = problem, batch_size, limit, seed
        first = self.law()
        digest = hashlib.sha256(first.numpy().tobytes()).hexdigest()
        target_name = getattr(getattr(target, "func", target), "__name__", "target")
        super().__init__(name, f"{target_name} of {dimension} letters out of {letters}", digest, 1, 1, limit)

    def law(self, copy: int = 0, dimension: int | None = None, letters: int | None = None) -> Law:
        """The law of a copy, of this size or another: a tensor (S,) * d of probabilities."""
        d, letters = dimension or self.dimension, letters or self.letters
        if letters**d > LIMIT:
            raise ValueError(
                f"data.letters={letters} and data.dimension={d} make {letters**d:,} states, and at most {LIMIT:,} can "
                "be enumerated: take fewer coordinates or letters"
            )
        draw = torch.Generator().manual_seed(self.problem * 1_000_003 + copy)
        return _checked(self.target(d, letters, draw), d, letters)

    def points(self, count: int) -> None:
        """A simulation's rounds: points of its axis."""
        self.rounds = min(count, self.limit or count)
        self.chunks = Chunks(self.rounds, 1)

    def train_dataloader(self) -> DataLoader:
        if self._simulated:
            return super().train_dataloader()
        trainer = self.trainer
        shares = trainer.world_size * trainer.accumulate_grad_batches
        if self.batch_size % shares:
            raise ValueError(
                f"data.batch_size={self.batch_size} cannot be dealt out to {trainer.world_size} processes x "
                f"{trainer.accumulate_grad_batches} accumulation steps: take a multiple of {shares}"
            )
        rows = Samples(self.law(), self.batch_size, self.seed, trainer.global_rank, trainer.world_size)
        rows.accumulate = trainer.accumulate_grad_batches
        return _loader(rows, FromStep(rows, lambda: trainer.global_step))

    def val_dataloader(self) -> DataLoader:
        """What is held out is the law itself: a few rows, for the bound on the likelihood of data."""
        if self._simulated:
            return super().val_dataloader()
        rows = Samples(self.law(), HELD_OUT, self.seed + 500_000, 0, 1)
        return _loader(rows, range(1))

    test_dataloader = val_dataloader

    @property
    def _simulated(self) -> bool:
        return self.trainer.lightning_module.batch_type is RoundBatch


class Samples(Dataset):
    """Micro-batch m of this process: rows drawn from a law, a step's as a function of the seed and the step."""

    accumulate = 1

    def __init__(self, law: Law, batch_size: int, seed: int, rank: int, world: int) -> None:
        self.shape, self.cumulative = law.shape, law.flatten().cumsum(0)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world

    def __len__(self) -> int:
        return PASS * self.accumulate

    def __getitem__(self, micro: int) -> CategoryBatch:
        step, part = divmod(micro, self.accumulate)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        points = torch.rand(self.batch_size, generator=draw, dtype=torch.float64) * self.cumulative[-1]
        number = torch.searchsorted(self.cumulative, points, right=True).clamp_max(len(self.cumulative) - 1)
        x = torch.stack(torch.unravel_index(number, self.shape), 1)
        return CategoryBatch(x=x[part * self.world + self.rank :: self.world * self.accumulate])


def _states(d: int, letters: int) -> Int[Tensor, "states d"]:
    strides = letters ** torch.arange(d - 1, -1, -1)
    return torch.arange(letters**d)[:, None] // strides % letters


def _outer(weights: Float[Tensor, "d letters"]) -> Law:
    """Independent coordinates with these probabilities."""
    law = weights[0]
    for row in weights[1:]:
        law = law[..., None] * row
    return law


def _gibbs(log_weights: Float[Tensor, " states"], d: int, letters: int) -> Law:
    return log_weights.softmax(0).reshape((letters,) * d)


def _checked(law: Law, d: int, letters: int) -> Law:
    """The law; ValueError for another shape, or weights that do not sum to one."""
    if law.shape != (letters,) * d:
        raise ValueError(f"data.target gave a law of shape {tuple(law.shape)}, and {(letters,) * d} was asked for")
    total, least = float(law.sum()), float(law.min())
    if not abs(total - 1) < 1e-9 or least < 0:
        raise ValueError(
            f"data.target: weights must be non-negative and sum to one, and these sum to {total:.12g} with a least one "
            f"of {least:.3g}"
        )
    return law.double()


def _probability(key: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"data.target.{key}={value} must lie in (0, 1)")


def _loader(rows: Samples, order: FromStep | range) -> DataLoader:
    return DataLoader(rows, batch_size=None, sampler=order, generator=torch.Generator())
