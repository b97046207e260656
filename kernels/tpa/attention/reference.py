"""Attention over heads that were made from factors, in plain PyTorch (arXiv 2501.06425, section 3)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def seen(
    queries: int, keys: int, query_lengths: Int[Tensor, " batch"], key_lengths: Int[Tensor, " batch"], causal: bool
) -> Bool[Tensor, "batch 1 queries keys"]:
    """Which keys each query sees: those of its row, if `causal` up to its own; the last query is at the last key."""
    i, j = torch.arange(queries, device=key_lengths.device)[:, None], torch.arange(keys, device=key_lengths.device)
    n, m = query_lengths[:, None, None], key_lengths[:, None, None]
    found = (i < n) & (j < m)
    return (found & (j <= i + m - n) if causal else found).unsqueeze(1)


def attend(
    q: Float[Tensor, "batch new heads dim"],
    k: Float[Tensor, "batch kept heads dim"],
    v: Float[Tensor, "batch kept heads value"],
    mask: Bool[Tensor, "#batch #heads new kept"] | None = None,
    causal: bool = True,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "batch new heads value"]:
    """softmax(scale q k^T) v; a query that sees nothing gives zeros. A mask decides alone which keys are seen."""
    new, kept = q.shape[1], k.shape[1]
    if mask is None and causal and new != kept:
        # is_causal would align the first query with the first key
        mask = torch.ones(1, 1, new, kept, dtype=torch.bool, device=q.device).tril(kept - new)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, None, dropout, causal, scale=scale).transpose(1, 2)
    # a softmax over nothing is 0 / 0, also backward: such rows see all keys and are then dropped
    any_seen = mask.any(-1, keepdim=True)
    values = F.scaled_dot_product_attention(q, k, v, mask | ~any_seen, dropout, scale=scale)
    return values.masked_fill(~any_seen, 0).transpose(1, 2)
