"""Launches of the contraction's kernels. Imports Triton: only imported when a kernel runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.tpa.contraction import kernels
from kernels.tpa.contraction.configs import ASSERTING, power_of_two, warps
from kernels.tpa.precision import accumulator


def contract(a: Tensor, b: Tensor) -> Tensor:
    """Heads [token, heads, dim] of factors [token, rank, heads] and [token, rank, dim]."""
    x = a.new_empty(a.shape[0], a.shape[2], b.shape[2])
    if x.numel():
        kernels.contract_kernel[(len(a),)](x, a, b, *_strides(a, b), **_constants(a, b))
    return x


def contract_backward(dx: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both factors from that of the heads."""
    da, db = a.new_empty(a.shape), b.new_empty(b.shape)
    if dx.numel():
        kernels.contract_backward_kernel[(len(a),)](dx, a, b, da, db, *_strides(a, b), **_constants(a, b))
    return da, db


def rotate(b: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, backward: bool) -> Tensor:
    """Token factors [token, rank, dim] turned by the angles of their positions, or back."""
    y = b.new_empty(b.shape)
    half = b.shape[2] // 2
    if y.numel():
        kernels.rotate_kernel[(len(b),)](
            *(y, b, cos, sin, positions, len(cos), b.stride(0), b.stride(1)),
            RANK=b.shape[1], HALF=half, BLOCK_D=power_of_two(half), BACKWARD=backward, ACC=accumulator(b.dtype),
            num_warps=1, **ASSERTING,
        )  # fmt: skip
    return y


def qkv(
    projection: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    ranks: Sequence[int],
    heads: int,
    dims: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of Q, K and V [token, heads, dim] from rows of all their factors."""
    made = tuple(projection.new_empty(len(projection), heads, dim) for dim in dims)
    if len(projection):
        kernels.qkv_kernel[(len(projection),)](
            *(*made, projection, cos, sin, positions, len(cos), projection.stride(0)),
            **_row_constants(projection.dtype, ranks, heads, dims),
        )
    return made


def qkv_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    projection: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    ranks: Sequence[int],
) -> Tensor:
    """The gradient of the rows from those of Q, K and V."""
    drow = projection.new_empty(projection.shape)
    if len(projection):
        kernels.qkv_backward_kernel[(len(projection),)](
            *(dq, dk, dv, projection, drow, cos, sin, positions, len(cos), projection.stride(0)),
            **_row_constants(projection.dtype, ranks, dq.shape[1], [x.shape[2] for x in (dq, dk, dv)]),
        )
    return drow


def _strides(a: Tensor, b: Tensor) -> tuple[int, int, int, int]:
    return a.stride(0), a.stride(1), b.stride(0), b.stride(1)


def _constants(a: Tensor, b: Tensor) -> dict:
    rank, heads, dim = a.shape[1], a.shape[2], b.shape[2]
    return {
        **{"RANK": rank, "HEADS": heads, "HALF": dim // 2, "ACC": accumulator(a.dtype)},
        **{"BLOCK_H": power_of_two(heads), "BLOCK_D": power_of_two(dim // 2), "num_warps": warps(heads, dim)},
    }


def _row_constants(dtype: torch.dtype, ranks: Sequence[int], heads: int, dims: Sequence[int]) -> dict:
    half, half_v = dims[0] // 2, dims[2] // 2
    return {
        **dict(zip(("RANK_Q", "RANK_K", "RANK_V"), ranks)),
        **{"HEADS": heads, "HALF": half, "HALF_V": half_v, "ACC": accumulator(dtype)},
        **{"BLOCK_H": power_of_two(heads), "BLOCK_D": power_of_two(half), "BLOCK_E": power_of_two(half_v)},
        **{"num_warps": warps(heads, max(dims)), **ASSERTING},
    }
