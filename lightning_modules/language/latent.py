"""Multi-head latent attention: keys and values of all heads are read from one small vector of the token."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_modules.language.attention import FEW, Attention, Cache, attend, causal_mask
from lightning_modules.language.rotary import rotate


class LatentAttention(Attention):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1).

    q = W_qb norm(W_qa x), and [k, v] = W_kvb norm(c) with the latent c of [c, k_r] = W_kva x. Each head has
    `head_width` dimensions without position and `rotary_width` turned ones, whose key k_r all heads share. `latents`
    are the widths of the queries' latent and of c. The cache keeps norm(c) and k_r; a few new tokens read them in the
    latent space, without keys and values of the tokens before. Raises ValueError for widths below 1 and for an odd
    rotary width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        latents: tuple[int, int],
        rotary_width: int,
        turn: Callable[[Tensor, Tensor], Tensor] = rotate,
    ) -> None:
        super().__init__()
        if min(latents) < 1 or rotary_width < 2 or rotary_width % 2:
            raise ValueError(
                f"latents={list(latents)} with rotary_width={rotary_width}: take latents of at least 1, and an even "
                "rotary width, whose pairs are turned"
            )
        of_queries, latent = latents
        self.heads, self.head_width, self.rotary_width, self.latent = heads, head_width, rotary_width, latent
        self.turn, self.scale = turn, (head_width + rotary_width) ** -0.5
        self.q_a = nn.Linear(width, of_queries, bias=False)
        self.q_norm = nn.RMSNorm(of_queries, eps=1e-6)
        self.q_b = nn.Linear(of_queries, heads * (head_width + rotary_width), bias=False)
        self.kv_a = nn.Linear(width, latent + rotary_width, bias=False)
        self.kv_norm = nn.RMSNorm(latent, eps=1e-6)
        self.kv_b = nn.Linear(latent, heads * 2 * head_width, bias=False)
        self.c_proj = nn.Linear(heads * head_width, width, bias=False)
        self.score_width = heads * (2 * head_width + rotary_width) // 2
        self.cache_width = latent + rotary_width
        self.decode_multiply_adds = heads * (2 * latent + rotary_width)

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        positions: Int[Tensor, "#batch length"],
        mask: Bool[Tensor, "batch 1 length kept"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch length width"]:
        q = self.q_b(self.q_norm(self.q_a(x))).unflatten(-1, (self.heads, -1))
        q, q_r = q.split([self.head_width, self.rotary_width], -1)
        c, k_r = self.kv_a(x).split([self.latent, self.rotary_width], -1)
        q_r, k_r = self.turn(q_r, positions), self.turn(k_r[:, :, None], positions)[:, :, 0]
        c = self.kv_norm(c).to(k_r.dtype)
        if cache is not None:
            c, k_r = cache.append(c, k_r)
        few = q.shape[1] <= FEW and q.shape[1] < c.shape[1]
        return self.c_proj((self._in_latents if few else self._in_heads)(q, q_r, c, k_r, mask))

    def _in_heads(self, q: Tensor, q_r: Tensor, c: Tensor, k_r: Tensor, mask: Tensor | None) -> Tensor:
        k, v = self.kv_b(c).unflatten(-1, (self.heads, -1)).chunk(2, -1)
        k = torch.cat([k, k_r[:, :, None].expand(-1, -1, self.heads, -1)], -1)
        return attend(torch.cat([q, q_r], -1), k, v, mask, scale=self.scale)

    def _in_latents(self, q: Tensor, q_r: Tensor, c: Tensor, k_r: Tensor, mask: Tensor | None) -> Tensor:
        """The same with W_kvb on the side of the new tokens: q . (W_k c) = (W_k^T q) . c (section 2.1.2)."""
        to_k, to_v = self.kv_b.weight.unflatten(0, (self.heads, -1)).chunk(2, 1)
        q = torch.einsum("bthd,hdc->bthc", q, to_k)
        scores = torch.einsum("bthc,bmc->bhtm", q, c) + torch.einsum("bthr,bmr->bhtm", q_r, k_r)
        mask = causal_mask(q.shape[1], c.shape[1], c.device) if mask is None else mask
        weights = (scores.float() * self.scale).masked_fill(~mask, -torch.inf).softmax(-1).to(c.dtype)
        mean = torch.einsum("bhtm,bmc->bthc", weights, c)
        return torch.einsum("bthc,hdc->bthd", mean, to_v).flatten(2)
