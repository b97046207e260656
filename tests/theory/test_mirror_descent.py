"""MPO, OMPO and their neighbours at the numbers of RPS-2 and of the biased cycle, in double precision."""

import math

import numpy as np
import pytest
import torch

from datamodules.batches import Game
from datamodules.games import random_games, rps, rps2
from lightning_modules.theory.markov_game import (
    backward,
    exploitability,
    mean_payoff,
    occupancy,
    uniform,
)
from lightning_modules.theory.mirror_descent import (
    THEOREM_OMPO,
    Accelerated,
    Algorithm,
    Extragradient,
    MirrorDescent,
    NashMD,
    State,
    soft_step,
)
from lightning_modules.theory.simulation import slope


def played(game: Game, algorithm: Algorithm, rounds: int, every: int = 1):
    """(rounds, exploitability of the average, of the last policy, final state)."""
    state, total, at, average, last = algorithm.begin(game), 0, [], [], []
    for number in range(1, rounds + 1):
        visits = occupancy(game, state.log_policy)
        total = total + visits
        if number % every == 0:
            at.append(number)
            average.append(float(exploitability(game, total / number).max()))
            last.append(float(exploitability(game, visits).max()))
        state = algorithm(game, state, visits)
    return at, np.array(average), np.array(last), state


def ompo(beta: float, backup: str = "standard", returns: str = "rollout") -> MirrorDescent:
    return MirrorDescent(beta, 1, optimistic=True, backup=backup, returns=returns)


@pytest.mark.parametrize(
    ("algorithm", "average", "last"),
    [
        (MirrorDescent(2.0, 1), (2.46e-2, 9.02e-3), (0.61, 0.32)),
        (MirrorDescent(0.5, 1), (2.5e-2, 7.8e-3), (0.117, 0.18)),
        (ompo(2.0), (2.54e-3, 2.66e-4), (9.5e-3, 3.7e-9)),
        pytest.param(ompo(2.0, "soft"), (3.64e-3, 4.25e-4), (1.5e-2, 3.8e-9), marks=pytest.mark.slow),
        (ompo(0.7, "soft"), (5.9e-3, 1.26e-3), (0.137, 1.6e-2)),
    ],
)
def test_rps2_after_100_and_1000_rounds(algorithm, average, last):
    _, averages, lasts, _ = played(rps2(), algorithm, 1000, every=100)
    assert averages[[0, -1]] == pytest.approx(average, rel=0.02)
    assert lasts[[0, -1]] == pytest.approx(last, rel=0.03)


def test_the_step_of_the_theorem_with_rounds_fixed_beforehand():
    for rounds, expected in ((100, 0.1198), (1000, 0.0597)):
        _, average, _, _ = played(rps2(), MirrorDescent(None, rounds), rounds, every=rounds)
        assert average[-1] == pytest.approx(expected, abs=1e-4)
        assert 2 * average[-1] <= 4 * 2**2 * math.sqrt(math.log(3) / rounds)  # theorem 4


@pytest.mark.slow
def test_rates_over_two_decades():
    at, average, last, _ = played(rps2(), ompo(2.0), 10_000, every=10)
    assert -1.1 < slope(at, average) < -0.9
    assert average[-1] < 5e-5
    assert last[-1] < 1e-12
    at, average, last, _ = played(rps2(), MirrorDescent(2.0, 1), 10_000, every=10)
    assert -0.65 < slope(at, average) < -0.35
    assert last[-1] > 0.1
    assert average[-1] == pytest.approx(2.88e-3, rel=0.01)


@pytest.mark.slow
def test_the_theorem_of_ompo_bounds_its_gap():
    at, average, last, _ = played(rps2(), ompo(0.7, "soft"), 10_000, every=100)
    assert (2 * average <= 10 * 2 * math.log(9) / (0.7 * np.array(at))).all()
    assert average[-1] == pytest.approx(1.34e-4, rel=0.01)
    assert last[-1] == pytest.approx(2.5e-10, rel=0.02)


