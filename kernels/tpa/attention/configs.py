"""Tiles of attention, and up to which length it is tiled (compiled for sm_90a without spills; not tuned on a GPU)."""

from typing import NamedTuple

import torch

from kernels.tpa.contraction.configs import power_of_two

# from here on heads made once and read by PyTorch's attention should win over heads made again in every tile
MATERIALISE_FROM = 4096
WIDEST = 128  # numbers of a head that a tile holds


class Tile(NamedTuple):
    """Queries and keys of a tile, warps that share it, and stages of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int


def tile(which: str, dtype: torch.dtype, dim: int, longest: int) -> Tile:
    """The tile of the forward kernel, or of "queries" or "keys" backward, not much longer than the sequences."""
    large = dim > 64 or dtype.itemsize > 2
    chosen = {
        "forward": Tile(128, 32, 8, 2) if large else Tile(128, 64, 8, 2),
        "queries": Tile(64, 32, 4, 2) if large else Tile(128, 64, 8, 2),
        "keys": Tile(32, 64, 8, 2) if large else Tile(64, 64, 8, 2),
    }[which]
    fits = power_of_two(longest, 16)
    return chosen._replace(queries=min(chosen.queries, fits), keys=min(chosen.keys, fits))
