"""Tiles and splits of decoding (compiled ahead of time for sm_90a without spills; not yet tuned on a GPU)."""

from typing import NamedTuple

from torch import Tensor

from kernels.tpa.contraction.configs import power_of_two

LEAST_SPLIT = 512  # cached tokens: below that writing and reading a split's result costs more than it wins
MOST_SPLITS = 64
MOST_NEW = 8  # tokens of a row at once: more of them are a prefill
PAGE = 64


class Tile(NamedTuple):
    """Rows (new token, head) and cached tokens of a tile, warps that share it, and stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile(rows: int, rank: int) -> Tile:
    """The tile for `rows` = new tokens times heads, and the larger of the ranks of K and V."""
    if 64 < rows <= 128:
        return Tile(128, 32, 8, 3)  # one pass over the shared factors instead of two
    height = min(64, power_of_two(rows, 16))
    if rank > 1:
        return Tile(height, 32, 8, 3)
    return Tile(height, 64, 4 if height < 64 else 8, 3)


def splits(batch: int, row_blocks: int, capacity: int, processors: int) -> int:
    """Into how many pieces the cache is dealt out, by what it can hold: two programs for each multiprocessor."""
    wanted = -(-2 * processors // (batch * row_blocks))
    return max(1, min(wanted, MOST_SPLITS, -(-capacity // LEAST_SPLIT)))


def capacity(a_k: Tensor, pages: Tensor | None) -> int:
    """Tokens that there is room for in a row."""
    return a_k.shape[1] * (1 if pages is None else pages.shape[1])
