"""What simulations share: rounds instead of gradients, curves of what is measured, slopes against the round."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from datamodules.batches import RoundBatch
from lightning_modules.method import Method
from lightning_modules.theory.tables import write_table

Measured = dict[str, Float[Tensor, " copies"]]  # by name, a number for each game or seed that is simulated side by side


class Simulation(Method):
    """A method that makes its own updates: a training step plays the rounds of its batch and measures the last one.

    A subclass keeps its state in buffers, and `play` moves it. What it measures is kept for all steps in `curves`,
    which are part of a checkpoint: figures, the values at the rounds of `at` and the slopes are drawn from them.
    """

    batch_type: ClassVar[type] = RoundBatch
    log_log: ClassVar[tuple[str, ...]] = ()  # measurements that should fall as a power of the round
    leaves: ClassVar[str] = "`export/curves.csv` has every measurement by round."

    def __init__(self, at: list[int]) -> None:
        super().__init__(_counter, _constant)
        self.at = at
        self.automatic_optimization = False
        self.rounds: list[int] = []
        self.curves: dict[str, list[Float[Tensor, " copies"]]] = {}

    def play(self, rounds: list[int]) -> Measured:
        """Play these rounds, counted from 0, and measure the last of them."""
        raise NotImplementedError

    # Lightning counts the steps of optimizers, and saves and stops by that count: this one only counts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return _counter()

    def training_step(self, batch: RoundBatch, batch_idx: int) -> None:
        rounds = batch["rounds"].tolist()
        with torch.no_grad():
            measured = self.play(rounds)
        self.rounds.append(rounds[-1] + 1)
        for name, values in measured.items():
            self.curves.setdefault(name, []).append(values.cpu())
        self.optimizers().step()
        if self.logs_now:
            self.log_dict({f"train/{name}": values.mean() for name, values in measured.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rounds"] = self.rounds
        checkpoint["curves"] = {name: torch.stack(values) for name, values in self.curves.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rounds = list(checkpoint["rounds"])
        self.curves = {name: list(values) for name, values in checkpoint["curves"].items()}

    def export(self, folder: Path) -> None:
        """`curves.csv`: the abscissa, and every measurement there as a mean over the copies."""
        (name, points), curves = self.abscissa(), self.exported()
        rows = zip(points, *(curve.tolist() for curve in curves.values()))
        write_table(folder / "curves.csv", [name, *curves], rows)

    def abscissa(self) -> tuple[str, Sequence[float | int]]:
        """What curves are over: its name, and its points."""
        return "round", self.rounds

    def exported(self) -> dict[str, np.ndarray]:
        """The columns of `curves.csv`; `<name>_low` and `<name>_high` are the interval of a mean."""
        return self.mean_curves()

    # Evaluation: what has been measured already

    def validation_step(self, batch: RoundBatch, batch_idx: int) -> None:
        self._log("val", {name: float(values[-1].mean()) for name, values in self.curves.items()})

    def test_step(self, batch: RoundBatch, batch_idx: int) -> None:
        if not self.rounds:
            raise ValueError("no round has been played: add fit to stages, or give ckpt_path=<a checkpoint of a run>")
        self._log("test", self.summary())

    def _log(self, stage: str, values: dict[str, float]) -> None:
        self.log_dict({self.metric(f"{stage}/{name}"): value for name, value in values.items()}, batch_size=1)

    def summary(self) -> dict[str, float]:
        """Measurements at the rounds of `at` and at the end, as means over the copies, and fitted slopes."""
        found = {}
        for name, curve in self.mean_curves().items():
            shown = [n for n in self.at if n in self.rounds[:-1]] + self.rounds[-1:]
            found |= {name: curve[-1]} | {f"{name}@{n}": curve[self.rounds.index(n)] for n in shown}
            if name in self.log_log and math.isfinite(fitted := slope(self.rounds, curve)):
                found[f"{name}_slope"] = fitted
        return {name: float(value) for name, value in found.items()}

    def mean_curves(self) -> dict[str, np.ndarray]:
        """Every measurement by round, averaged over the copies."""
        return {name: torch.stack(values).mean(1).numpy() for name, values in self.curves.items()}

    def figures(self) -> dict[str, Figure]:
        """Every measurement against the round, its range over the copies as a band."""
        figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
        for name, values in self.curves.items():
            copies = torch.stack(values)
            (line,) = axis.plot(self.rounds, copies.mean(1), label=self._label(name))
            if copies.shape[1] > 1:
                axis.fill_between(self.rounds, copies.amin(1), copies.amax(1), color=line.get_color(), alpha=0.2)
        if self.log_log:
            axis.set(xscale="log", yscale="log")
        axis.set(xlabel="rounds", title=self.title)
        axis.legend(fontsize=8)
        return {"curves": figure}

    def _label(self, name: str) -> str:
        fitted = slope(self.rounds, self.mean_curves()[name]) if name in self.log_log else math.nan
        return f"{name}, slope {fitted:.2f}" if math.isfinite(fitted) else name

    @property
    def title(self) -> str:
        """What stands above the figure."""
        return type(self).__name__


def slope(rounds: list[int], values: np.ndarray, first: int = 100, smallest: float = 1e-12) -> float:
    """d log(value) / d log(round) by least squares over rounds from `first` on, spaced evenly in the logarithm.

    Up to the first value below `smallest`, where rounding takes over; NaN where fewer than three points are left.
    """
    below = np.flatnonzero(np.asarray(values) < smallest)
    end = below[0] if len(below) else len(rounds)
    wanted = np.geomspace(first, max(rounds[-1], first + 1), 60)
    places = np.unique(np.abs(np.subtract.outer(wanted, rounds)).argmin(1))
    places = places[(places < end) & (np.asarray(rounds)[places] >= first)]
    if len(places) < 3:
        return math.nan
    return float(np.polyfit(np.log(np.asarray(rounds)[places]), np.log(values[places]), 1)[0])


def _counter(_: Any = None) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(())], lr=0.0)


_constant: Callable[..., float] = lambda step, total: 1.0  # noqa: E731
