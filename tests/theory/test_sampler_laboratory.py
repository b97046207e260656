"""The laboratory of samplers: exact predictions, exact distances, and the table of arXiv 2410.14237's simulation."""

import math

import jaxtyping
import pytest
import torch

from datamodules.simulated_density import mixture
from lightning_modules.processes.grids import exponential_decay, log_snr, uniform
from lightning_modules.processes.ode import (
    DDIM,
    DPM2,
    RK4,
    DPMpp2M,
    EDMHeun,
    Euler,
    ExponentialIntegrator,
    Heun,
    Midpoint,
    moved,
    sample,
)
from lightning_modules.processes.paths import VP, Linear
from lightning_modules.processes.prediction import Prediction
from lightning_modules.theory.mixtures import NoisedMixture, exact
from lightning_modules.theory.sampler_laboratory import Laboratory, perturbed, recomputed, tv_bound
from lightning_modules.theory.sampler_studies import Cell, Dimension, Orders, ScoreError, StepsNeeded, last_slope
from lightning_modules.theory.transport import (
    FoldedMap,
    gaussian_total_variation,
    interpolated,
    log_normal,
    nodes,
    total_variation,
    transported,
)

PAIR = mixture([0.3, 0.7], [[-1.4], [0.6]], [0.16, 0.16])
PLANE = mixture([0.6, 0.4], [[-1.0, 0.3], [0.8, -0.5]], [[[0.3, 0.12], [0.12, 0.15]], 0.2])


@pytest.fixture(autouse=True)
def _shapes_unchecked():
    """Thousands of short steps: the checks of shapes, made in tests/processes, would be most of the time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def laboratory(path=None, start=8.0, stop=1e-2, kind="velocity", points=601, density=PAIR):
    return Laboratory(density, path or VP(), kind, start, stop, points)


def tv(sampler, make, steps, **settings):
    lab = laboratory(**settings)
    return lab.log_ratio(sampler, lab.grid(make, steps)).tv


@pytest.mark.parametrize("density", [PAIR, PLANE], ids=["line", "plane"])
def test_scores_and_their_divergence_are_derivatives_of_the_density(density):
    law, t = NoisedMixture(density), torch.tensor(0.3, dtype=torch.float64)
    alpha, sigma = VP().alpha(t), VP().sigma(t)
    x = torch.randn(20, density.means.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    (score,) = torch.autograd.grad(law.log_density(x, alpha, sigma).sum(), x, create_graph=True)
    torch.testing.assert_close(law.score(x, alpha, sigma), score, rtol=1e-10, atol=1e-12)
    rows = [torch.autograd.grad(score[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(x.shape[1])]
    torch.testing.assert_close(law.score_divergence(x, alpha, sigma), sum(rows), rtol=1e-9, atol=1e-10)


def test_exact_predictions_of_all_kinds_are_one():
    t = torch.tensor(0.3, dtype=torch.float64)
    x = torch.randn(20, 2, dtype=torch.float64)
    for path in (VP(), Linear()):
        for kind in ("noise", "data", "velocity", "score"):
            found = Prediction(path, exact(PLANE, path, kind), kind).score(x, t)
            torch.testing.assert_close(found, exact(PLANE, path, "score")(x, t.expand(20)), rtol=1e-9, atol=1e-10)


def test_exact_predictions_are_finite_at_both_ends_of_the_straight_path():
    x = torch.randn(20, 2, dtype=torch.float64)
    velocity = exact(PLANE, Linear(), "velocity")
    torch.testing.assert_close(velocity(x, torch.ones(20).double()), x - PLANE.weights @ PLANE.means)
    assert velocity(x, torch.zeros(20).double()).isfinite().all()


# Distances


def test_total_variation_of_a_scaled_normal_is_the_closed_form():
    for d in (1, 2):
        z, volume = nodes(d, 401 if d == 2 else None)
        _, log_det = transported(lambda z: 1.2 * z, z)
        found = total_variation(log_normal(z), log_normal(1.2 * z), log_det, volume)
        assert found == pytest.approx(gaussian_total_variation(1.2**2, d), rel=2e-3)
    assert gaussian_total_variation(1.001, 64) == pytest.approx(0.2821 * 0.001 * 8, rel=0.01)


def test_the_initial_error_is_that_of_the_specification():
    """It falls like e^-3t for this density, whose first two moments are those of the standard normal."""
    known = {1.0: 4.9e-3, 2.0: 2.1e-4, 3.0: 1.0e-5, 4.0: 5.2e-7, 6.0: 1.3e-9, 8.0: 3.2e-12}
    for start, expected in known.items():
        assert laboratory(start=start, points=4001).initial_error() == pytest.approx(expected, rel=0.05)
    shifted = [laboratory(start=s, density=mixture([1.0], [[0.7]], [0.16])).initial_error() for s in (4.0, 5.0)]
    assert shifted[0] / shifted[1] == pytest.approx(math.e, rel=0.02)  # with another mean like e^-t


def test_a_fold_is_refused_where_a_step_exceeds_the_inverse_lipschitz_constant():
    with pytest.raises(FoldedMap, match="the map folds"):
        tv(Heun(), uniform, 16)


def test_a_map_that_turns_the_plane_has_its_whole_determinant():
    z, _ = nodes(2, 11)
    matrix = torch.tensor([[1.0, 2.0], [-0.5, 1.5]], dtype=torch.float64)
    _, log_det = transported(lambda z: z @ matrix.T, z)
    torch.testing.assert_close(log_det, torch.full_like(log_det, math.log(2.5)))


def test_interpolation_is_exact_on_a_line():
    z = torch.linspace(-8, 8, 17, dtype=torch.float64)
    at = torch.tensor([-8.0, -7.3, 0.25, 7.99, 8.0], dtype=torch.float64)
    torch.testing.assert_close(interpolated(2 * z + 1, z, at), 2 * at + 1)


# The table of samplers.md, section 6


class EDMHeunToZero(EDMHeun):
    """Heun's correction made at sigma = 0 too, where the exact noise is 0 but that of a network means nothing."""

    def singular(self, prediction, t, u):
        return torch.isinf(prediction.path.log_snr(t))


