"""Triton kernels of attention that make the tiles of Q, K and V from their factors where they are used.

A sequence has `n` queries from row `first` of the packed factors on; the same of keys. The last query stands at the
last key. Nothing of the size of Q, K, V or the scores is kept: the backward kernels make all of it again. Exponentials
are in base 2, scores are computed alike forward and backward, so that the probabilities sum to 1 in both.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sequence(starts, lengths, longest, sequence):
    """First row and number of rows; without `starts` and `lengths` all sequences are `longest` rows, side by side."""
    first = sequence.to(tl.int64) * longest if starts is None else tl.load(starts + sequence).to(tl.int64)
    n = longest if lengths is None else tl.load(lengths + sequence).to(tl.int32)
    return first, n


@triton.jit
def _heads(
    a, b, a_token, a_rank, b_token, b_rank, row, here, head, d,
    RANK: tl.constexpr, DIM: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """1/R sum_r a_r b_r of one head for the rows, rounded once as if it had been written and read."""
    x = tl.zeros([row.shape[0], d.shape[0]], ACC)
    for r in tl.static_range(RANK):
        a_r = tl.load(a + row * a_token + r * a_rank + head, mask=here, other=0.0).to(ACC)
        b_at = b + row[:, None] * b_token + r * b_rank + d[None, :]
        x += a_r[:, None] * tl.load(b_at, mask=here[:, None] & (d[None, :] < DIM), other=0.0).to(ACC)
    return (x / RANK).to(DOT)


@triton.jit
def _rows(x, first, index, here, head, d, HEADS: tl.constexpr, DIM: tl.constexpr):
    """A tile of [token, heads, dim], contiguous."""
    at = ((first + index[:, None]) * HEADS + head) * DIM + d[None, :]
    return tl.load(x + at, mask=here[:, None] & (d[None, :] < DIM), other=0.0)


@triton.jit
def _store_rows(x, tile, first, index, here, head, d, HEADS: tl.constexpr, DIM: tl.constexpr):
    at = ((first + index[:, None]) * HEADS + head) * DIM + d[None, :]
    tl.store(x + at, tile, mask=here[:, None] & (d[None, :] < DIM))


@triton.jit
def _forward_step(
    top, total, value, q, i, shift, start, n_k, k_first, a_k, b_k, a_v, b_v,
    a_k_token, a_k_rank, b_k_token, b_k_rank, a_v_token, a_v_rank, b_v_token, b_v_rank, head, d, e,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
    RANK_K: tl.constexpr, RANK_V: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    j = start + tl.arange(0, BLOCK_N)
    row, here = k_first + j, j < n_k
    k = _heads(a_k, b_k, a_k_token, a_k_rank, b_k_token, b_k_rank, row, here, head, d, RANK_K, DIM, ACC, DOT)
    score = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * (SCALE * LOG2E)
    if MASKED:
        seen = here[None, :] & (j[None, :] <= i[:, None] + shift) if CAUSAL else here[None, :]
        score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    # a row that has seen nothing yet must not subtract infinity from infinity
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - base)
    weight = tl.exp2(score - base[:, None])
    v = _heads(a_v, b_v, a_v_token, a_v_rank, b_v_token, b_v_rank, row, here, head, e, RANK_V, VALUE, ACC, DOT)
    value = value * shrink[:, None] + tl.dot(weight.to(DOT), v, input_precision="ieee", out_dtype=ACC)
    return new_top, total * shrink + tl.sum(weight, 1), value


@triton.jit(do_not_specialize=["longest_q", "longest_k", "tokens_q"])
def forward_kernel(
    out, lse, a_q, b_q, a_k, b_k, a_v, b_v, q_starts, q_lengths, k_starts, k_lengths, longest_q, longest_k, tokens_q,
    a_q_token, a_q_rank, b_q_token, b_q_rank, a_k_token, a_k_rank, b_k_token, b_k_rank,
    a_v_token, a_v_rank, b_v_token, b_v_rank,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
    RANK_Q: tl.constexpr, RANK_K: tl.constexpr, RANK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out [token, heads, value] and its log2 sum of exponentials lse [heads, token]. Grid: heads, blocks, sequences."""
    head, sequence = tl.program_id(0), tl.program_id(2)
    # the longest rows of a causal mask first, so that none of them is left for the end
    m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q_first, n_q = _sequence(q_starts, q_lengths, longest_q, sequence)
    k_first, n_k = _sequence(k_starts, k_lengths, longest_k, sequence)
    i, d, e = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    shift = n_k - n_q
    # keys before `whole` are seen by all rows of the block, those from `high` on by none
    high = tl.minimum(n_k, m0 + BLOCK_M + shift) if CAUSAL else n_k
    whole = tl.maximum(tl.minimum(n_k, m0 + shift + 1) if CAUSAL else n_k, 0) // BLOCK_N * BLOCK_N
    high = tl.where(m0 < n_q, high, 0)
    whole = tl.where(m0 < n_q, whole, 0)
    q = _heads(
        a_q, b_q, a_q_token, a_q_rank, b_q_token, b_q_rank, q_first + i, i < n_q, head, d, RANK_Q, DIM, ACC, DOT
    )  # fmt: skip
    top = tl.full([BLOCK_M], float("-inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    value = tl.zeros([BLOCK_M, BLOCK_E], ACC)
    for start in range(0, whole, BLOCK_N):
        top, total, value = _forward_step(
            top, total, value, q, i, shift, start, n_k, k_first, a_k, b_k, a_v, b_v,
            a_k_token, a_k_rank, b_k_token, b_k_rank, a_v_token, a_v_rank, b_v_token, b_v_rank, head, d, e,
            SCALE, CAUSAL, False, DIM, VALUE, RANK_K, RANK_V, BLOCK_N, ACC, DOT,
        )  # fmt: skip
    for start in range(whole, high, BLOCK_N):
        top, total, value = _forward_step(
            top, total, value, q, i, shift, start, n_k, k_first, a_k, b_k, a_v, b_v,
            a_k_token, a_k_rank, b_k_token, b_k_rank, a_v_token, a_v_rank, b_v_token, b_v_rank, head, d, e,
            SCALE, CAUSAL, True, DIM, VALUE, RANK_K, RANK_V, BLOCK_N, ACC, DOT,
        )  # fmt: skip
    empty = total == 0.0
    value = value / tl.where(empty, 1.0, total)[:, None]
    _store_rows(out, value, q_first, i, i < n_q, head, e, HEADS, VALUE)
    log_sum = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + head.to(tl.int64) * tokens_q + q_first + i, log_sum, mask=i < n_q)


@triton.jit
def _queries_step(
    dq, q, dout, log_sum, delta, i, shift, start, n_k, k_first, a_k, b_k, a_v, b_v,
    a_k_token, a_k_rank, b_k_token, b_k_rank, a_v_token, a_v_rank, b_v_token, b_v_rank, head, d, e,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
    RANK_K: tl.constexpr, RANK_V: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    j = start + tl.arange(0, BLOCK_N)
    row, here = k_first + j, j < n_k
    k = _heads(a_k, b_k, a_k_token, a_k_rank, b_k_token, b_k_rank, row, here, head, d, RANK_K, DIM, ACC, DOT)
    v = _heads(a_v, b_v, a_v_token, a_v_rank, b_v_token, b_v_rank, row, here, head, e, RANK_V, VALUE, ACC, DOT)
    score = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * (SCALE * LOG2E)
    weight = tl.exp2(score - log_sum[:, None])
    if MASKED:
        seen = here[None, :] & (j[None, :] <= i[:, None] + shift) if CAUSAL else here[None, :]
        weight = tl.where(seen, weight, 0.0)
    dweight = tl.dot(dout, tl.trans(v), input_precision="ieee", out_dtype=ACC)
    dscore = weight * (dweight - delta[:, None])
    return dq + tl.dot(dscore.to(DOT), k, input_precision="ieee", out_dtype=ACC)


@triton.jit(do_not_specialize=["longest_q", "longest_k", "tokens_q"])
def backward_queries_kernel(
    dq, delta, dout, out, lse, a_q, b_q, a_k, b_k, a_v, b_v, q_starts, q_lengths, k_starts, k_lengths,
    longest_q, longest_k, tokens_q,
    a_q_token, a_q_rank, b_q_token, b_q_rank, a_k_token, a_k_rank, b_k_token, b_k_rank,
    a_v_token, a_v_rank, b_v_token, b_v_rank,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
    RANK_Q: tl.constexpr, RANK_K: tl.constexpr, RANK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dq [token, heads, dim], and delta [heads, token] = sum_e dout out, which the other backward kernel reads.

    Grid: heads, blocks of queries, sequences.
    """
    head, sequence = tl.program_id(0), tl.program_id(2)
    m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q_first, n_q = _sequence(q_starts, q_lengths, longest_q, sequence)
    k_first, n_k = _sequence(k_starts, k_lengths, longest_k, sequence)
    i, d, e = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    shift = n_k - n_q
    high = tl.minimum(n_k, m0 + BLOCK_M + shift) if CAUSAL else n_k
    whole = tl.maximum(tl.minimum(n_k, m0 + shift + 1) if CAUSAL else n_k, 0) // BLOCK_N * BLOCK_N
    high = tl.where(m0 < n_q, high, 0)
    whole = tl.where(m0 < n_q, whole, 0)
    here = i < n_q
    q = _heads(
        a_q, b_q, a_q_token, a_q_rank, b_q_token, b_q_rank, q_first + i, here, head, d, RANK_Q, DIM, ACC, DOT
    )  # fmt: skip
    given = _rows(dout, q_first, i, here, head, e, HEADS, VALUE)
    product = given.to(ACC) * _rows(out, q_first, i, here, head, e, HEADS, VALUE).to(ACC)
    at = head.to(tl.int64) * tokens_q + q_first + i
    sums = tl.sum(product, 1)
    tl.store(delta + at, sums, mask=here)
    log_sum = tl.load(lse + at, mask=here, other=0.0)
    given = given.to(DOT)
    found = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start in range(0, whole, BLOCK_N):
        found = _queries_step(
            found, q, given, log_sum, sums, i, shift, start, n_k, k_first, a_k, b_k, a_v, b_v,
            a_k_token, a_k_rank, b_k_token, b_k_rank, a_v_token, a_v_rank, b_v_token, b_v_rank, head, d, e,
            SCALE, CAUSAL, False, DIM, VALUE, RANK_K, RANK_V, BLOCK_N, ACC, DOT,
        )  # fmt: skip
    for start in range(whole, high, BLOCK_N):
        found = _queries_step(
            found, q, given, log_sum, sums, i, shift, start, n_k, k_first, a_k, b_k, a_v, b_v,
            a_k_token, a_k_rank, b_k_token, b_k_rank, a_v_token, a_v_rank, b_v_token, b_v_rank, head, d, e,
            SCALE, CAUSAL, True, DIM, VALUE, RANK_K, RANK_V, BLOCK_N, ACC, DOT,
        )  # fmt: skip
    _store_rows(dq, found * SCALE, q_first, i, here, head, d, HEADS, DIM)


@triton.jit
def _keys_step(
    dk, dv, k, v, dout, lse, delta, j, shift, start, n_q, q_first, a_q, b_q, a_q_token, a_q_rank, b_q_token, b_q_rank,
    tokens_q, head, d, e,
    SCALE: tl.constexpr, MASKED: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
    RANK_Q: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    # queries past the end are zeros with a zero gradient, so they need no mask
    i = start + tl.arange(0, BLOCK_M)
    here = i < n_q
    q = _heads(
        a_q, b_q, a_q_token, a_q_rank, b_q_token, b_q_rank, q_first + i, here, head, d, RANK_Q, DIM, ACC, DOT
    )  # fmt: skip
    at = head.to(tl.int64) * tokens_q + q_first + i
    log_sum = tl.load(lse + at, mask=here, other=0.0)
    score = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=ACC) * (SCALE * LOG2E)
    weight = tl.exp2(score - log_sum[None, :])
    if MASKED:
        weight = tl.where(j[:, None] <= i[None, :] + shift, weight, 0.0)
    given = _rows(dout, q_first, i, here, head, e, HEADS, VALUE).to(DOT)
    dv += tl.dot(weight.to(DOT), given, input_precision="ieee", out_dtype=ACC)
    dweight = tl.dot(v, tl.trans(given), input_precision="ieee", out_dtype=ACC)
    dscore = weight * (dweight - tl.load(delta + at, mask=here, other=0.0)[None, :])
    return dk + tl.dot(dscore.to(DOT), q, input_precision="ieee", out_dtype=ACC), dv


@triton.jit(do_not_specialize=["longest_q", "longest_k", "tokens_q"])
def backward_keys_kernel(
    dk, dv, dout, lse, delta, a_q, b_q, a_k, b_k, a_v, b_v, q_starts, q_lengths, k_starts, k_lengths,
    longest_q, longest_k, tokens_q,
    a_q_token, a_q_rank, b_q_token, b_q_rank, a_k_token, a_k_rank, b_k_token, b_k_rank,
    a_v_token, a_v_rank, b_v_token, b_v_rank,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
    RANK_Q: tl.constexpr, RANK_K: tl.constexpr, RANK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dk [token, heads, dim] and dv [token, heads, value]. Grid: heads, blocks of keys, sequences."""
    head, sequence = tl.program_id(0), tl.program_id(2)
    n0 = tl.program_id(1) * BLOCK_N
    q_first, n_q = _sequence(q_starts, q_lengths, longest_q, sequence)
    k_first, n_k = _sequence(k_starts, k_lengths, longest_k, sequence)
    j, d, e = n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    shift = n_k - n_q
    row, here = k_first + j, j < n_k
    k = _heads(a_k, b_k, a_k_token, a_k_rank, b_k_token, b_k_rank, row, here, head, d, RANK_K, DIM, ACC, DOT)
    v = _heads(a_v, b_v, a_v_token, a_v_rank, b_v_token, b_v_rank, row, here, head, e, RANK_V, VALUE, ACC, DOT)
    end = tl.where(n0 < n_k, n_q, 0)
    # queries before `low` see no key of the block, those from `whole` on see all of them
    low = tl.maximum(n0 - shift, 0) // BLOCK_M * BLOCK_M if CAUSAL else 0
    whole = tl.maximum(tl.cdiv(n0 + BLOCK_N - 1 - shift, BLOCK_M) * BLOCK_M, low) if CAUSAL else 0
    found_k = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    found_v = tl.zeros([BLOCK_N, BLOCK_E], ACC)
    if CAUSAL:
        for start in range(low, tl.minimum(whole, end), BLOCK_M):
            found_k, found_v = _keys_step(
                found_k, found_v, k, v, dout, lse, delta, j, shift, start, n_q, q_first,
                a_q, b_q, a_q_token, a_q_rank, b_q_token, b_q_rank, tokens_q, head, d, e,
                SCALE, True, HEADS, DIM, VALUE, RANK_Q, BLOCK_M, ACC, DOT,
            )  # fmt: skip
    for start in range(whole, end, BLOCK_M):
        found_k, found_v = _keys_step(
            found_k, found_v, k, v, dout, lse, delta, j, shift, start, n_q, q_first,
            a_q, b_q, a_q_token, a_q_rank, b_q_token, b_q_rank, tokens_q, head, d, e,
            SCALE, False, HEADS, DIM, VALUE, RANK_Q, BLOCK_M, ACC, DOT,
        )  # fmt: skip
    _store_rows(dk, found_k * SCALE, k_first, j, here, head, d, HEADS, DIM)
    _store_rows(dv, found_v, k_first, j, here, head, e, HEADS, VALUE)
