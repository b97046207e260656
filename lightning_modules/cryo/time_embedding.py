"""How a network is told the time t in [0, 1] of the path."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RandomFourier(nn.Module):
    """cos(2 pi w t) and sin(2 pi w t) at `width` / 2 frequencies w that are drawn once from N(0, 1) and kept.

    In float32 whatever the precision around it is, in which close times would be one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(width // 2, 1))

    def forward(self, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        with torch.autocast(t.device.type, enabled=False):
            angle = 2 * math.pi * t.float()[:, None] * self.weight.float().T
            return torch.cat([angle.cos(), angle.sin()], dim=1)


def time_mlp(width: int) -> nn.Sequential:
    """Linear, SiLU, Linear."""
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
