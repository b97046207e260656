"""Pairs and their values from tables of preferences."""

import random

import pytest
import torch

from lightning_modules.alignment.labelling import (
    aggregated,
    choices,
    choose,
    cut_off_loses,
    log_odds,
    mean_scores,
    win_rates,
)

CYCLE = torch.tensor([[0.5, 0.7, 0.3], [0.3, 0.5, 0.7], [0.7, 0.3, 0.5]])
ANSWERS = ["a", "b", "c"]


def bradley_terry(rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return torch.sigmoid(rewards[:, None] - rewards[None, :])


def test_a_win_rate_counts_the_answer_itself_as_a_tie():
    table = torch.tensor([[0.5, 1.0], [0.0, 0.5]])
    assert win_rates(table).tolist() == [0.75, 0.25]
    assert win_rates(CYCLE).tolist() == pytest.approx([0.5, 0.5, 0.5])


def test_aggregation_leaves_bradley_terry_and_turns_a_cycle_into_ties():
    table = bradley_terry([0.3, -1.0, 2.0, 0.1])
    torch.testing.assert_close(aggregated(table), table, rtol=0, atol=1e-12)
    torch.testing.assert_close(aggregated(CYCLE), torch.full((3, 3), 0.5))


def test_an_aggregated_table_is_transitive_whatever_the_raw_one_is():
    raw = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    raw = torch.tril(raw, -1)
    raw = raw + torch.triu(1 - raw.T, 1) + torch.eye(5) / 2
    odds = log_odds(aggregated(raw))
    torch.testing.assert_close(odds[:, :, None] + odds[None, :, :], odds[:, None, :].expand(5, 5, 5), atol=1e-9, rtol=0)


def test_mean_scores_of_bradley_terry_are_the_centred_rewards():
    rewards = [0.3, -1.0, 2.0, 0.1]
    expected = torch.tensor(rewards, dtype=torch.float64) - sum(rewards) / 4
    torch.testing.assert_close(mean_scores(bradley_terry(rewards)), expected)


def test_scores_of_certain_verdicts_are_finite():
    assert torch.isfinite(mean_scores(torch.tensor([[0.5, 1.0], [0.0, 0.5]]))).all()


def test_best_and_worst_are_those_of_the_mean_win_rate():
    table = bradley_terry([0.0, 3.0, -2.0])
    assert choose(table, ANSWERS, "best_worst", random.Random(0)) == [(1, 2)]


@pytest.mark.parametrize("rule", ["best_worst", "all", "random"])
def test_ties_and_equal_texts_make_no_pair(rule):
    assert choose(torch.full((3, 3), 0.5), ANSWERS, rule, random.Random(0)) == []
    assert choose(bradley_terry([1.0, 0.0]), ["same", "same"], rule, random.Random(0)) == []


def test_all_pairs_of_a_cycle_have_the_preferred_answer_first():
    assert choose(CYCLE, ANSWERS, "all", random.Random(0)) == [(0, 1), (2, 0), (1, 2)]
    assert choose(CYCLE, ANSWERS, "best_worst", random.Random(0)) == []


def test_a_random_pair_follows_its_generator_and_reaches_every_pair():
    drawn = {choose(CYCLE, ANSWERS, "random", random.Random(seed))[0] for seed in range(40)}
    assert drawn == {(0, 1), (2, 0), (1, 2)}
    assert choose(CYCLE, ANSWERS, "random", random.Random(3)) == choose(CYCLE, ANSWERS, "random", random.Random(3))


def test_an_answer_that_was_cut_off_loses_to_one_that_ended():
    first, second = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert cut_off_loses(torch.full((4,), 0.2), first, second).tolist() == pytest.approx([0.2, 1.0, 0.0, 0.5])


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match=r"model\.winrate=rwa: there are raw, aggregated"):
        choices(winrate="rwa")
