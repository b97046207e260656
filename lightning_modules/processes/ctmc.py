"""A categorical process on [S]^d, a continuous-time Markov chain, and what a network or a formula predicts along it.

Noise is at large t and data at t = 0. Times are scalars, one per sample, or one per sample and position, as (batch, d);
positions whose times differ may belong to different modalities.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_modules.processes.ctmc_kernels import Kernel, Letters, Noise, State, normalised, one_hot
from lightning_modules.processes.ctmc_schedules import Schedule

KINDS = ("posterior", "logits", "score", "log_score")
Time = Float[Tensor, "*times"]
Predict = Callable[[State, Time], Letters]
Guide = Callable[[State, Time, Letters, Letters], Letters]  # (x, t, posterior, score) -> score


class CTMC:
    """A kernel along a noise schedule."""

    def __init__(self, kernel: Kernel, schedule: Schedule) -> None:
        self.kernel, self.schedule = kernel, schedule

    def noise(self, t: Time) -> Noise:
        """sigma(t), shaped to be broadcast against (batch, d, letters)."""
        sigma = self.schedule.noise(t.double())
        return sigma.reshape({0: (1, 1, 1), 1: (-1, 1, 1)}.get(t.ndim, (*t.shape, 1)))

    def sample(self, x0: State, t: Time, draw: torch.Generator | None = None) -> State:
        """x_t given the data; ValueError for times outside of the schedule."""
        self.schedule.check(t)
        return self.kernel.noised(x0, self.noise(t), draw)

    def middle(self, t: Time, u: Time) -> Time:
        """The time whose noise is the mean of those at t and u."""
        schedule = self.schedule
        return schedule.time((schedule.noise(t) + schedule.noise(u)) / 2)

    def exposure(self, t: Time, u: Time) -> Noise:
        """The length of the step t -> u in the clock of the reverse rates."""
        return self.kernel.clock(self.noise(t)) - self.kernel.clock(self.noise(u))


class Denoiser:
    """`predict(x, t)` of the given `kind` along a process, answering as posterior, score or reverse rates.

    `predict` sees states and one time per sample (per position, where times are given so), and rows in any selection:
    what belongs to a row must be in its state. `fixed` positions never change; `allowed` letters are all that a
    position may become. `guide` multiplies scores, hence rates. `ceiling` clips scores. `evaluations` counts the rows
    evaluated, `clipped` the scores clipped.
    """

    def __init__(
        self,
        process: CTMC,
        predict: Predict,
        kind: str,
        *,
        fixed: Bool[Tensor, "*fixed d"] | None = None,
        allowed: Bool[Tensor, "*allowed d letters"] | None = None,
        guide: Guide | None = None,
        ceiling: float | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"there is no prediction of kind {kind!r}: take one of {', '.join(KINDS)}")
        self.process, self.predict, self.kind = process, predict, kind
        self.fixed, self.allowed, self.guide, self.ceiling = fixed, allowed, guide, ceiling
        self.evaluations = self.clipped = 0

    def posterior(self, x: State, t: Time, copied: bool = True) -> Letters:
        """p(x_0^i = . | x_t), restricted to allowed letters.

        Certain where the process leaves no doubt; without `copied` what is predicted also there.
        """
        form, value = self._evaluated(x, t)
        kernel = self.process.kernel
        posterior = value if form == "posterior" else kernel.posterior(value, x, self.process.noise(t))
        posterior = posterior if self.allowed is None else normalised(posterior * self.allowed)
        return kernel.copied(posterior, x) if copied else posterior

    def score(self, x: State, t: Time) -> Letters:
        """q_t(x with letter a at i) / q_t(x)."""
        form, value = self._evaluated(x, t)
        return value if form == "score" else self._clipped(self._scored(value, x, t))

    def rates(self, x: State, at: Time, corrector: float = 1.0) -> Letters:
        """Reverse rates at a time to every other letter, per unit of the kernel's clock.

        `corrector` = 1 is the reverse chain, 0 discrete flow matching; any value >= 0 leaves q_t invariant.
        """
        form, value = self._evaluated(x, at)
        kernel, noise = self.process.kernel, self.process.noise(at)
        rates = (kernel.rates if form == "score" else kernel.rates_of_posterior)(value, x, noise)
        if corrector != 1:
            posterior = value if form == "posterior" else kernel.posterior(value, x, noise)
            rates = (rates + (corrector - 1) * kernel.corrector(posterior, x, noise)).clamp_min(0)
        rates = rates if self.allowed is None else rates * self.allowed
        return rates * self.free(x)[..., None]

    def jumps(self, x: State, at: Time, t: Time, u: Time, corrector: float = 1.0) -> Letters:
        """The rates over the step t -> u, integrated, with the prediction frozen at time `at`."""
        return self.rates(x, at, corrector) * self.process.exposure(t, u)

    def held(self, transition: Float[Tensor, "batch d size"], x: State) -> Float[Tensor, "batch d size"]:
        """Probabilities of the next state of each coordinate, fixed ones unchanged and letters among the allowed."""
        if self.allowed is not None:
            kept = torch.zeros_like(transition, dtype=torch.bool)
            kept[..., : self.process.kernel.letters] = self.allowed
            transition = normalised(transition * (kept | one_hot(x, transition.shape[-1], torch.bool)))
        stays = one_hot(x, transition.shape[-1], transition.dtype)
        return torch.where(self.free(x)[..., None], transition, stays)

    def free(self, x: State) -> Bool[Tensor, "batch d"]:
        """The positions that may change: those that the kernel leaves open and nobody fixed."""
        opened = self.process.kernel.open(x)
        return opened if self.fixed is None else opened & ~self.fixed

    def rows(self, chosen: Any) -> "Denoiser":
        """This denoiser for a selection of the rows; evaluations are still counted here."""
        return _Selected(self, chosen)

    def count(self, rows: int) -> None:
        """Note that so many rows were evaluated."""
        self.evaluations += rows

    def _evaluated(self, x: State, t: Time) -> tuple[str, Letters]:
        self.count(len(x))
        value = self.predict(x, (t.double() if t.ndim == 2 else t.double().expand(len(x))).to(x.device))
        value = {"logits": lambda v: v.softmax(-1), "log_score": torch.exp}.get(self.kind, lambda v: v)(value)
        form = {"logits": "posterior", "log_score": "score"}.get(self.kind, self.kind)
        if form == "score":
            value = self._clipped(value)
        return (form, value) if self.guide is None else ("score", self._guided(x, t, form, value))

    def _guided(self, x: State, t: Time, form: str, value: Letters) -> Letters:
        score = value if form == "score" else self._scored(value, x, t)
        posterior = value if form == "posterior" else self.process.kernel.posterior(value, x, self.process.noise(t))
        return self._clipped(self.guide(x, t, posterior, score))

    def _scored(self, posterior: Letters, x: State, t: Time) -> Letters:
        return self.process.kernel.score(posterior, x, self.process.noise(t))

    def _clipped(self, score: Letters) -> Letters:
        if self.ceiling is None:
            return score
        self.clipped += int((score > self.ceiling).sum())
        return score.clamp_max(self.ceiling)


class _Selected(Denoiser):
    """A denoiser for some rows of a batch."""

    def __init__(self, whole: Denoiser, chosen: Any) -> None:
        self.__dict__.update(whole.__dict__)
        self.whole = whole
        for name, dimensions in (("fixed", 2), ("allowed", 3)):
            table = getattr(whole, name)
            if table is not None and table.ndim == dimensions:
                setattr(self, name, table[chosen])

    def count(self, rows: int) -> None:
        self.whole.count(rows)
