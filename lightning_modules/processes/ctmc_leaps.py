"""Samplers with one evaluation a step, after which all coordinates move independently."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.processes.ctmc import Denoiser, Time
from lightning_modules.processes.ctmc_kernels import Absorbing, Letters, State, normalised, one_hot
from lightning_modules.processes.ctmc_samplers import Leap, with_mask

Transition = Float[Tensor, "batch d size"]


class RateLeap(Leap):
    """A leap that knows the rates at its beginning; `leap` says how often a coordinate then moves.

    `corrector` = 1 takes those of the reverse chain, 0 those of discrete flow matching, and values >= 0 between and
    beyond.
    """

    def __init__(self, corrector: float = 1.0) -> None:
        if corrector < 0:
            raise ValueError(f"corrector={corrector} makes rates negative: 1 is the reverse chain, 0 flow matching")
        self.corrector = corrector

    def leap(self, total: Float[Tensor, "batch d 1"]) -> Float[Tensor, "batch d 1"]:
        """The probability that a coordinate moves, whose rates integrate to `total` over the step."""
        raise NotImplementedError

    def transition(self, denoiser: Denoiser, x: State, t: Time, u: Time) -> Transition:
        jumps = denoiser.jumps(x, t, t, u, self.corrector)
        total = jumps.sum(-1, keepdim=True)
        moves = with_mask(jumps / total.clamp_min(torch.finfo(jumps.dtype).tiny), denoiser.process.kernel)
        leaving = self.leap(total)
        return leaving * moves + (1 - leaving) * one_hot(x, denoiser.process.kernel.size, jumps.dtype)


class EulerJump(RateLeap):
    """A jump with probability h times the rate, clipped at 1 (SEDD's default, arXiv 2310.16834)."""

    def leap(self, total: Float[Tensor, "batch d 1"]) -> Float[Tensor, "batch d 1"]:
        return total.clamp_max(1)


class TauExp(RateLeap):
    """A jump with probability 1 - e^(-h rate), the letter by its rate: tau-leaping for letters."""

    def leap(self, total: Float[Tensor, "batch d 1"]) -> Float[Tensor, "batch d 1"]:
        return -torch.expm1(-total)


class PoissonTau(RateLeap):
    """Poisson numbers of jumps to every letter, kept where there is one in all (arXiv 2205.14987).

    Letters have no order in which several jumps could be added: the truncated form rejects them.
    """

    def leap(self, total: Float[Tensor, "batch d 1"]) -> Float[Tensor, "batch d 1"]:
        return total * torch.exp(-total)


class Tweedie(Leap):
    """The letter given its successor, from the score alone: s undone by the noise of the step, times K_h (SEDD).

    Exact for product data. K_h is that of the difference of the noises.
    """

    def transition(self, denoiser: Denoiser, x: State, t: Time, u: Time) -> Transition:
        process = denoiser.process
        kernel, score, length = process.kernel, denoiser.score(x, t), process.noise(t) - process.noise(u)
        if isinstance(kernel, Absorbing):
            return self._unmasked(kernel, score, x, length)
        undone = torch.exp(length) * score - torch.expm1(length) * score.mean(-1, keepdim=True)
        return normalised((undone * kernel.likelihood(x, length)).clamp_min(0))

    def _unmasked(self, kernel: Absorbing, score: Letters, x: State, length: Float[Tensor, "..."]) -> Transition:
        """s (e^h - 1) to letters, 1 - (e^h - 1) sum s to stay: what is left of a mask."""
        moves = torch.where(kernel.open(x)[..., None], score * torch.expm1(length), 0.0)
        stays = (1 - moves.sum(-1, keepdim=True)).clamp_min(0)
        return normalised(with_mask(moves, kernel) + stays * one_hot(x, kernel.size, score.dtype))


class Ancestral(Leap):
    """q(x_u | x_t, x_0) for every letter, x_0 drawn from the posterior (D3PM; MDLM, arXiv 2406.07524).

    A mask goes with probability (m_t - m_u) / m_t, m being the share of masks. Where predictions are consistent it is
    `Tweedie`'s rule from the posterior instead of the score, without dividing by small noise.
    """

    def transition(self, denoiser: Denoiser, x: State, t: Time, u: Time) -> Transition:
        process = denoiser.process
        kernel, posterior, at, to = process.kernel, denoiser.posterior(x, t), process.noise(t), process.noise(u)
        if isinstance(kernel, Absorbing):
            leaving = -torch.expm1(-process.exposure(t, u)) * kernel.open(x)[..., None]
            return leaving * with_mask(posterior, kernel) + (1 - leaving) * one_hot(x, kernel.size, posterior.dtype)
        weights = posterior / kernel.likelihood(x, at)
        earlier = torch.exp(-to) * weights - torch.expm1(-to) * weights.mean(-1, keepdim=True)
        return normalised(earlier * kernel.likelihood(x, at - to))


class DFM(Leap):
    """Discrete flow matching (arXiv 2407.15595): with probability 1 - m_u / m_t a coordinate is drawn anew.

    The exact step of its chain with the posterior frozen, m = 1 - e^-sigma. `corrector` = c > 0 follows it by a
    `TauExp` step of c times the rates that leave q_t invariant, which only the uniform kernel has.
    """

    def __init__(self, corrector: float = 0.0) -> None:
        if corrector < 0:
            raise ValueError(f"corrector={corrector} must not be negative")
        self.corrector = corrector

    def transition(self, denoiser: Denoiser, x: State, t: Time, u: Time) -> Transition:
        process, kernel = denoiser.process, denoiser.process.kernel
        posterior, here = denoiser.posterior(x, t), one_hot(x, kernel.size, torch.float64)
        kept = torch.expm1(-process.noise(u)) / torch.expm1(-process.noise(t))
        drawn_anew = (1 - kept) * with_mask(posterior, kernel) + kept * here
        extra = kernel.corrector(posterior, x, process.noise(t)).sum(-1, keepdim=True)
        leaving = -torch.expm1(-self.corrector * process.exposure(t, u) * extra)
        others = with_mask((1 - here[..., : kernel.letters]) / (kernel.letters - 1), kernel)
        return drawn_anew + leaving * drawn_anew.gather(-1, x[..., None]) * (others - here)
