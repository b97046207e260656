"""Gaussian probability paths x_t = alpha_t x_0 + sigma_t eps between data (t = 0) and noise (large t).

Coefficients are float64 whatever the state is; times are scalars or one per sample.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Time = Float[Tensor, "*times"]
State = Float[Tensor, "batch *shape"]
Weights = tuple[Time, Time]
KINDS = ("noise", "data", "velocity", "score")


class Path:
    """x_t = alpha_t x_0 + sigma_t eps for t in [0, `end`]: a subclass gives `alpha` and `sigma`.

    Everything else follows from the two; a subclass overrides what it knows in closed form.
    """

    end: float = 1.0

    def alpha(self, t: Time) -> Time:
        """The weight of the data, decreasing."""
        raise NotImplementedError

    def sigma(self, t: Time) -> Time:
        """The standard deviation of the noise, increasing from sigma_0 = 0."""
        raise NotImplementedError

    def log_snr(self, t: Time) -> Time:
        """lambda_t = log(alpha_t / sigma_t), half of the logarithm of the signal-to-noise ratio; decreasing."""
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def time(self, log_snr: Time) -> Time:
        """The t whose `log_snr` this is, by bisection."""
        low, high = torch.zeros_like(log_snr), torch.full_like(log_snr, self.end)
        for _ in range(100):
            middle = (low + high) / 2
            later = self.log_snr(middle) > log_snr
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        return high

    def rates(self, t: Time) -> Weights:
        """d alpha / dt and d sigma / dt."""
        one = torch.ones_like(t)
        return torch.func.jvp(self.alpha, (t,), (one,))[1], torch.func.jvp(self.sigma, (t,), (one,))[1]

    def diffusion(self, t: Time) -> Time:
        """g_t^2 / 2 of the diffusion with these marginals: sigma sigma' - sigma^2 alpha' / alpha."""
        (alpha_rate, sigma_rate), sigma = self.rates(t), self.sigma(t)
        return sigma * sigma_rate - sigma**2 * alpha_rate / self.alpha(t)

    def prior_std(self, t: Time) -> Time:
        """The standard deviation to start from at t: that of x_t for data of unit variance, 1 on VP at any t."""
        return torch.sqrt(self.alpha(t) ** 2 + self.sigma(t) ** 2)

    def score_gain(self, t: Time, u: Time) -> Time:
        """What a score frozen over the step t -> u adds to the state: alpha_u int_u^t g_r^2 / (2 alpha_r) dr."""
        nodes, weights = _legendre(t)
        r = u[..., None] + (t - u)[..., None] * nodes
        return self.alpha(u) * (t - u) * (self.diffusion(r) / self.alpha(r) * weights).sum(-1)

    def velocity_weights(self, t: Time) -> Weights:
        """The weights of data and noise in what a network of kind `velocity` predicts, by default dx/dt."""
        return self.rates(t)

    def weights(self, kind: str, t: Time) -> Weights:
        """a and b of a x_0 + b eps, for a prediction of this kind, for the `state` or for `drift`, which is dx/dt."""
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        match kind:
            case "state":
                return self.alpha(t), self.sigma(t)
            case "data":
                return one, zero
            case "noise":
                return zero, one
            case "score":
                return zero, -1 / self.sigma(t)
            case "velocity":
                return self.velocity_weights(t)
            case "drift":
                return self.rates(t)
        raise ValueError(f"there is no prediction of kind {kind!r}: take one of {', '.join(KINDS)}")

    def target(self, kind: str, data: State, noise: State, t: Time) -> State:
        """What a prediction of this `kind` should be where `data` and `noise` are known."""
        return combined(*self.weights(kind, t.double()), data, noise)

    def sample(self, data: State, noise: State, t: Time) -> State:
        """x_t = alpha_t x_0 + sigma_t eps."""
        return self.target("state", data, noise, t)

    def conversion(self, source: str, target: str, t: Time) -> Weights:
        """a and b of target = a x_t + b source, from the weights of both in x_0 and eps."""
        if source == target:
            return torch.zeros_like(t), torch.ones_like(t)
        if source == "score":
            return self._from_score(target, t)
        (alpha, sigma), (p, q), (r, s) = (self.weights(kind, t) for kind in ("state", source, target))
        determinant = alpha * q - sigma * p
        return (r * q - s * p) / determinant, (alpha * s - sigma * r) / determinant

    def _from_score(self, target: str, t: Time) -> Weights:
        if target == "drift":  # finite at sigma = 0, where the noise is not
            return self.rates(t)[0] / self.alpha(t), -self.diffusion(t)
        a, b = self.conversion("noise", target, t)
        return a, -self.sigma(t) * b

    def convert(self, x: State, value: State, t: Time, source: str, target: str) -> State:
        """A prediction of kind `source` at x_t as one of kind `target`.

        Raises ValueError at the ends of a path, where one does not determine the other.
        """
        a, b = self.conversion(source, target, t.double())
        if not determined(a, b).all():
            raise ValueError(
                f"a {source} prediction does not determine the {target} at t={shown(t)} of the path "
                f"{type(self).__name__}: keep the grid away from that end, or predict another kind"
            )
        return combined(a, b, x, value)


class VP(Path):
    """Variance preserving in the clock of Ornstein-Uhlenbeck: alpha = e^-t, sigma^2 = 1 - e^-2t.

    A DDPM's beta(s) is on this clock at t = int beta / 2. A network's `velocity` is alpha eps - sigma x_0 (Salimans and
    Ho, arXiv 2202.00512).
    """

    end = float("inf")

    def alpha(self, t: Time) -> Time:
        return torch.exp(-t)

    def sigma(self, t: Time) -> Time:
        return torch.sqrt(-torch.expm1(-2 * t))

    def log_snr(self, t: Time) -> Time:
        return -t - torch.log(-torch.expm1(-2 * t)) / 2

    def time(self, log_snr: Time) -> Time:
        return torch.logaddexp(torch.zeros_like(log_snr), -2 * log_snr) / 2

    def rates(self, t: Time) -> Weights:
        return -torch.exp(-t), torch.exp(-2 * t) / self.sigma(t)

    def diffusion(self, t: Time) -> Time:
        return torch.ones_like(t)

    def score_gain(self, t: Time, u: Time) -> Time:
        return torch.expm1(t - u)

    def velocity_weights(self, t: Time) -> Weights:
        return -self.sigma(t), self.alpha(t)


class VE(Path):
    """Variance exploding: alpha = 1, sigma = t."""

    end = float("inf")

    def alpha(self, t: Time) -> Time:
        return torch.ones_like(t)

    def sigma(self, t: Time) -> Time:
        return t

    def log_snr(self, t: Time) -> Time:
        return -torch.log(t)

    def time(self, log_snr: Time) -> Time:
        return torch.exp(-log_snr)

    def rates(self, t: Time) -> Weights:
        return torch.zeros_like(t), torch.ones_like(t)

    def diffusion(self, t: Time) -> Time:
        return t

    def score_gain(self, t: Time, u: Time) -> Time:
        return (t - u) * (t + u) / 2


class Linear(Path):
    """Flow matching's straight line: alpha = 1 - t, sigma = t, velocity eps - x_0 (arXiv 2210.02747)."""

    def alpha(self, t: Time) -> Time:
        return 1 - t

    def sigma(self, t: Time) -> Time:
        return t

    def log_snr(self, t: Time) -> Time:
        return torch.log1p(-t) - torch.log(t)

    def time(self, log_snr: Time) -> Time:
        return torch.sigmoid(-log_snr)

    def rates(self, t: Time) -> Weights:
        return -torch.ones_like(t), torch.ones_like(t)

    def diffusion(self, t: Time) -> Time:
        return t / (1 - t)


def combined(a: Time, b: Time, x: State, y: State) -> State:
    """a x + b y; coefficients are scalars or one per sample, the precision is the state's but at least float32."""
    precision = torch.promote_types(x.dtype, torch.float32)
    a, b = (c.to(precision)[(..., *[None] * (x.ndim - 1 if c.ndim else 0))] for c in (a, b))
    return (a * x + b * y).to(x.dtype)


def determined(a: Time, b: Time) -> Bool[Tensor, "*times"]:
    """Where a conversion with these weights exists."""
    return torch.isfinite(a) & torch.isfinite(b)


def shown(t: Time) -> str:
    """Times in an error: the number, or the range of several."""
    return f"{t.item():g}" if t.numel() == 1 else f"{t.min().item():g}...{t.max().item():g}"


def _legendre(like: Tensor, nodes: int = 24) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss-Legendre rule on [0, 1] (Golub and Welsch: eigenvectors of the Jacobi matrix)."""
    n = torch.arange(1, nodes, dtype=like.dtype, device=like.device)
    beside = n / torch.sqrt(4 * n**2 - 1)
    values, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (values + 1) / 2, vectors[0] ** 2
