"""Launches of the attention kernels. Imports Triton: only imported when a kernel runs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.tpa.attention import configs, kernels
from kernels.tpa.contraction import launch as contraction
from kernels.tpa.contraction.configs import power_of_two
from kernels.tpa.precision import accumulator, product


class Sequences(NamedTuple):
    """Where the sequences lie among packed tokens: `starts`, `lengths` [sequence], or None where all are `longest`."""

    starts: Tensor | None
    lengths: Tensor | None
    longest: int

    def contiguous(self) -> "Sequences":
        """As the kernels read it."""
        places = (x if x is None else x.contiguous() for x in (self.starts, self.lengths))
        return Sequences(*places, self.longest)


def forward(
    factors: Sequence[Tensor], queries: Sequences, keys: Sequences, count: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Values [token, heads, value] and log2 sums of exponentials [heads, token]; zeros for tokens of no sequence."""
    a_q, b_v = factors[0], factors[5]
    make = a_q.new_empty if queries.lengths is None else a_q.new_zeros
    out = make(len(a_q), a_q.shape[2], b_v.shape[2])
    wide = torch.float64 if a_q.dtype == torch.float64 else torch.float32
    lse = make(a_q.shape[2], len(a_q), dtype=wide)
    if out.numel():
        tile = configs.tile("forward", a_q.dtype, max(_dims(factors)), max(queries.longest, keys.longest))
        grid = (a_q.shape[2], -(-queries.longest // tile.queries), count)
        kernels.forward_kernel[grid](
            out, lse, *_shared(factors, queries, keys), **_constants(factors, tile, causal, scale)
        )
    return out, lse


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    factors: Sequence[Tensor],
    queries: Sequences,
    keys: Sequences,
    count: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of the six factors. Those of the heads of Q, K and V are written in between, without atomics."""
    (a_q, b_q, a_k, b_k, a_v, b_v), (dim, value) = factors, _dims(factors)
    make_q = a_q.new_empty if queries.lengths is None else a_q.new_zeros
    make_k = a_k.new_empty if keys.lengths is None else a_k.new_zeros
    dq, dk = make_q(len(a_q), a_q.shape[2], dim), make_k(len(a_k), a_k.shape[2], dim)
    dv, delta = make_k(len(a_v), a_v.shape[2], value), torch.empty_like(lse)
    longest, shared = max(queries.longest, keys.longest), _shared(factors, queries, keys)
    if dq.numel():
        tile = configs.tile("queries", a_q.dtype, max(dim, value), longest)
        grid = (a_q.shape[2], -(-queries.longest // tile.queries), count)
        constants = _constants(factors, tile, causal, scale)
        kernels.backward_queries_kernel[grid](dq, delta, dout, out, lse, *shared, **constants)
    if dk.numel():
        tile = configs.tile("keys", a_q.dtype, max(dim, value), longest)
        grid = (a_q.shape[2], -(-keys.longest // tile.keys), count)
        constants = _constants(factors, tile, causal, scale)
        kernels.backward_keys_kernel[grid](dk, dv, dout, lse, delta, *shared, **constants)
    return (
        *contraction.contract_backward(dq, a_q, b_q),
        *contraction.contract_backward(dk, a_k, b_k),
        *contraction.contract_backward(dv, a_v, b_v),
    )


def _dims(factors: Sequence[Tensor]) -> tuple[int, int]:
    return factors[1].shape[2], factors[5].shape[2]


def _shared(factors: Sequence[Tensor], queries: Sequences, keys: Sequences) -> tuple:
    """What all three kernels take: factors, places of the sequences, strides."""
    places = (queries.starts, queries.lengths, keys.starts, keys.lengths, queries.longest, keys.longest)
    return (*factors, *places, len(factors[0]), *(stride for x in factors for stride in x.stride()[:2]))


def _constants(factors: Sequence[Tensor], tile: configs.Tile, causal: bool, scale: float) -> dict:
    (a_q, _, a_k, _, a_v, _), (dim, value) = factors, _dims(factors)
    return {
        **{"SCALE": scale, "CAUSAL": causal, "HEADS": a_q.shape[2], "DIM": dim, "VALUE": value},
        **{"RANK_Q": a_q.shape[1], "RANK_K": a_k.shape[1], "RANK_V": a_v.shape[1]},
        **{"BLOCK_M": tile.queries, "BLOCK_N": tile.keys},
        **{"BLOCK_D": power_of_two(dim, 16), "BLOCK_E": power_of_two(value, 16)},
        **{"ACC": accumulator(a_q.dtype), "DOT": product(a_q.dtype)},
        **{"num_warps": tile.warps, "num_stages": tile.stages},
    }
