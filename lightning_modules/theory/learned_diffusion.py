"""Discrete diffusion with a learned denoiser, small enough that the law of its samples is known exactly."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import lightning as L
import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from datamodules.batches import CategoryBatch
from lightning_modules.method import Method
from lightning_modules.processes.ctmc import CTMC, Denoiser, Time
from lightning_modules.processes.ctmc_kernels import Absorbing, Kernel, Letters, State, one_hot
from lightning_modules.processes.ctmc_losses import LOSSES, likelihood_bound, stratified
from lightning_modules.processes.ctmc_samplers import CategoricalSampler, check_kernel
from lightning_modules.processes.ctmc_schedules import Schedule
from lightning_modules.processes.exact_law import ExactLaw, Law, on_states
from lightning_modules.theory.discrete_diffusion import Setting, check_space, report

INTEGRATED = ("nelbo", "score_entropy", "flow_matching")  # losses whose integral over time is the bound
SHOWN = ("kl", "path", "score_error", "tv_data")


class LetterNetwork(nn.Module):
    """Logits for every coordinate from all letters and the noise: an MLP with GELU on one-hot letters and 9
    features."""

    def __init__(self, d: int, size: int, letters: int, width: int, layers: int) -> None:
        super().__init__()
        self.size, self.shape = size, (d, letters)
        widths = [d * size + 9, *[width] * layers]
        hidden = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.GELU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(widths[-1], d * letters))

    def forward(self, x: State, noise: Float[Tensor, " batch"]) -> Letters:
        letters = one_hot(x, self.size, torch.float32).flatten(1)
        return self.layers(torch.cat([letters, noise_features(noise).float()], 1)).unflatten(1, self.shape)


class LearnedDiffusion(Method):
    """A denoiser trained on rows of a known law, and the exact law of what a sampler makes of it.

    `predicts` is what the network gives, logits of the posterior ("x0") or log-scores ("score", whose loss is
    score_entropy). Times are drawn from [`low`, `high`], evenly in their logarithm or themselves (`log_times`).
    Validation enumerates all states: `kl`, `tv`, `path`, `bound` are exact for the network as it is. `bits` is the
    bound on the negative log-likelihood of held-out rows, in bits per letter, and `entropy` what it cannot fall below.
    """

    batch_type: ClassVar[type] = CategoryBatch
    headline: ClassVar[tuple[str, str]] = ("val/tv_data", "min")
    columns: ClassVar[dict[str, Callable[[float], str]]] = {
        **{name: "{:.3e}".format for name in ("kl", "path", "score_error")},
        **{name: "{:.4f}".format for name in ("tv_data", "bits", "entropy")},
        "evaluations": "{:.1f}".format,
    }
    caption: ClassVar[str] = "exact law of the samples on all states (nats); bits per letter beside the data's entropy"

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., float],
        kernel: Callable[[int], Kernel],
        noise: Schedule,
        sampler: CategoricalSampler | Any,
        predicts: str,
        loss: str,
        width: int,
        layers: int,
        low: float,
        high: float | None,
        log_times: bool,
        grid: str,
        steps: int,
        kappa: float,
        start: float,
        delta: float,
        denoise: bool,
        samples: int,
        draws: int,
        seed: int,
    ) -> None:
        super().__init__(optimizer, scheduler)
        check_space(sampler)
        _check_loss(loss, predicts)
        high = start if high is None else high
        if not 0 < low < high <= noise.end:
            raise ValueError(f"model.low={low}, model.high={high}: expected 0 < low < high <= {noise.end:g}")
        if predicts == "score" and not math.isfinite(noise.noise(torch.tensor(start))):
            raise ValueError(f"model.start={start} has infinite noise, where scores vanish: take model.noise.eps=1e-3")
        self.kernel, self.noise, self.sampler = kernel, noise, sampler
        self.predicts, self.loss, self.width, self.layers = predicts, loss, width, layers
        self.low, self.high, self.log_times = low, high, log_times
        self.setting = Setting(grid, steps, kappa, start, delta)
        self.denoise, self.samples, self.draws, self.seed = denoise, samples, draws, seed
        self.history: dict[str, list[float]] = {}

    def meet(self, data: L.LightningDataModule) -> None:
        """Take the law from the data, and make the network for its size."""
        super().meet(data)
        if not hasattr(data, "law"):
            raise ValueError(f"data={data.name} has no law of letters: take data=simulated_categories")
        kernel = self.kernel(data.letters)
        check_kernel(self.sampler, kernel)
        self.process = CTMC(kernel, self.noise)
        self.exact, self.times = ExactLaw(self.process, data.law()), self.setting.times(self.noise)
        self.network = LetterNetwork(data.dimension, kernel.size, kernel.letters, self.width, self.layers)
        self.origin = data.source.origin

    def predict(self, x: State, t: Time) -> Letters:
        """What the network says: logits, or log-scores (of masks with 1 / (e^sigma - 1) taken out, as in SEDD)."""
        noise = self.process.schedule.noise(t)
        said = self.network(x, noise)
        if self.predicts == "score" and isinstance(self.process.kernel, Absorbing):
            return said - torch.log(torch.expm1(noise)).to(said.dtype)[:, None, None]
        return said

    def training_step(self, batch: CategoryBatch, batch_idx: int) -> Tensor:
        x0, draw = batch["x"], self._draw(batch_idx)
        t, density = self._times(len(x0), draw)
        x = self.process.sample(x0, t, draw)
        loss = LOSSES[self.loss](self.process, self.predict(x, t), x, x0, t)
        loss = (loss * density if self.loss in INTEGRATED else loss).mean() / x0.shape[1]
        self.log_step(loss)
        return loss

    def _draw(self, batch_idx: int) -> torch.Generator:
        """Of the noise of a micro-batch: a function of seed, step and process, so that a run can go on."""
        micro = (self.global_step * self.trainer.world_size + self.global_rank) * 1009 + batch_idx % 1009
        return torch.Generator().manual_seed(self.seed * 1_000_003 + micro)

    def _times(self, count: int, draw: torch.Generator) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Stratified times, and what a mean over them is multiplied by to be an integral."""
        cells = stratified(count, draw)
        if not self.log_times:
            return self.low + (self.high - self.low) * cells, torch.full_like(cells, self.high - self.low)
        span = math.log(self.high / self.low)
        t = self.low * torch.exp(span * cells)
        return t, t * span

    def denoiser(self) -> Denoiser:
        """The network as a denoiser, in double precision after its last layer."""
        kind = {"x0": "logits", "score": "log_score"}[self.predicts]
        return Denoiser(self.process, lambda x, t: self.predict(x, t).double(), kind)

    def law(self) -> Law:
        """The law of the samples, of samplers whose law is known."""
        return self.exact.propagate(self.sampler, self.denoiser(), self.times)

    def validation_step(self, batch: CategoryBatch, batch_idx: int) -> None:
        self._measure("val", batch["x"])

    def test_step(self, batch: CategoryBatch, batch_idx: int) -> None:
        self._measure("test", batch["x"])

    def _measure(self, stage: str, x0: State) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        found = report(self.exact, self.sampler, self.denoiser(), self.times, self.denoise, self.samples, draw)
        data = self.exact.data[self.exact.data > 0]
        found["entropy"] = float(-(data * data.log2()).sum()) / x0.shape[1]
        if self.predicts == "x0":
            bound = likelihood_bound(self.process, self.predict, x0, self.high, self.low, self.draws, draw)
            found["bits"] = float(bound.mean()) / math.log(2) / x0.shape[1]
        self.log_dict({self.metric(f"{stage}/{name}"): value for name, value in found.items()}, batch_size=1)
        if stage == "val":
            for name, value in ({"step": float(self.global_step)} | found).items():
                self.history.setdefault(name, []).append(value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = {name: list(values) for name, values in checkpoint["history"].items()}

    def figures(self) -> dict[str, Figure]:
        """Errors while training, and the probability of each state in the samples against that in the data."""
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for name in SHOWN:
            if self.history.get(name):
                axes[0].plot(self.history["step"], self.history[name], marker="o", markersize=3, label=name)
        axes[0].set(yscale="log", xlabel="training steps", title=f"{type(self.sampler).__name__}: exact errors (nats)")
        axes[0].legend(fontsize=8)
        try:
            found = self.law()
        except ValueError:  # a sampler whose law is not known
            figure.delaxes(axes[1])
            return {"law": figure}
        self._compare(axes[1], found)
        return {"law": figure}

    def _compare(self, axis: plt.Axes, found: Law) -> None:
        wanted = on_states(self.exact.data, self.exact.space)
        shown = wanted > 0
        axis.plot(wanted[shown], found[shown], ".", markersize=4)
        ends = [float(wanted[shown].min()), float(wanted.max())]
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="probability in the data", ylabel="probability in the samples")
        axis.set_title(self.origin)


def noise_features(noise: Float[Tensor, " batch"]) -> Float[Tensor, "batch 9"]:
    """Functions of the noise on the scales at which posteriors change."""
    kept, log = torch.exp(-noise), noise.clamp(1e-6, 1e3).log()
    waves = [wave(k * log) for k in (0.5, 1.0) for wave in (torch.sin, torch.cos)]
    return torch.stack([kept, kept**2, kept.sqrt(), torch.expm1(-noise) ** 2, log / 4, *waves], 1)


def _check_loss(loss: str, predicts: str) -> None:
    if predicts not in ("x0", "score"):
        raise ValueError(f"model.predicts={predicts}: there are x0 and score")
    if loss not in LOSSES:
        raise ValueError(f"model.loss={loss}: there are {', '.join(LOSSES)}")
    if (loss == "score_entropy") != (predicts == "score"):
        raise ValueError(
            f"model.loss={loss} does not train model.predicts={predicts}: score_entropy trains log-scores, the others "
            "the logits of a posterior"
        )
