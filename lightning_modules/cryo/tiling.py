"""Overlapping cubes of a map too large for a network, and how they become one map again.

Neighbours share `overlap` voxels, the last one is flush with the border, and they are blended under a Hann profile over
the sum of all profiles. Their noise is cut from one volume, so that neighbours agree where they overlap.
"""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Volume = Float[Tensor, "n n n"]
Tiles = Float[Tensor, "tile m m m"]


@dataclass(frozen=True)
class Tiling:
    """Cubes of `tile` voxels a side in one of `side` >= `tile`, `overlap` < `tile` voxels shared by neighbours."""

    side: int
    tile: int
    overlap: int

    def __post_init__(self) -> None:
        if self.tile > self.side:
            raise ValueError(
                f"tiles of {self.tile} voxels do not fit into a map of {self.side}: pad the map, or cut smaller tiles"
            )
        if not 0 <= self.overlap < self.tile:
            raise ValueError(f"overlap={self.overlap} must be at least 0 and less than the tile's {self.tile} voxels")

    @property
    def corners(self) -> list[tuple[int, int, int]]:
        """The first voxel of every tile, in a fixed order."""
        last = self.side - self.tile
        starts = [*range(0, last, self.tile - self.overlap), last]
        return list(itertools.product(starts, repeat=3))

    def cut(self, volume: Volume, corners: list[tuple[int, int, int]]) -> Tiles:
        """The cubes at these corners."""
        return torch.stack([volume[self._where(corner)] for corner in corners])

    def add(self, total: Volume, corners: list[tuple[int, int, int]], tiles: Tiles) -> None:
        """Add these cubes under their profile to `total`, in place; with all of them added, `total` is the map."""
        profile, along = self.profile, self._sum_along
        for corner, tile in zip(corners, tiles):
            here = self._where(corner)
            z, y, x = (profile / along[axis] for axis in here)
            total[here] += (tile * (z[:, None, None] * y[:, None] * x).to(tile.device)).to(total)

    def blend(self, tiles: Tiles) -> Volume:
        """The map of all tiles."""
        total = torch.zeros((self.side,) * 3, dtype=torch.float64, device=tiles.device)
        self.add(total, self.corners, tiles)
        return total.to(tiles.dtype)

    @property
    def profile(self) -> Float[Tensor, " m"]:
        """A Hann window that is nowhere zero, so that the map's own borders have a weight."""
        place = (torch.arange(self.tile, dtype=torch.float64) + 0.5) / self.tile
        return torch.sin(torch.pi * place).square() + 1e-3

    @property
    def _sum_along(self) -> Float[Tensor, " n"]:
        """The sum of all profiles along one axis; tiles are a grid, so the sum in space is its outer product."""
        total = torch.zeros(self.side, dtype=torch.float64)
        for start in {corner[0] for corner in self.corners}:
            total[start : start + self.tile] += self.profile
        return total

    def _where(self, corner: tuple[int, int, int]) -> tuple[slice, slice, slice]:
        z, y, x = (slice(start, start + self.tile) for start in corner)
        return z, y, x
