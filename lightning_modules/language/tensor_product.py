"""Tensor product attention (arXiv 2501.06425): queries, keys and values of a token are sums of a few outer products.

Factors are [batch, token, rank, heads] (A, over the heads) and [batch, token, rank, dim] (B, the token's own). `impl`
is that of `kernels.tpa`: "auto" takes the Triton kernels on a GPU, "torch" never, "triton" or refuses by name.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kernels import tpa
from kernels.tpa.dispatch import Impl, takes_kernel
from lightning_modules.language.attention import FEW, Attention, Cache, attend, causal_mask
from lightning_modules.language.rotary import rotate

INITS = ("official", "xavier")


def attend_in_factors(
    q: Float[Tensor, "batch new heads dim"],
    a_k: Float[Tensor, "batch kept rank_k heads"],
    b_k: Float[Tensor, "batch kept rank_k dim"],
    a_v: Float[Tensor, "batch kept rank_v heads"],
    b_v: Float[Tensor, "batch kept rank_v value"],
    mask: Bool[Tensor, "batch 1 new kept"] | None = None,
) -> Float[Tensor, "batch new heads*value"]:
    """softmax(q K^T / sqrt(dim)) V, heads side by side, from the factors of K and V (algorithm 2).

    q K^T = (1 / R_K) sum_s A_K[s] <q, B_K[s]>, and V is put together after the weights: neither K nor V is ever in
    memory. Without a mask the queries are the last of the keys' tokens, and each sees those before it and itself.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    mask = causal_mask(q.shape[1], a_k.shape[1], q.device)[None, None] if mask is None else mask
    # kept tokens first and heads last, as A lies in memory
    scores = torch.einsum("bmrd,bthd->bmrth", b_k, q).to(wide) * a_k[:, :, :, None]
    scores = scores.sum(2) * (q.shape[-1] ** -0.5 / a_k.shape[2])
    weights = scores.masked_fill(~mask.permute(0, 3, 2, 1), -torch.inf).softmax(1)
    mixed = (weights[:, :, None] * a_v[:, :, :, None] / a_v.shape[2]).to(b_v.dtype)
    return torch.einsum("bmrth,bmre->bthe", mixed, b_v).flatten(2)


def tensor_product_attention(
    q: Float[Tensor, "batch new heads dim"],
    a_k: Float[Tensor, "batch kept rank_k heads"],
    b_k: Float[Tensor, "batch kept rank_k dim"],
    a_v: Float[Tensor, "batch kept rank_v heads"],
    b_v: Float[Tensor, "batch kept rank_v value"],
    mask: Bool[Tensor, "batch 1 new kept"] | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "batch new heads*value"]:
    """As `attend_in_factors`, in the way that suits the sizes: many queries read keys and values faster as matrices."""
    factors = (a_k, b_k, a_v, b_v)
    if not few(q.shape[1], a_k.shape[1]):
        return attend(q, tpa.contract(a_k, b_k, impl), tpa.contract(a_v, b_v, impl), mask)
    # the kernel knows lengths but no mask, and has no gradient
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *factors))
    if mask is None and not wanted and takes_kernel("decode", impl, None, q):
        lengths = torch.full((len(q),), a_k.shape[1], dtype=torch.int32, device=q.device)
        return tpa.decode(q, *factors, lengths, impl=impl).flatten(2)
    return attend_in_factors(q, *factors, mask)


def few(new: int, kept: int) -> bool:
    """Whether so many new tokens read the factors of those before them as they are."""
    return new <= FEW and new < kept


