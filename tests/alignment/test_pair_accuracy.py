"""Accuracy, intervals and calibration of log-odds."""

import math

import pytest
import torch

from lightning_modules.alignment.pair_accuracy import intervals, measure, wilson


def test_ties_of_the_label_do_not_count_and_those_of_the_score_are_wrong():
    found = measure(torch.tensor([2.0, 0.0, -1.0, 3.0]), torch.tensor([1.0, 1.0, 0.0, 0.5]))
    assert found["pair_accuracy"] == pytest.approx(2 / 3)


def test_even_odds_cost_ln_2_and_are_calibrated_on_even_labels():
    found = measure(torch.zeros(10), torch.tensor([0.0, 1.0] * 5))
    assert found["nll"] == pytest.approx(math.log(2))
    assert found["ece"] == 0
    assert measure(torch.full((10,), 50.0), torch.tensor([0.0, 1.0] * 5))["ece"] == pytest.approx(0.5)


def test_the_order_in_which_a_pair_is_named_does_not_change_its_calibration():
    generator = torch.Generator().manual_seed(0)
    log_odds = torch.randn(500, generator=generator)
    label = (torch.rand(500, generator=generator) < torch.sigmoid(log_odds)).float()
    better_first = torch.where(label == 1, log_odds, -log_odds)
    found, same = measure(log_odds, label), measure(better_first, torch.ones(500))
    assert same == pytest.approx(found)


def test_labels_drawn_from_the_predictions_are_calibrated():
    generator = torch.Generator().manual_seed(0)
    log_odds = 2 * torch.randn(20_000, generator=generator)
    label = (torch.rand(20_000, generator=generator) < torch.sigmoid(log_odds)).float()
    assert measure(log_odds, label)["ece"] < 0.015
    assert measure(3 * log_odds, label)["ece"] > 0.08


def test_wilsons_interval_is_the_published_one_and_open_at_the_ends():
    low, high = wilson(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20)[0] == pytest.approx(0)
    assert 0 < wilson(20, 20)[0] < 1
    assert wilson(0, 0) == (0, 1)
    assert intervals(torch.ones(4), torch.ones(4))["pair_accuracy"] == wilson(4, 4)