TABLE = [  # sampler, grid, stop, TV at 128 and at 256 steps
    (DDIM, exponential_decay, 1e-2, 1.03e-2, 5.09e-3),
    (DPMpp2M, exponential_decay, 1e-2, 2.38e-4, 5.90e-5),
    (ExponentialIntegrator, uniform, 1e-2, 5.44e-2, 2.76e-2),
    (DPMpp2M, uniform, 0.0, 0.14, 8.5e-2),
]
REST = [
    (Euler, exponential_decay, 1e-2, 1.41e-2, 7.03e-3),
    (ExponentialIntegrator, exponential_decay, 1e-2, 1.18e-2, 5.85e-3),
    (Heun, exponential_decay, 1e-2, 4.44e-4, 1.08e-4),
    (EDMHeun, exponential_decay, 1e-2, 5.26e-4, 1.28e-4),
    (DPM2, exponential_decay, 1e-2, 2.05e-4, 4.99e-5),
    (ExponentialIntegrator, log_snr, 1e-2, 1.51e-2, 7.62e-3),
    (DDIM, log_snr, 1e-2, 1.14e-2, 5.68e-3),
    (DDIM, uniform, 1e-2, 4.99e-2, 2.63e-2),
    (ExponentialIntegrator, uniform, 0.0, 5.93e-2, 3.00e-2),
    (EDMHeunToZero, uniform, 0.0, 3.2e-2, 1.05e-2),
    (DPM2, uniform, 0.0, 0.13, 7.9e-2),
]


