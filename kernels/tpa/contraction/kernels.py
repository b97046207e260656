"""Triton kernels from factors to heads and back: one token per program, heads x dim in registers.

The halves of dim that a rotation mixes are two tiles, so that no number has to change its thread.
"""

import triton
import triton.language as tl


@triton.jit
def _angles(cos, sin, position, table, d, HALF: tl.constexpr, ACC: tl.constexpr):
    position += tl.zeros_like(d)
    known = (position >= 0) & (position < table)
    tl.device_assert(known, "a position is outside the table: make it longer with rotary_table")
    at = position * HALF + d
    c = tl.load(cos + at, mask=known & (d < HALF), other=0.0).to(ACC)
    s = tl.load(sin + at, mask=known & (d < HALF), other=0.0).to(ACC)
    # where assertions are left out such a position gives NaN, and never a read of foreign memory
    return tl.where(known, c, float("nan")), tl.where(known, s, float("nan"))


@triton.jit
def _halves(row, d, HALF: tl.constexpr, ACC: tl.constexpr):
    first = tl.load(row + d, mask=d < HALF, other=0.0).to(ACC)
    second = tl.load(row + HALF + d, mask=d < HALF, other=0.0).to(ACC)
    return first, second


@triton.jit
def _store_halves(row, first, second, d, HALF: tl.constexpr):
    tl.store(row + d, first, mask=d < HALF)
    tl.store(row + HALF + d, second, mask=d < HALF)


