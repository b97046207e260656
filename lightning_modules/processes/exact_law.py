"""The law of a sampler's output, exactly: probabilities of all states are propagated, nothing is sampled.

A law is a float64 vector over the `size`^d states of a `Space`, in row-major order; data are laws over letters.
Divergences are in nats. Leaps are propagated as products of d matrices, frozen rates by the uniformisation series of
exp(R h), exact samplers by integrating Kolmogorov's forward equation.
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_modules.processes.ctmc import CTMC, Denoiser, Time
from lightning_modules.processes.ctmc_grids import check_grid
from lightning_modules.processes.ctmc_jumps import Exact
from lightning_modules.processes.ctmc_kernels import Absorbing, Letters, State, normalised, one_hot
from lightning_modules.processes.ctmc_samplers import CategoricalSampler, FinalDenoise, Jumps, Leap, check_kernel

LIMIT = 2**22  # states that are enumerated
LEAP_LIMIT = 2**16  # from each of which a leap goes to each
PAIRS = 2**24  # of states that are looked at in one go
NODES = 16  # of the Gauss-Legendre rule in a step: 4 are 3 % off where a long step ends near the data
Law = Float[Tensor, " states"]


class Space:
    """All states of d coordinates with `size` values each, the last coordinate running fastest.

    Raises ValueError for more than `LIMIT` of them.
    """

    def __init__(self, d: int, size: int, letters: int) -> None:
        if d < 1 or size < 2:
            raise ValueError(f"d={d} coordinates of {size} states: take at least one coordinate and two letters")
        if size**d > LIMIT:
            raise ValueError(
                f"{size}^{d} = {size**d:,} states are more than can be enumerated, at most {LIMIT:,}: take fewer "
                "coordinates or letters"
            )
        self.d, self.size, self.letters, self.count = d, size, letters, size**d

    @cached_property
    def strides(self) -> Int[Tensor, " d"]:
        """What a coordinate's value is worth in the number of a state."""
        return self.size ** torch.arange(self.d - 1, -1, -1)

    @cached_property
    def states(self) -> Int[Tensor, "states d"]:
        """Every state."""
        return torch.arange(self.count)[:, None] // self.strides % self.size

    @cached_property
    def neighbours(self) -> Int[Tensor, "states d letters"]:
        """The number of the state in which a coordinate has another letter."""
        change = torch.arange(self.letters) - self.states[..., None]
        return torch.arange(self.count)[:, None, None] + change * self.strides[:, None]

    def number(self, x: State) -> Int[Tensor, " batch"]:
        """Which states these are."""
        return (x * self.strides).sum(1)


def checked_law(data: Float[Tensor, "..."], name: str = "the law") -> Float[Tensor, "..."]:
    """Probabilities of data as a tensor (S,) * d in float64; ValueError, naming them, where they are none."""
    if data.ndim < 1 or len(set(data.shape)) > 1 or data.shape[0] < 2:
        raise ValueError(f"{name} has the shape {tuple(data.shape)}: expected (S,) * d with S >= 2 letters and d >= 1")
    data = data.double()
    total = float(data.sum())
    if not bool((data >= 0).all()) or not abs(total - 1) < 1e-9:
        raise ValueError(
            f"{name}: weights must be non-negative and sum to one, and these sum to {total:.12g} with a least one of "
            f"{float(data.min()):.3g}: normalise them"
        )
    return data


