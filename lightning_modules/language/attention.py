"""Causal attention, the mask of documents that share a row, and what a layer remembers while it generates.

Every attention is called as `attention(x, positions, mask, cache)`, so that a block does not know which one it has.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from lightning_modules.language.rotary import rotate

FEW = 8  # new tokens up to which a compressed cache is read as it is kept, instead of being made into keys and values


class Cache:
    """What one layer keeps of the tokens so far: tensors of shape [batch, token, ...], room for `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._kept: tuple[Tensor, ...] = ()

    def append(
        self, *new: Shaped[Tensor, "batch new ..."], by_head: bool = False
    ) -> tuple[Shaped[Tensor, "batch kept ..."], ...]:
        """Keep the tensors of more tokens; returns those of all tokens.

        With `by_head` they lie in memory along their third axis first, in which order PyTorch's attention reads keys
        and values in half to two thirds of the time.
        Raises ValueError when there is no room, and for another precision than that of the tokens before.
        """
        end = self.length + new[0].shape[1]
        if end > self.capacity:
            raise ValueError(f"a cache with room for {self.capacity} tokens cannot keep {end}: give it more")
        if not self._kept:
            self._kept = tuple(self._room(x.transpose(1, 2) if by_head else x, 1 + by_head) for x in new)
        for kept, x in zip(self._kept, new):
            if kept.dtype != x.dtype:
                raise ValueError(f"a cache of {kept.dtype} cannot keep {x.dtype}: generate in one precision")
        for kept, x in zip(self._kept, new):
            kept[:, self.length : end] = x
        self.length = end
        return tuple(kept[:, :end] for kept in self._kept)

    def _room(self, x: Tensor, tokens: int) -> Tensor:
        """Memory for all tokens, which are this axis of `x`, seen as [batch, token, ...]."""
        return x.new_empty(*x.shape[:tokens], self.capacity, *x.shape[tokens + 1 :]).transpose(1, tokens)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, for all rows and its whole capacity."""
        return sum(kept.nbytes for kept in self._kept)


class Attention(nn.Module):
    """What is known of a layer's attention besides its output, for FLOPs and memory.

    `score_width` and `cache_width` are numbers per token: those that enter the scores and the weighted sum (half of
    both, over all heads), and those that a `Cache` keeps. `decode_multiply_adds` is what one new token costs for each
    kept one, between its projections (arXiv 2501.06425, appendix A.4).
    """

    score_width: int
    cache_width: int
    decode_multiply_adds: int

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that a cache of this layer takes for a token."""
        return self.cache_width * dtype.itemsize


def document_mask(positions: Int[Tensor, "batch length"]) -> Bool[Tensor, "batch 1 length length"]:
    """Which key (last axis) each query sees: those before it in its document, which begins where counting restarts."""
    begins = positions[:, 1:] != positions[:, :-1] + 1
    document = F.pad(begins, (1, 0)).cumsum(1)
    return (document[:, :, None] == document[:, None, :]).tril()[:, None]


def padding_mask(padding: Int[Tensor, " batch"], begin: int, end: int) -> Bool[Tensor, "batch 1 {end-begin} {end}"]:
    """Which of `end` keys the queries from `begin` on see in rows that begin with so much padding.

    A token sees those before it and itself, but no padding; padding sees itself, because of nothing there is no mean.
    """
    queries, keys = (torch.arange(first, end, device=padding.device) for first in (begin, 0))
    causal, itself = keys <= queries[:, None], keys == queries[:, None]
    real = keys >= padding[:, None, None, None]
    return (causal & real) | itself


def causal_mask(new: int, kept: int, device: torch.device) -> Bool[Tensor, "{new} {kept}"]:
    """Which keys each query sees when the queries are the last of the keys' tokens."""
    return torch.ones(new, kept, dtype=torch.bool, device=device).tril(kept - new)


def attend(
    q: Float[Tensor, "batch new heads dim"],
    k: Float[Tensor, "batch kept groups dim"],
    v: Float[Tensor, "batch kept groups value"],
    mask: Bool[Tensor, "batch 1 new kept"] | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "batch new heads*value"]:
    """softmax(scale q k^T) v, heads side by side; `scale` is 1 / sqrt(dim) by default.

    Without a mask the queries are the last of the keys' tokens, and each sees those before it and itself. With fewer
    groups than heads, each serves heads / groups neighbouring heads.
    """
    new, kept = q.shape[1], k.shape[1]
    if mask is None and 1 < new < kept:
        mask = causal_mask(new, kept, q.device)
    # is_causal aligns the first query with the first key: right only where there are as many
    causal = mask is None and new == kept
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)
    return heads.transpose(1, 2).flatten(2)


class MultiHeadAttention(Attention):
    """Multi-head causal self-attention (arXiv 1706.03762), queries, keys and values from one projection.

    With `scale_by_layer` the scores are divided by `layer` + 1 (layers count from 0) as well; `rotary` turns queries
    and keys by their positions; `qk_norm` gives each of their heads root mean square 1 before that (arXiv 2010.04245).
    `dropout` falls on the probabilities and on the output. Raises ValueError when the width does not fit the heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layer: int = 0,
        bias: bool = True,
        dropout: float = 0.0,
        scale_by_layer: bool = False,
        rotary: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} cannot be dealt out to heads={heads}: take a multiple of {heads}")
        if rotary and (width // heads) % 2:
            raise ValueError(f"position=rotary turns pairs, but width={width} / heads={heads} is odd")
        self.heads, self.head_width = heads, width // heads
        self.dropout, self.rotary, self.qk_norm = dropout, rotary, qk_norm
        self.scale = self.head_width**-0.5 / (layer + 1 if scale_by_layer else 1)
        self.c_attn = nn.Linear(width, 3 * width, bias)
        self.c_proj = nn.Linear(width, width, bias)
        self.score_width, self.cache_width, self.decode_multiply_adds = width, 2 * width, 2 * width

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        positions: Int[Tensor, "#batch length"],
        mask: Bool[Tensor, "batch 1 length kept"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch length width"]:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.heads, self.head_width)).unbind(2)
        if self.qk_norm:
            q, k = (F.rms_norm(heads.float(), (self.head_width,)).to(v.dtype) for heads in (q, k))
        if self.rotary:
            q, k = rotate(q, positions), rotate(k, positions)
        if cache is not None:
            k, v = cache.append(k, v, by_head=True)
        dropout = self.dropout if self.training else 0.0
        y = self.c_proj(attend(q, k, v, mask, dropout, self.scale))
        return F.dropout(y, self.dropout, self.training)