@triton.jit
def _contract_token(
    x, a, b, a_rank, b_rank, c, s,
    RANK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, ROTATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    first = tl.zeros([BLOCK_H, BLOCK_D], ACC)
    second = tl.zeros([BLOCK_H, BLOCK_D], ACC)
    for r in tl.static_range(RANK):
        a_r = tl.load(a + r * a_rank + h, mask=h < HEADS, other=0.0).to(ACC)
        b1, b2 = _halves(b + r * b_rank, d, HALF, ACC)
        if ROTATE:
            b1, b2 = b1 * c - b2 * s, b2 * c + b1 * s
        first += a_r[:, None] * b1[None, :]
        second += a_r[:, None] * b2[None, :]
    at = h[:, None] * (2 * HALF) + d[None, :]
    here = (h[:, None] < HEADS) & (d[None, :] < HALF)
    tl.store(x + at, first / RANK, mask=here)
    tl.store(x + at + HALF, second / RANK, mask=here)


@triton.jit
def _contract_token_backward(
    dx, a, b, a_rank, b_rank, da, db, c, s,
    RANK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, ROTATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    at = h[:, None] * (2 * HALF) + d[None, :]
    here = (h[:, None] < HEADS) & (d[None, :] < HALF)
    g1 = tl.load(dx + at, mask=here, other=0.0).to(ACC) / RANK
    g2 = tl.load(dx + at + HALF, mask=here, other=0.0).to(ACC) / RANK
    for r in tl.static_range(RANK):
        a_r = tl.load(a + r * a_rank + h, mask=h < HEADS, other=0.0).to(ACC)
        b1, b2 = _halves(b + r * b_rank, d, HALF, ACC)
        if ROTATE:
            b1, b2 = b1 * c - b2 * s, b2 * c + b1 * s
        tl.store(da + r * HEADS + h, tl.sum(g1 * b1[None, :] + g2 * b2[None, :], 1), mask=h < HEADS)
        e1, e2 = tl.sum(a_r[:, None] * g1, 0), tl.sum(a_r[:, None] * g2, 0)
        if ROTATE:
            e1, e2 = e1 * c + e2 * s, e2 * c - e1 * s
        _store_halves(db + r * (2 * HALF), e1, e2, d, HALF)


@triton.jit
def contract_kernel(
    x, a, b, a_token, a_rank, b_token, b_rank,
    RANK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x [token, heads, dim] = 1/R sum_r a_r b_r^T. Grid: tokens."""
    t = tl.program_id(0).to(tl.int64)
    _contract_token(
        x + t * HEADS * 2 * HALF, a + t * a_token, b + t * b_token, a_rank, b_rank, 0, 0,
        RANK, HEADS, HALF, BLOCK_H, BLOCK_D, False, ACC,
    )  # fmt: skip


@triton.jit
def contract_backward_kernel(
    dx, a, b, da, db, a_token, a_rank, b_token, b_rank,
    RANK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """da [token, rank, heads] and db [token, rank, dim] of a contraction. Grid: tokens."""
    t = tl.program_id(0).to(tl.int64)
    _contract_token_backward(
        dx + t * HEADS * 2 * HALF, a + t * a_token, b + t * b_token, a_rank, b_rank,
        da + t * RANK * HEADS, db + t * RANK * 2 * HALF, 0, 0,
        RANK, HEADS, HALF, BLOCK_H, BLOCK_D, False, ACC,
    )  # fmt: skip


@triton.jit
def rotate_kernel(
    y, b, cos, sin, positions, table, b_token, b_rank,
    RANK: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr, BACKWARD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y [token, rank, dim]: b turned by its token's angles, or back. Grid: tokens."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    c, s = _angles(cos, sin, tl.load(positions + t).to(tl.int64), table, d, HALF, ACC)
    if BACKWARD:
        s = -s
    for r in tl.static_range(RANK):
        b1, b2 = _halves(b + t * b_token + r * b_rank, d, HALF, ACC)
        _store_halves(y + (t * RANK + r) * 2 * HALF, b1 * c - b2 * s, b2 * c + b1 * s, d, HALF)


@triton.jit
def qkv_kernel(
    q, k, v, row, cos, sin, positions, table, row_token,
    RANK_Q: tl.constexpr, RANK_K: tl.constexpr, RANK_V: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr, HALF_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q, k, v of the projection's row [A_Q | B_Q | A_K | B_K | A_V | B_V], B_Q and B_K turned. Grid: tokens."""
    t = tl.program_id(0).to(tl.int64)
    c, s = _angles(
        cos, sin, tl.load(positions + t).to(tl.int64), table, tl.arange(0, BLOCK_D), HALF, ACC
    )  # fmt: skip
    a_q = row + t * row_token
    a_k = a_q + RANK_Q * (HEADS + 2 * HALF)
    a_v = a_k + RANK_K * (HEADS + 2 * HALF)
    _contract_token(
        q + t * HEADS * 2 * HALF, a_q, a_q + RANK_Q * HEADS, HEADS, 2 * HALF, c, s,
        RANK_Q, HEADS, HALF, BLOCK_H, BLOCK_D, True, ACC,
    )  # fmt: skip
    _contract_token(
        k + t * HEADS * 2 * HALF, a_k, a_k + RANK_K * HEADS, HEADS, 2 * HALF, c, s,
        RANK_K, HEADS, HALF, BLOCK_H, BLOCK_D, True, ACC,
    )  # fmt: skip
    _contract_token(
        v + t * HEADS * 2 * HALF_V, a_v, a_v + RANK_V * HEADS, HEADS, 2 * HALF_V, 0, 0,
        RANK_V, HEADS, HALF_V, BLOCK_H, BLOCK_E, False, ACC,
    )  # fmt: skip


@triton.jit
def qkv_backward_kernel(
    dq, dk, dv, row, drow, cos, sin, positions, table, row_token,
    RANK_Q: tl.constexpr, RANK_K: tl.constexpr, RANK_V: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr, HALF_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of the projection's row (contiguous) from those of q, k and v. Grid: tokens."""
    t = tl.program_id(0).to(tl.int64)
    c, s = _angles(
        cos, sin, tl.load(positions + t).to(tl.int64), table, tl.arange(0, BLOCK_D), HALF, ACC
    )  # fmt: skip
    k_at = RANK_Q * (HEADS + 2 * HALF)
    v_at = k_at + RANK_K * (HEADS + 2 * HALF)
    a = row + t * row_token
    da = drow + t * (v_at + RANK_V * (HEADS + 2 * HALF_V))
    _contract_token_backward(
        dq + t * HEADS * 2 * HALF, a, a + RANK_Q * HEADS, HEADS, 2 * HALF, da, da + RANK_Q * HEADS, c, s,
        RANK_Q, HEADS, HALF, BLOCK_H, BLOCK_D, True, ACC,
    )  # fmt: skip
    _contract_token_backward(
        dk + t * HEADS * 2 * HALF, a + k_at, a + k_at + RANK_K * HEADS, HEADS, 2 * HALF,
        da + k_at, da + k_at + RANK_K * HEADS, c, s,
        RANK_K, HEADS, HALF, BLOCK_H, BLOCK_D, True, ACC,
    )  # fmt: skip
    _contract_token_backward(
        dv + t * HEADS * 2 * HALF_V, a + v_at, a + v_at + RANK_V * HEADS, HEADS, 2 * HALF_V,
        da + v_at, da + v_at + RANK_V * HEADS, 0, 0,
        RANK_V, HEADS, HALF_V, BLOCK_H, BLOCK_E, False, ACC,
    )  # fmt: skip
