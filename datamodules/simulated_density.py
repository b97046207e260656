"""Mixtures of Gaussians: densities whose scores are known exactly at every time, to measure samplers on."""

import hashlib
import logging

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import Mixture, PointBatch, RoundBatch
from datamodules.rounds import Chunks, Rounds
from datamodules.steps import FromStep

log = logging.getLogger(__name__)

# for a component: one variance for all coordinates, one for each, or a matrix
Covariance = int | float | list[int | float] | list[list[int | float]]


class SimulatedDensity(Rounds):
    """A mixture, served as rounds of a simulation or as points drawn afresh in every step.

    `covariances` has an entry for each component: a variance, variances, or a matrix. Raises ValueError where they do
    not make a mixture; weights that do not sum to one are scaled, with a warning.
    """

    serves = (RoundBatch, PointBatch)

    def __init__(
        self,
        name: str,
        weights: list[int | float],
        means: list[list[int | float]],
        covariances: list[Covariance],
        batch_size: int,
        steps: int,
        held_out: int,
        seed: int,
        limit: int | None,
    ) -> None:
        self.mixture, self.seed = mixture(weights, means, covariances), seed
        for key, value in {"batch_size": batch_size, "steps": steps, "held_out": held_out}.items():
            if value < 1:
                raise ValueError(f"data.{key}={value} must be positive")
        digest = hashlib.sha256(repr((weights, means, covariances)).encode()).hexdigest()
        dimensions = self.mixture.means.shape[1]
        super().__init__(name, f"{len(weights)} Gaussians in {dimensions} dimensions", digest, 1, 1, limit)
        self.batch_size, self.steps, self.limit = batch_size, min(steps, limit or steps), limit
        # steps are counted from 0, so that these draws are nobody else's
        self.held_out = {part: self.drawn(held_out, -n) for n, part in ((1, "val"), (2, "test"))}

    def drawn(self, count: int, number: int) -> PointBatch:
        """`count` points and what belongs to them, a function of the seed and of the number."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        points = draw(self.mixture, count, generator).float()
        noise = torch.randn(points.shape, generator=generator)
        return PointBatch(points=points, noise=noise, uniform=torch.rand(count, generator=generator))

    def plan(self, rounds: int) -> None:
        """Serve so many rounds, one at a time: the simulation knows how much there is to measure."""
        self.rounds = min(rounds, self.limit or rounds)
        self.chunks = Chunks(self.rounds, 1)

    @property
    def drawing(self) -> bool:
        """Whether the method wants points."""
        return self.trainer.lightning_module.batch_type is PointBatch

    def train_dataloader(self) -> DataLoader:
        if not self.drawing:
            return super().train_dataloader()
        batches = Draws(self, self.trainer.global_rank, self.trainer.world_size, self.trainer.accumulate_grad_batches)
        order = FromStep(batches, lambda: self.trainer.global_step)
        return DataLoader(batches, batch_size=None, sampler=order, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader:
        return self._points("val") if self.drawing else super().val_dataloader()

    def test_dataloader(self) -> DataLoader:
        return self._points("test") if self.drawing else super().test_dataloader()

    def _points(self, part: str) -> DataLoader:
        return DataLoader([self.held_out[part]], batch_size=None, generator=torch.Generator())


class Draws(Dataset):
    """Micro-batch m: fresh points, a function of the seed and of the step, dealt out to the processes."""

    def __init__(self, data: SimulatedDensity, rank: int, world: int, accumulate: int) -> None:
        if data.batch_size % (world * accumulate):
            raise ValueError(
                f"data.batch_size={data.batch_size} cannot be dealt out to {world} processes x {accumulate} "
                f"accumulation steps: take a multiple of {world * accumulate}"
            )
        self.data, self.rank, self.world, self.accumulate = data, rank, world, accumulate

    def __len__(self) -> int:
        return self.data.steps * self.accumulate

    def __getitem__(self, micro: int) -> PointBatch:
        step, part = divmod(micro, self.accumulate)
        mine = slice(part * self.world + self.rank, None, self.world * self.accumulate)
        return {name: values[mine] for name, values in self.data.drawn(self.data.batch_size, step).items()}


def mixture(weights: list[int | float], means: list[list[int | float]], covariances: list[Covariance]) -> Mixture:
    """The mixture of these numbers; ValueError, naming the key, where they do not make one."""
    w = torch.tensor(list(weights), dtype=torch.float64)
    if not len(w) or not torch.isfinite(w).all() or (w < 0).any() or not w.sum() > 0:
        raise ValueError(f"data.weights={list(weights)}: weights of a mixture are at least 0, with a positive sum")
    for key, entries in {"means": means, "covariances": covariances}.items():
        if len(entries) != len(w):
            raise ValueError(f"data.{key} has {len(entries)} entries for the {len(w)} of data.weights: give one each")
    d = len(means[0])
    if d < 1 or any(len(mean) != d for mean in means):
        raise ValueError(f"data.means={[list(mean) for mean in means]}: give all the same number of coordinates")
    if abs(float(w.sum()) - 1) > 1e-9:
        log.warning("data.weights sum to %g: they are scaled to sum to 1", float(w.sum()))
    matrices = [_covariance(entry, d, number) for number, entry in enumerate(covariances)]
    return Mixture(w / w.sum(), torch.tensor([list(m) for m in means], dtype=torch.float64), torch.stack(matrices))


def _covariance(entry: Covariance, d: int, number: int) -> Float[Tensor, "d d"]:
    given = torch.tensor(entry if isinstance(entry, (int, float)) else [_plain(row) for row in entry]).double()
    matrix = torch.diag(given.expand(d)) if given.ndim < 2 and given.numel() in (1, d) else given
    if matrix.shape != (d, d):
        raise ValueError(
            f"data.covariances[{number}] has the shape {tuple(given.shape)} in {d} dimensions: give a variance, {d} of "
            f"them, or a {d} x {d} matrix"
        )
    if not torch.isfinite(matrix).all() or not torch.allclose(matrix, matrix.mT, rtol=0, atol=1e-12):
        raise ValueError(f"data.covariances[{number}]={matrix.tolist()} is not symmetric and finite")
    smallest = float(torch.linalg.eigvalsh(matrix)[0])
    # zero is a point mass, whose noised marginals have densities; what it needs is a grid that ends above t = 0
    if smallest < 0 or (smallest == 0 and bool(matrix.any())):
        raise ValueError(
            f"data.covariances[{number}] is not positive definite, its smallest eigenvalue is {smallest:g}: give "
            "variances above 0, or 0 in all coordinates for a point mass"
        )
    return matrix


def _plain(row: int | float | list[int | float]) -> int | float | list[int | float]:
    return row if isinstance(row, (int, float)) else list(row)


def draw(mixture: Mixture, count: int, generator: torch.Generator) -> Float[Tensor, "count d"]:
    """`count` points of the mixture."""
    components: Int[Tensor, " count"] = torch.multinomial(mixture.weights, count, True, generator=generator)
    noise = torch.randn(count, mixture.means.shape[1], generator=generator, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(mixture.covariances)
    roots = vectors * values.clamp(min=0).sqrt()[:, None, :]
    return mixture.means[components] + torch.einsum("nij,nj->ni", roots[components], noise)
