"""The tables of the derivation: laws of samplers on enumerable targets, exactly, and the bounds on them."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from datamodules import simulated_categories as targets
from lightning_modules.processes import ctmc_grids
from lightning_modules.processes.ctmc import CTMC, Denoiser
from lightning_modules.processes.ctmc_jumps import FirstHitting, Frozen, FrozenMid, Uniformization
from lightning_modules.processes.ctmc_kernels import Absorbing, Uniform
from lightning_modules.processes.ctmc_leaps import DFM, Ancestral, EulerJump, PoissonTau, TauExp, Tweedie
from lightning_modules.processes.ctmc_orders import Ordered
from lightning_modules.processes.ctmc_schedules import Constant, LogLinear
from lightning_modules.processes.exact_law import ExactLaw, Space, early_stopping, kl, on_states, path_bound, tv

DRAW = torch.Generator().manual_seed(0)
TABLE_2 = {  # (frozen KL, TV, path bound, euler, tau_exp, tweedie KL) by number of steps
    16: (1.831e-1, 0.2409, 2.039e-1, 1.963e-1, 2.995e-1, 1.084e-1),
    64: (1.818e-2, 0.0782, 2.228e-2, 1.416e-2, 3.361e-2, 8.995e-3),
    256: (1.276e-3, 0.0202, 1.656e-3, 8.257e-4, 2.397e-3, 5.445e-4),
    512: (3.242e-4, 0.0101, 4.262e-4, 2.024e-4, 6.095e-4, 1.343e-4),
}


def time(t: float) -> torch.Tensor:
    return torch.tensor(t, dtype=torch.float64)


def uniform_law(data: torch.Tensor) -> ExactLaw:
    return ExactLaw(CTMC(Uniform(data.shape[0]), Constant()), data)


def ising(d: int = 6, J: float = 0.5, h: float = 0.2) -> ExactLaw:
    return uniform_law(targets.ising_ring(d, 2, DRAW, J, h))


def reached(law: ExactLaw, sampler, grid: torch.Tensor, denoiser: Denoiser | None = None) -> tuple[float, float]:
    """(KL, TV) of q_delta and the sampler's law."""
    found, wanted = law.propagate(sampler, denoiser or law.denoiser(), grid), law.noised(grid[-1])
    return kl(wanted, found), tv(wanted, found)


def uniform_grid(law: ExactLaw, start: float, stop: float, steps: int) -> torch.Tensor:
    return ctmc_grids.uniform(law.process.schedule, start, stop, steps)


def kappa_grid(law: ExactLaw, start: float, stop: float, kappa: float) -> torch.Tensor:
    return ctmc_grids.kappa(law.process.schedule, start, stop, kappa)


def slope(x: list, y: list) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def test_the_ising_ring_is_the_one_of_the_derivation():
    data = ising().data
    assert float(-(data * data.log()).sum()) == pytest.approx(2.9418757, abs=5e-8)
    assert float(data[(1,) * 6]) == pytest.approx(0.3712868, abs=5e-8)
    assert float(data[(0,) * 6]) == pytest.approx(0.0336824, abs=5e-8)


@pytest.mark.parametrize(
    ("data", "truncations", "bounds"),
    [
        (
            targets.ising_ring(8, 2, DRAW, 0.5, 0.0),
            (1.938e-2, 3.780e-4, 6.991e-6, 1.282e-7, 2.349e-9),
            (3.31e-1, 1.22e-1, 4.48e-2, 1.65e-2, 6.06e-3),
        ),
        (
            torch.zeros(4, 4, 4).index_put((torch.tensor(0),) * 3, torch.tensor(1.0)),
            (0.5209, 0.07642, 0.01081, 0.001492),
            (1.530, 0.5628, 0.2071, 0.0762),
        ),
    ],
)
def test_truncation_falls_at_least_as_fast_as_the_entropy_inequality_says(data, truncations, bounds):
    law = uniform_law(data)
    start = kl(law.data.flatten(), law.limit)
    for t, (truncation, bound) in enumerate(zip(truncations, bounds), start=1):
        assert kl(law.noised(time(t)), law.limit) == pytest.approx(truncation, rel=1e-3)
        assert math.exp(-t) * start == pytest.approx(bound, rel=5e-3)
        assert truncation < bound


