"""CryoFM2's U-Net on density cubes: diffusers' UNet2DModel with a third axis, under its names.

On each level two residual blocks on the way in and three on the way out, in the deepest levels each followed by
attention to the whole grid. The input has a second channel, which is zero here and a condition in the fine-tunes.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Cubes = Float[Tensor, "batch channels depth height width"]
Changed = Float[Tensor, "batch after depth height width"]
Resized = Float[Tensor, "batch channels new_depth new_height new_width"]
Condition = Float[Tensor, "batch condition"]
STEPS = 1000  # in which the time is counted


def sinusoids(t: Float[Tensor, " batch"], width: int) -> Float[Tensor, "batch width"]:
    """cos and sin of 1000 t at width / 2 frequencies from 1 down to 1e-4, geometrically."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = STEPS * t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, condition)
        self.linear_2 = nn.Linear(condition, condition)

    def forward(self, features: Float[Tensor, "batch width"]) -> Condition:
        return self.linear_2(F.silu(self.linear_1(features)))


class Resnet(nn.Module):
    """skip(x) + conv(SiLU(norm(h) (1 + a) + b)), h = conv(SiLU(norm(x))), (a, b) = W SiLU(c)."""

    def __init__(self, before: int, after: int, condition: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, before, eps=1e-5)
        self.conv1 = nn.Conv3d(before, after, 3, padding=1)
        self.time_emb_proj = nn.Linear(condition, 2 * after)
        self.norm2 = nn.GroupNorm(32, after, eps=1e-5)
        self.conv2 = nn.Conv3d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Conv3d(before, after, 1) if before != after else None

    def forward(self, x: Cubes, condition: Condition) -> Changed:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time_emb_proj(F.silu(condition))[..., None, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """x + attention(norm(x)) over all voxels of the grid, with heads of 8 channels."""

    def __init__(self, width: int, head: int = 8, normed: bool = True) -> None:
        super().__init__()
        self.heads = width // head
        self.group_norm = nn.GroupNorm(32, width, eps=1e-5) if normed else nn.Identity()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Cubes) -> Cubes:
        tokens = self.group_norm(x).flatten(2).mT
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.to_out[0](found).mT.unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Half the voxels an edge, by a convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Cubes) -> Resized:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the voxels an edge, each repeated, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x: Cubes) -> Resized:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks with these numbers of channels before them, attention after each where there is any."""

    def __init__(self, before: list[int], width: int, condition: int, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(channels, width, condition) for channels in before)
        self.attentions = nn.ModuleList(Attention(width) for _ in before if attends)


class Middle(nn.Module):
    """A residual block, attention without a norm, a residual block."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(width, width, condition) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(width, normed=False)])


class UNet3D(nn.Module):
    """Velocity of a density cube at time t, by the network of CryoFM2: 168,089,089 parameters at the default widths.

    `attending` of the levels, the deepest ones, have attention. Cubes have a multiple of 2^(levels - 1) voxels an edge.
    With `checkpointing` activations of a block are computed again in the backward pass.
    """

    def __init__(
        self,
        widths: tuple[int, ...] | list[int] = (64, 128, 256, 512),
        attending: int = 2,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.edge, self.checkpointing = 2 ** (len(widths) - 1), checkpointing
        condition, attends = 4 * widths[0], [place >= len(widths) - attending for place in range(len(widths))]
        self.conv_in = nn.Conv3d(2, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], condition)
        shallower, deeper = [widths[0], *widths], [*widths[1:], widths[-1]]
        self.down_blocks = nn.ModuleList(
            Level([before, width], width, condition, attention)
            for before, width, attention in zip(shallower, widths, attends)
        )
        self.mid_block = Middle(widths[-1], condition)
        # beside the features of the way in, the last of which are those of the level above
        up = [
            Level([below + width, width + width, width + above], width, condition, attention)
            for below, width, above, attention in zip(deeper, widths, shallower, attends)
        ]
        self.up_blocks = nn.ModuleList(reversed(up))
        for level, width in zip(self.down_blocks[:-1], widths):
            level.downsamplers = nn.ModuleList([Downsample(width)])
        for level, width in zip(self.up_blocks[:-1], reversed(widths)):
            level.upsamplers = nn.ModuleList([Upsample(width)])
        self.conv_norm_out = nn.GroupNorm(32, widths[0], eps=1e-5)
        self.conv_out = nn.Conv3d(widths[0], 1, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "batch depth height width"], t: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch depth height width"]:
        with torch.autocast(x.device.type, enabled=False):
            condition = self.time_embedding(sinusoids(t, self.conv_in.out_channels))
        x = self.conv_in(torch.stack([x, torch.zeros_like(x)], dim=1))
        kept = [x]
        for level in self.down_blocks:
            for place in range(len(level.resnets)):
                x = self._block(level, place, x, condition)
                kept.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                kept.append(x)
        x = self._block(self.mid_block, 0, x, condition)
        x = self._block(self.mid_block, 1, x, condition)
        for level in self.up_blocks:
            for place in range(len(level.resnets)):
                x = self._block(level, place, torch.cat([x, kept.pop()], dim=1), condition)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x))).squeeze(1).contiguous()

    def shard_units(self) -> list[nn.Module]:
        """The modules that FSDP2 shards: every residual block, then the whole."""
        return [*(module for module in self.modules() if isinstance(module, Resnet)), self]

    def _block(self, level: Level | Middle, place: int, x: Cubes, condition: Condition) -> Changed:
        again = self.checkpointing and torch.is_grad_enabled()
        resnet = level.resnets[place]
        x = checkpoint(resnet, x, condition, use_reentrant=False) if again else resnet(x, condition)
        return level.attentions[place](x) if place < len(level.attentions) else x
