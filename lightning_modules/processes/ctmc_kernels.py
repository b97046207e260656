"""What noise does to a letter: the uniform and the absorbing kernel, their scores, posteriors and reverse rates.

Coordinates are noised independently; sigma is the total noise. `posterior` is p(x_0^i = . | x_t), `score` the ratios
q_t(x with letter a at i) / q_t(x), both of shape (batch, d, letters). Noise is broadcast against that shape.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

State = Int[Tensor, "batch d"]
Letters = Float[Tensor, "batch d letters"]
Noise = Float[Tensor, "#batch #d 1"]
Levels = Float[Tensor, "*levels"]

LEAST_MASKED = 1e-30  # the share of masks that stands for none: its logarithm is finite and no draw ever sees it


class Kernel:
    """A chain on letters 0, ..., S - 1 (S = `letters`), or `size` states with the mask."""

    def __init__(self, letters: int) -> None:
        if letters < 2:
            raise ValueError(f"letters={letters}: an alphabet has at least two")
        self.letters = letters
        self.size = letters

    def transition(self, noise: Float[Tensor, "*levels"]) -> Float[Tensor, "*levels letters size"]:
        """K(x_t | x_0), a row for each letter of the data, at each of these noises."""
        raise NotImplementedError

    def likelihood(self, x: State, noise: Noise) -> Letters:
        """K(x_t^i | x_0^i = a) for every letter a."""
        raise NotImplementedError

    def noised(self, x0: State, noise: Noise, draw: torch.Generator | None) -> State:
        """x_t from x_0."""
        raise NotImplementedError

    def limit(self, shape: tuple[int, int], draw: torch.Generator | None) -> State:
        """Samples (batch, d) of infinite noise, from which every sampler starts."""
        raise NotImplementedError

    def open(self, x: State) -> Bool[Tensor, "batch d"]:
        """The coordinates that the reverse process may change."""
        raise NotImplementedError

    def score(self, posterior: Letters, x: State, noise: Noise) -> Letters:
        """The ratios that follow from a posterior."""
        raise NotImplementedError

    def posterior(self, score: Letters, x: State, noise: Noise) -> Letters:
        """The posterior that follows from ratios, clamped at zero and normalised."""
        raise NotImplementedError

    def copied(self, posterior: Letters, x: State) -> Letters:
        """The posterior with certainty at coordinates that were never touched."""
        return posterior

    def clock(self, noise: Levels) -> Levels:
        """The clock in which reverse rates with a frozen prediction are constant; it falls towards the data."""
        raise NotImplementedError

    def noise_at(self, clock: Levels) -> Levels:
        """The noise at a time of the clock."""
        raise NotImplementedError

    def rates(self, score: Letters, x: State, noise: Noise) -> Letters:
        """Reverse rates to every other letter, per unit of the clock."""
        raise NotImplementedError

    def rates_of_posterior(self, posterior: Letters, x: State, noise: Noise) -> Letters:
        """`rates` of the score that follows from a posterior."""
        return self.rates(self.score(posterior, x, noise), x, noise)

    def corrector(self, posterior: Letters, x: State, noise: Noise) -> Letters:
        """Reverse rates less those of discrete flow matching: they leave q_t as it is."""
        raise NotImplementedError


class Uniform(Kernel):
    """Every letter turns into every other at rate 1 / S: K = e^-sigma I + (1 - e^-sigma) / S (arXiv 2410.02321)."""

    def transition(self, noise: Float[Tensor, "*levels"]) -> Float[Tensor, "*levels letters size"]:
        noise = noise[..., None, None]
        eye = torch.eye(self.letters, dtype=noise.dtype, device=noise.device)
        return torch.exp(-noise) * eye - torch.expm1(-noise) / self.letters

    def likelihood(self, x: State, noise: Noise) -> Letters:
        return torch.exp(-noise) * one_hot(x, self.letters, noise.dtype) - torch.expm1(-noise) / self.letters

    def noised(self, x0: State, noise: Noise, draw: torch.Generator | None) -> State:
        touched = uniforms(x0.shape, draw, x0.device) < -torch.expm1(-noise.double()).squeeze(-1)
        return torch.where(touched, self.limit(x0.shape, draw).to(x0.device), x0)

    def limit(self, shape: tuple[int, int], draw: torch.Generator | None) -> State:
        device = draw.device if draw is not None else None
        return torch.randint(self.letters, tuple(shape), generator=draw, device=device)

    def open(self, x: State) -> Bool[Tensor, "batch d"]:
        return torch.ones_like(x, dtype=torch.bool)

    def score(self, posterior: Letters, x: State, noise: Noise) -> Letters:
        """1 + pi[x] (r - 1) + pi[a] (1 / r - 1) for a != x with r = K(b | a) / K(a | a), and 1 at x."""
        less, more = self._ratio(noise)
        score = 1 + self.at(posterior, x) * less + posterior * more
        return torch.where(one_hot(x, self.letters, torch.bool), 1.0, score)

    def posterior(self, score: Letters, x: State, noise: Noise) -> Letters:
        less, more = self._ratio(noise)
        others = score.sum(-1, keepdim=True) - self.at(score, x)
        stays = (others - (self.letters - 1) - more) / ((self.letters - 1) * less - more)
        posterior = (score - 1 - stays * less) / more
        return normalised(torch.where(one_hot(x, self.letters, torch.bool), stays, posterior).clamp_min(0))

    def clock(self, noise: Levels) -> Levels:
        return noise

    def noise_at(self, clock: Levels) -> Levels:
        return clock

    def rates(self, score: Letters, x: State, noise: Noise) -> Letters:
        return self.elsewhere(score, x) / self.letters

    def corrector(self, posterior: Letters, x: State, noise: Noise) -> Letters:
        """(1 - pi[x] S / (e^sigma - 1 + S)) / S, the same for every letter."""
        less, _ = self._ratio(noise)
        return self.elsewhere((1 + self.at(posterior, x) * less).expand_as(posterior), x) / self.letters

    def elsewhere(self, values: Letters, x: State) -> Letters:
        """The values, zero at the present letter."""
        return torch.where(one_hot(x, self.letters, torch.bool), 0.0, values)

    def at(self, values: Letters, x: State) -> Float[Tensor, "batch d 1"]:
        """The values of the present letter."""
        return values.gather(-1, x[..., None])

    def _ratio(self, noise: Noise) -> tuple[Noise, Noise]:
        """r - 1 and 1 / r - 1."""
        grown = torch.expm1(noise)
        return -self.letters / (grown + self.letters), self.letters / grown


class Absorbing(Kernel):
    """Every letter turns into the mask at rate 1, and stays one.

    The mask is state S, after the letters; or `mask` says which of the S states it is, for all positions or (with the
    last dimensions of a batch of states) for each of them.
    """

    def __init__(self, letters: int, mask: int | Int[Tensor, "*batch d"] | None = None) -> None:
        super().__init__(letters)
        self.mask = letters if mask is None else mask
        self.size = letters + (mask is None)

    def transition(self, noise: Float[Tensor, "*levels"]) -> Float[Tensor, "*levels letters size"]:
        if self.size == self.letters:
            raise ValueError("a transition matrix needs the mask behind the letters: take Absorbing without mask=")
        noise = noise[..., None, None]
        eye = torch.eye(self.letters, dtype=noise.dtype, device=noise.device)
        masked = (-torch.expm1(-noise)).expand(*noise.shape[:-2], self.letters, 1)
        return torch.cat([torch.exp(-noise) * eye, masked], -1)

    def likelihood(self, x: State, noise: Noise) -> Letters:
        kept = torch.exp(-noise) * one_hot(x.clamp_max(self.letters - 1), self.letters, noise.dtype)
        return torch.where(self.open(x)[..., None], -torch.expm1(-noise), kept)

    def noised(self, x0: State, noise: Noise, draw: torch.Generator | None) -> State:
        touched = uniforms(x0.shape, draw, x0.device) < -torch.expm1(-noise.double()).squeeze(-1)
        return torch.where(touched, self.mask, x0)

    def limit(self, shape: tuple[int, int], draw: torch.Generator | None) -> State:
        device = draw.device if draw is not None else None
        return torch.zeros(tuple(shape), dtype=torch.long, device=device) + self.mask

    def open(self, x: State) -> Bool[Tensor, "batch d"]:
        return x == self.mask

    def score(self, posterior: Letters, x: State, noise: Noise) -> Letters:
        """pi[a] / (e^sigma - 1) at masks, 0 elsewhere."""
        return torch.where(self.open(x)[..., None], posterior / torch.expm1(noise), 0.0)

    def posterior(self, score: Letters, x: State, noise: Noise) -> Letters:
        return normalised(score)

    def copied(self, posterior: Letters, x: State) -> Letters:
        shown = one_hot(x.clamp_max(self.letters - 1), self.letters, posterior.dtype)
        return torch.where(self.open(x)[..., None], posterior, shown)

    def clock(self, noise: Levels) -> Levels:
        """log(1 - e^-sigma), the logarithm of the share that is masked."""
        return torch.log((-torch.expm1(-noise)).clamp_min(LEAST_MASKED))

    def noise_at(self, clock: Levels) -> Levels:
        return -torch.log1p(-torch.exp(clock))

    def rates(self, score: Letters, x: State, noise: Noise) -> Letters:
        return torch.where(self.open(x)[..., None], score * torch.expm1(noise), 0.0)

    def rates_of_posterior(self, posterior: Letters, x: State, noise: Noise) -> Letters:
        """The posterior itself: in this clock every mask goes at rate 1."""
        return torch.where(self.open(x)[..., None], posterior, 0.0)

    def corrector(self, posterior: Letters, x: State, noise: Noise) -> Letters:
        return torch.zeros_like(posterior)


def one_hot(x: State, size: int, dtype: torch.dtype) -> Float[Tensor, "batch d size"] | Bool[Tensor, "batch d size"]:
    """1 at the state of each coordinate."""
    return (x[..., None] == torch.arange(size, device=x.device)).to(dtype)


def normalised(weights: Float[Tensor, "*any n"]) -> Float[Tensor, "*any n"]:
    """Weights as probabilities; equal ones where all are zero."""
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(torch.finfo(weights.dtype).tiny), 1 / weights.shape[-1])


def uniforms(shape: tuple[int, ...], draw: torch.Generator | None, device: torch.device) -> Float[Tensor, "..."]:
    """Uniform numbers in [0, 1) in float64, drawn where the generator lives."""
    where = draw.device if draw is not None else device
    return torch.rand(tuple(shape), generator=draw, dtype=torch.float64, device=where).to(device)


def drawn(
    weights: Float[Tensor, "*any n"], draw: torch.Generator | None, dtype: torch.dtype = torch.float64
) -> Int[Tensor, "*any"]:
    """A letter by its weight (not all zero), by inversion of the distribution function.

    In float64 by default: Gumbel noise in float32 has no tail beyond 17 and acts like a lower temperature.
    """
    cumulative = weights.to(dtype).cumsum(-1)
    point = uniforms((*weights.shape[:-1], 1), draw, weights.device).to(dtype) * cumulative[..., -1:]
    point = torch.minimum(point, cumulative[..., -1:] * (1 - torch.finfo(dtype).eps))
    return (cumulative <= point).sum(-1)
