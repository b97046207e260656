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
    # [batch, heads, new, kept, rank] from here on; what lies past the lengths may be anything, NaN too
    a_k, a_v = (x[..., :heads].to(dtype).permute(0, 3, 1, 2).unsqueeze(2) for x in (a_k, a_v))
    keys = torch.arange(kept, device=q.device)
    steps = torch.arange(new, device=q.device)
    seen = (keys < (lengths[:, None] - new + 1 + steps)[..., None])[:, None]
    per_rank = q.to(dtype).transpose(1, 2).flatten(1, 2) @ b_k.to(dtype).flatten(1, 2).mT
    logits = (per_rank.view(batch, heads, new, kept, rank_k) * a_k).sum(-1) * ((scale or dim**-0.5) / rank_k)
    logits = logits.masked_fill(~seen, -torch.inf)
    # a row that sees nothing has weights 0, not 0 / 0
    weights = (logits - logits.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    per_rank = (weights[..., None] * a_v).masked_fill(~seen[..., None], 0).flatten(3).flatten(1, 2)
    b_v = b_v.to(dtype).masked_fill((keys >= lengths[:, None])[..., None, None], 0)
    values = (per_rank @ b_v.flatten(1, 2)).view(batch, heads, new, -1) / rank_v
    return values.transpose(1, 2).to(q.dtype)
