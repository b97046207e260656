"""CryoFM: a prior over cryo-EM densities by flow matching (arXiv 2410.08631)."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from jaxtyping import Float, Float64
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from datamodules.batches import DensityBatch
from lightning_modules import weights as folders
from lightning_modules.averaging import average, warmed_up
from lightning_modules.cryo import flow_matching, map_figures, map_files, prior, prior_figures, published
from lightning_modules.cryo.flow_matching import Spectrum
from lightning_modules.cryo.fourier import auc
from lightning_modules.cryo.tasks import Trials, score_table, scores_csv
from lightning_modules.method import Method
from lightning_modules.processes.grids import uniform
from lightning_modules.processes.ode import continuous, sample
from lightning_modules.processes.paths import Linear
from lightning_modules.processes.prediction import Prediction
from lightning_modules.sharding import unsharded

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SHOWN = 4  # densities in a figure


@dataclass
class Evaluated:
    """What an evaluation has seen so far, a row for each cube."""

    places: list[Tensor]
    losses: list[Float[Tensor, "rows networks times"]]
    powers: list[Float[Tensor, "rows radii"]]
    shown: Float[Tensor, "shown n n n"] | None = None
    tried: list[Float[Tensor, "rows n n n"]] = field(default_factory=list)  # the cubes that tasks are tried on


class CryoFM(Method):
    """Flow matching on cubes of density; evaluated, sampled and exported is the exponential mean of the weights.

    `times` is the law of the times of training, uniform or logit_normal. `decay` is that of the mean, which is warmed
    up. `sampler` is any of `processes.ode`; `samples` has how many densities a test or a prediction draws (`count`),
    by how many steps, and how many at once. `trials` are tasks that a test restores held-out cubes in, beside
    baselines; None is none. `weights` is a local file of the authors' published weights, or the export
    folder of a run, to start from. Times, noise and samples depend on the seed and on a cube's place alone.
    """

    batch_type: ClassVar[type] = DensityBatch
    headline: ClassVar[tuple[str, str]] = ("val/loss", "min")
    columns: ClassVar[dict[str, Callable[[float], str]]] = {
        "loss": "{:.3f}".format,
        "shell": "{:.3f}".format,
        **{f"t{t}_loss": "{:.3f}".format for t in (TIMES[0], TIMES[-1])},
        "sample_std": "{:.2f}".format,
        "log_power": "{:.2f}".format,
        "restored_": "{:.3f}".format,
    }
    caption: ClassVar[str] = (
        "held-out density; loss of the velocity, the best linear one by shells (shell); of unconditional "
        "samples the standard deviation and the rms difference of log10 power to the data; FSC-AUC of what was "
        "restored, to be read beside the baselines in trials.md"
    )
    leaves: ClassVar[str] = (
        "`samples/*.mrc` are unconditional samples, density over its scale; the prior in `export/` is read by "
        "`lightning_modules.cryo.prior.load`, and restores half maps with `tools.restore_map`. `trials.md` and "
        "`trials.csv` have every restoration beside its baselines."
    )

    def __init__(
        self,
        network: Callable[[], nn.Module],
        sampler: Any,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., float],
        seed: int,
        times: str,
        decay: float,
        samples: dict[str, int],
        trials: Trials | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        _check(sampler, times, decay, samples)
        self.build, self.network = network, network()
        for name in ("mean", "std", "voxel_size"):  # of the data that the prior is trained on
            self.register_buffer(name, torch.tensor(torch.nan))
        if weights:
            self._start_from(Path(weights))
        self.averaged = network().requires_grad_(False)
        self.averaged.load_state_dict(self.network.state_dict())
        self.sampler, self.samples, self.seed, self.decay = sampler, samples, seed, decay
        self.trials = trials
        self.restorations: dict[str, Figure] = {}
        self.law = flow_matching.LAWS[times]
        self.drawn: Float[Tensor, "count n n n"] | None = None

    def meet(self, data: L.LightningDataModule) -> None:
        super().meet(data)
        edge = getattr(self.network, "edge", 1)
        if data.box % edge:
            raise ValueError(
                f"data.box={data.box}: the network makes one of {edge} voxels an edge; take a multiple of that"
            )
        self.box = data.box
        self.voxel_size.fill_(data.voxel_size)
        if self.mean.isnan():  # what a prior was trained in stays, whatever else it is then shown
            self.mean.fill_(data.normalisation.mean)
            self.std.fill_(data.normalisation.std)

    def _start_from(self, source: Path) -> None:
        """Take weights, and the units that they know, from the export folder of a run or from a published file."""
        units = published.UNITS
        if source.is_dir():
            units, tensors = prior.read_config(source), folders.read(source)
            published.refuse_another(self.network, tensors, source)
            self.network.load_state_dict(tensors)
        else:
            published.load(self.network, source)
        self.mean.fill_(units["mean"])
        self.std.fill_(units["std"])

    def networks(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def shard_units(self) -> list[nn.Module]:
        return [*self.network.shard_units(), *self.averaged.shard_units()]

    def rates(self, units_per_s: float) -> dict[str, float]:
        return {"cubes_per_s": units_per_s}

    @property
    def prediction(self) -> Prediction:
        """The prior as samplers and posterior sampling take it."""
        return Prediction(Linear(), self.averaged, "velocity")

    # Training

    def training_step(self, batch: DensityBatch, batch_idx: int) -> Tensor:
        data = self._standardised(batch)
        places = batch["place"].tolist()
        t, noise = flow_matching.drawn(self.law, self.seed, places, data.shape[-1], data.device)
        loss = flow_matching.loss(self.network, data, noise, t).mean()
        self.log_step(loss)
        return loss

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        super().optimizer_step(*arguments, **keywords)
        # global_step counts this step only when it is over
        average(self.averaged, self.network, warmed_up(self.decay, self.global_step + 1))

    def _standardised(self, batch: DensityBatch) -> Float[Tensor, "batch n n n"]:
        """Cubes in the units that the prior is trained in, also those of other data, which come in theirs."""
        return batch["voxels"] * (batch["std"] / self.std) + (batch["mean"] - self.mean) / self.std

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        self.evaluated = Evaluated([], [], [])

    def on_test_epoch_start(self) -> None:
        self.evaluated = Evaluated([], [], [])

    def validation_step(self, batch: DensityBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: DensityBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: DensityBatch, stage: str) -> None:
        data, places = self._standardised(batch), batch["place"]
        noise = flow_matching.drawn_noise(self.seed, stage, places.tolist(), data.shape[-1], data.device)
        rows = [
            torch.stack([flow_matching.loss(network, data, noise, data.new_full((len(data),), t)) for t in TIMES], 1)
            for network in (self.averaged, self.network)
        ]
        seen = self.evaluated
        seen.places.append(places)
        seen.losses.append(torch.stack(rows, 1))
        found = flow_matching.spectrum(data)
        seen.powers.append(found.power)
        self.voxels = found.voxels
        if seen.shown is None:
            seen.shown = data[:SHOWN].cpu()
        if self.trials and stage == "test":
            mine = -(-self.trials.maps // self.trainer.world_size)
            seen.tried.append(data[: max(0, mine - sum(map(len, seen.tried)))])

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")
        self._draw()
        ours = flow_matching.spectrum(self.drawn).power.mean(0)
        values = {
            "sample_std": self.drawn.double().std(),
            "log_power": flow_matching.log_power_difference(ours, self.powers.mean(0).cpu(), self.box),
        }
        self.log_dict({self.metric(f"test/{name}"): value.float() for name, value in values.items()})
        if self.trials:
            self._try()

    def _try(self) -> None:
        """Restore held-out cubes in every task, each process its own, and write the scores of all of them."""
        scores = {name: self._restored(name) for name in self.trials.tasks}
        for task, kinds in scores.items():
            for kind, score in kinds.items():
                name = f"restored_{task}" if kind == "restored" else f"auc_{kind}_{task}"
                self.log(self.metric(f"test/{name}"), score.mean().float())
        if self.trainer.is_global_zero:
            folder, table = Path(self.trainer.default_root_dir), score_table(scores)
            (folder / "trials.csv").write_text(scores_csv(scores))
            (folder / "trials.md").write_text(table)
            Console(width=120).print(table, highlight=False)

    def _restored(self, name: str) -> dict[str, Float64[Tensor, " map"]]:
        """FSC-AUC of every map of a task, by kind; its figures are kept."""
        watched = self.trainer.is_global_zero and sys.stderr.isatty()
        with (
            torch.inference_mode(False),  # guidance differentiates through the network
            self.trainer.precision_plugin.forward_context(),
            Progress(console=Console(stderr=True), transient=True, disable=not watched) as bar,
        ):
            places = torch.cat(self.evaluated.places).clone()
            density = torch.cat(self.evaluated.tried).clone() * float(self.std) + float(self.mean)
            places, units = places[: len(density)], (float(self.mean), float(self.std))
            task = bar.add_task(f"restoring: {name}", total=None)
            trial = self.trials(
                name, self.prediction, units, density, places.tolist(), self.seed, lambda *_: bar.advance(task)
            )
        everywhere = self._gathered([places])
        curves = {
            kind: flow_matching.per_place(everywhere, self._gathered([curve.to(self.device)])).cpu()
            for kind, curve in trial.curves.items()
        }
        first = {kind: maps[0] for kind, maps in trial.maps.items()}
        self.restorations |= {
            f"restored_{name}": map_figures.beside(first, f"{name}: one of {len(curves['observed'])} held-out maps"),
            f"fsc_{name}": map_figures.fsc_curves(curves, self.box, float(self.voxel_size), name),
        }
        return {kind: auc(curve) for kind, curve in curves.items()}

    def _report(self, stage: str) -> None:
        places = self._gathered(self.evaluated.places)
        losses, self.powers = (
            flow_matching.per_place(places, self._gathered(rows).double())
            for rows in (self.evaluated.losses, self.evaluated.powers)
        )
        spectrum = Spectrum(self.powers.mean(0), self.voxels)
        averaged, raw = losses.mean(0).tolist()
        known = [flow_matching.baselines(spectrum, t) for t in TIMES]
        self.by_time = {"loss": averaged, "raw_loss": raw} | {name: [at[name] for at in known] for name in known[0]}
        values = {name: sum(row) / len(TIMES) for name, row in self.by_time.items()}
        for place, t in enumerate(TIMES):
            values |= {f"t{t}_{name}": self.by_time[name][place] for name in ("loss", "shell")}
        for name, value in values.items():
            self.log(self.metric(f"{stage}/{name}"), value, prog_bar=name == "loss")

    def _gathered(self, parts: list[Tensor]) -> Tensor:
        """Rows of all batches and processes; all have as many."""
        mine = torch.cat(parts)
        return self.all_gather(mine).reshape(-1, *mine.shape[1:])

    # Samples

    def predict_step(self, batch: DensityBatch, batch_idx: int) -> None:
        if batch_idx == 0:  # what is drawn does not depend on the data
            self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """Draw `samples.count` densities, each process its share, and write them."""
        count, world = self.samples["count"], self.trainer.world_size
        mine = [number % count for number in range(self.global_rank, -(-count // world) * world, world)]
        batches = [mine[begin : begin + self.samples["batch"]] for begin in range(0, len(mine), self.samples["batch"])]
        grid = uniform(Linear(), self.samples["steps"], 1.0, 0.0)
        watched = self.trainer.is_global_zero and sys.stderr.isatty()
        found = []
        with Progress(console=Console(stderr=True), transient=True, disable=not watched) as bar:
            task = bar.add_task("sampling", total=len(batches) * self.samples["steps"])
            for numbers in batches:
                noise = flow_matching.drawn_noise(self.seed, "sample", numbers, self.box, self.device)
                with self.trainer.precision_plugin.forward_context():
                    found.append(
                        sample(self.sampler, self.prediction, noise, grid, progress=lambda *_: bar.advance(task))
                    )
        places = self._gathered([torch.tensor(mine, device=self.device)])
        self.drawn = flow_matching.per_place(places, self._gathered(found)).cpu()
        if self.trainer.is_global_zero:
            density = self.drawn * self.std.cpu() + self.mean.cpu()
            for number, volume in enumerate(density):
                path = Path(self.trainer.default_root_dir, "samples", f"sample-{number:03d}.mrc")
                map_files.write(path, volume, float(self.voxel_size))

    def figures(self) -> dict[str, Figure]:
        """The loss by time beside what is reached without learning; after a test also samples and spectra."""
        found = {"loss_by_time": prior_figures.loss_by_time(TIMES, self.by_time)}
        if self.drawn is not None:
            units = float(self.std), float(self.mean)
            shown = [cubes[:SHOWN] * units[0] + units[1] for cubes in (self.evaluated.shown, self.drawn)]
            powers = self.powers.cpu(), flow_matching.spectrum(self.drawn).power
            found["samples"] = prior_figures.side_by_side({"data": shown[0], "samples": shown[1]})
            found["spectra"] = prior_figures.spectra(
                {"data": powers[0], "samples": powers[1]}, self.box, float(self.voxel_size)
            )
        return found | self.restorations

    def export(self, folder: Path) -> None:
        network = unsharded(self.averaged, self.build)
        if self.trainer.is_global_zero:
            units = {name: float(getattr(self, name)) for name in ("mean", "std", "voxel_size")}
            prior.save(folder, prior.DensityPrior(network, box=self.box, **units), self.build)


def _check(sampler: Any, times: str, decay: float, samples: dict[str, int]) -> None:
    if times not in flow_matching.LAWS:
        raise ValueError(f"model.times={times}: there are {', '.join(flow_matching.LAWS)}")
    if not 0 <= decay < 1:
        raise ValueError(f"model.decay={decay}: the mean of the weights needs a decay in [0, 1), such as 0.99")
    if small := [name for name, value in samples.items() if value < 1]:
        raise ValueError(f"model.samples.{small[0]}={samples[small[0]]} must be positive")
    continuous(sampler)
