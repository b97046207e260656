"""Rotary position embedding (arXiv 2104.09864): a position is an angle by which pairs of dimensions are turned."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate(
    x: Float[Tensor, "batch length heads dim"],
    positions: Int[Tensor, "#batch length"],
    base: float = 10_000.0,
    sign: int = 1,
    table_dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch length heads dim"]:
    """Dimension i turns with i + dim / 2 by sign * p * base^(-2i / dim) (arXiv 2104.09864, eq. 34).

    Scores depend on distances alone under either sign, but weights that were trained under one are wrong under the
    other: +1 is Llama's and ours, -1 that of T6's authors. Angles have at least float32, in bfloat16 neighbouring
    positions would coincide; `table_dtype` rounds their cosines and sines. `dim` is even.
    """
    half, wide = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    frequencies = base ** -(torch.arange(half, device=x.device, dtype=wide) / half)
    angles = positions[:, :, None, None] * frequencies
    cos, sin = (table.to(table_dtype or wide).to(wide) for table in (angles.cos(), sign * angles.sin()))
    first, second = x.to(wide).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