@pytest.mark.parametrize(
    ("sampler", "make", "stop", "before", "after"),
    [*TABLE, *[pytest.param(*row, marks=pytest.mark.slow) for row in REST]],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_total_variation_is_that_of_the_table(sampler, make, stop, before, after):
    found = [tv(sampler(), make, steps, stop=stop) for steps in (128, 256)]
    # the largest values are given to two figures
    assert found == pytest.approx((before, after), rel=0.04 if before > 0.1 else 0.02)
    if make is not uniform:  # on which even 256 steps are too few for the asymptotic slope
        assert math.log2(found[0] / found[1]) == pytest.approx(sampler.order, abs=0.05 if sampler.order == 1 else 0.08)


@pytest.mark.slow
def test_ddim_loses_its_order_on_a_uniform_grid_that_ends_at_zero():
    found = [tv(DDIM(), uniform, steps, stop=0.0) for steps in (256, 512)]
    assert found == pytest.approx((8.17e-2, 4.87e-2), rel=0.02)
    assert math.log2(found[0] / found[1]) == pytest.approx(0.75, abs=0.1)


def test_kl_of_a_first_order_method_falls_with_the_square_of_the_steps():
    lab = laboratory()
    found = [lab.log_ratio(DDIM(), lab.grid(exponential_decay, steps)).kl for steps in (32, 64)]
    assert found == pytest.approx((8.30e-3, 1.92e-3), rel=0.02)


@pytest.mark.parametrize(
    ("sampler", "first", "last", "order"),
    [
        (Euler, 9.41e-2, 2.93e-3, 1),
        pytest.param(Midpoint, 4.75e-3, 5.43e-6, 2, marks=pytest.mark.slow),
        pytest.param(Heun, 7.82e-3, 9.40e-6, 2, marks=pytest.mark.slow),
        pytest.param(RK4, 1.81e-4, 1.63e-10, 4, marks=pytest.mark.slow),
    ],
)
def test_flow_matching_has_the_orders_of_its_methods_from_pure_noise_to_data(sampler, first, last, order):
    straight = {"path": Linear(), "start": 1.0, "stop": 0.0}
    found = [tv(sampler(), uniform, steps, **straight) for steps in (8, 128, 256)]
    assert found[0] == pytest.approx(first, rel=0.02)
    assert found[2] == pytest.approx(last, rel=0.02)
    assert math.log2(found[1] / found[2]) == pytest.approx(order, abs=0.1 if order == 4 else 0.05)


def test_the_fourth_order_method_is_of_fourth_order_to_the_very_end_of_the_straight_path():
    """Also in its last step, onto t = 0: a loop that stops one step early is of first order."""
    found = [tv(RK4(), uniform, steps, path=Linear(), start=1.0, stop=0.0) for steps in (8, 16, 32)]
    assert found[0] == pytest.approx(1.81e-4, rel=0.02)
    assert math.log2(found[1] / found[2]) == pytest.approx(4, abs=0.15)


class LateEuler(Euler):
    """A published loop for flow matching: the velocity at the end of the step instead of its beginning."""

    def step(self, prediction, x, t, u, memory):
        return moved(x, u - t, prediction.drift(x, u)), None


def test_an_euler_loop_with_the_velocity_of_the_next_time_is_of_first_order_still():
    assert tv(LateEuler(), uniform, 8, path=Linear(), start=1.0, stop=0.0) == pytest.approx(9.25e-2, rel=0.02)


def test_a_fourth_order_loop_that_leaves_out_the_last_step_is_of_first_order():
    lab = laboratory(path=Linear(), start=1.0, stop=0.0)
    z, volume = nodes(1, lab.points)
    found = []
    for steps in (8, 16):
        grid = lab.grid(uniform, steps)
        x, log_det = transported(lambda z: sample(RK4(), lab.prediction, z, grid[:-1]), z)  # noqa: B023
        found.append(total_variation(log_normal(z), lab.log_density(x, grid[-1]), log_det, volume))
    assert found[0] == pytest.approx(1.12e-1, rel=0.02)
    assert math.log2(found[0] / found[1]) == pytest.approx(1, abs=0.1)


def test_two_step_extrapolation_beats_ddim_at_ten_evaluations_in_the_plane():
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        density = mixture([0.25] * 4, (1.2 * torch.randn(4, 2, generator=draw)).tolist(), [0.2] * 4)
        found = [tv(one, log_snr, 10, points=41, density=density) for one in (DPMpp2M(), DDIM())]
        assert found[0] < found[1]


# Studies


def test_gaussians_are_over_and_under_dispersed_as_computed_by_hand():
    for sampler, ratio, far in ((ExponentialIntegrator(), 1.4722e-2, 3.289e-2), (DDIM(), -1.3305e-2, 3.014e-2)):
        study = StepsNeeded(exponential_decay, 0.5, [0.1], [64])
        study.begin(laboratory(), sampler)
        assert study.ratio(256) - 1 == pytest.approx(ratio, rel=0.01)
        assert gaussian_total_variation(study.ratio(256), 64) == pytest.approx(far, rel=0.01)


@pytest.mark.parametrize(
    "expected",
    [
        {1: (13, 20, 37, 69), 4: (22, 40, 77, 150)},
        pytest.param(
            {16: (42, 79, 155, 306), 64: (80, 156, 309, 613), 256: (156, 309, 615, 1226)}, marks=pytest.mark.slow
        ),
    ],
)
def test_steps_needed_are_those_of_the_table(expected):
    study = StepsNeeded(exponential_decay, 0.5, [0.1, 0.05, 0.025, 0.0125], list(expected))
    records = [(cell, study.measure(cell)) for cell in study.begin(laboratory(), DDIM())]
    for d, steps in expected.items():
        found = [values["steps"] for cell, values in records if cell.line == f"d = {d}"]
        assert found == pytest.approx(steps, abs=1)
    summary = study.summary(records)
    if 64 in expected:
        assert summary["slope/DDIM/d = 64"] == pytest.approx(1, abs=0.05)
        assert summary["slope_in_d"] == pytest.approx(0.5, abs=0.03)


def test_errors_of_product_targets_grow_with_the_root_of_the_dimension():
    study = Dimension(None, exponential_decay, 256, [1, 4, 16, 64], 40000, 0)
    records = [(cell, study.measure(cell)) for cell in study.begin(laboratory(), DDIM())]
    assert [found["tv"] for _, found in records] == pytest.approx((5.08e-3, 1.15e-2, 2.38e-2, 4.81e-2), rel=0.015)
    assert study.summary(records)["slope/256 steps/DDIM"] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("omegas", "far", "bound"),
    [
        ([4.0], [0.1546], [0.1573]),
        pytest.param([1.0, 4.0, 16.0], [0.0506, 0.1546, 0.5089], [0.0507, 0.1573, 0.6114], marks=pytest.mark.slow),
    ],
)
def test_total_variation_follows_the_divergence_of_the_error_and_stays_below_the_bound(omegas, far, bound):
    study = ScoreError(log_snr, 250, [], omegas, 0.02, 4.0, 100)
    cells = study.begin(laboratory(start=6.0, points=1601), DPM2())
    found = [study.measure(cell) for cell in cells]
    assert [values["tv"] for values in found] == pytest.approx(far, rel=0.02)
    assert [values["bound"] for values in found] == pytest.approx(bound, rel=0.02)
    for cell, values in zip(cells, found):
        assert (0.8 if cell.x <= 16 else 0) * values["bound"] <= values["tv"] <= values["bound"]


