"""Samplers of categorical processes: steps t -> u of the reverse chain, and the loop over a grid, written once.

A sampler is a class with one method. The families say which: a `Leap` gives the law of every coordinate after the
step, a `Jumps` the time at which rates are frozen, and both are then simulated (here) and propagated exactly
(`exact_law`). What fits neither overrides `step`.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.processes.ctmc import Denoiser, Time
from lightning_modules.processes.ctmc_grids import check_grid
from lightning_modules.processes.ctmc_kernels import Kernel, Letters, State, drawn, uniforms

Draw = torch.Generator | None
Step = tuple[State, Any]  # the new state, and what the sampler wants to see again in the next step


class CategoricalSampler:
    """A step t -> u. `kernels` are those it is made for."""

    space: ClassVar[str] = "categorical"
    kernels: ClassVar[tuple[type[Kernel], ...]] = (Kernel,)

    def step(self, denoiser: Denoiser, x: State, t: Time, u: Time, memory: Any, draw: Draw) -> Step:
        """The state at u from that at t; `memory` is None at first, then what the last step returned."""
        raise NotImplementedError


class Leap(CategoricalSampler):
    """One evaluation; every coordinate moves independently of the others."""

    def transition(self, denoiser: Denoiser, x: State, t: Time, u: Time) -> Float[Tensor, "batch d size"]:
        """Probabilities of the state of each coordinate at u."""
        raise NotImplementedError

    def step(self, denoiser: Denoiser, x: State, t: Time, u: Time, memory: Any, draw: Draw) -> Step:
        return drawn(denoiser.held(self.transition(denoiser, x, t, u), x), draw), None


class Jumps(CategoricalSampler):
    """Rates frozen in time, not in the state: after each jump the prediction is asked again (arXiv 2410.02321).

    The time-homogeneous chain is simulated exactly by waiting times, which needs no bound on the rates. Times are one
    for all or one per sample. `corrector` as in `Denoiser.jumps`.
    """

    def __init__(self, corrector: float = 1.0) -> None:
        if corrector < 0:
            raise ValueError(f"corrector={corrector} makes rates negative: 1 is the reverse chain, 0 flow matching")
        self.corrector = corrector

    def frozen_at(self, denoiser: Denoiser, t: Time, u: Time) -> Time:
        """The time of the prediction for the step t -> u."""
        raise NotImplementedError

    def jumps(self, denoiser: Denoiser, x: State, t: Time, u: Time) -> Letters:
        """Rates to every other letter, integrated over the step."""
        return denoiser.jumps(x, self.frozen_at(denoiser, t, u), t, u, self.corrector)

    def step(self, denoiser: Denoiser, x: State, t: Time, u: Time, memory: Any, draw: Draw) -> Step:
        t, u, x = of_each(t, x), of_each(u, x), x.clone()
        rows, left = torch.arange(len(x), device=x.device), torch.ones(len(x), dtype=torch.float64, device=x.device)
        while len(rows):
            jumps = self.jumps(denoiser.rows(rows), x[rows], t[rows], u[rows]).flatten(1).double()
            left[rows] -= waiting_times(jumps.sum(1), draw)
            going = left[rows] > 0
            rows = rows[going]
            jump(x, rows, jumps[going], draw)
        return x, None


class FinalDenoise(Leap):
    """Data drawn from the posterior, each coordinate by itself: what may follow the last step of a grid above t = 0."""

    def transition(self, denoiser: Denoiser, x: State, t: Time, u: Time) -> Float[Tensor, "batch d size"]:
        return with_mask(denoiser.posterior(x, t), denoiser.process.kernel)


def sample(
    sampler: CategoricalSampler,
    denoiser: Denoiser,
    x: State,
    grid: Float[Tensor, "times *rest"],
    draw: Draw = None,
    *,
    denoise: bool = False,
    trajectory: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The state at the end of the grid from `x` at its beginning; with `trajectory` the states at all of its times.

    `grid` falls strictly, for all samples together or for each of them (and each position). With `denoise` data are
    drawn from the posterior at the end, which changes the law. `progress` is told steps done and steps in all. Raises
    ValueError for a grid that does not fall or leaves the schedule, and for a sampler of the other kernel.
    """
    process = denoiser.process
    check_grid(process.schedule, grid)
    check_kernel(sampler, process.kernel)
    states, memory = [x], None
    for done, (t, u) in enumerate(pairwise(grid.double()), start=1):
        x, memory = sampler.step(denoiser, x, t, u, memory, draw)
        states += [x] if trajectory else []
        if progress is not None:
            progress(done, len(grid) - 1)
    if denoise:
        x, _ = FinalDenoise().step(denoiser, x, grid[-1].double(), grid[-1].double(), None, draw)
        states += [x] if trajectory else []
    return torch.stack(states) if trajectory else x


def check_kernel(sampler: CategoricalSampler, kernel: Kernel) -> None:
    """ValueError where the sampler is made for another kernel."""
    if not isinstance(kernel, sampler.kernels):
        made_for = " or ".join(kind.__name__.lower() for kind in sampler.kernels)
        raise ValueError(
            f"{type(sampler).__name__} is made for the {made_for} kernel, and this process has the "
            f"{type(kernel).__name__.lower()} one: take another sampler or the other kernel"
        )


def of_each(t: Time, x: State) -> Float[Tensor, " batch"]:
    """One time per sample; ValueError for times that differ between positions."""
    if t.ndim > 1:
        raise ValueError(
            "times differ between positions, and a chain that jumps has one clock for all of them: take a sampler that "
            "leaps (ancestral, tweedie, tau_exp, euler_jump, poisson_tau, dfm) or an order"
        )
    return t.double().to(x.device).expand(len(x))


def waiting_times(rates: Float[Tensor, " rows"], draw: Draw) -> Float[Tensor, " rows"]:
    """Exponential times with these rates, infinite where a rate is zero."""
    return -torch.log1p(-uniforms(rates.shape, draw, rates.device)) / rates


def jump(x: State, rows: Tensor, rates: Float[Tensor, "rows moves"], draw: Draw) -> None:
    """Change, in these rows of x, one coordinate to one letter, by the rates of all such moves (d times S of them)."""
    move, letters = drawn(rates, draw), rates.shape[1] // x.shape[1]
    x[rows, move // letters] = move % letters


def with_mask(letters: Letters, kernel: Kernel) -> Float[Tensor, "batch d size"]:
    """Probabilities of letters as those of states: the mask has none."""
    return torch.nn.functional.pad(letters, (0, kernel.size - kernel.letters))
