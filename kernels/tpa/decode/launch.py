"""Launches of the decoding kernels. Imports Triton: only imported when a kernel runs."""

import torch
from torch import Tensor

from kernels.tpa.contraction.configs import power_of_two
from kernels.tpa.decode import configs, kernels
from kernels.tpa.precision import accumulator, product


def decode(
    q: Tensor,
    a_k: Tensor,
    b_k: Tensor,
    a_v: Tensor,
    b_v: Tensor,
    lengths: Tensor,
    pages: Tensor | None,
    scale: float,
    splits: int,
) -> Tensor:
    """Values [batch, new, heads, value] of queries against a cache of factors, in `splits` pieces (0: configured)."""
    batch, new, heads, _ = q.shape
    value, rows = b_v.shape[3], new * heads
    out = q.new_empty(batch, new, heads, value)
    if not out.numel():
        return out
    tile = configs.tile(rows, max(a_k.shape[2], a_v.shape[2]))
    blocks = -(-rows // tile.rows)
    splits = splits or configs.splits(batch, blocks, configs.capacity(a_k, pages), _processors(q.device))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    # of one split the part is the result
    part = q.new_empty(batch, splits, rows, value, dtype=wide) if splits > 1 else out
    lse = q.new_empty(batch, splits, rows, dtype=wide)
    given, constants = split_arguments(q, a_k, b_k, a_v, b_v, lengths, pages, scale, splits)
    kernels.split_kernel[(batch, blocks, splits)](part, lse, *given, **constants)
    if splits > 1:
        constants = {"VALUE": value, "BLOCK_E": power_of_two(value), "ACC": accumulator(q.dtype), "num_warps": 1}
        kernels.combine_kernel[(batch, rows)](out, part, lse, splits, rows, **constants)
    return out


def split_arguments(
    q: Tensor,
    a_k: Tensor,
    b_k: Tensor,
    a_v: Tensor,
    b_v: Tensor,
    lengths: Tensor,
    pages: Tensor | None,
    scale: float,
    splits: int,
) -> tuple[tuple, dict]:
    """What `split_kernel` takes after its outputs, and its constants, none of which depends on a length."""
    _, new, heads, dim = q.shape
    value, tile = b_v.shape[3], configs.tile(new * heads, max(a_k.shape[2], a_v.shape[2]))
    per_split = -(-configs.capacity(a_k, pages) // splits)
    strides = (stride for x in (a_k, b_k, a_v, b_v) for stride in x.stride()[:3])
    table, pages_row = (lengths, 0) if pages is None else (pages, pages.stride(0))
    given = (q, a_k, b_k, a_v, b_v, lengths, table, *strides, pages_row, splits, -(-per_split // tile.keys) * tile.keys)
    return given, {
        **{"SCALE": scale, "NEW": new, "HEADS": heads, "PADDED": min(a_k.shape[3], a_v.shape[3])},
        **{"DIM": dim, "VALUE": value, "RANK_K": a_k.shape[2], "RANK_V": a_v.shape[2]},
        **{"PAGE": 0 if pages is None else a_k.shape[1], "BLOCK_M": tile.rows, "BLOCK_N": tile.keys},
        **{"BLOCK_D": power_of_two(dim, 16), "BLOCK_E": power_of_two(value, 16)},
        **{"ACC": accumulator(q.dtype), "DOT": product(q.dtype)},
        **{"num_warps": tile.warps, "num_stages": tile.stages},
    }


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
