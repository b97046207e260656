"""Identities of Markov games (arXiv 2502.12678) on random ones, and the equilibrium of RPS-2."""

import itertools

import numpy as np
import pytest
import torch

from datamodules.batches import Game
from datamodules.games import checked, from_file, random_games, rps, rps2
from lightning_modules.theory.markov_game import (
    best_response_value,
    exploitability,
    mean_payoff,
    occupancy,
    pairwise_q,
    policy_of,
    q_values,
    uniform,
)

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture
def game() -> Game:
    return one(random_games(3, [3, 3], [2, 2], games=1, seed=0))


def one(games: Game) -> Game:
    """The first of a batch of games."""
    return Game(games.payoff[0], games.transition[0])


def policies(game: Game, count: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shape = game.payoff.shape[:-2]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).log_softmax(-1) for _ in range(count)]


def value(game: Game, log_policy: torch.Tensor, log_opponent: torch.Tensor) -> torch.Tensor:
    reward = mean_payoff(game, occupancy(game, log_opponent))
    return (occupancy(game, log_policy) * reward).sum()


def test_a_fixed_opponent_makes_the_pairwise_values_those_of_a_decision_process(game):
    pi, mu = policies(game, 2)
    against = occupancy(game, mu)
    averaged = torch.einsum("hsatb,htb->hsa", pairwise_q(game, pi, mu), against)
    torch.testing.assert_close(averaged, q_values(game, mean_payoff(game, against), pi), **EXACT)


def test_the_values_of_the_two_players_sum_to_the_horizon(game):
    pi, mu = policies(game, 2)
    assert value(game, pi, mu) + value(game, mu, pi) == pytest.approx(3, abs=1e-10)
    assert value(game, pi, pi) == pytest.approx(1.5, abs=1e-10)


def test_the_difference_of_two_values_is_a_sum_over_the_states_of_the_first(game):
    pi, mu, nu = policies(game, 3)
    q = q_values(game, mean_payoff(game, occupancy(game, nu)), mu)
    states = occupancy(game, pi).sum(-1, keepdim=True)
    lemma = (states * q * (pi.exp() - mu.exp())).sum()
    assert lemma == pytest.approx(float(value(game, pi, nu) - value(game, mu, nu)), abs=1e-10)


def test_the_best_response_is_the_best_of_all_deterministic_policies(game):
    (mu,) = policies(game, 1)
    reward = mean_payoff(game, occupancy(game, mu))
    plans = torch.tensor(list(itertools.product(range(2), repeat=9))).reshape(-1, 3, 3)
    deterministic = torch.nn.functional.one_hot(plans, 2).double()
    every = Game(game.payoff.expand(len(plans), *game.payoff.shape), game.transition.expand(len(plans), 2, 3, 2, 3))
    values = (occupancy(every, deterministic.log()) * reward).sum((1, 2, 3))
    assert best_response_value(game, reward) == pytest.approx(float(values.max()), abs=1e-10)


def test_rps2_has_its_equilibrium_in_closed_form():
    game = rps2()
    myopic = torch.tensor([4 / 9, 2 / 9, 1 / 3], dtype=torch.float64)
    first = torch.cat([myopic.expand(1, 3, 3), game.nash[1:]])
    assert exploitability(game, occupancy(game, game.nash.log())) == pytest.approx(0, abs=1e-12)
    assert exploitability(game, occupancy(game, first.log())) == pytest.approx(2 / 45, abs=1e-12)
    assert exploitability(game, occupancy(game, uniform(game))) == pytest.approx(0.175, abs=1e-12)


def test_the_cycle_has_its_equilibrium_in_closed_form():
    game = rps(0.4, 0.2, 0.6)
    torch.testing.assert_close(game.nash[0, 0], torch.tensor([0.5, 1 / 6, 1 / 3], dtype=torch.float64))
    assert exploitability(game, occupancy(game, game.nash.log())) == pytest.approx(0, abs=1e-12)


def test_the_policy_of_an_occupancy_has_that_occupancy_also_where_states_are_never_reached():
    game = rps2()
    (pi,) = policies(game, 1)
    played = occupancy(game, pi) + occupancy(game, uniform(game))
    averaged = policy_of(played)
    assert averaged.isfinite().all()
    torch.testing.assert_close(occupancy(game, averaged), played / 2, **EXACT)


def test_games_side_by_side_are_the_games_one_by_one():
    games = random_games(3, [4, 4], [3, 3], games=5, seed=1)
    together = exploitability(games, occupancy(games, uniform(games)))
    for place in range(5):
        single = Game(games.payoff[place], games.transition[place])
        assert exploitability(single, occupancy(single, uniform(single))) == pytest.approx(
            float(together[place]), abs=1e-12
        )


def test_random_games_have_a_size_and_are_constant_sum():
    games = random_games(3, [1, 100], [2, 10], games=1, seed=3)
    checked(games.payoff, games.transition, "random")
    assert 1 <= games.payoff.shape[2] <= 100
    with pytest.raises(ValueError, match=r"states=\[5, 2\]"):
        random_games(3, [5, 2], [2, 2], games=1, seed=0)


def test_a_game_of_a_file_is_read_or_refused_in_a_sentence(tmp_path):
    path, game = tmp_path / "game.npz", rps2()
    tables = {"payoff": game.payoff.numpy(), "transition": game.transition.numpy()}
    np.savez(path, **tables)
    assert torch.equal(from_file(str(path)).payoff, game.payoff)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        from_file(str(tmp_path / "other.npz"))
    for broken, reason in (
        ({"payoff": tables["payoff"]}, "no table transition"),
        ({**tables, "payoff": tables["payoff"] + 0.1}, "constant-sum"),
        ({**tables, "payoff": tables["payoff"][:1]}, "do not fit"),
        ({**tables, "transition": tables["transition"] * 0.5}, "distribution"),
    ):
        np.savez(path, **broken)
        with pytest.raises(ValueError, match=reason):
            from_file(str(path))
