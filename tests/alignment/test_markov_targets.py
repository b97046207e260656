"""Targets of MPO and OMPO, at the numbers of the derivation, and their regression as a loss of pairs."""

import pytest
import torch

from lightning_modules.alignment.markov_targets import advantages, counted_turns, q_values, tie
from lightning_modules.alignment.pairwise import mpo, sppo


def test_the_targets_of_one_answer():
    current, previous, eta = torch.tensor([1.9]), torch.tensor([1.7]), 0.1
    center = tie(3)
    assert float(eta * advantages(current, None, center)) == pytest.approx(0.04)
    assert float(eta * advantages(current, previous, center, tau=0.0)) == pytest.approx(0.21)
    assert float(eta * advantages(current, previous, center)) == pytest.approx(0.06)


def test_a_tie_leaves_the_policy_unchanged_unless_tau_is_zero():
    table, here = torch.full((4, 4), 0.5), torch.zeros(1, requires_grad=True)
    for returns in ("one_step", "rollout"):
        turns = counted_turns(returns, 3)
        q = q_values(table, turns)
        for previous in (None, q):
            value = advantages(q, previous, tie(turns))[:2][None]
            loss = mpo(here, here, value, beta=0.1).sum()
            assert loss.item() == 0
            assert float(torch.autograd.grad(loss, here)[0]) == 0
    pushed = advantages(q, q, tie(turns), tau=0.0)
    assert (pushed > 0).all()


def test_one_step_is_sppo():
    draw = torch.Generator().manual_seed(0)
    upper = torch.rand(5, 5, generator=draw).triu(1)
    table = upper + (1 - upper).T.tril(-1) + 0.5 * torch.eye(5)
    q = q_values(table, counted_turns("one_step", 3))
    a, b = torch.tensor([0.3]), torch.tensor([-0.2])
    two = [int(q.argmax()), int(q.argmin())]
    ours = mpo(a, b, advantages(q, None, tie(1))[two][None], beta=0.1)
    torch.testing.assert_close(ours, sppo(a, b, table.mean(1)[two][None], beta=0.1))


def test_adding_to_q_moves_the_regression_which_is_why_the_center_matters():
    q = torch.tensor([[1.9, 1.1]])
    a, b = torch.zeros(1), torch.zeros(1)
    assert not torch.allclose(mpo(a, b, q - tie(3), beta=1.0), mpo(a, b, q - tie(1), beta=1.0))


def test_what_is_no_way_of_counting_is_refused():
    with pytest.raises(ValueError, match=r"model\.returns=terminal: there are one_step, rollout"):
        counted_turns("terminal", 3)
