"""What a prior is tried on: known densities, measured in silico, restored, and compared with simple ways to do it.

A task measures a density into half maps, and from these alone says what the measurement was: the noise spectrum is
estimated as it would be for real half maps. Every restoration is reported beside the observation and the baselines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lightning_modules.cryo import baselines
from lightning_modules.cryo.fourier import auc, fsc
from lightning_modules.cryo.operators import (
    FourierOperator,
    Half,
    Spectra,
    amplified,
    anisotropic_noise,
    estimated,
    logistic_fsc,
    missing_wedge,
    noise_for,
    spectral_noise,
)
from lightning_modules.cryo.posterior import Guidance, Replacement, draw
from lightning_modules.cryo.restoration import seeded
from lightning_modules.processes.ode import Sampler
from lightning_modules.processes.prediction import Prediction

Cubes = Float[Tensor, "map n n n"]
Halves = Float[Tensor, "map half n n n"]


@runtime_checkable
class Task(Protocol):
    """A kind of measurement."""

    def measure(self, truth: Float[Tensor, "n n n"], generator: torch.Generator) -> Float[Tensor, "half n n n"]: ...

    def operator(self, halves: Halves) -> FourierOperator: ...

    def baselines(self, halves: Halves, operator: FourierOperator) -> dict[str, Cubes]: ...


@dataclass(frozen=True)
class Denoise:
    """Two half maps with noise whose FSC is sigmoid(`falls_at` - shell), a plausible curve."""

    falls_at: float = 5.0

    def measure(self, truth: Float[Tensor, "n n n"], generator: torch.Generator) -> Float[Tensor, "half n n n"]:
        power = noise_for(truth, logistic_fsc(truth.shape[-1], self.falls_at))
        return self._noise(power, truth.shape[-1]).measure(truth.expand(2, -1, -1, -1), generator)

    def operator(self, halves: Halves) -> FourierOperator:
        return self._noise(self._spectra(halves).noise, halves.shape[-1])

    def baselines(self, halves: Halves, operator: FourierOperator) -> dict[str, Cubes]:
        spectra, observed = self._spectra(halves), halves.mean(1)
        return {
            "wiener": baselines.wiener(observed, spectra.data_weight.clamp(min=1e-4)),
            "soft_mask": baselines.soft_masked(observed, spectra.correlation),
        }

    def _spectra(self, halves: Halves) -> Spectra:
        return estimated(halves[:, 0], halves[:, 1])

    def _noise(self, power: Float[Tensor, "*batch shells"], side: int) -> FourierOperator:
        return spectral_noise(power, side)


@dataclass(frozen=True)
class Anisotropic(Denoise):
    """The same, with noise that is `times` stronger in the wedge more than `tilt` degrees out of the sample plane."""

    tilt: float = 45.0
    times: float = 50.0

    def _noise(self, power: Float[Tensor, "*batch shells"], side: int) -> FourierOperator:
        return anisotropic_noise(power, amplified(side, self.tilt, self.times))


@dataclass(frozen=True)
class Wedge:
    """A tomogram from a tilt series of +-`tilt` degrees without noise: one map, part of whose spectrum is missing."""

    tilt: float = 60.0

    def measure(self, truth: Float[Tensor, "n n n"], generator: torch.Generator) -> Float[Tensor, "half n n n"]:
        return missing_wedge(truth.shape[-1], self.tilt)(truth)[None]

    def operator(self, halves: Halves) -> FourierOperator:
        return missing_wedge(halves.shape[-1], self.tilt)

    def baselines(self, halves: Halves, operator: FourierOperator) -> dict[str, Cubes]:
        return {"positivity": baselines.positive(halves[:, 0], operator)}


@dataclass(frozen=True)
class NoisyWedge(Denoise):
    """Two half tomograms: noise, then the wedge."""

    tilt: float = 60.0

    def measure(self, truth: Float[Tensor, "n n n"], generator: torch.Generator) -> Float[Tensor, "half n n n"]:
        return missing_wedge(truth.shape[-1], self.tilt)(super().measure(truth, generator))

    def operator(self, halves: Halves) -> FourierOperator:
        return missing_wedge(halves.shape[-1], self.tilt) @ super().operator(halves)

    def _spectra(self, halves: Halves) -> Spectra:
        seen: Half = missing_wedge(halves.shape[-1], self.tilt).gain
        return estimated(halves[:, 0], halves[:, 1], seen)


class Trial(NamedTuple):
    """A task done: maps by name (truth, observed, baselines, restored), and their FSC curves with the truth."""

    maps: dict[str, Cubes]
    curves: dict[str, Float64[Tensor, "map shells"]]

    @property
    def scores(self) -> dict[str, Float64[Tensor, " map"]]:
        """FSC-AUC of every map, by name."""
        return {name: auc(curve) for name, curve in self.curves.items()}


@dataclass(frozen=True)
class Trials:
    """How tasks are tried: guidance and sampler, its steps, draws that are averaged, maps at once.

    Measurements without noise are always restored by `Replacement`.
    """

    tasks: dict[str, Task]
    guidance: Guidance
    sampler: Sampler
    steps: int = 50
    draws: int = 1
    maps: int = 16

    def __post_init__(self) -> None:
        for name in ("steps", "draws", "maps"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.trials.{name}={getattr(self, name)}: at least 1")

    def __call__(
        self,
        name: str,
        prior: Prediction,
        units: tuple[float, float],
        truths: Cubes,
        places: Sequence[int],
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Trial:
        """Measure and restore these densities; `units` are mean and std of the prior's.

        What is random about a map depends on the seed and its place alone.
        """
        task = self.tasks[name]
        halves = torch.stack(
            [task.measure(truth.cpu(), seeded(seed, name, place)) for truth, place in zip(truths, places)]
        )
        operator = task.operator(halves)
        found = {"truth": truths.cpu(), "observed": halves.mean(1), **task.baselines(halves, operator)}
        found["restored"] = self._restored(operator, prior, units, halves.to(truths), places, seed, progress).cpu()
        curves = {kind: fsc(maps, found["truth"]) for kind, maps in found.items() if kind != "truth"}
        return Trial(found, curves)

    def _restored(
        self,
        operator: FourierOperator,
        prior: Prediction,
        units: tuple[float, float],
        halves: Halves,
        places: Sequence[int],
        seed: int,
        progress: Callable[[int, int], None] | None,
    ) -> Cubes:
        mean, std = units
        guidance = Replacement() if operator.exact else self.guidance
        grid = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        operator, total = operator.to(halves.device, halves.dtype), torch.zeros_like(halves[:, 0])
        for number in range(self.draws):
            for half in range(halves.shape[1]):
                measured, inner = operator.standardised(halves[:, half], mean, std)
                sources = [seeded(seed, place, number, half) for place in places]
                noise = torch.stack([torch.randn(measured.shape[1:], generator=source) for source in sources])
                drawn = draw(prior, guidance, inner, measured, noise.to(measured), self.sampler, grid, progress)
                total += drawn * std + mean
        return total / (self.draws * halves.shape[1])


def scores_csv(scores: dict[str, dict[str, Float64[Tensor, " map"]]]) -> str:
    """FSC-AUC by task, kind and map, a line each."""
    lines = [
        f"{task},{kind},{number},{score:.6f}"
        for task, kinds in scores.items()
        for kind, found in kinds.items()
        for number, score in enumerate(found.tolist())
    ]
    return "\n".join(["task,kind,map,fsc_auc", *lines, ""])


def score_table(scores: dict[str, dict[str, Float64[Tensor, " map"]]]) -> str:
    """A table in Markdown: means with their range, and in how many maps each was beaten by the restoration."""
    lines = [
        "FSC-AUC with the truth of held-out maps that were measured in silico.",
        "",
        "| task | | mean | lowest ... highest | restoration is better in |",
        "|---|---|---|---|---|",
    ]
    for task, kinds in scores.items():
        for kind, found in kinds.items():
            won = f"{int((kinds['restored'] > found).sum())} of {len(found)}" if kind != "restored" else ""
            extremes = f"{found.min():.3f} ... {found.max():.3f}"
            lines.append(f"| {task} | {kind.replace('_', ' ')} | {found.mean():.3f} | {extremes} | {won} |")
    return "\n".join([*lines, ""])
