"""What is measured of samplers, one study a class: the cells of its table, a measurement for each, and a figure."""

import itertools
import math
from typing import Any, ClassVar, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from datamodules.batches import Mixture
from lightning_modules.processes.ode import Sampler, sample
from lightning_modules.theory.mixtures import exact
from lightning_modules.theory.sampler_laboratory import (
    Laboratory,
    MakeGrid,
    perturbed,
    recomputed,
    tv_bound,
)
from lightning_modules.theory.transport import (
    FoldedMap,
    gaussian_total_variation,
    nodes,
    product_total_variation,
)

FLOOR = 1e-11  # total variation below which rounding and the initial error take over
BAND = 0.15  # how far a fitted order may lie below the stated one
TICKS = 8  # up to so many points of an axis have one each


class Cell(NamedTuple):
    """A place in the table: which line of the figure, in which panel, at which x."""

    line: str
    panel: str
    x: float


Records = list[tuple[Cell, dict[str, float]]]


class Study:
    """Cells, what is measured in each, and how they are drawn. `measure` returns the same names for every cell."""

    x_label: ClassVar[str]
    y_label: ClassVar[str] = "total variation"
    drawn: ClassVar[str] = "tv"
    place: ClassVar[dict[str, Any]] = {"loc": "best"}  # of the legend

    def begin(self, laboratory: Laboratory, sampler: Sampler) -> list[Cell]:
        """Take the laboratory and the sampler that is studied; the cells to measure, that sampler's last."""
        raise NotImplementedError

    def measure(self, cell: Cell) -> dict[str, float]:
        raise NotImplementedError

    def abscissa(self, cell: Cell) -> float:
        return float(cell.x)

    def summary(self, records: Records) -> dict[str, float]:
        """Fitted slopes of all lines."""
        return {f"slope/{panel}/{line}": self.slope(rows) for (panel, line), rows in lines(records).items()}

    def slope(self, rows: Records) -> float:
        """d log y / d log x between the last two points, minus it for what falls."""
        return last_slope([self.abscissa(cell) for cell, _ in rows], [found[self.drawn] for _, found in rows])

    def label(self, line: str, rows: Records) -> str:
        slope = self.slope(rows)
        return f"{line}, slope {slope:.2f}" if math.isfinite(slope) else line

    def figures(self, records: Records) -> dict[str, Figure]:
        """A panel beside another, log-log, the fitted slope of every line in the legend."""
        panels = list(dict.fromkeys(cell.panel for cell, _ in records))
        figure, axes = side_by_side(len(panels))
        names = list(dict.fromkeys(cell.line for cell, _ in records))
        for (panel, line), rows in lines(records).items():
            axis, number = axes[panels.index(panel)], names.index(line)
            x, y = [self.abscissa(cell) for cell, _ in rows], [above_floor(found[self.drawn]) for _, found in rows]
            width = 2.2 if len(names) > 1 and line == names[-1] else 1.1
            style = {"marker": "osD^vP*Xhd"[number % 10], "markersize": 4, "linewidth": width, "color": f"C{number}"}
            axis.loglog(x, y, label=self.label(line, rows), **style)
        for axis, panel in zip(axes, panels):
            axis.set(title=panel, xlabel=self.x_label)
            self.decorate(axis, [record for record in records if record[0].panel == panel])
            axis.grid(alpha=0.25)
            points = sorted({self.abscissa(cell) for cell, _ in records})
            if len(points) <= TICKS:
                axis.set_xticks(points, [f"{point:g}" for point in points])
                axis.xaxis.minorticks_off()
            axis.legend(fontsize=7.5, **self.place)
            axis.set_ylabel(self.y_label if axis.get_subplotspec().is_first_col() else "")
        return {type(self).__name__.lower(): figure}

    def decorate(self, axis: plt.Axes, records: Records) -> None:
        """More than the lines, such as a law to compare with."""