def test_a_symmetric_target_forgets_at_twice_the_exponent_of_a_point_mass():
    symmetric, point = ising(8, 0.5, 0.0), uniform_law(torch.eye(2, dtype=torch.float64)[0])
    rates = [kl(law.noised(time(5)), law.limit) / kl(law.noised(time(6)), law.limit) for law in (symmetric, point)]
    assert rates[0] == pytest.approx(math.exp(4), rel=0.01)
    assert rates[1] == pytest.approx(math.exp(2), rel=0.01)


@pytest.mark.parametrize("steps", [16, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (64, 256))])
def test_errors_at_a_number_of_steps(steps):
    law = ising()
    grid = uniform_grid(law, 8.0, 0.0, steps)
    divergence, variation, bound, *others = TABLE_2[steps]
    assert reached(law, Frozen(), grid) == (pytest.approx(divergence, rel=1e-3), pytest.approx(variation, abs=1e-4))
    assert path_bound(law, Frozen(), law.denoiser(), grid).total == pytest.approx(bound, rel=1e-3)
    for sampler, expected in zip((EulerJump(), TauExp(), Tweedie()), others):
        assert reached(law, sampler, grid)[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "column"), [(Frozen(), 0), (EulerJump(), 3), (TauExp(), 4), (Tweedie(), 5)])
def test_frozen_scores_and_leaps_are_second_order_in_kl_and_first_in_tv(sampler, column):
    law = ising()
    errors = [reached(law, sampler, uniform_grid(law, 8.0, 0.0, steps)) for steps in (256, 512)]
    assert errors[1][0] == pytest.approx(TABLE_2[512][column], rel=2e-3)
    for order, (before, after) in zip((-2, -1), zip(*errors)):
        assert slope([256, 512], [before, after]) == pytest.approx(order, abs=0.1)


def test_midpoint_freezing_is_fourth_order_in_kl():
    law, found = ising(4), {}
    for kappa in (0.2, 0.1):
        found[kappa] = reached(law, FrozenMid(), kappa_grid(law, 12.0, 0.1, kappa))[0]
    assert slope(list(found), list(found.values())) > 3.5


@pytest.mark.slow
def test_midpoint_freezing_at_long_and_decaying_grids():
    law = ising()
    for steps, middle, left in ((96, 2.590e-4, 1.818e-2), (192, 1.883e-5, 4.924e-3), (384, 1.236e-6, 1.276e-3)):
        grid = uniform_grid(law, 12.0, 0.0, steps)
        assert reached(law, FrozenMid(), grid)[0] == pytest.approx(middle, rel=2e-3)
        assert reached(law, Frozen(), grid)[0] == pytest.approx(left, rel=2e-3)
    paths = [path_bound(law, sampler, law.denoiser(), grid).total for sampler in (FrozenMid(), Frozen())]
    assert paths[0] / paths[1] == pytest.approx(0.26, abs=0.01)
    decaying = kappa_grid(law, 12.0, 1e-3, 0.2)
    assert reached(law, FrozenMid(), decaying)[0] == pytest.approx(4.46e-6, rel=5e-3)
    assert reached(law, Frozen(), decaying)[0] == pytest.approx(2.46e-3, rel=5e-3)


