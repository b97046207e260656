"""The noise-free laboratory of deterministic samplers: a density, a path, and the exact law of what a sampler makes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from datamodules.batches import Mixture
from lightning_modules.processes.ode import Sampler, sample
from lightning_modules.processes.paths import Path
from lightning_modules.processes.prediction import Predict, Prediction
from lightning_modules.theory.mixtures import NoisedMixture, exact
from lightning_modules.theory.transport import kl, log_normal, nodes, total_variation, transported

Grid = Float[Tensor, " times"]
MakeGrid = Callable[[Path, int, float, float], Grid]
Error = Callable[[Float[Tensor, "batch d"], Float[Tensor, " batch"]], Float[Tensor, "batch d"]]


@dataclass(frozen=True)
class Laboratory:
    """Samplers run from noise at `start` to `stop`, on the exact predictions of a mixture of this `kind`.

    `points` are the nodes along an axis of the integrals over the starting noise.
    """

    mixture: Mixture
    path: Path
    kind: str
    start: float
    stop: float
    points: int | None = None

    @cached_property
    def law(self) -> NoisedMixture:
        return NoisedMixture(self.mixture)

    @property
    def d(self) -> int:
        return self.mixture.means.shape[1]

    @cached_property
    def prediction(self) -> Prediction:
        return recomputed(self.path, exact(self.mixture, self.path, self.kind), self.kind)

    def grid(self, make: MakeGrid, steps: int) -> Grid:
        return make(self.path, steps, self.start, self.stop)

    def log_ratio(self, sampler: Sampler, grid: Grid, prediction: Prediction | None = None) -> "Transport":
        """What `sampler` makes of standard normal noise at the nodes, and how its law compares with the target's."""
        z, volume = nodes(self.d, self.points)
        scale = self.path.prior_std(grid[0])
        flow = lambda z: sample(sampler, prediction or self.prediction, scale * z, grid)  # noqa: E731
        x, log_det = transported(flow, z)
        return Transport(z, volume, log_normal(z), self.log_density(x, grid[-1]), log_det)

    def log_density(self, x: Float[Tensor, "batch d"], t: Float[Tensor, ""]) -> Float[Tensor, " batch"]:
        """log q_t(x), the law that a perfect sampler would have at t."""
        return self.law.log_density(x, self.path.alpha(t), self.path.sigma(t))

    def initial_error(self) -> float:
        """TV(prior, q_start): what starting from a Gaussian costs, whatever the sampler."""
        z, volume = nodes(self.d, self.points)
        t = torch.tensor(self.start, dtype=torch.float64)
        scale = self.path.prior_std(t)
        log_scale = torch.full((len(z),), self.d * math.log(float(scale)), dtype=torch.float64)
        return total_variation(log_normal(z), self.log_density(scale * z, t), log_scale, volume)


@dataclass(frozen=True)
class Transport:
    """A map at the nodes z: log density of z, of the target at its image, and its log determinant."""

    z: Float[Tensor, "batch d"]
    volume: float
    log_from: Float[Tensor, " batch"]
    log_to: Float[Tensor, " batch"]
    log_det: Float[Tensor, " batch"]

    @property
    def tv(self) -> float:
        return total_variation(self.log_from, self.log_to, self.log_det, self.volume)

    @property
    def kl(self) -> float:
        return kl(self.log_from, self.log_to, self.log_det, self.volume)

    @property
    def log_ratio(self) -> Float[Tensor, " batch"]:
        """log of output over target density, at the image of z."""
        return self.log_from - self.log_det - self.log_to


def recomputed(path: Path, predict: Predict, kind: str) -> Prediction:
    """A prediction whose inner values are computed again when the map is differentiated, instead of kept."""
    return Prediction(path, lambda x, t: checkpoint(predict, x, t, use_reentrant=False), kind)


def perturbed(exact_score: Predict, error: Error) -> Predict:
    """s + e."""
    return lambda x, t: exact_score(x, t) + error(x, t)


def tv_rate(
    laboratory: Laboratory, error: Error, t: Float[Tensor, ""], points: int | None = None
) -> tuple[float, float, float]:
    """g^2/4 times E_q|div e + e.s|, E|e.s| and E|div e| over q_t: what an error e of the score adds to TV per time.

    For densities p, q moved by fields f, g: d/dt TV <= 1/2 E_q|div (f - g) + (f - g).grad log q|, with equality where
    p = q. For a probability-flow equation f - g = g_t^2/2 e.
    """
    z, volume = nodes(laboratory.d, points)
    alpha, sigma = laboratory.path.alpha(t), laboratory.path.sigma(t)
    spread = torch.sqrt(alpha**2 * _variance(laboratory.mixture) + sigma**2)
    x = (alpha * laboratory.mixture.weights @ laboratory.mixture.means + spread * z).requires_grad_()
    with torch.enable_grad():
        e = error(x, t.expand(len(x)))
        pieces = [torch.autograd.grad(e[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(laboratory.d)]
    x, e, divergence = x.detach(), e.detach(), torch.stack(pieces).sum(0).detach()
    along = (e * laboratory.law.score(x, alpha, sigma)).sum(1)
    mass = laboratory.log_density(x, t).exp() * volume * spread**laboratory.d * laboratory.path.diffusion(t) / 2
    parts = (divergence + along, along, divergence)
    return tuple(float((mass * part.abs()).sum()) for part in parts)


def tv_bound(laboratory: Laboratory, error: Error, times: int, points: int | None = None) -> tuple[float, float, float]:
    """The integrals of `tv_rate` from stop to start, on times that are equally spaced in log(alpha / sigma)."""
    ends = laboratory.path.log_snr(torch.tensor([laboratory.start, laboratory.stop], dtype=torch.float64)).tolist()
    t = laboratory.path.time(torch.linspace(*ends, times, dtype=torch.float64))
    rates = torch.tensor([tv_rate(laboratory, error, one, points) for one in t], dtype=torch.float64)
    return tuple(torch.trapezoid(rates.flip(0), t.flip(0), dim=0).tolist())


def _variance(mixture: Mixture) -> float:
    """The mean variance of a coordinate, by which nodes are spread."""
    mean = mixture.weights @ mixture.means
    squares = torch.diagonal(mixture.covariances, dim1=1, dim2=2) + (mixture.means - mean) ** 2
    return float((mixture.weights @ squares).mean())
