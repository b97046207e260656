"""Cubes cut out of maps: where, rotated how, and which of them a step of training or an evaluation sees.

Axes are z, y, x. What is random about a cube is a function of the seed and of its place in the stream alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch.utils.data import Dataset

from datamodules.batches import DensityBatch
from datamodules.rotations import CUBE, random_rotation, rotated, turned
from datamodules.steps import StepIndexed

MEASURED = 256
ROTATIONS = ("none", "cube24", "so3")
STREAMS = {"train": 0, "measure": 1, "val": 2, "test": 3}


@runtime_checkable
class Volume(Protocol):
    """A processed map. `grids` has `density` over `scale`, and where known `half1`, `half2`, `mask`, of one shape."""

    id: str
    scale: float
    voxel_size: float

    def grids(self) -> Mapping[str, np.ndarray]: ...

    def centre(self, rng: np.random.Generator, reach: int, occupied: float | None) -> Int[np.ndarray, "3"]: ...


@dataclass(frozen=True)
class WholeMap:
    """A map in memory that is no larger than the box: a crop is all of it, moved by whole voxels, periodically."""

    id: str
    density: Float[np.ndarray, "z y x"]
    scale: float
    voxel_size: float

    def grids(self) -> Mapping[str, np.ndarray]:
        return {"density": self.density}

    def centre(self, rng: np.random.Generator, reach: int, occupied: float | None) -> Int[np.ndarray, "3"]:
        return np.array(self.density.shape) // 2


@dataclass(frozen=True)
class Cropping:
    """How a cube is cut: its edge in voxels, how it is rotated, by how many voxels at most a whole map is moved.

    `occupied` is the share of cubes about a voxel near density; None draws their centres evenly over the map.
    """

    box: int
    rotation: str = "none"
    shift: int = 0
    occupied: float | None = None


def cut(
    grid: Float[np.ndarray, "z y x"], centre: Int[np.ndarray, "3"], size: int
) -> Float[np.ndarray, "size size size"]:
    """The cube with `centre` in its voxel size // 2; zeros where it reaches beyond the grid."""
    begin = centre - size // 2
    low, high = np.clip(begin, 0, grid.shape), np.clip(begin + size, 0, grid.shape)
    found = np.zeros((size,) * 3, np.float32)
    found[tuple(map(slice, low - begin, high - begin))] = grid[tuple(map(slice, low, high))]
    return found


def cut_periodic(
    grid: Float[np.ndarray, "z y x"], centre: Int[np.ndarray, "3"], size: int
) -> Float[np.ndarray, "size size size"]:
    """The cube with `centre` in its voxel size // 2 of a grid that goes on periodically."""
    begin = centre - size // 2
    places = [(begin[axis] + np.arange(size)) % grid.shape[axis] for axis in range(3)]
    return grid[np.ix_(*places)].astype(np.float32)