def test_on_products_error_is_exactly_linear_in_dimension_and_tweedie_makes_none():
    per_coordinate = []
    for d in (2, 4, 5):
        law = uniform_law(targets.product(d, 2, DRAW, 0.8))
        grid = uniform_grid(law, 8.0, 0.0, 64)
        per_coordinate.append(reached(law, Frozen(), grid)[0] / d)
        assert reached(law, Tweedie(), grid)[0] - kl(law.noised(time(8.0)), law.limit) < 1e-12
    assert per_coordinate == pytest.approx([1.0665e-3] * 3, rel=1e-4)
    assert max(per_coordinate) - min(per_coordinate) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "per_coordinate", "law_slope", "path_slope"),
    [
        (targets.ising_ring, (3.041e-3, 3.030e-3, 3.028e-3, 3.028e-3), 0.995, 0.992),
        (targets.two_point_mixture, (6.674e-3, None, None, 6.715e-3), 1.007, 1.009),
    ],
)
def test_error_is_linear_in_dimension(target, per_coordinate, law_slope, path_slope):
    dimensions, errors, paths = [4, 6, 8, 10], [], []
    for d, expected in zip(dimensions, per_coordinate):
        law = uniform_law(target(d, 2, DRAW))
        grid = uniform_grid(law, 8.0, 0.0, 64)
        errors.append(reached(law, Frozen(), grid)[0])
        paths.append(path_bound(law, Frozen(), law.denoiser(), grid).total)
        if expected:
            assert errors[-1] / d == pytest.approx(expected, rel=1e-3)
    assert slope(dimensions, errors) == pytest.approx(law_slope, abs=2e-3)
    assert slope(dimensions, paths) == pytest.approx(path_slope, abs=2e-3)


EARLY = [  # kappa, delta, steps, KL, path, TV to the data
    (0.4, 1e-2, 27, 9.55e-3, 2.69e-2, 0.0586),
    (0.2, 1e-2, 56, 1.90e-3, 5.90e-3, 0.0407),
    (0.1, 1e-2, 114, 4.28e-4, 1.39e-3, 0.0343),
    (0.05, 1e-2, 230, 1.02e-4, 3.39e-4, 0.0316),
    (0.05, 1e-3, 275, 2.96e-5, 3.51e-4, 0.0034),
    (None, 1e-2, 64, 1.35e-1, 1.47e-1, 0.203),
    (None, 1e-3, 64, 1.92e-1, 2.058e-1, 0.188),  # of the path 1.99e-1 by a rule of four nodes in a step
]


@pytest.mark.parametrize("row", [pytest.param(r, marks=pytest.mark.slow) if r[2] > 30 else r for r in EARLY])
def test_early_stopping_on_a_target_with_states_of_probability_zero(row):
    kappa, delta, steps, divergence, path, variation = row
    law = uniform_law(targets.parity(6, 2, DRAW))
    grid = kappa_grid(law, 8.0, delta, kappa) if kappa else uniform_grid(law, 8.0, delta, steps)
    assert len(grid) - 1 == steps
    found = law.propagate(Frozen(), law.denoiser(), grid)
    assert kl(law.noised(grid[-1]), found) == pytest.approx(divergence, rel=5e-3)
    assert path_bound(law, Frozen(), law.denoiser(), grid).total == pytest.approx(path, rel=5e-3)
    assert tv(law.data.flatten(), found) == pytest.approx(variation, abs=5e-4)


def test_early_stopping_costs_what_the_bound_says():
    for delta in (1e-1, 1e-2, 1e-3):
        law, bound = uniform_law(targets.parity(6, 2, DRAW)), early_stopping(6, 2, delta)
        assert tv(law.data.flatten(), law.noised(time(delta))) <= bound * (1 + 1e-12)
        assert bound <= 6 * delta / 2


@pytest.mark.slow
def test_the_path_bound_falls_with_the_square_of_kappa():
    law = ising()
    for kappa, constant in ((0.4, 0.174), (0.2, 0.158), (0.1, 0.150), (0.05, 0.146)):
        grid = kappa_grid(law, 8.0, 1e-3, kappa)
        assert path_bound(law, Frozen(), law.denoiser(), grid).total / kappa**2 == pytest.approx(constant, abs=1e-3)


def tilted(law: ExactLaw, eta: float) -> Denoiser:
    tilt = torch.tensor([-eta, eta], dtype=torch.float64).exp()
    return Denoiser(law.process, lambda x, t: law.score(x, t) * tilt, "score")