def test_without_the_future_the_myopic_point_is_learned():
    game = rps2()
    _, _, last, state = played(game, ompo(2.0, returns="one_step"), 3000, every=3000)
    expected = torch.tensor([4 / 9, 2 / 9, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(state.log_policy[0, 0].exp(), expected, rtol=0, atol=1e-8)
    assert last[-1] == pytest.approx(2 / 45, abs=1e-8)


def test_with_the_future_the_equilibrium_is_learned():
    game = rps2()
    state = played(game, ompo(2.0), 3000, every=3000)[-1]
    torch.testing.assert_close(state.log_policy[0, 0].exp(), game.nash[0, 0], rtol=0, atol=1e-8)
    torch.testing.assert_close(state.log_policy[1].exp(), game.nash[1], rtol=0, atol=1e-8)


def test_the_divergence_of_occupancies_is_that_of_trajectories_and_bounds_their_distance():
    game = random_games(3, [3, 3], [2, 2], games=1, seed=0)
    draw = torch.Generator().manual_seed(1)
    p, q = (torch.randn(1, 3, 3, 2, generator=draw, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    d, e = occupancy(game, p), occupancy(game, q)
    up_to = (d * (p - q)).sum((-1, -2)).cumsum(-1)[0]
    for stage in range(3):
        assert up_to[stage] >= (d - e)[0, stage].abs().sum() ** 2 / 2
    assert float(up_to[-1]) == pytest.approx(trajectory_kl(game, p, q), abs=1e-10)


def trajectory_kl(game: Game, p: torch.Tensor, q: torch.Tensor) -> float:
    """KL of the laws of (s_1, a_1, ..., s_3, a_3), by enumeration."""

    def law(policy: torch.Tensor) -> torch.Tensor:
        pi, moves = policy.exp()[0], game.transition[0]
        return torch.einsum("a,ax,xb,xby,yc->axbyc", pi[0, 0], moves[0, 0], pi[1], moves[1], pi[2])

    first, second = law(p), law(q)
    return float((first * (first / second).log()).sum())


def test_the_soft_step_maximises_reward_less_the_weighted_divergence():
    game = random_games(3, [4, 4], [3, 3], games=1, seed=2)
    start, beta = uniform(game), 0.9
    reward = mean_payoff(game, occupancy(game, start))
    weight = torch.arange(3, 0, -1, dtype=torch.float64)[:, None, None] / beta

    def objective(policy: torch.Tensor) -> torch.Tensor:
        expected = reward - weight * (policy - start)
        return (occupancy(Game(*spread(game, len(policy))), policy) * expected).sum((-1, -2, -3))

    found = soft_step(game, reward, start, beta)
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, *found.shape[1:], generator=draw, dtype=torch.float64)
    others = (found + 0.3 * noise).log_softmax(-1)
    assert (objective(others) < objective(found)).all()

    def soft_value(stage, q):
        return (start[..., stage, :, :] + q / weight[stage]).logsumexp(-1) * weight[stage, 0]

    value = soft_value(0, backward(game, reward, soft_value)[:, 0])[:, 0]
    torch.testing.assert_close(objective(found), value, rtol=0, atol=1e-10)


def spread(game: Game, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(table.expand(count, *table.shape[1:]) for table in (game.payoff, game.transition))


def test_both_players_of_ompo_have_the_same_iterates():
    game = rps2()
    mirrored = 1 - game.payoff.permute(0, 3, 4, 1, 2)  # what the second player gets, from its side
    first, second = (Game(payoff, game.transition) for payoff in (game.payoff, mirrored))
    one, other = ompo(0.7, "soft").begin(first), ompo(0.7, "soft").begin(second)
    for _ in range(50):
        one_played, other_played = occupancy(first, one.log_policy), occupancy(second, other.log_policy)
        one, other = ompo(0.7, "soft")(first, one, other_played), ompo(0.7, "soft")(second, other, one_played)
        torch.testing.assert_close(one.log_policy, other.log_policy, rtol=0, atol=1e-10)


def test_with_one_stage_mpo_is_exponentiated_gradient_and_ompo_optimistic_weights():
    game, beta = rps(0.4, 0.2, 0.6), 0.5
    table = game.payoff[0, 0, :, 0, :]
    plain = optimistic = np.full(3, 1 / 3)
    before = table.numpy() @ optimistic
    states = {True: ompo(beta).begin(game), False: MirrorDescent(beta, 1).begin(game)}
    for _ in range(20):
        plain = plain * np.exp(beta * table.numpy() @ plain)
        plain = plain / plain.sum()
        now = table.numpy() @ optimistic
        optimistic = optimistic * np.exp(beta * (2 * now - before))
        optimistic, before = optimistic / optimistic.sum(), now
        for flag, state in states.items():
            algorithm = MirrorDescent(beta, 1, optimistic=flag)
            states[flag] = algorithm(game, state, occupancy(game, state.log_policy))
    assert states[False].log_policy[0, 0].exp().numpy() == pytest.approx(plain, abs=1e-12)
    assert states[True].log_policy[0, 0].exp().numpy() == pytest.approx(optimistic, abs=1e-12)


def test_momentum_does_not_help_on_a_cycle_where_optimism_does():
    game = rps(0.4, 0.2, 0.6)
    assert all(played(game, Accelerated(2.0, alpha), 400, every=400)[2][-1] > 0.02 for alpha in (0.0, 0.3))
    assert played(game, ompo(2.0), 400, every=400)[2][-1] < 1e-4


@pytest.mark.slow
def test_the_table_of_momentum_on_a_cycle():
    # apo.md's table is of the policy after 3,000 updates, extrapolated: the one that would play round 3,001
    game, alphas = rps(0.4, 0.2, 0.6), (-0.3, 0.0, 0.3, 0.5)
    for beta, known in ((0.5, (0.089, 0.093, 0.223, 0.186)), (2.0, (0.2, 0.2, 0.1, 0.3))):
        for alpha, expected in zip(alphas, known):
            _, average, last, _ = played(game, Accelerated(beta, alpha), 3001, every=3001)
            assert last[-1] == pytest.approx(expected, abs=6e-4)
            assert average[-1] < 3e-3
    assert played(game, ompo(0.5), 3000, every=3000)[2][-1] == pytest.approx(2.4e-3, abs=1e-4)
    assert played(game, ompo(2.0), 3000, every=3000)[2][-1] < 1e-15


def test_without_momentum_apo_is_mpo():
    game = rps2()
    plain, still = MirrorDescent(2.0, 1), Accelerated(2.0, 0.0)
    states: list[State] = [plain.begin(game), still.begin(game)]
    for _ in range(30):
        states = [a(game, s, occupancy(game, s.log_policy)) for a, s in zip((plain, still), states)]
    torch.testing.assert_close(states[0].log_policy, states[1].log_policy, rtol=0, atol=1e-12)


def test_extragradient_reaches_the_equilibrium_and_nash_md_that_of_the_penalised_game():
    game = rps2()
    assert played(game, Extragradient(2.0), 600, every=600)[2][-1] < 1e-4
    reached = {tau: played(game, NashMD(0.5, tau), 300, every=300)[2][-1] for tau in (0.3, 0.1)}
    assert reached[0.1] < reached[0.3]


def test_a_step_out_of_range_is_refused():
    for make in (
        lambda: MirrorDescent(-1.0, 1),
        lambda: Accelerated(1.0, 1.0),
        lambda: NashMD(2.0, 0.6),
    ):
        with pytest.raises(ValueError, match="must"):
            make()


def test_the_largest_step_of_the_theorem():
    assert pytest.approx(0.7071, abs=1e-4) == THEOREM_OMPO
