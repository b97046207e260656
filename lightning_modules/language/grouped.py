"""Attention whose heads share keys and values in groups: all of them (MQA), some (GQA) or none (MHA)."""

from collections.abc import Callable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_modules.language.attention import Attention, Cache, attend
from lightning_modules.language.rotary import rotate


class GroupedQueryAttention(Attention):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions and a head width of its own.

    Head h has the keys and values of group h // (heads / groups). `groups=1` is multi-query attention (arXiv
    1911.02150), `groups=heads` multi-head attention. `turn` is `rotary.rotate` or a partial of it. Raises ValueError
    when the groups do not divide the heads, and for a head width that has no pairs to turn.
    """

    def __init__(
        self, width: int, heads: int, head_width: int, groups: int, turn: Callable[[Tensor, Tensor], Tensor] = rotate
    ) -> None:
        super().__init__()
        if groups < 1 or heads % groups:
            raise ValueError(f"heads={heads} cannot be dealt out to groups={groups}: take a divisor of {heads}")
        if head_width % 2:
            raise ValueError(f"head_width={head_width} is odd, and rotary positions turn pairs: take an even one")
        self.heads, self.head_width, self.groups, self.turn = heads, head_width, groups, turn
        self.c_attn = nn.Linear(width, (heads + 2 * groups) * head_width, bias=False)
        self.c_proj = nn.Linear(heads * head_width, width, bias=False)
        self.score_width = heads * head_width
        self.cache_width = 2 * groups * head_width
        self.decode_multiply_adds = 2 * heads * head_width

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        positions: Int[Tensor, "#batch length"],
        mask: Bool[Tensor, "batch 1 length kept"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch length width"]:
        every = self.c_attn(x).unflatten(-1, (-1, self.head_width))
        q, k, v = every.split([self.heads, self.groups, self.groups], 2)
        q, k = self.turn(q, positions), self.turn(k, positions)
        if cache is not None:
            k, v = cache.append(k, v, by_head=True)
        return self.c_proj(attend(q, k, v, mask))