@pytest.mark.slow
def test_a_persistent_score_error_is_quadratic_and_a_third_of_its_bound():
    law, grid, found = ising(), uniform_grid(ising(), 6.0, 0.01, 200), {}
    assert reached(law, Frozen(), grid)[0] == pytest.approx(1.074e-3, rel=1e-3)
    table = {0.05: (7.27e-3, 2.15e-2), 0.1: (3.034e-2, 8.68e-2), 0.2: (1.253e-1, 3.54e-1), 0.4: (4.935e-1, 1.452)}
    for eta, (divergence, path) in table.items():
        found[eta] = reached(law, Frozen(), grid, tilted(law, eta))[0]
        bound = path_bound(law, Frozen(), tilted(law, eta), grid).total
        assert found[eta] == pytest.approx(divergence, rel=2e-3)
        assert bound == pytest.approx(path, rel=3e-3)
        assert 0.33 < found[eta] / bound < 0.36
    assert 1.9 < slope(list(found), list(found.values())) < 2.15


def test_score_error_at_the_grid_is_that_of_the_path_where_steps_are_short():
    law = ising(4)
    bound = path_bound(law, Frozen(), tilted(law, 0.4), uniform_grid(law, 6.0, 0.1, 60))
    assert bound.score == pytest.approx(bound.total, rel=0.1)
    assert path_bound(law, Frozen(), law.denoiser(), uniform_grid(law, 6.0, 0.1, 5)).score == 0


@pytest.mark.parametrize(("letters", "expected"), [(2, 0.0), (3, 6.48e-4), (4, 1.456e-3), (6, 2.581e-3), (8, 3.260e-3)])
def test_error_by_the_size_of_the_alphabet(letters, expected):
    law = uniform_law(targets.product(3, letters, DRAW, 0.5))
    found = reached(law, Frozen(), uniform_grid(law, 8.0, 0.0, 64))[0]
    assert found == pytest.approx(expected, rel=2e-3, abs=1e-12)


# Other samplers


def test_every_bound_holds_and_leaps_that_reject_do_worst():
    law = ising(3)
    grid = uniform_grid(law, 6.0, 0.0, 12)
    for sampler in (Frozen(), FrozenMid(), Frozen(corrector=0.0)):
        bound = kl(law.noised(grid[0]), law.limit) + path_bound(law, sampler, law.denoiser(), grid).total
        assert reached(law, sampler, grid)[0] <= bound
    errors = {type(s): reached(law, s, grid)[0] for s in (PoissonTau(), TauExp(), Tweedie())}
    assert errors[Tweedie] < errors[TauExp] < errors[PoissonTau]


def test_ancestral_steps_from_the_posterior_are_tweedies_from_the_score():
    law = uniform_law(targets.potts_ring(3, 3, DRAW))
    grid = uniform_grid(law, 4.0, 0.1, 8)
    assert law.propagate(Ancestral(), law.denoiser(), grid) == pytest.approx(
        law.propagate(Tweedie(), law.denoiser(), grid), abs=1e-12
    )


def test_flow_matching_with_its_corrector_stays_first_order():
    law = ising(3)
    for sampler in (DFM(), DFM(corrector=1.0), TauExp(corrector=0.0)):
        errors = [reached(law, sampler, kappa_grid(law, 6.0, 0.2, kappa))[1] for kappa in (0.2, 0.1)]
        assert slope([0.2, 0.1], errors) == pytest.approx(1, abs=0.15)


def test_uniformization_has_no_error_but_that_of_its_start():
    law = ising(3)
    grid = kappa_grid(law, 2.0, 0.2, 0.9)
    assert law.propagate(Uniformization(), law.denoiser(), grid, law.noised(grid[0])) == pytest.approx(
        law.noised(grid[-1]), abs=1e-7
    )


# The absorbing kernel


def masked() -> ExactLaw:
    return ExactLaw(CTMC(Absorbing(2), LogLinear(eps=0.0)), ising().data)


