"""Exponential moving averages of a network's weights."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def warmed_up(decay: float, updates: int) -> float:
    """min(decay, (1 + n) / (10 + n)) in update n = 1, 2, ...: while there are few, the mean does not hang on the first.

    The rule of TensorFlow's ExponentialMovingAverage, which CryoFM's code has too.
    """
    return min(decay, (1 + updates) / (10 + updates))


@torch.no_grad()
def average(mean: nn.Module, network: nn.Module, decay: float) -> None:
    """mean <- decay mean + (1 - decay) network for every parameter; both are sharded alike, or not at all."""
    pairs = zip(mean.parameters(), network.parameters(), strict=True)
    local = [[p.to_local() if isinstance(p, DTensor) else p for p in pair] for pair in pairs]
    means, values = zip(*local)
    torch._foreach_lerp_(list(means), list(values), 1 - decay)
