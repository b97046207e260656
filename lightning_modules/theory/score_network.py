"""A small network that predicts the noise in a point, along any path."""

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

FREQUENCIES = 4


class ScoreNetwork(nn.Module):
    """`depth` hidden layers of SiLU units on the point, at unit scale, and on features of log(sigma / alpha).

    The features are the logarithm itself and its sines and cosines at frequencies 2^-2 ... 2.
    """

    def __init__(self, d: int, width: int, depth: int) -> None:
        super().__init__()
        sizes = [d + 1 + 2 * FREQUENCIES, *[width] * depth]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, d))
        self.register_buffer("frequencies", 2.0 ** torch.arange(-2, FREQUENCIES - 2), persistent=False)

    def forward(self, x: Float[Tensor, "batch d"], log_snr: Float[Tensor, " batch"]) -> Float[Tensor, "batch d"]:
        """The noise in x = alpha x_0 + sigma eps, x divided by sqrt(alpha^2 + sigma^2)."""
        phase = log_snr[:, None] * self.frequencies * math.pi / 2
        return self.layers(torch.cat([x, log_snr[:, None] / 4, phase.sin(), phase.cos()], dim=1))