@pytest.mark.parametrize(("steps", "expected"), [(1, 0.5119), (4, 3.208e-2), (16, 2.138e-3), (64, 1.369e-4)])
def test_masked_ancestral_steps(steps, expected):
    law = masked()
    found = law.propagate(Ancestral(), law.denoiser(), uniform_grid(law, 1.0, 0.0, steps))
    data = on_states(law.data, law.space)
    assert kl(data, found) == pytest.approx(expected, rel=1e-3)
    if steps == 1:
        assert tv(data, found) == pytest.approx(0.385, abs=5e-4)


@pytest.mark.slow
def test_masked_ancestral_steps_are_second_order_in_kl():
    law = masked()
    found = law.propagate(Ancestral(), law.denoiser(), uniform_grid(law, 1.0, 0.0, 256))
    assert kl(on_states(law.data, law.space), found) == pytest.approx(8.617e-6, rel=1e-3)
    assert tv(on_states(law.data, law.space), found) == pytest.approx(1.485e-3, rel=1e-3)
    assert slope([64, 256], [1.369e-4, kl(on_states(law.data, law.space), found)]) == pytest.approx(-2, abs=0.1)


def test_one_mask_at_a_time_is_exact_also_with_frozen_rates():
    law = masked()
    data = on_states(law.data, law.space)
    for sampler in (Frozen(), FrozenMid()):
        found = law.propagate(sampler, law.denoiser(), uniform_grid(law, 1.0, 0.0, 2))
        assert kl(data, found) < 1e-11
    small = ExactLaw(CTMC(Absorbing(2), LogLinear(eps=0.0)), ising(3).data)
    for sampler in (FirstHitting(), Uniformization()):
        found = small.propagate(sampler, small.denoiser(), uniform_grid(small, 1.0, 0.4, 1))
        assert found == pytest.approx(small.noised(time(0.4)), abs=1e-7)


def test_masked_leaps_are_one_rule_whatever_the_route():
    law = masked()
    grid = uniform_grid(law, 0.9, 0.1, 3)
    start = law.noised(grid[0])
    expected = law.propagate(Ancestral(), law.denoiser(), grid, start)
    for sampler in (Tweedie(), TauExp(), DFM()):
        assert law.propagate(sampler, law.denoiser(), grid, start) == pytest.approx(expected, abs=1e-12)


def test_a_last_denoising_shows_every_mask():
    law = masked()
    denoiser, grid = law.denoiser(), uniform_grid(law, 1.0, 0.1, 40)
    left = law.propagate(Frozen(), denoiser, grid)
    found = law.denoised(denoiser, left, grid[-1])
    assert float(found.reshape((3,) * 6)[:2, :2, :2, :2, :2, :2].sum()) == pytest.approx(1)
    assert tv(found, on_states(law.data, law.space)) < tv(left, on_states(law.data, law.space))


# The harness itself


def test_laws_and_rates_equal_dense_matrices():
    scipy = pytest.importorskip("scipy.linalg")
    law = uniform_law(targets.potts_ring(3, 3, DRAW, h=0.5))
    q = np.full((3, 3), 1 / 3) - np.eye(3)
    for t in (0.1, 1.0, 5.0):
        assert np.allclose(Uniform(3).transition(time(t)).numpy(), scipy.expm(t * q), atol=1e-14, rtol=0)
    eye = np.eye(3)
    generator = sum(np.kron(np.kron(*pair[:2]), pair[2]) for pair in ([q, eye, eye], [eye, q, eye], [eye, eye, q]))
    dense = law.data.flatten().numpy() @ scipy.expm(0.7 * generator)
    assert np.allclose(law.noised(time(0.7)).numpy(), dense, atol=1e-14, rtol=0)
    jumps = law.rates(time(0.7)[None])[0]
    matrix = np.zeros((27, 27))
    for x in range(27):
        np.add.at(matrix[x], law.space.neighbours[x].flatten().numpy(), jumps[x].flatten().numpy())
        matrix[x, x] -= jumps[x].sum()
    moved = dense @ scipy.expm(3.0 * matrix)
    assert np.allclose(law.jumped(3.0 * jumps, torch.from_numpy(dense)).numpy(), moved, atol=1e-13, rtol=0)


