"""The hourglass transformer on density cubes (HDiT, arXiv 2401.11605, in three dimensions as in arXiv 2410.08631).

Tokens are patches of 4^3 voxels. Outer levels attend to neighbourhoods and occur twice, on the way in and on the way
out; between levels 2^3 tokens become one. The innermost level attends to everything. Modules have the names of the
published weights.
"""

import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.cryo.neighborhood import Heads, attention, neighborhood_attention
from lightning_modules.cryo.time_embedding import RandomFourier, time_mlp

Tokens = Float[Tensor, "batch depth height width channels"]
Places = Float[Tensor, "depth height width 3"]
Condition = Float[Tensor, "batch condition"]
Coarse = Float[Tensor, "batch coarse_depth coarse_height coarse_width more"]
Fine = Float[Tensor, "batch fine_depth fine_height fine_width fewer"]


def rms_norm(x: Tokens, gain: Float[Tensor, "..."], eps: float = 1e-6) -> Tokens:
    """x / sqrt(mean x^2 + eps) times a gain, in float32."""
    gain = gain.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return x * gain.to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tokens) -> Tokens:
        return rms_norm(x, self.scale)


class AdaRMSNorm(nn.Module):
    """`rms_norm` with the gain 1 + W c of the condition c; W is zero at first."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.linear = zeroed(nn.Linear(condition, width, bias=False))

    def forward(self, x: Tokens, condition: Condition) -> Tokens:
        return rms_norm(x, 1 + self.linear(condition)[:, None, None, None])


def zeroed(linear: nn.Linear) -> nn.Linear:
    """A layer whose output is zero at first."""
    nn.init.zeros_(linear.weight)
    return linear


# Positions


def places(depth: int, height: int, width: int, device: torch.device | None = None) -> Places:
    """Centres of the cells of a grid in [-1, 1]; axes that are shorter than the longest span less of it."""
    longest = max(depth, height, width)
    axes = [(2 * torch.arange(n, device=device, dtype=torch.float32) + 1 - n) / longest for n in (depth, height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def coarser(positions: Places) -> Float[Tensor, "depth/2 height/2 width/2 3"]:
    """The places of merged tokens: means over 2^3."""
    return rearrange(positions, "(d a) (h b) (w c) e -> d h w (a b c) e", a=2, b=2, c=2).mean(-2)


class AxialRoPE(nn.Module):
    """Angles by which pairs of channels are turned: frequency times place along each axis, one axis after the other.

    A head has the frequencies exp(linspace(log pi, log 10 pi)), its own subset of them, as many for each axis as are in
    a twelfth of its channels; pair j is channels j and j + (angles), and what is left over is not turned.
    """

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        per_axis = channels // 3 // 4
        exponents = torch.linspace(math.log(math.pi), math.log(10 * math.pi), heads * per_axis + 1)[:-1]
        self.register_buffer("freqs", exponents.exp().view(per_axis, heads).T.contiguous())

    def forward(self, positions: Places) -> Float[Tensor, "depth height width heads angles"]:
        return (positions[..., None, :, None] * self.freqs.float()[:, None]).flatten(-2)


def turned(x: Heads, angles: Float[Tensor, "depth height width heads angles"]) -> Heads:
    """Rotary embedding: channels j and j + n of every head turned by angle j of n, in float32."""
    n = angles.shape[-1]
    a, b, rest = x[..., :n].float(), x[..., n : 2 * n].float(), x[..., 2 * n :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)


def unit(x: Heads, scale: Float[Tensor, " heads"], eps: float = 1e-6) -> Heads:
    """x sqrt(s) / |x|, so that scores of two such are s times the cosine between them; in float32."""
    gain = scale.float().sqrt()[:, None] * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + eps)
    return x * gain.to(x.dtype)


# Layers


class SelfAttention(nn.Module):
    """x + W attention(norm(x)); scores are s cos(q, k) of turned queries and keys, s is learned, W zero at first.

    `window` is the edge of a neighbourhood in tokens, None all of the grid.
    """

    def __init__(self, width: int, head: int, condition: int, window: int | None, backend: str) -> None:
        super().__init__()
        self.head = head
        self.norm = AdaRMSNorm(width, condition)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.scale = nn.Parameter(torch.full((width // head,), 10.0))
        self.pos_emb = AxialRoPE(width // head, head)
        self.out_proj = zeroed(nn.Linear(width, width, bias=False))
        self.attend = attention if window is None else partial(neighborhood_attention, window=window, backend=backend)

    def forward(self, x: Tokens, positions: Places, condition: Condition) -> Tokens:
        qkv = self.qkv_proj(self.norm(x, condition))
        q, k, v = rearrange(qkv, "b d h w (three heads c) -> three b d h w heads c", three=3, c=self.head)
        angles = self.pos_emb(positions)
        q, k = (turned(unit(part, self.scale), angles) for part in (q, k))
        return x + self.out_proj(self.attend(q, k, v).flatten(-2))


class FeedForward(nn.Module):
    """x + W2 (a gelu(g)) with (a, g) = W1 norm(x) of 3 d numbers each; W2 is zero at first (arXiv 2002.05202)."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.norm = AdaRMSNorm(width, condition)
        self.up_proj = nn.Linear(width, 6 * width, bias=False)
        self.down_proj = zeroed(nn.Linear(3 * width, width, bias=False))

    def forward(self, x: Tokens, condition: Condition) -> Tokens:
        hidden, gate = self.up_proj(self.norm(x, condition)).chunk(2, dim=-1)
        return x + self.down_proj(hidden * F.gelu(gate))


