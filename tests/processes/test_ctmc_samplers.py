"""Samples against exact laws, conditioning, and the orders of masked samplers."""

import math

import pytest
import torch

from datamodules import simulated_categories as targets
from lightning_modules.processes import ctmc_grids
from lightning_modules.processes.ctmc import CTMC, Denoiser
from lightning_modules.processes.ctmc_jumps import FirstHitting, Frozen, FrozenMid, Uniformization
from lightning_modules.processes.ctmc_kernels import Absorbing, Uniform
from lightning_modules.processes.ctmc_leaps import DFM, Ancestral, EulerJump, PoissonTau, TauExp, Tweedie
from lightning_modules.processes.ctmc_orders import Ordered
from lightning_modules.processes.ctmc_samplers import CategoricalSampler, sample
from lightning_modules.processes.ctmc_schedules import Constant, LogLinear
from lightning_modules.processes.exact_law import ExactLaw, counted, on_states, tv, tv_floor

DRAW = torch.Generator().manual_seed(0)
EVERY = [
    *(Frozen(), FrozenMid(), Uniformization(), EulerJump(), TauExp(), PoissonTau(), Tweedie(), Ancestral(), DFM()),
    Frozen(corrector=0.0),
]


def draws(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ring(d: int = 4) -> ExactLaw:
    return ExactLaw(CTMC(Uniform(2), Constant()), targets.ising_ring(d, 2, DRAW))


def masked(d: int = 6) -> ExactLaw:
    return ExactLaw(CTMC(Absorbing(2), LogLinear(0.0)), targets.ising_ring(d, 2, DRAW))


def samples(law: ExactLaw, sampler, grid, count: int, denoiser: Denoiser | None = None, **options) -> torch.Tensor:
    x = law.process.kernel.limit((count, law.space.d), draws(2))
    return sample(sampler, denoiser or law.denoiser(), x, grid, draws(3), **options)


def chi_square(law: torch.Tensor, x: torch.Tensor, law_of: ExactLaw) -> float:
    expected = law * len(x)
    return float(((counted(x, law_of.space) * len(x) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("sampler", EVERY, ids=lambda s: type(s).__name__)
def test_samples_have_the_law_that_is_propagated(sampler: CategoricalSampler):
    law, count = ring(3), 4000 if isinstance(sampler, Uniformization) else 20_000
    grid = ctmc_grids.kappa(law.process.schedule, 4.0, 0.1, 0.4)
    exact = law.propagate(sampler, law.denoiser(), grid)
    x = samples(law, sampler, grid, count)
    assert tv(exact, counted(x, law.space)) < 2.5 * tv_floor(exact, count)
    assert chi_square(exact, x, law) < 24.3  # 7 degrees of freedom, p > 1e-3


@pytest.mark.slow
def test_waiting_times_simulate_the_frozen_chain_exactly():
    law = ring(4)
    grid = ctmc_grids.uniform(law.process.schedule, 6.0, 0.0, 32)
    exact, denoiser = law.propagate(Frozen(), law.denoiser(), grid), law.denoiser()
    x = samples(law, Frozen(), grid, 60_000, denoiser)
    assert tv_floor(exact, 60_000) == pytest.approx(0.0052, abs=2e-4)
    assert tv(exact, counted(x, law.space)) < 0.008
    assert chi_square(exact, x, law) < 37.7  # 15 degrees of freedom, p > 1e-3
    jumps = denoiser.evaluations / 60_000 - 32
    assert jumps == pytest.approx(12.0, abs=0.2)  # d (1 - 1 / S) T


def test_a_bound_that_rates_exceed_is_noticed():
    law = ring(3)
    grid = ctmc_grids.uniform(law.process.schedule, 4.0, 0.5, 1)
    with pytest.raises(ValueError, match="above the bound"):
        samples(law, Uniformization(bound=0.01), grid, 100)
    with pytest.raises(ValueError, match="stop early"):
        samples(law, Uniformization(), torch.tensor([4.0, 0.0]), 100)


def test_masked_samplers_without_discretisation_are_exact_in_one_step():
    law = masked(4)
    data, grid = on_states(law.data, law.space), torch.tensor([1.0, 0.0])
    for sampler in (FirstHitting(), Frozen()):
        x = samples(law, sampler, grid, 6000)
        assert tv(data, counted(x, law.space)) < 2 * tv_floor(data, 6000)
    denoiser = law.denoiser()
    samples(law, FirstHitting(), grid, 100, denoiser)
    assert denoiser.evaluations == 400  # as many as there are letters


def test_a_grid_of_each_sample_is_that_of_each_sample():
    law = ring(3)
    grid = torch.tensor([[4.0, 4.0], [1.0, 2.0], [0.5, 0.5]], dtype=torch.float64)
    x = law.process.kernel.limit((2, 3), draws())
    together = sample(Frozen(), law.denoiser(), x, grid, draws(5), trajectory=True)
    assert together.shape == (3, 2, 3)
    with pytest.raises(ValueError, match="one clock"):
        sample(Frozen(), law.denoiser(), x, grid[..., None].expand(3, 2, 3), draws())
    by_position = sample(Tweedie(), law.denoiser(), x, grid[..., None].expand(3, 2, 3), draws())
    assert by_position.shape == (2, 3)


@pytest.mark.parametrize("sampler", [*EVERY, Ordered(), FirstHitting()], ids=lambda s: type(s).__name__)
def test_fixed_positions_stay_and_forbidden_letters_never_appear(sampler: CategoricalSampler):
    letters, d = 3, 4
    law = ExactLaw(CTMC(Absorbing(letters), LogLinear(0.0)), targets.potts_ring(d, letters, DRAW))
    allowed = torch.ones(d, letters, dtype=torch.bool)
    allowed[:, 2] = False
    fixed = torch.tensor([True, False, False, False])
    denoiser = law.denoiser(fixed=fixed.expand(500, d), allowed=allowed)
    x = law.process.kernel.limit((500, d), None)
    x[:, 0] = 1
    grid = torch.tensor([1.0, 0.5, 0.001], dtype=torch.float64)
    found = sample(sampler, denoiser, x, grid, draws(), denoise=True)
    assert (found[:, 0] == 1).all()
    assert (found != 2).all()
    assert (found < 3).all()


def test_conditioning_on_a_letter_gives_the_conditional_law():
    law = masked(4)
    x = law.process.kernel.limit((20_000, 4), None)
    x[:, 0] = 0
    found = sample(FirstHitting(), law.denoiser(), x, torch.tensor([1.0, 0.0]), draws())
    conditional = law.data.clone()
    conditional[1] = 0
    exact = on_states(conditional / conditional.sum(), law.space)
    assert tv(exact, counted(found, law.space)) < 2.5 * tv_floor(exact, 20_000)


def test_guidance_multiplies_rates():
    """By the ratio of p(y | x) of two letters: the law becomes the one that y selects."""
    law = ring(3)

    def towards(x, t, posterior, score):
        return score * torch.tensor([0.5, 2.0], dtype=torch.float64) ** 0.5

    grid = ctmc_grids.uniform(law.process.schedule, 6.0, 0.05, 40)
    plain = law.propagate(FrozenMid(), law.denoiser(), grid)
    guided = law.propagate(FrozenMid(), law.denoiser(guide=towards), grid)
    ones = law.space.states.double().mean(1)
    assert float(guided @ ones) > float(plain @ ones) + 0.05
    assert float(guided.sum()) == pytest.approx(1, abs=1e-12)


def test_scores_are_clipped_and_counted():
    law = ring(3)
    denoiser = law.denoiser(ceiling=2.0)
    assert float(denoiser.score(law.space.states, torch.tensor(0.05, dtype=torch.float64)).max()) == 2.0
    assert denoiser.clipped > 0


# Orders


def entropy(law: torch.Tensor) -> float:
    return float(-(law * law.clamp_min(1e-300).log()).sum())


@pytest.mark.parametrize("order", ["random", "confidence", "margin", "entropy"])
def test_one_at_a_time_orders_that_see_the_context_keep_the_law(order: str):
    law = masked()
    data, grid = on_states(law.data, law.space), ctmc_grids.uniform(law.process.schedule, 1.0, 0.0, 6)
    x = samples(law, Ordered(order), grid, 20_000)
    assert tv(data, counted(x, law.space)) < 2 * tv_floor(data, 20_000)


@pytest.mark.parametrize(("steps", "expected"), [(6, 0.54), (2, 1.55)])
def test_the_published_order_ranks_sampled_letters_and_collapses(steps: int, expected: float):
    law = masked()
    data, grid = on_states(law.data, law.space), ctmc_grids.uniform(law.process.schedule, 1.0, 0.0, steps)
    x = samples(law, Ordered("sampled", remask=True), grid, 20_000)
    found = counted(x, law.space)
    assert entropy(found) == pytest.approx(expected, abs=0.03)
    assert tv(data, found) > 0.3


def test_the_published_order_with_noise_on_its_ranks_collapses_less():
    law = masked()
    grid = ctmc_grids.uniform(law.process.schedule, 1.0, 0.0, 6)
    x = samples(law, Ordered("sampled", remask=True, noise=1.0), grid, 20_000)
    assert entropy(counted(x, law.space)) == pytest.approx(1.19, abs=0.03)
    assert entropy(on_states(law.data, law.space)) == pytest.approx(2.942, abs=1e-3)


def test_an_order_hides_as_many_as_the_schedule_says_also_where_all_rank_alike():
    process, seen = CTMC(Absorbing(5), LogLinear(0.0)), []

    def even(x, t):
        seen.append(int((x == 5).sum(1).unique()))
        return torch.full((len(x), 10, 5), 0.2, dtype=torch.float64)

    grid = ctmc_grids.uniform(process.schedule, 1.0, 0.0, 4)
    x = process.kernel.limit((50, 10), None)
    found = sample(Ordered("confidence"), Denoiser(process, even, "posterior"), x, grid, draws())
    assert seen == [10, 7, 5, 2]
    assert (found < 5).all()
    seen.clear()
    groups = torch.tensor([0] * 4 + [1] * 6)
    sampler = Ordered("confidence", groups=groups, temperature=[2.0, 1.0])
    found = sample(sampler, Denoiser(process, even, "posterior"), x, grid, draws())
    assert seen == [10, 7, 5, 2]
    assert (found < 5).all()


def test_options_out_of_range_are_refused():
    for make, reason in (
        (lambda: Ordered("best"), "random, confidence"),
        (lambda: Ordered(temperature=[0.0, 1.0]), "positive"),
        (lambda: Frozen(corrector=-1.0), "negative"),
        (lambda: TauExp(corrector=-1.0), "negative"),
        (lambda: DFM(corrector=-1.0), "negative"),
        (lambda: Uniformization(bound=-1.0), "positive"),
        (lambda: samples(ring(3), Ordered(), torch.tensor([1.0, 0.1]), 5), "absorbing kernel"),
        (lambda: samples(ring(3), Frozen(), torch.tensor([1.0, 2.0]), 5), "fall strictly"),
    ):
        with pytest.raises(ValueError, match=reason):
            make()


def test_a_mask_may_be_a_letter_of_its_own_for_every_position():
    mask = torch.tensor([4, 4, 5])
    process = CTMC(Absorbing(6, mask), LogLinear(0.0))
    allowed = torch.zeros(3, 6, dtype=torch.bool)
    allowed[:2, :2], allowed[2, 2:4] = True, True
    denoiser = Denoiser(process, lambda x, t: torch.zeros(len(x), 3, 6), "logits", allowed=allowed)
    grid = torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64)
    for sampler in (Ancestral(), Ordered(), FirstHitting(), TauExp()):
        x = sample(sampler, denoiser, process.kernel.limit((400, 3), None), grid, draws())
        assert (x[:, :2] < 2).all()
        assert ((x[:, 2] > 1) & (x[:, 2] < 4)).all()
        assert math.isclose(float((x[:, 0] == 0).double().mean()), 0.5, abs_tol=0.1)
