"""Losses of categorical processes, a number for each sample, and the bound on the likelihood that they integrate to.

A network gives logits of the posterior p(x_0^i = . | x_t) or logarithms of the scores. Every loss but `score_entropy`
takes the former. Weights are those at the time t of the sample; averages over t are the caller's.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.processes.ctmc import CTMC, Time
from lightning_modules.processes.ctmc_kernels import Absorbing, Letters, Noise, State

PerSample = Float[Tensor, " batch"]
PerPosition = Float[Tensor, "batch d"]


def score_entropy(process: CTMC, log_score: Letters, x: State, x0: State, t: Time) -> PerSample:
    """sigma'(t) sum_i of the score entropy (SEDD, arXiv 2310.16834, equation 5): >= 0, zero at conditional ratios.

    The ratios are those of K_t(. | x_0): that the expectation over x_0 has its minimum at the scores is the point of
    it.
    """
    noise = process.noise(t).to(log_score.dtype)
    entropy = absorbing_entropy if isinstance(process.kernel, Absorbing) else uniform_entropy
    masked = process.kernel.open(x)
    return _rate(process, t) * torch.where(masked, entropy(log_score, x, x0, noise), 0.0).sum(1)


def nelbo(process: CTMC, logits: Letters, x: State, x0: State, t: Time) -> PerSample:
    """The continuous-time bound on -log p(x_0), its density at t: the score entropy of the scores that follow.

    Of masks it is sigma' / (e^sigma - 1) times the cross-entropy at masked positions (MDLM, arXiv 2406.07524).
    """
    noise = process.noise(t).to(logits.dtype)
    if isinstance(process.kernel, Absorbing):
        masked = process.kernel.open(x)
        return _rate(process, t) * (_cross_entropy(logits, x0) * masked / torch.expm1(noise).squeeze(-1)).sum(1)
    log_score = process.kernel.score(logits.softmax(-1), x, noise).clamp_min(torch.finfo(logits.dtype).tiny).log()
    return score_entropy(process, log_score, x, x0, t)


def cross_entropy(process: CTMC, logits: Letters, x: State, x0: State, t: Time) -> PerSample:
    """Cross-entropy of the data where the process leaves a doubt, without weights: it has the same minimum."""
    return (_cross_entropy(logits, x0) * process.kernel.open(x)).sum(1)


def flow_matching(process: CTMC, logits: Letters, x: State, x0: State, t: Time) -> PerSample:
    """The generalised KL of discrete flow matching along the mixture path kappa = e^-sigma (arXiv 2407.15595).

    -kappa' / (1 - kappa) [p(x_t) - 1[x_t = x_0] + (1 - 1[x_t = x_0]) log p(x_0)], time running towards the data.
    """
    noise, log_posterior = process.noise(t).to(logits.dtype), logits.log_softmax(-1)
    weight = _rate(process, t)[:, None] / torch.expm1(noise).squeeze(-1)
    kept = (x == x0).to(logits.dtype)
    hidden = isinstance(process.kernel, Absorbing) & process.kernel.open(x)
    present = log_posterior.gather(-1, x.clamp_max(logits.shape[-1] - 1)[..., None]).squeeze(-1).exp()
    present = torch.where(hidden, 0.0, torch.where(process.kernel.open(x), present, kept))
    return -(weight * (present - kept + (1 - kept) * _at(log_posterior, x0))).sum(1)


def rdm_linear(process: CTMC, logits: Letters, x: State, x0: State, t: Time) -> PerSample:
    """(1 - t) times the cross-entropy at masks, a batch's sum over its number of masks (DPLM): no likelihood bound.

    The mean over the batch is that sum; t in [0, 1], shifted by a step of the T that it is counted in.
    """
    masked = process.kernel.open(x)
    total = (_cross_entropy(logits, x0) * masked).sum(1) * (1 - t)
    return total * len(x) / masked.sum().clamp_min(1)


LOSSES: dict[str, Callable[[CTMC, Letters, State, State, Time], PerSample]] = {
    loss.__name__: loss for loss in (nelbo, score_entropy, cross_entropy, flow_matching, rdm_linear)
}


def uniform_entropy(log_score: Letters, x: State, x0: State, noise: Noise) -> PerPosition:
    """(1 / S) sum_(a != x) of s_a - ratio_a log s_a + ratio_a (log ratio_a - 1), in SEDD's form of three sums."""
    letters, grown = log_score.shape[-1], torch.expm1(noise).squeeze(-1)
    ratio, same = grown / (grown + letters), x == x0
    here = _at(log_score, x)
    positive = log_score.exp().mean(-1) - here.exp() / letters
    mean = log_score.mean(-1) - here / letters
    negative = torch.where(same, ratio * mean, mean + _at(log_score, x0) / grown)
    at_data = (letters - 1) / letters * ratio * (ratio.log() - 1)
    elsewhere = ((-ratio.log() - 1) / ratio - (letters - 2)) / letters
    return positive - negative + torch.where(same, at_data, elsewhere)


