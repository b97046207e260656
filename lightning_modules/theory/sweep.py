"""Simulations whose rounds are the points of an axis: errors against numbers of steps, dimensions or tolerances."""

import math
from collections.abc import Sequence
from typing import ClassVar

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from datamodules.batches import RoundBatch
from lightning_modules.theory.simulation import Measured, Simulation


class Sweep(Simulation):
    """A simulation that measures at each of `values` along the axis `against`, which is the abscissa of its figures.

    Slopes d log(value) / d log(axis) are fitted over `fit` = [low, high] of the axis (over all points where it holds
    fewer than two), of the mean over copies, with the range of the slopes of single copies beside it.
    """

    leaves: ClassVar[str] = "`export/curves.csv` has every measurement by point of the axis."
    drawn: ClassVar[dict[str, str]] = {}  # measurements of the figure, with their labels
    tabled: ClassVar[tuple[str, ...]] = ()  # what the table has of the first, the middle and the last point
    axis_labels: ClassVar[dict[str, str]] = {}
    linear: ClassVar[tuple[str, ...]] = ()  # axes against which errors fall exponentially: there d log(value) / d axis

    def __init__(self, against: str, values: Sequence[float | int], fit: Sequence[float | int] | None) -> None:
        super().__init__([])
        if not values:
            raise ValueError("model.values is empty: give the points of the axis, such as [16,32,64]")
        self.against, self.values, self.fit = against, list(values), fit or [min(values), max(values)]

    def meet(self, data: L.LightningDataModule) -> None:
        """The points are the rounds of the data."""
        super().meet(data)
        if not hasattr(data, "points"):
            raise ValueError(f"data={data.name} has rounds of its own, and {type(self).__name__} points of an axis")
        data.points(len(self.values))

    def measure(self, value: float | int) -> Measured:
        """What is measured at a point of the axis, a number for each copy."""
        raise NotImplementedError

    def play(self, rounds: list[int]) -> Measured:
        return self.measure(self.values[rounds[-1]])

    @property
    def points(self) -> list[float | int]:
        """The points that have been measured."""
        return [self.values[number - 1] for number in self.rounds]

    def summary(self) -> dict[str, float]:
        found = {}
        for name, curve in self.mean_curves().items():
            shown = (0, len(curve) // 2, len(curve) - 1) if name in self.tabled else (len(curve) - 1,)
            found |= {name: curve[-1]} | {f"{name}@{self.points[place]:g}": curve[place] for place in shown}
            slopes = self.slopes(name)
            if slopes is not None:
                found |= dict(zip((f"{name}_slope", f"{name}_slope_low", f"{name}_slope_high"), slopes))
        return {name: float(value) for name, value in found.items()}

    def slopes(self, name: str) -> tuple[float, float, float] | None:
        """Of the mean over copies, and the least and largest of single copies; None where nothing can be fitted."""
        if name not in self.log_log:
            return None
        x, low, high = np.array(self.points), *self.fit
        inside = (x >= low * (1 - 1e-9)) & (x <= high * (1 + 1e-9))
        inside = inside if inside.sum() > 1 else np.ones_like(inside)
        values = torch.stack(self.curves[name]).numpy()[inside]
        if len(x) < 2 or not (values > 1e-13).all() or np.ptp(np.log(values), axis=0).max() < 1e-3:
            return None
        abscissa = x[inside] if self.against in self.linear else np.log(x[inside])
        fitted = [np.polyfit(abscissa, np.log(y), 1)[0] for y in (values.mean(1), *values.T)]
        return float(fitted[0]), float(min(fitted[1:])), float(max(fitted[1:]))

    def abscissa(self) -> tuple[str, Sequence[float | int]]:
        return self.against, self.points

    def figures(self) -> dict[str, Figure]:
        """The measurements of `drawn` against the axis, their range over the copies as a band."""
        figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
        for name in self.drawn:
            if name in self.curves:
                self._draw(axis, name, torch.stack(self.curves[name]).numpy())
        axis.set(xscale="linear" if self.against in self.linear else "log", yscale="log")
        axis.set(xlabel=self.axis_labels.get(self.against, self.against), title=self.title)
        axis.set_xticks(self.points, [f"{point:g}" for point in self.points])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
        return {"curves": figure}

    def _draw(self, axis: plt.Axes, name: str, values: np.ndarray) -> None:
        if not (values > 0).any():
            return
        shown = np.where(values > 0, values, np.nan)
        (line,) = axis.plot(self.points, shown.mean(1), marker="o", markersize=3.5, label=self._label(name))
        if values.shape[1] > 1:
            axis.fill_between(self.points, shown.min(1), shown.max(1), color=line.get_color(), alpha=0.2)

    def _label(self, name: str) -> str:
        slopes, label = self.slopes(name), self.drawn.get(name, name)
        if slopes is None or math.isnan(slopes[0]):
            return label
        return f"{label}, exp({slopes[0]:.2f} T)" if self.against in self.linear else f"{label}, slope {slopes[0]:.2f}"

    def validation_step(self, batch: RoundBatch, batch_idx: int) -> None:
        if self.rounds:
            super().validation_step(batch, batch_idx)
