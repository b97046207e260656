"""Kernels, schedules, grids and losses of categorical processes, against their definitions."""

import math

import pytest
import torch
from torch.nn import functional as F

from datamodules import simulated_categories as targets
from lightning_modules.processes import ctmc_grids, ctmc_losses
from lightning_modules.processes.ctmc import CTMC, Denoiser
from lightning_modules.processes.ctmc_kernels import Absorbing, Kernel, Uniform, drawn, one_hot
from lightning_modules.processes.ctmc_schedules import Constant, Cosine, Geometric, LogLinear, Schedule
from lightning_modules.processes.exact_law import ExactLaw, counted, tv

DRAW = torch.Generator().manual_seed(0)
SCHEDULES = [Constant(), LogLinear(), LogLinear(0.0), Geometric(), Cosine()]
S, D = 4, 3


def times(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draws(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def posteriors(batch: int, letters: int = S) -> torch.Tensor:
    return torch.randn(batch, D, letters, generator=draws(), dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_schedule_has_a_derivative_an_inverse_and_ends(schedule: Schedule):
    t, h = times(0.02, 0.3, 0.8), 1e-6
    slope = (schedule.noise(t + h) - schedule.noise(t - h)) / (2 * h)
    assert schedule.rate(t) == pytest.approx(slope, rel=1e-6)
    assert schedule.time(schedule.noise(t)) == pytest.approx(t, rel=1e-9)
    if schedule.end == 1:
        with pytest.raises(ValueError, match=r"times in \[0, 1\]"):
            schedule.check(times(0.5, 1.5))


def test_named_schedules_are_those_of_the_papers():
    t = times(0.25)
    assert float(1 - torch.exp(-LogLinear().noise(t))) == pytest.approx(0.999 * 0.25)
    assert float(Geometric().noise(times(0.5))) == pytest.approx(math.sqrt(1e-4 * 20))
    assert float(torch.exp(-Cosine().noise(t))) == pytest.approx(1e-3 + 0.999 * math.cos(math.pi / 8))


def test_a_decaying_grid_is_constant_then_geometric():
    grid = ctmc_grids.kappa(Constant(), 8.0, 1e-2, 0.4)
    steps = grid[:-1] - grid[1:]
    assert len(steps) == 27
    assert steps[:-1] == pytest.approx(0.4 * grid[:-2].clamp_max(1), rel=1e-12)
    assert float(grid[-1]) == 1e-2
    mapped = ctmc_grids.kappa(LogLinear(), 0.9, 0.01, 0.2)
    noise = LogLinear().noise(mapped)
    assert (noise[:-2] - noise[1:-1]) == pytest.approx(0.2 * noise[:-2].clamp_max(1), rel=1e-9)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ctmc_grids.uniform(Constant(), 8.0, 0.0, 0), "steps=0"),
        (lambda: ctmc_grids.uniform(Constant(), 1.0, 2.0, 4), "0 <= stop < start"),
        (lambda: ctmc_grids.uniform(LogLinear(), 1.5, 0.0, 4), "end of the schedule"),
        (lambda: ctmc_grids.kappa(Constant(), 8.0, 1e-2, 0.0), "kappa=0.0"),
        (lambda: ctmc_grids.kappa(Constant(), 8.0, 0.0, 0.1), "stop early"),
        (lambda: ctmc_grids.check_grid(Constant(), times(1.0)), "at least one step"),
        (lambda: ctmc_grids.check_grid(Constant(), times(1.0, 1.0)), "fall strictly"),
        (lambda: ctmc_grids.check_grid(LogLinear(), times(2.0, 0.5)), "times in"),
        (lambda: CTMC(Uniform(2), LogLinear()).sample(torch.zeros(1, 1).long(), times(2.0)), "times in"),
        (lambda: Uniform(1), "letters=1"),
        (lambda: LogLinear(1.0), "eps=1.0"),
        (lambda: Geometric(1.0, 0.5), "low < high"),
        (lambda: Denoiser(CTMC(Uniform(2), Constant()), lambda x, t: x, "noise"), "posterior, logits"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize("t", [1e-3, 0.1, 3.0])
def test_scores_and_posteriors_are_inverse(t):
    posterior, noise = posteriors(50), times(t).reshape(1, 1, 1)
    x = torch.randint(S, (50, D), generator=draws())
    for kernel in (Uniform(S), Absorbing(S)):
        x = torch.where(torch.rand(x.shape, generator=draws()) < 0.5, S, x) if kernel.size > S else x
        found = kernel.posterior(kernel.score(posterior, x, noise), x, noise)
        shown = kernel.open(x)[..., None]
        assert torch.where(shown, found, posterior) == pytest.approx(posterior, abs=1e-12)


def test_a_score_is_the_ratio_of_two_laws():
    """sum_b pi_b K(a | b) / K(x | b), the definition."""
    posterior, x = posteriors(20), torch.randint(S, (20, D), generator=draws())
    matrix = Uniform(S).transition(times(0.7)[0])
    weights = posterior / matrix[:, x].permute(1, 2, 0)
    expected = weights @ matrix
    assert Uniform(S).score(posterior, x, times(0.7).reshape(1, 1, 1)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kernel", [Uniform(S), Absorbing(S)], ids=["uniform", "absorbing"])
def test_noised_letters_follow_the_transition_matrix(kernel: Kernel):
    x0, t = torch.full((40_000, 1), 2), times(0.8)
    x = CTMC(kernel, Constant()).sample(x0, t, draws())
    frequency = torch.bincount(x[:, 0], minlength=kernel.size) / len(x)
    assert frequency.double() == pytest.approx(kernel.transition(t)[0, 2], abs=0.01)
    likelihood = kernel.likelihood(torch.arange(kernel.size)[:, None], t.reshape(1, 1, 1))
    assert torch.allclose(likelihood[:, 0].T, kernel.transition(t)[0])


def test_draws_in_double_precision_reach_the_tail_that_float32_gumbels_miss():
    weights = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    assert (drawn(weights.expand(1000, 2), draws()) == 0).all()
    heavy = drawn(torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64).expand(40_000, 3), draws())
    assert (heavy == 0).sum() == 0
    assert float((heavy == 1).double().mean()) == pytest.approx(0.25, abs=0.01)


# Losses


def conditional_ratios(kernel: Kernel, x: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """K(a | x_0) / K(x | x_0), the score whose entropy is zero."""
    return kernel.score(one_hot(x0, S, torch.float64), x, noise)


@pytest.mark.parametrize("kernel", [Uniform(S), Absorbing(S)], ids=["uniform", "absorbing"])
def test_score_entropy_is_the_divergence_from_the_conditional_ratios(kernel: Kernel):
    process, t = CTMC(kernel, Constant()), torch.full((64,), 0.6, dtype=torch.float64)
    x0 = torch.randint(S, (64, D), generator=draws())
    x = process.sample(x0, t, draws(2))
    noise = process.noise(t)
    ratios = conditional_ratios(kernel, x, x0, noise)
    exact = ratios.clamp_min(1e-300).log() if kernel.size > S else ratios.log()
    log_score = torch.randn(64, D, S, generator=draws(3), dtype=torch.float64)
    found = ctmc_losses.score_entropy(process, log_score, x, x0, t)
    here = one_hot(x.clamp_max(S - 1), S, torch.bool) if kernel.size == S else torch.zeros(64, D, S, dtype=torch.bool)
    terms = log_score.exp() - ratios * log_score + torch.where(ratios > 0, ratios * (exact - 1), 0.0)
    counted_terms = ~here & kernel.open(x)[..., None]
    rate = 1 / S if kernel.size == S else 1.0
    assert found == pytest.approx(rate * (terms * counted_terms).sum((1, 2)), rel=1e-10)
    assert (found >= 0).all()
    assert ctmc_losses.score_entropy(process, exact, x, x0, t) == pytest.approx(torch.zeros(64), abs=1e-10)


def test_the_gradient_of_score_entropy_vanishes_at_the_true_score_on_average():
    law = ExactLaw(CTMC(Uniform(2), Constant()), targets.ising_ring(3, 2, DRAW))
    t = times(0.5)
    states, prior = law.space.states, law.data.flatten()
    log_score = law.scores(t[0]).log().requires_grad_()
    total = torch.tensor(0.0, dtype=torch.float64)
    for x0, weight in zip(states, prior):
        reach = law.process.kernel.likelihood(states, law.process.noise(t)).gather(-1, x0.expand(8, 3)[..., None])
        loss = ctmc_losses.score_entropy(law.process, log_score, states, x0.expand(8, 3), t.expand(8))
        total = total + weight * (reach.squeeze(-1).prod(1) * loss).sum()
    total.backward()
    assert log_score.grad.abs().max() < 1e-14


def test_masked_losses_are_one_loss():
    """SEDD's with scores pi / (e^sigma - 1), MDLM's, and flow matching's along kappa = 1 - t."""
    process = CTMC(Absorbing(S), LogLinear(0.0))
    x0, t = torch.randint(S, (64, D), generator=draws()), torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    x = process.sample(x0, t, draws(2))
    logits = torch.randn(64, D, S, generator=draws(3), dtype=torch.float64)
    bound = ctmc_losses.nelbo(process, logits, x, x0, t)
    masked = (x == S).double()
    cross = F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none").reshape(64, D)
    assert bound == pytest.approx((cross * masked).sum(1) / t, rel=1e-12)
    assert ctmc_losses.flow_matching(process, logits, x, x0, t) == pytest.approx(bound, rel=1e-12)
    log_score = logits.log_softmax(-1) - torch.log(torch.expm1(process.noise(t)))
    assert ctmc_losses.score_entropy(process, log_score, x, x0, t) == pytest.approx(bound, rel=1e-10, abs=1e-10)
    weighted = ctmc_losses.rdm_linear(process, logits, x, x0, t).mean()
    assert weighted == pytest.approx(float(((1 - t[:, None]) * cross * masked).sum() / masked.sum()), rel=1e-12)


@pytest.mark.parametrize("kernel", [Uniform(2), Absorbing(2)], ids=["uniform", "absorbing"])
def test_the_bound_on_the_likelihood_is_tight_for_the_exact_posterior(kernel: Kernel):
    """With the exact reverse process the bound is the entropy, up to early stopping and the horizon."""
    schedule = Constant() if kernel.size == 2 else LogLinear(0.0)
    law = ExactLaw(CTMC(kernel, schedule), targets.ising_ring(3, 2, DRAW))
    x0 = torch.stack(torch.unravel_index(drawn(law.data.flatten().expand(4000, 8), draws()), law.data.shape), 1)

    def logits(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return law.posterior(x, t).clamp_min(1e-30).log()

    bound = ctmc_losses.likelihood_bound(law.process, logits, x0, min(8.0, schedule.end), 0.003, 16, draws())
    entropy = -(law.data.flatten()[law.space.number(x0)] if kernel.size == 2 else law.data[tuple(x0.T)]).log().mean()
    assert float(bound.mean()) == pytest.approx(float(entropy), abs=0.04)


def test_the_minimum_of_the_cross_entropy_is_the_posterior():
    law = ExactLaw(CTMC(Uniform(2), Constant()), targets.ising_ring(2, 2, DRAW))
    t = times(0.4)
    states = law.space.states
    logits = law.posterior(states, t.expand(4)).log().requires_grad_()
    total = torch.tensor(0.0, dtype=torch.float64)
    for x0, weight in zip(states, law.data.flatten()):
        reach = law.process.kernel.likelihood(states, law.process.noise(t)).gather(-1, x0.expand(4, 2)[..., None])
        loss = ctmc_losses.cross_entropy(law.process, logits, states, x0.expand(4, 2), t.expand(4))
        total = total + weight * (reach.squeeze(-1).prod(1) * loss).sum()
    total.backward()
    assert logits.grad.abs().max() < 1e-14


# Targets


def test_targets_are_laws_with_the_properties_they_are_named_for():
    for target, d, letters in (
        (targets.product, 3, 4),
        (targets.ising_ring, 4, 2),
        (targets.potts_ring, 3, 3),
        (targets.parity, 4, 2),
        (targets.two_point_mixture, 3, 3),
        (targets.markov_chain, 4, 3),
    ):
        law = target(d, letters, draws())
        assert law.shape == (letters,) * d
        assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    chain = targets.markov_chain(5, 3, draws())
    assert chain.sum((3, 4)) == pytest.approx(chain.sum((0, 4)).reshape(3, 3, 3), abs=1e-12)  # stationary
    parity = targets.parity(4, 2, draws())
    assert float(parity[0, 1, 0, 0]) == 0 < float(parity[1, 1, 0, 0])


def test_rows_of_a_law_follow_it_and_are_a_function_of_the_step():
    law = targets.ising_ring(4, 2, DRAW)
    rows = targets.Samples(law, 20_000, seed=3, rank=0, world=1)
    space = ExactLaw(CTMC(Uniform(2), Constant()), law).space
    assert tv(law.flatten(), counted(rows[5]["x"], space)) < 0.02
    halves = [targets.Samples(law, 20_000, 3, rank, 2)[5]["x"] for rank in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), rows[5]["x"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dimension": 23}, "8,388,608 states, and at most 4,194,304"),
        ({"letters": 1}, "at least two"),
        ({"letters": 3}, "target=potts_ring"),
        ({"dimension": 0}, "data.dimension=0"),
        ({"target": lambda d, s, draw: torch.full((2,) * d, 0.1)}, "sum to one"),
        ({"target": lambda d, s, draw: torch.ones(2)}, "shape"),
        ({"target": lambda d, s, draw: targets.product(d, s, draw, first=1.0)}, r"first=1.0 must lie in \(0, 1\)"),
        ({"target": lambda d, s, draw: targets.markov_chain(d, s, draw, order=6)}, "order=6"),
    ],
)
def test_data_that_make_no_law_are_refused(change, reason):
    settings = {"dimension": 6, "letters": 2, "copies": 1, "problem": 0, "batch_size": 8, "limit": None, "seed": 1}
    with pytest.raises(ValueError, match=reason):
        targets.SimulatedCategories(**{"name": "x", "target": targets.ising_ring, **settings, **change})
