"""A learned score against the exact one: what its errors cost a deterministic sampler (arXiv 2410.14237)."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from datamodules.batches import PointBatch
from lightning_modules.method import Method
from lightning_modules.processes.ode import Sampler, continuous, sample
from lightning_modules.processes.paths import Path as ProbabilityPath
from lightning_modules.processes.prediction import Prediction
from lightning_modules.theory.sampler_laboratory import Laboratory, MakeGrid, recomputed, tv_bound, tv_rate
from lightning_modules.theory.sampler_studies import last_slope
from lightning_modules.theory.score_network import ScoreNetwork
from lightning_modules.theory.tables import write_table
from lightning_modules.theory.transport import FoldedMap

RATES = 60  # times at which the error of the score is integrated


class LearnedScore(Method):
    """Denoising score matching, E|eps_hat - eps|^2 at times uniform in log(alpha / sigma), on a known density.

    A test runs `sampler` and those of `beside` with the learned and with the exact score, on `grid` with each number of
    `steps`: the learned curve falls like the exact one and then stays at a floor. The error budget has what starting
    from a Gaussian costs, what the steps cost, and the bound 1/2 int E|div e + e.s| dt on what the score e + s costs.
    """

    batch_type: ClassVar[type] = PointBatch
    headline: ClassVar[tuple[str, str]] = ("val/loss", "min")
    columns: ClassVar[dict[str, Callable[[float], str]]] = {
        "loss": "{:.4f}".format,
        **{name: "{:.3g}".format for name in ("tv@", "floor", "bound", "initial", "discretisation")},
        **{name: "{:.3g}".format for name in ("score_part", "divergence_part", "score_rms")},
    }
    caption: ClassVar[str] = "loss on held-out points; total variation by steps, and the bound on what the score costs"
    leaves: ClassVar[str] = "`export/table.csv` has the total variation of every sampler, with both scores."

    def __init__(
        self,
        sampler: Any,
        path: ProbabilityPath,
        grid: MakeGrid,
        beside: dict[str, Sampler] | None,
        steps: list[int],
        start: float,
        stop: float,
        points: int,
        width: int,
        depth: int,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., float],
    ) -> None:
        super().__init__(optimizer, scheduler)
        samplers = [*(beside or {}).values(), sampler]
        self.samplers = {type(one).__name__: continuous(one) for one in samplers}
        self.path, self.grid, self.steps = path, grid, sorted(steps)
        self.table: list[tuple[str, str, int, float]] = []
        self.settings = {"start": start, "stop": stop, "points": points}
        self.sizes = {"width": width, "depth": depth}
        ends = path.log_snr(torch.tensor([start, stop], dtype=torch.float64)).tolist()
        if not all(map(math.isfinite, ends)):
            raise ValueError(
                f"model.start={start}, model.stop={stop}: keep inside of the path, times are even in log(SNR)"
            )
        self.log_snr_range = tuple(ends)

    def meet(self, data: L.LightningDataModule) -> None:
        """Take the density, and make a network for its dimension."""
        super().meet(data)
        self.laboratory = Laboratory(data.mixture, self.path, "noise", **self.settings)
        if self.laboratory.d > 2:
            raise ValueError(f"data={data.name} has {self.laboratory.d} dimensions: densities are integrated in 1 or 2")
        self.network = ScoreNetwork(self.laboratory.d, **self.sizes)
        for steps in self.steps:
            self.laboratory.grid(self.grid, steps)  # a grid that there is none of is refused now

    def networks(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def shard_units(self) -> list[nn.Module]:
        return [self.network]

    def noise(self, x: Float[Tensor, "batch d"], t: Float[Tensor, " batch"]) -> Float[Tensor, "batch d"]:
        """The predicted noise, in the precision of x."""
        scale = self.path.prior_std(t)[:, None]
        return self.network((x / scale).float(), self.path.log_snr(t).float()).to(x.dtype)

    def loss(self, batch: PointBatch) -> Tensor:
        """Mean square error of the noise, per coordinate."""
        low, high = self.log_snr_range
        t = self.path.time((low + (high - low) * batch["uniform"].double()).clamp(low, high))
        x = self.path.sample(batch["points"], batch["noise"], t)
        return ((self.noise(x, t.float()) - batch["noise"]) ** 2).mean()

    def training_step(self, batch: PointBatch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log_step(loss)
        return loss

    # Evaluation

    def validation_step(self, batch: PointBatch, batch_idx: int) -> None:
        self._log("val", {"loss": self.loss(batch)})

    def test_step(self, batch: PointBatch, batch_idx: int) -> None:
        self._log("test", {"loss": self.loss(batch)})

    def _log(self, stage: str, values: dict[str, float | Tensor]) -> None:
        for name, value in values.items():
            self.log(self.metric(f"{stage}/{name}"), value, batch_size=1, sync_dist=stage == "val")

    def on_test_epoch_end(self) -> None:
        with torch.inference_mode(False):  # maps and errors are differentiated
            self.table = self._measured()
            self._log("test", self._budget())
        if self.trainer.is_global_zero:
            self._leave(Path(self.trainer.default_root_dir, "export"))

    def _leave(self, folder: Path) -> None:
        """`table.csv`: sampler, score, steps, total variation; `curves.csv`: that of `sampler` by evaluations."""
        *_, (own, sampler) = self.samplers.items()
        curve = [(n * sampler.evaluations, tv) for name, kind, n, tv in self.table if (name, kind) == (own, "learned")]
        write_table(folder / "curves.csv", ["evaluations of the score", "tv"], curve)
        write_table(folder / "table.csv", ["sampler", "score", "steps", "tv"], self.table)

    def _measured(self) -> list[tuple[str, str, int, float]]:
        """The total variation of each sampler with each score at each number of steps, the learned one last."""
        predictions = {
            "exact": self.laboratory.prediction,
            "learned": recomputed(self.path, self.noise, "noise"),
        }
        cells = [(name, score, n) for name in self.samplers for score in predictions for n in self.steps]
        watched = self.trainer.is_global_zero and sys.stderr.isatty()
        with Progress(console=Console(stderr=True), transient=True, disable=not watched) as bar:
            return [
                (name, score, n, self._tv(self.samplers[name], predictions[score], n))
                for name, score, n in bar.track(cells, description="measuring samplers")
            ]

    def _tv(self, sampler: Sampler, prediction: Prediction, steps: int) -> float:
        grid = self.laboratory.grid(self.grid, steps)
        try:
            return self.laboratory.log_ratio(sampler, grid, prediction).tv
        except FoldedMap:
            return math.nan

    def score_error(self, x: Float[Tensor, "batch d"], t: Float[Tensor, " batch"]) -> Float[Tensor, "batch d"]:
        """e = s_hat - s."""
        sigma = self.path.sigma(t)[:, None]
        alpha = self.path.alpha(t)
        return -self.noise(x, t) / sigma - self.laboratory.law.score(x, alpha, sigma[:, 0])

    def _budget(self) -> dict[str, float]:
        own = list(self.samplers)[-1]
        tv = {(score, n): found for name, score, n, found in self.table if name == own}
        last = self.steps[-1]
        bound, along, divergence = tv_bound(self.laboratory, self.score_error, RATES, self.settings["points"])
        return {
            **{f"tv@{n}": tv["learned", n] for n in self.steps},
            "floor": tv["learned", last],
            "initial": self.laboratory.initial_error(),
            "discretisation": tv["exact", last],
            "bound": bound,
            "score_part": along,
            "divergence_part": divergence,
        }

    # Figures

    def figures(self) -> dict[str, Figure]:
        """TV against evaluations, the error of the score along the path, and in the plane what is sampled."""
        if not self.table:
            return {}
        made = {"total_variation": self._tv_figure(), "score_error": self._error_figure()}
        return made | ({"samples": self._sample_figure()} if self.laboratory.d == 2 else {})

    def _tv_figure(self) -> Figure:
        figure, axis = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
        ticks = sorted({n * sampler.evaluations for sampler in self.samplers.values() for n in self.steps})
        for number, (name, sampler) in enumerate(self.samplers.items()):
            for score, style in (("exact", "--"), ("learned", "-")):
                rows = [(n, tv) for one, kind, n, tv in self.table if (one, kind) == (name, score)]
                x, y = [float(n * sampler.evaluations) for n, _ in rows], [tv for _, tv in rows]
                slope = f", order {last_slope(x, y):.2f}" if score == "exact" and len(rows) > 1 else ""
                axis.loglog(x, y, style, marker="o", ms=4, color=f"C{number}", label=f"{name}, {score}{slope}")
        axis.set(xlabel="evaluations of the score", ylabel="total variation", title="a learned score has a floor")
        axis.set_xticks(ticks, map(str, ticks))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
        return figure

    def _error_figure(self) -> Figure:
        times = self.path.time(torch.linspace(*self.log_snr_range, 40, dtype=torch.float64))
        with torch.inference_mode(False):
            rates = [tv_rate(self.laboratory, self.score_error, t, self.settings["points"]) for t in times]
        figure, axis = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
        labels = ("bound, E|div e + e.s|", "score part, E|e.s|", "divergence part, E|div e|")
        for values, label, style in zip(zip(*rates), labels, ("k-", "C7:", "C7-.")):
            axis.loglog(times, [t * value for t, value in zip(times.tolist(), values)], style, label=label)
        axis.set(xlabel="t", ylabel="share of the bound per unit of log t", title="where the error of the score costs")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
        return figure

    def _sample_figure(self) -> Figure:
        z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        grid = self.laboratory.grid(self.grid, self.steps[-1])
        own = list(self.samplers.values())[-1]
        learned = Prediction(self.path, self.noise, "noise")
        figure, axes = plt.subplots(1, 2, figsize=(8, 4), sharex=True, sharey=True, layout="constrained")
        for axis, (name, prediction) in zip(
            axes, {"exact score": self.laboratory.prediction, "learned score": learned}.items()
        ):
            with torch.no_grad():
                x = sample(own, prediction, self.path.prior_std(grid[0]) * z, grid)
            axis.plot(*x.T.numpy(), ".", ms=1.5, alpha=0.4)
            axis.set(title=f"{name}, {self.steps[-1]} steps of {type(own).__name__}", aspect="equal")
        return figure
