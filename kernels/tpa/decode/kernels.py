"""Triton kernels of decoding: the cache is dealt out to splits, each a softmax of its own, which are then combined.

Rows of a tile are (new token, head), columns are cached tokens. No length is a constant of a kernel: a growing cache
compiles once. All exponentials are in base 2.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["pages_row", "splits", "chunk"])
def split_kernel(
    out, lse, q, a_k, b_k, a_v, b_v, lengths, pages,
    a_k_block, a_k_token, a_k_rank, b_k_block, b_k_token, b_k_rank,
    a_v_block, a_v_token, a_v_rank, b_v_block, b_v_token, b_v_rank, pages_row, splits, chunk,
    SCALE: tl.constexpr, NEW: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr,
    VALUE: tl.constexpr, RANK_K: tl.constexpr, RANK_V: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out [batch, split, row, value] and its log2 sum lse [batch, split, row] over the tokens of a split.

    Grid: batch, blocks of rows, splits. PAGE is the number of tokens of a page, 0 where a row's cache is one piece.
    """
    batch, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    ROWS: tl.constexpr = NEW * HEADS
    # of one new token the rows are the heads: said in this way, their factors are loaded in long pieces
    head = row if NEW == 1 else row % HEADS
    real = row < (PADDED if NEW == 1 else ROWS)
    n = tl.load(lengths + batch).to(tl.int32)
    sees = n - NEW + 1 + row // HEADS if NEW > 1 else n + tl.zeros_like(row)
    low = split * chunk
    high = tl.minimum(low + chunk, n)

    q_at = q + (batch * ROWS + row[:, None]) * DIM + d[None, :]
    query = tl.load(q_at, mask=(row[:, None] < ROWS) & (d[None, :] < DIM), other=0.0).to(ACC)
    query = (query * (SCALE * LOG2E / RANK_K)).to(DOT)
    top = tl.full([BLOCK_M], float("-inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    value = tl.zeros([BLOCK_M, BLOCK_E], ACC)
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        here = j < high
        if PAGE > 0:
            block = tl.load(pages + batch * pages_row + j // PAGE, mask=here, other=0).to(tl.int64)
            within = (j % PAGE).to(tl.int64)
        else:
            block = batch + tl.zeros([BLOCK_N], tl.int64)
            within = j.to(tl.int64)
        score = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        for r in tl.static_range(RANK_K):
            b_at = b_k + block * b_k_block + within * b_k_token + r * b_k_rank
            b = tl.load(b_at[None, :] + d[:, None], mask=here[None, :] & (d[:, None] < DIM), other=0.0).to(DOT)
            a_at = a_k + block * a_k_block + within * a_k_token + r * a_k_rank
            a = tl.load(a_at[None, :] + head[:, None], mask=here[None, :] & real[:, None], other=0.0).to(ACC)
            score += tl.dot(query, b, input_precision="ieee", out_dtype=ACC) * a
        score = tl.where(here[None, :] & (j[None, :] < sees[:, None]), score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        # a row that has seen nothing yet must not subtract infinity from infinity
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        weight = tl.exp2(score - base[:, None])
        total = total * shrink + tl.sum(weight, 1)
        value = value * shrink[:, None]
        for r in tl.static_range(RANK_V):
            a_at = a_v + block * a_v_block + within * a_v_token + r * a_v_rank
            a = tl.load(a_at[None, :] + head[:, None], mask=here[None, :] & real[:, None], other=0.0).to(ACC)
            b_at = b_v + block * b_v_block + within * b_v_token + r * b_v_rank
            b = tl.load(b_at[:, None] + e[None, :], mask=here[:, None] & (e[None, :] < VALUE), other=0.0).to(DOT)
            value += tl.dot((weight * a).to(DOT), b, input_precision="ieee", out_dtype=ACC)
        top = new_top

    empty = total == 0.0
    value = value / (tl.where(empty, 1.0, total) * RANK_V)[:, None]
    at = (batch * splits + split) * ROWS + row
    tl.store(out + at[:, None] * VALUE + e[None, :], value, mask=(row[:, None] < ROWS) & (e[None, :] < VALUE))
    tl.store(lse + at, tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total))), mask=row < ROWS)


@triton.jit(do_not_specialize=["splits", "rows"])
def combine_kernel(
    out, part, lse, splits, rows, VALUE: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out [batch, row, value]: the splits' values, each by its share of the sum of exponentials. Grid: batch, rows."""
    batch, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    top = tl.full([], float("-inf"), ACC)
    for split in range(splits):
        top = tl.maximum(top, tl.load(lse + (batch * splits + split) * rows + row))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([], ACC)
    value = tl.zeros([BLOCK_E], ACC)
    for split in range(splits):
        at = (batch * splits + split) * rows + row
        share = tl.exp2(tl.load(lse + at) - base)
        total += share
        value += share * tl.load(part + at * VALUE + e, mask=e < VALUE, other=0.0)
    value = value / tl.where(total == 0.0, 1.0, total)
    tl.store(out + (batch * rows + row) * VALUE + e, value, mask=e < VALUE)