def crop(volume: Volume, cropping: Cropping, rng: np.random.Generator) -> dict[str, Float[np.ndarray, "box box box"]]:
    """The same random cube of each of a volume's grids."""
    box, grids = cropping.box, volume.grids()
    centre = volume.centre(rng, box // 2, cropping.occupied)
    cutting = cut
    if isinstance(volume, WholeMap):
        cutting = cut_periodic
        centre = centre + rng.integers(-cropping.shift, cropping.shift, 3, endpoint=True)
    if cropping.rotation == "none":
        return {name: cutting(grid, centre, box) for name, grid in grids.items()}
    # a plane more where the box is even, which makes the rotation about box // 2 exact
    if cropping.rotation == "cube24":
        matrix = CUBE[rng.integers(len(CUBE))]
        odd = box + 1 - box % 2
        return {name: turned(cutting(grid, centre, odd), matrix)[:box, :box, :box] for name, grid in grids.items()}
    matrix, wide = random_rotation(rng), 2 * int(np.ceil(np.sqrt(3) * box / 2) + 2) + 1
    return {name: rotated(cutting(grid, centre, wide), matrix, box) for name, grid in grids.items()}


def random_stream(seed: int, purpose: str, place: int) -> np.random.Generator:
    """The generator of what is random about one crop."""
    return np.random.default_rng(np.random.SeedSequence((seed % 2**63, STREAMS[purpose], place)))


@dataclass
class Normalisation:
    """(v / scale - mean) / std: what a prior is trained in (arXiv 2410.08631: mean 0.04, std 0.09)."""

    mean: float
    std: float

    def __call__(self, density: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        return ((density - self.mean) / self.std).astype(np.float32)


@dataclass(frozen=True)
class Cook:
    """Makes a batch of crops."""

    volumes: Sequence[Volume]
    normalisation: Normalisation = field(compare=False)

    def __call__(self, numbers: Sequence[int], places: Sequence[int], crops: Sequence[Mapping]) -> DensityBatch:
        volumes, z = [self.volumes[number] for number in numbers], self.normalisation
        batch = DensityBatch(
            voxels=torch.from_numpy(np.stack([z(found["density"]) for found in crops])),
            voxel_size=torch.tensor([volume.voxel_size for volume in volumes], dtype=torch.float32),
            scale=torch.tensor([volume.scale for volume in volumes], dtype=torch.float32),
            mean=torch.tensor(z.mean, dtype=torch.float32),
            std=torch.tensor(z.std, dtype=torch.float32),
            place=torch.tensor(places, dtype=torch.int64),
            ids=[volume.id for volume in volumes],
        )
        if all("half1" in found for found in crops):
            halves = [np.stack([z(found["half1"]), z(found["half2"])]) for found in crops]
            batch["half_maps"] = torch.from_numpy(np.stack(halves))
        if all("mask" in found for found in crops):
            batch["mask"] = torch.from_numpy(np.stack([found["mask"].clip(0, 1) for found in crops]))
        return batch


class TrainCrops(StepIndexed):
    """Micro-batch m of this process, for any m >= 0, of the endless stream of crops.

    A pass has `per_map` crops of every volume; each crop of each pass is cut and rotated anew.
    """

    def __init__(
        self,
        cook: Cook,
        cropping: Cropping,
        per_map: int,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        accumulate: int,
    ) -> None:
        rows = [1] * (len(cook.volumes) * per_map)
        super().__init__(rows, rows, batch_size, seed, cook, rank, world, accumulate)
        self.cropping = cropping

    def __getitem__(self, micro: int) -> DensityBatch:
        step, part = divmod(micro, self.accumulate)
        rows, shares = self.rows(step), self.world * self.accumulate
        mine = range(part * self.world + self.rank, self.batch_size, shares)
        numbers = [rows[index] % len(self.cook.volumes) for index in mine]
        places = [step * self.batch_size + index for index in mine]
        crops = [
            crop(self.cook.volumes[number], self.cropping, random_stream(self.seed, "train", place))
            for number, place in zip(numbers, places)
        ]
        return self.cook(numbers, places, crops)


class EvalCrops(Dataset):
    """Crops of every volume, unrotated: the one about its centre, then `per_map` - 1 about places that a seed draws.

    A whole map has one crop. Process `rank` of `world` has every world-th; all have as many batches of up to `rows`,
    for which a crop from the beginning may come once more, as its `place` says.
    """

    def __init__(
        self,
        cook: Cook,
        cropping: Cropping,
        per_map: int,
        rows: int,
        seed: int,
        purpose: str,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.cook, self.cropping, self.rows, self.seed, self.purpose = cook, cropping, rows, seed, purpose
        numbers = range(len(cook.volumes))
        several = [number for number in numbers if not isinstance(cook.volumes[number], WholeMap)]
        self.crops = [
            *((number, 0) for number in numbers),
            *((n, again) for again in range(1, per_map) for n in several),
        ]
        shared = -(-len(self.crops) // world) * world
        self.places = [place % len(self.crops) for place in range(rank, shared, world)]

    def __len__(self) -> int:
        return -(-len(self.places) // self.rows)

    def __getitem__(self, batch: int) -> DensityBatch:
        if batch >= len(self):
            raise IndexError(batch)
        places = self.places[batch * self.rows : (batch + 1) * self.rows]
        return self.cook([self.crops[place][0] for place in places], places, [self._crop(place) for place in places])

    def _crop(self, place: int) -> dict[str, Float[np.ndarray, "box box box"]]:
        number, again = self.crops[place]
        volume = self.cook.volumes[number]
        if again:
            return crop(volume, self.cropping, random_stream(self.seed, self.purpose, place))
        cutting = cut_periodic if isinstance(volume, WholeMap) else cut
        centre = {name: np.array(grid.shape) // 2 for name, grid in volume.grids().items()}
        return {name: cutting(grid, centre[name], self.cropping.box) for name, grid in volume.grids().items()}


def measured(volumes: Sequence[Volume], cropping: Cropping, seed: int) -> Normalisation:
    """Mean and standard deviation over the voxels of 256 crops, of as many volumes as possible, spread evenly."""
    plain, sums = Cropping(cropping.box, occupied=cropping.occupied), np.zeros(3)
    crops = min(MEASURED, len(volumes)) if isinstance(volumes[0], WholeMap) else MEASURED
    for place in range(crops):
        number = place * len(volumes) // crops
        found = crop(volumes[number], plain, random_stream(seed, "measure", place))["density"].astype(np.float64)
        sums += found.size, found.sum(), (found**2).sum()
    mean = sums[1] / sums[0]
    return Normalisation(float(mean), float(np.sqrt(max(sums[2] / sums[0] - mean**2, 0.0))))