class Orders(Study):
    """TV and KL against the number of evaluations, for all samplers on all grids: what order does each have?

    The slope is that between the two longest runs, in steps; a sampler is certified on a grid when it is at least the
    order that it states, less 0.15.
    """

    x_label = "evaluations of the score"
    place: ClassVar[dict[str, Any]] = {
        "loc": "upper center",
        "bbox_to_anchor": (0.5, -0.13),
        "ncols": 2,
        "frameon": False,
    }

    def __init__(self, beside: dict[str, Sampler] | None, grids: dict[str, MakeGrid], steps: list[int]) -> None:
        self.beside, self.grids, self.steps = beside or {}, grids, sorted(steps)
        if len(steps) < 2:
            raise ValueError(f"model.study.steps={steps}: a slope needs at least two numbers of steps")

    def begin(self, laboratory: Laboratory, sampler: Sampler) -> list[Cell]:
        self.laboratory = laboratory
        self.subject = type(sampler).__name__
        others = {type(other).__name__: other for other in self.beside.values()}
        others.pop(self.subject, None)
        self.samplers = {**others, self.subject: sampler}
        self.made = {(name, n): laboratory.grid(g, n) for name, g in self.grids.items() for n in self.steps}
        order = itertools.product(self.samplers, reversed(list(self.grids)), self.steps)
        return [Cell(line, panel, steps) for line, panel, steps in order]

    def measure(self, cell: Cell) -> dict[str, float]:
        try:
            found = self.laboratory.log_ratio(self.samplers[cell.line], self.made[cell.panel, int(cell.x)])
        except FoldedMap:
            return {"tv": math.nan, "kl": math.nan}
        return {"tv": found.tv, "kl": found.kl}

    def abscissa(self, cell: Cell) -> float:
        return float(cell.x * self.samplers[cell.line].evaluations)

    def summary(self, records: Records) -> dict[str, float]:
        own = [row for row in records if row[0].line == self.subject]
        first = own[-1][0].panel
        rows = [row for row in own if row[0].panel == first]
        found = {f"tv@{int(cell.x)}": values["tv"] for cell, values in rows}
        found |= {"tv": rows[-1][1]["tv"], "kl": rows[-1][1]["kl"], "initial": self.laboratory.initial_error()}
        order = float(self.samplers[self.subject].order)
        found |= {"order": self.slope(rows), "stated_order": order, "certified": float(self.certified(rows))}
        return found | super().summary(records)

    def certified(self, rows: Records) -> bool:
        """Whether the measured order is what the sampler states, or more."""
        return self.slope(rows) >= self.samplers[rows[0][0].line].order - BAND

    def label(self, line: str, rows: Records) -> str:
        slope = self.slope(rows)
        fitted = f"order {slope:.2f}" if self.drawn == "tv" else f"slope {-slope:.2f}"
        return f"{line}, {fitted}" if math.isfinite(slope) else line

    def decorate(self, axis: plt.Axes, records: Records) -> None:
        lab = self.laboratory
        axis.set_title(f"{type(lab.path).__name__}, {records[0][0].panel} grid from t = {lab.start:g} to {lab.stop:g}")
        initial = lab.initial_error()
        if initial > FLOOR:
            axis.axhline(initial, color="gray", linestyle=":", linewidth=1)
            axis.annotate("initial error", (0.98, initial), xycoords=("axes fraction", "data"), ha="right", fontsize=7)

    def figures(self, records: Records) -> dict[str, Figure]:
        made = super().figures(records)
        self.drawn, self.y_label = "kl", "KL(output | target)"
        try:
            made["orders_kl"] = super().figures(records)["orders"]
        finally:
            del self.drawn, self.y_label
        return made


class Dimension(Study):
    """TV of product targets against the dimension, the density of the data in every coordinate.

    Log-ratios of coordinates add: the map on the line is integrated once, and the noise drawn `draws` times.
    """

    x_label = "dimension d"

    def __init__(
        self,
        beside: dict[str, Sampler] | None,
        grid: MakeGrid,
        steps: int,
        dimensions: list[int],
        draws: int,
        seed: int,
    ) -> None:
        self.beside, self.make_grid, self.steps = beside or {}, grid, steps
        self.dimensions, self.draws, self.seed = sorted(dimensions), draws, seed

    def begin(self, laboratory: Laboratory, sampler: Sampler) -> list[Cell]:
        if laboratory.d != 1:
            raise ValueError(
                f"study=dimension takes a density on the line for each coordinate, not one in {laboratory.d}"
            )
        self.laboratory, self.transports = laboratory, {}
        others = {type(other).__name__: other for other in self.beside.values()}
        self.samplers = {**others, type(sampler).__name__: sampler}
        self.grid = laboratory.grid(self.make_grid, self.steps)
        return [Cell(line, f"{self.steps} steps", d) for line in self.samplers for d in self.dimensions]

    def measure(self, cell: Cell) -> dict[str, float]:
        if cell.line not in self.transports:
            self.transports = {cell.line: self.laboratory.log_ratio(self.samplers[cell.line], self.grid)}
        found = self.transports[cell.line]
        tv, error = product_total_variation(found.log_ratio, found.z[:, 0], int(cell.x), self.draws, self.seed)
        return {"tv": tv, "standard_error": error}

    def slope(self, rows: Records) -> float:
        """By least squares from d = 16 on, while TV is small enough to grow as a power; with a positive sign."""
        kept = [(cell.x, found["tv"]) for cell, found in rows if cell.x >= 16 and found["tv"] < 0.2]
        return float(np.polyfit(*np.log(np.array(kept).T), 1)[0]) if len(kept) > 1 else math.nan

    def summary(self, records: Records) -> dict[str, float]:
        last = records[-1][0].line
        found = {f"tv@{int(cell.x)}": values["tv"] for cell, values in records if cell.line == last}
        return found | {"tv": records[-1][1]["tv"]} | super().summary(records)

    def decorate(self, axis: plt.Axes, records: Records) -> None:
        axis.set_title(f"product targets, {self.steps} steps")
        x = np.array(sorted({cell.x for cell, _ in records}))
        base = records[0][1]["tv"]
        for power, name in ((0.5, "sqrt(d)"), (2, "d^2, the bound's exponent")):
            axis.loglog(
                x, base * x**power, color="gray", linestyle=":" if power == 2 else "--", linewidth=1, label=name
            )
        axis.set_ylim(records[-1][1]["tv"] / 100, 1.5)


