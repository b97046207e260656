"""Time grids of categorical processes: strictly decreasing float64 times from `start` (noise) to `stop` >= 0 (data)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.processes.ctmc_schedules import Schedule

Grid = Float[Tensor, " times"]


def uniform(schedule: Schedule, start: float, stop: float, steps: int) -> Grid:
    """`steps` equal steps in t."""
    _check_ends(schedule, start, stop)
    _check_steps(steps)
    return torch.linspace(start, stop, steps + 1, dtype=torch.float64)


def kappa(schedule: Schedule, start: float, stop: float, kappa: float) -> Grid:
    """Steps of `kappa` min(1, sigma) in the noise: constant, then geometric (arXiv 2410.02321).

    About (sigma(start) - 1 + log(1 / sigma(stop))) / kappa of them; the last one ends at `stop`, whose noise must be
    positive. 0 < kappa < 1.
    """
    _check_ends(schedule, start, stop)
    first, last = schedule.noise(torch.tensor([start, stop], dtype=torch.float64)).tolist()
    if not 0 < kappa < 1:
        raise ValueError(f"kappa={kappa} must lie in (0, 1): it is the length of a step at noise 1 and above")
    if last <= 0 or math.isinf(first):
        raise ValueError(
            f"start={start}, stop={stop}: a decaying grid never arrives at noise 0 and never leaves infinite noise, "
            "stop early or take a uniform grid"
        )
    noises = [first]
    while noises[-1] > last * (1 + 1e-12):
        noises.append(max(noises[-1] - kappa * min(1.0, noises[-1]), last))
    grid = schedule.time(torch.tensor(noises, dtype=torch.float64))
    grid[0], grid[-1] = start, stop
    return grid


def cosine(schedule: Schedule, start: float, stop: float, steps: int) -> Grid:
    """t = stop + (start - stop) cos(pi k / 2 N): long steps at the data, the schedule of MaskGIT's orders."""
    _check_ends(schedule, start, stop)
    _check_steps(steps)
    turn = torch.linspace(0, math.pi / 2, steps + 1, dtype=torch.float64)
    grid = stop + (start - stop) * torch.cos(turn)
    grid[-1] = stop
    return grid


def check_grid(schedule: Schedule, grid: Float[Tensor, "times *rest"]) -> None:
    """ValueError unless the grid has a step, falls strictly, and stays within the times of the schedule."""
    if len(grid) < 2:
        raise ValueError(f"the grid has {len(grid)} times: a sampler needs at least one step, which is two")
    if not bool((grid[:-1] > grid[1:]).all()):
        raise ValueError("the grid must fall strictly from noise (large t) to data (small t)")
    schedule.check(grid)


def _check_ends(schedule: Schedule, start: float, stop: float) -> None:
    if not 0 <= stop < start <= schedule.end or math.isinf(start):
        raise ValueError(
            f"start={start}, stop={stop}: expected 0 <= stop < start <= {schedule.end:g}, the end of the schedule"
        )


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps}: a grid has at least one step")
