"""One or a few new tokens against a cache of factors, in plain PyTorch (arXiv 2501.06425, Algorithm 2)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.tpa.contraction.reference import wide


def unpaged(x: Float[Tensor, "pages size rank width"], pages: Int[Tensor, "batch slots"]):
    """The factors [batch, slots * size, rank, width] that a table of pages stands for."""
    return x[pages].flatten(1, 2)


def decode(
    q: Float[Tensor, "batch new heads dim"],
    a_k: Float[Tensor, "blocks size rank_k padded"],
    b_k: Float[Tensor, "blocks size rank_k dim"],
    a_v: Float[Tensor, "blocks size rank_v padded"],
    b_v: Float[Tensor, "blocks size rank_v value"],
    lengths: Int[Tensor, " batch"],
    pages: Int[Tensor, "batch slots"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch new heads value"]:
    """Attention of the last `new` tokens of each row, without forming keys and values.

    L[h, m] = scale / R_K sum_s A_K[m, s, h] q[h] B_K[m, s]
    O[h] = 1 / R_V sum_m softmax(L)[h, m] sum_u A_V[m, u, h] B_V[m, u]
    """
    batch, new, heads, dim = q.shape
    if pages is not None:
        a_k, b_k, a_v, b_v = (unpaged(x, pages) for x in (a_k, b_k, a_v, b_v))
    dtype, (rank_k, rank_v), kept = wide(q.dtype), (a_k.shape[2], a_v.shape[2]), a_k.shape[1]
    # [batch, kept, rank, new, heads] from here on, as the cache lies; past the lengths there may be anything, NaN too
    a_k, a_v = (x[..., None, :heads].to(dtype) for x in (a_k, a_v))
    keys, steps = (torch.arange(n, device=q.device) for n in (kept, new))
    hidden = (keys[:, None] > (lengths[:, None] - new + steps)[:, None])[..., None]
    scores = b_k.to(dtype).flatten(1, 2) @ q.to(dtype).flatten(1, 2).mT
    logits = (scores.view(batch, kept, rank_k, new, heads) * a_k).sum(2) * ((scale or dim**-0.5) / rank_k)
    logits = logits.masked_fill(hidden, -torch.inf)
    # a query that sees nothing has weights 0, not 0 / 0
    weights = (logits - logits.amax(1, keepdim=True).clamp(min=torch.finfo(dtype).min)).exp()
    weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    weights = (weights.unsqueeze(2) * a_v).masked_fill(hidden.unsqueeze(2), 0)
    b_v = b_v.to(dtype).masked_fill((keys >= lengths[:, None])[..., None, None], 0)
    values = weights.view(batch, kept * rank_v, new * heads).mT @ b_v.flatten(1, 2)
    return (values.view(batch, new, heads, -1) / rank_v).to(q.dtype)