def absorbing_entropy(log_score: Letters, x: State, x0: State, noise: Noise) -> PerPosition:
    """sum_a s_a - log s_(x_0) / e + (log(1 / e) - 1) / e with e = e^sigma - 1, at a mask."""
    grown = torch.expm1(noise).squeeze(-1)
    return log_score.exp().sum(-1) - _at(log_score, x0) / grown + (-grown.log() - 1) / grown


def prior(process: CTMC, x0: State, start: Time) -> PerSample:
    """KL(q_T(. | x_0) || the limit of the noise) in nats: what the bound owes to a finite horizon.

    Of masks it is infinite unless every one is masked at `start`; there the letters still to be seen are free.
    """
    noise = process.schedule.noise(start.double())
    if isinstance(process.kernel, Absorbing):
        return torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    row = process.kernel.transition(noise)[0]
    return (row * (row * process.kernel.letters).log()).sum().expand(len(x0)) * x0.shape[1]


def likelihood_bound(
    process: CTMC,
    logits: Callable[[State, Time], Letters],
    x0: State,
    start: float,
    stop: float,
    draws: int,
    draw: torch.Generator | None,
) -> PerSample:
    """-log p(x_0) in nats, bounded from above, by `draws` stratified times per sample, spread evenly in log t.

    prior + int of the nelbo over [stop, start] + E[-log p(x_0 | x_stop)].
    """
    ends = torch.tensor([stop, start], dtype=torch.float64).log()
    total = prior(process, x0, torch.tensor(start, dtype=torch.float64))
    for k in range(draws):
        t = ((k + stratified(len(x0), draw)) / draws * (ends[1] - ends[0]) + ends[0]).exp()
        x = process.sample(x0, t, draw)
        total = total + nelbo(process, logits(x, t).double(), x, x0, t) * t * (ends[1] - ends[0]) / draws
    t = torch.full((len(x0),), stop, dtype=torch.float64)
    x = process.sample(x0, t, draw)
    return total + cross_entropy(process, logits(x, t).double(), x, x0, t)


def stratified(count: int, draw: torch.Generator | None) -> PerSample:
    """Numbers in [0, 1), one in each of `count` equal cells, in a random order: times of lower variance."""
    offset = torch.rand((), generator=draw, dtype=torch.float64)
    cells = torch.randperm(count, generator=draw).double()
    return (cells + offset) / count


def _rate(process: CTMC, t: Time) -> Float[Tensor, " batch"]:
    return process.schedule.rate(t)


def _cross_entropy(logits: Letters, x0: State) -> PerPosition:
    return -_at(logits.log_softmax(-1), x0)


def _at(values: Letters, x: State) -> PerPosition:
    return values.gather(-1, x[..., None]).squeeze(-1)
