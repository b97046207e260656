"""Attention of the voxels of a grid to their neighbourhoods, with the border rule of NATTEN.

A query at place i of an axis of n places sees the window of w places that begins at clamp(i - w // 2, 0, n - w): at the
border the window is moved inwards, so that every query sees exactly w^3 keys (arXiv 2204.07143). Three programs compute
it: NATTEN's kernels, PyTorch's flex attention, and ordinary attention with a boolean mask, which is the reference.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Heads = Float[Tensor, "batch depth height width heads channels"]
Grid = tuple[int, int, int]


def window_start(size: int, window: int, device: torch.device | None = None) -> Int[Tensor, " {size}"]:
    """The first place that each of an axis's queries sees."""
    return (torch.arange(size, device=device) - window // 2).clamp(0, max(size - window, 0))


def axis_masks(grid: Grid, window: int, device: torch.device | None = None) -> list[Bool[Tensor, "queries keys"]]:
    """Which places of each axis a place of it sees."""
    masks = []
    for size in grid:
        start, key = window_start(size, window, device)[:, None], torch.arange(size, device=device)
        masks.append((key >= start) & (key < start + window))
    return masks


def neighborhood_mask(grid: Grid, window: int, device: torch.device | None = None) -> Bool[Tensor, "tokens tokens"]:
    """Which token (column) each token (row) of a grid sees, both in the order z, y, x."""
    z, y, x = axis_masks(grid, window, device)
    seen = z[:, None, None, :, None, None] & y[:, None, None, :, None] & x[:, None, None, :]
    return seen.flatten(3).flatten(0, 2)


def neighborhood_attention(q: Heads, k: Heads, v: Heads, window: int, backend: str = "auto") -> Heads:
    """softmax(q . k) v over the neighbourhood of each query; scores are not scaled.

    `backend` is natten, flex, masked, or auto: on a GPU the first of the three that there is, else masked. A window
    that covers the grid is ordinary attention.
    """
    grid = tuple(q.shape[1:4])
    if all(size <= window for size in grid):
        return attention(q, k, v)
    return BACKENDS[chosen(q.device) if backend == "auto" else backend](q, k, v, grid, window)


def attention(q: Heads, k: Heads, v: Heads) -> Heads:
    """softmax(q . k) v over all tokens of the grid; scores are not scaled."""
    return _masked(q, k, v, tuple(q.shape[1:4]), None)


def chosen(device: torch.device) -> str:
    """The program that `auto` stands for."""
    if device.type != "cuda":
        return "masked"
    return "flex" if _natten() is None else "natten"


def _masked(q: Heads, k: Heads, v: Heads, grid: Grid, window: int | None) -> Heads:
    mask = None if window is None else _mask(grid, window, q.device)
    found = F.scaled_dot_product_attention(_flat(q), _flat(k), _flat(v), attn_mask=mask, scale=1.0)
    return found.transpose(1, 2).unflatten(1, grid)


def _flexible(q: Heads, k: Heads, v: Heads, grid: Grid, window: int) -> Heads:
    # compiled for a GPU alone: elsewhere it serves as a test, and compiling takes longer than the attention
    attend = _compiled() if q.device.type == "cuda" else flex_attention
    found = attend(_flat(q), _flat(k), _flat(v), block_mask=_blocks(grid, window, q.device), scale=1.0)
    return found.transpose(1, 2).unflatten(1, grid)


def _nattens(q: Heads, k: Heads, v: Heads, grid: Grid, window: int) -> Heads:
    # its kernels refuse a window that is wider than an axis
    return _natten()(q, k, v, kernel_size=tuple(min(window, size) for size in grid), scale=1.0)


BACKENDS: dict[str, Callable[[Heads, Heads, Heads, Grid, int], Heads]] = {
    "natten": _nattens,
    "flex": _flexible,
    "masked": _masked,
}


def _flat(x: Heads) -> Float[Tensor, "batch heads tokens channels"]:
    return x.flatten(1, 3).transpose(1, 2)


@functools.lru_cache(maxsize=8)
def _mask(grid: Grid, window: int, device: torch.device) -> Bool[Tensor, "tokens tokens"]:
    return neighborhood_mask(grid, window, device)


@functools.lru_cache(maxsize=8)
def _blocks(grid: Grid, window: int, device: torch.device) -> BlockMask:
    (z, y, x), (depth, height, width) = axis_masks(grid, window, device), grid
    area, tokens = height * width, depth * height * width
    # a lambda that calls nothing: PyTorch traces it, and the type checks of the tests are no tensors
    return create_block_mask(
        lambda batch, head, q, k: (
            z[q // area, k // area] & y[q // width % height, k // width % height] & x[q % width, k % width]
        ),
        *(None, None, tokens, tokens),
        device=device,
        _compile=device.type == "cuda",
    )


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


@functools.cache
def _natten() -> Callable[..., Heads] | None:
    """NATTEN's attention on three axes, where it is installed."""
    try:
        from natten import na3d
    except ImportError:
        return None
    return na3d
