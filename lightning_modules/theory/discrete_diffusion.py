"""The laboratory of discrete diffusion: how far a sampler's law is from the data's, exactly (arXiv 2410.02321)."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.processes import ctmc_grids
from lightning_modules.processes.ctmc import CTMC, Denoiser, Time
from lightning_modules.processes.ctmc_jumps import Exact
from lightning_modules.processes.ctmc_kernels import Kernel, Letters, State
from lightning_modules.processes.ctmc_samplers import CategoricalSampler, Jumps, Leap, check_kernel, sample
from lightning_modules.processes.ctmc_schedules import Schedule
from lightning_modules.processes.exact_law import ExactLaw, counted, kl, on_states, path_bound, tv, tv_floor
from lightning_modules.theory.simulation import Measured
from lightning_modules.theory.sweep import Sweep

GRIDS = ("uniform", "kappa", "cosine")


@dataclass(frozen=True)
class Setting:
    """One experiment: sizes of the data (None: as they are), the grid, and the error of the score.

    `start` and `delta` are the times at which the sampler starts and stops; a grid has `steps`, or steps of `kappa`
    in the noise. `tilt` adds +eta to the log-score of letter 1 and -eta to that of letter 0 at all times; `jitter`
    adds independent normal noise with that deviation to every log-score, new at every time.
    """

    grid: str
    steps: int
    kappa: float
    start: float
    delta: float
    tilt: float = 0.0
    jitter: float = 0.0
    dimension: int | None = None
    letters: int | None = None

    def times(self, schedule: Schedule) -> Float[Tensor, " times"]:
        """The grid; ValueError with the key that is wrong."""
        if self.grid not in GRIDS:
            raise ValueError(f"model.grid={self.grid}: there are {', '.join(GRIDS)}")
        fineness = {"kappa": self.kappa} if self.grid == "kappa" else {"steps": self.steps}
        try:
            return getattr(ctmc_grids, self.grid)(schedule, self.start, self.delta, **fineness)
        except ValueError as error:
            raise ValueError(f"model.grid={self.grid} (model.start, delta, steps, kappa): {error}") from error


class DiscreteDiffusion(Sweep):
    """A sampler with exact scores, `tilt`ed or `jitter`ed scores, on every copy of a target, along one axis.

    Measured in nats, on all states: `kl` and `tv` of q_delta and the sampler's law, `tv_data` of the data and that
    law, `truncation` KL(q_T || the start), `path` the path-space divergence (frozen rates only; truncation + path
    bounds kl), `score_error` the part of it at the grid, `evaluations` of the network a sample, on average. A sampler
    whose law cannot be propagated is compared by `samples` draws: `tv` beside the `floor` that is noise.
    """

    headline: ClassVar[tuple[str, str]] = ("val/tv_data", "min")
    columns: ClassVar[dict[str, Callable[[float], str]]] = {
        **{f"{name}@": "{:.2e}".format for name in ("kl", "path", "tv_data")},
        **{f"{name}_slope": "{:.2f}".format for name in ("kl", "path", "tv_data")},
    }
    caption: ClassVar[str] = "nats; means over the copies of the target, by point of the axis; slopes as fitted"
    log_log: ClassVar[tuple[str, ...]] = ("kl", "tv_data", "path", "truncation")
    drawn: ClassVar[dict[str, str]] = {
        "kl": "KL(q_delta || sampler)",
        "path": "path bound",
        "truncation": "truncation KL(q_T || start)",
        "tv_data": "TV(data, sampler)",
        "floor": "sampling noise of TV",
    }
    tabled: ClassVar[tuple[str, ...]] = ("kl",)
    linear: ClassVar[tuple[str, ...]] = ("start",)
    axis_labels: ClassVar[dict[str, str]] = {
        "steps": "steps N",
        "dimension": "dimension d",
        "letters": "letters S",
        "start": "horizon T",
        "tilt": "score error eta (log-scores)",
        "jitter": "independent score noise (log-scores)",
    }

    def __init__(
        self,
        kernel: Callable[[int], Kernel],
        noise: Schedule,
        sampler: CategoricalSampler | Any,
        grid: str,
        steps: int,
        kappa: float,
        start: float,
        delta: float,
        tilt: float,
        jitter: float,
        against: str,
        values: Sequence[float | int],
        fit: Sequence[float | int] | None,
        samples: int,
        denoise: bool,
        seed: int,
    ) -> None:
        super().__init__(against, values, fit)
        check_space(sampler)
        self.kernel, self.noise, self.sampler = kernel, noise, sampler
        self.setting = Setting(grid, steps, kappa, start, delta, tilt, jitter)
        axes = [field.name for field in dataclasses.fields(Setting) if field.name != "grid"]
        if against not in axes:
            raise ValueError(f"model.against={against}: there are {', '.join(axes)}")
        self.samples, self.denoise, self.seed = samples, denoise, seed

    def meet(self, data: L.LightningDataModule) -> None:
        """Look at every point before the first is measured: sizes, grids and the kernel of the sampler."""
        if not hasattr(data, "law"):
            raise ValueError(f"data={data.name} has no law of letters: take data=simulated_categories")
        super().meet(data)
        self.data = data
        check_kernel(self.sampler, self.kernel(data.letters))
        for setting in map(self._at, self.values):
            times = setting.times(self.noise)
            law = data.law(0, setting.dimension, setting.letters)
            if float(times[-1]) == 0 and not bool((law > 0).all()) and self.kernel(data.letters).size == data.letters:
                raise ValueError(
                    f"model.delta=0 needs data of full support, and {int((law == 0).sum())} of {law.numel()} states "
                    "have probability zero: stop early, such as model.delta=0.01"
                )

    def measure(self, value: float | int) -> Measured:
        setting = self._at(value)
        rows = [self._measured(setting, copy) for copy in range(self.data.copies)]
        return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}

    def _at(self, value: float | int) -> Setting:
        whole = self.against in ("steps", "dimension", "letters")
        return dataclasses.replace(self.setting, **{self.against: int(value) if whole else float(value)})

    def _measured(self, setting: Setting, copy: int) -> dict[str, float]:
        data = self.data.law(copy, setting.dimension, setting.letters)
        law = ExactLaw(CTMC(self.kernel(data.shape[0]), self.noise), data)
        denoiser, grid = erring(law, setting.tilt, setting.jitter, self.seed + copy), setting.times(self.noise)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + copy)
        return report(law, self.sampler, denoiser, grid, self.denoise, self.samples, draw)

    @property
    def title(self) -> str:
        target = self.data.source.origin if hasattr(self, "data") else ""
        return f"{type(self.sampler).__name__}: {target}, {self.data.copies} copies"


def check_space(sampler: object) -> None:
    """ValueError for a sampler of another space."""
    if getattr(sampler, "space", None) != "categorical":
        raise ValueError(
            f"{type(sampler).__name__} moves points, and the states here are letters: take sampler=frozen, frozen_mid, "
            "uniformization, euler_jump, tau_exp, poisson_tau, tweedie, dfm, ancestral, first_hitting or an order"
        )


def erring(law: ExactLaw, tilt: float, jitter: float, seed: int) -> Denoiser:
    """The exact score with errors in its logarithm, a tilt towards letter 1 and noise that is new at every time."""
    if not tilt and not jitter:
        return law.denoiser()
    tilts = torch.zeros(law.space.letters, dtype=torch.float64)
    tilts[:2] = torch.tensor([-tilt, tilt])

    def score(x: State, t: Time) -> Letters:
        score = law.score(x, t) * tilts.exp()
        if not jitter:
            return score
        number = int(float(t.reshape(-1)[0]) * 2**40) % 2**31
        draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
        table = torch.randn(law.space.count, law.space.d, law.space.letters, generator=draw, dtype=torch.float64)
        return score * (jitter * table).exp()[law.space.number(x)]

    return Denoiser(law.process, score, "score")


def report(
    law: ExactLaw,
    sampler: CategoricalSampler,
    denoiser: Denoiser,
    grid: Float[Tensor, " times"],
    denoise: bool,
    samples: int,
    draw: torch.Generator,
) -> dict[str, float]:
    """Every number of a sampler along a grid: exact where its law is known, else of so many samples."""
    known = isinstance(sampler, Leap | Jumps | Exact)
    return (
        measured(law, sampler, denoiser, grid, denoise)
        if known
        else sampled(law, sampler, denoiser, grid, denoise, samples, draw)
    )


def sampled(
    law: ExactLaw,
    sampler: CategoricalSampler,
    denoiser: Denoiser,
    grid: Float[Tensor, " times"],
    denoise: bool,
    samples: int,
    draw: torch.Generator,
) -> dict[str, float]:
    """The distance of samples, and the `floor` that sampling noise alone is about."""
    x = law.process.kernel.limit((samples, law.space.d), draw)
    x = sample(sampler, denoiser, x, grid, draw, denoise=denoise)
    found, data = counted(x, law.space), on_states(law.data, law.space)
    wanted = data if denoise else law.noised(grid[-1])
    evaluations = denoiser.evaluations / samples
    return {
        "tv": tv(wanted, found),
        "tv_data": tv(data, found),
        "floor": tv_floor(wanted, samples),
        "evaluations": evaluations,
    }


def measured(
    law: ExactLaw, sampler: CategoricalSampler, denoiser: Denoiser, grid: Float[Tensor, " times"], denoise: bool = False
) -> dict[str, float]:
    """Every number of a sampler along a grid, from its exact law; what is defined for jumps only is left out."""
    now, moves = law.limit, 0.0
    for t, u in pairwise(grid.double()):
        after = law.step(sampler, denoiser, now, t, u)
        moves += 0.0 if isinstance(sampler, Exact) else law.moves(sampler, denoiser, now, after, t, u)
        now = after
    now = law.denoised(denoiser, now, grid[-1]) if denoise else now
    data, wanted = on_states(law.data, law.space), law.noised(grid[-1])
    found = {"kl": kl(data if denoise else wanted, now), "tv": tv(data if denoise else wanted, now)}
    found |= {"tv_data": tv(data, now), "truncation": kl(law.noised(grid[0]), law.limit)}
    if isinstance(sampler, Exact):
        return found
    steps = len(grid) - 1 + denoise
    if isinstance(sampler, Leap):
        return found | {"moves": moves, "evaluations": float(steps)}
    path = path_bound(law, sampler, denoiser, grid)
    bounded = {"path": path.total, "score_error": path.score, "bound": path.total + found["truncation"]}
    return found | bounded | {"moves": moves, "evaluations": steps + moves}
