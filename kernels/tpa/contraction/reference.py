"""From factors to heads in plain PyTorch (Tensor Product Attention, arXiv 2501.06425, section 3)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over numbers of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def contract(
    a: Float[Tensor, "*tokens rank heads"], b: Float[Tensor, "*tokens rank dim"]
) -> Float[Tensor, "*tokens heads dim"]:
    """X = 1/R sum_r a_r b_r^T (eq. 3.1), summed in float32 and rounded once."""
    # autocast would round the sum as well
    with torch.autocast(a.device.type, enabled=False):
        x = torch.einsum("...rh,...rd->...hd", a.to(wide(a.dtype)), b.to(wide(b.dtype)))
    return (x / a.shape[-2]).to(a.dtype)


def rotate(
    b: Float[Tensor, "*tokens rank dim"],
    cos: Float[Tensor, "table half"],
    sin: Float[Tensor, "table half"],
    positions: Int[Tensor, "*tokens"],
) -> Float[Tensor, "*tokens rank dim"]:
    """Rotary embedding of token factors (Theorem 3.1): turning each b_r turns every head. Half-split layout."""
    cos, sin = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
    first, second = b.to(wide(b.dtype)).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(b.dtype)


def factors(
    projection: Float[Tensor, "*tokens row"], ranks: Sequence[int], heads: int, dims: Sequence[int]
) -> list[tuple[Float[Tensor, "*tokens _ _"], Float[Tensor, "*tokens _ _"]]]:
    """Head factors a [*tokens, rank, heads] and token factors b [*tokens, rank, dim] of Q, K and V, views of the row.

    A row is A_Q, B_Q, A_K, B_K, A_V, B_V side by side, each rank after rank.
    """
    widths = [rank * width for rank, dim in zip(ranks, dims) for width in (heads, dim)]
    parts = [part.unflatten(-1, (rank, -1)) for part, rank in zip(projection.split(widths, -1), repeated(ranks))]
    return list(zip(parts[::2], parts[1::2]))


def repeated(ranks: Sequence[int]) -> list[int]:
    """Each rank twice: once for the head factors, once for the token factors."""
    return [rank for rank in ranks for _ in range(2)]


def qkv(
    projection: Float[Tensor, "*tokens row"],
    cos: Float[Tensor, "table half"],
    sin: Float[Tensor, "table half"],
    positions: Int[Tensor, "*tokens"],
    ranks: Sequence[int],
    heads: int,
    dims: Sequence[int],
) -> tuple[Float[Tensor, "*tokens _ dim"], Float[Tensor, "*tokens _ dim"], Float[Tensor, "*tokens _ value"]]:
    """Queries, keys and values of a projection: split, rotation of B_Q and B_K, three contractions, rounded once."""
    made = factors(projection.to(wide(projection.dtype)), ranks, heads, dims)
    (a_q, b_q), (a_k, b_k), (a_v, b_v) = made
    q, k = (contract(a, rotate(b, cos, sin, positions)) for a, b in ((a_q, b_q), (a_k, b_k)))
    return q.to(projection.dtype), k.to(projection.dtype), contract(a_v, b_v).to(projection.dtype)
