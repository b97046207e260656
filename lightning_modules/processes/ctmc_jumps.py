"""Samplers that simulate a chain jump by jump: with rates frozen in time, or exactly."""

import math
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.processes.ctmc import Denoiser, Time
from lightning_modules.processes.ctmc_kernels import Absorbing, State, uniforms
from lightning_modules.processes.ctmc_samplers import (
    CategoricalSampler,
    Draw,
    Jumps,
    Step,
    jump,
    of_each,
    waiting_times,
)


class Frozen(Jumps):
    """Rates frozen at the noisy end of the step (arXiv 2410.02321, algorithm 1): first order in total variation."""

    def frozen_at(self, denoiser: Denoiser, t: Time, u: Time) -> Time:
        return t


class FrozenMid(Jumps):
    """Rates frozen where the noise is the mean of that at both ends: as dear as `Frozen`, and second order."""

    def frozen_at(self, denoiser: Denoiser, t: Time, u: Time) -> Time:
        return denoiser.process.middle(t, u)


class Exact(CategoricalSampler):
    """A simulation of the reverse chain without any error of discretisation, whatever the grid."""


class Uniformization(Exact):
    """Candidates at a bound on the rates, thinned by the rates at their own times (arXiv 2402.08095).

    Where the prediction is a posterior, rates are below d ((S - 1) / S + 1 / (e^sigma - 1)): taken on windows in
    which the noise halves. A score has no bound of its own: `bound` is that on the rate per coordinate and unit of
    the clock, and a rate above it raises ValueError, because thinning would be wrong without a word. The grid must
    end above noise 0.
    """

    def __init__(self, bound: float | None = None) -> None:
        if bound is not None and bound <= 0:
            raise ValueError(f"bound={bound}: a bound on rates is positive")
        self.bound = bound

    def step(self, denoiser: Denoiser, x: State, t: Time, u: Time, memory: Any, draw: Draw) -> Step:
        x, schedule = x.clone(), denoiser.process.schedule
        for high, low in pairwise(self._windows(denoiser, *(schedule.noise(of_each(time, x)) for time in (t, u)))):
            self._window(denoiser, x, high, low, draw)
        return x, None

    def _windows(
        self, denoiser: Denoiser, high: Float[Tensor, " batch"], low: Float[Tensor, " batch"]
    ) -> list[Float[Tensor, " batch"]]:
        """The noises between which one bound holds."""
        if isinstance(denoiser.process.kernel, Absorbing):
            return [high, low]
        if not bool((low > 0).all()):
            raise ValueError("uniformization needs a bound on the rates, which noise 0 does not have: stop early")
        count = max(1, math.ceil(float(torch.log2(high / low).max())))
        shares = torch.linspace(0, 1, count + 1, dtype=torch.float64, device=high.device)
        return [high * (low / high) ** share for share in shares]

    def _window(
        self, denoiser: Denoiser, x: State, high: Float[Tensor, " batch"], low: Float[Tensor, " batch"], draw: Draw
    ) -> None:
        """Jumps of x while the noise falls from `high` to `low`."""
        process = denoiser.process
        clock, end = (process.kernel.clock(noise) for noise in (high, low))
        bound, rows = x.shape[1] * self._bound(denoiser, low), torch.arange(len(x), device=x.device)
        while len(rows):
            clock[rows] -= waiting_times(bound[rows], draw)
            rows = rows[clock[rows] > end[rows]]
            at = process.schedule.time(process.kernel.noise_at(clock[rows]))
            rates = denoiser.rows(rows).rates(x[rows], at).flatten(1).double()
            total = rates.sum(1)
            if bool((total > bound[rows] * (1 + 1e-9)).any()):
                raise ValueError(
                    f"a rate of {float(total.max()):.4g} is above the bound of uniformization, whose law would be "
                    "wrong: raise bound"
                )
            taken = uniforms(total.shape, draw, x.device) * bound[rows] < total
            jump(x, rows[taken], rates[taken], draw)

    def _bound(self, denoiser: Denoiser, low: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """On the rate of a coordinate per unit of the clock, from this noise on."""
        kernel = denoiser.process.kernel
        if isinstance(kernel, Absorbing):
            return torch.ones_like(low)  # in its clock every mask goes at rate 1
        if self.bound is not None:
            return torch.full_like(low, self.bound)
        return (kernel.letters - 1) / kernel.letters + 1 / torch.expm1(low)


class FirstHitting(Exact):
    """One mask at a time at the times at which masks go, N evaluations for N tokens (arXiv 2409.02908).

    With n masks left the share of masks at the next one's time is that of now times U^(1 / n).
    """

    kernels = (Absorbing,)

    def step(self, denoiser: Denoiser, x: State, t: Time, u: Time, memory: Any, draw: Draw) -> Step:
        process, x = denoiser.process, x.clone()
        clock, end = (process.kernel.clock(process.schedule.noise(of_each(time, x))) for time in (t, u))
        rows = torch.arange(len(x), device=x.device)
        while len(rows):
            free = denoiser.rows(rows).free(x[rows])
            clock[rows] -= waiting_times(free.sum(1).double(), draw)
            going = clock[rows] > end[rows]
            rows, free = rows[going], free[going]
            at = process.schedule.time(process.kernel.noise_at(clock[rows]))
            posterior = denoiser.rows(rows).posterior(x[rows], at)
            jump(x, rows, (posterior * free[..., None]).flatten(1), draw)
        return x, None