class StepsNeeded(Study):
    """The fewest steps with TV <= epsilon on N(0, std^2 I) in d dimensions, in closed form."""

    x_label = "1 / epsilon"
    y_label = "steps for a total variation of epsilon"
    drawn = "steps"

    def __init__(self, grid: MakeGrid, std: float, epsilons: list[float], dimensions: list[int]) -> None:
        if not std > 0:
            raise ValueError(f"model.study.std={std}: a standard deviation is positive")
        self.make_grid, self.std, self.epsilons, self.dimensions = grid, std, sorted(epsilons)[::-1], sorted(dimensions)

    def begin(self, laboratory: Laboratory, sampler: Sampler) -> list[Cell]:
        variance = torch.full((1, 1, 1), self.std**2, dtype=torch.float64)
        gaussian = Mixture(torch.ones(1).double(), torch.zeros(1, 1).double(), variance)
        settings = (laboratory.path, laboratory.kind, laboratory.start, laboratory.stop, laboratory.points)
        self.laboratory, self.sampler, self.known = Laboratory(gaussian, *settings), sampler, {}
        name = type(sampler).__name__
        return [Cell(f"d = {d}", name, 1 / epsilon) for d in self.dimensions for epsilon in self.epsilons]

    def ratio(self, steps: int) -> float:
        """Variance of the output over that of the target: the map of a Gaussian is linear, whatever the sampler."""
        if steps not in self.known:
            grid, path = self.laboratory.grid(self.make_grid, steps), self.laboratory.path
            one = torch.ones(1, 1, dtype=torch.float64) * path.prior_std(grid[0])
            gain = float(sample(self.sampler, self.laboratory.prediction, one, grid))
            target = float((path.alpha(grid[-1]) * self.std) ** 2 + path.sigma(grid[-1]) ** 2)
            self.known[steps] = gain**2 / target
        return self.known[steps]

    def measure(self, cell: Cell) -> dict[str, float]:
        d, epsilon = int(cell.line.removeprefix("d = ")), 1 / cell.x
        low = math.ceil(self.laboratory.start)  # fewer make no grid
        high = 2 * low
        while gaussian_total_variation(self.ratio(high), d) > epsilon:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if gaussian_total_variation(self.ratio(middle), d) <= epsilon else (middle, high)
        return {"steps": float(high), "tv": gaussian_total_variation(self.ratio(high), d)}

    def slope(self, rows: Records) -> float:
        """By least squares over all epsilons, with a positive sign."""
        points = np.log([(cell.x, found["steps"]) for cell, found in rows])
        return float(np.polyfit(*points.T, 1)[0]) if len(rows) > 1 else math.nan

    def summary(self, records: Records) -> dict[str, float]:
        smallest = max(cell.x for cell, _ in records)
        last = [(int(cell.line[4:]), found["steps"]) for cell, found in records if cell.x == smallest]
        wide = np.log([row for row in last if row[0] >= 16])
        slope = {"slope_in_d": float(np.polyfit(*wide.T, 1)[0])} if len(wide) > 1 else {}
        found = {f"steps@{d}": steps for d, steps in last} | {"tv": records[-1][1]["tv"], **slope}
        return found | super().summary(records)

    def decorate(self, axis: plt.Axes, records: Records) -> None:
        axis.set_title(f"{records[0][0].panel} on N(0, {self.std**2:g} I) in d dimensions")
        axis.set_xticks([1 / epsilon for epsilon in self.epsilons], [f"{1 / epsilon:g}" for epsilon in self.epsilons])
        axis.set_xticks([], minor=True)


