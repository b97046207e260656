"""Random factors and caches of Tensor Product Attention, tolerances, and the definition itself in float64."""

import torch
from torch import Tensor

# of the largest number compared: rounding of inputs and products, measured with a margin
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def factor_pairs(
    *tokens: int, heads: int, dims: tuple[int, ...], ranks: tuple[int, ...], dtype=torch.float64, size: float = 1.0
) -> list[Tensor]:
    """a [*tokens, rank, heads] and b [*tokens, rank, dim] for each of the ranks, normal with deviation `size`."""
    shapes = [(*tokens, rank, width) for rank, dim in zip(ranks, dims) for width in (heads, dim)]
    return [(size * torch.randn(shape)).to(dtype) for shape in shapes]


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype | None = None) -> None:
    """Asserts that the numbers agree to the tolerance of `dtype`, in shares of the largest one wanted."""
    assert torch.isfinite(found).all()
    if not wanted.numel():
        return
    error = (found.double() - wanted.double()).abs().max()
    assert error <= TOLERANCE[dtype or found.dtype] * wanted.abs().max().clamp(min=1.0), error


def materialised(a: Tensor, b: Tensor) -> Tensor:
    """X = 1/R A^T B, token after token."""
    return torch.stack([x.mT @ y / len(x) for x, y in zip(a.double(), b.double())])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None) -> Tensor:
    """Values [token, heads, value] of one sequence in float64; the last query stands at the last key."""
    logits = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * (scale or q.shape[-1] ** -0.5)
    if causal:
        seen = torch.ones(logits.shape[1:], dtype=torch.bool).tril(len(k) - len(q))
        logits = logits.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khe->qhe", logits.softmax(-1).nan_to_num(0.0), v.double())


def decoded(q: Tensor, a_k: Tensor, b_k: Tensor, a_v: Tensor, b_v: Tensor, lengths: Tensor) -> Tensor:
    """What decoding should give: for each row the definition over its tokens. Heads beyond q's are padding."""
    rows = []
    for i, n in enumerate(lengths.tolist()):
        heads = q.shape[2]
        k, v = (materialised(a[i, :n, :, :heads], b[i, :n]) if n else None for a, b in ((a_k, b_k), (a_v, b_v)))
        rows.append(softmax_attention(q[i], k, v) if n else torch.zeros(*q.shape[1:3], b_v.shape[-1]).double())
    return torch.stack(rows)