def test_the_reverse_flow_undoes_the_forward_one():
    law, t, h = uniform_law(targets.potts_ring(3, 3, DRAW)), 0.4, 1e-4
    backward = law.flow(law.rates(time(t)[None])[0], law.noised(time(t)))
    change = (law.noised(time(t - h)) - law.noised(time(t + h))) / (2 * h)
    assert backward == pytest.approx(change, abs=1e-8)
    assert float(backward.sum()) == pytest.approx(0, abs=1e-14)


def test_the_corrector_leaves_the_law_of_the_noise_as_it_is():
    law, t = uniform_law(targets.potts_ring(3, 3, DRAW)), time(0.4)
    x, q = law.space.states, law.noised(t)
    reverse, flow = (law.denoiser().rates(x, t, corrector) for corrector in (1.0, 0.0))
    assert law.flow(reverse - flow, q) == pytest.approx(torch.zeros(27, dtype=torch.float64), abs=1e-14)
    posterior = law.denoiser().posterior(x, t)
    here = posterior.gather(-1, x[..., None])
    expected = (1 - here * 3 / (math.expm1(0.4) + 3)) / 3
    elsewhere = torch.arange(3) != x[..., None]
    assert ((reverse - flow)[elsewhere]) == pytest.approx(expected.expand(-1, -1, 3)[elsewhere], abs=1e-14)


def test_flow_matching_makes_fewer_jumps_than_the_reverse_chain():
    law, grid, moves = ising(), uniform_grid(ising(), 8.0, 0.0, 32), {}
    for corrector in (0.0, 1.0):
        sampler, now, moves[corrector] = FrozenMid(corrector), law.limit, 0.0
        for t, u in pairwise(grid):
            after = law.step(sampler, law.denoiser(), now, t, u)
            moves[corrector] += law.moves(sampler, law.denoiser(), now, after, t, u)
            now = after
    assert moves[1.0] == pytest.approx(24, rel=0.02)
    assert moves[0.0] == pytest.approx(2.97, rel=0.02)


def test_scores_state_by_state_are_those_of_the_table():
    for kernel, schedule in ((Uniform(2), Constant()), (Absorbing(2), LogLinear())):
        law = ExactLaw(CTMC(kernel, schedule), ising(4).data)
        x, t = law.space.states, time(0.3)
        alone = torch.cat([law.score(row, t.reshape(1)) for row in (x[:5], x[5:])])
        varied = law.score(x, torch.cat([time(0.4)[None], t.expand(len(x) - 1)]))
        assert varied[1:] == pytest.approx(alone[1:], rel=1e-9, abs=1e-12)


def test_what_cannot_be_enumerated_or_is_no_law_is_refused():
    with pytest.raises(ValueError, match=r"3\^14 = 4,782,969 states .* at most 4,194,304"):
        Space(14, 3, 3)
    for data, reason in (
        (torch.full((2, 2), 0.3), "sum to 1.2"),
        (torch.tensor([1.5, -0.5]), "least one of -0.5"),
        (torch.full((2, 3), 1 / 6), "shape"),
        (torch.ones(1), "shape"),
    ):
        with pytest.raises(ValueError, match=reason):
            ExactLaw(CTMC(Uniform(2), Constant()), data)
    law = ising(3)
    with pytest.raises(ValueError, match="no law of it"):
        masked().propagate(Ordered(), masked().denoiser(), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="absorbing kernel"):
        law.propagate(FirstHitting(), law.denoiser(), torch.tensor([1.0, 0.1]))
    big = uniform_law(torch.full((2,) * 17, 2.0**-17, dtype=torch.float64))
    with pytest.raises(ValueError, match="65,536"):
        big.propagate(Tweedie(), big.denoiser(), torch.tensor([1.0, 0.5]))