class TensorProductAttention(Attention):
    """Attention with contextual factors of queries, keys and values (section 3).

    A_X = x W_AX and B_X = x W_BX, `ranks` are R_Q, R_K, R_V. Rows of the one projection are A_Q, B_Q, A_K, B_K, A_V,
    B_V, each by rank and then by head or dimension. B_Q and B_K are turned by `turn` (`rotary.rotate` or a partial of
    it), which is the same as turning every head (theorem 3.1). `init="official"` has the bounds of the authors' code,
    sqrt(6 / R(H + width)) of W_A and sqrt(6 / D(R + width)) of W_B, "xavier" those of the paper's text.

    Attention over many tokens without a mask is that of `tpa.attention`, which on a GPU keeps factors only, forward and
    backward; one or a few new tokens behind a cache are decoded by `tpa.decode`. Else, on a CPU, with documents or
    padding, heads are made and given to PyTorch, or factors read as `attend_in_factors` does.

    A subclass names the factors that are projected, that are learned constants, that are turned before they are kept,
    and that are kept, and makes A_K, B_K, A_V, B_V of the latter again. Raises ValueError for ranks and sizes below 1
    and for an odd head width.
    """

    projected: ClassVar[tuple[str, ...]] = ("a_q", "b_q", "a_k", "b_k", "a_v", "b_v")
    constant: ClassVar[tuple[str, ...]] = ()
    turned: ClassVar[tuple[str, ...]] = ("b_q", "b_k")
    kept: ClassVar[tuple[str, ...]] = ("a_k", "b_k", "a_v", "b_v")

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        ranks: tuple[int, ...],
        turn: Callable[[Tensor, Tensor], Tensor] = rotate,
        init: str = "official",
        orders: tuple[int, int] | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        of_b, of_c = orders or (head_width, 1)
        self._check(heads, head_width, ranks, of_b, of_c, init)
        self.heads, self.head_width, self.ranks, self.turn = heads, head_width, tuple(ranks), turn
        self.impl = impl
        rank, size = dict(zip("qkv", ranks)), {"a": heads, "b": of_b, "c": of_c}
        every = {*self.projected, *self.constant, *self.kept}
        self.shapes = {name: (rank[name[2]], size[name[0]]) for name in every}
        self.c_attn = nn.Linear(width, sum(self._sizes()), bias=False)
        self.constants = nn.ParameterDict({name: torch.empty(self.shapes[name]) for name in self.constant})
        self.c_proj = nn.Linear(heads * head_width, width, bias=False)
        self.score_width = heads * head_width
        self.cache_width = sum(math.prod(self.shapes[name]) for name in self.kept)
        r_q, r_k, r_v = ranks
        through_factors = r_q * r_k * (head_width + heads)
        through_queries = r_k * heads * (head_width + 1)
        self.decode_multiply_adds = min(through_factors, through_queries) + heads * r_v * head_width
        self.initialise(init)

    @torch.no_grad()
    def initialise(self, init: str) -> None:
        """A constant factor starts with the variance that a contextual one has of an input of mean square 1."""
        width = self.c_attn.in_features
        for name, weight in zip(self.projected, self.c_attn.weight.split(self._sizes())):
            weight.uniform_(-1, 1).mul_(self._bound(name, init))
        for name, constant in self.constants.items():
            constant.uniform_(-1, 1).mul_(self._bound(name, init) * math.sqrt(width))

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        positions: Int[Tensor, "#batch length"],
        mask: Bool[Tensor, "batch 1 length kept"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch length width"]:
        factors = self._factors(x, positions)
        kept, every = tuple(factors[name] for name in self.kept), positions
        if cache is not None:
            kept = cache.append(*kept)
            # those of the tokens before these count down from theirs; of padding nothing is asked
            every = positions[:, -1:] + torch.arange(1 - cache.length, 1, device=x.device)
        return self.c_proj(self.attend(x, factors, positions, self.read(every, *kept), mask))

    # What a subclass does in its own way

    def attend(
        self, x: Tensor, factors: dict[str, Tensor], positions: Tensor, kept: tuple[Tensor, ...], mask: Tensor | None
    ) -> Tensor:
        """Heads side by side, of the new tokens' queries and of A_K, B_K, A_V, B_V."""
        a_q, b_q = self.queries(factors, positions)
        if mask is None and not few(x.shape[1], kept[0].shape[1]):
            return tpa.attention(a_q, b_q, *kept, impl=self.impl).flatten(2)
        return tensor_product_attention(tpa.contract(a_q, b_q, self.impl), *kept, mask, self.impl)

    def queries(self, factors: dict[str, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
        """A_Q and B_Q (turned) of the new tokens."""
        return factors["a_q"], factors["b_q"]

    def read(self, positions: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """A_K, B_K (turned), A_V, B_V of all tokens, whose positions these are, from what is kept of them."""
        return kept

    # The rest is for all

    def _factors(self, x: Tensor, positions: Tensor) -> dict[str, Tensor]:
        parts = self.c_attn(x).split(self._sizes(), -1)
        factors = {name: part.unflatten(-1, self.shapes[name]) for name, part in zip(self.projected, parts)}
        return factors | {name: self.turn(factors[name], positions) for name in self.turned}

    def _constant(self, name: str, like: Tensor) -> Tensor:
        """A constant factor at every token."""
        return self.constants[name].to(like.dtype).expand(*like.shape[:2], -1, -1)

    def _sizes(self) -> list[int]:
        return [math.prod(self.shapes[name]) for name in self.projected]

    def _bound(self, name: str, init: str) -> float:
        (rank, size), width = self.shapes[name], self.c_attn.in_features
        if init == "xavier":
            return math.sqrt(6 / (width + rank * size))
        # Xavier's bound as torch computes it of the weight seen as (width, heads, rank) and (width, rank, dim)
        inner, outer = (rank, size) if name.startswith("a") else (size, rank)
        return math.sqrt(6 / (inner * (outer + width)))

    @staticmethod
    def _check(heads: int, head_width: int, ranks: tuple[int, ...], of_b: int, of_c: int, init: str) -> None:
        if len(ranks) != 3 or min(ranks) < 1:
            raise ValueError(f"ranks={list(ranks)}: take three of at least 1, those of queries, keys and values")
        if heads < 1 or head_width < 1:
            raise ValueError(f"heads={heads} with head_width={head_width}: take at least 1 of each")
        if of_b % 2:
            raise ValueError(f"head_width={head_width} leaves {of_b} to turn, and rotary positions turn pairs")
        if of_b * of_c != head_width:
            raise ValueError(f"orders={[of_b, of_c]} must multiply to head_width={head_width}")
        if init not in INITS:
            raise ValueError(f"init={init!r} is none of {', '.join(INITS)}")


class KeyValueAttention(TensorProductAttention):
    """TPA-KVonly: queries from a full linear map, keys and values in factors (appendix G)."""

    projected = ("a_k", "b_k", "a_v", "b_v")
    turned = ("b_k",)

    def __init__(self, width: int, heads: int, head_width: int, ranks: tuple[int, ...], **options) -> None:
        super().__init__(width, heads, head_width, ranks, **options)
        self.c_q = nn.Linear(width, heads * head_width, bias=False)
        nn.init.xavier_uniform_(self.c_q.weight)
        _, r_k, r_v = ranks
        self.decode_multiply_adds = heads * (r_k * (head_width + 1) + r_v * head_width)

    def attend(
        self, x: Tensor, factors: dict[str, Tensor], positions: Tensor, kept: tuple[Tensor, ...], mask: Tensor | None
    ) -> Tensor:
        q = self.turn(self.c_q(x).unflatten(-1, (self.heads, self.head_width)), positions)
        return tensor_product_attention(q, *kept, mask, self.impl)


class ConstantHeadFactors(TensorProductAttention):
    """Non-contextual A: every token has the same factors over the heads, and the cache keeps B alone."""

    projected, constant = ("b_q", "b_k", "b_v"), ("a_q", "a_k", "a_v")
    kept = ("b_k", "b_v")

    def queries(self, factors: dict[str, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._constant("a_q", factors["b_q"]), factors["b_q"]

    def read(self, positions: Tensor, b_k: Tensor, b_v: Tensor) -> tuple[Tensor, ...]:
        return self._constant("a_k", b_k), b_k, self._constant("a_v", b_v), b_v


class ConstantTokenFactors(TensorProductAttention):
    """Non-contextual B: every token has the same B, but for the turn by its position, and the cache keeps A alone."""

    projected, constant = ("a_q", "a_k", "a_v"), ("b_q", "b_k", "b_v")
    turned, kept = (), ("a_k", "a_v")

    def queries(self, factors: dict[str, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
        return factors["a_q"], self._at("b_q", positions, factors["a_q"])

    def read(self, positions: Tensor, a_k: Tensor, a_v: Tensor) -> tuple[Tensor, ...]:
        return a_k, self._at("b_k", positions, a_k), a_v, self._constant("b_v", a_v)

    def _at(self, name: str, positions: Tensor, like: Tensor) -> Tensor:
        """A constant turned to every position: once where the rows have the same positions."""
        constant = self.constants[name].to(like.dtype).expand(*positions.shape, -1, -1)
        return self.turn(constant, positions).expand(len(like), -1, -1, -1)


class SharedTokenFactors(TensorProductAttention):
    """Shared B: one B serves keys, turned, and values, as it is; it is kept once and turned when it is read.

    Raises ValueError also where R_K and R_V differ.
    """

    projected = ("a_q", "b_q", "a_k", "a_v", "b_v")
    turned, kept = ("b_q",), ("a_k", "a_v", "b_v")

    def __init__(self, width: int, heads: int, head_width: int, ranks: tuple[int, ...], **options) -> None:
        super().__init__(width, heads, head_width, ranks, **options)
        if ranks[1] != ranks[2]:
            raise ValueError(f"ranks={list(ranks)}: keys and values share their factors, so take equal ranks for them")

    def read(self, positions: Tensor, a_k: Tensor, a_v: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return a_k, self.turn(b, positions), a_v, b


class ThirdOrderAttention(TensorProductAttention):
    """Third order: B = vec(b (x) c) with dim = d_b d_c (`orders`), of which the turn touches b alone (theorem C.1)."""

    projected = ("a_q", "b_q", "c_q", "a_k", "b_k", "c_k", "a_v", "b_v", "c_v")
    kept = ("a_k", "b_k", "c_k", "a_v", "b_v", "c_v")

    def queries(self, factors: dict[str, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
        return factors["a_q"], columns(factors["b_q"], factors["c_q"])

    def read(self, positions: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        a_k, b_k, c_k, a_v, b_v, c_v = kept
        return a_k, columns(b_k, c_k), a_v, columns(b_v, c_v)


def columns(
    b: Float[Tensor, "batch length rank d_b"], c: Float[Tensor, "batch length rank d_c"]
) -> Float[Tensor, "batch length rank d_b*d_c"]:
    """vec(b c^T), columns one after another: the index is i_c d_b + i_b."""
    return (c[..., :, None] * b[..., None, :]).flatten(-2)
