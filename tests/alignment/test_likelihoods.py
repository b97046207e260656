"""Many answers in one row have the probabilities that each of them has by itself."""

import pytest

from lightning_modules.alignment.likelihoods import likelihoods
from lightning_modules.alignment.policies import tiny
from lightning_modules.alignment.rollout import score_responses


@pytest.mark.parametrize("answers", [[[4], [5, 6, 7], [5, 6], [5, 8, 7], [8, 9]], [[4], [5]]])
def test_likelihoods_of_listed_answers_are_those_of_the_training_forward(answers):
    policy = tiny(width=16, layers=2, heads=2, hidden=16, context=128)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [3]] * 7
    found = likelihoods(policy, prompts, answers)
    expected = score_responses(policy, [(prompt, answer) for prompt in prompts for answer in answers])
    assert found.flatten().tolist() == pytest.approx([sum(values) for values in expected], abs=1e-5)
