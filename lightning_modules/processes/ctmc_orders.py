"""Samplers of masked processes that choose which positions are shown next.

An order gives every position a priority; the lowest stay masked, as many as the schedule has masks at the end of the
step. Orders that see only the context (what is shown already) leave the law of an exact posterior as it is, one
position at a time. Those that see the letter just sampled do not.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_modules.processes.ctmc import Denoiser, Time
from lightning_modules.processes.ctmc_kernels import Absorbing, Letters, State, drawn, normalised, uniforms
from lightning_modules.processes.ctmc_samplers import CategoricalSampler, Draw, Step

Priority = Float[Tensor, "batch d"]


def random(posterior: Letters, letters: State) -> Priority:
    """All positions alike: ties are broken at random."""
    return torch.zeros(letters.shape, dtype=posterior.dtype, device=posterior.device)


def confidence(posterior: Letters, letters: State) -> Priority:
    """The probability of the likeliest letter."""
    return posterior.amax(-1)


def margin(posterior: Letters, letters: State) -> Priority:
    """The probability of the likeliest letter less that of the second."""
    first, second = posterior.topk(2, -1).values.unbind(-1)
    return first - second


def entropy(posterior: Letters, letters: State) -> Priority:
    """The negative entropy of the posterior, in nats."""
    return (posterior * posterior.clamp_min(1e-300).log()).sum(-1)


def sampled(posterior: Letters, letters: State) -> Priority:
    """The log-probability of the letter that was sampled (MaskGIT, arXiv 2202.04200; DPLM): changes the law."""
    return posterior.gather(-1, letters[..., None]).squeeze(-1).clamp_min(1e-300).log()


ORDERS = {order.__name__: order for order in (random, confidence, margin, entropy, sampled)}


class Ordered(CategoricalSampler):
    """Letters are sampled everywhere and shown where the order ranks highest.

    Of n free positions floor(n m) are masked after a step that ends where the share of masks is m; of each of the
    `groups` (a number for every position), where modalities advance by themselves. `remask` lets positions shown before
    compete again, with the letter that would be sampled there now, as DPLM has it; they keep the letter they have.
    `noise` adds noise * m * Gumbel to the priorities, `temperature` (first, last) anneals the letters, linearly in the
    share of masks before the step.
    """

    kernels = (Absorbing,)

    def __init__(
        self,
        order: str = "random",
        remask: bool = False,
        noise: float = 0.0,
        temperature: tuple[float, float] | list[float] = (1.0, 1.0),
        groups: Int[Tensor, " d"] | None = None,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order={order}: there are {', '.join(ORDERS)}")
        if len(temperature) != 2 or min(temperature) <= 0:
            raise ValueError(f"temperature={list(temperature)}: give two positive numbers, the first and the last")
        self.order, self.remask, self.noise = ORDERS[order], remask, noise
        self.temperature, self.groups = temperature, groups

    def step(self, denoiser: Denoiser, x: State, t: Time, u: Time, memory: Any, draw: Draw) -> Step:
        """`memory` are the positions that are free to be shown: those masked at the beginning."""
        masked = denoiser.free(x)
        free = masked if memory is None else memory
        posterior = self._posterior(denoiser, x, t)
        letters = drawn(posterior, draw)
        left = self._share(denoiser, u).expand(x.shape)
        priority = self.order(posterior, letters).double() + self._gumbel(x, draw) * left
        priority = priority.masked_fill(~masked, math.inf) if not self.remask else priority
        hidden = torch.zeros_like(free)
        for group in self._groups(x):
            own = free & group
            counts = torch.floor((own * left).sum(1) + 1e-9).long()
            hidden |= _lowest(priority.masked_fill(~own, math.inf), counts, draw)
        shown = torch.where(masked, letters, x)
        return torch.where(hidden & free, denoiser.process.kernel.mask, shown), free

    def _posterior(self, denoiser: Denoiser, x: State, t: Time) -> Letters:
        """Annealed, and of positions shown before the one they would have."""
        posterior = denoiser.posterior(x, t, copied=False)
        first, last = self.temperature
        heat = last + (first - last) * self._share(denoiser, t)[..., None]
        return normalised(posterior ** (1 / heat)) if first != 1 or last != 1 else posterior

    def _share(self, denoiser: Denoiser, t: Time) -> Float[Tensor, "#batch #d"]:
        return -torch.expm1(-denoiser.process.noise(t)).squeeze(-1)

    def _gumbel(self, x: State, draw: Draw) -> Priority | float:
        if not self.noise:
            return 0.0
        waits = -torch.log1p(-uniforms(x.shape, draw, x.device))
        return -self.noise * torch.log(waits.clamp_min(torch.finfo(torch.float64).tiny))

    def _groups(self, x: State) -> list[Bool[Tensor, " d"]]:
        if self.groups is None:
            return [torch.ones(x.shape[1], dtype=torch.bool, device=x.device)]
        return [self.groups.to(x.device) == group for group in self.groups.unique().tolist()]


def _lowest(priority: Priority, counts: Int[Tensor, " batch"], draw: Draw) -> Bool[Tensor, "batch d"]:
    """The `counts` positions of lowest priority in each row, ties broken at random: a strict cutoff shows them all."""
    shuffled = uniforms(priority.shape, draw, priority.device).argsort(1)
    order = shuffled.gather(1, torch.argsort(priority.gather(1, shuffled), dim=1, stable=True))
    ranks = torch.arange(priority.shape[1], device=priority.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, ranks) < counts[:, None]
