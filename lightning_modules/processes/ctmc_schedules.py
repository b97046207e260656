"""Noise schedules of categorical processes: total noise sigma(t), zero (or nearly so) at the data and rising with t.

Every law, rate and bound depends on t through sigma(t) alone: a schedule is a change of clock.
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

Times = Float[Tensor, "*times"]


class Schedule:
    """sigma(t) >= 0 for t in [0, `end`], its derivative and its inverse."""

    end: ClassVar[float] = 1.0

    def noise(self, t: Times) -> Times:
        """sigma(t)."""
        raise NotImplementedError

    def rate(self, t: Times) -> Times:
        """sigma'(t)."""
        raise NotImplementedError

    def time(self, noise: Times) -> Times:
        """t at which the total noise is `noise`."""
        raise NotImplementedError

    def check(self, t: Times) -> None:
        """ValueError for times outside of [0, end]."""
        if not bool(((t >= 0) & (t <= self.end)).all()):
            raise ValueError(
                f"times from {float(t.min()):g} to {float(t.max()):g}: {type(self).__name__} has times in "
                f"[0, {self.end:g}]"
            )


class Constant(Schedule):
    """sigma(t) = t, as in the analyses: t itself is the noise, without an end."""

    end = math.inf

    def noise(self, t: Times) -> Times:
        return t

    def rate(self, t: Times) -> Times:
        return torch.ones_like(t)

    def time(self, noise: Times) -> Times:
        return noise


class LogLinear(Schedule):
    """1 - e^-sigma = (1 - eps) t: the share of letters that have been touched grows linearly (arXiv 2310.16834).

    With `eps` = 0 the noise at t = 1 is infinite and nothing of the data is left.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        if not 0 <= eps < 1:
            raise ValueError(f"eps={eps} must lie in [0, 1)")
        self.eps = eps

    def noise(self, t: Times) -> Times:
        return -torch.log1p(-(1 - self.eps) * t)

    def rate(self, t: Times) -> Times:
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def time(self, noise: Times) -> Times:
        return -torch.expm1(-noise) / (1 - self.eps)


class Geometric(Schedule):
    """sigma = low^(1 - t) high^t (arXiv 2310.16834); at t = 0 a noise of `low` remains."""

    def __init__(self, low: float = 1e-4, high: float = 20.0) -> None:
        if not 0 < low < high:
            raise ValueError(f"low={low} and high={high}: expected 0 < low < high")
        self.low, self.growth = low, math.log(high / low)

    def noise(self, t: Times) -> Times:
        return self.low * torch.exp(self.growth * t)

    def rate(self, t: Times) -> Times:
        return self.growth * self.noise(t)

    def time(self, noise: Times) -> Times:
        return torch.log(noise / self.low) / self.growth


class Cosine(Schedule):
    """e^-sigma = eps + (1 - eps) cos(pi t / 2) (arXiv 2406.07524): slow near the data."""

    def __init__(self, eps: float = 1e-3) -> None:
        if not 0 <= eps < 1:
            raise ValueError(f"eps={eps} must lie in [0, 1)")
        self.eps = eps

    def noise(self, t: Times) -> Times:
        return -torch.log1p(-2 * (1 - self.eps) * torch.sin(math.pi / 4 * t) ** 2)

    def rate(self, t: Times) -> Times:
        return (1 - self.eps) * math.pi / 2 * torch.sin(math.pi / 2 * t) * torch.exp(self.noise(t))

    def time(self, noise: Times) -> Times:
        return 4 / math.pi * torch.asin(torch.sqrt(-torch.expm1(-noise) / (2 * (1 - self.eps))))