def test_the_rate_of_total_variation_is_attained_where_the_densities_agree():
    """Over a short time the bound is an equality: half of E|div e + e.s| times g^2 / 2."""
    lab = laboratory(start=0.51, stop=0.5, points=2001)
    error = lambda x, t: 0.02 * torch.sin(4 * x)  # noqa: E731
    bound, *_ = tv_bound(lab, error, 5, 2001)
    score = perturbed(exact(PAIR, VP(), "score"), error)
    z, volume = nodes(1, 2001)
    grid = torch.linspace(0.51, 0.5, 6, dtype=torch.float64)
    x, log_det = transported(lambda z: sample(RK4(), recomputed(VP(), score, "score"), z, grid), z)
    found = total_variation(lab.log_density(z, grid[0]), lab.log_density(x, grid[-1]), log_det, volume)
    assert found == pytest.approx(bound, rel=0.02)


def test_frequencies_that_the_nodes_do_not_resolve_are_refused():
    with pytest.raises(ValueError, match=r"points per radian: raise model.points to have 4"):
        ScoreError(log_snr, 400, [], [64.0], 0.02, 64.0, 10).begin(laboratory(points=4001), DPM2())


def test_a_sampler_below_the_order_that_it_states_is_not_certified():
    class Pretender(Euler):
        """A first-order method that says it is of second."""

        order = 2

    study = Orders({"ddim": DDIM()}, {"uniform": log_snr}, [16, 32])
    cells = study.begin(laboratory(points=201), Pretender())
    summary = study.summary([(cell, study.measure(cell)) for cell in cells])
    assert summary["certified"] == 0
    assert summary["order"] < 1.3
    assert cells[-1] == Cell("Pretender", "uniform", 32)


def test_what_rounding_has_taken_is_not_drawn():
    study = Orders(None, {"uniform": log_snr}, [8, 16])
    cells = study.begin(laboratory(points=101), DDIM())
    found = [{"tv": 1e-2, "kl": 1e-4}, {"tv": 1e-3, "kl": -1e-13}]
    figures = study.figures(list(zip(cells, found)))
    drawn = {name: figure.axes[0].lines[0].get_ydata() for name, figure in figures.items()}
    assert drawn["orders"].tolist() == [1e-2, 1e-3]
    assert math.isnan(drawn["orders_kl"][1])


def test_slopes_leave_out_what_rounding_and_folds_have_taken():
    assert last_slope([1, 2, 4, 8], [1.0, 0.25, 1e-14, math.nan]) == pytest.approx(2)
    assert math.isnan(last_slope([1, 2], [math.nan, 0.1]))
