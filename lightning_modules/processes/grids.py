"""Time grids: `steps` + 1 strictly decreasing times in float64 from `start` (noise) to `stop` >= 0 (data)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.processes.paths import Path

Grid = Float[Tensor, " times"]


def uniform(path: Path, steps: int, start: float, stop: float) -> Grid:
    """Equal steps in t."""
    _check(path, steps, start, stop)
    return torch.linspace(start, stop, steps + 1, dtype=torch.float64)


def log_snr(path: Path, steps: int, start: float, stop: float) -> Grid:
    """Equal steps in lambda = log(alpha / sigma); both ends must lie inside of the path."""
    _check(path, steps, start, stop, inside=True)
    ends = path.log_snr(torch.tensor([start, stop], dtype=torch.float64)).tolist()
    return _with_ends(path.time(torch.linspace(*ends, steps + 1, dtype=torch.float64)), start, stop)


def exponential_decay(path: Path, steps: int, start: float, stop: float) -> Grid:
    """h_k = kappa min(1, t_k): equal steps above t = 1, a geometric sequence below, as in analyses of the VP path."""
    _check(path, steps, start, stop, inside=True)
    if _decayed(start, 1.0, steps)[-1] > stop:
        least = math.ceil(start)
        raise ValueError(f"steps={steps} are too few for an exponentially decaying grid from {start}: take {least}")
    low, high = 0.0, 1.0
    for _ in range(80):
        kappa = (low + high) / 2
        low, high = (kappa, high) if _decayed(start, kappa, steps)[-1] > stop else (low, kappa)
    return _with_ends(torch.tensor(_decayed(start, high, steps), dtype=torch.float64), start, stop)


def karras(path: Path, steps: int, start: float, stop: float, rho: float = 7.0) -> Grid:
    """sigma / alpha is the power `rho` of an arithmetic sequence (arXiv 2206.00364, equation 5)."""
    _check(path, steps, start, stop)
    ends = torch.exp(-path.log_snr(torch.tensor([start, stop], dtype=torch.float64)) / rho).tolist()
    if math.isinf(ends[0]):
        raise ValueError(f"start={start}: there is no data left on {type(path).__name__}, start the grid below it")
    ratio = torch.linspace(*ends, steps + 1, dtype=torch.float64) ** rho
    return _with_ends(path.time(-torch.log(ratio)), start, stop)


def check_grid(path: Path, grid: Float[Tensor, "times *batch"]) -> None:
    """ValueError unless the grid has a step, falls strictly, and stays within [0, end of the path]."""
    if len(grid) < 2:
        raise ValueError(f"the grid has {len(grid)} times: a sampler needs at least one step, which is two")
    if not (grid[:-1] > grid[1:]).all():
        raise ValueError("the grid must fall strictly from noise (large t) to data (small t)")
    if not (grid[-1] >= 0).all() or not (grid[0] <= path.end).all() or not torch.isfinite(grid).all():
        raise ValueError(
            f"the grid runs from t={grid[0].max():g} to t={grid[-1].min():g}: the path {type(path).__name__} has times "
            f"in [0, {path.end:g}]"
        )


def _check(path: Path, steps: int, start: float, stop: float, inside: bool = False) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps}: a grid has at least one step")
    if not 0 <= stop < start <= path.end or math.isinf(start):
        raise ValueError(f"start={start}, stop={stop}: expected 0 <= stop < start <= {path.end:g}, the end of the path")
    if inside and (stop == 0 or start == path.end):
        raise ValueError(
            f"start={start}, stop={stop}: this grid is infinite at the ends of the path, keep inside of them"
        )


def _decayed(start: float, kappa: float, steps: int) -> list[float]:
    times = [start]
    for _ in range(steps):
        times.append(times[-1] - kappa * min(1.0, times[-1]))
    return times


def _with_ends(grid: Grid, start: float, stop: float) -> Grid:
    """The grid, its ends without rounding."""
    grid[0], grid[-1] = start, stop
    return grid