class ScoreError(Study):
    """An error A sin(omega x) of the score: TV measured, and the bound that weighs its divergence beside its size."""

    x_label = "frequency omega of the error"
    place: ClassVar[dict[str, Any]] = {"loc": "upper left"}

    def __init__(
        self, grid: MakeGrid, steps: int, amplitudes: list[float], frequencies: list[float], amplitude: float,
        frequency: float, times: int,
    ) -> None:  # fmt: skip
        self.make_grid, self.steps, self.times = grid, steps, times
        self.pairs = [(amplitude, omega) for omega in sorted(frequencies)]
        self.pairs += [(a, frequency) for a in sorted(amplitudes) if (a, frequency) not in self.pairs]
        self.amplitude = amplitude

    def begin(self, laboratory: Laboratory, sampler: Sampler) -> list[Cell]:
        z, _ = nodes(laboratory.d, laboratory.points)
        spacing = float((z[1] - z[0]).abs().sum())
        widest = max(omega for _, omega in self.pairs)
        if spacing * widest > 0.25:
            raise ValueError(
                f"model.study.frequencies has {widest:g}, and {laboratory.points} nodes leave "
                f"{1 / (spacing * widest):.1f} points per radian: raise model.points to have 4"
            )
        self.laboratory, self.sampler = laboratory, sampler
        self.grid = laboratory.grid(self.make_grid, self.steps)
        return [Cell(f"A = {a:g}", f"{self.steps} steps of {type(sampler).__name__}", omega) for a, omega in self.pairs]

    def measure(self, cell: Cell) -> dict[str, float]:
        amplitude, omega = float(cell.line.removeprefix("A = ")), cell.x
        error = lambda x, t: amplitude * torch.sin(omega * x)  # noqa: E731
        path = self.laboratory.path
        score = perturbed(exact(self.laboratory.mixture, path, "score"), error)
        tv = self.laboratory.log_ratio(self.sampler, self.grid, recomputed(path, score, "score")).tv
        bound, along, divergence = tv_bound(self.laboratory, error, self.times, self.laboratory.points)
        return {"tv": tv, "bound": bound, "score_part": along, "divergence_part": divergence}

    def slope(self, rows: Records) -> float:
        return math.nan

    def summary(self, records: Records) -> dict[str, float]:
        found = {}
        for cell, values in records:
            found |= {f"{name}@{cell.line.replace(' ', '')},omega={cell.x:g}": v for name, v in values.items()}
        linear = sorted((float(c.line[4:]), v["tv"]) for c, v in records if c.x == self.pairs[-1][1] and v["tv"] < 0.25)
        slope = float(np.polyfit(*np.log(np.array(linear).T), 1)[0]) if len(linear) > 1 else math.nan
        return found | {"tv": records[-1][1]["tv"], "slope_in_amplitude": slope}

    def decorate(self, axis: plt.Axes, records: Records) -> None:
        rows = sorted((cell.x, found) for cell, found in records if cell.line == f"A = {self.amplitude:g}")
        x = [omega for omega, _ in rows]
        for name, style in (("bound", "k--"), ("score_part", "C7:"), ("divergence_part", "C7-.")):
            axis.loglog(x, [found[name] for _, found in rows], style, linewidth=1, label=PARTS[name])
        axis.set_ylim(top=8 * max(found["bound"] for _, found in records))  # room for the legend


PARTS = {
    "bound": "bound, 1/2 int E|div e + e.s| dt",
    "score_part": "its score part, 1/2 int E|e.s| dt",
    "divergence_part": "its divergence part, 1/2 int E|div e| dt",
}


def lines(records: Records) -> dict[tuple[str, str], Records]:
    """Records by panel and line, each in the order of x."""
    found: dict[tuple[str, str], Records] = {}
    for record in records:
        found.setdefault((record[0].panel, record[0].line), []).append(record)
    return {key: sorted(rows, key=lambda row: row[0].x) for key, rows in found.items()}


def side_by_side(panels: int) -> tuple[Figure, list[plt.Axes]]:
    """A figure with so many panels of one scale, up to three in a row, more in two rows."""
    rows = 1 if panels < 4 else 2
    columns = math.ceil(panels / rows)
    size = (5.2 * columns + 0.6, 4.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for spare in axes.flat[panels:]:
        spare.axis("off")
    return figure, list(axes.flat[:panels])


def above_floor(value: float) -> float:
    """The value, NaN where rounding has taken over, so that it is not drawn."""
    return value if value > FLOOR else math.nan


def last_slope(x: list[float], y: list[float], floor: float = FLOOR) -> float:
    """-d log y / d log x between the last two points that are above `floor`; NaN where there are none."""
    kept = [(a, b) for a, b in zip(x, y) if math.isfinite(b) and b > floor]
    if len(kept) < 2:
        return math.nan
    (a, b), (c, d) = kept[-2:]
    return -math.log(d / b) / math.log(c / a)