class Layer(nn.Module):
    """Attention, then a feed-forward network."""

    def __init__(self, width: int, head: int, condition: int, window: int | None, backend: str) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, head, condition, window, backend)
        self.ff = FeedForward(width, condition)

    def forward(self, x: Tokens, positions: Places, condition: Condition) -> Tokens:
        return self.ff(self.self_attn(x, positions, condition), condition)


class Merge(nn.Module):
    """Every edge^3 tokens, or voxels, become one by a linear map of all their channels."""

    def __init__(self, before: int, after: int, edge: int = 2) -> None:
        super().__init__()
        self.edge = edge
        self.proj = nn.Linear(before * edge**3, after, bias=False)

    def forward(self, x: Tokens) -> Coarse:
        e = self.edge
        return self.proj(rearrange(x, "n (d a) (h b) (w c) e -> n d h w (a b c e)", a=e, b=e, c=e))


class Unpatch(nn.Module):
    """Every token becomes edge^3 voxels by a linear map."""

    def __init__(self, before: int, after: int, edge: int) -> None:
        super().__init__()
        self.edge = edge
        self.proj = nn.Linear(before, after * edge**3, bias=False)

    def forward(self, x: Tokens) -> Fine:
        e = self.edge
        return rearrange(self.proj(x), "n d h w (a b c e) -> n (d a) (h b) (w c) e", a=e, b=e, c=e)


class Split(Unpatch):
    """Every token becomes 2^3, which are mixed with those of the way in; the share, learned, is a half at first."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, 2)
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tokens, skip: Fine) -> Fine:
        return torch.lerp(skip, super().forward(x), self.fac.to(skip.dtype))


class HDiT(nn.Module):
    """Velocity of a density cube at time t: an hourglass of transformer levels, from outer to inner ones.

    CryoFM-S (64^3 voxels) is widths=(768, 1536), depths=(4, 8); CryoFM-L (128^3) is widths=(320, 640, 1280),
    depths=(2, 2, 12). `window` is the edge of a neighbourhood of the outer levels in tokens, null: all of the grid.
    `time_mlp` puts a small network in the place of the one matrix after
    the Fourier features of the time. With `checkpointing` activations of a layer are computed again in the backward
    pass. `backend` is as in `neighborhood_attention`. The output is zero at first.
    Raises ValueError where widths and depths or widths and heads do not fit, and for heads below 12 channels.
    """

    def __init__(
        self,
        widths: tuple[int, ...] | list[int],
        depths: tuple[int, ...] | list[int],
        head: int = 64,
        patch: int = 4,
        window: int | None = 7,
        time_width: int = 256,
        time_mlp: bool = False,
        checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check(widths, depths, head)
        self.edge, self.checkpointing = patch * 2 ** (len(widths) - 1), checkpointing

        def level(width: int, depth: int, window: int | None) -> nn.ModuleList:
            return nn.ModuleList(Layer(width, head, time_width, window, backend) for _ in range(depth))

        outer = list(zip(widths, depths))[:-1]
        self.patch_in = Merge(1, widths[0], patch)
        self.time_emb = RandomFourier(time_width)
        self.time_in_proj = _time_projection(time_width, time_mlp)
        self.down_levels = nn.ModuleList(level(width, depth, window) for width, depth in outer)
        self.up_levels = nn.ModuleList(level(width, depth, window) for width, depth in outer)
        self.mid_level = level(widths[-1], depths[-1], None)
        self.merges = nn.ModuleList(Merge(a, b) for a, b in pairwise(widths))
        self.splits = nn.ModuleList(Split(b, a) for a, b in pairwise(widths))
        self.out_norm = RMSNorm(widths[0])
        self.patch_out = Unpatch(widths[0], 1, patch)
        zeroed(self.patch_out.proj)

    def forward(
        self, x: Float[Tensor, "batch depth height width"], t: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch depth height width"]:
        with torch.autocast(x.device.type, enabled=False):
            condition = self.time_in_proj(self.time_emb(t))
        x = self.patch_in(x[..., None])
        positions, kept = places(*x.shape[1:4], device=x.device), []
        for level, merge in zip(self.down_levels, self.merges):
            x = self._through(level, x, positions, condition)
            kept.append((x, positions))
            x, positions = merge(x), coarser(positions)
        x = self._through(self.mid_level, x, positions, condition)
        for level, split, (skip, positions) in reversed(list(zip(self.up_levels, self.splits, kept))):
            x = self._through(level, split(x, skip), positions, condition)
        return self.patch_out(self.out_norm(x)).squeeze(-1).contiguous()

    def shard_units(self) -> list[nn.Module]:
        """The modules that FSDP2 shards: every layer, then the whole."""
        return [*(module for module in self.modules() if isinstance(module, Layer)), self]

    def _through(self, level: nn.ModuleList, x: Tokens, positions: Places, condition: Condition) -> Tokens:
        again = self.checkpointing and torch.is_grad_enabled()
        for layer in level:
            run = partial(checkpoint, layer, use_reentrant=False) if again else layer
            x = run(x, positions, condition)
        return x


def _time_projection(width: int, mlp: bool) -> nn.Module:
    return time_mlp(width) if mlp else nn.Linear(width, width, bias=False)


def _check(widths: tuple[int, ...] | list[int], depths: tuple[int, ...] | list[int], head: int) -> None:
    if len(widths) != len(depths) or not widths:
        raise ValueError(f"model.network.widths={list(widths)} and depths={list(depths)}: give both one number a level")
    if head < 12:
        raise ValueError(
            f"model.network.head={head}: a head of fewer than 12 channels knows no places; take 12 or more"
        )
    for width in widths:
        if width % head:
            raise ValueError(f"model.network.head={head} does not divide the width {width}: take a divisor")