class ExactLaw:
    """Everything about a process whose data have an enumerable law, as tensors.

    `data` is a tensor (S,) * d of probabilities. `noised(t)` is q_t, `denoiser()` predicts its exact scores, and
    `propagate` takes the law of a sampler along a grid.
    """

    def __init__(self, process: CTMC, data: Float[Tensor, "..."]) -> None:
        self.process, self.data = process, checked_law(data)
        kernel = process.kernel
        if data.shape[0] != kernel.letters:
            raise ValueError(f"the data have {data.shape[0]} letters and the kernel {kernel.letters}: make them equal")
        self.space = Space(data.ndim, kernel.size, kernel.letters)
        self._table: tuple[float, Letters] | None = None

    def noised(self, t: Time) -> Float[Tensor, "*times states"]:
        """q_t at each of these times: the data with K_t applied along every axis."""
        return self._at(self.process.schedule.noise(t.double()))

    @property
    def limit(self) -> Law:
        """The law of infinite noise, in which samplers start."""
        return self._at(torch.tensor(math.inf, dtype=torch.float64))

    def rates(self, times: Float[Tensor, " times"]) -> Float[Tensor, "times states d letters"]:
        """The exact reverse rates per unit of the clock from all states, at each of these times."""
        if self._shown is not None:
            return torch.where(self._open[..., None], self._shown, 0.0).expand(len(times), -1, -1, -1)
        ratios, count = self._ratios(self.noised(times)), len(times)
        noise = self.process.noise(times).repeat_interleave(self.space.count, 0)
        rates = self.process.kernel.rates(ratios.flatten(0, 1), self.space.states.repeat(count, 1), noise)
        return rates.unflatten(0, (count, -1))

    def denoiser(self, **options: object) -> Denoiser:
        """The exact prediction, with the options of `Denoiser`: scores, of masks the posterior, which knows no time."""
        if self._shown is not None:
            return Denoiser(self.process, lambda x, t: self._shown[self.space.number(x)], "posterior", **options)
        return Denoiser(self.process, self.score, "score", **options)

    def score(self, x: State, t: Time) -> Letters:
        """q_t(x with letter a at i) / q_t(x), zero where q_t(x) is; for one time by table, for many state by state."""
        if t.ndim == 1 and len(t) and bool((t == t[0]).all()):
            return self.scores(t[0])[self.space.number(x)]
        return self.process.kernel.score(self.posterior(x, t), x, self.process.noise(t))

    def scores(self, t: Time) -> Float[Tensor, "states d letters"]:
        """The scores of all states at a time."""
        if self._table is None or self._table[0] != float(t):
            self._table = (float(t), self._ratios(self.noised(t)))
        return self._table[1]

    def posterior(self, x: State, t: Time) -> Letters:
        """p(x_0^i = a | x_t) by Bayes' rule over all data, for times that may differ."""
        likelihood = self.process.kernel.likelihood(x, self.process.noise(t)).log()
        total = sum(likelihood[:, i, :].index_select(1, states) for i, states in enumerate(self._letters.unbind(1)))
        weights = normalised(total.exp() * self.data.flatten())
        return torch.stack([weights @ one_hot(self._letters[:, [i]], self.data.shape[0], weights.dtype)[:, 0]
                            for i in range(self.space.d)], 1)  # fmt: skip

    def propagate(
        self,
        sampler: CategoricalSampler,
        denoiser: Denoiser,
        grid: Float[Tensor, " times"],
        law: Law | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Law:
        """The law of the sampler's output at the end of the grid, from `law` (the limit of the noise) at its
        beginning."""
        check_grid(self.process.schedule, grid)
        check_kernel(sampler, self.process.kernel)
        law = self.limit if law is None else law
        for done, (t, u) in enumerate(pairwise(grid.double()), start=1):
            law = self.step(sampler, denoiser, law, t, u)
            if progress is not None:
                progress(done, len(grid) - 1)
        return law

    def step(self, sampler: CategoricalSampler, denoiser: Denoiser, law: Law, t: Time, u: Time) -> Law:
        """The law after one step of the sampler; ValueError for one that is no `Leap`, `Jumps` or `Exact`."""
        if isinstance(sampler, Leap):
            states = self.space.states
            return self._leapt(denoiser.held(sampler.transition(denoiser, states, t, u), states), law)
        if isinstance(sampler, Jumps):
            return self.jumped(sampler.jumps(denoiser, self.space.states, t, u), law)
        if isinstance(sampler, Exact):
            return self._integrated(denoiser, law, t, u)
        raise ValueError(
            f"{type(sampler).__name__} has a step but no law of it (it is no Leap, Jumps or Exact): compare samples"
        )

    def denoised(self, denoiser: Denoiser, law: Law, t: Time) -> Law:
        """The law after drawing data from the posterior at time t."""
        return self.step(FinalDenoise(), denoiser, law, t, t)

    def moves(self, sampler: Leap | Jumps, denoiser: Denoiser, before: Law, after: Law, t: Time, u: Time) -> float:
        """Coordinates that change in a step, on average; for jumps by the mean of the laws before and after it."""
        states = self.space.states
        if isinstance(sampler, Jumps):
            return float((before + after) / 2 @ sampler.jumps(denoiser, states, t, u).sum((1, 2)))
        stays = denoiser.held(sampler.transition(denoiser, states, t, u), states).gather(-1, states[..., None])
        return float(before @ (1 - stays).sum((1, 2)))

    def jumped(self, jumps: Float[Tensor, "states d letters"], law: Law) -> Law:
        """law exp(R) by the uniformisation series, for integrated rates."""
        leaving = jumps.sum((1, 2))
        parts = max(1, math.ceil(float(leaving.max()) / 20))
        jumps, leaving = jumps / parts, leaving / parts
        bound = max(float(leaving.max()), 1e-300)
        for _ in range(parts):
            law = self._series(jumps, leaving, bound, law)
        return law

    def flow(self, jumps: Float[Tensor, "states d letters"], law: Law) -> Law:
        """law R: what flows into every state less what flows out of it."""
        flows = law[:, None, None] * jumps
        into = torch.zeros_like(law).index_add_(0, self.space.neighbours.flatten(), flows.flatten())
        return into - flows.sum((1, 2))

    def _series(self, jumps: Float[Tensor, "states d letters"], leaving: Law, bound: float, law: Law) -> Law:
        """Poisson(bound) steps of the chain I + R / bound."""
        weight = math.exp(-bound)
        total, found, k = weight, weight * law, 0
        while total < 1 - 1e-15 and weight > 1e-300:
            k += 1
            law = law + self.flow(jumps, law) / bound
            weight *= bound / k
            total, found = total + weight, found + weight * law
            if k > bound and weight < 1e-17:
                break
        return found

    def _leapt(self, transition: Float[Tensor, "states d size"], law: Law) -> Law:
        """The sum over states x of law(x) prod_i P_i(. | x), its two halves multiplied as matrices."""
        if self.space.count > LEAP_LIMIT:
            raise ValueError(
                f"a leap from each of {self.space.count:,} states goes to all of them, and at most {LEAP_LIMIT:,} can "
                "be propagated: take fewer coordinates, or a sampler of frozen rates"
            )
        half = self.space.d // 2
        left, right = law[:, None], torch.ones_like(law)[:, None]
        for i in range(half):
            left = (left[:, :, None] * transition[:, i, None]).flatten(1)
        for i in range(half, self.space.d):
            right = (right[:, :, None] * transition[:, i, None]).flatten(1)
        return (left.T @ right).flatten()

    def _integrated(self, denoiser: Denoiser, law: Law, t: Time, u: Time) -> Law:
        """Kolmogorov's forward equation by Runge and Kutta's method, in steps short against the noise and the rates."""
        schedule, kernel, states = self.process.schedule, self.process.kernel, self.space.states
        clocks = [kernel.clock(schedule.noise(time)) for time in (t, u)]

        def rates(clock: Time) -> Float[Tensor, "states d letters"]:
            return denoiser.rates(states, schedule.time(kernel.noise_at(clock)))

        for high, low in pairwise(self._short_steps(*clocks)):
            h, (first, middle, last) = high - low, (rates(clock) for clock in (high, (high + low) / 2, low))
            k1 = self.flow(first, law)
            k2 = self.flow(middle, law + h / 2 * k1)
            k3 = self.flow(middle, law + h / 2 * k2)
            k4 = self.flow(last, law + h * k3)
            law = law + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return law

    def _short_steps(self, clock: Time, end: Time) -> Iterator[Time]:
        length = min(0.05, 0.5 / self.space.d)
        while clock > end:
            yield clock
            near = float(self.process.kernel.noise_at(clock))
            clock = clock - length * min(1.0, near if near > 0 else 1.0)
        yield end

    def _at(self, noise: Time) -> Float[Tensor, "*times states"]:
        return self._transformed(self.process.kernel.transition(noise))

    def _transformed(self, matrix: Float[Tensor, "*times letters size"]) -> Float[Tensor, "*times states"]:
        """Every product takes the first axis of the data away and puts that of its transform last."""
        times = matrix.shape[:-2]
        law = self.data.expand(*times, *self.data.shape)
        for _ in range(self.space.d):
            law = law.reshape(*times, self.space.letters, -1).mT @ matrix
        return law.reshape(*times, -1)

    def _ratios(self, law: Float[Tensor, "*times states"]) -> Float[Tensor, "*times states d letters"]:
        found, here = law[..., self.space.neighbours], law[..., None, None]
        known = self._open[..., None] & (here > 0)
        return torch.where(known, found / here.clamp_min(1e-300), 0.0)

    @cached_property
    def _shown(self) -> Float[Tensor, "states d letters"] | None:
        """The posterior at every state with masks, by the laws of the letters that are seen; None without masks."""
        if not isinstance(self.process.kernel, Absorbing):
            return None
        matrix = torch.cat([torch.eye(self.space.letters), torch.ones(self.space.letters, 1)], 1).double()
        return self.process.kernel.copied(normalised(self._ratios(self._transformed(matrix))), self.space.states)

    @cached_property
    def _open(self) -> Bool[Tensor, "states d"]:
        return self.process.kernel.open(self.space.states)

    @cached_property
    def _letters(self) -> Int[Tensor, "data d"]:
        return Space(self.data.ndim, self.data.shape[0], self.data.shape[0]).states


class Path(NamedTuple):
    """The path-space relative entropy of exact and simulated chain: `total` from all sources, `score` that at the grid.

    `score` is sum_k h_k E sum D(s, s_hat) at the beginnings of the steps, the assumption of theorems.
    """

    total: float
    score: float


def path_bound(law: ExactLaw, sampler: Jumps, denoiser: Denoiser, grid: Float[Tensor, " times"]) -> Path:
    """sum_k int E_q sum D(s, s_hat_k) with D(u, v) = u log(u / v) - u + v, by a Gauss-Legendre rule in every step.

    With KL(q_T || limit) it bounds KL(q_delta || law of the sampler), without hidden constants.
    """
    kernel, states = law.process.kernel, law.space.states
    places, weights = (torch.from_numpy(part / 2) for part in np.polynomial.legendre.leggauss(NODES))
    at_once = max(1, PAIRS // law.space.neighbours.numel())
    total = at_grid = 0.0
    for t, u in pairwise(grid.double()):
        length, end = law.process.exposure(t, u).reshape(()), kernel.clock(law.process.schedule.noise(u))
        frozen = sampler.jumps(denoiser, states, t, u) / length
        times = law.process.schedule.time(kernel.noise_at(end + (places + 0.5) * length))
        for some, share in zip(times.split(at_once), weights.split(at_once)):
            total += float(length * share @ _mean_divergence(law, some, frozen))
        at_grid += float(length * _mean_divergence(law, t[None], denoiser.rates(states, t)))
    return Path(total, at_grid)


def kl(p: Law, q: Law) -> float:
    """KL(p || q) in nats; infinite where q misses a state of p."""
    return float(torch.where(p > 0, p * (p.clamp_min(1e-300) / q).log() - p + q, q).sum()) if len(p) else 0.0


def tv(p: Law, q: Law) -> float:
    """Total variation."""
    return float((p - q).abs().sum() / 2)


def on_states(data: Float[Tensor, "..."], space: Space) -> Law:
    """A law of data as one of states, which may have masks."""
    padded = torch.nn.functional.pad(data, (0, space.size - data.shape[0]) * data.ndim)
    return padded.flatten()


def counted(x: State, space: Space) -> Law:
    """The empirical law of samples."""
    return torch.bincount(space.number(x), minlength=space.count).double() / len(x)


def tv_floor(law: Law, samples: int) -> float:
    """What the total variation between a law and that of so many samples of it is about: sampling noise alone."""
    return float(0.5 * math.sqrt(2 / math.pi) * (law * (1 - law) / samples).sqrt().sum())


def early_stopping(d: int, letters: int, noise: float) -> float:
    """1 - (e^-delta + (1 - e^-delta) / S)^d, which bounds the total variation of data and q_delta (uniform kernel)."""
    return -math.expm1(d * math.log1p(math.expm1(-noise) * (1 - 1 / letters)))


def _mean_divergence(law: ExactLaw, times: Float[Tensor, " times"], found: Letters) -> Float[Tensor, " times"]:
    """E_q sum D(exact rates, found) at each time."""
    exact = law.rates(times)
    ratio = torch.where(exact > 0, exact * (exact.clamp_min(1e-300) / found.clamp_min(1e-300)).log(), 0.0)
    return (law.noised(times) * (ratio - exact + found).sum((-1, -2))).sum(-1)
