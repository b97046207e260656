"""Offline learning at the numbers of its derivation: where pessimism pays, what coverage costs, two stages, limits."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from datamodules.bandit_instances import linear, minimax, skewed, tail
from lightning_modules.theory import decisions
from lightning_modules.theory.bradley_terry import penalised_fit
from lightning_modules.theory.feedback import Preferences
from lightning_modules.theory.rates import crossing, power
from lightning_modules.theory.regularizer import ChiSquare
from tests.theory.playing import at, offline

TWO_ARMS = {p: skewed([0.6, 0.4], p, None, 4.0, 0.5) for p in (0.5, 0.1, 0.02)}
FOUR_ARMS = {p: skewed([1.0, 0.4, 0.2, 0.0], p, None, 6.0, 0.5) for p in (0.25, 0.05, 0.01, 0.003)}


def constants(run, last: int) -> np.ndarray:
    """n times the mean gap at the last numbers of samples."""
    rounds, values = run.gaps()
    return (rounds * values.mean(1))[-last:]


def fitted_slope(run):
    rounds, values = run.gaps()
    return power(rounds[rounds >= 512], values[rounds >= 512])


@pytest.mark.parametrize(
    ("p", "c", "closed", "least", "most"),
    [
        (0.5, 0.0, 0.428, -1.06, -0.94),
        pytest.param(0.5, 1.0, 0.428, -1.06, -0.94, marks=pytest.mark.slow),
        pytest.param(0.1, 0.0, 0.883, -1.06, -0.94, marks=pytest.mark.slow),
        (0.1, 1.0, 3.98, -1.06, -0.88),
    ],
)
def test_the_gap_falls_as_one_over_n_with_the_closed_form_as_constant(p, c, closed, least, most):
    run = offline(TWO_ARMS[p], 4.0, c, copies=2000, samples=65536)
    assert run.predicted == pytest.approx(closed, rel=2e-3)
    assert least < fitted_slope(run).value < most
    assert constants(run, 3) == pytest.approx(closed, rel=0.12)


def test_the_samples_for_a_gap_are_inversely_proportional_to_it():
    rounds, values = offline(TWO_ARMS[0.5], 4.0, 0.0, copies=2000, samples=65536).gaps()
    needed = [eps * crossing(rounds, values.mean(1), eps) for eps in (1e-2, 1e-3, 1e-4)]
    assert max(needed) / min(needed) < 1.2


def test_pessimism_pays_where_a_bad_action_is_rare():
    plug_in, pessimistic = (offline(tail(50, 0.001, 1.0), 10.0, c, copies=300, samples=65536) for c in (0.0, 1.0))
    assert at(pessimistic, "gap", 1024) < at(plug_in, "gap", 1024) / 100
    assert at(plug_in, "gap", 1024) == pytest.approx(1.09, rel=0.1)
    assert at(plug_in, "gap", 64) < at(plug_in, "gap", 256) < at(plug_in, "gap", 1024)  # it rises before it falls
    assert at(plug_in, "gap", 65536) < 1e-4 > at(pessimistic, "gap", 65536)


@pytest.mark.parametrize("p", [0.02, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.5, 0.1))])
def test_with_chi_square_coverage_does_not_matter(p):
    run = offline(TWO_ARMS[p], 1.0, 0.0, copies=2000, samples=65536, regularizer=ChiSquare())
    assert run.predicted == pytest.approx(0.125, rel=1e-9)
    assert constants(run, 3) == pytest.approx(0.125, rel=0.12)


def test_with_kl_coverage_does_matter():
    rates = [offline(TWO_ARMS[p], 1.0, 0.0, copies=1, samples=1).predicted for p in TWO_ARMS]
    assert rates == pytest.approx([0.124, 0.146, 0.151], abs=6e-4)


def test_pessimism_pays_with_pairs_too():
    runs = [offline(tail(12, 0.002, 1.0), 10.0, c, copies=60, samples=2048, feedback=Preferences()) for c in (0.0, 1.0)]
    plug_in, pessimistic = ([at(run, "gap", n) for n in (128, 512)] for run in runs)
    assert plug_in == pytest.approx([0.88, 1.09], rel=0.25)
    assert pessimistic[0] < plug_in[0] / 10
    assert pessimistic[1] < plug_in[1] / 50


@pytest.mark.parametrize("p", [0.01, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.25, 0.05))])
def test_two_stages_pay_for_coverage_once(p):
    one, two = (offline(FOUR_ARMS[p], 6.0, 0.0, copies=1000, samples=65536, first=first) for first in (1.0, 0.5))
    closed = {0.25: (0.21, 0.24), 0.05: (2.76, 0.89), 0.01: (19.4, 1.81)}[p]
    assert (one.predicted, two.predicted) == pytest.approx(closed, rel=0.02)
    for run, tolerance in ((one, 0.1), (two, 0.1)):
        assert constants(run, 1) == pytest.approx(run.predicted, rel=tolerance)
        assert 16384 * at(run, "gap", 16384) == pytest.approx(run.predicted, rel=tolerance)
    if p == 0.01:
        assert constants(one, 1) / constants(two, 1) > 8
        assert constants(one, 7)[0] / constants(two, 7)[0] < 8  # the burn-in, which is the additive term


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.25, 0.05])
def test_two_stages_of_pairs(p):
    bandit, samples = skewed([1.0, 0.4, 0.2, 0.0], p, None, 3.0, 0.5), 32768
    for first, closed in zip((1.0, 0.5), {0.25: (5.25, 6.14), 0.05: (20.6, 10.3)}[p]):
        run = offline(bandit, 3.0, 0.0, copies=1000, samples=samples, first=first, feedback=Preferences())
        assert run.predicted == pytest.approx(closed, rel=0.01)
        assert constants(run, 1) == pytest.approx(closed, rel=0.12)


def test_linear_rewards_have_their_closed_form():
    for c in (0.0, 1.0):
        run = offline(linear(20, 5, 4, 0.5, 0), 3.0, c, copies=500, samples=4096)
        assert constants(run, 3) == pytest.approx(run.predicted, rel=0.12)


def test_a_bonus_of_nothing_is_the_plug_in():
    """Also where an action was never taken, which without a bonus is worth the middle of the range."""
    data = offline(tail(12, 0.01, 1.0), 2.0, 0.0, copies=5, samples=32)
    tiny = offline(tail(12, 0.01, 1.0), 2.0, 1e-9, copies=5, samples=32)
    count = data.statistics[..., 0]
    assert (count == 0).any()
    values = [run.feedback.value(run.statistics, run.bandit, run.bonus, run.behaviour) for run in (data, tiny)]
    torch.testing.assert_close(values[0][count > 0], values[1][count > 0], rtol=0, atol=1e-7)
    assert (values[0][count == 0] == 0.5).all()
    assert (values[1][count == 0] == -1).all()


def test_two_stages_without_the_first_sample_the_reference():
    """The policy learned from nothing is the reference, so both extremes of the share are a single stage."""
    runs = [offline(FOUR_ARMS[0.05], 6.0, 0.0, copies=1000, samples=4096, first=first) for first in (0.0, 1.0)]
    torch.testing.assert_close(runs[0].learned(runs[0].statistics), runs[0].bandit.log_reference.expand(1000, -1, -1))
    means = [at(run, "gap", 4096) for run in runs]
    assert means[0] == pytest.approx(means[1], rel=0.15)


def test_a_data_set_is_the_same_whoever_is_beside_it():
    for feedback in ({}, {"feedback": Preferences()}):
        alone, together = (offline(FOUR_ARMS[0.05], 6.0, 1.0, n, 4096, first=0.5, **feedback) for n in (1, 5))
        for mine, all_ in zip(alone.curves["gap"], together.curves["gap"]):
            assert float(mine[0]) == pytest.approx(float(all_[0]), rel=1e-9)


def test_the_reference_policy_never_learns_and_the_oracle_knows():
    reference, oracle = (
        offline(FOUR_ARMS[0.05], 6.0, 0.0, 3, 64, decision=d) for d in (decisions.reference, decisions.oracle)
    )
    _, values = reference.gaps()
    assert values == pytest.approx(values[0, 0])
    assert oracle.gaps()[1] == pytest.approx(0, abs=1e-12)


def test_scores_of_pairs_are_those_of_a_general_optimiser():
    draw = np.random.default_rng(0)
    for answers in (2, 4, 7):
        wins = draw.integers(0, 20, (answers, answers)).astype(float)
        np.fill_diagonal(wins, 0)
        wins[:, 0] = 0  # answer 0 never loses
        wins /= wins.sum()
        penalty = 1e-4

        def loss(scores: np.ndarray, wins=wins, penalty=penalty) -> float:
            return (wins * np.logaddexp(0, scores[None, :] - scores[:, None])).sum() + penalty * (scores**2).sum()

        best = minimize(loss, np.zeros(answers), method="BFGS", options={"gtol": 1e-10}).x
        found = penalised_fit(torch.from_numpy(wins)[None], 1.0, penalty, longest=1.0)[0].numpy()
        assert loss(found) <= loss(best) + 1e-12
        assert found == pytest.approx(best, abs=2e-4)
        gradient = wins / (1 + np.exp(found[:, None] - found[None, :]))
        assert gradient.sum(0) - gradient.sum(1) + 2 * penalty * found == pytest.approx(0, abs=1e-10)


def test_what_an_offline_method_cannot_learn_from_is_refused():
    with pytest.raises(ValueError, match="no bandit with fixed contexts"):
        offline(linear(0, 4, 3, 0.5, 0), 1.0, 0.0, 2, 16)
    with pytest.raises(ValueError, match="no bandit with fixed contexts"):
        offline(minimax(5, [256, 512, 1024], 0.5), 1.0, 0.0, 2, 16)
    with pytest.raises(ValueError, match="feedback=preference is for tables"):
        offline(linear(5, 4, 3, 0.5, 0), 1.0, 0.0, 2, 16, feedback=Preferences())
    with pytest.raises(ValueError, match=r"model.first=1.5 must lie in \[0, 1\]"):
        offline(FOUR_ARMS[0.05], 1.0, 0.0, 2, 16, first=1.5)
