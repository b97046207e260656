"""Samplers measured without noise: what a deterministic sampler makes of a known density (arXiv 2410.14237)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from matplotlib.figure import Figure

from lightning_modules.processes import paths
from lightning_modules.processes.ode import continuous
from lightning_modules.theory.sampler_laboratory import Laboratory
from lightning_modules.theory.sampler_studies import Records, Study
from lightning_modules.theory.simulation import Measured, Simulation
from lightning_modules.theory.tables import write_table


class OdeSamplers(Simulation):
    """A `study` of `sampler` on a `path`, between the times `start` and `stop`, with exact predictions.

    A round is a cell of the study's table. `prediction` is the kind that the exact network predicts: all kinds agree,
    but not all are finite at the ends of a path.
    """

    headline: ClassVar[tuple[str, str]] = ("val/tv", "min")
    columns: ClassVar[dict[str, Callable[[float], str]]] = {
        "tv@": "{:.3g}".format,
        "steps@": "{:.0f}".format,
        "order": "{:.2f}".format,
        "stated_order": "{:.0f}".format,
        "certified": lambda value: "yes" if value else "NO",
        "slope_in_": "{:.2f}".format,
        "bound@": "{:.3g}".format,
    }
    caption: ClassVar[str] = "total variation between a sampler's output and the density, by change of variables"
    leaves: ClassVar[str] = "`export/table.csv` has every cell measured, `export/slopes.csv` the fitted slopes."

    def __init__(
        self,
        sampler: Any,
        path: paths.Path,
        study: Study,
        prediction: str,
        start: float,
        stop: float,
        points: int | None,
    ) -> None:
        super().__init__(at=[])
        self.sampler, self.path, self.study = continuous(sampler), path, study
        self.settings = {"kind": prediction, "start": start, "stop": stop, "points": points}
        if prediction not in paths.KINDS:
            raise ValueError(f"model.prediction={prediction}: there are {', '.join(paths.KINDS)}")
        if not 0 <= stop < start <= path.end:
            raise ValueError(f"model.start={start}, model.stop={stop}: expected 0 <= stop < start <= {path.end:g}")

    def meet(self, data: L.LightningDataModule) -> None:
        """Take the density, and tell the data how many cells there are to measure."""
        super().meet(data)
        if not hasattr(data, "mixture"):
            raise ValueError(f"data={data.name} has no density: take data=simulated_density")
        if self.settings["stop"] == 0 and not data.mixture.covariances.any(-1).any(-1).all():
            raise ValueError("model.stop=0 with a point mass in the data, whose score is infinite there: take 1e-3")
        self.cells = self.study.begin(Laboratory(data.mixture, self.path, **self.settings), self.sampler)
        data.plan(len(self.cells))

    def play(self, rounds: list[int]) -> Measured:
        found = self.study.measure(self.cells[rounds[-1]])
        return {name: torch.tensor([value], dtype=torch.float64) for name, value in found.items()}

    @property
    def records(self) -> Records:
        """The cells measured so far, with what was found."""
        curves = self.mean_curves()
        found = [{name: float(curve[i]) for name, curve in curves.items()} for i in range(len(self.rounds))]
        return [(self.cells[number - 1], values) for number, values in zip(self.rounds, found)]

    def summary(self) -> dict[str, float]:
        return self.study.summary(self.records)

    def figures(self) -> dict[str, Figure]:
        return self.study.figures(self.records)

    def export(self, folder: Path) -> None:
        """`table.csv`: panel, line, x and every measurement; `slopes.csv`: what was fitted to each line."""
        records = self.records
        rows = [[cell.panel, cell.line, f"{cell.x:g}", *found.values()] for cell, found in records]
        write_table(folder / "table.csv", ["panel", "line", "x", *records[0][1]], rows)
        slopes = [[*name.split("/")[1:], value] for name, value in self.summary().items() if name.startswith("slope/")]
        write_table(folder / "slopes.csv", ["panel", "line", "slope"], slopes)
